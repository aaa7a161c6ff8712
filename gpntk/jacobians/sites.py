"""Where a network uses its parameters, as data.

A *use* is one call of a function that has a rule, on operands that are parameters or tensors computed from parameters
alone (a transposed or normalised weight, a slice of positional embeddings). A *site* is a call with its uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpntk.jacobians.rules import AbstractLayerRule


class RowAxis(NamedTuple):
    """Which axis of a tensor holds the N rows of x.

    Attributes:
        axis: The axis, of length N * copies.
        copies: m, rows folded together with something else (times, windows, positions).
        outer: Whether the rows are the slower index of the two.
    """

    axis: int
    copies: int
    outer: bool

    def first(self, x: Tensor, leading: int = 0) -> Tensor:
        """x with its rows and copies in front, `[N, m, ...]`, after ``leading`` other dimensions."""
        x = x.movedim(self.axis + leading, leading)
        if self.outer:
            return x.unflatten(leading, (-1, self.copies))
        return x.unflatten(leading, (self.copies, -1)).transpose(leading, leading + 1)

    def spread(self, x: Tensor) -> Tensor:
        """x with one entry per row on the axis, as one per row and copy."""
        if self.copies == 1:
            return x
        if self.outer:
            return x.repeat_interleave(self.copies, self.axis)
        return torch.cat([x] * self.copies, self.axis)


class Operand(NamedTuple):
    """An argument that is a parameter, or is computed from parameters.

    Attributes:
        names: The parameters it depends on.
        direct: Whether it is the one parameter itself, reshaped at most.
        slot: Its place among the flattened arguments of the call.
        shape: Its shape in the call; form: the shape in which the rule takes it.
    """

    names: frozenset[str]
    direct: bool
    slot: int
    shape: torch.Size
    form: torch.Size


@dataclass(frozen=True)
class Use:
    """One use of operands.

    Attributes:
        rule: How products with it are computed.
        operands: The operands by the rule's own names.
        rows: Where the rows are in input and output (for copied operands: in the output, of ``dims`` dimensions).
        input_slot: Place of the layer's input among the flattened arguments, or -1.
        copied: Whether every row gets a copy of the (only) operand, rather than the output a tap.
        number: Tells the uses of a network apart.
    """

    rule: AbstractLayerRule
    operands: dict[str, Operand]
    rows: RowAxis
    dims: int
    input_slot: int = -1
    copied: bool = False
    number: int = -1

    @property
    def names(self) -> frozenset[str]:
        """The parameters used."""
        return frozenset[str]().union(*(operand.names for operand in self.operands.values()))

    @property
    def entangled(self) -> bool:
        """Whether an operand is not simply a parameter."""
        return not all(operand.direct for operand in self.operands.values())


class Site(NamedTuple):
    """A call at which parameters are used; ``replacement`` is called in its stead, if not None."""

    function: Callable[..., Any]
    uses: tuple[Use, ...]
    replacement: Callable[..., Tensor] | None
