"""Names for the argument types that several modules share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

ParameterSelection = None | str | Sequence[str] | Callable[[str, nn.Parameter], bool]
"""Which parameters to differentiate: all, glob(s), ``"readout"``, or a predicate of name and parameter."""

OutputSelection = Literal["full", "independent", "sum"] | int
"""What a kernel makes of C outputs; see :class:`gpntk.NTKKernel`."""

PriorGroups = Mapping[str, str | Sequence[str]]
"""Groups of parameters with a prior variance each: glob(s) over their names, by the group's name."""

Extract = Callable[[Any], Tensor]
"""Turns whatever a network returns into its output tensor, ``[N]`` or ``[N, C]``."""
