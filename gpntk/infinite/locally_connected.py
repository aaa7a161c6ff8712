"""Convolutions whose filters differ from position to position, which torch has no module for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpntk.errors import InputError


@final
class LocallyConnected(nn.Module):
    """A convolution without weight sharing: every position of the output has a filter, and a bias, of its own.

    Infinitely wide, different positions of its output are independent. Before `torch.nn.Flatten` that is all the same
    as a convolution: only pooling knows of shared weights.

    Args:
        in_channels: Of the input `[N, C, *S]`.
        out_channels: Of the output.
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
        self.input_size = tuple(input_size)
        axes = len(self.input_size)
        if axes not in (1, 2):
            raise InputError(f"input_size={self.input_size}: give the sizes of one axis of positions, or of two.")
        for name, count in (("in_channels", in_channels), ("out_channels", out_channels)):
            if count < 1:
                raise InputError(f"{name}={count}: must be at least 1.")
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
        """The arguments."""
        return (
            f"{self.in_channels}, {self.out_channels}, input_size={self.input_size}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, bias={self.bias is not None}"
        )


def _check_rows(x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape[1:] != shape:
        raise InputError(f"x has rows of shape {tuple(x.shape[1:])}, not {shape}.")


def _by_axis(value: int | Sequence[int], axes: int, argument: str, least: int) -> tuple[int, ...]:
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) != axes or min(values) < least:
        raise InputError(
            f"{argument}={values}: give one number of at least {least}, or one for each of the {axes} axes."
        )
    return values
