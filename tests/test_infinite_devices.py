"""Infinite-width kernels live where their inputs do: no tensor of the default device, and on CUDA the same numbers."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gpntk
from gpntk.infinite import LocallyConnected, TiedAttention, monte_carlo
from gpntk.infinite.closed_forms import ABReLU
from gpntk.infinite.phases import phase_diagram

KERNELS = [gpntk.InfiniteNNGPKernel, gpntk.InfiniteNTKKernel]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key, self.value, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(18, 1)
        self.attention = TiedAttention()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(self.key(x), self.value(x)).flatten(1))


def dense(activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), activation, nn.Linear(8, 8), nn.LayerNorm(8), activation, nn.Linear(8, 1))


def pooled(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))


def convolutional() -> nn.Sequential:
    first, second = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 4, 2)
    return pooled(first, nn.ReLU(), nn.AvgPool2d(2, padding=1, count_include_pad=False), second, nn.ReLU())


CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    **{
        type(activation).__name__: (dense(activation), (4,))
        for activation in (nn.ReLU(), nn.Tanh(), nn.GELU(), nn.ELU(), nn.Hardtanh(), nn.Hardswish())
    },
    "convolution": (convolutional(), (2, 4, 4)),
    "unshared": (pooled(LocallyConnected(2, 4, (4, 4), 3), nn.ReLU(), nn.Dropout()), (2, 4, 4)),
    "attention": (Attention(), (3, 4)),
}


def inputs(shape: tuple[int, ...]) -> Tensor:
    """With equal rows and nearly parallel ones."""
    x = torch.randn(6, math.prod(shape), dtype=torch.float64, generator=torch.Generator("cpu").manual_seed(0))
    x[1], x[2] = x[0], 1.000001 * x[0]
    return x


def results(kernel: gpntk.InfiniteNTKKernel, x: Tensor) -> list[Tensor]:
    """Of every path: symmetric, with gradients, rectangular, diagonal."""
    tracked = x.clone().requires_grad_()
    gram = kernel(tracked).to_dense()
    gradients = torch.autograd.grad(gram.square().sum(), [tracked, *kernel.parameters()])
    with torch.no_grad():
        return [gram.detach(), kernel(x).to_dense(), kernel(x, x[:3]).to_dense(), kernel(x, diag=True), *gradients]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernel_class", KERNELS)
def test_no_tensor_of_the_default_device(name: str, kernel_class: Callable[..., gpntk.InfiniteNTKKernel]) -> None:
    """Every fresh tensor of torch's factories on meta: one that is used without a device of its own would show."""
    module, shape = CASES[name]
    kernel, x = kernel_class(module, 1.3, 0.2, input_shape=shape).double(), inputs(shape)
    expected = results(kernel, x)
    with torch.device("meta"):
        found = results(kernel, x)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)


def test_no_tensor_of_the_default_device_elsewhere() -> None:
    x = inputs((4,))[[0, 3, 4, 5]]
    kernel = gpntk.InfiniteNTKKernel(dense(nn.ReLU()), 1.3, 0.2, learn=False).double()
    weights = torch.tensor([1.5, 2.5], dtype=torch.float64)
    networks = [dense(nn.ReLU()).double() for _ in range(3)]
    with torch.device("meta"):
        flow = gpntk.GradientFlow(kernel, x[:3], x[:3, :1], noise=0.1)
        found = [flow.predict(x[3:], t).mean for t in (1.0, math.inf)]
        found += [*phase_diagram(ABReLU(0.0, 1.0), weights, weights - 1).values()]
        found += [*monte_carlo(iter(networks).__next__, x, num_samples=3)]
    assert {tensor.device.type for tensor in found} == {"cpu"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernel_class", KERNELS)
def test_agrees_with_the_cpu(
    name: str, kernel_class: Callable[..., gpntk.InfiniteNTKKernel], dtype: torch.dtype
) -> None:
    module, shape = CASES[name]
    x = inputs(shape)
    expected = results(kernel_class(module, 1.3, 0.2, input_shape=shape).double(), x)
    kernel = kernel_class(module, 1.3, 0.2, input_shape=shape).to("cuda", dtype)
    # Gradients in single precision say nothing of nearly parallel inputs.
    count = len(expected) if dtype == torch.float64 else 4
    tolerance = 1e-8 if dtype == torch.float64 else 1e-3
    for one, two in zip(results(kernel, x.to("cuda", dtype))[:count], expected, strict=False):
        assert one.device.type == "cuda"
        assert (one.cpu().double() - two).abs().max() <= tolerance * two.abs().max()
