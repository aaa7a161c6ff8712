"""What a solver says about a solve: the value, and what happened to each column."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from torch import Tensor

from gpntk.errors import SolveError


class Outcome(Enum):
    """How a solve ended; the value is the advice that goes with it."""

    CONVERGED = "the tolerance was reached."
    STAGNATED = (
        "the residual stopped falling: the system is too ill-conditioned for its precision. Use a larger noise "
        "variance; with an iterative solver also float64 inputs, or a direct solver."
    )
    EXHAUSTED = "max_iterations were made: allow more, raise the preconditioner's rank, or use a direct solver."
    NOT_POSITIVE = (
        "the matrix is not positive definite in this precision. Use a larger noise variance; with an iterative solver "
        "also float64 inputs."
    )
    NOT_FINITE = "NaN or infinite values appeared: check inputs, targets, noise and hyperparameters."


class SolveResult(NamedTuple):
    """The solution of a linear system, column by column.

    Attributes:
        value: The solution `[K, n]`, one column of the right-hand side per row, in float64; the best there is where
            the outcome is not ``CONVERGED``.
        outcomes: What happened to each column, `K` of them.
        iterations: Products with the matrix that were made (0 for a factorisation).
        residual_norms: What the tolerance is compared with `[K]`, computed in float64 after the fact on the whitened
            system: the residual over the right-hand side, or in weight space the error over the solution (estimated).
    """

    value: Tensor
    outcomes: tuple[Outcome, ...]
    iterations: int
    residual_norms: Tensor

    @property
    def outcome(self) -> Outcome:
        """``CONVERGED`` if all columns are, else the first other one."""
        return next((outcome for outcome in self.outcomes if outcome is not Outcome.CONVERGED), Outcome.CONVERGED)

    def checked(self) -> Tensor:
        """The solution, or an error that says which columns failed and what helps.

        Raises:
            SolveError: A column did not converge.
        """
        if self.outcome is Outcome.CONVERGED:
            return self.value
        failed = [index for index, outcome in enumerate(self.outcomes) if outcome is not Outcome.CONVERGED]
        worst = self.residual_norms[failed].max().item()
        raise SolveError(
            f"{len(failed)} of {len(self.outcomes)} columns were not solved ({self.outcome.name}, relative residual "
            f"{worst:.1e} after {self.iterations} iterations): {self.outcome.value}"
        )
