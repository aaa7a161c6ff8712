"""The cases for libraries on torch: the networks, float64 references, and what happens in the fresh process.

A library gives one or both of

* ``product(problem)``: a function of x that gives a function of V that gives K V, `[N*C, k]`, rows n*C + c;
* ``gram(problem)``: a function of x that gives the dense K.

ResNet-18 differs from its float64 reference by 1e-3 in every library: J jumps where an activation changes sign, and of
the millions of ReLU inputs some are within rounding of zero (with tanh instead the difference is 1e-6).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.functional import relu

from benchmarks.peers import (
    INPUT_SHAPES,
    SEED,
    WIDTHS,
    Case,
    case_of_this_process,
    inputs,
    measure,
    mlp_gram,
    mlp_weights,
    normal,
    report,
)

Product = Callable[[Tensor], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Problem:
    """A network in eval mode and the shape of one of its inputs."""

    module: nn.Module
    input_shape: tuple[int, ...]

    def outputs(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        """f(x; w) `[N*C]` for flat x `[N, D]`."""
        return functional_call(self.module, parameters, (self.shaped(x),)).flatten()

    def shaped(self, x: Tensor) -> Tensor:
        """Flat x `[N, D]` as the network wants it, without a copy."""
        return x.unflatten(1, self.input_shape)

    def parameters(self) -> dict[str, Tensor]:
        """The parameters by name, detached."""
        return {name: parameter.detach() for name, parameter in self.module.named_parameters()}


def main(
    product: Callable[[Problem], Product] | None, gram: Callable[[Problem], Callable[[Tensor], Tensor]] | None
) -> None:
    """Measure this process's case and print its row."""
    case, threads = case_of_this_process()
    torch.set_num_threads(threads)
    problem = Problem(_network(case.network), INPUT_SHAPES[case.network])
    x = _inputs(case, SEED + 1)
    if not case.columns:
        assert gram is not None
        dense = gram(problem)
        figures = measure(dense, lambda seed: _inputs(case, seed))
        report(case, figures, dense(x).numpy(), mlp_gram(x.numpy()))
        return
    assert product is not None
    outputs = WIDTHS[-1] if case.network == "mlp" else 10
    v = torch.from_numpy(normal((case.rows * outputs, case.columns), SEED))
    at = product(problem)
    if case.inputs == "same":
        times = at(x)
        figures = measure(times, lambda _: v)
    else:
        figures = measure(lambda new: at(new)(v), lambda seed: _inputs(case, seed))
    exact = mlp_gram(x.numpy()) @ v.double().numpy() if case.network == "mlp" else _exact(problem, x, v)
    report(case, figures, at(x)(v).numpy(), exact)


def _inputs(case: Case, seed: int) -> Tensor:
    return torch.from_numpy(inputs(case, seed))


def _exact(problem: Problem, x: Tensor, v: Tensor) -> np.ndarray:
    """K V in float64, column by column."""
    problem, x = Problem(copy.deepcopy(problem.module).double(), problem.input_shape), x.double()
    parameters = problem.parameters()

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return problem.outputs(parameters, x)

    pullback = vjp(outputs, parameters)[1]
    columns = [jvp(outputs, (parameters,), pullback(column))[1] for column in v.double().unbind(1)]
    return torch.stack(columns, dim=1).numpy()


# --- networks --------------------------------------------------------------------------------------------------------


def _network(name: str) -> nn.Module:
    torch.manual_seed(SEED)
    return {"mlp": _mlp, "lenet": _lenet, "resnet18": _resnet18}[name]().eval()


def _mlp() -> nn.Module:
    layers = [nn.Linear(i, o) for i, o in pairwise(WIDTHS)]
    for layer, (weight, bias) in zip(layers, mlp_weights(), strict=True):
        layer.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def _lenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def _resnet18() -> nn.Module:
    widths = (64, 64, 128, 256, 512)
    blocks = [
        block
        for i, o in pairwise(widths)
        for block in (_Block(i, o, stride=1 if i == o else 2), _Block(o, o, stride=1))
    ]
    stem = (nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    network = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    # Running statistics of random data: with the initial ones the activations would grow from block to block.
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        network(torch.from_numpy(normal((64, *INPUT_SHAPES["resnet18"]), SEED)))
    return network


class _Block(nn.Module):
    """relu(BN(conv(relu(BN(conv(x))))) + shortcut(x)), the basic block of He et al. (2016)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride > 1:
            projection = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """The block's outputs."""
        residual = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu(residual + self.shortcut(x))
