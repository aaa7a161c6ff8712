"""What each layer does to the second moments of its units. One short function per kind of layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor
from torch.nn import functional

from gpntk.infinite.gaussian import AbstractActivation, tracked
from gpntk.infinite.moments import Block, LayerMoments

Parametrization = Literal["ntk", "standard"]
Spatial = Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True)
class Weights:
    """Prior of a layer's parameters: z = (σ_w / √n) W a + σ_b b, or z = W a + b with W ~ N(0, σ_w² / n).

    Attributes:
        weight_variance: σ_w² `[]`.
        bias_variance: σ_b² `[]`; None for a layer without bias.
        fan_in: n, of the finite layer.
        parametrization: Which of the two is trained: the same NNGP, but another tangent kernel.
    """

    weight_variance: Tensor
    bias_variance: Tensor | None
    fan_in: int
    parametrization: Parametrization


def weighted(state: LayerMoments, weights: Weights, average: Spatial = lambda tensor: tensor) -> LayerMoments:
    """A linear layer; ``average`` is the mean over the positions that a filter sees (none for ``Linear``)."""
    variance, bias = weights.weight_variance, weights.bias_variance
    before = state.block
    mean = average(before.nngp)
    # What is fresh is added to in place.
    nngp = variance * mean
    if bias is not None:
        nngp += bias
    if not state.tangent:
        return state._replace(block=Block(nngp, None))
    own = nngp if weights.parametrization == "ntk" else weights.fan_in * mean + (0.0 if bias is None else 1.0)
    ntk = own if before.ntk is None else (variance * average(before.ntk)).add_(own)
    return state._replace(block=Block(nngp, ntk))


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
            tensor = _window_sums(tensor, state.position_dims(axis), windows, axis, 1 / windows.sizes[axis])
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


def reduce_axes(state: LayerMoments, axes: Sequence[int], total: bool, keep: bool = False) -> LayerMoments:
    """The mean (or ``total``) over whole spatial axes, of both positions of a pair; needs pairs of several positions.

    ``keep``: what is left of an axis is one position.
    """
    if not axes:
        return state
    dims = [dim for axis in axes for dim in state.position_dims(axis)]

    def reduce(tensor: Tensor) -> Tensor:
        return tensor.sum(dims, keepdim=keep) if total else tensor.mean(dims, keepdim=keep)

    if keep:
        return state.map(reduce)
    return state.map(reduce, axes=state.axes - len(axes), pairs=state.pairs and len(axes) < state.axes)


def flatten(state: LayerMoments) -> LayerMoments:
    """Positions become units of one layer: only equal ones have anything in common."""
    state = state.equal_positions()
    dims = list(range(-state.axes, 0))
    return state.map(lambda tensor: tensor.mean(dims) if dims else tensor, axes=0)


def pad(state: LayerMoments, paddings: Sequence[tuple[int, int]], circular: bool) -> LayerMoments:
    """Positions with the value zero (or those of the other end) around the others."""

    def padded(tensor: Tensor) -> Tensor:
        for axis in range(state.axes):
            for dim in state.position_dims(axis):
                tensor = _pad(tensor, dim, paddings[axis], circular)
        return tensor

    return state.map(padded)


def activate(state: LayerMoments, activation: AbstractActivation) -> LayerMoments:
    """k ← E[φ(u) φ(v)], Θ ← Θ E[φ'(u) φ'(v)]; exactly, where u and v are the same unit of the same input.

    The difference of k to a variance is rounding there, which kinks magnify.
    """
    block, same = state.block, state.same()
    if same is True:
        nngp, slope = activation.diagonal(state.first)
    elif same is False:
        nngp, slope = activation.moments(*state.sides(state.first, state.second), block.nngp)
    else:
        k = block.nngp.index_put(same, block.nngp.new_zeros(()))
        sides = state.sides(state.first, state.second)
        computed = activation.moments(*sides, k)
        variance = sides[0].expand(k.shape)[same]
        if tracked(*sides):
            # By symmetry each input has half of the derivative.
            variance = 0.5 * (variance + sides[1].expand(k.shape)[same])
        exact = activation.diagonal(variance)
        # Moments that no graph knows are nobody else's.
        put = Tensor.index_put if tracked(*computed) else Tensor.index_put_
        nngp, slope = put(computed[0], same, exact[0]), computed[1]
        slope = slope if block.ntk is None else put(slope, same, exact[1])
    return state._replace(block=Block(nngp, None if block.ntk is None else block.ntk * slope))


def layer_norm(state: LayerMoments, eps: float, positions: bool) -> LayerMoments:
    """Division by the standard deviation over units, or over units and ``positions``."""

    def inverse(variance: Tensor) -> Tensor:
        if positions:
            variance = variance.mean(list(range(-state.axes, 0)), keepdim=True).expand_as(variance)
        return (variance + eps).rsqrt()

    one, two = state.sides(inverse(state.first), inverse(state.second))
    return state.map(lambda tensor: tensor * one * two)


def dropout(state: LayerMoments, keep: float) -> LayerMoments:
    """In train mode, units are zeroed independently: a unit's own second moment grows by 1 / ``keep``."""
    same = state.same()
    if isinstance(same, tuple):
        return state.map(lambda tensor: tensor.index_put(same, tensor[same] / keep))
    return scale(state, keep**-0.5) if same else state


def add(states: Sequence[LayerMoments]) -> LayerMoments:
    """A sum of independent branches."""
    ntks = [state.block.ntk for state in states if state.block.ntk is not None]
    block = Block(sum_of([state.block.nngp for state in states]), sum_of(ntks) if ntks else None)
    return states[0]._replace(block=block)


def concatenate(states: Sequence[LayerMoments], channels: Sequence[int]) -> LayerMoments:
    """Branches beside each other as units of one layer, each with its share of them."""
    shares = [count / sum(channels) for count in channels]
    return add([state.map(lambda t, s=share: s * t) for state, share in zip(states, shares, strict=True)])


def multiply(one: LayerMoments, two: LayerMoments) -> LayerMoments:
    """A product of independent branches, unit by unit."""
    terms = [own.block.ntk * other.block.nngp for own, other in ((one, two), (two, one)) if own.block.ntk is not None]
    return one._replace(block=Block(one.block.nngp * two.block.nngp, sum_of(terms) if terms else None))


def dilate(state: LayerMoments, strides: Sequence[int]) -> LayerMoments:
    """Zeros between positions, ``strides`` - 1 of them on each axis."""

    def dilated(tensor: Tensor) -> Tensor:
        for axis, stride in enumerate(strides):
            dims, shape = state.position_dims(axis), list(tensor.shape)
            for dim in dims:
                shape[dim] = (tensor.shape[dim] - 1) * stride + 1
            result = tensor.new_zeros(shape)
            _at(result, dims, slice(None, None, stride)).copy_(tensor)
            tensor = result
        return tensor

    return state.map(dilated)


def scale(state: LayerMoments, factor: float) -> LayerMoments:
    """Every unit times a constant."""
    return state.map(lambda tensor: tensor * factor**2)


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of tensors of one shape."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def _window_sums(tensor: Tensor, dims: tuple[int, ...], windows: Windows, axis: int, factor: float = 1.0) -> Tensor:
    """``factor`` Σ_β of slices shifted by β along all of ``dims`` together."""
    size, stride, (before, after) = windows.sizes[axis], windows.strides[axis], windows.paddings[axis]
    if windows.circular:
        for dim in dims:
            tensor = _pad(tensor, dim, (before, after), circular=True)
        before = after = 0
    length = tensor.shape[dims[0]]
    count = (length + before + after - size) // stride + 1
    shape = list(tensor.shape)
    for dim in dims:
        shape[dim] = count
    shifts = []
    for start in range(-before, size - before):
        # Windows whose position ``start`` is not padding.
        low, high = max(0, -(start // stride)), min(count, (length - 1 - start) // stride + 1)
        if low < high:
            begin = start + stride * low
            shifts.append((slice(low, high), slice(begin, begin + stride * (high - low - 1) + 1, stride)))
    # The first to all windows, if there is one, and then the others to parts in place.
    shifts.sort(key=lambda shift: shift[0].start - shift[0].stop)
    if shifts and shifts[0][0] == slice(0, count):
        total = factor * _at(tensor, dims, shifts.pop(0)[1])
    else:
        total = tensor.new_zeros(shape)
    for here, there in shifts:
        _at(total, dims, here).add_(_at(tensor, dims, there), alpha=factor)
    return total


def _at(tensor: Tensor, dims: tuple[int, ...], where: slice) -> Tensor:
    for dim in dims:
        tensor = tensor[(..., where, *[slice(None)] * (-dim - 1))]
    return tensor


def _pad(tensor: Tensor, dim: int, padding: tuple[int, int], circular: bool) -> Tensor:
    before, after = padding
    if not before and not after:
        return tensor
    if not circular:
        return functional.pad(tensor, [*[0, 0] * (-dim - 1), before, after])
    size = tensor.shape[dim]
    index = torch.arange(-before, size + after, device=tensor.device) % size
    return tensor.index_select(dim, index)
