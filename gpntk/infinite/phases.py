"""Order and chaos: what depth makes of signals in a random network of infinite width.

A layer maps the variance q of a unit at one input, and the correlation c of its values at two inputs, by

    q ← σ_b² + σ_w² E[φ(u)²],    c ← (σ_b² + σ_w² E[φ(u) φ(v)]) / q.

Far from the input both are near their fixed points q*, c*. χ₁ = σ_w² E[φ'(u)²] at q* says whether two nearly equal
inputs come together (χ₁ < 1, ordered) or apart (χ₁ > 1, chaotic), and so whether gradients vanish or explode.

References:
    Poole et al. (2016), Exponential Expressivity through Transient Chaos, https://arxiv.org/abs/1606.05340.
    Schoenholz et al. (2017), Deep Information Propagation, https://arxiv.org/abs/1611.01232, eqs. 3 to 9.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gpntk.errors import InputError
from gpntk.infinite.gaussian import AbstractActivation

# Plain iterations between extrapolations, and how often those are made.
_PLAIN = 20
_ROUNDS = 10
_TOLERANCE = 1e-11
# A variance beyond which it is taken to have no fixed point.
_DIVERGED = 1e12


class Phase(NamedTuple):
    """Where a network of given σ_w², σ_b² stands.

    Attributes:
        variance: q*, infinite where there is none.
        correlation: c*.
        susceptibility: χ₁.
        variance_depth: ξ_q, layers over which the distance from q* falls by e.
        correlation_depth: ξ_c, that from c*; infinite at the edge of chaos.
    """

    variance: float
    correlation: float
    susceptibility: float
    variance_depth: float
    correlation_depth: float

    @property
    def name(self) -> str:
        """``"ordered"``, ``"chaotic"`` or ``"critical"`` (to 1e-6 of χ₁ = 1)."""
        if abs(self.susceptibility - 1) < 1e-6:
            return "critical"
        return "ordered" if self.susceptibility < 1 else "chaotic"


def phase(activation: AbstractActivation, weight_variance: float, bias_variance: float) -> Phase:
    """Fixed points, susceptibility and depth scales for one σ_w² and σ_b².

    Raises:
        InputError: A variance is negative, or σ_w² is zero.

    Example:
        >>> from gpntk.infinite import activation_of
        >>> import torch
        >>> phase(activation_of(torch.nn.ReLU()), 2.0, 0.0).name
        'critical'
        >>> phase(activation_of(torch.nn.Tanh()), 0.5, 0.1).name
        'ordered'
    """
    if not weight_variance > 0 or not bias_variance >= 0:
        raise InputError(f"weight_variance={weight_variance} must be positive and bias_variance={bias_variance} >= 0.")

    def step(q: Tensor) -> Tensor:
        return bias_variance + weight_variance * activation.diagonal(q)[0]

    q = _fixed_point(step, torch.ones((), dtype=torch.float64, device="cpu"))
    if q is None:
        slope = weight_variance * float(activation.diagonal(torch.tensor(_DIVERGED, dtype=torch.float64))[1])
        return Phase(math.inf, math.nan, slope, math.nan, math.nan)
    slope = weight_variance * float(activation.diagonal(q)[1])
    correlation, angle = _correlation(activation, weight_variance, bias_variance, q)
    return Phase(float(q), correlation, slope, _depth(_derivative(step, q)), _depth(angle))


def _fixed_point(step: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    """The fixed point that iteration reaches from x, hastened by Aitken's rule; None if it grows beyond bounds."""
    for _ in range(_ROUNDS):
        start = x
        for _ in range(_PLAIN):
            before, x = x, step(x)
            if not float(x) < _DIVERGED:
                return None
            if abs(float(x - before)) <= _TOLERANCE * (abs(float(x)) + _TOLERANCE):
                return x
        one, two = step(x), step(step(x))
        curvature = float(two - 2 * one + x)
        guess = x - (one - x).square() / curvature if curvature else two
        # A jump to the other side of zero, or far away, is none of a contraction.
        x = guess if 0 < float(guess) <= 10 * max(float(two), float(start)) else two
    return x


def _correlation(
    activation: AbstractActivation, weight_variance: float, bias_variance: float, q: Tensor
) -> tuple[float, float]:
    """c* that is reached from unequal inputs, and the slope of its map there."""
    if not float(q) > 0:
        return 1.0, weight_variance * float(activation.diagonal(q)[1])

    def step(c: Tensor) -> Tensor:
        return ((bias_variance + weight_variance * activation.moments(q, q, c * q)[0]) / q).clamp(-1.0, 1.0)

    c = _fixed_point(step, torch.full_like(q, 0.5))
    assert c is not None
    c = c.clamp(-1.0, 1.0)
    return float(c), weight_variance * float(activation.moments(q, q, c * q)[1])


def _derivative(step: Callable[[Tensor], Tensor], q: Tensor) -> float:
    """Slope of the variance map."""
    with torch.enable_grad():
        point = q.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(step(point), point)
    return float(slope)


def _depth(slope: float) -> float:
    """-1 / log(slope): layers for a distance to fall by e; infinite for a slope of one or more."""
    if slope >= 1 - 1e-9:
        return math.inf
    return 0.0 if slope <= 0 else -1 / math.log(slope)


def phase_diagram(
    activation: AbstractActivation, weight_variances: Tensor, bias_variances: Tensor
) -> dict[str, Tensor]:
    """The fields of `Phase` on a grid: each `[len(bias_variances), len(weight_variances)]`, by name."""
    phases = [[phase(activation, float(w), float(b)) for w in weight_variances] for b in bias_variances]
    return {
        name: torch.tensor([[getattr(entry, name) for entry in row] for row in phases], dtype=torch.float64)
        for name in Phase._fields
    }
