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
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from gpntk._checks import check_kinds, check_not_negative, check_positive, check_tensors, check_values
from gpntk.errors import InputError
from gpntk.infinite.gaussian import AbstractActivation

# A variance beyond which it is taken to have no fixed point, and one that is taken for zero.
_DIVERGED = 1e12
_VANISHED = 1e-10
# Points that a bracket is cut into, and rounds of that: 64^-12 of it is left.
_CUTS = 64
_ROUNDS = 12
# Relative excess of susceptibility over one that may be rounding.
_ROUNDING = 1e-9


class Phase(NamedTuple):
    """Where a network of given σ_w², σ_b² stands.

    Attributes:
        variance: q*, the first fixed point on the way that the map takes from q = 1; infinite where there is none.
        correlation: c*, the fixed point that other correlations in [0, 1) are drawn to; 1 where q* = 0.
        susceptibility: χ₁; infinite for an activation that jumps, such as ``sign``.
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

    Args:
        activation: φ, as `activation_of` gives it.
        weight_variance: σ_w².
        bias_variance: σ_b².

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
    check_kinds(AbstractActivation, "what gpntk.infinite.activation_of(module) gives", activation=activation)
    check_positive(weight_variance=weight_variance)
    check_not_negative(bias_variance=bias_variance)

    def step(q: Tensor) -> Tensor:
        return bias_variance + weight_variance * activation.diagonal(q)[0]

    q = _variance(step)
    if q is None:
        diverged = torch.tensor(_DIVERGED, dtype=torch.float64, device="cpu")
        slope = weight_variance * float(activation.diagonal(diverged)[1])
        return Phase(math.inf, math.nan, slope, math.nan, math.nan)
    # At q = 0 itself a kink of φ at zero is not seen.
    slope = weight_variance * float(activation.diagonal(q.clamp_min(_VANISHED))[1])
    if not float(q):
        return Phase(0.0, 1.0, slope, _depth(slope), _depth(slope))

    def correlate(c: Tensor) -> Tensor:
        return (bias_variance + weight_variance * activation.moments(q.expand_as(c), q.expand_as(c), c * q)[0]) / q

    # By Mehler's formula all powers of c have factors >= 0: the map is convex on [0, 1], and steepest at 1.
    half = torch.full_like(q, 0.5)
    if 2 * float(1 - correlate(half)) > slope + _ROUNDING:
        slope = math.inf
    c = _correlation(correlate, q) if slope > 1 + _ROUNDING else torch.ones_like(q)
    at_c = slope if float(c) == 1 else _derivative(correlate, c)
    return Phase(float(q), float(c), slope, _depth(_derivative(step, q)), _depth(at_c))


def _variance(step: Callable[[Tensor], Tensor]) -> Tensor | None:
    """q*; None if the variance grows beyond bounds.

    An increasing map never passes a fixed point, so that the first zero of step(q) - q on its way is where it ends.
    """
    one = torch.ones((), dtype=torch.float64, device="cpu")
    change = float(step(one) - one)
    # Ranges of the variance, from one on.
    ranges = [16.0**n for n in range(11)] if change > 0 else [16.0**-n for n in range(9)]
    for start, stop in pairwise(ranges):
        q = torch.logspace(math.log10(start), math.log10(stop), _CUTS, dtype=torch.float64, device="cpu")
        passed = ~(step(q) - q > 0) if change > 0 else step(q) - q >= 0
        if passed.any():
            first = int(passed.int().argmax())
            ends = sorted((float(q[max(first - 1, 0)]), float(q[first])))
            return _zero(lambda q: step(q) - q, ends[0], ends[1])
    if change > 0:
        return None
    zero = torch.zeros_like(one)
    return _zero(lambda q: step(q) - q, 0.0, _VANISHED) if float(step(zero)) > 0 else zero


def _correlation(correlate: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """c* below one, of a convex map that is steeper than one at c = 1."""
    # Most of them near one, where the map of a slightly chaotic network returns.
    c = 1 - torch.logspace(0, -8, _CUTS, dtype=like.dtype, device=like.device)
    below = correlate(c) - c < 0
    if not below.any():
        return torch.ones_like(like)
    first = int(below.int().argmax())
    return _zero(lambda c: correlate(c) - c, float(c[max(first - 1, 0)]), float(c[first]))


def _zero(function: Callable[[Tensor], Tensor], left: float, right: float) -> Tensor:
    """Where a function turns from positive to negative between ``left`` and ``right``."""
    for _ in range(_ROUNDS):
        x = torch.linspace(left, right, _CUTS + 1, dtype=torch.float64, device="cpu")
        first = max(int((function(x) < 0).int().argmax()), 1)
        left, right = float(x[first - 1]), float(x[first])
    return torch.tensor(left, dtype=torch.float64, device="cpu")


def _derivative(step: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Slope of a map; zero for a constant."""
    with torch.enable_grad():
        point = x.detach().clone().requires_grad_()
        value = step(point)
        if not value.requires_grad:
            return 0.0
        (slope,) = torch.autograd.grad(value, point)
    return float(slope)


def _depth(slope: float) -> float:
    """-1 / log |slope|: layers for a distance to fall by e; infinite for a slope of one or more."""
    size = abs(slope)
    if size >= 1 - _ROUNDING:
        return math.inf
    return -1 / math.log(size) if size else 0.0


def phase_diagram(
    activation: AbstractActivation, weight_variances: Tensor, bias_variances: Tensor
) -> dict[str, Tensor]:
    """The fields of `Phase` on a grid: each `[len(bias_variances), len(weight_variances)]`, by name."""
    check_tensors(weight_variances=weight_variances)
    check_values(weight_variances.device, weight_variances=weight_variances, bias_variances=bias_variances)
    for name, values in (("weight_variances", weight_variances), ("bias_variances", bias_variances)):
        if values.dim() != 1 or not len(values) or not bool(values.isfinite().all() and (values >= 0).all()):
            raise InputError(f"{name} must be a vector of at least one variance, finite and not below zero.")
    phases = [[phase(activation, float(w), float(b)) for w in weight_variances] for b in bias_variances]
    return {
        name: torch.tensor(
            [[getattr(entry, name) for entry in row] for row in phases],
            dtype=torch.float64,
            device=weight_variances.device,
        )
        for name in Phase._fields
    }
