"""The same call gives the same bits, whatever was asked before: no cache and no counter changes a result."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gpntk
from gpntk.jacobians import AbstractJacobianBackend, AutoBackend, AverageBackend, ExplicitBackend, StackedBackend
from tests.cases import CASES

ROWS = (3, 40, 400)
"""Few rows, for which an explicit J is cheaper, and many."""


def many_outputs() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 40)).double()


def networks() -> dict[str, Callable[[], AbstractJacobianBackend]]:
    by_name = {case.name: case for case in CASES}

    def auto(name: str) -> AutoBackend:
        case = by_name[name]
        return AutoBackend(gpntk.freeze(case.module(), input_shape=case.input_shape))

    return {
        "mlp": lambda: auto("mlp-c3"),
        "tokens": lambda: auto("tokens-c3"),
        "many outputs": lambda: AutoBackend(gpntk.freeze(many_outputs())),
        "stacked": lambda: StackedBackend([auto("mlp-c1"), ExplicitBackend(torch.sin, 5)]),
        "average": lambda: AverageBackend(gpntk.freeze(by_name["mlp-c3"].module()), AutoBackend),
    }


WIDTHS = {"mlp": 5, "tokens": 12, "many outputs": 4, "stacked": 5, "average": 5}


def inputs(width: int) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {rows: torch.randn(1, rows, width, generator=generator).double() for rows in ROWS}


def product(backend: AbstractJacobianBackend, x: Tensor, kind: str, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(columns)
    if kind == "vjp":
        size = x.shape[1] * backend.num_outputs(x)
        return backend.vjp(x, torch.randn(1, columns, size, generator=generator).double())
    if kind == "jvp":
        backend.num_outputs(x)
        return backend.jvp(x, torch.randn(1, columns, backend.num_features, generator=generator).double())
    if kind == "diagonal":
        return backend.diagonal(x)
    x = x[:, :40]
    return backend.gram(x, x, per_layer=kind == "layers")


CALLS = st.tuples(
    st.sampled_from(ROWS), st.sampled_from(["vjp", "jvp", "gram", "layers", "diagonal"]), st.sampled_from([1, 7])
)


@pytest.mark.parametrize("name", WIDTHS)
@settings(max_examples=8, deadline=None)
@given(calls=st.lists(CALLS, min_size=2, max_size=8))
def test_products_do_not_depend_on_what_was_asked_before(name: str, calls: list[tuple[int, str, int]]) -> None:
    make, data = networks()[name], inputs(WIDTHS[name])
    used = make()
    for rows, kind, columns in calls:
        x = data[rows]
        assert torch.equal(product(used, x, kind, columns), product(make(), x, kind, columns)), (rows, kind, columns)


@pytest.mark.parametrize("rows", [60, 1500])
def test_a_kernel_multiplies_the_same_the_tenth_time(rows: int) -> None:
    module = nn.Sequential(nn.Linear(20, 300), nn.Tanh(), nn.Linear(300, 20), nn.Tanh(), nn.Linear(20, 1))
    kernel = gpntk.NTKKernel(module)
    x, v = torch.randn(rows, 20), torch.randn(rows, 1)
    first = kernel(x).evaluate_kernel() @ v
    kernel(x).to_dense()
    for _ in range(9):
        assert torch.equal(kernel(x).evaluate_kernel() @ v, first)
