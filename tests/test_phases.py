"""Signal propagation against known phase boundaries and simulated deep networks."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gpntk.errors import InputError
from gpntk.infinite import AbstractActivation, Quadrature, activation_of
from gpntk.infinite.closed_forms import Exponential, Gaussian, Sign, Step, cosine
from gpntk.infinite.phases import phase, phase_diagram

RELU, TANH, ERF = activation_of(nn.ReLU()), activation_of(nn.Tanh()), activation_of(torch.erf)


def test_relu_in_closed_form() -> None:
    # q ← b + w q / 2 and χ₁ = w / 2, whatever q.
    result = phase(RELU, 1.5, 0.3)
    assert result.variance == pytest.approx(0.3 / (1 - 0.75), rel=1e-10)
    assert result.susceptibility == pytest.approx(0.75, rel=1e-12)
    assert result.variance_depth == pytest.approx(-1 / math.log(0.75), rel=1e-9)
    assert result.correlation == pytest.approx(1, abs=1e-6)
    assert phase(RELU, 2.0, 0.0).name == "critical"
    assert phase(RELU, 2.5, 0.1).variance == math.inf


def test_odd_activations_without_bias_are_critical_at_one_over_their_squared_slope() -> None:
    assert phase(TANH, 0.9, 0.0).name == "ordered"
    assert phase(TANH, 1.2, 0.0).name == "chaotic"
    slope = 4 / math.pi  # erf'(0)²
    assert phase(ERF, 0.9 / slope, 0.0).susceptibility == pytest.approx(0.9, abs=1e-6)
    assert phase(ERF, 1.3 / slope, 0.0).name == "chaotic"


ITERATED: list[tuple[AbstractActivation, float, float]] = [
    (RELU, 1.5, 0.3),
    (activation_of(nn.GELU()), 2.0, 0.1),
    (activation_of(nn.GELU()), 1.5, 0.02),
    (TANH, 4.0, 0.0),
    (ERF, 4.0, 0.2),
    (activation_of(torch.sin), 3.0, 0.1),
    (cosine(), 1.0, 0.1),
    (cosine(), 2.0, 0.0),
    (Gaussian(), 1.0, 0.1),
    (Gaussian(), 30.0, 0.0),
    (Exponential(), 0.1, 0.01),
    (Sign(), 1.0, 0.1),
    (Step(), 1.0, 0.0),
]


def iterated(step: Callable[[Tensor], Tensor], start: float) -> Tensor:
    """Where 300 layers lead, or as many as it takes until nothing moves any more."""
    value = torch.tensor(start).double()
    for _ in range(300):
        value, before = step(value), value
        if (value - before).abs() <= 1e-12 * value.abs().clamp_min(1):
            break
    return value


@pytest.mark.parametrize(("activation", "weight", "bias"), ITERATED)
def test_against_iteration(activation: AbstractActivation, weight: float, bias: float) -> None:
    q = iterated(lambda q: bias + weight * activation.diagonal(q)[0], 1.0)
    c = iterated(lambda c: (bias + weight * activation.moments(q, q, c * q)[0]) / q, 0.5)
    distances = []
    result = phase(activation, weight, bias)
    assert result.variance == pytest.approx(q.item(), rel=1e-9)
    assert result.correlation == pytest.approx(c.item(), abs=1e-7)
    # Layers over which a distance falls by e: from the last iterations above rounding.
    c = c - 1e-4 if result.correlation > 0.5 else c + 1e-4
    for _ in range(2):
        distances.append(abs(c.item() - result.correlation))
        c = (bias + weight * activation.moments(q, q, c * q)[0]) / q
    factor = distances[1] / distances[0]
    assert math.exp(-1 / result.correlation_depth) == pytest.approx(factor, rel=0.02)
    q = q + 1e-5
    after = (bias + weight * activation.diagonal(q)[0] - result.variance).abs().item()
    expected = math.exp(-1 / result.variance_depth) if result.variance_depth else 0.0
    assert after / 1e-5 == pytest.approx(expected, abs=1e-3)


def test_slow_maps_have_their_true_fixed_points() -> None:
    # Of erf the map of correlations is (2/π) arcsin(2 q c / (1 + 2 q)) w / q, whose slope at c* = 0 is known.
    for weight in (0.79, 0.9):
        result = phase(ERF, weight, 0.0)
        q = result.variance
        assert q == pytest.approx(weight * 2 / math.pi * math.asin(2 * q / (1 + 2 * q)), rel=1e-10)
        assert result.correlation == pytest.approx(0, abs=1e-12)
        slope = weight * 2 / math.pi * 2 / (1 + 2 * q)
        assert result.correlation_depth == pytest.approx(-1 / math.log(slope), rel=1e-6)
        assert result.name == "chaotic"
    assert phase(TANH, 1.01, 0.0).correlation == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("activation", [TANH, ERF, activation_of(torch.sin)], ids=["tanh", "erf", "sin"])
def test_critical_odd_activations_lose_the_signal(activation: AbstractActivation) -> None:
    critical = 1 / activation.diagonal(torch.zeros(()).double())[1].item()
    result = phase(activation, critical, 0.0)
    assert result.variance == 0
    assert result.name == "critical"
    assert result.correlation_depth == result.variance_depth == math.inf


def test_growing_variances() -> None:
    for weight, bias in ((2.5, 0.0), (2.0, 0.1)):
        result = phase(RELU, weight, bias)
        assert result.variance == math.inf
        assert result.susceptibility == pytest.approx(weight / 2)
    assert phase(RELU, 1.9, 1e-13).variance == pytest.approx(1e-13 / 0.05, rel=1e-6)
    assert phase(Quadrature(torch.relu, (0.0,)), 1.0, 0.0).susceptibility == pytest.approx(0.5)


def test_activations_that_jump_are_chaotic() -> None:
    # Of sign: q* = 1.1, and the derivative of arcsin is infinite at one.
    result = phase(Sign(), 1.0, 0.1)
    c = result.correlation
    assert result.susceptibility == math.inf
    assert c == pytest.approx((0.1 + 2 / math.pi * math.asin(c)) / 1.1, abs=1e-12)
    assert 0 < c < 1
    assert result.variance_depth == 0


def test_chaotic_network_by_simulation() -> None:
    torch.manual_seed(0)
    weight, bias, width = 4.0, 0.05, 2000
    result = phase(TANH, weight, bias)
    h = torch.randn(2, width).double() * result.variance**0.5
    h[1] = 0.3 * h[0] + (1 - 0.09) ** 0.5 * h[1]
    for _ in range(20):
        w = torch.randn(width, width).double() * (weight / width) ** 0.5
        h = torch.tanh(h) @ w + bias**0.5 * torch.randn(width).double()
    assert h.square().mean().item() == pytest.approx(result.variance, rel=0.1)
    correlation = (h[0] @ h[1] / (h[0].norm() * h[1].norm())).item()
    assert correlation == pytest.approx(result.correlation, abs=0.1)
    assert result.name == "chaotic"
    assert 0 < result.correlation < 1


def test_diagram_and_errors() -> None:
    grid = phase_diagram(TANH, torch.tensor([0.5, 3.0]), torch.tensor([0.05, 0.2, 0.5]))
    assert grid["susceptibility"].shape == (3, 2)
    assert (grid["susceptibility"][:, 0] < 1).all()
    assert (grid["susceptibility"][0, 1] > 1).all()
    with pytest.raises(InputError, match="weight_variance"):
        phase(TANH, 0.0, 0.1)
