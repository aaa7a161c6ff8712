"""The recursion of one network: its calls as steps, what each does, and what is known of the values between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, NamedTuple, final

from torch import nn

from gpntk.errors import UnsupportedLayerError
from gpntk.infinite.moments import LayerMoments

WAY_OUT = "gpntk.infinite.monte_carlo estimates the kernels of any architecture."


class Law(IntEnum):
    """How the units of a value are distributed; each law has the properties of those before it."""

    ANY = 0
    """By their second moments only, such as the outputs of an activation."""
    CENTRED = 1
    """With mean zero, such as two layers beside each other, whose variances may differ."""
    GAUSSIAN = 2
    """Independent draws of one Gaussian process of mean zero, such as the outputs of a layer with weights."""


@final
@dataclass(frozen=True)
class Units:
    """What is known of one value's units beyond their second moments, which decides what may be done with them.

    Attributes:
        law: How every unit is distributed.
        sources: Names of the layers with weights whose outputs it is made of, ``"input"`` for the network's input.
            Values without a common source are uncorrelated: the last weights of either are independent of the other.
    """

    law: Law
    sources: frozenset[str]

    @classmethod
    def drawn_by(cls, layer: str) -> Units:
        """The units that a layer with weights returns."""
        return cls(Law.GAUSSIAN, frozenset({layer}))

    @classmethod
    def together(cls, units: Sequence[Units]) -> Units:
        """The units of a value that is made of several."""
        return cls(min(entry.law for entry in units), frozenset().union(*(entry.sources for entry in units)))

    def at_most(self, law: Law) -> Units:
        """The same units where no more than ``law`` is known any more."""
        return Units(min(self.law, law), self.sources)


INPUT = Units(Law.ANY, frozenset({"input"}))
"""The units of the network's input, which is no random variable."""


@final
@dataclass(frozen=True)
class Call:
    """One call in ``forward``.

    Attributes:
        name: Its qualified name.
        module: The module that is called, if it is one.
        args: As given, with nodes for tensors.
        kwargs: Likewise.
        roles: What the axes of every tensor argument are: ``"n"``, ``"c"``, ``"s0"``, ``"s1"``.
        units: What is known of the units of every tensor argument.
        shapes: Shapes of the tensor arguments.
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
        """Raise unless the first tensor has axes rows, channels, positions."""
        if self.roles[0] != ("n", "c", *self.positions):
            raise self.refuse(f"its input must have axes rows, channels, positions, not {self.roles[0]}")

    def refuse(self, reason: str) -> UnsupportedLayerError:
        """The error to be raised."""
        return UnsupportedLayerError(f"{self.name}: {reason}. {WAY_OUT}")


@final
@dataclass(frozen=True)
class Rule:
    """What a call of the network does to the moments of its inputs.

    Attributes:
        apply: Maps the moments of its inputs, and the `Weights` of a layer that has some, to those of its result.
        roles: What the result's axes are.
        units: What is known of the result's units.
        mixes: Whether it needs pairs of positions.
        forgets: Whether it never needs pairs of positions: its result has none, or independent ones.
        attends: Whether it needs, of its first input, the covariances of all positions within each network input.
        fan_in: Number of inputs of a layer with weights.
        bias: Whether that has one.
    """

    apply: Callable[..., LayerMoments]
    roles: tuple[str, ...]
    units: Units
    mixes: bool = False
    forgets: bool = False
    attends: bool = False
    fan_in: int | None = None
    bias: bool = False

    @property
    def asks_variances(self) -> bool:
        """Whether it may ask for the variances of its inputs: no layer with weights does, and no mean of positions."""
        return self.attends or not (self.mixes or self.forgets or self.fan_in is not None)


class Step(NamedTuple):
    """One call: what it does to the moments of its inputs, and which earlier values those are."""

    rule: Rule
    inputs: tuple[int, ...]
    layer: int | None


@final
@dataclass(frozen=True)
class Program:
    """The recursion of one network.

    Attributes:
        steps: In order; value 0 is the input, value i + 1 the result of step i.
        pairs: Whether each value is needed at pairs of positions.
        layers: Names of the layers with weights.
        fan_ins: Their numbers of inputs.
        biases: Whether they have a bias.
        input_shape: Shape of one input.
        channels_last: Whether its channels are the last axis, not the first.
        most_positions: The largest number of positions that a value has.
    """

    steps: tuple[Step, ...]
    pairs: tuple[bool, ...]
    layers: tuple[str, ...]
    fan_ins: tuple[int, ...]
    biases: tuple[bool, ...]
    input_shape: tuple[int, ...]
    channels_last: bool
    most_positions: int

    @property
    def positions(self) -> int:
        """Largest number of positions, or pairs of them, of any value."""
        return self.most_positions ** (2 if any(self.pairs) else 1)

    @cached_property
    def asked(self) -> dict[int, int]:
        """The values whose variances a step may ask for, numbered."""
        values = {index for step in self.steps if step.rule.asks_variances for index in step.inputs}
        return {value: number for number, value in enumerate(sorted(values))}

    @cached_property
    def attended(self) -> frozenset[int]:
        """The values whose positions' covariances decide what a step does."""
        return frozenset(step.inputs[0] for step in self.steps if step.rule.attends)


def paired(steps: Sequence[Step], attended: Set[int] = frozenset()) -> tuple[bool, ...]:
    """Whether each value is needed at pairs of positions so that the last one is known at equal ones.

    Those ``attended`` are needed in any case.
    """
    pairs = [number in attended for number in range(len(steps) + 1)]
    for number in range(len(steps) - 1, -1, -1):
        step = steps[number]
        for index in step.inputs:
            pairs[index] = pairs[index] or step.rule.mixes or (pairs[number + 1] and not step.rule.forgets)
    return tuple(pairs)
