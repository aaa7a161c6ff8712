"""Targets and outputs of several dimensions: how they are laid out for a kernel matrix, and what they must be."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpntk._checks import check_input, check_tensors, check_values
from gpntk.errors import InputError


class OutputLayout(NamedTuple):
    """How values `[N, C]` are laid out as columns `[K, n]` for a kernel matrix `[n, n]`.

    Attributes:
        num_outputs: C.
        shared: Whether the kernel has one row per input, so that K = C and n = N; else K = 1, n = N*C, rows n*C + c.
        vector: Whether the user's values are `[N]`.
    """

    num_outputs: int
    shared: bool
    vector: bool

    @classmethod
    def of(cls, rows: int, targets: Tensor, vector: bool) -> OutputLayout:
        """For a kernel of so many rows and targets `[N, C]`."""
        samples, outputs = targets.shape
        if rows not in (samples, samples * outputs):
            per_input = f"{rows // samples} rows per input" if rows % samples == 0 else f"{rows} rows"
            raise InputError(
                f"ntk has {per_input} and y {outputs} output(s) for each of {samples} inputs: give y of shape "
                f"[N, {rows // samples}], or a kernel with one row per input (output='independent' or a number)."
            )
        return cls(outputs, rows == samples, vector)

    def columns(self, values: Tensor) -> Tensor:
        """Values of all outputs `[N, C]` as right-hand sides `[K, n]`."""
        return values.mT.contiguous() if self.shared else values.reshape(1, -1)

    def matrix(self, columns: Tensor) -> Tensor:
        """Solutions `[..., K, m]` as values of all outputs `[..., M, C]`."""
        if self.shared:
            return columns.mT
        return columns.reshape(*columns.shape[:-2], -1, self.num_outputs)

    def outputs(self, columns: Tensor) -> Tensor:
        """Columns `[..., K, m]` in the user's shape, `[..., M]` or `[..., M, C]`."""
        values = self.matrix(columns)
        return values.squeeze(-1) if self.vector else values


def as_outputs(values: Any, x: Tensor, name: str) -> Tensor:
    """Outputs f_0 of the untrained network as a matrix `[M, C]`."""
    if not isinstance(values, Tensor) or values.dim() not in (1, 2) or values.shape[0] != x.shape[0]:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(f"{name} must be a tensor [{x.shape[0]}] or [{x.shape[0]}, C], got {got}.")
    return values.unsqueeze(-1) if values.dim() == 1 else values


def check_training_data(x: Tensor, y: Tensor, loss: str) -> None:
    """Raise `InputError` unless x `[N, D]` and y are data for ``loss``, ``"mse"`` or ``"cross_entropy"``."""
    check_tensors(x=x)
    check_input(x, x.device)
    if x.dim() != 2 or not x.shape[0]:
        raise InputError(f"x must be [N, D] with N > 0, got shape {tuple(x.shape)}: give a row for each input.")
    check_values(x.device, y=y)
    if y.dim() not in (1, 2) or y.shape[0] != x.shape[0] or not y.numel():
        raise InputError(
            f"y must be [{x.shape[0]}] or [{x.shape[0]}, C] as x has {x.shape[0]} rows, got {tuple(y.shape)}."
        )
    if not bool(y.isfinite().all()):
        raise InputError("y must be finite: leave out the rows with missing values.")
    if loss == "cross_entropy":
        _check_classes(y)
    elif not y.is_floating_point():
        raise InputError(
            f"y must be floating point, got {y.dtype}: pass y.double(), or loss='cross_entropy' for classes."
        )


def _check_classes(y: Tensor) -> None:
    if not y.is_floating_point():
        if y.dim() != 1 or bool((y < 0).any()):
            raise InputError("y has classes below zero, or a column for each: give integers from 0, of shape [N].")
        return
    total = y.sum(-1) if y.dim() == 2 and y.shape[-1] > 1 else torch.ones_like(y)
    if bool((y < 0).any() or (y > 1).any() or ((total - 1).abs() > 1e-4).any()):
        raise InputError(
            "y must hold the classes' probabilities, which sum to one in each row, or integer classes [N]."
        )


def check_test_inputs(x: Tensor, train: Tensor) -> None:
    """Raise `InputError` unless x `[M, D]` is of the kind of the training inputs."""
    check_tensors(x=x)
    if (x.device, x.dtype) != (train.device, train.dtype):
        raise InputError(
            f"x is {x.dtype} on {x.device}, the training inputs are {train.dtype} on {train.device}: pass x.to(them)."
        )
    check_input(x, train.device, columns=train.shape[-1])
