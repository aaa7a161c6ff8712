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
from gpntk.errors import InputError, SolveError
from gpntk.inference.covariance import AbstractCovariance, FeatureCovariance
from gpntk.inference.factors import AbstractFactor, CholeskyFactor, SpectralFactor
from gpntk.inference.features import AbstractFeatures, exact_dtype
from gpntk.inference.outcome import Outcome
from gpntk.inference.solver import AbstractInverse, AbstractSolver, LogDet, Solution, SolverChoice, refuse_sharded
from gpntk.inference.system import Sizes, Space, WhitenedSystem

# Error of the smallest eigenvalue, one, at which a factorisation is refused.
_LARGEST_ROUNDING = 0.1
# Errors of a solution relative to its norm that are corrected, and of the residual that are reported as failures.
_ACCURACY = 1e-6
_TOLERANCE = 1e-6
_REFINEMENTS = 5
# Operations of an eigendecomposition over those of a Cholesky factorisation, n³/3.
_SPECTRUM = 27


@final
@dataclass(frozen=True)
class FunctionSpace(AbstractSolver):
    """Factorise the Gram matrix `[n, n]`: n³/3 operations and 16 n² bytes. Take it where n is small.

    Example:
        >>> import torch, gpntk
        >>> from gpntk.inference import FeatureCovariance, Features, FunctionSpace, WhitenedSystem
        >>> features = Features(gpntk.AutoBackend(gpntk.freeze(torch.nn.Linear(3, 1))), torch.randn(5, 3))
        >>> system = WhitenedSystem(FeatureCovariance(features, torch.ones(1)), torch.tensor([0.1]))
        >>> FunctionSpace().prepare(system).solve(torch.ones(1, 5)).outcome.name
        'CONVERGED'
    """

    def prepare(self, system: WhitenedSystem, many: bool = False) -> AbstractInverse:
        refuse_sharded(system, self)
        return _FunctionInverse(system, many)

    @property
    def is_direct(self) -> bool:
        return True

    def select(self, system: WhitenedSystem, many: bool = False) -> SolverChoice:  # noqa: ARG002
        return SolverChoice(self)

    def cost(self, sizes: Sizes) -> Cost:
        n, kept = sizes.rows, 8.0 * sizes.rows**2
        factorisation = (_SPECTRUM if sizes.spectral else 1) * n**3 / 3
        once = Work(sizes.gram.flops + factorisation, sizes.gram.moved + 4 * kept, sizes.gram.calls + 10)
        each = Work(2 * n**2 * sizes.columns, kept, 4)
        fits = (2 + sizes.groups) * kept <= 2 * sizes.budget and not sizes.sharded
        return Cost("function space", once, each, kept, fits)


@final
@dataclass(frozen=True)
class WeightSpace(AbstractSolver):
    """Factorise ΦᵀΦ `[F, F]`: n F² + F³/3 operations, 16 F² bytes, one pass over the data in blocks of rows.

    Take it where F is smaller than n and F² fits. Prediction then costs F² a point, whatever n.
    """

    def prepare(self, system: WhitenedSystem, many: bool = False) -> AbstractInverse:
        return _WeightInverse(system, many)

    @property
    def is_direct(self) -> bool:
        return True

    def select(self, system: WhitenedSystem, many: bool = False) -> SolverChoice:  # noqa: ARG002
        return SolverChoice(self)

    def cost(self, sizes: Sizes) -> Cost:
        n, f, kept = sizes.rows, sizes.features, 8.0 * sizes.features**2
        factorisation = (_SPECTRUM if sizes.spectral else 1) * f**3 / 3
        # Explicit rows are written and read once.
        once = Work(n * f**2 + factorisation, 16 * n * f + 4 * kept, 10 + n * f / 2**20)
        each = Work((4 * n * f + 2 * f**2) * sizes.columns, kept, 4)
        return Cost("weight space", once, each, kept, fits=3 * kept <= 2 * sizes.budget)


@final
class _FunctionInverse(AbstractInverse):
    """B⁻¹ by a factor of B."""

    def __init__(self, system: WhitenedSystem, many: bool) -> None:
        super().__init__(system)
        if many and spectrum_serves(self.exact):
            values, vectors = spectrum(self.exact.weighted.features, "function")
            self._factor: AbstractFactor = _scaled(self.exact, values, vectors)
        else:
            self._factor = cholesky(self.exact.matrix())

    def whitened(self, rhs: Tensor) -> Solution:
        dual = self._factor.solve(rhs)
        image, primal, energy = self.image(dual)
        refinement = _Refinement(self.exact, rhs)
        while refinement.goes_on(dual, residual := rhs - dual - image):
            dual = dual + self._factor.solve(residual)
            image, primal, energy = self.image(dual)
        return Solution(dual, primal, *refinement.verdict(), self.dual_quad(rhs, dual, energy))

    def logdet(self, by_row: bool = True, derivatives: bool = True) -> LogDet:  # noqa: ARG002
        if not derivatives:
            return LogDet(self._factor.logdet())
        diagonal = self._factor.inverse_diagonal()
        by_noise = diagonal.sum(0, keepdim=True) if self.exact.homoscedastic else diagonal
        return LogDet(self._factor.logdet(), self._by_variance(diagonal), by_noise)

    def _by_variance(self, diagonal: Tensor) -> Tensor:
        if self.exact.covariance.features is None:
            return diagonal.new_zeros(0)
        weighted = self.exact.weighted
        if weighted.per_layer:
            # The derivative by a layer's variance is an inner product with the layer's Gram.
            return (weighted.layer_grams() * self.precision()).sum((-2, -1)) * weighted.variances
        if not weighted.per_parameter:
            # tr(B⁻¹ Ψ Ψᵀ) = tr(I - B⁻¹)
            return (1 - diagonal).sum(0, keepdim=True)
        # diag Ψᵀ B⁻¹ Ψ, by rows of Ψ.
        inverse, total, start = self._factor.inverse(), torch.zeros_like(weighted.scales), 0
        for rows, block in weighted.features.blocks():
            psi = self.exact.rows(rows, block)
            total += (self.exact.adjoint(inverse[start : start + len(psi)]) * psi).sum(0)
            start += len(psi)
        return total

    def precision(self) -> Tensor:
        half = self.exact.likelihood.unwhiten(self._factor.inverse())
        return self.exact.likelihood.unwhiten(half.mT)

    def inverse_blocks(self) -> Tensor:
        width = self.exact.likelihood.width
        if width == 1:
            return self._factor.inverse_diagonal().view(-1, 1, 1)
        blocks = self._factor.inverse().unflatten(0, (-1, width)).unflatten(-1, (-1, width))
        return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)

    def covariance(self, x: Tensor, close: bool = False) -> Tensor:  # noqa: ARG002
        return self.reduced(self.exact.covariance.cross(x), self.exact.covariance.prior(x))

    def reduced(self, cross: Tensor, prior: Tensor, close: bool = False) -> Tensor:  # noqa: ARG002
        half = self._factor.half(self.exact.likelihood.whiten(cross))
        return prior - half @ half.mT

    def columns(self, x: Tensor, functions: AbstractCovariance) -> Tensor:
        return self.prior_columns(x, self._factor.solve(self.cross(x.unsqueeze(0))), functions)


@final
class _WeightInverse(AbstractInverse):
    """A⁻¹ by a factor of A."""

    def __init__(self, system: WhitenedSystem, many: bool) -> None:
        super().__init__(system)
        exact, weighted = self.exact, self.exact.weighted
        if many and spectrum_serves(exact):
            values, vectors = spectrum(weighted.features, "weight")
            self._factor: AbstractFactor = _scaled(exact, values, vectors)
            return
        if exact.homoscedastic and exact.noise is not None:
            matrix = second_moment(weighted.features) / exact.noise
            matrix *= weighted.scales
            matrix *= weighted.scales.unsqueeze(-1) if weighted.scales.shape[0] > 1 else weighted.scales
        else:
            matrix = weighted.features.second_moment(exact.rows)
        matrix.diagonal().add_(1)
        self._factor = cholesky(matrix)

    def whitened(self, rhs: Tensor) -> Solution:
        primal = self._factor.solve(self.exact.adjoint(rhs))
        dual = rhs - self.exact.apply(primal)
        # Of the normal equations, by the data themselves: what their squares have rounded away comes back.
        refinement = _Refinement(self.exact, rhs)
        while refinement.goes_on(dual, residual := self.exact.adjoint(dual) - primal):
            primal = primal + self._factor.solve(residual)
            dual = rhs - self.exact.apply(primal)
        return Solution(dual, primal, *refinement.verdict(), self.primal_quad(dual, primal))

    def logdet(self, by_row: bool = True, derivatives: bool = True) -> LogDet:
        if not derivatives:
            return LogDet(self._factor.logdet())
        weights = 1 - self._factor.inverse_diagonal()
        if self.exact.homoscedastic:
            # tr B⁻¹ = n - tr Ψᵀ Ψ A⁻¹
            by_noise = self.exact.observed - weights.sum(0, keepdim=True)
        elif by_row:
            by_noise = self.inverse_blocks().diagonal(dim1=-2, dim2=-1).flatten()
        else:
            by_noise = torch.ones(self.exact.size("function"), dtype=self.dtype, device=weights.device)
        return LogDet(self._factor.logdet(), self.exact.weighted.by_group(weights), by_noise)

    def precision(self) -> Tensor:
        covariance = self.exact.covariance
        return self.solve(torch.eye(covariance.num_rows, dtype=self.dtype, device=covariance.device)).checked()

    def inverse_blocks(self) -> Tensor:
        width = self.exact.likelihood.width
        blocks = [torch.zeros(0, width, width, dtype=self.dtype, device=self.exact.covariance.device)]
        for rows, block in self.exact.weighted.features.blocks():
            # I - Ψ_n A⁻¹ Ψ_nᵀ
            half = self._factor.half(self.exact.rows(rows, block)).unflatten(0, (-1, width))
            inner = -half @ half.mT
            inner.diagonal(dim1=-2, dim2=-1).add_(1)
            blocks.append(inner)
        return torch.cat(blocks)

    def covariance(self, x: Tensor, close: bool = False) -> Tensor:  # noqa: ARG002
        half = self._factor.half(self.exact.weighted.rows(x))
        return half @ half.mT

    def reduced(self, cross: Tensor, prior: Tensor, close: bool = False) -> Tensor:  # noqa: ARG002
        raise not_in_function_space()

    def columns(self, x: Tensor, functions: AbstractCovariance) -> Tensor:  # noqa: ARG002
        weighted = self.exact.weighted
        return self._factor.solve(weighted.rows(x.unsqueeze(0)).squeeze(0)) * weighted.scales


def cholesky(matrix: Tensor) -> CholeskyFactor:
    """The Cholesky factor L of a positive definite matrix L Lᵀ; an error says why there is none.

    Raises:
        SolveError: The matrix is not positive definite, not finite, or so large that its rounding drowns the one.
    """
    _check_rounding(matrix.diagonal())
    lower, info = torch.linalg.cholesky_ex(matrix)
    if bool(info) or not bool(lower.diagonal().isfinite().all()):
        outcome = Outcome.NOT_POSITIVE if bool(matrix.isfinite().all()) else Outcome.NOT_FINITE
        raise not_factorised(matrix.shape[0], outcome)
    return CholeskyFactor(lower)


def _check_rounding(diagonal: Tensor) -> None:
    """Refuse I + H, by its diagonal or eigenvalues, if the smallest eigenvalue, one, is lost in the rounding of H."""
    size = diagonal.shape[0]
    if not bool(diagonal.isfinite().all()):
        raise not_factorised(size, Outcome.NOT_FINITE)
    # Rounding errors of independent signs: a random matrix, whose norm grows with the root of its size.
    if float(diagonal.max()) * torch.finfo(diagonal.dtype).eps * size**0.5 > _LARGEST_ROUNDING:
        raise not_factorised(size, Outcome.NOT_POSITIVE)


def not_in_function_space() -> InputError:
    """The error of who asks weight space for what it has not."""
    return InputError("weight space predicts from inputs, not from covariances: take mean(x) and covariance(x).")


def not_factorised(size: int, outcome: Outcome) -> SolveError:
    """The error of a matrix that has no Cholesky factor."""
    return SolveError(f"the {size} x {size} system cannot be factorised ({outcome.name}): {outcome.value}")


def spectrum_serves(system: WhitenedSystem) -> bool:
    """Whether one eigendecomposition serves all hyperparameters: one prior variance, one noise variance."""
    covariance = system.covariance
    return covariance.features is not None and covariance.weighted.variances.shape == (1,) and system.homoscedastic


def spectrum(features: AbstractFeatures, space: Space) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of Φ Φᵀ or ΦᵀΦ in float64, kept with the features for all hyperparameters."""
    features = features.to(exact_dtype(features.device))

    def decompose() -> tuple[Tensor, Tensor]:
        if space == "function":
            one = torch.ones(1, dtype=features.dtype, device=features.device)
            matrix = FeatureCovariance(features, one).layer_grams()[0]
        else:
            matrix = second_moment(features)
        # A matrix of zeros has its spectrum, too.
        _check_rounding(matrix.diagonal() / matrix.diagonal().max().clamp_min(torch.finfo(matrix.dtype).tiny))
        values, vectors = torch.linalg.eigh(matrix)
        return values.clamp_min(0), vectors

    return features.remember(("spectrum", space, features.dtype), decompose)


def second_moment(features: AbstractFeatures) -> Tensor:
    """ΦᵀΦ `[F, F]`, kept with the features."""
    return features.remember(("second moment", features.dtype), features.second_moment)


def _scaled(system: WhitenedSystem, values: Tensor, vectors: Tensor) -> SpectralFactor:
    """The factor of I + (s/σ²) U diag(values) Uᵀ."""
    assert system.noise is not None
    return SpectralFactor(1 + values * system.weighted.variances / system.noise, vectors)


class _Refinement:
    """When to stop correcting solutions of I + Ψ Ψᵀ `[K, n]` by their residuals, and what became of them.

    All eigenvalues are at least one: a residual's norm bounds the error of the solution.
    """

    def __init__(self, exact: WhitenedSystem, rhs: Tensor) -> None:
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
        return self._exact.covariance.total(rows.square().sum(-1)).sqrt()
