"""What is known of the units of a value beyond their second moments, which decides what may be done with them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import final


@final
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
    """Of one value in ``forward``.

    Attributes:
        law: Of every unit.
        sources: Names of the layers with weights whose outputs it is made of, ``"input"`` for the network's input.
            Values without a common source are uncorrelated: the last weights of either are independent of the other.
    """

    law: Law
    sources: frozenset[str]

    @classmethod
    def drawn_by(cls, layer: str) -> Units:
        """Outputs of a layer with weights."""
        return cls(Law.GAUSSIAN, frozenset({layer}))

    def at_most(self, law: Law) -> Units:
        """The same units where no more than ``law`` is known any more."""
        return Units(min(self.law, law), self.sources)


INPUT = Units(Law.ANY, frozenset({"input"}))
"""Of the network's input, which is no random variable."""


def together(units: list[Units]) -> Units:
    """Of a value that is made of several."""
    return Units(min(entry.law for entry in units), frozenset().union(*(entry.sources for entry in units)))
