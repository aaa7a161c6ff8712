"""Signal propagation against known phase boundaries and simulated deep networks."""

import math

import pytest
import torch
from torch import nn

from gpntk.errors import InputError
from gpntk.infinite import activation_of
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
