"""Conjugate gradients on I + Ψ Ψᵀ or I + Ψᵀ Ψ, preconditioned, refined in float64, with certified errors.

Iterations run in the precision of the data; after each run the true residual is computed in float64 and, if need be,
the system is solved again for it (iterative refinement): a residual of float64 at about the cost of float32.

All eigenvalues of the matrix A are at least 1. For x ≈ A⁻¹ b with residual r = b - A x, the error e = A⁻¹ r has

    |Ψ e|² <= eᵀA e = rᵀA⁻¹r (weight space),    bᵀA⁻¹b - (xᵀb + xᵀr) = rᵀA⁻¹r,    rᵀA⁻¹r <= |r|²,

so that one number, the error in the norm of A, says how far fitted values and variances are off. It is bounded by the
residual's norm, and estimated more closely by the preconditioner M = R Rᵀ: rᵀA⁻¹r <= |R⁻¹ r|² / a, with a the smallest
eigenvalue of R⁻¹ A R⁻ᵀ, for which the smallest Ritz value of the iterations stands.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, final

import torch
from torch import Tensor

from gpntk._checks import check_count, check_positive
from gpntk.cost import Cost
from gpntk.errors import InputError
from gpntk.inference.checkpoint import SolveCheckpoint
from gpntk.inference.conjugate_gradients import (
    conjugate_gradients,
    function_derivatives,
    logdet_by_quadrature,
    row_norms,
    signs,
    smallest_ritz_value,
)
from gpntk.inference.covariance import AbstractCovariance
from gpntk.inference.direct import not_in_function_space
from gpntk.inference.outcome import Outcome, SolveResult
from gpntk.inference.preconditioners import AbstractPreconditioner, Nystrom
from gpntk.inference.solver import AbstractInverse, AbstractSolver, LogDet, Solution, SolverChoice, refuse_sharded
from gpntk.inference.system import Sizes, Space, WhitenedSystem
from gpntk.memory import chunks

# What one run of iterations is asked to reduce the residual by: float32 can, and float64 has no need for less.
_REDUCTION = {torch.float32: 1e-4, torch.float64: 1e-10}
# A refinement that reduces the residual by less than the second has met the limit of its precision.
_REFINEMENTS, _PROGRESS = 12, 0.5
# A run is asked for so much at least, for what is left is known to an estimate only; and where no end is in sight.
_LEAST, _FIRST = 0.1, 1e-4
# Ritz values approach the smallest eigenvalue from above: errors estimated by them are taken for twice as large.
_SAFETY = 2.0
# Vectors of conjugate gradients and of its refinement that live at once, for each right-hand side.
_VECTORS = 8
# Error of a mean in weight space, in posterior standard deviations: |ψ e| <= (ψ A⁻¹ ψᵀ)^(1/2) (eᵀA e)^(1/2). An error
# small beside the data may be large in directions that these say nothing of.
_STANDARD_DEVIATIONS = 0.01
# No error is asked for that is smaller than so much of the solution: right-hand sides may have other units.
_SMALLEST = 1e-9
# Single rows are known less well than their sum: so many times more probes for them.
_ROW_PROBES = 4
# Relative rounding of a difference of variances in float64.
_ROUNDING = 1e-13


@final
@dataclass(frozen=True)
class ConjugateGradients(AbstractSolver):
    """Preconditioned conjugate gradients, in the space of the preconditioner.

    Attributes:
        preconditioner: `Nystrom` (function space), `SampledGram` or ``Nystrom(space="weight")``
            (weight space).
        tolerance: Of means: in function space the residual's norm over that of the right-hand side, in weight space
            the error over the solution, in the norm of A.
        variance_tolerance: Relative error of posterior standard deviations.
        max_iterations: Of one solve.
        probes: Random vectors that estimate the log-determinant and its derivatives; always the same ones.
        seed: Of the probes.
        checkpoint: A file for the solution so far of the first solve after `prepare`, which is a posterior's mean. A
            new process with the same data and settings goes on from it; it is not for fits, which solve many systems.
        checkpoint_iterations: How often it is written; also after each refinement.

    References:
        Gardner et al. (2018), GPyTorch: Blackbox Matrix-Matrix Gaussian Process Inference, https://arxiv.org/abs/1809.11165.
        Higham (2002), Accuracy and Stability of Numerical Algorithms, chapter 12 (iterative refinement).
    """

    preconditioner: AbstractPreconditioner = field(default_factory=Nystrom)
    tolerance: float = 1e-7
    variance_tolerance: float = 1e-3
    max_iterations: int = 1000
    probes: int = 16
    seed: int = 0
    checkpoint: str | os.PathLike[str] | None = None
    checkpoint_iterations: int = 100

    def __post_init__(self) -> None:
        check_positive(1.0, tolerance=self.tolerance, variance_tolerance=self.variance_tolerance)
        check_count(max_iterations=self.max_iterations, probes=self.probes)
        check_count(checkpoint_iterations=self.checkpoint_iterations)
        check_count(0, seed=self.seed)
        if not isinstance(self.preconditioner, AbstractPreconditioner):
            raise InputError(f"preconditioner={self.preconditioner!r}: give an object, Nystrom() say.")

    def prepare(self, system: WhitenedSystem, many: bool = False) -> AbstractInverse:  # noqa: ARG002
        if self.preconditioner.space == "function":
            refuse_sharded(system, self)
        return _IterativeInverse(system, self)

    @property
    def is_direct(self) -> bool:
        return False

    def select(self, system: WhitenedSystem, many: bool = False) -> SolverChoice:  # noqa: ARG002
        return SolverChoice(self)

    def cost(self, sizes: Sizes) -> Cost:
        counted, space = self.preconditioner.counted(sizes), self.preconditioner.space
        fits = 1.5 * counted.kept <= 2 * sizes.budget and not (sizes.sharded and space == "function")
        steps = (sizes.product + counted.each).times(counted.iterations * sizes.columns)
        name = f"CG, {type(self.preconditioner).__name__}, {space} space"
        return Cost(name, counted.once, steps, counted.kept, fits)


class _Refined(NamedTuple):
    """x, residual b - A x in float64, what happened, and iterations."""

    value: Tensor
    residual: Tensor
    outcomes: list[Outcome]
    iterations: int


@final
class _IterativeInverse(AbstractInverse):
    """A⁻¹ by conjugate gradients on R⁻¹ A R⁻ᵀ, with M = R Rᵀ the preconditioner."""

    def __init__(self, system: WhitenedSystem, solver: ConjugateGradients) -> None:
        super().__init__(system)
        self._solver = solver
        self._space: Space = solver.preconditioner.space
        self._factor = solver.preconditioner.prepare(system)
        self._product = system.product(self._space)
        self._exact_product = self.exact.product(self._space)
        self._floor = 1.0
        self._path = solver.checkpoint

    # --- solves ------------------------------------------------------------------------------------------------

    def whitened(self, rhs: Tensor) -> Solution:
        if self._space == "weight":
            gradient = self.exact.adjoint(rhs)
            wanted = self._wanted_energy(gradient, self._solver.tolerance, _STANDARD_DEVIATIONS)
            refined = self._refine(gradient, wanted, self._checkpoint(rhs))
            relative = self._error(refined.residual) / self._energy(gradient, *refined[:2]).sqrt()
            dual, primal = rhs - self.exact.apply(refined.value), refined.value
            quad = self.primal_quad(dual, primal)
        else:
            norms = row_norms(rhs)
            wanted = lambda _x, r: self._solver.tolerance * norms / row_norms(r)  # noqa: E731
            refined = self._refine(rhs, wanted, self._checkpoint(rhs))
            relative, dual = row_norms(refined.residual) / norms, refined.value
            _, primal, energy = self.image(dual)
            quad = self.dual_quad(rhs, dual, energy)
        # A column of zeros has no residual to be compared with itself.
        relative = torch.where(relative.isnan() & (row_norms(refined.residual) == 0), 0.0, relative)
        return Solution(dual, primal, tuple(refined.outcomes), refined.iterations, relative, quad)

    def _checkpoint(self, rhs: Tensor) -> SolveCheckpoint | None:
        """Where the first solve is kept."""
        path, self._path = self._path, None
        return None if path is None else SolveCheckpoint(path, self.system, self._space, rhs)

    def _error(self, residual: Tensor) -> Tensor:
        """About (rᵀA⁻¹r)^(1/2) `[K]`: the norm of r bounds it, and that of R⁻¹ r over √a, a the smallest Ritz value."""
        return torch.minimum(row_norms(residual), _SAFETY * self._halved_norms(residual) / self._floor**0.5)

    def _halved_norms(self, residual: Tensor) -> Tensor:
        """|R⁻¹ r| `[K]`, what the iterations reduce."""
        norms = row_norms(residual)
        scales = torch.where(norms > 0, norms, 1.0)
        return scales * row_norms(self._factor.half((residual / scales.unsqueeze(-1)).to(self.system.covariance.dtype)))

    def _energy(self, rhs: Tensor, value: Tensor, residual: Tensor) -> Tensor:
        """About bᵀA⁻¹b `[K]`: from below by the present x, or by the preconditioner at the start."""
        energy = (value * (rhs + residual)).sum(-1)
        return torch.where(energy > 0, energy, self._error(rhs).square())

    def _wanted_energy(
        self, rhs: Tensor, accuracy: float, most: float = torch.inf
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Reduce the error until it is ``accuracy`` times the solution's norm and ``most``, in the norm of A."""

        def factor(x: Tensor, r: Tensor) -> Tensor:
            norm = self._energy(rhs, x, r).sqrt()
            return torch.minimum(accuracy * norm, (_SMALLEST * norm).clamp_min(most)) / self._error(r)

        return factor

    def _refine(
        self, rhs: Tensor, wanted: Callable[[Tensor, Tensor], Tensor], checkpoint: SolveCheckpoint | None = None
    ) -> _Refined:
        """A⁻¹ b `[K, n]`; ``wanted(x, r)`` `[K]` says by which factor the residuals are still to be reduced."""
        value, residual, iterations = torch.zeros_like(rhs), rhs, 0
        # What other solves have found must not change this one.
        self._floor = 1.0
        if checkpoint is not None:
            value, iterations = checkpoint.load()
            residual = rhs - value - self._exact_product(value) if iterations else rhs
        outcomes = [Outcome.EXHAUSTED] * rhs.shape[0]
        open_columns = torch.arange(rhs.shape[0], device=rhs.device)
        previous = torch.full_like(rhs[:, 0], torch.inf)
        for refinement in range(_REFINEMENTS + 1):
            norms = self._halved_norms(residual)
            factor = torch.where(norms == 0, torch.inf, wanted(value, residual)).nan_to_num(nan=0.0, posinf=torch.inf)
            open_columns = self._close(open_columns, norms, factor, previous, outcomes)
            spent = refinement == _REFINEMENTS or iterations >= self._solver.max_iterations
            if not open_columns.numel() or spent:
                break
            reduction = torch.where(factor > 0, 0.5 * factor, _FIRST)[open_columns]
            reduction = reduction.clamp(_REDUCTION[self.system.covariance.dtype], _LEAST)
            keep = None if checkpoint is None else partial(checkpoint.add, open_columns)
            most = self._solver.max_iterations - iterations
            step, made, failures = self._run(residual[open_columns], reduction, most, keep)
            value = value.index_add(0, open_columns, step)
            # From the solution itself: a residual carried along would not show the rounding of the steps before.
            present = value[open_columns]
            residual = residual.index_copy(0, open_columns, rhs[open_columns] - present - self._exact_product(present))
            iterations += made
            # What was cut short has not stopped falling.
            previous = norms if iterations < self._solver.max_iterations else norms.new_full(norms.shape, torch.inf)
            if checkpoint is not None:
                checkpoint.save(value, iterations)
            for column, outcome in zip(open_columns.tolist(), failures, strict=True):
                # What a run takes for convergence is for the residual to say.
                outcomes[column] = Outcome.EXHAUSTED if outcome is Outcome.CONVERGED else outcome
        return _Refined(value, residual, outcomes, iterations)

    @staticmethod
    def _close(columns: Tensor, norms: Tensor, factor: Tensor, previous: Tensor, outcomes: list[Outcome]) -> Tensor:
        """The columns that need another refinement; the outcome of the others."""
        remaining = []
        for column in columns.tolist():
            if not bool(norms[column].isfinite()):
                outcomes[column] = Outcome.NOT_FINITE
            elif bool(factor[column] >= 1):
                outcomes[column] = Outcome.CONVERGED
            elif outcomes[column] is not Outcome.NOT_POSITIVE and bool(norms[column] <= _PROGRESS * previous[column]):
                remaining.append(column)
            elif outcomes[column] is not Outcome.NOT_POSITIVE:
                outcomes[column] = Outcome.STAGNATED
        return torch.tensor(remaining, dtype=torch.long, device=columns.device)

    def _run(
        self, residual: Tensor, reduction: Tensor, most: int, keep: Callable[[int, Tensor], None] | None
    ) -> tuple[Tensor, int, list[Outcome]]:
        """About A⁻¹ r, in the precision of the data, for columns scaled to norm one; ``keep`` is shown some steps."""
        scales = row_norms(residual)
        rhs = self._factor.half((residual / scales.unsqueeze(-1)).to(self.system.covariance.dtype))

        def solution(v: Tensor) -> Tensor:
            return self._factor.half_transposed(v).to(self.dtype) * scales.unsqueeze(-1)

        def observe(iteration: int, v: Tensor) -> None:
            if keep is not None and iteration % self._solver.checkpoint_iterations == 0:
                keep(iteration, solution(v))

        run = conjugate_gradients(self._split, rhs, reduction * row_norms(rhs), most, observe)
        self._floor = min(self._floor, smallest_ritz_value(run))
        return solution(run.value), run.iterations, run.outcomes

    def _split(self, v: Tensor) -> Tensor:
        """R⁻¹ A R⁻ᵀ v."""
        inner = self._factor.half_transposed(v)
        return self._factor.half(inner + self._product(inner))

    # --- determinants ------------------------------------------------------------------------------------------

    def logdet(self, by_row: bool = True, derivatives: bool = True) -> LogDet:
        # log|A| = log|M| + log|R⁻¹ A R⁻ᵀ|, the first exact, the second by quadrature on probes z. With y = R⁻ᵀ z and
        # x = A⁻¹ R z: E[y xᵀ] = A⁻¹ and E[y yᵀ] = M⁻¹, so traces are the preconditioner's, exact, plus a small rest.
        covariance, size = self.system.covariance, self.system.size(self._space)
        probes = signs(self._solver.probes, size, self._solver.seed).to(covariance.device, covariance.dtype)
        run = conjugate_gradients(self._split, probes, 1e-4 * row_norms(probes), self._solver.max_iterations)
        SolveResult(run.value, tuple(run.outcomes), run.iterations, torch.full_like(row_norms(probes), 1e-4)).checked()
        value, error = logdet_by_quadrature(run, size)
        value = self._factor.logdet().to(self.dtype) + value
        if not derivatives:
            return LogDet(value, standard_error=error)
        y = self._factor.half_transposed(probes)
        rest = self._factor.half_transposed(run.value) - y
        diagonal = (self._factor.inverse_diagonal() + (y * rest).mean(0)).to(self.dtype)
        if self._space == "weight":
            return LogDet(value, *self._weight_derivatives(diagonal, by_row), error)
        return LogDet(value, *function_derivatives(self.system, self._factor, diagonal, y, rest), error)

    def _weight_derivatives(self, diagonal: Tensor, by_row: bool) -> tuple[Tensor, Tensor]:
        by_variance = self.exact.weighted.by_group(1 - diagonal)
        if self.exact.homoscedastic:
            return by_variance, self.exact.observed - (1 - diagonal).sum(0, keepdim=True)
        if not by_row:
            return by_variance, torch.zeros(self.exact.size("function"), dtype=self.dtype, device=diagonal.device)
        # diag B⁻¹ `[m]`, estimated by probes of function space; tr (I - B⁻¹) is known better.
        reductions = 1 - self.inverse_blocks().diagonal(dim1=-2, dim2=-1).flatten().clamp(0, 1)
        total = self.exact.covariance.total(reductions.sum())
        return by_variance, 1 - reductions * (1 - diagonal).sum() / torch.where(total > 0, total, 1.0)

    def precision(self) -> Tensor:
        covariance = self.exact.covariance
        return self.solve(torch.eye(covariance.num_rows, dtype=self.dtype, device=covariance.device)).checked()

    def inverse_blocks(self) -> Tensor:
        # E[z (B⁻¹ z)ᵀ] = B⁻¹ for probes z of entries ±1, whose blocks of one input are told apart by their signs.
        width, covariance = self.exact.likelihood.width, self.exact.covariance
        rank = 0 if covariance.features is None else covariance.features.ranks.rank
        count, size = _ROW_PROBES * self._solver.probes, self.exact.size("function")
        probes = signs(count, size, self._solver.seed + 1 + rank).to(covariance.device, self.dtype)
        solution = self.whitened(probes)
        solved = solution.result(solution.dual).checked().unflatten(-1, (-1, width))
        blocks = torch.einsum("knp,knq->npq", probes.unflatten(-1, (-1, width)), solved) / count
        return (blocks + blocks.mT) / 2

    # --- posterior ---------------------------------------------------------------------------------------------

    def covariance(self, x: Tensor, close: bool = False) -> Tensor:
        # First derivatives follow from the features of x alone: at the solution, those of the solve cancel.
        if self._space == "weight":
            psi = self.exact.weighted.rows(x)
            found = self._columns(psi.detach().flatten(0, 1), self._allowed(close))
            columns, residual = (rows.unflatten(0, (x.shape[0], -1)) for rows in found)
            # ψ A⁻¹ ψᵀ = X ψᵀ + ψ Xᵀ - X A Xᵀ + R A⁻¹ Rᵀ with A Xᵀ = ψᵀ - Rᵀ.
            quadratic = columns @ (psi.detach() - residual).mT
            return columns @ psi.mT + psi @ columns.mT - (quadratic + quadratic.mT) / 2
        return self.reduced(self.exact.covariance.cross(x), self.exact.covariance.prior(x), close)

    def reduced(self, cross: Tensor, prior: Tensor, close: bool = False) -> Tensor:
        if self._space == "weight":
            raise not_in_function_space()
        cross, batch = self.exact.likelihood.whiten(cross), cross.shape[0]
        variances = prior.detach().diagonal(dim1=-2, dim2=-1).flatten()
        found = self._duals(cross.detach().flatten(0, 1), variances, self._allowed(close))
        columns, residual = (rows.unflatten(0, (batch, -1)) for rows in found)
        quadratic = columns @ (cross.detach() - residual).mT
        return prior - columns @ cross.mT - cross @ columns.mT + (quadratic + quadratic.mT) / 2

    def _allowed(self, close: bool) -> float:
        """Error of a variance, relative."""
        return self._solver.tolerance**2 if close else 2 * self._solver.variance_tolerance

    def columns(self, x: Tensor, functions: AbstractCovariance) -> Tensor:
        # Means are made of these columns, and an error here is one of first order: it is for the means' tolerance.
        squared = self._solver.tolerance**2
        if self._space == "weight":
            weighted = self.exact.weighted
            return self._columns(weighted.rows(x.unsqueeze(0)).squeeze(0), squared)[0] * weighted.scales
        variances = self.exact.covariance.prior(x.unsqueeze(1)).diagonal(dim1=-2, dim2=-1).flatten()
        return self.prior_columns(x, self._duals(self.cross(x.unsqueeze(0)), variances, squared)[0], functions)

    def _columns(self, psi: Tensor, allowed: float) -> tuple[Tensor, Tensor]:
        """A⁻¹ ψᵀ `[K, F]` in weight space and its residual; ψ A⁻¹ ψᵀ made of both is off by ``allowed`` of itself."""
        accuracy = allowed**0.5
        # To the last bit the same in all processes, which decide by it.
        psi = self.exact.weighted.features.ranks.first(psi)
        return self._in_pieces(psi, lambda rows: self._wanted_energy(psi[rows], accuracy))

    def _duals(self, cross: Tensor, prior: Tensor, allowed: float) -> tuple[Tensor, Tensor]:
        """A⁻¹ b `[K, n]` in function space and its residual; prior - b A⁻¹ bᵀ is off by ``allowed`` of itself."""

        def wanted(rows: slice) -> Callable[[Tensor, Tensor], Tensor]:
            def factor(x: Tensor, r: Tensor) -> Tensor:
                # The difference is known to rounding only.
                variance = prior[rows] - (x * (cross[rows] + r)).sum(-1)
                variance = torch.maximum(variance, _ROUNDING * prior[rows])
                return (allowed / (1 + allowed) * variance).sqrt() / self._error(r)

            return factor

        return self._in_pieces(cross, wanted)

    def _in_pieces(
        self, rhs: Tensor, wanted: Callable[[slice], Callable[[Tensor, Tensor], Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Solutions and residuals for the rows of ``rhs``, as many at a time as the memory budget holds."""
        values, residuals = [], []
        for rows in chunks(rhs.shape[0], _VECTORS * 8 * rhs.shape[1], self.system.covariance.memory_budget):
            refined = self._refine(rhs[rows], wanted(rows))
            relative = row_norms(refined.residual) / row_norms(rhs[rows])
            SolveResult(refined.value, tuple(refined.outcomes), refined.iterations, relative).checked()
            values.append(refined.value)
            residuals.append(refined.residual)
        return torch.cat(values), torch.cat(residuals)
