"""What each layer does to the second moments of its units. One short function per kind of layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor
from torch.nn import functional

from gpntk.infinite.gaussian import AbstractActivation
from gpntk.infinite.moments import Block, LayerMoments, beside, sample_variances

Parametrization = Literal["ntk", "standard"]
Spatial = Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True)
class Weights:
    """Prior of a layer's parameters: z = (σ_w / √n) W a + σ_b b, or z = W a + b with W ~ N(0, σ_w² / n).

    Attributes:
        weight_std: σ_w `[]`.
        bias_std: σ_b `[]`; None for a layer without bias.
        fan_in: n, of the finite layer.
        parametrization: Which of the two is trained: the same NNGP, but another tangent kernel.
    """

    weight_std: Tensor
    bias_std: Tensor | None
    fan_in: int
    parametrization: Parametrization


def weighted(state: LayerMoments, weights: Weights, average: Spatial = lambda tensor: tensor) -> LayerMoments:
    """A linear layer; ``average`` is the mean over the positions that a filter sees (none for ``Linear``)."""
    variance = weights.weight_std.square()
    bias = 0.0 if weights.bias_std is None else weights.bias_std.square()

    def block(before: Block) -> Block:
        mean = average(before.nngp)
        nngp = variance * mean + bias
        if before.ntk is None:
            return Block(nngp, None)
        inherited = variance * average(before.ntk)
        if weights.parametrization == "ntk":
            return Block(nngp, nngp + inherited)
        own = weights.fan_in * mean + (0.0 if weights.bias_std is None else 1.0)
        return Block(nngp, own + inherited)

    return state.with_blocks(*(block(before) for before in state.blocks), gaussian=True)


@final
@dataclass(frozen=True)
class Windows:
    """Windows that slide over the spatial axes: one entry each.

    Attributes:
        sizes: Positions in a window.
        strides: Between windows.
        paddings: Added before and after.
        circular: Whether padding repeats the other end instead of zeros.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    paddings: tuple[tuple[int, int], ...]
    circular: bool = False


def filter_mean(state: LayerMoments, windows: Windows) -> Spatial:
    """(1/#β) Σ_β K[α+β, α'+β], axis by axis: a filter with independent weights sees each position once."""

    def average(tensor: Tensor) -> Tensor:
        for axis in range(state.axes):
            tensor = _window_sums(tensor, state.position_dims(axis), windows, axis) / windows.sizes[axis]
        return tensor

    return average


def pool(state: LayerMoments, windows: Windows, total: bool = False, count_padding: bool = True) -> LayerMoments:
    """The mean (or ``total``) over windows, of both positions of a pair; needs pairs."""

    def average(tensor: Tensor) -> Tensor:
        for axis in range(state.axes):
            for dim in state.position_dims(axis):
                length = tensor.shape[dim]
                tensor = _window_sums(tensor, (dim,), windows, axis)
                if not total:
                    counts = _counts(length, windows, axis, count_padding).to(tensor)
                    tensor = tensor / counts.reshape(-1, *[1] * (-dim - 1))
        return tensor

    return state.map(average)


def _counts(length: int, windows: Windows, axis: int, count_padding: bool) -> Tensor:
    """Positions that the mean over each window is divided by."""
    ones = torch.ones(length, device="cpu")
    sums = _window_sums(ones, (-1,), windows, axis)
    return torch.full_like(sums, windows.sizes[axis]) if count_padding else sums


def reduce_axes(state: LayerMoments, axes: Sequence[int], total: bool) -> LayerMoments:
    """The mean (or ``total``) over whole spatial axes, of both positions of a pair; needs pairs."""
    dims = [dim for axis in axes for dim in state.position_dims(axis)]

    def reduce(tensor: Tensor) -> Tensor:
        return tensor.sum(dims) if total else tensor.mean(dims)

    return state.map(reduce, axes=state.axes - len(axes), pairs=state.pairs and len(axes) < state.axes)


def flatten(state: LayerMoments) -> LayerMoments:
    """Positions become units of one layer: only equal ones have anything in common."""
    state = state.equal_positions()
    dims = list(range(-state.axes, 0))
    return state.map(lambda tensor: tensor.mean(dims) if dims else tensor, axes=0, pairs=False)


def pad(state: LayerMoments, paddings: Sequence[tuple[int, int]], circular: bool) -> LayerMoments:
    """Positions with the value zero (or those of the other end) around the others."""

    def padded(tensor: Tensor) -> Tensor:
        for axis in range(state.axes):
            for dim in state.position_dims(axis):
                tensor = _pad(tensor, dim, paddings[axis], circular)
        return tensor

    return state.map(padded)


def activate(state: LayerMoments, activation: AbstractActivation) -> LayerMoments:
    """k ← E[φ(u) φ(v)], Θ ← Θ E[φ'(u) φ'(v)]."""
    first, second = sample_variances(state)
    cross = _activated(state.cross, activation, *_pairing(state, first.unsqueeze(1), second.unsqueeze(0)))
    own = [
        _own(block, variance, state, activation) for block, variance in ((state.first, first), (state.second, second))
    ]
    return state.with_blocks(cross, own[0], own[1], gaussian=False)


def _activated(block: Block, activation: AbstractActivation, one: Tensor, two: Tensor) -> Block:
    nngp, slope = activation.moments(one, two, block.nngp)
    return Block(nngp, None if block.ntk is None else block.ntk * slope)


def _own(block: Block, variance: Tensor, state: LayerMoments, activation: AbstractActivation) -> Block:
    """A row with itself: at equal positions the exact moments of one variable."""
    nngp, slope = activation.diagonal(variance)
    if not state.pairs:
        return Block(nngp, None if block.ntk is None else block.ntk * slope)
    pairs = _activated(block, activation, *_pairing(state, variance, variance))
    equal = _equal_positions(state, block.nngp)
    exact = beside(nngp, state.axes, primed=False)
    if block.ntk is None or pairs.ntk is None:
        return Block(torch.where(equal, exact, pairs.nngp), None)
    exact_ntk = block.ntk * beside(slope, state.axes, primed=False)
    return Block(torch.where(equal, exact, pairs.nngp), torch.where(equal, exact_ntk, pairs.ntk))


def _pairing(state: LayerMoments, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    if not state.pairs:
        return one, two
    return beside(one, state.axes, primed=False), beside(two, state.axes, primed=True)


def _equal_positions(state: LayerMoments, like: Tensor) -> Tensor:
    """Where both positions of a pair are the same, `[*positions]`."""
    equal = torch.ones((), dtype=torch.bool, device=like.device)
    for axis in range(state.axes):
        size = like.shape[state.position_dims(axis)[0]]
        shape = [1] * (2 * state.axes)
        shape[2 * axis] = shape[2 * axis + 1] = size
        equal = equal & torch.eye(size, dtype=torch.bool, device=like.device).reshape(shape)
    return equal


def layer_norm(state: LayerMoments, eps: float, positions: bool) -> LayerMoments:
    """Division by the standard deviation over units, or over units and ``positions``."""
    first, second = sample_variances(state)
    if positions:
        dims = list(range(-state.axes, 0))
        first, second = (
            first.mean(dims, keepdim=True).expand_as(first),
            second.mean(dims, keepdim=True).expand_as(second),
        )
    scales = [(variance + eps).rsqrt() for variance in (first, second)]
    pairs = (
        _pairing(state, scales[0].unsqueeze(1), scales[1].unsqueeze(0)),
        _pairing(state, scales[0], scales[0]),
        _pairing(state, scales[1], scales[1]),
    )
    blocks = [
        block.map(lambda tensor, one=one, two=two: tensor * one * two)
        for block, (one, two) in zip(state.blocks, pairs, strict=True)
    ]
    return state.with_blocks(*blocks)


def dropout(state: LayerMoments, keep: float) -> LayerMoments:
    """In train mode, units are zeroed independently: a unit's own second moment grows by 1 / ``keep``."""

    def own(block: Block) -> Block:
        if not state.pairs:
            return block.map(lambda tensor: tensor / keep)
        return block.map(lambda tensor: torch.where(_equal_positions(state, tensor), tensor / keep, tensor))

    return state.with_blocks(state.cross, own(state.first), own(state.second))


def add(states: Sequence[LayerMoments]) -> LayerMoments:
    """A sum of independent branches."""
    head = states[0]

    def summed(blocks: Sequence[Block]) -> Block:
        ntks = [block.ntk for block in blocks if block.ntk is not None]
        return Block(sum_of([block.nngp for block in blocks]), sum_of(ntks) if ntks else None)

    joined = (summed(blocks) for blocks in zip(*(state.blocks for state in states), strict=True))
    return head.with_blocks(*joined, gaussian=all(state.gaussian for state in states))


def concatenate(states: Sequence[LayerMoments], channels: Sequence[int]) -> LayerMoments:
    """Branches beside each other as units of one layer, each with its share of them."""
    shares = [count / sum(channels) for count in channels]
    return add([state.map(lambda t, s=share: s * t) for state, share in zip(states, shares, strict=True)])


def scale(state: LayerMoments, factor: float) -> LayerMoments:
    """Every unit times a constant."""
    return state.map(lambda tensor: tensor * factor**2)


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of tensors of one shape."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def _window_sums(tensor: Tensor, dims: tuple[int, ...], windows: Windows, axis: int) -> Tensor:
    """Σ_β of slices shifted by β along all of ``dims`` together."""
    size, stride = windows.sizes[axis], windows.strides[axis]
    for dim in dims:
        tensor = _pad(tensor, dim, windows.paddings[axis], windows.circular)
    length = (tensor.shape[dims[0]] - size) // stride + 1
    shifted = []
    for start in range(size):
        piece = tensor
        for dim in dims:
            piece = piece[(..., slice(start, start + stride * (length - 1) + 1, stride), *[slice(None)] * (-dim - 1))]
        shifted.append(piece)
    return sum_of(shifted)


def _pad(tensor: Tensor, dim: int, padding: tuple[int, int], circular: bool) -> Tensor:
    before, after = padding
    if not before and not after:
        return tensor
    if not circular:
        return functional.pad(tensor, [*[0, 0] * (-dim - 1), before, after])
    size = tensor.shape[dim]
    index = torch.arange(-before, size + after, device=tensor.device) % size
    return tensor.index_select(dim, index)
