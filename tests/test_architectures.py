"""Real architectures: which uses of parameters have a rule, and that all products equal the reference Jacobian."""

import importlib.util

import pytest
import torch
from torch import Tensor, nn

import gpntk
from gpntk.errors import UnruledError
from gpntk.jacobians import AbstractJacobianBackend, StackedBackend
from tests.architectures import ARCHITECTURES
from tests.cases import CASES, Case, reference_jacobian

EVERY = [*CASES, *ARCHITECTURES]


def assert_products(backend: AbstractJacobianBackend, xs: list[Tensor], js: list[Tensor], tolerance: float) -> None:
    """Every product against explicit Jacobians, the Gram also of equal inputs, which has shortcuts of its own."""
    (x1, x2), (j1, j2) = (x.unsqueeze(0) for x in xs), js
    v, u = torch.randn(1, 3, j1.shape[1]).to(x1), torch.randn(1, 3, j1.shape[0]).to(x1)
    for value, exact in (
        (backend.jvp(x1, v)[0], v[0] @ j1.T),
        (backend.vjp(x1, u)[0], u[0] @ j1),
        (backend.gram(x1, x2)[0, 0], j1 @ j2.T),
        (backend.gram(x1, x1)[0, 0], j1 @ j1.T),
        (backend.diagonal(x1)[0, 0], j1.square().sum(-1)),
    ):
        assert ((value - exact).abs().max() / exact.abs().max()).item() < tolerance
    grams, diagonals = backend.gram(x1, x2, per_layer=True)[0], backend.diagonal(x1, per_layer=True)[0]
    bound = tolerance * (j1 @ j1.T).abs().max()
    groups = backend.feature_groups(x1.device)
    for group, (gram, diagonal) in enumerate(zip(grams, diagonals, strict=True)):
        columns = groups == group
        assert (gram - j1[:, columns] @ j2[:, columns].T).abs().max() < bound
        assert (diagonal - j1[:, columns].square().sum(-1)).abs().max() < bound


@pytest.mark.parametrize("case", ARCHITECTURES, ids=lambda case: case.name)
def test_products_equal_the_reference_jacobian(case: Case) -> None:
    module = case.module()
    outputs = module(case.x(2).view(-1, *case.input_shape)).reshape(2, -1).shape[1]
    # As many rows as outputs, once: what confuses the two would go unnoticed otherwise.
    xs = [case.x(max(outputs, 3)), case.x(4)]
    js = [reference_jacobian(module, x.view(-1, *case.input_shape)) for x in xs]
    network = gpntk.freeze(module, input_shape=case.input_shape)
    backends = [gpntk.jacobians.AutodiffBackend(network), gpntk.AutoBackend(network)]
    if case.structured:
        backends += [
            gpntk.jacobians.StructuredBackend(network),
            gpntk.jacobians.StructuredBackend(network, memory_budget=100_000),
        ]
    for backend in backends:
        assert_products(backend, xs, js, 1e-9)


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_every_use_has_a_rule_but_those_that_have_none(case: Case) -> None:
    backend = gpntk.jacobians.StructuredBackend(gpntk.freeze(case.module(), input_shape=case.input_shape))
    if case.structured:
        backend.check(case.x(5).unsqueeze(0))
        return
    with pytest.raises(UnruledError, match=r"has no structured rule: it is used by einsum"):
        backend.check(case.x(5).unsqueeze(0))


class Partly(nn.Module):
    """A large network of which one parameter has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(20, 60), nn.Linear(15, 90)
        self.mixed = nn.Parameter(torch.randn(4, 15, 3))
        self.head = nn.Linear(90, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)).view(len(x), 4, 15)
        return self.head(torch.tanh(self.second(h + torch.einsum("nti,tio->nt", h, self.mixed).unsqueeze(-1)).mean(1)))


@pytest.mark.parametrize(
    ("budget", "rest"), [(None, gpntk.jacobians.DenseBackend), (2_000_000, gpntk.jacobians.AutodiffBackend)]
)
def test_only_the_parameters_without_a_rule_go_by_autodiff(budget: int | None, rest: type) -> None:
    torch.manual_seed(0)
    module = Partly().double()
    x = torch.randn(2, 500, 20, dtype=torch.float64)[0]
    choice = gpntk.AutoBackend.select(gpntk.freeze(module), x, budget)
    assert isinstance(choice.backend, StackedBackend)
    ruled, other = choice.backend.backends
    assert isinstance(ruled, gpntk.jacobians.StructuredBackend)
    assert isinstance(other, rest)
    assert other.network.names == ("mixed",)
    assert "'mixed', because it is used by einsum" in choice.reason
    xs = [x[:7], x[7:12]]
    assert_products(choice.backend, xs, [reference_jacobian(module, x) for x in xs], 1e-10)


def test_parameters_combined_with_one_without_a_rule_have_none_either() -> None:
    class Combined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(3, 4), nn.Parameter(torch.ones(4, 3))
            self.other = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = nn.functional.linear(x, self.layer.weight * self.scale, self.layer.bias)
            return self.other(h) + torch.einsum("ni,oi->n", x, self.scale).unsqueeze(-1)

    with pytest.raises(UnruledError) as caught:
        gpntk.jacobians.StructuredBackend(gpntk.freeze(Combined())).check(torch.randn(1, 5, 3))
    assert caught.value.reasons.keys() == {"scale", "layer.weight"}
    assert caught.value.reasons["layer.weight"] == "it is combined with 'scale', which has no rule"


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_few_rows(rows: int) -> None:
    case = next(case for case in ARCHITECTURES if case.name == "lenet")
    kernel = gpntk.NTKKernel(case.module(), input_shape=case.input_shape, backend=gpntk.jacobians.StructuredBackend)
    kernel(case.x(3)).to_dense()
    x = case.x(3)[:rows]
    gram = kernel(x)
    assert gram.to_dense().shape == (10 * rows, 10 * rows)
    assert (gram @ torch.ones(10 * rows, 2, dtype=torch.float64)).shape == (10 * rows, 2)
    assert kernel(x, diag=True).shape == (10 * rows,)


def test_inputs_need_not_be_contiguous() -> None:
    case = next(case for case in ARCHITECTURES if case.name == "lenet")
    kernel = gpntk.NTKKernel(case.module(), input_shape=case.input_shape)
    x = case.x(6)
    spread = torch.stack([x, torch.zeros_like(x)], -1)[..., 0]
    assert not spread.is_contiguous()
    torch.testing.assert_close(kernel(spread).to_dense(), kernel(x).to_dense())
    torch.testing.assert_close(kernel(spread[::2]).to_dense(), kernel(x[::2].contiguous()).to_dense())


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_a_torchvision_model() -> None:
    from torchvision.models import resnet18  # noqa: PLC0415

    torch.manual_seed(0)
    backend = gpntk.jacobians.StructuredBackend(
        gpntk.freeze(resnet18(num_classes=2).double().eval(), input_shape=(3, 32, 32))
    )
    backend.check(torch.randn(1, 4, 3 * 32 * 32, dtype=torch.float64))
