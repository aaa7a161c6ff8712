"""What a solver is: a recipe that prepares the inverse of a system, and counts what that costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from gpntk.cost import Cost, Work
from gpntk.errors import InputError
from gpntk.inference.inverse import AbstractInverse
from gpntk.inference.system import NoisySystem


class Sizes(NamedTuple):
    """What the costs of solvers are counted from.

    Attributes:
        rows: n = N*C, over all processes; features: F; groups: G; columns: right-hand sides to be solved.
        itemsize: Bytes of a value of the data.
        gram: Work of the Gram matrix.
        product: Work of one product with Ψ Ψᵀ and one column.
        budget: Bytes that may be used.
        sharded: Whether rows are spread over processes.
    """

    rows: int
    features: int
    groups: int
    columns: int
    itemsize: int
    gram: Work
    product: Work
    budget: int
    sharded: bool


def refuse_sharded(system: NoisySystem, solver: object) -> None:
    """Raise if rows are spread over processes, for a solver that needs them all in one."""
    if system.features.sharded:
        raise InputError(
            f"{solver} works in function space, which needs all rows in one process: for sharded features take "
            "WeightSpace(), ConjugateGradients(SampledGram()) or ConjugateGradients(Nystrom(space='weight'))."
        )


class AbstractSolver(ABC):
    """A way to invert K + D."""

    @abstractmethod
    def prepare(self, system: NoisySystem, many: bool = False) -> AbstractInverse:
        """The inverse of ``system``; ``many``: other hyperparameters for the same data will follow."""

    @abstractmethod
    def cost(self, sizes: Sizes) -> Cost:
        """Work and memory, counted."""
