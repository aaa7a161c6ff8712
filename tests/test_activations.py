"""Gaussian moments of activations: against dense rules, stored values of neural-tangents, and laws."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gpntk.errors import InputError
from gpntk.infinite import (
    AbstractActivation,
    PiecewiseLinear,
    Quadrature,
    activation_of,
    activations,
    closed_forms,
    rules,
)
from gpntk.infinite.closed_forms import (
    GELU,
    ABReLU,
    Erf,
    Exponential,
    Polynomial,
    RectifiedMonomial,
    Sign,
    Sine,
    cosine,
    hermite,
    monomial,
    rbf,
)
from tests.gaussian_moments import (
    BY_QUADRATURE,
    CASES,
    CLOSED,
    DISCONTINUOUS,
    D,
    dense_diagonal,
    dense_twin,
    value_and_slope,
)

DIRECTORY = Path(__file__).parent / "oracles" / "nt"


def covariances() -> tuple[Tensor, Tensor, Tensor]:
    """Correlations -1, nearly -1, 0, nearly 1, 1 and random ones, with variances small and large."""
    generator = torch.Generator().manual_seed(0)
    q1, q2 = (torch.exp(2 * torch.rand(8, generator=generator, dtype=D) - 1) for _ in range(2))
    q1[5:], q2[5:] = torch.tensor([1e-6, 1e-3, 20.0], dtype=D), torch.tensor([2.0, 4e-3, 9.0], dtype=D)
    c = torch.tensor([-1, -0.999999, 0, 0.999999, 1, 0.7, -0.3, 0.995], dtype=D)
    return q1, q2, c * (q1 * q2).sqrt()


@pytest.mark.parametrize("name", CASES)
def test_moments_against_dense_rule(name: str) -> None:
    case = CASES[name]
    rows = covariances()
    values = torch.stack(case.activation.moments(*rows), -1)
    for value, q1, q2, k in zip(values, *rows, strict=True):
        scale = (dense_diagonal(case, q1) * dense_diagonal(case, q2)).sqrt().clamp_min(1e-300)
        error = ((value - dense_twin(case, q1, q2, k)) / scale).abs().max()
        assert error <= case.tolerance, f"relative error {error:.2e} at q1={q1:.3g}, q2={q2:.3g}, k={k:.9g}"


@pytest.mark.parametrize("name", CASES)
def test_diagonal_is_limit_and_dense(name: str) -> None:
    case = CASES[name]
    q = torch.tensor([1e-6, 0.3, 1.0, 7.0], dtype=D)
    values = torch.stack(case.activation.diagonal(q), -1)
    torch.testing.assert_close(torch.stack(case.activation.moments(q, q, q), -1), values, rtol=case.tolerance, atol=0)
    dense = torch.stack([dense_diagonal(case, entry) for entry in q])
    torch.testing.assert_close(values, dense, rtol=1e-12 if name in CLOSED else 1e-11, atol=1e-15)


@pytest.mark.parametrize("name", BY_QUADRATURE)
def test_quadrature_in_large_networks(name: str) -> None:
    # Variances of 1e4: nearly kinked, and beyond what the series resolves.
    case = CASES[name]
    q1, q2 = torch.tensor([1e4, 1e4, 1e-8], dtype=D), torch.tensor([3e3, 1e4, 1e4], dtype=D)
    k = torch.tensor([0.2, 0.9999, 0.5], dtype=D) * (q1 * q2).sqrt()
    first, second = case.activation.moments(q1, q2, k)
    assert first.isfinite().all()
    squares = torch.stack([torch.stack(case.activation.diagonal(q)) for q in (q1, q2)]).prod(0)
    assert (first**2 <= squares[0] * (1 + 1e-9)).all()
    assert (second**2 <= squares[1] * (1 + 1e-9)).all()


def test_steep_quadrature_equals_erf() -> None:
    q1 = torch.tensor([1e4, 1e6, 1e6, 300.0, 1e6], dtype=D)
    q2 = torch.tensor([3e3, 1e6, 0.1, 400.0, 1e6], dtype=D)
    k = torch.tensor([0.2, 0.9999, 0.99, -0.999, 1.0], dtype=D) * (q1 * q2).sqrt()
    for value, exact in zip(Quadrature(torch.erf).moments(q1, q2, k), Erf().moments(q1, q2, k), strict=True):
        torch.testing.assert_close(value, exact, rtol=0, atol=1e-10)


def test_quadrature_says_where_it_ends() -> None:
    # E[exp(u)²] = exp(2 q): right as long as it is said to be, and an error where 12 deviations are not enough.
    exact, by_rule = Exponential(), Quadrature(torch.exp)
    q = torch.tensor([1e-8, 0.5, 2.0, 7.0], dtype=D)
    for value, reference in zip(by_rule.diagonal(q), exact.diagonal(q), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-9, atol=0)
    for q in (9.0, 16.0, 64.0, 400.0):
        with pytest.raises(InputError, match=f"at variance {q:.3g} the function is not finite, or grows too fast"):
            by_rule.diagonal(torch.tensor([1.0, q], dtype=D))
        with pytest.raises(InputError, match="grows too fast"):
            by_rule.moments(*torch.tensor([[q], [q], [0.5 * q]], dtype=D))
    with pytest.raises(InputError, match="is not finite"):
        Quadrature(torch.log).diagonal(torch.ones(1))
    with pytest.raises(InputError, match="grows too fast"):
        Quadrature(lambda x: torch.relu(x) * x.exp(), (0.0,)).moments(*torch.full((3, 1), 6.0, dtype=D))


@pytest.mark.parametrize("deviation", [1e-6, 0.04, 0.045, 0.05, 0.1])
def test_functions_that_are_zero_but_far_out(deviation: float) -> None:
    shrink, q = activation_of(nn.Softshrink()), torch.tensor([deviation**2], dtype=D)
    assert shrink is not None
    for moment in (*shrink.diagonal(q), *shrink.moments(q, q, 0.9 * q)):
        assert 0 <= moment.item() < 1e-5


def parallel_inputs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(rows, 5, generator=torch.Generator().manual_seed(1), dtype=D) + 3
    return x.square().mean(1)[:, None], x.square().mean(1), x @ x.mT / 5


def test_table_and_its_derivatives() -> None:
    rows = [row.requires_grad_() for row in parallel_inputs(40)]
    quadrature, exact = Quadrature(torch.relu, (0.0,)).moments(*rows), ABReLU(0.0, 1.0).moments(*rows)
    off = ~torch.eye(40, dtype=torch.bool)
    for index, (value, reference) in enumerate(zip(quadrature, exact, strict=True)):
        torch.testing.assert_close(value, reference, rtol=0, atol=1e-9)
        gradients = [torch.autograd.grad(entry[off].sum(), rows, retain_graph=True) for entry in (value, reference)]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=(1e-8, 1e-6)[index] * float(other.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_derivatives_in_the_interior(name: str) -> None:
    q1, q2 = (torch.tensor([entry], dtype=D, requires_grad=True) for entry in (0.8, 1.7))
    k = torch.tensor([0.55], dtype=D, requires_grad=True)
    activation = CASES[name].activation
    assert torch.autograd.gradcheck(activation.moments, (q1, q2, k), atol=1e-6)
    assert torch.autograd.gradcheck(activation.diagonal, (q1,), atol=1e-6)


@pytest.mark.parametrize("name", ["relu", "abs", "rectmono2", "erf", "gelu", "sin", "gaussian", "polynomial", "tanh"])
def test_second_derivatives(name: str) -> None:
    q1, q2 = (torch.tensor([entry], dtype=D, requires_grad=True) for entry in (0.8, 1.7))
    k = torch.tensor([0.55], dtype=D, requires_grad=True)
    activation = CASES[name].activation
    assert torch.autograd.gradgradcheck(lambda *rows: activation.moments(*rows)[0], (q1, q2, k), atol=1e-6)


@pytest.mark.parametrize("name", ["elu", "hardtanh", "relu6", "zigzag", "hardtanh_by_quadrature", "relu"])
def test_derivatives_of_direct_rule(name: str) -> None:
    case = CASES[name]
    activation = Quadrature(case.phi, case.kinks)
    q1, q2 = (torch.tensor([entry], dtype=D, requires_grad=True) for entry in (1.2, 1.5))
    k = torch.tensor([0.995 * math.sqrt(1.8)], dtype=D, requires_grad=True)
    # Gradients that are missing change nothing here, and asking for them takes half the time.
    options = {"atol": 1e-5, "rtol": 1e-4, "check_undefined_grad": False}
    assert torch.autograd.gradcheck(activation.moments, (q1, q2, k), **options)


@pytest.mark.parametrize("name", [name for name in CASES if name not in DISCONTINUOUS])
def test_first_moment_has_second_as_derivative(name: str) -> None:
    q1, q2, k = covariances()
    k = k.requires_grad_()
    first, second = CASES[name].activation.moments(q1, q2, k)
    (derivative,) = torch.autograd.grad(first.sum(), k)
    torch.testing.assert_close(derivative, second.detach(), rtol=1e-7, atol=1e-7 * float(second.detach().abs().max()))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_everywhere(name: str, dtype: torch.dtype) -> None:
    q1 = torch.tensor([0.0, 0.0, 1.3, 1.3, 1.3, 1.0, 1e-12, 2.0], dtype=dtype, requires_grad=True)
    q2 = torch.tensor([0.0, 1.5, 1.3, 1.3, 2.6, 1.0, 1e-12, 0.5], dtype=dtype, requires_grad=True)
    k = torch.tensor([0.0, 0.0, 1.3, -1.3, 1.3 * math.sqrt(2), 1 + 2e-7, 1e-12, 1.0], dtype=dtype, requires_grad=True)
    activation = CASES[name].activation
    entries = (*activation.moments(q1, q2, k), *activation.diagonal(q1))
    for entry in entries:
        assert entry.dtype == dtype
        assert entry.isfinite().all()
    # One backward pass for all of them: what is not finite in one gradient is not finite in their sum.
    total = sum((entry.sum() for entry in entries if entry.requires_grad), torch.zeros(()))
    gradients = torch.autograd.grad(total, (q1, q2, k), allow_unused=True) if total.requires_grad else ()
    for gradient in gradients:
        assert gradient is None or gradient.isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_single_precision(name: str) -> None:
    activation = CASES[name].activation
    x = torch.randn(6, 4)
    x[1], x[2], x[3] = x[0], -x[0], x[0] * (1 + 1e-3)
    k, q = x @ x.mT / 4, x.square().mean(1)
    k.fill_diagonal_(0).add_(q.diag())
    k[0, 1] = k[1, 0] = q[0]
    single = activation.moments(q[:, None], q, k)
    double = activation.moments(q[:, None].double(), q.double(), k.double())
    for one, other in zip(single, double, strict=True):
        scale = other.abs()
        if getattr(activation, "single", False):
            # Evaluated in float32, a moment near zero is as exact as its diagonal, beside which covariances matter.
            root = other.diagonal().sqrt()
            scale = torch.outer(root, root)
        assert ((one.double() - other).abs() <= 2e-7 * scale + 1e-12).all()
    for moment, diagonal in zip(single, activation.diagonal(q), strict=True):
        torch.testing.assert_close(moment.diagonal(), diagonal, rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", ["relu", "tanh", "elu", "hardtanh", "hardtanh_by_quadrature"])
def test_broadcasting_symmetry_and_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    activation = CASES[name].activation
    x, y = torch.randn(3, 4, 2, dtype=D), torch.randn(5, 4, 2, dtype=D)
    q1, q2 = x.square().mean(1), y.square().mean(1)
    k = torch.einsum("ncs,mct->nmst", x, y) / 4
    plain = activation.moments(q1[:, None, :, None], q2[None, :, None, :], k)
    swapped = activation.moments(q2[:, None, None, :], q1[None, :, :, None], k.transpose(0, 1))
    expanded = activation.moments(q1[:, None, :, None].expand(k.shape), q2[None, :, None, :].expand(k.shape), k)
    monkeypatch.setattr("gpntk.infinite.quadrature._BUDGET", 2**12)
    chunked = activation.moments(q1[:, None, :, None], q2[None, :, None, :], k)
    for index, moment in enumerate(plain):
        assert moment.shape == k.shape
        torch.testing.assert_close(swapped[index].transpose(0, 1), moment, rtol=0, atol=1e-10)
        torch.testing.assert_close(expanded[index], moment, rtol=0, atol=1e-12)
        torch.testing.assert_close(chunked[index], moment, rtol=0, atol=1e-12)


def test_empty() -> None:
    for case in (CASES["relu"], CASES["tanh"], CASES["elu"]):
        first, _ = case.activation.moments(torch.zeros(0, 1), torch.ones(3), torch.zeros(0, 3))
        assert first.shape == (0, 3)


def infinite_fc(
    activation: AbstractActivation, depth: int, w: float, b: float, x1: Tensor, x2: Tensor
) -> tuple[Tensor, ...]:
    """NNGP and NTK of depth x (Dense, φ), Dense; between equal rows the diagonal is used."""
    same = (x1[:, None] == x2).all(-1)
    k, q1, q2 = x1 @ x2.mT / x1.shape[1], x1.square().mean(1)[:, None], x2.square().mean(1)
    k = torch.where(same, q2, k)
    theta = torch.zeros_like(k)
    for layer in range(depth + 1):
        k, q1, q2 = (w**2 * entry + b**2 for entry in (k, q1, q2))
        theta = k + w**2 * theta
        if layer < depth:
            new, slope = activation.moments(q1, q2, k)
            (q1, slope1), (q2, _) = activation.diagonal(q1), activation.diagonal(q2)
            k, theta = torch.where(same, q1, new), theta * torch.where(same, slope1, slope)
    return k, theta


FILES = sorted(path.stem for path in DIRECTORY.glob("fc*_d[0-9]_w*.npz"))
FC = re.compile(r"fc(?:x|edge)?_(?P<name>\w+)_d(?P<depth>\d)_w(?P<w>[\w.]+)_b(?P<b>[\d.]+)")


# Of a stored case, or of all of an activation that were not recomputed in higher precision.
IMPRECISE = {
    # Opposite rows, scaled: rounding ε of k alone moves the angle by √ε.
    "fcedge_leaky_relu_d2_w1.5_b0.0": 2e-8,
    # Gauss-Hermite quadrature of degree 200, said to be good to about 1e-6.
    "tanh": 1e-6,
}


# No references: a coarse quadrature, and a file of NaN (see test_infinite.py for both).
USELESS = ("deg25", "rectmono2_d2")


@pytest.mark.parametrize(
    "stem", [stem for stem in FILES if FC.fullmatch(stem) and not any(part in stem for part in USELESS)]
)
def test_fully_connected_oracle(stem: str) -> None:
    case = FC.fullmatch(stem)
    assert case is not None
    w = math.sqrt(2) if case["w"] == "sqrt2" else float(case["w"])
    with np.load(DIRECTORY / f"{stem}.npz") as stored:
        arrays = {key: torch.as_tensor(stored[key]) for key in stored}
    x, compared = {"1": arrays["x1"], "2": arrays["x2"]}, 0
    for suffix, pair in (("", "12"), ("_11", "11"), ("_22", "22")):
        if f"nngp{suffix}" not in arrays:
            continue
        values = infinite_fc(
            CASES[case["name"]].activation, int(case["depth"]), w, float(case["b"]), *(x[i] for i in pair)
        )
        for value, key in zip(values, ("nngp", "ntk"), strict=True):
            precise = f"{key}{suffix}_hp" in arrays
            reference = arrays[f"{key}{suffix}_hp" if precise else f"{key}{suffix}"]
            # The reference has NaN on the diagonal of squared ReLUs, and so in deep tangent kernels.
            known = reference.isfinite()
            compared += int(known.sum())
            tolerance = IMPRECISE.get(stem if precise else case["name"], 1e-9)
            torch.testing.assert_close(value[known], reference[known], rtol=tolerance, atol=1e-12)
    assert compared


def test_oracle_covers_every_activation() -> None:
    present = {found["name"] for found in map(FC.fullmatch, FILES) if found} - {"tanh_deg25"}
    assert {"gabor", "elu", "rbf", "sign", "rectmono2", "silu", "exp", "gaussian", "monomial2", "polynomial"} <= present
    assert len(present) >= 25


MODULES = [
    (nn.ReLU(), ABReLU(0.0, 1.0)),
    (nn.LeakyReLU(0.3), ABReLU(0.3, 1.0)),
    (nn.PReLU(), ABReLU(0.25, 1.0)),
    (nn.RReLU(0.1, 0.3).eval(), ABReLU(0.2, 1.0)),
    (nn.Identity(), ABReLU(1.0, 1.0)),
    (nn.GELU(), GELU()),
]


@pytest.mark.parametrize(("module", "expected"), MODULES, ids=lambda entry: type(entry).__name__)
def test_modules_with_closed_forms(module: nn.Module, expected: AbstractActivation) -> None:
    assert activation_of(module) == expected


QUADRATURE_MODULES = [
    nn.CELU(0.5), nn.ELU(0.5), nn.GELU("tanh"), nn.Hardswish(), nn.Hardtanh(0.5, 1), nn.LogSigmoid(), nn.Mish(),
    nn.SELU(), nn.SiLU(), nn.Sigmoid(), nn.Softplus(2.0), nn.Softshrink(0.3), nn.Softsign(), nn.Tanh(), nn.Tanhshrink(),
]  # fmt: skip


@pytest.mark.parametrize("module", [nn.Hardsigmoid(), nn.Hardtanh(-2, 1), nn.Hardtanh(0, 3), nn.ReLU6()], ids=str)
def test_modules_made_of_lines(module: nn.Module) -> None:
    activation, x = activation_of(module), torch.linspace(-7, 7, 57, dtype=D)
    assert isinstance(activation, PiecewiseLinear)
    torch.testing.assert_close(activation(x), module(x), rtol=1e-14, atol=1e-15)


def test_lines_far_from_their_knots() -> None:
    """Nearly a step, where terms as large as the variance would cancel."""
    hard = PiecewiseLinear((-1.0, 1.0), (0.0, 1.0, 0.0), -1.0)
    for exponent in (2, 6, 10, 14):
        q = torch.tensor(10.0**exponent, dtype=D)
        # E[φ²] = 1 - E[1 - u², |u| < 1], and the density is all but constant there.
        expected = 1 - 4 / 3 / (2 * math.pi * q).sqrt()
        torch.testing.assert_close(hard.diagonal(q)[0], expected, rtol=0.1 / 10 ** (1.5 * exponent) + 1e-10, atol=0)
        torch.testing.assert_close(
            hard.moments(q, q, q)[0], expected, rtol=0.1 / 10 ** (1.5 * exponent) + 1e-10, atol=0
        )
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([-math.inf, -1e30, -0.5, 0.5, 1e30, math.inf], dtype=dtype)
        assert torch.equal(hard(x), functional.hardtanh(x))


@pytest.mark.parametrize("name", ["relu", "hardtanh", "zigzag"])
def test_little_is_kept_for_the_backward_pass(name: str) -> None:
    k = torch.linspace(-0.9, 0.9, 1000, dtype=D).requires_grad_()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    q = torch.ones((), dtype=D)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        first, second = CASES[name].activation.moments(q, q, k)
    assert sum(kept.values()) <= 4 * len(k)
    (slope,) = torch.autograd.grad(first.sum(), k, retain_graph=True)
    torch.testing.assert_close(slope, second)


@pytest.mark.parametrize("name", ["hardtanh", "relu6", "zigzag"])
def test_derivatives_of_lines_at_equal_units(name: str) -> None:
    """Not marked as equal: the infinite derivatives of E[φ'(u) φ'(v)] cancel, what is left is that of E[φ'(u)²]."""
    activation = CASES[name].activation
    q = torch.tensor([0.3, 1.5, 7.0], dtype=D, requires_grad=True)
    for both, own in zip(activation.moments(q, q, q), activation.diagonal(q), strict=True):
        (one,), (two,) = (torch.autograd.grad(value.sum(), q, retain_graph=True) for value in (both, own))
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["tanh", "elu", "hardswish", "hardtanh", "relu"])
def test_inference_mode(name: str) -> None:
    activation, rows = CASES[name].activation, covariances()
    expected = activation.moments(*rows)
    with torch.inference_mode():
        found = activation.moments(*rows)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("knots", "slopes", "message"),
    [((), (1.0,), "at least one"), ((1.0, 1.0), (0.0, 1.0, 2.0), "increasing"), ((1.0,), (0.0,), "1 knots need 2")],
)
def test_lines_that_are_none(knots: tuple[float, ...], slopes: tuple[float, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PiecewiseLinear(knots, slopes)
    with pytest.raises(InputError, match="finite"):
        PiecewiseLinear((0.0,), (1.0, math.nan))


@pytest.mark.parametrize("module", QUADRATURE_MODULES, ids=str)
def test_modules_by_quadrature(module: nn.Module) -> None:
    activation = activation_of(module)
    assert isinstance(activation, Quadrature)
    x = torch.linspace(-7, 7, 57, dtype=D)
    torch.testing.assert_close(activation.phi(x), module(x), rtol=1e-12, atol=1e-15)
    # Between declared kinks the slope has no jump.
    x = torch.linspace(-7, 7, 14001, dtype=D) + 1e-4
    jumps = value_and_slope(module, x)[1].diff().abs()
    for kink in activation.kinks:
        jumps[(x[1:] - kink).abs() < 2e-3] = 0
    assert jumps.max() < 0.01


FUNCTIONS = [
    (torch.relu, {}, ABReLU(0.0, 1.0)),
    (functional.relu, {"inplace": True}, ABReLU(0.0, 1.0)),
    (torch.Tensor.relu_, {}, ABReLU(0.0, 1.0)),
    ("relu", {}, ABReLU(0.0, 1.0)),
    (functional.leaky_relu, {"negative_slope": 0.2}, ABReLU(0.2, 1.0)),
    (torch.clamp, {"min": 0}, ABReLU(0.0, 1.0)),
    (torch.abs, {}, ABReLU(-1.0, 1.0)),
    (torch.erf, {}, Erf()),
    (torch.sin, {}, Sine()),
    ("cos", {}, cosine()),
    (torch.exp, {}, Exponential()),
    (functional.gelu, {}, GELU()),
    (torch.pow, {"exponent": 3}, monomial(3)),
    (torch.square, {}, monomial(2)),
    (torch.sign, {}, Sign()),
]


@pytest.mark.parametrize(("function", "options", "expected"), FUNCTIONS)
def test_functions(function: object, options: dict[str, object], expected: AbstractActivation) -> None:
    assert activation_of(function, **options) == expected
    assert activation_of(function, *(value for key, value in options.items() if key != "min")) == expected or options


def test_arguments_by_place() -> None:
    assert activation_of(functional.leaky_relu, 0.2) == ABReLU(0.2, 1.0)
    hard = activation_of(functional.hardtanh, -2, 2)
    assert hard == PiecewiseLinear((-2.0, 2.0), (0.0, 1.0, 0.0), -2.0)
    assert activation_of(torch.clamp, 1, -1) == Polynomial((-1.0,))


class Renamed(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return input.sum()


UNKNOWN = [
    nn.Softmax(-1),
    nn.Linear(2, 2),
    nn.PReLU(3),
    nn.RReLU(),
    nn.Softplus(1.0, 1.0),
    nn.Softplus(0.0),
    Renamed(),
    torch.softmax,
    functional.softmax,
    torch.matmul,
    "size",
    [1],
]


@pytest.mark.parametrize("target", UNKNOWN, ids=lambda target: getattr(target, "__name__", str(target)))
def test_what_is_not_elementwise(target: object) -> None:
    assert activation_of(target) is None


def test_unknown_arguments() -> None:
    assert activation_of(torch.relu, slope=2) is None
    assert activation_of(torch.pow, 0.5) is None
    assert activation_of(torch.pow, "n") is None


def test_the_docs_name_every_layer_and_every_activation() -> None:
    page = (Path(__file__).parent.parent / "docs" / "infinite.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", page, re.MULTILINE)
    named = {name.strip().casefold() for row, _ in rows for name in re.split(r"[,()]", row)}
    forms = {name for name, kind in vars(closed_forms).items() if dataclasses.is_dataclass(kind)}
    modules = {kind.__name__ for kind in activations._MODULES}
    known = {name.replace("_", "").casefold() for name in (*forms, *modules, *activations._FUNCTIONS)}
    # By other names: ABReLU is ReLU or abs, an RReLU in eval mode is a LeakyReLU, a minus is a Polynomial.
    assert known - named == {"abrelu", "rrelu", "sine", "exponential", "clampmin", "neg"}
    assert [kind.__name__ for kind in rules.MODULES if kind.__name__ not in page] == []


def test_itself() -> None:
    activation = Sine(2.0)
    assert activation_of(activation) is activation


def test_softplus_that_is_turned_around() -> None:
    # log(1 + exp(-x)) / -1 is log(sigmoid(x)).
    q1, q2, k = covariances()
    for one, two in zip(
        activation_of(nn.Softplus(-1.0)).moments(q1, q2, k),
        activation_of(nn.LogSigmoid()).moments(q1, q2, k),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)


def test_hermite_polynomials_are_normalised() -> None:
    c = torch.linspace(-1, 1, 5, dtype=D)
    for degree in range(6):
        first, _ = hermite(degree).moments(torch.ones_like(c), torch.ones_like(c), c)
        torch.testing.assert_close(first, c**degree)


def test_rbf_is_gaussian_kernel() -> None:
    q1, q2, k = covariances()
    torch.testing.assert_close(rbf(0.3).moments(q1, q2, k)[0], (-0.3 * (q1 + q2 - 2 * k)).exp(), rtol=1e-12, atol=1e-12)


def test_single_precision_relu_of_nearly_equal_rows() -> None:
    # arccos in float32 is off by 4e-4 in the tangent kernel here.
    q = torch.tensor(1.0)
    k = torch.tensor(1 - 1e-7)
    slope = ABReLU(0.0, 1.0).moments(q, q, k)[1]
    exact = 0.5 - math.acos(k.double().item()) / (2 * math.pi)
    assert abs(slope.item() - exact) < 6e-8


def test_wrong_arguments() -> None:
    with pytest.raises(InputError, match="tolerance must be between"):
        Quadrature(torch.tanh, tolerance=1e-16)
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match=r"scale=.*: give a positive number"):
            Quadrature(torch.tanh, scale=scale)
    with pytest.raises(InputError, match=r"kinks=.* finite"):
        Quadrature(torch.relu, kinks=(math.nan,))
    with pytest.raises(InputError, match="power must be 2 or more"):
        RectifiedMonomial(1)
