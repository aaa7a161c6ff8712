"""Infinite-width kernels against neural-tangents' values, closed recursions and finite differences."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import gpntk
from gpntk.errors import InputError, SelectionError, UnsupportedLayerError
from gpntk.infinite import Activation
from tests.gaussian_moments import CASES

DIRECTORY = Path(__file__).parent / "oracles" / "nt"
ROOT2 = math.sqrt(2)
D = torch.float64


class SumPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.avg_pool2d(x, 2, divisor_override=1)


class Mean(nn.Module):
    def __init__(self, dims: tuple[int, ...] = (2, 3)) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims)


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum((2, 3))


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of an image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv(inputs: int = 6, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, 6, **{"kernel_size": 3, "padding": 1, **options})


def readout(features: int = 6) -> nn.Linear:
    return nn.Linear(features, 1)


def same_padded(inputs: int) -> list[nn.Module]:
    """Stride 2 as XLA pads even sizes: zero before, one after."""
    return [nn.ZeroPad2d((0, 1, 0, 1)), conv(inputs, stride=2, padding=0), nn.ReLU()]


GAP = [Mean(), readout()]
CONVOLUTIONS = {
    "conv1_same_flatten": [conv(3), nn.ReLU(), nn.Flatten(), readout(384)],
    "conv2_same_flatten": [conv(3), nn.ReLU(), conv(), nn.ReLU(), nn.Flatten(), readout(384)],
    "conv1_same_gap": [conv(3), nn.ReLU(), *GAP],
    "conv2_same_gap": [conv(3), nn.ReLU(), conv(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), readout()],
    "conv1_same_gsp": [conv(3), nn.ReLU(), Sum(), readout()],
    "conv2_same_gap_nodense": [conv(3), nn.ReLU(), conv(), nn.ReLU(), Mean()],
    "conv2_valid_gap": [conv(3, padding=0), nn.ReLU(), conv(padding=0), nn.ReLU(), *GAP],
    "conv2_circular_gap": [
        conv(3, padding_mode="circular"), nn.ReLU(), conv(padding_mode="circular"), nn.ReLU(), *GAP
    ],
    "conv1_same_s2_flatten": [*same_padded(3), nn.Flatten(), readout(96)],
    "conv2_same_s2_flatten": [*same_padded(3), *same_padded(6), nn.Flatten(), readout(24)],
    "conv2_same_s2_gap": [*same_padded(3), *same_padded(6), *GAP],
    "conv2_valid_s2_gap": [conv(3, stride=2, padding=0), nn.ReLU(), conv(stride=2, padding=0), nn.ReLU(), *GAP],
    "conv2_same_s2_flatten_odd9": [
        conv(3, stride=2), nn.ReLU(), conv(stride=2), nn.ReLU(), nn.Flatten(), readout(54)
    ],
    "conv_avgpool2_flatten": [conv(3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), readout(96)],
    "conv_avgpool3same_flatten": [conv(3), nn.ReLU(), nn.AvgPool2d(3, 1, 1), nn.Flatten(), readout(384)],
    "conv_avgpool3same_ne_flatten": [
        conv(3), nn.ReLU(), nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.Flatten(), readout(384)
    ],
    "conv_sumpool2_flatten": [conv(3), nn.ReLU(), SumPool(), nn.Flatten(), readout(96)],
    "conv2_gelu_same_gap": [conv(3), nn.GELU(), conv(), nn.GELU(), *GAP],
    "conv_5x3_rect_gap": [
        nn.Conv2d(3, 6, (5, 3), padding=(2, 1)), nn.ReLU(), nn.Conv2d(6, 6, (1, 3), stride=(1, 2)), nn.ReLU(), *GAP
    ],
    "conv1x1_flatten": [
        conv(3, kernel_size=1, padding=0), nn.ReLU(), conv(kernel_size=1, padding=0), nn.ReLU(), nn.Flatten(),
        readout(384),
    ],
    "flatten_fc": [nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), readout()],
    "conv_layernorm_c_gap": [conv(3), ChannelNorm(6), nn.ReLU(), *GAP],
    "conv1d_same_gap": [
        nn.Conv1d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv1d(6, 6, 3, padding=1), nn.ReLU(), Mean((2,)), readout()
    ],
    "conv1d_valid_s2_flatten": [nn.Conv1d(3, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), readout(24)],
}  # fmt: skip


def stored(name: str) -> dict[str, Tensor]:
    with np.load(DIRECTORY / f"{name}.npz") as arrays:
        return {key: torch.as_tensor(arrays[key]) for key in arrays}


def assert_agrees(value: Tensor, reference: Tensor, tolerance: float) -> None:
    error = ((value - reference).abs().max() / reference.abs().max()).item()
    assert error <= tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutional_networks(name: str) -> None:
    oracle = stored(name)
    # The oracle's channels are last.
    x1, x2 = (oracle[key].movedim(-1, 1) for key in ("x1", "x2"))
    module = nn.Sequential(*CONVOLUTIONS[name]).double()
    for kind, kernel_class in (("nngp", gpntk.InfiniteNNGPKernel), ("ntk", gpntk.InfiniteNTKKernel)):
        kernel = kernel_class(module, weight_std=ROOT2, bias_std=0.1, input_shape=x1.shape[1:]).double()
        kernel.weight_std = torch.tensor(2.0).double().sqrt()
        kernel.bias_std = torch.tensor(0.1, dtype=torch.float64)
        value = kernel(x1.flatten(1), x2.flatten(1)).to_dense()
        assert_agrees(value, oracle[kind], 1e-9)
        own = kernel(x1.flatten(1)).to_dense()
        # Its diagonals carry rounding of about 1e-9.
        assert_agrees(own, oracle[f"{kind}_11"], 1e-8)
        torch.testing.assert_close(kernel(x1.flatten(1), diag=True), own.diagonal(), rtol=1e-12, atol=1e-14)


# --- fully connected ----------------------------------------------------------------------------------------------


class Erf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(x)


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


ACTIVATIONS: dict[str, nn.Module] = {
    **{name: Activation(case.activation) for name, case in CASES.items()},
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(0.1),
    "erf": Erf(),
    "gelu": nn.GELU(),
    "sin": Sine(),
    "tanh": nn.Tanh(),
    "tanh_deg25": nn.Tanh(),
    "identity": nn.Identity(),
}
DENSE = sorted(path.stem for path in DIRECTORY.glob("fc*_d*.npz") if "rectmono2" not in path.stem)
# By the oracle's own quadrature.
QUADRATURE = {"tanh": 2e-6, "tanh_deg25": 6e-2}


def fully_connected(activation: str, depth: int, bias: bool = True, inputs: int = 5) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += [nn.Linear(64 if index else inputs, 64, bias=bias), ACTIVATIONS[activation]]
    return nn.Sequential(*layers, nn.Linear(64, 1, bias=bias)).double()


def parts(name: str) -> tuple[str, int, float, float | None]:
    head, depth, weight, bias = name.rsplit("_", 3)[0], *name.rsplit("_", 3)[1:]
    std = 2**0.5 if weight == "wsqrt2" else float(weight[1:])
    return head.split("_", 1)[1], int(depth[1:]), std, None if bias == "bNone" else float(bias[1:])


def test_there_are_many_cases() -> None:
    assert len(DENSE) == 171


@pytest.mark.parametrize("name", DENSE)
def test_fully_connected_networks(name: str) -> None:
    oracle = stored(name)
    activation, depth, weight_std, bias_std = parts(name)
    module = fully_connected(activation, depth, bias_std is not None, oracle["x1"].shape[1])
    parametrization = "standard" if name.startswith("fcstd") else "ntk"
    for kind, kernel_class in (("nngp", gpntk.InfiniteNNGPKernel), ("ntk", gpntk.InfiniteNTKKernel)):
        kernel = kernel_class(module, weight_std, bias_std or 0.0, parametrization).double()
        for suffix, x1, x2 in (("", "x1", "x2"), ("_11", "x1", "x1"), ("_22", "x2", "x2")):
            key = f"{kind}{suffix}_hp" if f"{kind}{suffix}_hp" in oracle else f"{kind}{suffix}"
            tolerance = 1e-9 if key.endswith("_hp") else QUADRATURE.get(activation, 1e-9)
            assert_agrees(kernel(oracle[x1], oracle[x2]).to_dense(), oracle[key], tolerance)


@pytest.mark.parametrize("depth", [1, 2])
def test_rectified_squares(depth: int) -> None:
    """The oracle is NaN on diagonals, and with two layers everywhere: Cho and Saul (2009), eq. 6 with n = 2."""
    oracle = stored(f"fcx_rectmono2_d{depth}_w1.5_b0.1")
    module, x = fully_connected("rectmono2", depth), torch.cat([oracle["x1"], oracle["x2"]])
    nngp = ntk = 2.25 * x @ x.T / 5 + 0.01
    for _ in range(depth):
        scale = (nngp.diag()[:, None] * nngp.diag()).sqrt()
        angle = (nngp / scale).clamp(-1, 1).fill_diagonal_(1).acos()
        sine, cosine, rest = angle.sin(), angle.cos(), torch.pi - angle
        slope = 4 * scale * (sine + rest * cosine) / (2 * torch.pi)
        nngp = 2.25 * scale**2 * (3 * sine * cosine + rest * (1 + 2 * cosine**2)) / (2 * torch.pi) + 0.01
        ntk = nngp + 2.25 * ntk * slope
    for kind, kernel_class, expected in (
        ("nngp", gpntk.InfiniteNNGPKernel, nngp),
        ("ntk", gpntk.InfiniteNTKKernel, ntk),
    ):
        value = kernel_class(module, 1.5, 0.1).double()(x).to_dense().detach()
        assert_agrees(value, expected, 1e-12)
        for suffix, part in (("", value[:6, 6:]), ("_11", value[:6, :6]), ("_22", value[6:, 6:])):
            reference = oracle[f"{kind}{suffix}"]
            known = reference.isfinite()
            assert known.any() or depth == 2
            torch.testing.assert_close(part[known], reference[known], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(path.stem for path in DIRECTORY.glob("grad_*.npz")))
def test_gradients(name: str) -> None:
    oracle = stored(name)
    kernel_class = gpntk.InfiniteNTKKernel if name.endswith("ntk") else gpntk.InfiniteNNGPKernel
    kernel = kernel_class(fully_connected(name.split("_")[1], 2), 1.0, 1.0).double()
    kernel.weight_std, kernel.bias_std = oracle["W_std"], oracle["b_std"]
    x1 = oracle["x1"].clone().requires_grad_()
    loss = (oracle["C"] * kernel(x1, oracle["x2"]).to_dense()).sum()
    loss.backward()
    assert_agrees(loss, oracle["loss"], 1e-10)
    assert_agrees(x1.grad, oracle["grad_x1"], 1e-9)
    # The parameters are logarithms, and the oracle's are shared by all layers.
    assert_agrees(kernel.raw_weight_std.grad.sum() / oracle["W_std"], oracle["grad_W_std"], 1e-9)
    assert_agrees(kernel.raw_bias_std.grad.sum() / oracle["b_std"], oracle["grad_b_std"], 1e-9)


# --- what GPyTorch and users do with it -----------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start, self.branch, self.end = nn.Linear(5, 32), nn.Linear(32, 32), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x)
        h = h + self.branch(torch.relu(h))
        return self.end(torch.cat([torch.relu(h), torch.tanh(0.5 * h)], 1))


def test_residual_and_concatenated_branches_by_sampling_wide_networks() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5).double()
    kernel = gpntk.InfiniteNNGPKernel(Residual(), weight_std=1.3, bias_std=0.4).double()
    exact = kernel(x).to_dense().detach()
    width, draws, outputs = 1024, 40, []
    w = kernel.weight_std[0].item()
    for _ in range(draws):
        layers = [(torch.randn(i, width).double() * w / i**0.5, 0.4 * torch.randn(width).double()) for i in (5, width)]
        h = x @ layers[0][0] + layers[0][1]
        h = h + torch.relu(h) @ layers[1][0] + layers[1][1]
        a = torch.cat([torch.relu(h), torch.tanh(0.5 * h)], 1)
        outputs.append(w**2 * (a @ a.T) / a.shape[1] + 0.4**2)
    samples = torch.stack(outputs)
    error = (samples.mean(0) - exact).abs()
    assert (error <= 4 * samples.std(0) / draws**0.5 + 1e-2 * exact.abs()).all()


def test_blocks_symmetry_batches_and_diagonals() -> None:
    module = fully_connected("relu", 2)
    x, z = torch.randn(400, 5).double(), torch.randn(7, 5).double()
    for kernel_class in (gpntk.InfiniteNNGPKernel, gpntk.InfiniteNTKKernel):
        kernel = kernel_class(module).double()
        small = kernel_class(module, memory_budget=2**16).double()
        whole = kernel(x).to_dense()
        rows = torch.cat([kernel(x[i : i + 1], x).to_dense() for i in (0, 77, 399)])
        torch.testing.assert_close(whole[[0, 77, 399]], rows, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(whole, whole.T, rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(small(x).to_dense(), whole, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(small(z, x).to_dense(), kernel(z, x).to_dense())
        torch.testing.assert_close(kernel(x, diag=True), whole.diagonal())
        batched = kernel(z.expand(3, 7, 5), x[:4].expand(3, 4, 5)).to_dense()
        torch.testing.assert_close(batched[2], kernel(z, x[:4]).to_dense())
        different = torch.stack([z, z + 1])
        torch.testing.assert_close(kernel(different).to_dense()[1], kernel(z + 1).to_dense())
        torch.testing.assert_close(
            kernel(different, different + 1, diag=True)[1], kernel(z + 1, z + 2).to_dense().diagonal()
        )


def test_float32_diagonals_are_as_exact_as_float32() -> None:
    x = torch.randn(50, 5)
    module = fully_connected("relu", 4)
    single = gpntk.InfiniteNTKKernel(module)(torch.cat([x, x])).to_dense()
    double = gpntk.InfiniteNTKKernel(module).double()(torch.cat([x, x]).double()).to_dense()
    assert_agrees(single.double(), double, 2e-5)
    cross = gpntk.InfiniteNTKKernel(module)(x, x.clone()).to_dense()
    torch.testing.assert_close(cross.diagonal(), single.diagonal()[:50], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kernel_class", [gpntk.InfiniteNNGPKernel, gpntk.InfiniteNTKKernel])
def test_gradients_at_equal_points_are_finite(kernel_class: type) -> None:
    kernel = kernel_class(fully_connected("relu", 2)).double()
    x = torch.randn(4, 5).double()
    x = torch.cat([x, x[:1], 2 * x[1:2], torch.zeros(1, 5).double()]).requires_grad_()
    kernel(x).to_dense().sum().backward()
    assert x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in kernel.parameters())


def test_botorch_agrees_for_relu() -> None:
    botorch = pytest.importorskip("botorch.models.kernels.infinite_width_bnn")
    theirs = botorch.InfiniteWidthBNNKernel(depth=3).double()
    theirs.weight_var, theirs.bias_var = torch.tensor(2.0).double(), torch.tensor(0.3).double()
    module = fully_connected("relu", 3)
    ours = gpntk.InfiniteNNGPKernel(module, weight_std=1.0, bias_std=1.0).double()
    ours.weight_std, ours.bias_std = torch.tensor(2.0).double().sqrt(), torch.tensor(0.3).double().sqrt()
    x, z = torch.randn(6, 5).double(), torch.randn(3, 5).double()
    torch.testing.assert_close(ours(x, z).to_dense(), theirs(x, z).to_dense(), rtol=1e-6, atol=1e-8)


def test_errors_name_the_layer() -> None:
    cases = [
        (nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Linear(4, 1)), r"1 \(Softmax\) has no known limit"),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), r"1 \(BatchNorm1d\) has no known limit"),
        (nn.Sequential(nn.ReLU(), nn.Linear(3, 1)), "its input is not Gaussian"),
    ]
    for module, message in cases:
        with pytest.raises(UnsupportedLayerError, match=message):
            gpntk.InfiniteNNGPKernel(module, input_shape=(3,))(torch.randn(2, 3)).to_dense()
    shared = nn.Linear(3, 3)
    with pytest.raises(UnsupportedLayerError, match="called twice"):
        gpntk.InfiniteNNGPKernel(nn.Sequential(shared, nn.ReLU(), shared))
    with pytest.raises(InputError, match="input_shape is needed"):
        gpntk.InfiniteNNGPKernel(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 1)))
    with pytest.raises(SelectionError, match="patterns match layer"):
        gpntk.InfiniteNNGPKernel(fully_connected("relu", 1), weight_std={"0": 1.0})


def test_sigmas_by_layer_and_learning() -> None:
    kernel = gpntk.InfiniteNTKKernel(fully_connected("relu", 2), weight_std={"0": 1.0, "[24]": 2.0}, bias_std=0.0)
    assert kernel.program.layers == ("0", "2", "4")
    torch.testing.assert_close(kernel.weight_std, torch.tensor([1.0, 2.0, 2.0]))
    assert (kernel.bias_std == 0).all()
    fixed = gpntk.InfiniteNTKKernel(fully_connected("relu", 2), learn=False)
    assert not any(parameter.requires_grad for parameter in fixed.parameters())


class Scaled(nn.Module):
    """An MLP 5-width-width-outputs in the ntk parametrization."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        sizes = (5, width, width, outputs)
        self.weights = nn.ParameterList([torch.randn(o, i).double() for i, o in pairwise(sizes)])
        self.biases = nn.ParameterList([torch.randn(o).double() for o in sizes[1:]])

    def forward(self, x: Tensor) -> Tensor:
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = 1.4 / weight.shape[1] ** 0.5 * functional.linear(x, weight) + 0.3 * bias
            x = torch.relu(x) if index < 2 else x
        return x


def test_wide_random_networks_approach_the_limit() -> None:
    x = torch.randn(4, 5).double()
    module = fully_connected("relu", 2)
    limits = []
    for kernel_class in (gpntk.InfiniteNNGPKernel, gpntk.InfiniteNTKKernel):
        kernel = kernel_class(module).double()
        kernel.weight_std, kernel.bias_std = torch.tensor([[1.4], [0.3]]).double().squeeze(-1)
        limits.append(kernel(x).to_dense().detach())
    deviations = []
    for width in (16, 256):
        torch.manual_seed(0)
        sampled = gpntk.infinite.monte_carlo(lambda width=width: Scaled(width, 4), x, num_samples=30)
        assert (sampled.ntk_error > 0).all()
        deviations.append(((sampled.ntk - limits[1]).norm() / limits[1].norm()).item())
    # Within the sampling error at the larger width, and the NNGP's estimate too.
    assert ((sampled.ntk - limits[1]).abs() <= 4 * sampled.ntk_error + 0.02 * limits[1].abs()).all()
    assert ((sampled.nngp - limits[0]).abs() <= 4 * sampled.nngp_error + 0.02 * limits[0].abs()).all()
    assert deviations[1] < deviations[0] / 3


def two_outputs(network: nn.Sequential) -> nn.Module:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = network[:2], network[2]

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.body(x)
            return {"logits": self.head(h), "attention": h.softmax(-1)}

    return Named()


@pytest.mark.parametrize("kind", [gpntk.InfiniteNTKKernel, gpntk.InfiniteNNGPKernel])
def test_one_of_several_results(kind: type[gpntk.InfiniteNTKKernel]) -> None:
    network, x = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), torch.randn(4, 3)
    named = kind(two_outputs(network), input_shape=3, extract=lambda out: out["logits"])
    assert torch.equal(named(x).to_dense(), kind(network)(x).to_dense())
    with pytest.raises(UnsupportedLayerError, match="softmax"):
        kind(two_outputs(network), input_shape=3, extract=lambda out: out["attention"])
    with pytest.raises(InputError, match="extract cannot take what the network returns"):
        kind(two_outputs(network), input_shape=3, extract=lambda out: out["values"])


@pytest.mark.parametrize("kind", [gpntk.InfiniteNTKKernel, gpntk.InfiniteNNGPKernel])
def test_wrong_arguments_say_which(kind: type[gpntk.InfiniteNTKKernel]) -> None:
    network = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    for wrong, right in (("W_std", "weight_std"), ("b_std", "bias_std"), ("input_dim", "input_shape")):
        with pytest.raises(InputError, match=f"has no argument '{wrong}': did you mean '{right}'"):
            kind(network, **{wrong: 1.5})
    with pytest.raises(InputError, match="has no argument 'xyz': it takes network, weight_std"):
        kind(network, xyz=1.5)
    for budget in (0, -1, math.nan):
        with pytest.raises(InputError, match=r"memory_budget=.*positive"):
            kind(network, memory_budget=budget)
    kernel = kind(network)
    with pytest.raises(InputError, match="x1 is a ndarray: pass a tensor"):
        kernel(np.zeros((2, 3)))
    with pytest.raises(InputError, match="x2 is a list: pass a tensor"):
        kernel(torch.zeros(2, 3), [1.0])
    with pytest.raises(InputError, match="x1 has 4 features"):
        kernel(torch.zeros(2, 4)).to_dense()


def test_kernels_say_what_they_are() -> None:
    network = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    kernel = gpntk.InfiniteNTKKernel(network, weight_std={"0": 1.5, "2": 2.0}, bias_std=0.1)
    layers = "2 layers of inputs (3,), weight_std=1.5 to 2, bias_std=0.1"
    assert repr(kernel) == f'InfiniteNTKKernel({layers}, "ntk" parametrization)'


# --- both kernels in one pass ---------------------------------------------------------------------------------------

BOTH: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "dense": (nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)), (6,)),
    "pooled": (nn.Sequential(nn.Conv2d(2, 4, 2), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 1)), (2, 3, 3)),
    "linear": (nn.Sequential(nn.Flatten(), nn.Identity()), (2, 3)),
}


@pytest.mark.parametrize("budget", [None, 2**12])
@pytest.mark.parametrize("name", BOTH)
def test_both_kernels_are_the_two_kernels(name: str, budget: int | None) -> None:
    network, shape = BOTH[name]
    x, z = (torch.randn(n, *shape, dtype=D, requires_grad=True) for n in (7, 5))
    options = {"input_shape": shape, "memory_budget": budget}
    singles = [k(network, 1.3, 0.2, **options).double() for k in (gpntk.InfiniteNNGPKernel, gpntk.InfiniteNTKKernel)]
    stds = [torch.full_like(singles[0].weight_std, std).requires_grad_() for std in (1.3, 0.2)]
    both = gpntk.infinite.kernels(network, *stds, **options)
    for arguments in ((x,), (x, z), (x.detach(),)):
        expected = [single(*(a.flatten(1) for a in arguments)).to_dense() for single in singles]
        for value, other in zip(both(*arguments), expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-13, atol=1e-14)
    for value, other in zip(both.diagonal(x), (single(x.flatten(1), diag=True) for single in singles), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-13, atol=1e-14)
    if not len(stds[0]):
        return
    weights = torch.randn(2, 7, 5, dtype=D)
    value = sum((w * k).sum() for w, k in zip(weights, both(x, z), strict=True))
    expected = sum((w * k(x.flatten(1), z.flatten(1)).to_dense()).sum() for w, k in zip(weights, singles, strict=True))
    given = [raw for single in singles for raw in (single.raw_weight_std, single.raw_bias_std)]
    one, two = torch.autograd.grad(value, (x, z, *stds)), torch.autograd.grad(expected, (x, z, *given))
    for gradient, other in zip(one[:2], two[:2], strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-12)
    # Derivatives in log σ, of either kernel.
    for gradient, std, others in ((one[2], 1.3, (two[2], two[4])), (one[3], 0.2, (two[3], two[5]))):
        torch.testing.assert_close(gradient * std, others[0] + others[1], rtol=1e-10, atol=1e-12)


def test_both_kernels_follow_what_was_learned() -> None:
    network, x = BOTH["dense"][0], torch.randn(4, 6)
    kernel = gpntk.InfiniteNTKKernel(network)
    kernel.weight_std = torch.tensor([1.0, 2.0, 0.5])
    assert torch.equal(kernel.both(x).ntk, kernel(x).to_dense())


def test_both_kernels_refuse_by_name() -> None:
    network = BOTH["pooled"][0]
    both = gpntk.infinite.kernels(network, input_shape=(2, 3, 3))
    with pytest.raises(InputError, match=r"x1 must have shape \[N, 18\] or \[N, 2, 3, 3\], got \(3, 17\)"):
        both(torch.zeros(3, 17))
    with pytest.raises(InputError, match=r"x2 must be floating point, got torch.int64"):
        both(torch.zeros(3, 18), torch.zeros(3, 18).long())
    with pytest.raises(InputError, match="x1 is a ndarray: pass a tensor"):
        both(np.zeros((3, 18)))
    with pytest.raises(InputError, match="x1 has 3 rows and x2 2: a diagonal takes as many of both"):
        both.diagonal(torch.zeros(3, 18), torch.zeros(2, 18))
    with pytest.raises(InputError, match=r"weight_std has shape \(5,\): give one number for each of \('0', '4'\)"):
        gpntk.infinite.kernels(network, torch.ones(5), input_shape=(2, 3, 3))
    with pytest.raises(InputError, match="memory_budget=0"):
        gpntk.infinite.kernels(network, input_shape=(2, 3, 3), memory_budget=0)
    with pytest.raises(SelectionError, match="parametrization='mean': choose"):
        gpntk.infinite.kernels(network, parametrization="mean", input_shape=(2, 3, 3))
