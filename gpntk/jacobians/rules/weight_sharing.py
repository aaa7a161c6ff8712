"""Grams of a weight that many positions share: df_nc/dW = sum_t g_nct a_ntᵀ.

Index legend: b batch, n/m rows, c/d outputs, t/s positions, i input features, o output features. For every pair of rows
there are two ways, of which `cheapest` takes the one with fewer operations:

* ``pairs``      sum_ts (a_nt . a_ms)(g_nct . g_mds):     T²(I + C O) + C² T O
* ``gradients``  dW_nc . dW_md:                           C² O I

The second forms per-sample gradients dW, C T O I operations a row, for a tile of rows at a time. (A third way, sum_t
g_nct . (dW_md a_nt) with C T O I + C² T O, is never cheaper than both.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gpntk.memory import chunks

_TILE_BYTES = 2**27


class Positions(NamedTuple):
    """a `[B, N, T, I]` and g `[B, N, C, T, O]`."""

    a: Tensor
    g: Tensor

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """C, T, I, O."""
        return self.g.shape[2], self.g.shape[3], self.a.shape[3], self.g.shape[4]


def cheapest(c: int, t: int, i: int, o: int) -> tuple[str, float]:
    """The way with fewer multiplications for a pair of rows, and their number."""
    pairs, gradients = t**2 * (i + c * o) + c**2 * t * o, c**2 * o * i
    return ("pairs", pairs) if pairs < gradients else ("gradients", gradients)


def gradients(positions: Positions) -> Tensor:
    """dW `[B, N, C, O, I]`."""
    return torch.einsum("bncto,bnti->bncoi", positions.g, positions.a)


def diagonal(positions: Positions) -> Tensor:
    """|dW_nc|² `[B, N, C]`: by pairs of positions within a row, or by the gradient itself."""
    c, t, i, o = positions.sizes
    if t**2 * (i + c * o) > c * t * o * i:
        return gradients(positions).flatten(3).square().sum(-1)
    forward = positions.a @ positions.a.mT
    backward = positions.g @ positions.g.mT
    return (forward.unsqueeze(2) * backward).sum((-2, -1))


def add_blockwise(
    out: Tensor, bytes_each: float, block: Callable[[slice, slice], Tensor], symmetric: bool, limit: int
) -> None:
    """Add tiles ``block(rows, columns)`` to ``out`` `[B, N, C, M, C]`; where symmetric, the upper ones mirrored."""
    for left in chunks(out.shape[1], bytes_each, limit):
        for right in chunks(out.shape[3], bytes_each, limit):
            if symmetric and right.start > left.start:
                break
            tile = block(left, right)
            out[:, left, :, right].add_(tile)
            if symmetric and right.start < left.start:
                out[:, right, :, left].add_(tile.permute(0, 3, 4, 1, 2))


def add_gram(
    out: Tensor,
    left: Callable[[slice], Positions],
    right: Callable[[slice], Positions],
    symmetric: bool,
    limit: int = _TILE_BYTES,
) -> None:
    """Add sum over o, i of dW_nc dW_md to ``out`` `[B, N, C, M, C]`; ``left``, ``right`` give some rows' positions."""
    example = left(slice(0, 1))
    c, t, i, o = example.sizes
    way, _ = cheapest(c, t, i, o)
    # Values per row of a square tile: positions, and gradients, or what a pair needs times a typical tile side.
    values = t * i + c * t * o + (16 * t * max(t, c * o) if way == "pairs" else c * o * i)
    bytes_each = 2 * values * example.a.element_size() * example.a.shape[0]
    add_blockwise(out, bytes_each, _block(way, left, right), symmetric, min(limit, _TILE_BYTES))


def add_outer(out: Tensor, one: Tensor, two: Tensor, limit: int) -> None:
    """Add one_nc . two_md to ``out`` `[B, N, C, M, C]` for rows of gradients `[B, N, C, P]`."""
    for rows in chunks(out.shape[1], 2 * out[:, 0].numel() * out.element_size(), limit):
        term = one[:, rows].flatten(1, 2) @ two.flatten(1, 2).mT
        out[:, rows].add_(term.unflatten(1, one[:, rows].shape[1:3]).unflatten(3, two.shape[1:3]))


def _block(
    way: str, left: Callable[[slice], Positions], right: Callable[[slice], Positions]
) -> Callable[[slice, slice], Tensor]:
    def pairs(rows: slice, columns: slice) -> Tensor:
        one, two = left(rows), right(columns)
        forward = torch.einsum("bnti,bmsi->bmnts", one.a, two.a)
        halfway = torch.einsum("bmnts,bmdso->bnmdto", forward, two.g)
        return torch.einsum("bncto,bnmdto->bncmd", one.g, halfway)

    def explicit(rows: slice, columns: slice) -> Tensor:
        one, two = gradients(left(rows)).flatten(3), gradients(right(columns)).flatten(3)
        return (one.flatten(1, 2) @ two.flatten(1, 2).mT).unflatten(1, one.shape[1:3]).unflatten(3, two.shape[1:3])

    return pairs if way == "pairs" else explicit


def sketch(positions: Positions, features: int, generator: torch.Generator) -> Tensor:
    """sum_t (R₁ a_nt) ∘ (R₂ g_nct) / sqrt(F), `[B, N, C, F]`, for standard normal R₁, R₂."""
    _, _, i, o = positions.sizes
    first, second = (normal((features, size), positions.a, generator) for size in (i, o))
    return torch.einsum("bntf,bnctf->bncf", positions.a @ first.mT, positions.g @ second.mT) / features**0.5


def sketched(gradients: Tensor, features: int, generator: torch.Generator) -> Tensor:
    """Gradients `[B, N, C, P]` times a standard normal R `[P, F]` over sqrt(F)."""
    return gradients @ normal((gradients.shape[-1], features), gradients, generator) / features**0.5


def normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers, the same on every device."""
    return torch.randn(shape, generator=generator, dtype=like.dtype, device="cpu").to(like.device)
