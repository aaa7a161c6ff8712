"""What a solver is: a recipe that prepares a system, and counts what that costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from gpntk.cost import Cost, table
from gpntk.errors import InputError
from gpntk.inference.inverse import AbstractInverse
from gpntk.inference.system import Sizes, WhitenedSystem


class AbstractSolver(ABC):
    """A way to solve a `WhitenedSystem`: a space and a method."""

    @abstractmethod
    def prepare(self, system: WhitenedSystem, many: bool = False) -> AbstractInverse:
        """``system``, ready to be solved; ``many``: other hyperparameters for the same data will follow."""

    @abstractmethod
    def cost(self, sizes: Sizes) -> Cost:
        """Work and memory, counted."""

    @abstractmethod
    def select(self, system: WhitenedSystem, many: bool = False) -> SolverChoice:
        """The solver that would be in charge: this one, or what an automatic choice chooses."""

    @property
    @abstractmethod
    def is_direct(self) -> bool:
        """Whether a factorisation is made, which has no tolerance."""


class SolverChoice(NamedTuple):
    """A solver, the reason it was chosen, and what each would have cost; ``print`` shows them."""

    solver: AbstractSolver
    reason: str = "asked for."
    costs: tuple[Cost, ...] = ()

    def __str__(self) -> str:
        lines = f"{type(self.solver).__name__}: {self.reason}"
        return f"{lines}\n{table(self.costs)}" if self.costs else lines


def refuse_sharded(system: WhitenedSystem, solver: object) -> None:
    """Raise if rows are spread over processes, for a solver that needs them all in one."""
    if system.covariance.sharded:
        raise InputError(
            f"{solver} works in function space, which needs all rows in one process: for sharded features take "
            "WeightSpace(), ConjugateGradients(SampledGram()) or ConjugateGradients(Nystrom(space='weight'))."
        )
