"""Gaussian moments of any elementwise function, to a stated error.

With the normalised Hermite polynomials h_n and a_n(q) = E[φ(√q z) h_n(z)], z ~ N(0, 1), Mehler's formula says

    E[φ(u) φ(v)] = Σ_n a_n(q1) a_n(q2) cⁿ,   c = k / √(q1 q2),

and Cauchy and Schwarz bound what is left out after L terms by |c|ᴸ √(t(q1) t(q2)), where t(q) = E[φ²] - Σ_{n<L} a_n² is
known (Parseval). The cost is L products per entry (32 or 64 for a smooth φ and q near one), against the thousands of
evaluations of φ of a two-dimensional rule. Where the bound misses the tolerance (correlations near one together with a
kink, or with q so large that φ is nearly kinked) the moments come from `NearParallel`.

Gauss-Hermite rules are not used: they converge slowly for functions with poles off the real line, such as tanh, and not
at all in practice for kinked ones (degree 25 leaves 2 to 6 % in the tangent kernel of a tanh network).

References:
    Mehler (1866); Daniely, Frostig, Singer (2016), Toward Deeper Understanding of Neural Networks, https://arxiv.org/abs/1602.05897.
    Han, Zandieh, Lee, Novak, Xiao, Karbasi (2022), Fast Neural Kernel Embeddings for General Activations,
        https://arxiv.org/abs/2209.04121 (truncated expansions of this kind).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, final

import torch
from torch import Tensor

from gpntk._checks import check_functions, check_kinds, check_positive, is_number
from gpntk.errors import InputError
from gpntk.infinite import near_parallel
from gpntk.infinite.gaussian import AbstractActivation, by_chunks, divide, root
from gpntk.infinite.panels import Elementwise, density, ladder, panels

_TERMS = (32, 64, 128, 256, 512)
# Largest |z|: beyond it the weight of h_n(z) φ(√q z) is below 1e-15 for n <= 512.
_REACH = 12.0
# Width of panels that resolves h_512 with Gauss-Legendre rules of 16 nodes.
_WIDTH = 0.5
# Values held at once.
_BUDGET = 2**23


class _Coefficients(NamedTuple):
    """Hermite coefficients of φ and φ' (the axis of length 2) at variances of any shape `[*]`.

    Attributes:
        series: a_n `[*, 2, L]`.
        tails: Σ of a_n² from every term of `_TERMS` on, `[*, 2, 5]`; infinite where there are not so many terms.
        squares: E[φ²] and E[φ'²] `[*, 2]`.
    """

    series: Tensor
    tails: Tensor
    squares: Tensor


@final
@dataclass(frozen=True)
class Quadrature(AbstractActivation):
    """Any elementwise φ, by its Hermite coefficients, and by a rule with panels where their series is too slow.

    Args:
        phi: φ, which maps a tensor to one of its shape; its derivative is taken automatically. Must be continuous, work
            in float64, and be analytic between its kinks, with features no narrower than max(scale, abs(x)), as tanh
            has at scale one. Integrals end at 12 standard deviations (9 at correlations near one): at variances where
            φ² grows too fast for that, as exp(abs(x)) does from 8 on, an error is raised.
        kinks: Where φ or a low derivative jumps. A kink that is not declared costs the accuracy that is stated.
        scale: Width of the finest feature of φ, 1 if there are none narrower than max(1, abs(x)).
        tolerance: Error of the moments, relative to √(E[φ(u)²] E[φ(v)²]), and likewise of those of φ'.

    Raises:
        InputError: ``scale`` or ``tolerance`` is out of range; on use, φ is not finite or grows too fast.

    Example:
        >>> import torch
        >>> from gpntk.infinite.closed_forms import ABReLU
        >>> q, k = torch.tensor(1.5, dtype=torch.float64), torch.tensor(1.2, dtype=torch.float64)
        >>> relu, exact = Quadrature(torch.relu, kinks=(0.0,)), ABReLU(0.0, 1.0)
        >>> bool((relu.moments(q, q, k)[0] - exact.moments(q, q, k)[0]).abs() < 1e-10)
        True
    """

    phi: Callable[[Tensor], Tensor]
    kinks: tuple[float, ...] = ()
    scale: float = 1.0
    tolerance: float = 1e-10
    elementary = False

    def __post_init__(self) -> None:
        check_functions(phi=self.phi)
        check_positive(scale=self.scale, tolerance=self.tolerance)
        check_kinds(Sequence, "numbers", kinks=self.kinks)
        if not 1e-13 <= self.tolerance < 1:
            raise InputError(f"tolerance must be between 1e-13, where rounding begins, and 1, got {self.tolerance}.")
        if not all(is_number(kink) and math.isfinite(kink) for kink in self.kinks):
            raise InputError(f"kinks={self.kinks}: give finite numbers.")

    def __call__(self, x: Tensor) -> Tensor:
        return self.phi(x)

    def _diagonal(self, q: Tensor) -> tuple[Tensor, Tensor]:
        unit = self.scale**2
        squares = _Unit(self).checked_squares(q / unit, _REACH)
        return squares[..., 0], squares[..., 1] / unit

    def _moments(self, q1: Tensor, q2: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        unit = self.scale**2
        both = _Unit(self).moments(q1 / unit, q2 / unit, k / unit)
        return both[..., 0], both[..., 1] / unit


@final
class _Unit:
    """The moments of x -> φ(scale x), whose features are as wide as one.

    Args:
        activation: φ, its kinks and scale.
    """

    def __init__(self, activation: Quadrature) -> None:
        phi, scale = activation.phi, activation.scale
        self._phi = Elementwise(phi if scale == 1 else lambda x: phi(scale * x))
        self._kinks = tuple(kink / scale for kink in activation.kinks)
        self._tolerance, self._scale = activation.tolerance, scale
        self._source = (phi, scale, self._kinks)

    def moments(self, q1: Tensor, q2: Tensor, k: Tensor) -> Tensor:
        """E[φ(u) φ(v)] and E[φ'(u) φ'(v)], `[*k, 2]`."""
        # 1. Coefficients of every variance, for as many terms as some entry needs.
        first, second = self._coefficients(q1), self._coefficients(q2)
        with torch.no_grad():
            c = divide(k, root(q1) * root(q2)).clamp(-1, 1)
            index, enough = self._enough(first, second, c)
        # 2. The series.
        length = _TERMS[index]
        one, two = (entry.series[..., :length] for entry in (first, second))
        series = by_chunks(_series, (q1, q2, k, one, two), _BUDGET // length, (0, 0, 0, 2, 2))
        if enough.all():
            return series
        # 3. The rest.
        rest = ~enough
        rows = [entry.expand(k.shape)[rest] for entry in (q1, q2, k)]
        for q in rows[:2]:
            self.checked_squares(q.detach().amax().reshape(1), near_parallel.REACH)
        values = near_parallel.NearParallel(self._phi, self._kinks, self._tolerance, self._source).moments(*rows)
        return series.masked_scatter(rest.unsqueeze(-1).expand(series.shape), values)

    def _enough(self, first: _Coefficients, second: _Coefficients, c: Tensor) -> tuple[int, Tensor]:
        """The fewest terms (an index of `_TERMS`) that do for all entries, else most; and the entries they do for."""
        allowed = self._tolerance * (first.squares * second.squares).sqrt()
        size = c.abs().unsqueeze(-1)
        enough = torch.zeros_like(c, dtype=torch.bool)
        for index, length in enumerate(_TERMS):
            bound = size**length * (first.tails[..., index] * second.tails[..., index]).sqrt()
            enough = (bound <= allowed).all(-1)
            if enough.all():
                return index, enough
        return len(_TERMS) - 1, enough

    def _nodes(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """z and weights, normal density included, `[*q or 1s, nodes]`: one set for all q unless a kink is off zero."""
        largest = root(q.detach()).max().item() if q.numel() else 1.0
        steps = torch.arange(-_REACH, _REACH + _WIDTH / 2, _WIDTH, dtype=q.dtype, device=q.device)
        fine = ladder(largest, _WIDTH, q)
        breaks = torch.cat([steps, fine]).expand(*(1,) * q.dim(), -1)
        moving = [kink for kink in self._kinks if kink]
        if moving:
            at = divide(q.new_tensor(moving).expand(*q.shape, -1), root(q).unsqueeze(-1)).clamp(-_REACH, _REACH)
            breaks = torch.cat([breaks.expand(*q.shape, -1), at], -1)
        z, weights = panels(breaks)
        return z, weights * density(z)

    def squares(self, q: Tensor) -> Tensor:
        """Mean squares of the activation and of its slope, E[φ²] and E[φ'²], `[*q, 2]`."""
        z, weights = self._nodes(q)
        value, slope = self._phi(root(q).unsqueeze(-1) * z)
        return torch.stack([(weights * value**2).sum(-1), (weights * slope**2).sum(-1)], -1)

    def checked_squares(self, q: Tensor, reach: float) -> Tensor:
        """Mean squares E[φ²] and E[φ'²], `[*q, 2]`, for next to nothing beyond ``reach`` standard deviations.

        Raises:
            InputError: There is more than the tolerance.
        """
        squares = by_chunks(self.squares, (q,), _BUDGET // 2**11)
        with torch.no_grad():
            z = q.new_tensor([-reach, reach])
            value, slope = self._phi(root(q).unsqueeze(-1) * z)
            # What is left of an integrand that falls faster than it does at this point by a factor e over one.
            rest = density(z) * torch.stack([value, slope], -2).square()
            enough = (rest <= self._tolerance * squares.unsqueeze(-1)).all(-1).all(-1)
            # All that a function has may be beyond a kink out there: too little to matter at any other variance.
            kinks = divide(q.new_tensor(self._kinks).abs().expand(*q.shape, -1), root(q).unsqueeze(-1))
            enough |= ((kinks > reach / 2) & (kinks < reach)).any(-1)
        if not bool(enough.all()):
            variance = float(q[~enough].amax()) * self._scale**2
            raise InputError(
                f"Quadrature: at variance {variance:.3g} the function is not finite, or grows too fast for an integral "
                f"up to {reach:g} standard deviations: use smaller weights, or a closed form."
            )
        return squares

    def _coefficients(self, q: Tensor) -> _Coefficients:
        with torch.no_grad():
            squares = self.checked_squares(q, _REACH)
        for length in (_TERMS[1], _TERMS[-1]):
            # Kinks off zero make the nodes, and h_n at them, differ from row to row.
            entries = _BUDGET // (2**10 * (length if any(self._kinks) else 2))
            both = by_chunks(partial(self._project, length=length), (q,), entries)
            ends = torch.tensor([n - 1 for n in _TERMS if n <= length], device=q.device)
            sums = both.detach().square().cumsum(-1)[..., ends]
            tails = (squares.unsqueeze(-1) - sums).clamp_min(0)
            if bool((tails[..., -1] <= self._tolerance * squares).all()):
                break
        tails = torch.nn.functional.pad(tails, (0, len(_TERMS) - len(ends)), value=torch.inf)
        return _Coefficients(both, tails, squares)

    def _project(self, q: Tensor, length: int) -> Tensor:
        """a_n of φ and φ', `[*q, 2, length]`."""
        z, weights = self._nodes(q)
        value, slope = self._phi(root(q).unsqueeze(-1) * z)
        integrand = weights.unsqueeze(-2) * torch.stack([value, slope], -2)
        # One set of nodes for all makes one matrix product.
        return integrand @ _hermite(z.flatten() if z.numel() == z.shape[-1] else z, length)


def _hermite(z: Tensor, length: int) -> Tensor:
    """h_0 ... h_{length-1} at z: `[*z, length]`."""
    rows = [torch.ones_like(z), z]
    for n in range(1, length - 1):
        rows.append((z * rows[n] - n**0.5 * rows[n - 1]) / (n + 1) ** 0.5)
    return torch.stack(rows, -1)


def _series(q1: Tensor, q2: Tensor, k: Tensor, one: Tensor, two: Tensor) -> Tensor:
    """Both moments `[*k, 2]` from coefficients `[*, 2, L]`, by Horner's scheme.

    Powers of c = k / √(q1 q2), which is left unclamped: an excess by rounding does no harm to a polynomial.
    """
    c = divide(k, root(q1) * root(q2))
    moments = []
    # Each term's coefficients side by side.
    firsts, seconds = (series.movedim((-2, -1), (0, 1)).contiguous() for series in (one, two))
    for a1, a2 in zip(firsts, seconds, strict=True):
        moment = torch.zeros_like(c)
        for n in reversed(range(len(a1))):
            moment = torch.addcmul(moment * c, a1[n], a2[n])
        moments.append(moment)
    return torch.stack(moments, -1)
