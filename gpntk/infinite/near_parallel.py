"""Gaussian moments of kinked or steep functions at correlations near ±1, where series in the correlation are slow.

`NearParallel.direct` integrates over z1 and z2 with u = √q1 z1, v = √q2 (c z1 + s z2), s² = 1 - c², by Gauss-Legendre
panels that end where φ(u) or φ(v) has a kink, and follow the boundary layer of width s that smoothing over z2 makes of
a kink of φ(v). That takes some ten thousand evaluations of φ per entry.

Many entries share a `Table`: for a φ that is analytic but for a kink at zero, the moments are analytic in log q1,
log q2 and the angle θ = arccos |c| up to θ = 0 itself (unlike in c: a kink makes odd powers of θ), so that a few
hundred or thousand direct values interpolate them all. Its error is measured at entries of every batch it is used for,
and it is kept for the next where no gradients are asked for: the blocks of a matrix ask for much the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from gpntk.infinite.gaussian import arc_moments, by_chunks, determinant, divide, root, tracked, with_derivatives
from gpntk.infinite.panels import Elementwise, density, ladder, panels

REACH = 9.0
_MIDDLE = 3.0
_LAYERS = (-8.5, -4.0, 4.0, 8.5)
_BUDGET = 2**20
# Chebyshev nodes in log q (twice) and in the angle.
_SIZES = ((6, 10), (10, 16), (14, 24), (20, 36))
_SAMPLE = 24
# Ends of a table's box are multiples of this, beyond those of the entries: near boxes are one.
_GRAIN = 0.125
# Tables that are kept.
_KEPT = 32


@final
class NearParallel:
    """Second moments of a function and of its derivative at correlations near ±1.

    Args:
        phi: The function φ and its derivative.
        kinks: Where φ or a low derivative jumps.
        tolerance: Error accepted of a table, relative to √(E[φ(u)²] E[φ(v)²]).
        source: What φ is made of: tables are kept for the same.
    """

    def __init__(self, phi: Elementwise, kinks: tuple[float, ...], tolerance: float, source: tuple[Any, ...]) -> None:
        self._phi, self._kinks, self._tolerance = phi, tuple({0.0, *kinks}), tolerance
        self._source = source
        # Kinks off zero: where q1 and q2 differ a little, θ = 0 is singular.
        self._smooth = not any(kinks)

    def moments(self, q1: Tensor, q2: Tensor, k: Tensor) -> Tensor:
        """E[φ(u) φ(v)] and E[φ'(u) φ'(v)] of entries `[E]`: `[E, 2]`."""
        result = k.new_zeros(*k.shape, 2)
        for members in (torch.ge(k, 0), torch.lt(k, 0)):
            if members.any():
                values = self._one_sign(q1[members], q2[members], k[members])
                result = result.masked_scatter(members.unsqueeze(-1).expand(-1, 2), values)
        return result

    def _one_sign(self, q1: Tensor, q2: Tensor, k: Tensor) -> Tensor:
        # What is computed again in a backward pass must be what was computed before, whatever has been kept since.
        kept = [] if tracked(q1, q2, k) else _tables
        table = self._table(q1, q2, k, kept) if self._smooth else None
        if table is None:
            return self.direct(q1, q2, k)
        return by_chunks(table, (q1, q2, k), _BUDGET // 2**8)

    def direct(self, q1: Tensor, q2: Tensor, k: Tensor) -> Tensor:
        """The moments by direct integration, without a table."""
        largest = torch.maximum(q1.detach().max(), q2.detach().max()).sqrt().item()
        features = len(ladder(1.0, REACH * largest, q1)) + len(self._kinks)
        points = 16 * (2 * features + 8) * 16 * (features + 4)
        return by_chunks(partial(self._integrate, largest=largest), (q1, q2, k), max(_BUDGET // points, 1))

    def _integrate(self, q1: Tensor, q2: Tensor, k: Tensor, largest: float) -> Tensor:
        """Some entries `[E]` at once: `[E, 2]`."""
        sd1, sd2 = root(q1).unsqueeze(-1), root(q2).unsqueeze(-1)
        scale = sd1 * sd2
        c = divide(k.unsqueeze(-1), scale)
        s = divide(root(determinant(q1, q2, k)).unsqueeze(-1), scale)
        kinks = q1.new_tensor(self._kinks)
        features = torch.cat([ladder(1.0, REACH * largest, q1), kinks])
        ends = q1.new_tensor([-REACH, -_MIDDLE, _MIDDLE, REACH]).expand(*q1.shape, -1)
        # 1. Nodes of z1: features of u, features of v given z1, and their layers.
        centre = divide(kinks.expand(*q1.shape, -1), c * sd2)
        width = divide(s, c.abs())
        layers = [centre + step * width for step in _LAYERS]
        breaks = [divide(features.expand(*q1.shape, -1), deviation) for deviation in (sd1, c * sd2)]
        z1, weights1 = panels(torch.cat([*breaks, *layers, ends], -1).clamp(-REACH, REACH))
        # 2. Nodes of z2 for each of them.
        middle = (c * sd2 * z1).unsqueeze(-1)
        spread = (s * sd2).unsqueeze(-1)
        inner = torch.cat(
            [divide(features - middle, spread.expand_as(middle)), ends.unsqueeze(-2).expand(*z1.shape, -1)], -1
        )
        z2, weights2 = panels(inner.clamp(-REACH, REACH))
        # 3. Sums over z2, then over z1.
        u, v = sd1 * z1, middle + spread * z2
        (phi_u, slope_u), (phi_v, slope_v) = self._phi(u), self._phi(v)
        weights1, weights2 = weights1 * density(z1), weights2 * density(z2)
        mean, slope = (weights2 * phi_v).sum(-1), (weights2 * slope_v).sum(-1)
        first, second = (weights1 * phi_u * mean).sum(-1), (weights1 * slope_u * slope).sum(-1)
        if not (torch.is_grad_enabled() and second.requires_grad):
            return torch.stack([first, second], -1)
        # dE[φ φ]/dq1 = E[φ''(u) φ(v)]/2 = (E[u φ'(u) φ(v)] - k E[φ' φ'])/(2 q1), by parts; no division by s.
        by_q1 = divide((weights1 * u * slope_u * mean).sum(-1) - k * second, 2 * q1)
        by_q2 = divide((weights1 * phi_u * (weights2 * v * slope_v).sum(-1)).sum(-1) - k * second, 2 * q2)
        return torch.stack([with_derivatives(first, (q1, by_q1), (q2, by_q2), (k, second)), second], -1)

    @torch.no_grad()
    def _table(self, q1: Tensor, q2: Tensor, k: Tensor, tables: list[tuple[Any, Table]]) -> Table | None:
        """The smallest table that is accurate enough for entries of one sign of k; None if direct values cost less."""
        count = [p * (p + 1) // 2 * r for p, r in _SIZES]
        # A sample costs as much as few entries do.
        if len(k) <= 3 * _SAMPLE or not bool((torch.minimum(q1, q2) > 0).all()):
            return None
        kept = [table for source, table in tables if source == self._source and table.holds(q1, q2, k)]
        affordable = [sizes for sizes, values in zip(_SIZES, count, strict=True) if values <= len(k)]
        if not kept and not affordable:
            return None
        chosen = torch.linspace(0, len(k) - 1, min(len(k), _SAMPLE), dtype=k.dtype, device=k.device).round().long()
        sample = q1[chosen], q2[chosen], k[chosen]
        expected = self.direct(*sample)
        squares = [self.direct(q, q, q) for q in sample[:2]]
        allowed = self._tolerance * (squares[0] * squares[1]).sqrt()

        def enough(table: Table) -> bool:
            return bool(((table(*sample) - expected).abs() <= allowed).all())

        for table in sorted(kept, key=lambda table: table.sizes):
            if enough(table):
                return table
        box = _Box.of(q1, q2, k)
        for sizes in affordable:
            if any(table.box == box and table.sizes == sizes for table in kept):
                continue
            table = Table.of(self.direct, box, sizes, k.device)
            tables[:] = [*tables[1 - _KEPT :], (self._source, table)]
            if enough(table):
                return table
        return None


class _Range(NamedTuple):
    """An interval that is mapped to [-1, 1]."""

    low: float
    high: float

    def holds(self, x: Tensor) -> bool:
        """Whether all of x is within."""
        return bool(((x >= self.low) & (x <= self.high)).all())

    def nodes(self, count: int) -> Tensor:
        """Chebyshev nodes of the first kind `[count]`."""
        at = torch.cos((torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) * math.pi / count)
        return self.low + (self.high - self.low) * (at + 1) / 2

    def basis(self, x: Tensor, count: int) -> Tensor:
        """Chebyshev polynomials T_0(x) ... T_{count-1}(x) `[*x, count]`."""
        x = (2 * x - (self.low + self.high)) / (self.high - self.low)
        rows = [torch.ones_like(x), x]
        for _ in range(count - 2):
            rows.append(2 * x * rows[-1] - rows[-2])
        return torch.stack(rows, -1)


class _Box(NamedTuple):
    """What a table covers.

    Attributes:
        negative: Whether k is, of all entries.
        deviations: Range of log √q.
        angles: Range of τ.
    """

    negative: bool
    deviations: _Range
    angles: _Range

    @classmethod
    def of(cls, q1: Tensor, q2: Tensor, k: Tensor) -> _Box:
        """One that holds all entries, which have one sign of k."""
        both = torch.stack([q1, q2]).log() / 2
        low, high = (both.min().item() - _GRAIN / 8) // _GRAIN, -((-both.max().item() - _GRAIN / 8) // _GRAIN)
        deviations = _Range(low * _GRAIN, high * _GRAIN)
        last = _tau(q1, q2, k, _steepness(deviations)).max().item()
        return cls(bool(k[0] < 0), deviations, _Range(0.0, max(-(-last // _GRAIN), 1) * _GRAIN))

    @property
    def steepness(self) -> float:
        """How much steeper an activation is in standard units, max(1, √q)."""
        return _steepness(self.deviations)


def _steepness(deviations: _Range) -> float:
    return max(1.0, math.exp(deviations.high))


@final
class Table:
    """Interpolated moments, in coordinates log √q1, log √q2 and τ with sinh τ = max(1, √q) θ.

    Steep functions have features of width 1/√q in θ, which the sinh widens to one.

    Args:
        coefficients: Coefficients of products of Chebyshev polynomials `[P, R, P, 2]`, in the order q2, τ, q1.
        box: Which entries are covered.
    """

    def __init__(self, coefficients: Tensor, box: _Box) -> None:
        self._coefficients, self.box = coefficients, box

    @classmethod
    def of(
        cls, direct: Callable[[Tensor, Tensor, Tensor], Tensor], box: _Box, sizes: tuple[int, int], device: torch.device
    ) -> Table:
        """Through values of ``direct``."""
        grids = (box.deviations, sizes[0]), (box.angles, sizes[1])
        grid_q, grid_tau = (grid.nodes(n).to(device) for grid, n in grids)
        # Symmetric in q1 and q2: half of the pairs do.
        i, j = torch.tril_indices(sizes[0], sizes[0], device=device)
        sd1, sd2 = grid_q[i].exp()[:, None], grid_q[j].exp()[:, None]
        cosines = torch.cos(torch.sinh(grid_tau) / box.steepness) * (-1.0 if box.negative else 1.0)
        rows = torch.broadcast_tensors(sd1**2, sd2**2, sd1 * sd2 * cosines)
        half = direct(*(row.flatten() for row in rows)).unflatten(0, (len(i), sizes[1]))
        values = grid_q.new_empty(sizes[0], sizes[0], sizes[1], 2)
        values[i, j], values[j, i] = half, half
        of_q, of_tau = (grid.basis(at, n) for (grid, n), at in zip(grids, (grid_q, grid_tau), strict=True))
        coefficients = torch.einsum("ijrm,ia,jb,rt->btam", values, _inverse(of_q), _inverse(of_q), _inverse(of_tau))
        return cls(coefficients, box)

    @property
    def sizes(self) -> tuple[int, int]:
        """Polynomials in log √q, and in τ."""
        return self._coefficients.shape[0], self._coefficients.shape[1]

    def holds(self, q1: Tensor, q2: Tensor, k: Tensor) -> bool:
        """Whether all entries, which have one sign of k, are in the box."""
        if k.device != self._coefficients.device or bool(k[0] < 0) != self.box.negative:
            return False
        deviations, tau = torch.stack([q1, q2]).log() / 2, _tau(q1, q2, k, self.box.steepness)
        return self.box.deviations.holds(deviations) and self.box.angles.holds(tau)

    def __call__(self, q1: Tensor, q2: Tensor, k: Tensor) -> Tensor:
        """Both moments of entries `[E]`: `[E, 2]`."""
        tau = _tau(q1, q2, k, self.box.steepness)
        if not (torch.is_grad_enabled() and (q1.requires_grad or q2.requires_grad or k.requires_grad)):
            return self._interpolate(q1, q2, tau)
        second = self._interpolate(q1, q2, tau)[:, 1]
        # At fixed correlation by interpolation, and dE[φ φ]/dk = E[φ' φ']: the angle's derivative is infinite at zero.
        fixed = self._interpolate(q1, q2, tau.detach())[:, 0]
        scale = root(q1) * root(q2)
        return torch.stack([fixed + with_derivatives(0 * k, (divide(k, scale), scale * second)), second], -1)

    def _interpolate(self, q1: Tensor, q2: Tensor, tau: Tensor) -> Tensor:
        count, angles = self._coefficients.shape[:2]
        of_q1, of_q2 = (self.box.deviations.basis(q.log() / 2, count) for q in (q1, q2))
        of_tau = self.box.angles.basis(tau, angles)
        pairs = (of_q2.unsqueeze(-1) * of_tau.unsqueeze(-2)).flatten(1)
        return torch.einsum(
            "eam,ea->em", (pairs @ self._coefficients.flatten(2).flatten(0, 1)).unflatten(1, (count, 2)), of_q1
        )


_tables: list[tuple[tuple[Any, ...], Table]] = []
"""The tables that are kept, oldest first, with what they are made of."""


def _tau(q1: Tensor, q2: Tensor, k: Tensor, steepness: float) -> Tensor:
    _, psi = arc_moments(q1, q2, k, 1.0, 0.0)
    s = root(determinant(q1, q2, k))
    theta = torch.atan2(s, k.abs()).detach()
    # Accurate near zero, where π/2 - |ψ| is not; the derivative is the same.
    theta = with_derivatives(theta, (psi, -torch.sign(k)))
    return torch.asinh(steepness * theta)


def _inverse(basis: Tensor) -> Tensor:
    """Values at Chebyshev nodes to coefficients: the basis is orthogonal there. `[nodes, coefficients]`."""
    return basis / basis.square().sum(0)
