"""Grams of a weight that many positions share: df_nc/dW = sum_t g_nct a_ntᵀ.

Index legend: b batch, n/m rows, c/d outputs, t/s positions, i input features, o output features. For every pair of rows
there are two ways, of which `cheapest` takes the one with fewer operations:

* ``pairs``      sum_ts (a_nt . a_ms)(g_nct . g_mds):     T²(I + C O) + C² T O
* ``gradients``  dW_nc . dW_md:                           C² O I

The second forms per-sample gradients dW, C T O I operations a row, for a tile of rows at a time. (A third way, sum_t
g_nct . (dW_md a_nt) with C T O I + C² T O, is never cheaper than both.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gpntk.jacobians.rules.rule import outer


class Positions(NamedTuple):
    """Activations a `[B, N, T, I]` and output gradients g `[B, N, C, T, O]`."""

    a: Tensor
    g: Tensor

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Numbers of outputs C, positions T, input features I and output features O."""
        return self.g.shape[2], self.g.shape[3], self.a.shape[3], self.g.shape[4]


def cheapest(c: int, t: int, i: int, o: int) -> tuple[str, float]:
    """The way with fewer multiplications for a pair of rows, and their number."""
    pairs, gradients = t**2 * (i + c * o) + c**2 * t * o, c**2 * o * i
    return ("pairs", pairs) if pairs < gradients else ("gradients", gradients)


def gradients(positions: Positions) -> Tensor:
    """Per-sample gradients dW `[B, N, C, O, I]`."""
    return torch.einsum("bncto,bnti->bncoi", positions.g, positions.a)


def diagonal(positions: Positions) -> Tensor:
    """|dW_nc|² `[B, N, C]`: by pairs of positions within a row, or by the gradient itself."""
    c, t, i, o = positions.sizes
    if t**2 * (i + c * o) > c * t * o * i:
        return gradients(positions).flatten(3).square().sum(-1)
    forward = positions.a @ positions.a.mT
    backward = positions.g @ positions.g.mT
    return (backward.flatten(-2) @ forward.flatten(-2).unsqueeze(-1)).squeeze(-1)


def tile(c: int, t: int, i: int, o: int) -> float:
    """Values of temporaries in `gram`, per row of a square block: positions, and gradients or what pairs need."""
    way, _ = cheapest(c, t, i, o)
    # What a pair needs times a typical side of a block.
    return t * i + c * t * o + (16 * t * max(t, c * o) if way == "pairs" else c * o * i)


def gram(left: Positions, right: Positions) -> Tensor:
    """sum over o, i of dW_nc dW_md, `[B, N, C, M, C]`, by the cheaper way."""
    if cheapest(*left.sizes)[0] == "pairs":
        forward = torch.einsum("bnti,bmsi->bmnts", left.a, right.a)
        halfway = torch.einsum("bmnts,bmdso->bnmdto", forward, right.g)
        return torch.einsum("bncto,bnmdto->bncmd", left.g, halfway)
    one = gradients(left).flatten(3)
    two = one if left.g is right.g else gradients(right).flatten(3)
    return outer(one, two)
