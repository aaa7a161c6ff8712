"""Activations whose Gaussian moments are elementary functions of q1, q2 and k.

Each docstring gives φ and E[φ(u) φ(v)]; E[φ'(u) φ'(v)] is its derivative in k (Price 1958). Notation: (u, v) is normal
with mean zero, variances q1, q2 and covariance k; s² = q1 q2 - k²; ψ = arcsin(k / √(q1 q2)) = π/2 - θ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from numpy.polynomial.hermite_e import herme2poly
from torch import Tensor
from torch.nn import functional

from gpntk.errors import InputError
from gpntk.infinite.gaussian import AbstractActivation, arc_moments, determinant, divide, root, with_derivatives


@final
@dataclass(frozen=True)
class ABReLU(AbstractActivation):
    """φ(x) = a min(x, 0) + b max(x, 0): ReLU (0, 1), leaky ReLU (slope, 1), |x| (-1, 1), the identity (1, 1).

    E[φ(u) φ(v)] = m² k + h² (2/π) (s + k ψ), m = (a + b)/2, h = (b - a)/2.

    Args:
        a: Slope at x < 0.
        b: Slope at x > 0.

    Example:
        >>> import torch
        >>> q = torch.tensor(2.0)
        >>> ABReLU(0.0, 1.0).moments(q, q, q)  # parallel inputs: half of the second moment, half of the slopes
        (tensor(1.), tensor(0.5000))

    References:
        Cho and Saul (2009), Kernel Methods for Deep Learning, eq. 6 with n = 1;
        Tsuchida et al. (2018), Invariance of Weight Distributions in Rectified MLPs, for unequal slopes.
    """

    a: float
    b: float
    single = True

    def __call__(self, x: Tensor) -> Tensor:
        return self.a * x.clamp(max=0) + self.b * x.clamp(min=0)

    def _moments(self, q1: Tensor, q2: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        mean, half = (self.a + self.b) / 2, (self.b - self.a) / 2
        if half == 0:
            return mean**2 * k, torch.full_like(k, mean**2)
        return arc_moments(q1, q2, k, half**2 * 2 / math.pi, mean**2)

    def _diagonal(self, q: Tensor) -> tuple[Tensor, Tensor]:
        square = (self.a**2 + self.b**2) / 2
        return square * q, torch.full_like(q, square)


@final
@dataclass(frozen=True)
class RectifiedMonomial(AbstractActivation):
    """φ(x) = max(x, 0)^p for an integer p >= 2.

    E[u₊^m v₊^n] = q1 (m-1) E[u₊^(m-2) v₊^n] + k n E[u₊^(m-1) v₊^(n-1)] (by parts), plus a boundary term for m = 1.

    Args:
        power: p.

    References:
        Cho and Saul (2009), Kernel Methods for Deep Learning, eq. 6 with n = p.
    """

    power: int

    def __post_init__(self) -> None:
        if self.power < 2:
            raise InputError(f"power must be 2 or more, got {self.power}: take ABReLU(0, 1) for 1 and Step() for 0.")

    def __call__(self, x: Tensor) -> Tensor:
        return x.clamp(min=0) ** self.power

    def _moments(self, q1: Tensor, q2: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        p = self.power
        lower = _rectified(q1, q2, k, p - 1, p - 1)
        slopes = [p * (p - 1) / 2 * _rectified(q1, q2, k, m, n) for m, n in ((p - 2, p), (p, p - 2))]
        first = with_derivatives(_rectified(q1, q2, k, p, p), (q1, slopes[0]), (q2, slopes[1]), (k, p**2 * lower))
        return first, p**2 * lower

    def _diagonal(self, q: Tensor) -> tuple[Tensor, Tensor]:
        p = self.power
        return 0.5 * _even_moment(2 * p) * q**p, p**2 * 0.5 * _even_moment(2 * p - 2) * q ** (p - 1)


def _even_moment(n: int) -> float:
    """E[z^n] = (n - 1)!! for z ~ N(0, 1), n even."""
    return float(math.prod(range(n - 1, 0, -2)))


def _half_moment(n: int) -> float:
    """E[max(z, 0)^n], z ~ N(0, 1)."""
    return 2 ** (n / 2 - 1) * math.gamma((n + 1) / 2) / math.sqrt(math.pi)


def _rectified(q1: Tensor, q2: Tensor, k: Tensor, m: int, n: int) -> Tensor:
    """E[u₊^m v₊^n], x₊^0 being the step."""
    if m == n and m < 2:
        return arc_moments(q1, q2, k, 0.5 / math.pi, 0.25)[1 - m]
    if m < n:
        return _rectified(q2, q1, k, n, m)
    first = root(q1) * _at_zero(q1, q2, k, n) if m == 1 else q1 * (m - 1) * _rectified(q1, q2, k, m - 2, n)
    if n:
        return first + k * n * _rectified(q1, q2, k, m - 1, n - 1)
    return first + divide(k, root(q2)) * _at_zero(q2, q1, k, m - 1)


def _at_zero(q1: Tensor, q2: Tensor, k: Tensor, n: int) -> Tensor:
    """√q1 ∫ δ(u) E[v₊^n | u] p(u) du, where v has variance s²/q1 given u."""
    deviation = root(divide(determinant(q1, q2, k), q1))
    return _half_moment(n) / math.sqrt(2 * math.pi) * (deviation**n if n else torch.ones_like(k))


@final
@dataclass(frozen=True)
class Sign(AbstractActivation):
    """φ(x) = sign(x), sign(0) = 0: E[φ(u) φ(v)] = (2/π) ψ.

    φ' is taken as zero, its value almost everywhere, as automatic differentiation does: the NTK has no limit.

    References:
        Cho and Saul (2009), Kernel Methods for Deep Learning, eq. 6 with n = 0.
    """

    def __call__(self, x: Tensor) -> Tensor:
        return x.sign()

    def _moments(self, q1: Tensor, q2: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return arc_moments(q1, q2, k, 2 / math.pi, 0.0)[1], torch.zeros_like(k)

    def _diagonal(self, q: Tensor) -> tuple[Tensor, Tensor]:
        return (q > 0).to(q), torch.zeros_like(q)


@final
@dataclass(frozen=True)
class Step(AbstractActivation):
    """φ(x) = 1[x > 0], 1/2 at zero: E[φ(u) φ(v)] = 1/4 + ψ/(2π). φ' is taken as zero (see `Sign`).

    References:
        Cho and Saul (2009), Kernel Methods for Deep Learning, eq. 6 with n = 0.
    """

    def __call__(self, x: Tensor) -> Tensor:
        return (1 + x.sign()) / 2

    def _moments(self, q1: Tensor, q2: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return arc_moments(q1, q2, k, 0.5 / math.pi, 0.25)[1], torch.zeros_like(k)

    def _diagonal(self, q: Tensor) -> tuple[Tensor, Tensor]:
        return 0.25 + 0.25 * (q > 0).to(q), torch.zeros_like(q)


@final
@dataclass(frozen=True)
class Erf(AbstractActivation):
    """φ(x) = a erf(b x) + c: E[φ(u) φ(v)] = a² (2/π) arcsin(2 b² k / √((1 + 2 b² q1)(1 + 2 b² q2))) + c².

    Args:
        a: Factor.
        b: Frequency; ``Erf(0.5, 1 / 2.4020563531719796, 0.5)`` looks much like the logistic sigmoid.
        c: Shift.

    References:
        Williams (1997), Computing with Infinite Networks, eq. 11.
    """

    a: float = 1.0
    b: float = 1.0
    c: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        return self.a * torch.erf(self.b * x) + self.c

    def _moments(self, q1: Tensor, q2: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        p1, p2, r = 2 * self.b**2 * q1, 2 * self.b**2 * q2, 2 * self.b**2 * k
        # (1 + p1)(1 + p2) - r², as a sum of terms that are all positive.
        gap = (1 + p1 + p2 + determinant(p1, p2, r)).sqrt()
        first = 2 / math.pi * self.a**2 * torch.atan2(r, gap) + self.c**2
        return first, 4 / math.pi * (self.a * self.b) ** 2 / gap

    def _diagonal(self, q: Tensor) -> tuple[Tensor, Tensor]:
        p = 2 * self.b**2 * q
        gap = (1 + 2 * p).sqrt()
        return 2 / math.pi * self.a**2 * torch.atan2(p, gap) + self.c**2, 4 / math.pi * (self.a * self.b) ** 2 / gap


@final
@dataclass(frozen=True)
class GELU(AbstractActivation):
    """φ(x) = x Φ(x), Φ the normal distribution function (not the approximation by tanh).

    With Δ = (1 + q1)(1 + q2) - k², A = E[Φ(u) Φ(v)] = 1/4 + arctan(k/√Δ)/(2π), B = 1/(2π √Δ):

        E[φ(u) φ(v)]   = k A + B (s² + k² (1/(1+q1) + 1/(1+q2)))
        E[φ'(u) φ'(v)] = A + k B (1/(1+q1) + 1/(1+q2) + 1/Δ)

    References:
        Tsuchida, Pearce, van der Heide, Roosta, Gallagher (2021), Avoiding Kernel Fixed Points: Computing with ELU and
        GELU Infinite Networks.
    """

    def __call__(self, x: Tensor) -> Tensor:
        return functional.gelu(x)

    def _moments(self, q1: Tensor, q2: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return _gelu(q1, q2, k, determinant(q1, q2, k))

    def _diagonal(self, q: Tensor) -> tuple[Tensor, Tensor]:
        return _gelu(q, q, q, torch.zeros_like(q))


def _gelu(q1: Tensor, q2: Tensor, k: Tensor, det: Tensor) -> tuple[Tensor, Tensor]:
    delta = 1 + q1 + q2 + det
    both = 0.25 + torch.atan2(k, delta.sqrt()) / (2 * math.pi)
    density = 1 / (2 * math.pi * delta.sqrt())
    inverses = 1 / (1 + q1) + 1 / (1 + q2)
    return k * both + density * (det + k**2 * inverses), both + k * density * (inverses + 1 / delta)


@final
@dataclass(frozen=True)
class Sine(AbstractActivation):
    """φ(x) = a sin(b x + c); the cosine has c + π/2.

    E[φ(u) φ(v)] = (a²/2) (exp(-b² (q1 + q2 - 2k)/2) - cos(2c) exp(-b² (q1 + q2 + 2k)/2)).

    Args:
        a: Amplitude.
        b: Frequency.
        c: Phase. √2 sin(√(2γ) x + π/4) gives the RBF kernel exp(-γ (q1 + q2 - 2k)); see `rbf`.

    References:
        Pearce et al. (2019), Expressive Priors in Bayesian Neural Networks; Rahimi and Recht (2007), Random Features.
    """

    a: float = 1.0
    b: float = 1.0
    c: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        return self.a * torch.sin(self.b * x + self.c)

    def _moments(self, q1: Tensor, q2: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        difference, total = ((-(self.b**2) / 2 * (q1 + q2 + sign * 2 * k)).exp() for sign in (-1, 1))
        # total / difference - 1, but where its exponential would overflow.
        exponent = -2 * self.b**2 * k
        near = exponent < 1
        return self._combine(difference, total, near, torch.expm1(torch.where(near, exponent, 0.0)))

    def _diagonal(self, q: Tensor) -> tuple[Tensor, Tensor]:
        less = torch.expm1(-2 * self.b**2 * q)
        return self._combine(torch.ones_like(q), 1 + less, torch.ones_like(q, dtype=torch.bool), less)

    def _combine(self, difference: Tensor, total: Tensor, near: Tensor, less: Tensor) -> tuple[Tensor, Tensor]:
        square, phase = self.a**2 / 2, math.cos(2 * self.c)
        # The same, without cancellation where both are nearly equal.
        first = difference * (2 * math.sin(self.c) ** 2 - phase * less)
        first = torch.where(near, first, difference - phase * total)
        return square * first, square * self.b**2 * (difference + phase * total)


def cosine(a: float = 1.0, b: float = 1.0, c: float = 0.0) -> Sine:
    """The activation φ(x) = a cos(b x + c), a sine with another phase."""
    return Sine(a, b, c + math.pi / 2)


def rbf(gamma: float = 1.0) -> Sine:
    """φ(x) = √2 sin(√(2γ) x + π/4), whose E[φ(u) φ(v)] = exp(-γ (q1 + q2 - 2k)) is the Gaussian (RBF) kernel."""
    return Sine(math.sqrt(2), math.sqrt(2 * gamma), math.pi / 4)


@final
@dataclass(frozen=True)
class Exponential(AbstractActivation):
    """φ(x) = a exp(b x): E[φ(u) φ(v)] = a² exp(b² (q1 + q2 + 2k)/2).

    Args:
        a: Factor.
        b: Rate of growth.

    References:
        Daniely, Frostig, Singer (2016), Toward Deeper Understanding of Neural Networks.
    """

    a: float = 1.0
    b: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return self.a * torch.exp(self.b * x)

    def _moments(self, q1: Tensor, q2: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        first = self.a**2 * (self.b**2 / 2 * (q1 + q2 + 2 * k)).exp()
        return first, self.b**2 * first

    def _diagonal(self, q: Tensor) -> tuple[Tensor, Tensor]:
        return self._moments(q, q, q)


@final
@dataclass(frozen=True)
class Gaussian(AbstractActivation):
    """φ(x) = a exp(-b x²), b >= 0: E[φ(u) φ(v)] = a²/√Δ, E[φ'(u) φ'(v)] = 4 a² b² k/Δ^(3/2), Δ = |I + 2 b Σ|.

    Args:
        a: Height.
        b: Inverse of twice the squared width.

    References:
        Williams (1997), Computing with Infinite Networks, section 4.
    """

    a: float = 1.0
    b: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return self.a * torch.exp(-self.b * x**2)

    def _moments(self, q1: Tensor, q2: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self._at(k, 1 + 2 * self.b * (q1 + q2) + 4 * self.b**2 * determinant(q1, q2, k))

    def _diagonal(self, q: Tensor) -> tuple[Tensor, Tensor]:
        return self._at(q, 1 + 4 * self.b * q)

    def _at(self, k: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        first = self.a**2 * delta.rsqrt()
        return first, 4 * self.b**2 * k * first / delta


@final
@dataclass(frozen=True)
class Polynomial(AbstractActivation):
    """φ(x) = Σ_i a_i x^i: E[φ(u) φ(v)] = Σ_n (kⁿ/n!) E[φ⁽ⁿ⁾(u)] E[φ⁽ⁿ⁾(v)], a finite sum.

    Args:
        coefficients: a_0, a_1, ...

    References:
        O'Donnell (2014), Analysis of Boolean Functions, section 11.2 (Mehler's formula).
    """

    coefficients: tuple[float, ...]

    def __call__(self, x: Tensor) -> Tensor:
        value = torch.zeros_like(x)
        for coefficient in reversed(self.coefficients):
            value = value * x + coefficient
        return value

    def _moments(self, q1: Tensor, q2: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        slope = tuple(i * a for i, a in enumerate(self.coefficients))[1:]
        return _mehler(self.coefficients, q1, q2, k), _mehler(slope, q1, q2, k)

    def _diagonal(self, q: Tensor) -> tuple[Tensor, Tensor]:
        return self._moments(q, q, q)


def _mehler(coefficients: Sequence[float], q1: Tensor, q2: Tensor, k: Tensor) -> Tensor:
    """Σ_n (kⁿ/n!) E[φ⁽ⁿ⁾(u)] E[φ⁽ⁿ⁾(v)] for a polynomial φ."""
    total = torch.zeros_like(k)
    for n in range(len(coefficients)):
        derivative = [a * math.perm(i, n) for i, a in enumerate(coefficients)][n:]
        first, second = (
            sum((a * _even_moment(i) * q ** (i // 2) for i, a in enumerate(derivative) if i % 2 == 0 and a), 0 * q)
            for q in (q1, q2)
        )
        total = total + k**n / math.factorial(n) * first * second
    return total


def monomial(power: int) -> Polynomial:
    """The activation φ(x) = x^power, a polynomial of one term."""
    return Polynomial((0.0,) * power + (1.0,))


def hermite(degree: int) -> Polynomial:
    """φ = He_degree / √degree!, of norm one under N(0, 1): E[φ(u) φ(v)] = k^degree where q1 = q2 = 1."""
    coefficients = herme2poly([0.0] * degree + [1.0]) / math.sqrt(math.factorial(degree))
    return Polynomial(tuple(coefficients.tolist()))
