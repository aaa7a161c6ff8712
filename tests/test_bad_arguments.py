"""Arguments of a wrong type or value are refused by name: public callables times values that mean nothing to them."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gpntk
from gpntk.errors import GpntkError
from gpntk.inference import AutoSolver, ConjugateGradients, Nystrom, SampledGram, largest_dense

NETWORK = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
NAN = math.nan
COUNTS = ["a", -1, 0, 2.5, NAN, None, True]
SEEDS = ["a", -1, 2.5, NAN, None, True]
POSITIVE = ["a", -1, 0, NAN, None, True, 1j]
FLAGS = [3, "no", None, NAN]
BUDGETS = ["a", 0, -1, NAN, True, math.inf]
SHAPES: list[Any] = ["a", -1, 2.5, (2, "a"), (0,), (2.0,), (True,), NAN, [[2]], {2: 3}]
STDS: list[Any] = [
    *("a", -1, NAN, None, True, 1j, math.inf, [1.0, 2.0], {}, {"0": "a", "2": 1.0}, {"0": -1.0, "2": 1.0}, {"0": 1.0}),
    *(torch.tensor([1.0, 2.0, 3.0]), torch.tensor(1), torch.tensor(1j), torch.tensor(NAN), ...),
]
INFINITE = {
    "network": [3, None, "a", nn.Linear],
    "weight_std": [*STDS, 0],
    "bias_std": STDS,
    "parametrization": [3, None, "foo"],
    "input_shape": SHAPES,
    "extract": [3, "foo", True, []],
    "memory_budget": BUDGETS,
}
FINITE = {
    "network": [3, None, "a", nn.Linear],
    "input_shape": SHAPES,
    "output": ["foo", None, True, 1.0],
    "memory_budget": BUDGETS,
}
TABLE: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, list[Any]]]] = {
    "InfiniteNTKKernel": (gpntk.InfiniteNTKKernel, {"network": NETWORK}, {**INFINITE, "learn": FLAGS}),
    "InfiniteNNGPKernel": (gpntk.InfiniteNNGPKernel, {"network": NETWORK}, {**INFINITE, "learn": FLAGS}),
    "infinite.kernels": (gpntk.infinite.kernels, {"network": NETWORK}, INFINITE),
    "NTKKernel": (gpntk.NTKKernel, {"network": NETWORK}, {**FINITE, "layer_variances": FLAGS}),
    "NNGPKernel": (gpntk.NNGPKernel, {"network": NETWORK}, FINITE),
    "SketchedNTKKernel": (
        gpntk.SketchedNTKKernel,
        {"network": NETWORK},
        {**FINITE, "num_features": COUNTS, "seed": SEEDS},
    ),
    "AutoSolver": (AutoSolver, {}, {"columns": COUNTS}),
    "ConjugateGradients": (
        ConjugateGradients,
        {},
        {
            **{name: [*POSITIVE, 1.0, math.inf] for name in ("tolerance", "variance_tolerance")},
            **{name: COUNTS for name in ("max_iterations", "probes", "checkpoint_iterations")},
            "seed": SEEDS,
        },
    ),
    "Nystrom": (Nystrom, {}, {"max_rank": COUNTS, "error": [-1, "a", NAN], "space": ["foo", 3], "seed": SEEDS}),
    "SampledGram": (SampledGram, {}, {"oversampling": POSITIVE, "per_layer": [*FLAGS, 1], "seed": SEEDS}),
    "largest_dense": (
        largest_dense,
        {"device": torch.device("cpu")},
        {"seconds": POSITIVE, "factorisations": [*POSITIVE, math.inf], "memory_budget": BUDGETS},
    ),
}
CASES = [
    pytest.param(call, {**given, name: value}, name, id=f"{title}-{name}-{value!r}".replace(" ", ""))
    for title, (call, given, bad) in TABLE.items()
    for name, values in bad.items()
    for value in values
]


@pytest.mark.parametrize("title", TABLE)
def test_what_is_right_is_taken(title: str) -> None:
    call, given, bad = TABLE[title]
    assert call(**given) is not None
    assert not set(bad) - set(inspect.signature(call).parameters)


@pytest.mark.parametrize(("call", "arguments", "name"), CASES)
def test_a_wrong_argument_is_refused_by_name(call: Callable[..., Any], arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(GpntkError, match=name):
        call(**arguments)


def test_time_without_end_is_bounded_by_memory() -> None:
    assert largest_dense(torch.device("cpu"), 2**20, math.inf) == largest_dense(torch.device("cpu"), 2**20)


@pytest.mark.parametrize("network", [NETWORK, 3, None])
def test_a_transfer_says_that_it_wants_a_frozen_network(network: Any) -> None:
    with pytest.raises(GpntkError, match=r"network is a .*gpntk.freeze\(network\)"):
        gpntk.TransferGP(network, torch.ones(3, 2), torch.ones(3))
