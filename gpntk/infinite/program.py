"""The recursion of one network: its calls as steps, and what is to be known before each."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, final

from gpntk.infinite.calls import Rule


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
        pairs: Of every value, whether it is needed at pairs of positions.
        layers: Names of the layers with weights.
        fan_ins: Their numbers of inputs.
        biases: Whether they have a bias.
        input_shape: Of one input.
        channels_last: Whether its channels are the last axis, not the first.
        most_positions: Of any value.
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
        values = {index for step in self.steps if _asks(step.rule) for index in step.inputs}
        return {value: number for number, value in enumerate(sorted(values))}

    @cached_property
    def attended(self) -> frozenset[int]:
        """The values whose positions' covariances decide what a step does."""
        return frozenset(step.inputs[0] for step in self.steps if step.rule.attends)


def paired(steps: Sequence[Step], attended: Set[int] = frozenset()) -> tuple[bool, ...]:
    """Of every value, whether it is needed at pairs of positions so that the last one is known at equal ones.

    Those ``attended`` are needed in any case.
    """
    pairs = [number in attended for number in range(len(steps) + 1)]
    for number in range(len(steps) - 1, -1, -1):
        step = steps[number]
        for index in step.inputs:
            pairs[index] = pairs[index] or step.rule.mixes or (pairs[number + 1] and not step.rule.forgets)
    return tuple(pairs)


def _asks(rule: Rule) -> bool:
    """Whether it may: not if it is a layer with weights, or takes means of positions."""
    return rule.attends or not (rule.mixes or rule.forgets or rule.fan_in is not None)
