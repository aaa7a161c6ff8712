"""What each layer does to the second moments of its units. One short function per kind of layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.nn import functional

from gpntk.infinite.gaussian import AbstractActivation, tracked
from gpntk.infinite.modules import WEIGHTINGS, Mechanism
from gpntk.infinite.moments import Block, LayerMoments

Parametrization = Literal["ntk", "standard"]


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


def weighted(
    state: LayerMoments,
    weights: Weights,
    windows: Windows | None = None,
    strides: Sequence[int] = (),
    shared: bool = True,
) -> LayerMoments:
    """A linear layer: k ← σ_w² mean(k) + σ_b², over the positions that a filter sees.

    Args:
        state: Moments of its input.
        weights: Prior of its parameters.
        windows: Positions that each filter sees; None for ``Linear``.
        strides: Strides of a transposed convolution, which sees zeros between its inputs' positions.
        shared: Whether all positions of the output have the same filter.
    """
    state = dilate(state if shared else state.equal_positions(), strides)
    variance, bias = weights.weight_variance, weights.bias_variance
    before = state.block
    mean = _filter_mean(state, windows, before.nngp)
    # What is new is added to in place.
    nngp = variance * mean
    if bias is not None:
        nngp += bias
    if not state.tangent:
        return state._replace(block=Block(nngp, None))
    own = nngp if weights.parametrization == "ntk" else weights.fan_in * mean + (0.0 if bias is None else 1.0)
    ntk = own if before.ntk is None else (variance * _filter_mean(state, windows, before.ntk)).add_(own)
    return state._replace(block=Block(nngp, ntk))


def _filter_mean(state: LayerMoments, windows: Windows | None, tensor: Tensor) -> Tensor:
    """(1/#β) Σ_β K[α+β, α'+β], axis by axis: a filter with independent weights sees each position once."""
    if windows is None:
        return tensor
    for axis in range(state.axes):
        tensor = _window_sums(tensor, state.position_dims(axis), windows, axis, 1 / windows.sizes[axis])
    return tensor


def pool(state: LayerMoments, windows: Windows, divisor: int | None = None, count_padding: bool = True) -> LayerMoments:
    """The mean over windows (or their sum by ``divisor``), of both positions of a pair; needs pairs."""

    def average(tensor: Tensor) -> Tensor:
        for axis in range(state.axes):
            for dim in state.position_dims(axis):
                length = tensor.shape[dim]
                tensor = _window_sums(tensor, (dim,), windows, axis)
                if divisor is None:
                    counts = _counts(length, windows, axis, count_padding).to(tensor)
                    tensor = tensor / counts.reshape(-1, *[1] * (-dim - 1))
        return tensor

    return scale(state.map(average), 1 / (divisor or 1))


def _counts(length: int, windows: Windows, axis: int, count_padding: bool) -> Tensor:
    """Positions that the mean over each window is divided by."""
    ones = torch.ones(length, device="cpu")
    sums = _window_sums(ones, (-1,), windows, axis)
    return torch.full_like(sums, windows.sizes[axis]) if count_padding else sums


def reduce_axes(state: LayerMoments, axes: Sequence[int], total: bool = False, keep: bool = False) -> LayerMoments:
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


def attend(keys: LayerMoments, values: LayerMoments, mechanism: Mechanism) -> LayerMoments:
    """k ← G₁ k G₂ᵀ, Θ ← G₁ Θ G₂ᵀ with G the weights of either input's positions; keys' own share of Θ vanishes."""
    assert keys.own is not None
    first, second = map(WEIGHTINGS[mechanism], keys.own)
    return values.map(lambda block: first @ block @ second.mT, own=None)


def add(*states: LayerMoments, factor: float = 1.0) -> LayerMoments:
    """A sum of independent branches, the last of them times ``factor``."""
    states = _alike(states)
    blocks = [state.block for state in (*states[:-1], scale(states[-1], factor))]
    return states[0]._replace(block=Block(_sum([b.nngp for b in blocks]), _sum([b.ntk for b in blocks])))


def concatenate(*states: LayerMoments, channels: Sequence[int]) -> LayerMoments:
    """Branches beside each other as units of one layer, each with its share of them."""
    shares = [count / sum(channels) for count in channels]
    return add(*(state.map(lambda t, s=share: s * t) for state, share in zip(states, shares, strict=True)))


def multiply(one: LayerMoments, two: LayerMoments) -> LayerMoments:
    """A product of two independent branches, unit by unit."""
    one, two = _alike((one, two))
    pairs = ((one.block.ntk, two.block.nngp), (two.block.ntk, one.block.nngp))
    ntks = [None if ntk is None else ntk * nngp for ntk, nngp in pairs]
    return one._replace(block=Block(one.block.nngp * two.block.nngp, _sum(ntks)))


def _alike(states: tuple[LayerMoments, ...]) -> tuple[LayerMoments, ...]:
    """All with pairs of positions, or none: another use of one may have asked for its pairs."""
    return states if all(state.pairs for state in states) else tuple(state.equal_positions() for state in states)


def _sum(tensors: Sequence[Tensor | None]) -> Any:
    """The sum of tensors of one shape; None stands for zero."""
    known = [tensor for tensor in tensors if tensor is not None]
    return sum(known[1:], known[0]) if known else None


def dilate(state: LayerMoments, strides: Sequence[int]) -> LayerMoments:
    """Zeros between positions, ``strides`` - 1 of them on each axis."""
    if all(stride == 1 for stride in strides):
        return state

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
    return state if factor == 1 else state.map(lambda tensor: tensor * factor**2)


def unchanged(state: LayerMoments) -> LayerMoments:
    """The same values, or minus them, which have the same second moments."""
    return state


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
