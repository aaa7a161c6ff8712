"""What a solver is: a recipe that prepares a system and counts what that costs; and what it prepares, B⁻¹ or A⁻¹."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from gpntk.cost import Cost, table
from gpntk.errors import InputError
from gpntk.inference.covariance import AbstractCovariance
from gpntk.inference.features import exact_dtype
from gpntk.inference.outcome import Outcome, SolveResult
from gpntk.inference.preconditioners import nystrom
from gpntk.inference.system import Sizes, WhitenedSystem

_NONE = torch.zeros(0, device="cpu")


class LogDet(NamedTuple):
    """log|B| = log|I + K Λ| and its derivatives.

    Attributes:
        value: In nats `[]`.
        by_variance: Derivative with respect to the logarithm of every prior variance, in the shape of these (empty for
            a dense covariance).
        by_noise: That of log|K + D| with respect to the logarithm of every noise variance, in the shape of the noise:
            diag B⁻¹ `[n]`, or its sum `[1]`; diag B⁻¹ `[m]` for noise in blocks.
        standard_error: Of ``value``, where it is estimated; else 0.
    """

    value: Tensor
    by_variance: Tensor = _NONE
    by_noise: Tensor = _NONE
    standard_error: float = 0.0


class Solution(NamedTuple):
    """The solution of a whitened system, exact up to the solve that made it.

    Attributes:
        dual: B⁻¹ b `[K, m]`.
        primal: Ψᵀ dual = A⁻¹ Ψᵀ b `[K, F]`; None for a dense covariance.
        outcomes: Of each column; iterations: Products made; residual_norms: relative to b `[K]`.
        quad: bᵀ dual `[K]`, off by the square of what dual is off by.
    """

    dual: Tensor
    primal: Tensor | None
    outcomes: tuple[Outcome, ...]
    iterations: int
    residual_norms: Tensor
    quad: Tensor

    def result(self, value: Tensor) -> SolveResult:
        """``value``, made of this solution, with what is said of it."""
        return SolveResult(value, self.outcomes, self.iterations, self.residual_norms)


class AbstractInverse(ABC):
    """A `WhitenedSystem` that is ready to be solved; all numbers that leave it are float64.

    Args:
        system: In the precision of the data.
    """

    def __init__(self, system: WhitenedSystem) -> None:
        self.system = system
        self.dtype = exact_dtype(system.covariance.device)
        self.exact = system.to(self.dtype)

    # --- what differs ------------------------------------------------------------------------------------------

    @abstractmethod
    def whitened(self, rhs: Tensor) -> Solution:
        """Solve the whitened system: B⁻¹ b for b `[K, m]`."""

    @abstractmethod
    def logdet(self, by_row: bool = True, derivatives: bool = True) -> LogDet:
        """log|B| with derivatives; those with respect to a noise per row, which cost, only if ``by_row``."""

    @abstractmethod
    def precision(self) -> Tensor:
        """The inverse of the covariance of targets, (K + Λ⁻¹)⁻¹ = R B⁻¹ Rᵀ `[n, n]`, in new memory."""

    @abstractmethod
    def inverse_blocks(self) -> Tensor:
        """Diagonal blocks of B⁻¹, one for each input `[N, q, q]`; `[n, 1, 1]` for noise by row."""

    @abstractmethod
    def covariance(self, x: Tensor, close: bool = False) -> Tensor:
        """Posterior covariance of f(x) `[B, T*C, T*C]` for x `[B, T, D]`; differentiable in x to first order.

        With ``close``, good enough for something nearly as large to be taken from it.
        """

    @abstractmethod
    def reduced(self, cross: Tensor, prior: Tensor, close: bool = False) -> Tensor:
        """The same from k(x, X) `[B, T*C, n]` and k(x, x) `[B, T*C, T*C]`, where the method works in function space."""

    @abstractmethod
    def columns(self, x: Tensor, functions: AbstractCovariance) -> Tensor:
        """The functions cov(f(·), f(x) | data) for x `[T, D]`, by their coefficients in ``functions.widened(x)``.

        `[T*C, F]`: S^½ A⁻¹ S^½ J(x)ᵀ; for a dense covariance `[T*C, n' + T*C]`, over the data of ``functions`` and x.
        """

    # --- what follows ------------------------------------------------------------------------------------------

    def primal_quad(self, dual: Tensor, primal: Tensor) -> Tensor:
        """bᵀ B⁻¹ b `[K]` = min over p of |b - Ψ p|² + |p|², near its minimum, for dual = b - Ψ primal."""
        return self.exact.covariance.total(dual.square().sum(-1)) + primal.square().sum(-1)

    def image(self, dual: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Rᵀ K R u `[K, m]`, Ψᵀ u `[K, F]` where there are features, and uᵀ Rᵀ K R u `[K]`, for u = ``dual``."""
        if self.exact.covariance.features is None:
            image = self.exact.product("function")(dual)
            return image, None, (dual * image).sum(-1)
        primal = self.exact.adjoint(dual)
        return self.exact.apply(primal), primal, primal.square().sum(-1)

    def dual_quad(self, rhs: Tensor, dual: Tensor, energy: Tensor) -> Tensor:
        """bᵀ B⁻¹ b `[K]` = max over u of 2 bᵀu - |u|² - uᵀ Rᵀ K R u, near its maximum u = dual; the last is energy."""
        return self.exact.covariance.total((dual * (2 * rhs - dual)).sum(-1)) - energy

    def solve(self, rhs: Tensor) -> SolveResult:
        """Solve with the covariance of targets: (K + Λ⁻¹)⁻¹ b = R B⁻¹ Rᵀ b for b `[K, n]`."""
        solution = self.whitened(self.exact.likelihood.whiten(rhs.to(self.dtype)))
        return solution.result(self.exact.likelihood.unwhiten(solution.dual))

    def coefficients(self, solution: Solution) -> Tensor:
        """Of the functions k(·, X) R dual: S^½ primal `[K, F]`, or R dual `[K, n]` for a dense covariance."""
        if solution.primal is None:
            return self.exact.likelihood.unwhiten(solution.dual)
        return solution.primal * self.exact.weighted.scales

    def directions(self, rank: int) -> Tensor:
        """V diag(λ / (1 + λ))^½, for about the largest ``rank`` eigenpairs of Ψᵀ Ψ, as rows `[r, F]`.

        A Nyström approximation, which is from below: so is the reduction of variances made from it.
        """
        like = self.exact.weighted.scales.new_empty(self.exact.size("weight"))
        values, vectors = nystrom(self.exact.product("weight"), like, rank, 0.0, seed=0)
        return (vectors * (values / (1 + values)).sqrt()).mT

    def cross(self, x: Tensor) -> Tensor:
        """k(x, X) R `[B*T*C, m]` for x `[B, T, D]`: prior covariance with the whitened data."""
        return self.exact.likelihood.whiten(self.exact.covariance.cross(x)).flatten(0, 1)

    def prior_columns(self, x: Tensor, duals: Tensor, functions: AbstractCovariance) -> Tensor:
        """`columns` from B⁻¹ Rᵀ k(X, x) as rows `[T*C, m]`."""
        explained = self.exact.covariance.coefficients(self.exact.likelihood.unwhiten(duals))
        return functions.representers(x) - functions.padded(explained, x)


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
