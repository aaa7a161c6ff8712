"""Modules with a limit of infinite width that torch does not have: `Activation`, `LocallyConnected`, attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpntk._checks import check_count, check_flags, check_kinds
from gpntk.errors import InputError, SelectionError
from gpntk.infinite.gaussian import AbstractActivation

Mechanism = Literal["softmax", "abs", "relu", "identity"]

WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": partial(torch.softmax, dim=-1),
    "abs": torch.abs,
    "relu": torch.relu,
    "identity": torch.positive,
}
"""What attention makes of the scores `[..., S, S]`."""


@final
class Activation(nn.Module):
    """An activation of `gpntk.infinite` as a layer, for a φ that torch has no module for, or of your own.

    Args:
        activation: φ: a closed form such as `Gaussian`, `Step` or `rbf`, or `Quadrature` of any elementwise function.

    Example:
        >>> from torch import nn
        >>> from gpntk.infinite import Activation, Quadrature
        >>> from gpntk.infinite.closed_forms import rbf
        >>> network = nn.Sequential(nn.Linear(2, 64), Activation(Quadrature(torch.atan)), nn.Linear(64, 1))
        >>> network(torch.zeros(3, 2)).shape
        torch.Size([3, 1])
        >>> Activation(rbf(0.5))  # after a layer with weights: the Gaussian kernel of its covariance
        Activation(Sine(a=1.4142135623730951, b=1.0, c=0.7853981633974483))
    """

    def __init__(self, activation: AbstractActivation) -> None:
        super().__init__()
        if not isinstance(activation, AbstractActivation):
            raise InputError(
                f"activation must be one of gpntk.infinite, got {activation!r}: wrap a function in Quadrature."
            )
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """The activation of every entry, φ(x)."""
        return self.activation(x)

    def extra_repr(self) -> str:
        """The activation, as `print` shows it."""
        return repr(self.activation)


@final
class TiedAttention(nn.Module):
    """Every position's values as a mean over all positions, weighted by g(k kᵀ / d): queries are the keys.

    The widths d of keys k `[N, S, d]` and values v `[N, S, C]` may differ; both come from layers with weights. As they
    grow, k kᵀ / d becomes the NNGP of the keys, so that the limit of attention is a linear map of the values that
    depends on x alone. (With k kᵀ / √d, as usual, there is no closed form.)

    Args:
        mechanism: g: ``"softmax"`` over positions, or ``"abs"``, ``"relu"``, ``"identity"`` of every score.

    Raises:
        SelectionError: There is no such mechanism.

    Example:
        >>> import torch, gpntk
        >>> from gpntk.infinite import TiedAttention
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.key, self.value, self.out = (torch.nn.Linear(8, 8) for _ in range(3))
        ...         self.attention, self.head = TiedAttention(), torch.nn.Linear(8 * 5, 1)
        ...     def forward(self, x):
        ...         x = self.out(self.attention(self.key(x), self.value(x)))
        ...         return self.head(x.flatten(1))
        >>> gpntk.InfiniteNTKKernel(Block(), input_shape=(5, 8))(torch.randn(3, 40)).shape
        torch.Size([3, 3])

    References:
        Hron, Bahri, Sohl-Dickstein and Novak (2020), Infinite Attention, https://arxiv.org/abs/2006.10540, section 3.
    """

    def __init__(self, mechanism: Mechanism = "softmax") -> None:
        super().__init__()
        if not isinstance(mechanism, str) or mechanism not in WEIGHTINGS:
            raise SelectionError(f"mechanism={mechanism!r}: choose one of {', '.join(WEIGHTINGS)}.")
        self.mechanism: Mechanism = mechanism

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        """`[N, S, C]` for keys `[N, S, d]` and values `[N, S, C]`."""
        return WEIGHTINGS[self.mechanism](keys @ keys.mT / keys.shape[-1]) @ values


@final
class LocallyConnected(nn.Module):
    """A convolution without weight sharing: every position of the output has a filter, and a bias, of its own.

    Infinitely wide, different positions of its output are independent. Before `torch.nn.Flatten` that is all the same
    as a convolution: only pooling knows of shared weights.

    Args:
        in_channels: Channels of the input `[N, C, *S]`.
        out_channels: Channels of the output.
        input_size: S, one or two axes.
        kernel_size: Positions that a filter sees, for all axes or for each.
        stride: Between filters.
        padding: Zeros added at either end.
        bias: Whether there are biases.

    Raises:
        InputError: ``input_size`` has neither one axis nor two, another argument not one entry for each, a number is
            too small, or the filter is larger than the padded input; in ``forward``, x has another shape.

    Example:
        >>> import torch, gpntk
        >>> from gpntk.infinite import LocallyConnected
        >>> local = LocallyConnected(3, 16, input_size=(8, 8), kernel_size=3, padding=1)
        >>> local(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
        >>> network = torch.nn.Sequential(local, torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(1024, 1))
        >>> gpntk.InfiniteNTKKernel(network, input_shape=(3, 8, 8))(torch.randn(2, 192)).shape
        torch.Size([2, 2])

    References:
        Novak et al. (2019), Bayesian Deep Convolutional Networks with Many Channels are Gaussian Processes,
            https://arxiv.org/abs/1810.05148, section 5.1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        input_size: Sequence[int],
        kernel_size: int | Sequence[int],
        *,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_kinds(Sequence, "the sizes of one axis of positions, or of two", input_size=input_size)
        self.input_size = tuple(input_size)
        axes = len(self.input_size)
        if axes not in (1, 2):
            raise InputError(f"input_size={self.input_size}: give the sizes of one axis of positions, or of two.")
        check_count(**{f"input_size[{axis}]": size for axis, size in enumerate(self.input_size)})
        check_count(in_channels=in_channels, out_channels=out_channels)
        check_flags(bias=bias)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = _by_axis(kernel_size, axes, "kernel_size", 1)
        self.stride = _by_axis(stride, axes, "stride", 1)
        self.padding = _by_axis(padding, axes, "padding", 0)
        self.output_size = tuple(
            (size + 2 * pad - kernel) // step + 1
            for size, kernel, step, pad in zip(
                self.input_size, self.kernel_size, self.stride, self.padding, strict=True
            )
        )
        if min(self.output_size) < 1:
            raise InputError(f"kernel_size={self.kernel_size}: larger than the padded input, {self.input_size}.")
        # One row for every position.
        positions, window = math.prod(self.output_size), math.prod(self.kernel_size)
        self.weight = nn.Parameter(torch.empty(positions, out_channels, in_channels, window))
        self.bias = nn.Parameter(torch.empty(positions, out_channels)) if bias else None
        bound = (in_channels * window) ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C', *S']` for x `[N, C, *S]`."""
        _check_rows(x, (self.in_channels, *self.input_size))
        x = functional.pad(x, [pad for pad in reversed(self.padding) for _ in range(2)])
        for axis, (size, step) in enumerate(zip(self.kernel_size, self.stride, strict=True)):
            x = x.unfold(2 + axis, size, step)
        axes = len(self.kernel_size)
        windows = x.flatten(2 + axes).flatten(2, 1 + axes)
        result = torch.einsum("ncpk,pock->npo", windows, self.weight)
        if self.bias is not None:
            result = result + self.bias
        return result.mT.reshape(len(x), self.out_channels, *self.output_size)

    def extra_repr(self) -> str:
        """The arguments of the layer, as `print` shows them."""
        return (
            f"{self.in_channels}, {self.out_channels}, input_size={self.input_size}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, bias={self.bias is not None}"
        )


def _check_rows(x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape[1:] != shape:
        raise InputError(f"x has rows of shape {tuple(x.shape[1:])}, not {shape}.")


def _by_axis(value: int | Sequence[int], axes: int, argument: str, least: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * axes
    if len(values) != axes:
        raise InputError(
            f"{argument}={values}: give one number of at least {least}, or one for each of the {axes} axes."
        )
    for one in values:
        check_count(least, **{argument: one})
    return values
