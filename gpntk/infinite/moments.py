"""What an infinitely wide network carries from layer to layer: second moments of its units, and its tangent kernel.

In the limit the units of a layer are independent draws of one Gaussian process over inputs and positions, so that a
layer is known by the covariance of a unit's values at two inputs and two positions. Three *blocks* hold it: of x1 with
x2, of each row of x1 with itself, and of each row of x2 with itself:

    cross [N, M, *positions]    first [N, *positions]    second [M, *positions]

`positions` are, for each spatial axis of length S, one axis `S` (equal positions only) or two, `S, S'` (all pairs).
Pairs are carried only as far as a later layer mixes positions.

References:
    Novak et al. (2019), Bayesian Deep Convolutional Networks with Many Channels are Gaussian Processes,
        https://arxiv.org/abs/1810.05148.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True)
class Block:
    """Moments of one pairing of inputs.

    Attributes:
        nngp: Covariance of a unit `[*batch, *positions]`.
        ntk: Tangent kernel of the network up to here, in the same shape; None where it is not asked for.
    """

    nngp: Tensor
    ntk: Tensor | None

    def map(self, linear: Callable[[Tensor], Tensor]) -> Block:
        """A linear map of both."""
        return Block(linear(self.nngp), None if self.ntk is None else linear(self.ntk))


@final
@dataclass(frozen=True)
class LayerMoments:
    """The state after a layer.

    Attributes:
        cross: Of x1 with x2, `[N, M, *positions]`.
        first: Of every row of x1 with itself, `[N, *positions]`.
        second: Of every row of x2 with itself, `[M, *positions]`.
        axes: Number of spatial axes.
        pairs: Whether positions are pairs.
        gaussian: Whether units are Gaussian with mean zero: outputs of a layer with weights.
    """

    cross: Block
    first: Block
    second: Block
    axes: int
    pairs: bool
    gaussian: bool

    @property
    def blocks(self) -> tuple[Block, Block, Block]:
        """All three."""
        return self.cross, self.first, self.second

    def with_blocks(self, cross: Block, first: Block, second: Block, **changes: object) -> LayerMoments:
        """The same with other blocks."""
        return replace(self, cross=cross, first=first, second=second, **changes)

    def map(self, linear: Callable[[Tensor], Tensor], **changes: object) -> LayerMoments:
        """A linear map of everything, position by position."""
        return self.with_blocks(*(block.map(linear) for block in self.blocks), **changes)

    def position_dims(self, axis: int) -> tuple[int, ...]:
        """The dimensions of a block, counted from its end, that belong to a spatial axis."""
        each = 2 if self.pairs else 1
        start = -each * (self.axes - axis)
        return tuple(range(start, start + each))

    def equal_positions(self) -> LayerMoments:
        """Without pairs of different positions."""
        if not self.pairs:
            return self

        def diagonal(tensor: Tensor) -> Tensor:
            for axis in range(self.axes):
                # What is left of earlier axes is one dimension each, moved to the end in order.
                dims = -2 * (self.axes - axis) - axis
                tensor = tensor.diagonal(dim1=dims, dim2=dims + 1)
            return tensor

        return self.map(diagonal, pairs=False)


def sample_variances(state: LayerMoments) -> tuple[Tensor, Tensor]:
    """Variance of a unit at every position, `[N, *S]` of x1 and `[M, *S]` of x2."""
    own = state.equal_positions()
    return own.first.nngp, own.second.nngp


def beside(variance: Tensor, axes: int, primed: bool) -> Tensor:
    """Variances `[*batch, *S]` shaped to broadcast with pairs: `S, 1` on each axis, or `1, S` if ``primed``."""
    batch, sizes = variance.shape[: variance.dim() - axes], variance.shape[variance.dim() - axes :]
    return variance.reshape(*batch, *(length for size in sizes for length in ((1, size) if primed else (size, 1))))


def inner_products(x1: Tensor, x2: Tensor, pairs: bool) -> Tensor:
    """(1/C) Σ_c x1_c x2_c for x `[N, C, *S]` and `[M, C, *S]`: `[N, M, *positions]`."""
    axes = x1.dim() - 2
    channels = x1.shape[1]
    if not pairs or not axes:
        letters = "hw"[:axes]
        return torch.einsum(f"nc{letters},mc{letters}->nm{letters}", x1, x2) / channels
    one, two = "hw"[:axes], "ij"[:axes]
    out = "".join(a + b for a, b in zip(one, two, strict=True))
    return torch.einsum(f"nc{one},mc{two}->nm{out}", x1, x2) / channels


def own_products(x: Tensor, pairs: bool) -> Tensor:
    """The same of every row with itself, `[N, *positions]`."""
    axes = x.dim() - 2
    if not pairs or not axes:
        return x.square().mean(1)
    one, two = "hw"[:axes], "ij"[:axes]
    out = "".join(a + b for a, b in zip(one, two, strict=True))
    return torch.einsum(f"nc{one},nc{two}->n{out}", x, x) / x.shape[1]
