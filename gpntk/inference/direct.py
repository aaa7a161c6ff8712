"""Direct solvers: a factorisation of I + Ψ Ψᵀ `[n, n]` or of I + Ψᵀ Ψ `[F, F]`, in float64.

For one prior variance and one noise variance, one eigendecomposition of Φ Φᵀ or ΦᵀΦ serves all values of both; it is
what `prepare` makes when told that many will follow. Otherwise Cholesky.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gpntk.cost import Cost, Work
from gpntk.errors import SolveError
from gpntk.inference.factors import AbstractFactor, CholeskyFactor, SpectralFactor
from gpntk.inference.features import AbstractFeatures, exact_dtype
from gpntk.inference.inverse import AbstractInverse, LogDet, Solution, in_batches
from gpntk.inference.outcome import Outcome
from gpntk.inference.solver import AbstractSolver, Sizes, refuse_sharded
from gpntk.inference.system import NoisySystem, Space

# Error of the smallest eigenvalue, one, at which a factorisation is refused.
_LARGEST_ROUNDING = 0.1
# Errors of a solution relative to its norm that are corrected, and of the residual that are reported as failures.
_ACCURACY = 1e-6
_TOLERANCE = 1e-6
_REFINEMENTS = 5
# Operations of an eigendecomposition over those of a Cholesky factorisation, n³/3.
_EIGEN = 27


@final
@dataclass(frozen=True)
class FunctionSpace(AbstractSolver):
    """Factorise the Gram matrix `[n, n]`: n³/3 operations and 16 n² bytes. Take it where n is small.

    Example:
        >>> import torch, gpntk
        >>> from gpntk.inference import Features, FunctionSpace, NoisySystem
        >>> backend = gpntk.AutoBackend(gpntk.freeze(torch.nn.Linear(3, 1)))
        >>> system = NoisySystem(Features(backend, torch.randn(5, 3)), torch.ones(1), torch.tensor([0.1]))
        >>> FunctionSpace().prepare(system).solve(torch.ones(1, 5)).outcome.name
        'CONVERGED'
    """

    def prepare(self, system: NoisySystem, many: bool = False) -> AbstractInverse:
        refuse_sharded(system, self)
        return _FunctionInverse(system, many)

    def cost(self, sizes: Sizes) -> Cost:
        n, kept = sizes.rows, 8.0 * sizes.rows**2
        once = Work(sizes.gram.flops + n**3 / 3, sizes.gram.moved + 4 * kept, sizes.gram.calls + 10)
        each = Work(2 * n**2 * sizes.columns, kept, 4)
        fits = (2 + sizes.groups) * kept <= 2 * sizes.budget and not sizes.sharded
        return Cost("function space", once, each, kept, fits)


@final
@dataclass(frozen=True)
class WeightSpace(AbstractSolver):
    """Factorise ΦᵀΦ `[F, F]`: n F² + F³/3 operations, 16 F² bytes, one pass over the data in blocks of rows.

    Take it where F is smaller than n and F² fits. Prediction then costs F² a point, whatever n.
    """

    def prepare(self, system: NoisySystem, many: bool = False) -> AbstractInverse:
        return _WeightInverse(system, many)

    def cost(self, sizes: Sizes) -> Cost:
        n, f, kept = sizes.rows, sizes.features, 8.0 * sizes.features**2
        # Explicit rows are written and read once.
        once = Work(n * f**2 + f**3 / 3, 16 * n * f + 4 * kept, 10 + n * f / 2**20)
        each = Work((4 * n * f + 2 * f**2) * sizes.columns, kept, 4)
        return Cost("weight space", once, each, kept, fits=3 * kept <= 2 * sizes.budget)


@final
class _FunctionInverse(AbstractInverse):
    """(I + Ψ Ψᵀ)⁻¹ by a factor of the matrix."""

    def __init__(self, system: NoisySystem, many: bool) -> None:
        super().__init__(system)
        exact = self.exact
        if spectrum_serves(exact, "function", many):
            values, vectors = spectrum(exact.features, "function")
            self._factor: AbstractFactor = SpectralFactor(1 + values * exact.variances / exact.noise, vectors)
            return
        grams = self._gram()
        matrix = torch.einsum("gnm,g->nm", grams, exact.variances) if self.grouped else grams[0] * exact.variances
        matrix = exact.row_scales * matrix * exact.row_scales.unsqueeze(-1)
        matrix.diagonal().add_(1)
        self._factor = cholesky(matrix)

    def _gram(self) -> Tensor:
        """Φ_g Φ_gᵀ of every group `[G, n, n]`."""
        features, grouped = self.exact.features, self.grouped
        return features.remember(("gram", grouped, self.dtype), lambda: _gram(features, grouped))

    def whitened(self, rhs: Tensor) -> Solution:
        dual = self._factor.solve(rhs)
        primal = self.exact.adjoint(dual)
        refinement = _Refinement(self.exact, rhs)
        while refinement.goes_on(dual, residual := rhs - dual - self.exact.apply(primal)):
            dual = dual + self._factor.solve(residual)
            primal = self.exact.adjoint(dual)
        return Solution(dual, primal, *refinement.verdict(), self.dual_quad(rhs, dual, primal))

    def logdet(self, by_row: bool = True) -> LogDet:  # noqa: ARG002
        diagonal = self._factor.inverse_diagonal()
        if self.grouped:
            eye = torch.eye(diagonal.shape[0], dtype=self.dtype, device=diagonal.device)
            scales = self.exact.row_scales
            inverse = scales * self._factor.solve(eye) * scales.unsqueeze(-1)
            by_variance = (self._gram() * inverse).sum((-2, -1)) * self.exact.variances
        else:
            # tr(A⁻¹ Ψ Ψᵀ) = tr(I - A⁻¹)
            by_variance = (1 - diagonal).sum(0, keepdim=True)
        by_noise = diagonal.sum(0, keepdim=True) if self.exact.homoscedastic else diagonal
        return LogDet(self._factor.logdet(), by_variance, by_noise)

    def covariance(self, x: Tensor, close: bool = False) -> Tensor:  # noqa: ARG002
        half = in_batches(self._factor.half(self.cross(x)), x.shape[0])
        return self.prior(x) - half @ half.mT

    def primal_columns(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(0)
        return self.test_features(x).squeeze(0) - self.exact.adjoint(self._factor.solve(self.cross(x)))


@final
class _WeightInverse(AbstractInverse):
    """(I + Ψᵀ Ψ)⁻¹ by a factor of the matrix."""

    def __init__(self, system: NoisySystem, many: bool) -> None:
        super().__init__(system)
        exact = self.exact
        if spectrum_serves(exact, "weight", many):
            values, vectors = spectrum(exact.features, "weight")
            self._factor: AbstractFactor = SpectralFactor(1 + values * exact.variances / exact.noise, vectors)
            return
        scales = exact.feature_scales
        moment = self._moment() / exact.noise if exact.homoscedastic else exact.features.second_moment(exact.row_scales)
        matrix = scales * moment * (scales.unsqueeze(-1) if self.grouped else scales)
        matrix.diagonal().add_(1)
        self._factor = cholesky(matrix)

    def _moment(self) -> Tensor:
        """ΦᵀΦ `[F, F]`."""
        features = self.exact.features
        return features.remember(("second moment", self.dtype), features.second_moment)

    def whitened(self, rhs: Tensor) -> Solution:
        primal = self._factor.solve(self.exact.adjoint(rhs))
        dual = rhs - self.exact.apply(primal)
        # Of the normal equations, by the data themselves: what their squares have rounded away comes back.
        refinement = _Refinement(self.exact, rhs)
        while refinement.goes_on(dual, residual := self.exact.adjoint(dual) - primal):
            primal = primal + self._factor.solve(residual)
            dual = rhs - self.exact.apply(primal)
        return Solution(dual, primal, *refinement.verdict(), self.primal_quad(dual, primal))

    def logdet(self, by_row: bool = True) -> LogDet:
        diagonal = self._factor.inverse_diagonal()
        by_variance = self.exact.by_group(1 - diagonal)
        if self.exact.homoscedastic:
            # tr (I + Ψ Ψᵀ)⁻¹ = n - tr Ψᵀ Ψ (I + Ψᵀ Ψ)⁻¹
            by_noise = self.exact.observed - (1 - diagonal).sum(0, keepdim=True)
        else:
            by_noise = torch.ones_like(self.exact.noise)
        if by_row and not self.exact.homoscedastic:
            for rows, block in self.exact.features.blocks():
                psi = block * self.exact.feature_scales * self.exact.row_scales[rows].unsqueeze(-1)
                by_noise[rows] -= self._factor.half(psi).square().sum(-1)
        return LogDet(self._factor.logdet(), by_variance, by_noise)

    def covariance(self, x: Tensor, close: bool = False) -> Tensor:  # noqa: ARG002
        half = self._factor.half(self.test_features(x))
        return half @ half.mT

    def primal_columns(self, x: Tensor) -> Tensor:
        return self._factor.solve(self.test_features(x.unsqueeze(0)).squeeze(0))


def cholesky(matrix: Tensor) -> CholeskyFactor:
    """The Cholesky factor.

    Raises:
        SolveError: The matrix is not positive definite, not finite, or so large that its rounding drowns the one.
    """
    _check_rounding(matrix.diagonal())
    lower, info = torch.linalg.cholesky_ex(matrix)
    if bool(info) or not bool(lower.diagonal().isfinite().all()):
        outcome = Outcome.NOT_POSITIVE if bool(matrix.isfinite().all()) else Outcome.NOT_FINITE
        raise _not_factorised(matrix.shape[0], outcome)
    return CholeskyFactor(lower)


def _check_rounding(diagonal: Tensor) -> None:
    """Refuse I + H, by its diagonal or eigenvalues, if the smallest eigenvalue, one, is lost in the rounding of H."""
    size = diagonal.shape[0]
    if not bool(diagonal.isfinite().all()):
        raise _not_factorised(size, Outcome.NOT_FINITE)
    # Rounding errors of independent signs: a random matrix, whose norm grows with the root of its size.
    if float(diagonal.max()) * torch.finfo(diagonal.dtype).eps * size**0.5 > _LARGEST_ROUNDING:
        raise _not_factorised(size, Outcome.NOT_POSITIVE)


def _not_factorised(size: int, outcome: Outcome) -> SolveError:
    return SolveError(f"the {size} x {size} system cannot be factorised ({outcome.name}): {outcome.value}")


def spectrum_serves(system: NoisySystem, space: Space, many: bool) -> bool:
    """Whether an eigendecomposition is to be used: it can be, and it pays or is at hand."""
    if system.variances.shape[0] > 1 or not system.homoscedastic:
        return False
    return many or system.features.holds(("spectrum", space, system.features.dtype))


def spectrum(features: AbstractFeatures, space: Space) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of Φ Φᵀ or ΦᵀΦ in float64, kept with the features for all hyperparameters."""
    features = features.to(exact_dtype(features.device))

    def decompose() -> tuple[Tensor, Tensor]:
        # Of the matrix itself no copy is kept: whoever asks for its spectrum has no more use for it.
        matrix = _gram(features, grouped=False)[0] if space == "function" else features.second_moment()
        _check_rounding(matrix.diagonal() / matrix.diagonal().max())
        values, vectors = torch.linalg.eigh(matrix)
        return values.clamp_min(0), vectors

    return features.remember(("spectrum", space, features.dtype), decompose)


def _gram(features: AbstractFeatures, grouped: bool) -> Tensor:
    """Φ_g Φ_gᵀ of every group `[G, n, n]`."""
    x = torch.cat([x for _, x in features.parts()]).unsqueeze(0)
    return features.backend.gram(x, x, grouped).squeeze(0)


class _Refinement:
    """When to stop correcting solutions of I + Ψ Ψᵀ `[K, n]` by their residuals, and what became of them.

    All eigenvalues are at least one: a residual's norm bounds the error of the solution.
    """

    def __init__(self, exact: NoisySystem, rhs: Tensor) -> None:
        self._exact, self._rhs = exact, rhs
        self._errors, self._made = rhs.new_full(rhs.shape[:1], torch.inf), 0

    def goes_on(self, dual: Tensor, residual: Tensor) -> bool:
        """Whether some column is still to be corrected, and can be."""
        errors = torch.linalg.vector_norm(residual, dim=-1)
        open_columns = (errors > _ACCURACY * self._norms(dual)) & (errors < 0.5 * self._errors)
        self._errors, self._made = errors, self._made + 1
        return bool(open_columns.any()) and self._made <= _REFINEMENTS

    def verdict(self) -> tuple[tuple[Outcome, ...], int, Tensor]:
        """Outcomes, iterations and relative residual norms."""
        norms = self._norms(self._rhs)
        relative = torch.where(norms == 0, 0.0, self._errors / norms)
        outcomes = [
            Outcome.CONVERGED if reached else Outcome.STAGNATED for reached in (relative <= _TOLERANCE).tolist()
        ]
        for column in (~relative.isfinite()).nonzero().flatten().tolist():
            outcomes[column] = Outcome.NOT_FINITE
        return tuple(outcomes), 0, relative

    def _norms(self, rows: Tensor) -> Tensor:
        return self._exact.features.total(rows.square().sum(-1)).sqrt()
