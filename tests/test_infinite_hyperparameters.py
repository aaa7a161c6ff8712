"""Deviations of weights and biases, what is saved, memory, extreme inputs and gradients of infinite-width kernels."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

import gpntk
from gpntk.errors import InputError, SelectionError
from gpntk.infinite.closed_forms import ABReLU, Sign, Sine, Step

KERNELS = [gpntk.InfiniteNNGPKernel, gpntk.InfiniteNTKKernel]
D = torch.float64


def network(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), activation(), nn.Linear(8, 8), activation(), nn.Linear(8, 1))


def kernel(**options: object) -> gpntk.InfiniteNTKKernel:
    return gpntk.InfiniteNTKKernel(network(), **options)


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
@pytest.mark.parametrize("name", ["weight_std", "bias_std"])
def test_deviations_out_of_range(name: str, value: float) -> None:
    with pytest.raises(InputError, match=name):
        kernel(**{name: value})
    with pytest.raises(InputError, match=name):
        kernel(**{name: {"[02]": 1.0, "4": value}})
    made = kernel()
    with pytest.raises(InputError, match=name):
        setattr(made, name, value)
    assert torch.equal(getattr(made, name), getattr(kernel(), name))


def test_weights_are_not_zero() -> None:
    with pytest.raises(InputError, match="must be positive"):
        kernel(weight_std=0.0)


def test_globs_must_match_a_layer() -> None:
    with pytest.raises(SelectionError, match="'head' matches none of the layers"):
        kernel(weight_std={"*": 1.0, "head": 2.0})
    with pytest.raises(SelectionError, match=r"bias_std: the pattern 'features\.\*'"):
        kernel(bias_std={"*": 1.0, "features.*": 2.0})


def test_biases_are_set_from_zero_and_to_zero() -> None:
    x = torch.randn(4, 3, dtype=D)
    made = kernel(bias_std=0.0).double()
    made.bias_std = 0.5
    torch.testing.assert_close(made(x).to_dense(), kernel(bias_std=0.5).double()(x).to_dense(), rtol=1e-14, atol=0)
    made.bias_std = torch.tensor([0.0, 0.5, 0.0])
    assert made.bias_std.tolist() == [0.0, 0.5, 0.0]
    made.bias_std.sum().backward()
    assert (made.raw_bias_std.grad == torch.tensor([0.0, 0.5, 0.0])).all()


def test_saved_kernels_are_the_same() -> None:
    x = torch.randn(4, 3, dtype=D)
    saved = kernel(weight_std=1.3, bias_std={"0": 0.0, "[24]": 0.2}).double()
    expected = saved(x).to_dense()
    other = kernel(weight_std=2.0, bias_std=0.3).double()
    other.load_state_dict(saved.state_dict())
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for same in (other, loaded, copy.deepcopy(saved), pickle.loads(pickle.dumps(saved))):
        assert torch.equal(same(x).to_dense(), expected)


def test_numbers_are_not_rounded_by_single_precision() -> None:
    # 1.3 is no float32.
    made = kernel(weight_std=1.3, bias_std={"0": 0.7, "[24]": 0.1})
    assert made.weight_std.dtype == torch.float32
    double = copy.deepcopy(made).double()
    torch.testing.assert_close(double.weight_std, torch.full((3,), 1.3, dtype=D), rtol=1e-15, atol=0)
    torch.testing.assert_close(double.bias_std, torch.tensor([0.7, 0.1, 0.1], dtype=D), rtol=1e-15, atol=0)
    double = copy.deepcopy(double).float().double()
    torch.testing.assert_close(double.weight_std, torch.full((3,), 1.3, dtype=D), rtol=1e-15, atol=0)
    # What was learned since is what counts.
    with torch.no_grad():
        made.raw_weight_std += 1
    torch.testing.assert_close(made.double().weight_std, torch.full((3,), 1.3 * math.e, dtype=D), rtol=1e-6, atol=0)
    loaded = kernel(weight_std=1.3)
    loaded.load_state_dict(kernel(weight_std=0.7).state_dict())
    torch.testing.assert_close(loaded.double().weight_std, torch.full((3,), 0.7, dtype=D), rtol=1e-6, atol=0)


def test_inputs_of_another_size() -> None:
    assert gpntk.InfiniteNTKKernel(network(), input_shape=3).program.input_shape == (3,)
    with pytest.raises(InputError, match=r"x1 has 4 features, but one input of shape \(3,\) has 3"):
        kernel()(torch.randn(2, 4)).to_dense()
    with pytest.raises(InputError, match="x2 has 6 features"):
        kernel().forward(torch.randn(2, 3), torch.randn(2, 6))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("kernel_class", KERNELS)
@pytest.mark.parametrize("rows", [6, 260])
def test_gradients_of_equal_rows(activation: type[nn.Module], kernel_class: type, rows: int) -> None:
    made = kernel_class(network(activation)).double()
    x, factors = torch.randn(rows, 3, dtype=D), torch.randn(rows, rows, dtype=D)
    x[3] = x[1]
    if kernel_class is gpntk.InfiniteNTKKernel and activation is nn.ReLU:
        # Its tangent kernel has a kink where rows are equal: only the others have derivatives.
        factors[1, 3] = factors[3, 1] = 0
    tracked = x.clone().requires_grad_()
    (factors * made(tracked).to_dense()).sum().backward()
    for row in (0, 1, 3):
        direction = torch.zeros_like(x)
        direction[row] = torch.tensor([1.0, -0.5, 0.3], dtype=D)
        with torch.no_grad():
            ends = [(factors * made(x + step * direction).to_dense()).sum() for step in (1e-4, -1e-4)]
        expected = (ends[0] - ends[1]) / 2e-4
        torch.testing.assert_close((tracked.grad * direction).sum(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("activation", [ABReLU(0.0, 1.0), ABReLU(-1.0, 1.0), Sign(), Step()])
@pytest.mark.parametrize("exponent", [-1000, -560, -500, 500, 512, 1000])
def test_extreme_variances(activation: ABReLU | Sign | Step, exponent: int) -> None:
    # Of ABReLU the first moment is homogeneous, and all else does not depend on the scale, which is a power of two.
    scale = 2.0**exponent
    rows = [torch.tensor(entry, dtype=D) for entry in ([1.0, 1.0, 2.0], [2.0, 1.0, 3.0], [0.5, -1.0, 2.4])]
    found, expected = activation.moments(*(row * scale for row in rows)), activation.moments(*rows)
    factor = scale if isinstance(activation, ABReLU) else 1.0
    torch.testing.assert_close(found[0] / factor, expected[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-14, atol=0)
    tracked = [(row * scale).requires_grad_() for row in rows]
    gradients = torch.autograd.grad(activation.moments(*tracked)[0][::2].sum(), tracked)
    plain = [row.clone().requires_grad_() for row in rows]
    references = torch.autograd.grad(activation.moments(*plain)[0][::2].sum(), plain)
    for one, other in zip(gradients, references, strict=True):
        torch.testing.assert_close(one * (scale / factor), other, rtol=1e-13, atol=0)


def test_kernels_of_large_and_small_inputs() -> None:
    x = torch.randn(5, 3, dtype=D)
    made = kernel(bias_std=0.0).double()
    for scale in (2.0**-400, 2.0**300):
        torch.testing.assert_close(made(scale * x).to_dense() / scale**2, made(x).to_dense(), rtol=1e-13, atol=0)


def test_sine_of_small_variances() -> None:
    q = torch.tensor([1e-12, 1e-6, 0.3, 2.0], dtype=D)
    series = q - q**2 + 2 / 3 * q**3
    torch.testing.assert_close(Sine().diagonal(q)[0][:2], series[:2], rtol=1e-12, atol=0)
    torch.testing.assert_close(Sine().diagonal(q)[0], (1 - (-2 * q).exp()) / 2, rtol=1e-3, atol=0)


def kept_bytes(made: gpntk.InfiniteNTKKernel, x: Tensor, diag: bool) -> tuple[Tensor, int]:
    """A value, and the size of what is kept for its derivatives."""
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = made.forward(x, x, diag=diag)
    return value, total


@pytest.mark.parametrize("diag", [False, True])
def test_what_is_kept_for_gradients_is_within_the_budget(diag: bool) -> None:
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1)]
    x = torch.randn(6, 2 * 8 * 8, dtype=D)
    made = [
        gpntk.InfiniteNTKKernel(nn.Sequential(*layers), input_shape=(2, 8, 8), memory_budget=budget).double()
        for budget in (2**30, 2**18)
    ]
    (value, kept), (small, less) = (kept_bytes(entry, x, diag) for entry in made)
    torch.testing.assert_close(small, value, rtol=1e-13, atol=0)
    assert less < min(kept / 10, 2**18)
    for entry, result in zip(made, (value, small), strict=True):
        result.sum().backward()
        torch.testing.assert_close(entry.raw_weight_std.grad, made[0].raw_weight_std.grad, rtol=1e-12, atol=0)


def test_deviations_are_set_by_names_too() -> None:
    made = kernel()
    first, *others = made.program.layers
    made.weight_std = {first: 1.7, **dict.fromkeys(others, 0.9)}
    torch.testing.assert_close(made.weight_std.double(), torch.tensor([1.7, *[0.9] * len(others)], dtype=D))
    with pytest.raises(SelectionError, match="the pattern 'head' matches none of the layers"):
        made.weight_std = {"head": 1.0}
