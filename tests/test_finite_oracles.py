"""Tangent kernels of given networks, and what follows from them, against neural-tangents' empirical kernels."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import gpntk
from gpntk.inference import FeatureCovariance, Features, Posterior, WhitenedSystem
from tests.test_infinite import DIRECTORY, stored

NAMES = sorted(path.stem for path in DIRECTORY.glob("emp_*.npz"))
STRIDES = {"emp_cnn_gap": (1, 1), "emp_cnn_flatten": (1, 2)}
NOISE = 0.05


class Layer(nn.Module):
    """z = w W a + b B, with W and B the parameters and w and b numbers."""

    def __init__(self, weight: Tensor, bias: Tensor, scales: tuple[float, float], stride: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.movedim((-1, -2), (0, 1))), nn.Parameter(bias.flatten())
        self.scales, self.stride = scales, stride

    def forward(self, a: Tensor) -> Tensor:
        weight, bias = self.scales[0] * self.weight, self.scales[1] * self.bias
        if weight.dim() == 2:
            return functional.linear(a, weight, bias)
        # The strided one has no padding.
        return functional.conv2d(a, weight, bias, self.stride, padding=1 if self.stride == 1 else 0)


class Net(nn.Module):
    def __init__(self, name: str, oracle: dict[str, Tensor]) -> None:
        super().__init__()
        kind, weight_std = name.rsplit("_", 1)[0], 2**0.5 if "cnn" in name else 1.5
        self.activation = torch.erf if "erf" in name else torch.tanh if "tanh" in name else torch.relu
        self.pool = "gap" in name
        for index, stride in enumerate((*STRIDES.get(kind, (1, 1)), 1)):
            weight, bias = oracle[f"l{index}_W"], oracle[f"l{index}_b"]
            fan_in = weight.numel() // weight.shape[-1]
            scales = (weight_std / fan_in**0.5, 0.3) if name.endswith("ntk") else (1.0, 1.0)
            setattr(self, f"l{index}", Layer(weight, bias, scales, stride))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.l0, self.l1):
            x = self.activation(layer(x))
        if x.dim() == 4:
            # The oracle's channels are last.
            x = x.mean((2, 3)) if self.pool else x.permute(0, 2, 3, 1).flatten(1)
        return self.l2(x)


def close(value: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-10 * float(reference.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_finite_networks(name: str) -> None:
    oracle = stored(name)
    module, outputs = Net(name, oracle), 3
    x1, x2 = (oracle[key].movedim(-1, 1) for key in ("x1", "x2"))
    shape, x1, x2 = x1.shape[1:], x1.flatten(1), x2.flatten(1)
    network = gpntk.freeze(module, input_shape=shape)
    close(network(x1), oracle["f1"])
    kernel = gpntk.NTKKernel(network, output="full")

    def block(one: Tensor, two: Tensor) -> Tensor:
        """`[N, M, C, C]`."""
        return kernel(one, two).to_dense().unflatten(0, (-1, outputs)).unflatten(2, (-1, outputs)).transpose(1, 2)

    close(block(x1, x2), oracle["ntk_full"])
    close(block(x1, x1), oracle["ntk_11_full"])
    close(block(x1, x2).diagonal(dim1=2, dim2=3), oracle["ntk_diag"])
    close((kernel(x1, x2) @ oracle["vec"].flatten()).unflatten(0, (-1, outputs)), oracle["ntk_vp"])
    # J, parameter by parameter, and the linearized network elsewhere.
    jacobian = kernel.features(x1).to_dense().unflatten(0, (-1, outputs))
    moved = oracle["f1"].clone()
    for index in range(3):
        for key, own in (("W", f"l{index}.weight"), ("b", f"l{index}.bias")):
            reference = oracle[f"jac1_l{index}_{key}"]
            reference = reference.movedim((-1, -2), (2, 3)) if key == "W" else reference
            part = jacobian[..., network.slices[own]]
            close(part, reference.flatten(2))
            step = oracle[f"new_l{index}_{key}"] - oracle[f"l{index}_{key}"]
            step = step.movedim((-1, -2), (0, 1)) if key == "W" else step
            moved += part @ step.flatten()
    close(moved, oracle["lin_f1"])


@pytest.mark.parametrize("name", NAMES)
def test_what_follows_from_them(name: str) -> None:
    oracle = stored(name)
    x1, x2 = (oracle[key].movedim(-1, 1) for key in ("x1", "x2"))
    network = gpntk.freeze(Net(name, oracle), input_shape=x1.shape[1:])
    x1, x2 = x1.flatten(1), x2.flatten(1)
    one, noise = torch.ones(1, dtype=torch.float64), torch.tensor([NOISE], dtype=torch.float64)
    system = WhitenedSystem(FeatureCovariance(Features(gpntk.AutoBackend(network), x1), one), noise)
    residual = (oracle["y1"] - oracle["f1"]).flatten()
    mean = oracle["f2"] + Posterior(system, residual).mean(x2).unflatten(0, (-1, 3))
    close(mean, oracle["lin_gp_mean2"])
    kernel = gpntk.NTKKernel(network, output="full")
    flow = gpntk.GradientFlow(kernel, x1, oracle["y1"], initial=gpntk.NetworkMean(network), noise=NOISE, normalize=True)
    close(flow.predict(x2, t=5.0).mean, oracle["lin_gd_t5_f2"])
