"""What an infinitely wide network carries from layer to layer: second moments of its units, and its tangent kernel.

In the limit the units of a layer are independent draws of one Gaussian process over inputs and positions, so that a
layer is known by the covariance of a unit's values at two inputs and two positions, for many pairs of inputs at once:

    [*rows, *positions]

`rows` are `N, M` for every row of x1 with every row of x2, or `N` for x1 with x2 row by row. `positions` are, for each
spatial axis of length S, one axis `S` (equal positions only) or two, `S, S'` (all pairs). Pairs of positions are
carried only as far as a later layer mixes positions.

References:
    Novak et al. (2019), Bayesian Deep Convolutional Networks with Many Channels are Gaussian Processes,
        https://arxiv.org/abs/1810.05148.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Matrix products for every position cost more than sums over so many channels.
_FEW_CHANNELS = 8


class Block(NamedTuple):
    """Moments of pairs of inputs.

    Attributes:
        nngp: Covariance of a unit `[*rows, *positions]`.
        ntk: Tangent kernel of the network up to here, in the same shape; None where it is not asked for, or zero
            because no layer had weights yet.
    """

    nngp: Tensor
    ntk: Tensor | None

    def map(self, linear: Callable[[Tensor], Tensor]) -> Block:
        """A linear map of both."""
        return Block(linear(self.nngp), None if self.ntk is None else linear(self.ntk))


class LayerMoments(NamedTuple):
    """The state after a layer.

    Attributes:
        block: What the next layer needs to know.
        first: Variance of a unit at every position of the first inputs, `[*rows, *S]` up to broadcasting; as of the
            last value that a step asks about (`Program.asked`).
        second: The same of the second inputs.
        equal: The pairs that are of one input with itself: their indices, `[E]` for each dimension of rows; or a bool
            for all.
        axes: Number of spatial axes.
        pairs: Whether positions are pairs.
        tangent: Whether the tangent kernel is asked for.
        own: Covariances of the positions of the first inputs, and of the second, `[*rows, S, S]`, where asked for.
    """

    block: Block
    first: Tensor
    second: Tensor
    equal: tuple[Tensor, ...] | bool
    axes: int
    pairs: bool
    tangent: bool
    own: tuple[Tensor, Tensor] | None = None

    def map(self, linear: Callable[[Tensor], Tensor], **changes: Any) -> LayerMoments:
        """A linear map of the block, position by position."""
        return self._replace(block=self.block.map(linear), **changes)

    def position_dims(self, axis: int) -> tuple[int, ...]:
        """The dimensions of a block, counted from its end, that belong to a spatial axis."""
        each = 2 if self.pairs else 1
        start = -each * (self.axes - axis)
        return tuple(range(start, start + each))

    def equal_positions(self) -> LayerMoments:
        """Without pairs of different positions."""
        if not self.pairs:
            return self
        return self.map(self._diagonal, pairs=False)

    def all_pairs(self) -> LayerMoments:
        """With pairs of different positions, which are independent if they were left out."""
        if self.pairs or not self.axes:
            return self

        def embedded(tensor: Tensor) -> Tensor:
            rows, sizes = tensor.shape[: tensor.dim() - self.axes], tensor.shape[tensor.dim() - self.axes :]
            result = tensor.new_zeros(*rows, *(length for size in sizes for length in (size, size)))
            self._diagonal(result).copy_(tensor)
            return result

        return self.map(embedded, pairs=True)

    def _diagonal(self, tensor: Tensor) -> Tensor:
        """The equal positions of all pairs, a view."""
        for axis in range(self.axes):
            # What is left of earlier axes is one dimension each, moved to the end in order.
            dims = -2 * (self.axes - axis) - axis
            tensor = tensor.diagonal(dim1=dims, dim2=dims + 1)
        return tensor

    def same(self) -> tuple[Tensor, ...] | bool:
        """Where both inputs and both positions are the same: indices into the block; or a bool for everywhere."""
        rows, sizes = self.equal, self.first.shape[self.first.dim() - self.axes :]
        if rows is False or not self.pairs:
            return rows
        if rows is True:
            rows = (torch.arange(self.block.nngp.shape[0], device=self.first.device),)
        positions = torch.meshgrid(*(torch.arange(size, device=self.first.device) for size in sizes), indexing="ij")
        rows = (row.reshape(-1, *[1] * self.axes) for row in rows)
        return *rows, *(index for position in positions for index in (position, position))

    def sides(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Functions of either input's positions `[*rows, *S]`, each shaped to broadcast with the block."""
        if not self.pairs:
            return first, second
        return beside(first, self.axes, primed=False), beside(second, self.axes, primed=True)


def beside(variance: Tensor, axes: int, primed: bool) -> Tensor:
    """Variances `[*rows, *S]` shaped to broadcast with pairs: `S, 1` on each axis, or `1, S` if ``primed``."""
    rows, sizes = variance.shape[: variance.dim() - axes], variance.shape[variance.dim() - axes :]
    return variance.reshape(*rows, *(length for size in sizes for length in ((1, size) if primed else (size, 1))))


def products(x1: Tensor, x2: Tensor, by_row: bool, pairs: bool) -> Tensor:
    """(1/C) Σ_c x1_c x2_c for x `[N, C, *S]`, `[M, C, *S]`: `[N, M, *positions]`, or ``by_row`` `[N, *positions]`."""
    axes, channels = x1.dim() - 2, x1.shape[1]
    if axes and not pairs and channels <= _FEW_CHANNELS:
        one, two = (x1, x2) if by_row else (x1.unsqueeze(1), x2.unsqueeze(0))
        total = torch.zeros((), dtype=x1.dtype, device=x1.device)
        for channel in range(channels):
            index = (..., channel, *[slice(None)] * axes)
            total = torch.addcmul(total, one[index], two[index], value=1 / channels)
        return total
    if not axes:
        if by_row:
            return torch.linalg.vecdot(x1, x2) / channels
        return torch.addmm(x1.new_zeros(()), x1, x2.mT, beta=0, alpha=1 / channels)
    one = "hw"[:axes]
    two = "ij"[:axes] if pairs else one
    positions = "".join(a + b for a, b in zip(one, two, strict=True)) if pairs else one
    rows = ("n", "n", "n") if by_row else ("n", "m", "nm")
    return (torch.einsum(f"{rows[0]}c{one},{rows[1]}c{two}->{rows[2]}{positions}", x1, x2) / channels).contiguous()
