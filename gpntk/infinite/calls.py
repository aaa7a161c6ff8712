"""One call in a network's ``forward``, and the rule that is made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import nn

from gpntk.errors import UnsupportedLayerError
from gpntk.infinite.layers import Weights
from gpntk.infinite.moments import LayerMoments
from gpntk.infinite.units import Units

Apply = Callable[[Sequence[LayerMoments], "Weights | None"], LayerMoments]

WAY_OUT = "gpntk.infinite.monte_carlo estimates the kernels of any architecture."


@final
@dataclass(frozen=True)
class Call:
    """One call in ``forward``.

    Attributes:
        name: Its qualified name.
        module: If it is one.
        args: As given, with nodes for tensors.
        kwargs: Likewise.
        roles: Of every tensor argument's axes: ``"n"``, ``"c"``, ``"s0"``, ``"s1"``.
        units: What is known of the units of every tensor argument.
        shapes: Of every tensor argument.
        output: Shape of the result.
    """

    name: str
    module: nn.Module | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    roles: list[tuple[str, ...]]
    units: list[Units]
    shapes: list[tuple[int, ...]]
    output: tuple[int, ...]

    def arguments(self, **defaults: Any) -> dict[str, Any]:
        """What follows the tensor in the call of a function, by name; ``defaults`` say in which order.

        Raises:
            UnsupportedLayerError: Something else is given.
        """
        after = self.args[1:]
        given = dict(zip(defaults, after, strict=False))
        synonyms = {"axis": "dim"}
        for name, value in self.kwargs.items():
            known = synonyms.get(name, name)
            if known in defaults:
                given[known] = value
            elif known not in ("input", "self") and value is not None:
                raise self.refuse(f"its argument {name}={value} has no rule")
        if len(after) > len(defaults):
            raise self.refuse(f"its arguments {after[len(defaults) :]} have no rule")
        return defaults | given

    @property
    def positions(self) -> list[str]:
        """The roles of the first tensor's spatial axes."""
        return sorted(role for role in self.roles[0] if role.startswith("s"))

    def check_channels_first(self) -> None:
        """That the first tensor has axes rows, channels, positions."""
        if self.roles[0] != ("n", "c", *self.positions):
            raise self.refuse(f"its input must have axes rows, channels, positions, not {self.roles[0]}")

    def refuse(self, reason: str) -> UnsupportedLayerError:
        """The error to be raised."""
        return UnsupportedLayerError(f"{self.name}: {reason}. {WAY_OUT}")


@final
@dataclass(frozen=True)
class Rule:
    """What a call does.

    Attributes:
        apply: On the moments of its inputs, with the prior of its weights.
        roles: Of the result's axes.
        units: What is known of the result's units.
        mixes: Whether it needs pairs of positions.
        forgets: Whether it never needs pairs of positions: its result has none, or independent ones.
        attends: Whether it needs, of its first input, the covariances of all positions within each network input.
        fan_in: Of a layer with weights.
        bias: Whether that has one.
    """

    apply: Apply
    roles: tuple[str, ...]
    units: Units
    mixes: bool = False
    forgets: bool = False
    attends: bool = False
    fan_in: int | None = None
    bias: bool = False
