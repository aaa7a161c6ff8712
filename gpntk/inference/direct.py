"""Direct solvers: a factorisation of I + Ψ Ψᵀ `[n, n]` or of I + Ψᵀ Ψ `[F, F]`, in float64.

For one prior variance and one noise variance, one eigendecomposition of Φ Φᵀ or ΦᵀΦ serves all values of both; it is
what `prepare` makes when told that many will follow. Otherwise Cholesky.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gpntk.errors import SolveError
from gpntk.inference.factors import AbstractFactor, CholeskyFactor, SpectralFactor
from gpntk.inference.features import AbstractFeatures, exact_dtype
from gpntk.inference.inverse import AbstractInverse, LogDet, Solution, in_batches
from gpntk.inference.result import Outcome
from gpntk.inference.solver import AbstractSolver, Sizes
from gpntk.inference.system import NoisySystem
from gpntk.jacobians.cost import Cost, Work

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
        if many and not self.grouped and exact.homoscedastic:
            values, vectors = _spectrum(exact.features, "function", self._gram)
            self._factor: AbstractFactor = SpectralFactor(1 + values * exact.variances / exact.noise, vectors)
            return
        grams = self._gram()
        matrix = torch.einsum("gnm,g->nm", grams, exact.variances) if self.grouped else grams[0] * exact.variances
        matrix = exact.row_scales * matrix * exact.row_scales.unsqueeze(-1)
        matrix.diagonal().add_(1)
        self._factor = cholesky(matrix)

    def _gram(self) -> Tensor:
        """Φ_g Φ_gᵀ of every group `[G, n, n]`."""
        features = self.exact.features
        xs = torch.cat([x for _, x in features.parts()]).unsqueeze(0)
        gram = features.backend.gram
        return features.remember(("gram", self.grouped, self.dtype), lambda: gram(xs, xs, self.grouped)).squeeze(0)

    def whitened(self, rhs: Tensor) -> Solution:
        dual = self._factor.solve(rhs)
        return Solution(dual, self.exact.adjoint(dual), *_factorised(dual))

    def logdet(self) -> LogDet:
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

    def covariance(self, x: Tensor) -> Tensor:
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
        if many and not self.grouped and exact.homoscedastic:
            values, vectors = _spectrum(exact.features, "weight", self._moment)
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
        return Solution(dual, primal, *_factorised(rhs))

    def logdet(self) -> LogDet:
        diagonal = self._factor.inverse_diagonal()
        by_variance = self.exact.by_group(1 - diagonal)
        if self.exact.homoscedastic:
            # tr (I + Ψ Ψᵀ)⁻¹ = n - tr Ψᵀ Ψ (I + Ψᵀ Ψ)⁻¹
            by_noise = self.exact.observed - (1 - diagonal).sum(0, keepdim=True)
        else:
            by_noise = torch.ones_like(self.exact.noise)
            for rows, block in self.exact.features.blocks():
                psi = block * self.exact.feature_scales * self.exact.row_scales[rows].unsqueeze(-1)
                by_noise[rows] -= self._factor.half(psi).square().sum(-1)
        return LogDet(self._factor.logdet(), by_variance, by_noise)

    def covariance(self, x: Tensor) -> Tensor:
        half = self._factor.half(self.test_features(x))
        return half @ half.mT

    def primal_columns(self, x: Tensor) -> Tensor:
        return self._factor.solve(self.test_features(x.unsqueeze(0)).squeeze(0))


def cholesky(matrix: Tensor) -> CholeskyFactor:
    """The Cholesky factor.

    Raises:
        SolveError: The matrix is not positive definite, or not finite.
    """
    lower, info = torch.linalg.cholesky_ex(matrix)
    if bool(info) or not bool(lower.diagonal().isfinite().all()):
        outcome = Outcome.NOT_POSITIVE if bool(matrix.isfinite().all()) else Outcome.NOT_FINITE
        raise SolveError(f"the {matrix.shape[0]} x {matrix.shape[0]} system cannot be factorised: {outcome.value}")
    return CholeskyFactor(lower)


def _spectrum(features: AbstractFeatures, space: str, matrix: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of Φ Φᵀ or ΦᵀΦ, kept for all hyperparameters."""
    dtype = exact_dtype(features.device)

    def decompose() -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix().reshape(matrix().shape[-2:]))
        return values.clamp_min(0), vectors

    return features.remember(("spectrum", space, dtype), decompose)


def _factorised(rhs: Tensor) -> tuple[tuple[Outcome, ...], int, Tensor]:
    """Outcomes, iterations and residual norms of a solve by a factorisation."""
    bad = ~rhs.isfinite().all(-1)
    outcomes = tuple(Outcome.NOT_FINITE if failed else Outcome.CONVERGED for failed in bad.tolist())
    return outcomes, 0, torch.where(bad, torch.nan, 0.0).to(rhs)
