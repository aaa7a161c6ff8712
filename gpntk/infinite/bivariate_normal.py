"""Probabilities of quadrants under a bivariate normal distribution, exact where its correlation is ±1.

References:
    Owen (1956), Tables for Computing Bivariate Normal Probabilities; Patefield and Tandy (2000), Fast and Accurate
        Calculation of Owen's T Function.
    Rosenbaum (1961), Moments of a Truncated Bivariate Normal Distribution.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gpntk.infinite.gaussian import determinant, divide, root
from gpntk.infinite.panels import density, gauss_legendre

# They leave 1e-16 of Owen's function.
_NODES = 20
# Standard deviations beyond which there is nothing.
_FAR = 40.0
_SMALLEST = 1e-300


class Quadrant(NamedTuple):
    """The part u > a, v > b, with a, b >= 0, of a normal pair (u, v) with variances q1, q2 and covariance k.

    Attributes:
        probability: Of that.
        mean: E[(u - a)₊ (v - b)₊].
        density: Of (u, v) at (a, b); zero where the correlation is ±1.
    """

    probability: Tensor
    mean: Tensor
    density: Tensor


def tail(q: Tensor, a: float) -> tuple[Tensor, Tensor]:
    """P(u > a) and the density at a, for u ~ N(0, q) and a >= 0; the latter zero for q = 0."""
    h = _standard(q, a)
    return torch.special.ndtr(-h), divide(density(h), root(q))


def quadrant(q1: Tensor, q2: Tensor, k: Tensor, a: float, b: float) -> Quadrant:
    """Of (u, v).

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
        # On an axis the sign of zero is minus, as it is everywhere below.
        outside = ((g == 0) & (h > 0)) | ((g > 0) & (h == 0))
        probability = 0.5 * (torch.special.ndtr(-g) + torch.special.ndtr(-h) - outside.to(g))
        probability = (probability - _owen(g, of_g) - _owen(h, of_h)).clamp_min(0)
    mean = (k + a * b) * probability + scale * r * e / (2 * math.pi)
    mean = mean - b * one * density(g) * torch.special.ndtr(-of_g) - a * two * density(h) * torch.special.ndtr(-of_h)
    return Quadrant(probability, mean, divide(e, 2 * math.pi * scale * r))


def _standard(q: Tensor, a: float) -> Tensor:
    return (a / root(q).clamp_min(_SMALLEST)).clamp_max(_FAR)


def _owen(h: Tensor, y: Tensor) -> Tensor:
    """Owen's T(h, y/h), h >= 0, by a reflection to |y/h| <= 1: (1/2π) ∫ exp(-h² (1 + t²)/2) / (1 + t²) dt from 0."""
    size = y.abs()
    low, high = torch.minimum(h, size), torch.maximum(h, size)
    ratio = low / high.clamp_min(_SMALLEST)
    nodes, weights = gauss_legendre(_NODES)
    total, squares, slopes = torch.zeros_like(ratio), low**2, ratio**2
    for t, weight in zip(((nodes + 1) / 2).tolist(), (weights / 2).tolist(), strict=True):
        total += weight * (squares * (-0.5 * t**2)).exp_() / (slopes * t**2).add_(1)
    inner = ratio * (-0.5 * high**2).exp() * total / (2 * math.pi)
    outer = 0.25 - (torch.special.ndtr(h) - 0.5) * (torch.special.ndtr(size) - 0.5) - inner
    sign = torch.where(h > 0, 1.0, -1.0) * torch.where(y < 0, -1.0, 1.0)
    return sign * torch.where(size <= h, inner, outer)
