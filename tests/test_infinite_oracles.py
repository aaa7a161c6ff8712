"""Infinite-width kernels of networks with branches, norms and attention against neural-tangents' values."""

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import gpntk
from gpntk.errors import InputError
from gpntk.infinite import LocallyConnected, TiedAttention, monte_carlo
from gpntk.infinite.recursion import moments, variances
from tests.test_infinite import ROOT2, Erf, Mean, assert_agrees, conv, readout, stored


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(5, 10), nn.Linear(5, 30, bias=False), nn.Linear(40, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([torch.relu(self.one(x)), torch.erf(self.two(x))], 1))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(5, 20), nn.Linear(20, 1)
        self.one, self.two = nn.Linear(20, 20), nn.Linear(20, 20, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.out(self.one(h) * self.two(h))


class Attention(nn.Module):
    """On `[N, L, C]`, after a convolution."""

    def __init__(self, mechanism: str) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(3, 6, 3, padding=1), nn.Linear(60, 1)
        self.key, self.value = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.attention, self.out = TiedAttention(mechanism), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).permute(0, 2, 1)
        return self.head(self.out(self.attention(self.key(h), self.value(h))).flatten(1))


def normed(eps: float, depth: int) -> nn.Sequential:
    hidden: list[nn.Module] = []
    for index in range(depth):
        hidden += [nn.Linear(16 if index else 5, 16), nn.LayerNorm(16, eps, elementwise_affine=False), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(16, 1))


def deep(depth: int) -> nn.Sequential:
    hidden = [layer for index in range(depth) for layer in (nn.Linear(16 if index else 5, 16), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(16, 1))


class Upsampled(nn.Module):
    """JAX's SAME padding of a transposed convolution leaves out the last row and column of torch's result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.ConvTranspose2d(3, 6, 3, stride=2), readout()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(functional.pad(self.conv(x), (0, -1, 0, -1))).mean((2, 3)))


Stds = float | Mapping[str, float]
ATTENTION: Stds = {"conv": ROOT2, "key": (1.2 * 0.9) ** 0.5, "value": 1.1, "out": 1.3, "head": ROOT2}
CASES: dict[str, tuple[nn.Module, Stds, Stds]] = {
    "fc_mixed_layers": (
        nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 9, bias=False), Erf(), nn.Linear(9, 1)),
        {"0": 1.3, "2": 0.9, "4": 0.5},
        {"0": 0.2, "2": 0.0, "4": 0.0},
    ),
    "fc_layernorm": (normed(1e-12, 2), 1.5, 0.1),
    "fc_layernorm_eps1e-2": (normed(1e-2, 1), 1.5, 0.1),
    "fc_repeat4_relu": (deep(5), 1.5, 0.1),
    "fc_fanin_concat": (Concatenated(), {"one": 1.2, "two": 0.7, "out": 1.5}, {"one": 0.3, "two": 0.0, "out": 0.1}),
    "fc_fanin_prod": (
        Gated(),
        {"first": 1.5, "one": 1.2, "two": 0.7, "out": 1.5},
        {"first": 0.1, "one": 0.3, "two": 0.0, "out": 0.1},
    ),
    "attention_lin_softmax": (Attention("softmax"), ATTENTION, 0.1),
    "attention_lin_abs": (Attention("abs"), ATTENTION, 0.1),
    "convtranspose_gap": (Upsampled(), ROOT2, 0.1),
    "conv2_b0_same_gap": (nn.Sequential(conv(3), nn.ReLU(), conv(), nn.ReLU(), Mean(), readout()), ROOT2, 0.0),
    "conv2_erf_same_flatten": (
        nn.Sequential(conv(3), Erf(), conv(), Erf(), nn.Flatten(), readout(384)),
        ROOT2,
        0.1,
    ),
    "convlocal_gap": (
        nn.Sequential(LocallyConnected(3, 6, (8, 8), 3, padding=1), nn.ReLU(), Mean(), readout()),
        ROOT2,
        0.1,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_networks(name: str) -> None:
    oracle, (module, weight_std, bias_std) = stored(name), CASES[name]
    # The oracle's channels are last.
    x1, x2 = (oracle[key].movedim(-1, 1) for key in ("x1", "x2"))
    for kind, kernel_class in (("nngp", gpntk.InfiniteNNGPKernel), ("ntk", gpntk.InfiniteNTKKernel)):
        kernel = kernel_class(module.double(), weight_std, bias_std, input_shape=x1.shape[1:]).double()
        for suffix, one, two in (("", x1, x2), ("_11", x1, x1), ("_22", x2, x2)):
            value = kernel(one.flatten(1), two.flatten(1)).to_dense()
            assert_agrees(value, oracle[f"{kind}{suffix}"], 1e-8 if suffix else 1e-9)
        own = kernel(x1.flatten(1)).to_dense()
        torch.testing.assert_close(kernel(x1.flatten(1), diag=True), own.diagonal(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("pairs", [False, True])
def test_covariances_of_positions(pairs: bool) -> None:
    """Within a network, which no kernel shows: at equal positions, and at all pairs of them."""
    oracle = stored("conv2_spatial_full" if pairs else "conv2_spatial_diag")
    x = tuple(oracle[key].movedim(-1, 1) for key in ("x1", "x2"))
    tail = [Mean(), readout()] if pairs else [nn.Flatten(), readout(384)]
    module = nn.Sequential(conv(3), nn.ReLU(), conv(), *tail)
    kernel = gpntk.InfiniteNTKKernel(module, ROOT2, 0.1, input_shape=x[0].shape[1:]).double()
    program, weights = kernel.program, kernel.both._weights(x[0])
    program = replace(program, steps=program.steps[:3], pairs=program.pairs[:4])
    flat = tuple(one.flatten(1) for one in x)
    known = tuple(variances(kernel.program, one, weights) for one in flat)
    block = moments(program, flat, known, weights, equal=False, tangent=True)
    assert_agrees(block.nngp, oracle["nngp"], 1e-9)
    assert block.ntk is not None
    assert_agrees(block.ntk, oracle["ntk"], 1e-9)


class Head(nn.Module):
    """One linear layer, some channel of it at the mean of all positions or of some."""

    def __init__(self, layer: nn.Module, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.dims = layer, dims

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean(self.dims)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 5)),
        (nn.ConvTranspose1d(2, 3, 4, stride=3), (2, 5)),
        (nn.ConvTranspose2d(2, 3, (3, 2), stride=(2, 1), padding=(2, 0), output_padding=(1, 0)), (2, 4, 3)),
        (nn.ConvTranspose2d(2, 3, 3, bias=False), (2, 4, 3)),
        (LocallyConnected(2, 3, (5,), 3, stride=2, padding=1), (2, 5)),
        (LocallyConnected(2, 3, (4, 3), (3, 2), stride=(1, 2), padding=(1, 0)), (2, 4, 3)),
        (LocallyConnected(2, 3, (4, 3), 3, bias=False), (2, 4, 3)),
    ],
    ids=lambda value: value.__class__.__name__,
)
def test_other_convolutions(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Outputs are linear in Gaussian weights: their covariance is J Σ Jᵀ, exactly, at any width."""
    dims = tuple(range(2, len(shape) + 1))
    module, x = Head(layer, dims).double(), torch.randn(4, *shape).double()
    kernel = gpntk.InfiniteNNGPKernel(module, 1.3, 0.4, input_shape=shape).double()

    def output(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (row.unsqueeze(0),))[0, 1]

    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    jacobian = torch.func.vmap(torch.func.grad(output), (None, 0))(parameters, x)
    fan_in = layer.in_channels * math.prod(layer.kernel_size)
    variances = {"layer.weight": 1.3**2 / fan_in, "layer.bias": 0.16}
    expected = sum(variances[name] * part.flatten(1) @ part.flatten(1).T for name, part in jacobian.items())
    torch.testing.assert_close(kernel(x.flatten(1)).to_dense(), expected, rtol=1e-12, atol=1e-12)


class Branches(nn.Module):
    """Unshared and shared filters after one convolution, joined, then pooled."""

    def __init__(self, unshared: bool, flat: bool) -> None:
        super().__init__()
        self.start, self.shared = conv(3), conv()
        self.local = LocallyConnected(6, 6, (4, 4), 3, padding=1) if unshared else conv()
        self.end = nn.Sequential(nn.Flatten(), readout(96)) if flat else nn.Sequential(Mean(), readout())

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.start(x))
        return self.end(torch.relu(self.local(h) + self.shared(h)))


def test_only_pooling_tells_shared_filters_from_unshared_ones() -> None:
    x = torch.randn(3, 48).double()
    for kernel_class in (gpntk.InfiniteNNGPKernel, gpntk.InfiniteNTKKernel):
        flat, pooled = (
            [
                kernel_class(Branches(unshared, end), 1.4, 0.3, input_shape=(3, 4, 4)).double()(x).to_dense()
                for unshared in (True, False)
            ]
            for end in (True, False)
        )
        torch.testing.assert_close(*flat, rtol=1e-12, atol=1e-12)
        assert ((pooled[0] - pooled[1]).abs() > 1e-3).all()


def test_wide_unshared_filters_approach_the_limit() -> None:
    torch.manual_seed(0)

    def drawn() -> nn.Sequential:
        local = LocallyConnected(256, 256, (4,), 3, padding=1)
        module = nn.Sequential(nn.Conv1d(2, 256, 3, padding=1), nn.ReLU(), local, nn.ReLU(), Mean((2,)), readout(256))
        for layer in module:
            if hasattr(layer, "weight"):
                fan_in = 768 if layer is local else layer.weight[0].numel()
                nn.init.normal_(layer.weight, std=(2 / fan_in) ** 0.5)
                nn.init.normal_(layer.bias, std=0.5)
        return module.double()

    x = torch.randn(3, 2, 4).double()
    exact = gpntk.InfiniteNTKKernel(drawn(), ROOT2, 0.5, "standard", input_shape=(2, 4)).double()(x.flatten(1))
    sampled = monte_carlo(drawn, x, num_samples=8).ntk
    assert_agrees(sampled, exact.to_dense().detach(), 0.1)


def test_unshared_filters_name_what_is_wrong() -> None:
    for message, input_size, kernel_size, stride in (
        ("input_size", (4, 4, 4), 3, 1),
        ("kernel_size", (4, 4), (3, 3, 3), 1),
        ("stride", (4, 4), 3, (1,)),
        ("stride=0: give a whole number, at least 1", (4, 4), 3, 0),
        ("larger than the padded input", (4, 4), 5, 1),
    ):
        with pytest.raises(InputError, match=message):
            LocallyConnected(3, 6, input_size, kernel_size, stride=stride)
    layer = LocallyConnected(3, 6, (4, 6), 3)
    assert layer(torch.zeros(0, 3, 4, 6)).shape == (0, 6, 2, 4)
    with pytest.raises(InputError, match=r"rows of shape \(3, 6, 4\), not \(3, 4, 6\)"):
        layer(torch.zeros(1, 3, 6, 4))


class Tokens(nn.Module):
    """Attention over five tokens of four channels, with random weights."""

    def __init__(self, mechanism: str, width: int) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(4, width), nn.Linear(4, width)
        self.attention, self.out = TiedAttention(mechanism), nn.Linear(5 * width, 16)
        for layer in (self.key, self.value, self.out):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.normal_(layer.bias, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(self.key(x), self.value(x)).flatten(1))


@pytest.mark.parametrize("mechanism", ["softmax", "abs", "relu", "identity"])
def test_wide_attention_approaches_the_limit(mechanism: str) -> None:
    torch.manual_seed(0)
    x, deviations = torch.randn(3, 5, 4).double(), []
    kernel = gpntk.InfiniteNNGPKernel(Tokens(mechanism, 4), 1.0, 0.3, input_shape=(5, 4)).double()
    exact = kernel(x.flatten(1)).to_dense().detach()
    for width in (16, 512):
        outputs = torch.stack([Tokens(mechanism, width).double()(x) for _ in range(200)], -1).flatten(1)
        sampled = outputs @ outputs.T / outputs.shape[1]
        deviations.append(((sampled - exact).norm() / exact.norm()).item())
    # 3,200 draws of a Gaussian know a variance to 2.5 %, and narrow networks have others.
    assert deviations[1] < 0.05
    assert deviations[1] < deviations[0]
