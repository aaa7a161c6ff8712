"""Kernels by sampling: against explicit Jacobians, neural-tangents' samples, the limit, and their own errors."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional

import gpntk
from gpntk.errors import InputError
from gpntk.infinite import SampledKernels, monte_carlo

ORACLE = Path(__file__).parent / "oracles" / "nt" / "mc_fc_relu_d2_width512_64samples.npz"


class Attention(nn.Module):
    """Softmax attention over tokens of x `[N, 3, 4]`, then the mean of them."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(4, 6) for _ in range(3))
        self.readout = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.queries(x) @ self.keys(x).mT / 6**0.5
        return self.readout((scores.softmax(-1) @ self.values(x)).mean(1))


def normalised() -> nn.Module:
    """Batch normalisation with the statistics of a network that has seen data, in train mode as a new module is."""
    network = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
    network[1].running_mean.normal_()
    network[1].running_var.uniform_(0.5, 2.0)
    return network


def pooled() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(20, 1))


def wide() -> nn.Module:
    layers = nn.Linear(5, 300), nn.Softmax(-1), nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 1)
    return nn.Sequential(*layers)


# With the number of rows, and the shape of each.
WITHOUT_A_FORMULA: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "softmax attention": (Attention, (4, 3, 4)),
    "batch normalisation": (normalised, (4, 5)),
    "maximum pooling": (pooled, (4, 2, 6, 6)),
    "wide, hence by layer rules": (wide, (16, 5)),
}


def jacobian(network: nn.Module, x: Tensor) -> Tensor:
    """J `[N, C, P]` by torch.func."""
    state = dict(network.named_buffers())

    def outputs(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(network, {**weights, **state}, (row.unsqueeze(0),))[0]

    weights = {name: weight.detach() for name, weight in network.named_parameters()}
    parts = vmap(jacrev(outputs), in_dims=(None, 0))(weights, x)
    return torch.cat([part.flatten(2) for part in parts.values()], -1)


@pytest.mark.parametrize("name", WITHOUT_A_FORMULA)
def test_means_and_errors_are_those_of_explicit_jacobians(name: str) -> None:
    make, (rows, *shape) = WITHOUT_A_FORMULA[name]
    x, z = torch.randn(rows, *shape).double(), torch.randn(3, *shape).double()
    if make is wide:
        assert isinstance(gpntk.AutoBackend.select(wide().double(), x).backend, gpntk.jacobians.StructuredBackend)
    made: list[nn.Module] = []

    def factory() -> nn.Module:
        made.append(make().double())
        return made[-1]

    sampled = monte_carlo(factory, x, z, num_samples=5)
    assert len(made) == 5
    nngps, ntks = [], []
    with torch.no_grad():
        for network in made:
            first, second = network(x), network(z)
            nngps.append((first @ second.T / first.shape[1]).numpy())
            ntks.append(torch.einsum("ncp,mcp->nm", jacobian(network, x), jacobian(network, z)) / first.shape[1])
    for kind, samples in (("nngp", np.stack(nngps)), ("ntk", np.stack(ntks))):
        np.testing.assert_allclose(getattr(sampled, kind), samples.mean(0), rtol=1e-9, atol=1e-12)
        expected = samples.std(0, ddof=1) / math.sqrt(5)
        np.testing.assert_allclose(getattr(sampled, f"{kind}_error"), expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(gpntk.errors.UnsupportedLayerError, match="monte_carlo"):
        gpntk.InfiniteNTKKernel(make(), input_shape=shape)(x.flatten(1).float()).to_dense()


def test_one_set_of_inputs_gives_symmetric_kernels() -> None:
    x = torch.randn(5, 3, 4)
    sampled = monte_carlo(Attention, x, num_samples=4)
    for matrix in sampled:
        assert matrix.dtype == torch.float32
        torch.testing.assert_close(matrix, matrix.T, rtol=1e-5, atol=1e-7)


# --- are the errors right? ------------------------------------------------------------------------------------------


class Networks(nn.Module):
    """``count`` ReLU networks of the ntk parametrization side by side, f = Σ_i f_i/√count, σ_w² = 2, no biases.

    No two share a weight, so that the NTK of f is the mean of theirs: a draw of f is ``count`` draws at once. With
    ``readout``, only the last weights are parameters, and the NTK of f is the mean of their NNGPs, the average over
    the last weights taken by formula.
    """

    def __init__(self, count: int, *widths: int, readout: bool = False) -> None:
        super().__init__()
        self.depth = len(widths) - 1
        for index, (inputs, outputs) in enumerate(pairwise((*widths, 1))):
            weight = torch.randn(count, inputs, outputs)
            if readout and index < self.depth:
                self.register_buffer(f"weight{index}", weight)
            else:
                self.register_parameter(f"weight{index}", nn.Parameter(weight))

    def forward(self, x: Tensor) -> Tensor:
        for index in range(self.depth + 1):
            weight = getattr(self, f"weight{index}")
            x = math.sqrt(2 / weight.shape[1]) * (x @ weight)
            x = x.relu() if index < self.depth else x
        return x.sum(0) / math.sqrt(weight.shape[0])


def test_the_squared_errors_are_unbiased_and_intervals_cover() -> None:
    # Of 2 networks each: a variance with the wrong divisor would be half of what it should be.
    x, runs = torch.tensor([[1.0, 0.3], [-0.4, 1.0]]).double(), 300
    make = lambda: nn.Sequential(nn.Linear(2, 32), nn.Sigmoid(), nn.Linear(32, 1))  # noqa: E731
    results = [monte_carlo(make, x, num_samples=2) for _ in range(runs)]
    for mean, error in (("ntk", "ntk_error"), ("nngp", "nngp_error")):
        means, errors = (torch.stack([getattr(result, key) for result in results]) for key in (mean, error))
        # The variance of a mean of 2, seen over the runs, is what the errors say.
        ratio = errors.square().mean(0) / means.var(0)
        kurtosis = torch.from_numpy(stats.kurtosis(means.numpy(), fisher=False))
        spread = ((kurtosis - 1 + errors.square().var(0) / errors.square().mean(0).square()) / runs).sqrt()
        assert ((ratio - 1).abs() <= 3 * spread).all(), (mean, ratio, spread)
    # The NTK is a sum over many units and nearly Gaussian, hence Student's t, of 1 degree of freedom.
    means, errors = (torch.stack([getattr(result, key) for result in results]) for key in ("ntk", "ntk_error"))
    for level in (0.5, 0.9):
        inside = (means - means.mean(0)).abs() <= stats.t.ppf((1 + level) / 2, 1) * errors
        covered = inside.double().mean(0)
        assert ((covered - level).abs() <= 3 * math.sqrt(level * (1 - level) / runs)).all(), covered


# --- finite width against the limit ----------------------------------------------------------------------------------


def test_neural_tangents_samples_are_as_likely() -> None:
    with np.load(ORACLE) as stored:
        x1, x2, *theirs = (torch.as_tensor(stored[key]) for key in ("x1", "x2", "nngp_mc", "ntk_mc", "nngp", "ntk"))

    class Network(nn.Module):
        """2 x [Dense(1.5, 0.1) -> relu] -> Dense, of width 512."""

        def __init__(self) -> None:
            super().__init__()
            sizes = list(pairwise((5, 512, 512, 1)))
            self.weights = nn.ParameterList([torch.randn(o, i) for i, o in sizes])
            self.biases = nn.ParameterList([torch.randn(o) for _, o in sizes])

        def forward(self, x: Tensor) -> Tensor:
            for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
                x = 1.5 / weight.shape[1] ** 0.5 * functional.linear(x, weight) + 0.1 * bias
                x = x.relu() if index < 2 else x
            return x

    ours = monte_carlo(Network, x1, x2, num_samples=64)
    for value, error, sampled, limit, precision in (
        (ours.nngp, ours.nngp_error, theirs[0], theirs[2], 0.5),
        (ours.ntk, ours.ntk_error, theirs[1], theirs[3], 0.02),
    ):
        # Both are means of 64 such networks; the deviation from the limit, of order 1/512, is far below their errors.
        for difference, variances in ((value - sampled, 2), (value - limit, 1), (sampled - limit, 1)):
            deviation = difference / (error * math.sqrt(variances))
            assert deviation.abs().max() < 4, deviation
            assert deviation.square().mean() < 6, deviation
        # And the errors are small enough for all of this to mean something.
        assert (error / limit.abs()).median() < precision


@pytest.mark.parametrize("kind", ["nngp", "ntk"])
def test_the_mean_over_networks_approaches_the_limit_as_one_over_the_width(kind: str) -> None:
    x = torch.tensor([[math.sqrt(3), 0.0, 0.0], [-math.sqrt(3), 0.0, 0.0]])
    layers = [layer for inputs in (3, 9, 9) for layer in (nn.Linear(inputs, 9, bias=False), nn.ReLU())]
    module = nn.Sequential(*layers, nn.Linear(9, 1, bias=False))
    kernel_class = gpntk.InfiniteNNGPKernel if kind == "nngp" else gpntk.InfiniteNTKKernel
    limit = kernel_class(module, weight_std=math.sqrt(2), learn=False)(x).to_dense()
    widths, biases, errors = (8, 16, 32, 64), [], []
    for width in widths:
        sampled = _networks(width, kind == "nngp", x)
        # ReLU networks without biases are right on the diagonal at any width: Hanin and Nica (2020), theorem 1.
        assert ((sampled.ntk - limit).diagonal().abs() <= 4 * sampled.ntk_error.diagonal()).all()
        biases.append((limit - sampled.ntk)[0, 1].item())
        errors.append(sampled.ntk_error[0, 1].item())
    bias, relative = np.array(biases), np.array(errors) / np.array(biases)
    assert (bias > 4 * np.array(errors)).all(), (biases, errors)
    # The slope of log(bias) over log(width), by least squares weighted by the errors.
    logs, weights = np.log(widths), relative**-2
    centred = logs - np.average(logs, weights=weights)
    slope = (weights * centred * np.log(bias)).sum() / (weights * centred**2).sum()
    slope_error = (weights * centred**2).sum() ** -0.5
    assert slope_error < 0.1
    assert abs(slope + 1) < 3 * slope_error, (slope, slope_error)


def _networks(width: int, readout: bool, x: Tensor) -> SampledKernels:
    """At least 8,000 networks with three hidden layers."""
    count = 12800 // width
    return monte_carlo(lambda: Networks(count, 3, width, width, width, readout=readout), x, num_samples=width)


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_are_named() -> None:
    x, network = torch.randn(3, 5), wide()
    with pytest.raises(InputError, match="num_samples=1: give a whole number, at least 2"):
        monte_carlo(wide, x, num_samples=1)
    with pytest.raises(InputError, match="same weights twice: it must draw new ones"):
        monte_carlo(lambda: network, x)
    not_a_network: Callable[..., nn.Module] = lambda: torch.ones(1)  # noqa: E731  # pyright: ignore
    with pytest.raises(InputError, match=r"is a Tensor: make it return an nn\.Module"):
        monte_carlo(not_a_network, x)
    with pytest.raises(InputError, match=r"x1 has inputs of shape \(5,\) and x2 of \(4,\)"):
        monte_carlo(wide, x, torch.randn(3, 4))
