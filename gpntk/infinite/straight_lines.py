"""Functions made of straight lines, whose Gaussian moments are probabilities of quadrants under a bivariate normal.

References:
    Owen (1956), Tables for Computing Bivariate Normal Probabilities.
    Rosenbaum (1961), Moments of a Truncated Bivariate Normal Distribution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, NamedTuple, cast, final

import numpy as np
import torch
from scipy.special import owens_t
from torch import Tensor

from gpntk._checks import is_number
from gpntk.errors import InputError
from gpntk.infinite.gaussian import AbstractActivation, determinant, divide, root, with_derivatives
from gpntk.infinite.panels import density
from gpntk.infinite.quadrature import Quadrature

# Units that are wider than knots by more than the root of this: terms as large cancel, and with them so many digits.
_STEEP = 1e4
_ROUNDING = 1e-12
# Standard deviations beyond which there is nothing.
_FAR = 40.0
_SMALLEST = 1e-300


class _Hinge(NamedTuple):
    """jump (side x - knot)₊, with side ±1 and knot >= 0: φ is a line through zero and hinges on either side of it."""

    jump: float
    side: float
    knot: float


@final
@dataclass(frozen=True)
class PiecewiseLinear(AbstractActivation):
    """A continuous φ with slopes s_0, ..., s_m between knots t_1 < ... < t_m, and φ(t_1) = start.

    With one hinge for every knot, `φ(x) = φ(0) + s x + Σ_j J_j (ε_j x - |t_j|)₊`, moments are sums over pairs of
    hinges, and those follow from bivariate normal probabilities. These are good to 1e-15, not to digits of what is
    smaller: of a φ that is flat around zero take `Quadrature` where variances are so small that next to nothing leaves
    that range.

    Args:
        knots: t_1, ..., t_m, at least one.
        slopes: s_0, ..., s_m.
        start: φ(t_1).

    Raises:
        InputError: Knots do not increase, numbers are not finite, or there is not one slope more than knots.

    Example:
        >>> import torch
        >>> from gpntk.infinite import PiecewiseLinear
        >>> hardtanh = PiecewiseLinear((-1.0, 1.0), (0.0, 1.0, 0.0), -1.0)
        >>> hardtanh(torch.tensor([-3.0, 0.5, 2.0]))
        tensor([-1.0000,  0.5000,  1.0000])

    References:
        Rosenbaum (1961), Moments of a Truncated Bivariate Normal Distribution.
    """

    knots: tuple[float, ...]
    slopes: tuple[float, ...]
    start: float = 0.0

    def __post_init__(self) -> None:
        for name, values in (("knots", self.knots), ("slopes", self.slopes), ("start", (self.start,))):
            if not isinstance(values, Sequence) or not all(is_number(v) and math.isfinite(v) for v in values):
                raise InputError(f"{name}={getattr(self, name)!r} must be finite: give numbers.")
        if not self.knots or any(one >= two for one, two in pairwise(self.knots)):
            raise InputError(f"knots={self.knots}: give at least one, in increasing order.")
        if len(self.slopes) != len(self.knots) + 1:
            raise InputError(f"slopes={self.slopes}: {len(self.knots)} knots need {len(self.knots) + 1} slopes.")

    def __call__(self, x: Tensor) -> Tensor:
        result = torch.full_like(x, self.start)
        ends = [None, *self.knots], [*self.knots, None]
        for slope, low, high in zip(self.slopes, *ends, strict=True):
            if slope:
                # The part of the way from the first knot to x that is on this line.
                origin = self.knots[0] if low is None else low
                result = result + slope * (x.clamp(low, high) - origin)
        return result

    def _moments(self, q1: Tensor, q2: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self._is_steep(q1) or self._is_steep(q2):
            return self._by_quadrature._moments(q1, q2, k)
        first, second = cast("tuple[Tensor, Tensor]", _Lines.apply(q1, q2, k, self))
        return first, second

    def _diagonal(self, q: Tensor) -> tuple[Tensor, Tensor]:
        if self._is_steep(q):
            return self._by_quadrature._diagonal(q)
        first, _ = self.by_hinges(*(q.detach(),) * 3)
        second, bends = torch.full_like(q, self._slope**2), torch.zeros_like(q)
        for (jump, side, knot), (left, right) in zip(self._hinges(), pairwise(self.slopes), strict=True):
            beyond, height = tail(q, knot)
            second = second + (right**2 - left**2) * side * beyond
            bends = bends + jump * self(torch.tensor(side * knot, dtype=torch.float64, device="cpu")).item() * height
        # d E[φ²] / dq = E[φ'²] + E[φ φ''].
        return with_derivatives(first, (q, second + bends)), second

    def by_hinges(self, q1: Tensor, q2: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The moments `[*k]`, of any variances."""
        value, slope, hinges = self._value, self._slope, list(self._hinges())
        first, second = value**2 + slope**2 * k, torch.full_like(k, slope**2)
        for jump, side, knot in hinges:
            for q in (q1, q2):
                beyond, height = tail(q, knot)
                first = first + value * jump * (q * height - knot * beyond) + slope * jump * side * k * beyond
                second = second + slope * jump * side * beyond
        for one, two in product(hinges, hinges):
            jumps, sides = one.jump * two.jump, one.side * two.side
            both = quadrant(q1, q2, sides * k, one.knot, two.knot)
            first = first + jumps * both.mean
            second = second + jumps * sides * both.probability
        return first, second

    def curvature(self, q1: Tensor, q2: Tensor, k: Tensor) -> Tensor:
        """E[φ''(u) φ''(v)] `[*k]`, zero where u and v are parallel."""
        total = torch.zeros_like(k)
        for one, two in product(self._hinges(), self._hinges()):
            both = quadrant(q1, q2, one.side * two.side * k, one.knot, two.knot)
            total = total + one.jump * two.jump * both.density
        return total

    def by_variance(self, q: Tensor, other: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of both moments in the variance of u, E[φ''(u) φ(v)] / 2 and E[φ'''(u) φ'(v)] / 2."""
        first, second = torch.zeros_like(k), torch.zeros_like(k)
        # v given u at a knot.
        factor, deviation = divide(k, q), root(divide(determinant(q, other, k), q))
        for jump, side, knot in self._hinges():
            at = side * knot
            height = tail(q, knot)[1]
            value, slope, bend = self._smoothed(factor * at, deviation)
            first = first + 0.5 * jump * height * value
            second = second + 0.5 * jump * height * (divide(at * slope, q) - factor * bend)
        return first, second

    def _smoothed(self, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """E[φ(v)], E[φ'(v)] and E[φ''(v)] for v ~ N(mean, deviation²); the last is left out where that is zero."""
        value, slope, bend = (
            self._value + self._slope * mean,
            torch.full_like(mean, self._slope),
            torch.zeros_like(mean),
        )
        for jump, side, knot in self._hinges():
            gap = side * mean - knot
            z = divide(gap, deviation)
            sharp = deviation == 0
            # Of a unit that is at the knot, but for rounding, the mean of both slopes.
            beside = torch.where(gap.abs() <= _ROUNDING * knot, 0.5, (gap > 0).to(gap))
            beyond = torch.where(sharp, beside, torch.special.ndtr(z))
            height = torch.where(sharp, 0.0, divide(density(z), deviation))
            value = value + jump * (gap * beyond + deviation**2 * height)
            slope, bend = slope + jump * side * beyond, bend + jump * height
        return value, slope, bend

    def _is_steep(self, q: Tensor) -> bool:
        """Whether knots are so near zero that φ is all but a step, as far as it is not a line."""
        farthest = max(map(abs, self.knots))
        return bool(farthest) and q.numel() > 0 and bool(q.detach().amax() > _STEEP * farthest**2)

    @property
    def _by_quadrature(self) -> Quadrature:
        return Quadrature(self, self.knots, scale=min(1.0, max(map(abs, self.knots))))

    def _hinges(self) -> Iterator[_Hinge]:
        for knot, (left, right) in zip(self.knots, pairwise(self.slopes), strict=True):
            yield _Hinge(right - left, 1.0 if knot >= 0 else -1.0, abs(knot))

    @property
    def _slope(self) -> float:
        """Slope of the line through zero, to the left of a knot there."""
        return self.slopes[sum(knot < 0 for knot in self.knots)]

    @property
    def _value(self) -> float:
        """φ(0)."""
        value, ends = self.start, [knot for knot in self.knots if knot < 0]
        if not ends:
            return value - self.slopes[0] * self.knots[0]
        for left, right, slope in zip(ends, [*ends[1:], 0.0], self.slopes[1:], strict=False):
            value += slope * (right - left)
        return value


@final
class _Lines(torch.autograd.Function):
    """E[φ(u) φ(v)] and E[φ'(u) φ'(v)]; what derivatives need is computed in the backward pass, from the arguments."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, q1: Tensor, q2: Tensor, k: Tensor, activation: PiecewiseLinear
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q1, q2, k)
        ctx.activation = activation
        return activation.by_hinges(q1, q2, k)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, first: Tensor, second: Tensor
    ) -> tuple[Tensor | None, ...]:
        (q1, q2, k), activation = ctx.saved_tensors, ctx.activation
        sides = []
        for q, other in ((q1, q2), (q2, q1)):
            by_first, by_second = activation.by_variance(q, other, k)
            sides.append((first * by_first + second * by_second).sum_to_size(q.shape))
        slope = cast("tuple[Tensor, Tensor]", _Lines.apply(q1, q2, k, activation))[1]
        return *sides, first * slope + second * activation.curvature(q1, q2, k), None


class Quadrant(NamedTuple):
    """The part u > a, v > b, with a, b >= 0, of a normal pair (u, v) with variances q1, q2 and covariance k.

    Attributes:
        probability: P(u > a, v > b).
        mean: E[(u - a)₊ (v - b)₊].
        density: Density of (u, v) at (a, b); zero where the correlation is ±1.
    """

    probability: Tensor
    mean: Tensor
    density: Tensor


def tail(q: Tensor, a: float) -> tuple[Tensor, Tensor]:
    """P(u > a) and the density at a, for u ~ N(0, q) and a >= 0; the latter zero for q = 0."""
    h = _standard(q, a)
    return torch.special.ndtr(-h), divide(density(h), root(q))


def quadrant(q1: Tensor, q2: Tensor, k: Tensor, a: float, b: float) -> Quadrant:
    """Probability, mean and density of the quadrant u > a, v > b, for variances q1, q2 and the covariance k.

    With g = a/√q1, h = b/√q2, ρ = k/√(q1 q2) and r = √(1 - ρ²), L the probability, n and Φ the normal density and
    distribution function,

        E[(u - a)₊ (v - b)₊] = (k + a b) L - b √q1 n(g) Φ((ρg - h)/r) - a √q2 n(h) Φ((ρh - g)/r) + √(q1 q2) r e / 2π,

    where e = exp(-(g² - 2ρgh + h²) / 2r²). Differences that vanish with r are written out.
    """
    g, h = _standard(q1, a), _standard(q2, b)
    one, two = root(q1), root(q2)
    scale = one * two
    rho = divide(k, scale)
    r = torch.where(scale > 0, divide(root(determinant(q1, q2, k)), scale), 1.0)
    sign = torch.where(rho < 0, -1.0, 1.0)
    # (h - ρg)/r = (h ∓ g)/r ± g r/(1 + |ρ|), and so on.
    apart = (h - sign * g) / r.clamp_min(_SMALLEST)
    # With a derivative in ρ at zero, where |ρ| has none.
    size = 1 + sign * rho
    bend = sign * r / size
    of_g, of_h = apart + g * bend, -sign * apart + h * bend
    e = (-0.5 * (apart**2 + 2 * sign * g * h / size)).exp()
    if a == b == 0:
        probability = 0.25 + torch.atan2(rho, r) / (2 * math.pi)
    else:
        probability = 0.5 * (torch.special.ndtr(-g) + torch.special.ndtr(-h))
        probability = (probability - _owen(g, of_g) - _owen(h, of_h)).clamp_min(0)
    mean = (k + a * b) * probability + scale * r * e / (2 * math.pi)
    mean = mean - b * one * density(g) * torch.special.ndtr(-of_g) - a * two * density(h) * torch.special.ndtr(-of_h)
    return Quadrant(probability, mean, divide(e, 2 * math.pi * scale * r))


def _standard(q: Tensor, a: float) -> Tensor:
    return (a / root(q).clamp_min(_SMALLEST)).clamp_max(_FAR)


def _owen(h: Tensor, y: Tensor) -> Tensor:
    """Owen's T(h, y/h), h >= 0; its derivatives are never asked for: those of `_Lines` are written out."""
    slope = y / h.clamp_min(_SMALLEST)
    return torch.from_numpy(np.asarray(owens_t(h.cpu().numpy(), slope.cpu().numpy()))).to(h)
