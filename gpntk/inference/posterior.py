"""The posterior of a GP on Jacobian features, with everything cached that does not depend on the test point."""

from __future__ import annotations

import copy
from typing import NamedTuple, final

import torch
from torch import Tensor

from gpntk.errors import InputError
from gpntk.inference.auto import AutoSolver
from gpntk.inference.direct import cholesky
from gpntk.inference.factors import CholeskyFactor
from gpntk.inference.features import Features
from gpntk.inference.inverse import AbstractInverse
from gpntk.inference.outcome import SolveResult
from gpntk.inference.solver import AbstractSolver
from gpntk.inference.system import NoisySystem
from gpntk.memory import chunks

# Test rows predicted at once, at most.
_ROWS = 512


class _Update(NamedTuple):
    """Data added after the fact: posterior covariance of the weights with their rows, and the factor of these rows'.

    All rows are whitened, that is divided by their noise; one that was not observed is zero.
    """

    columns: Tensor
    factor: CholeskyFactor
    x: Tensor
    residual: Tensor
    row_scales: Tensor


@final
class Posterior:
    """f given y = f(x) + noise, for f ~ GP(0, Φ S Φᵀ), exactly.

    The mean is J(x*) w with w `[F]` computed once; a variance costs F² (weight space), n² (function space) or a solve.
    All results are float64.

    Args:
        system: Data, prior variances and noise.
        y: Targets minus prior mean `[n]`; rows of infinite noise may be NaN.
        solver: How systems are solved.

    Raises:
        InputError: y does not fit, or is NaN where there is an observation.
        SolveError: The system could not be solved to the solver's tolerance.

    Example:
        >>> import torch, gpntk
        >>> from gpntk.inference import Features, NoisySystem, Posterior
        >>> x = torch.randn(50, 3, dtype=torch.float64)
        >>> network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
        >>> features = Features(gpntk.AutoBackend(gpntk.freeze(network)), x)
        >>> system = NoisySystem(features, torch.ones(1), torch.tensor([0.01]))
        >>> posterior = Posterior(system, x.sum(-1))
        >>> posterior.mean(x[:2]).shape, posterior.covariance(x[:2]).shape, posterior.sample(x[:2], 5).shape
        (torch.Size([2]), torch.Size([2, 2]), torch.Size([5, 2]))

    References:
        Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, eqs. 2.8 to 2.12 (both spaces).
        Wilson et al. (2020), Efficiently Sampling Functions from GP Posteriors, arXiv 2002.09309, eq. 5.
    """

    def __init__(self, system: NoisySystem, y: Tensor, solver: AbstractSolver | None = None) -> None:
        solver = solver or AutoSolver()
        # The solver in charge: what an automatic choice chose.
        self.solver = solver.select(system).solver if isinstance(solver, AutoSolver) else solver
        self.inverse: AbstractInverse = self.solver.prepare(system)
        self._residual = _checked(system, y).to(self.inverse.dtype)
        with torch.no_grad():
            self.result: SolveResult = self.inverse.weights(self._residual.unsqueeze(0))
        self.weights = self.result.checked().squeeze(0)
        self._updates: tuple[_Update, ...] = ()
        self._directions: tuple[int, Tensor] | None = None

    def mean(self, x: Tensor) -> Tensor:
        """Posterior mean of f(x) `[T*C]` for x `[T, D]`; differentiable in x."""
        return self._jvp(x, self.weights.unsqueeze(0)).squeeze(0)

    def variance(self, x: Tensor) -> Tensor:
        """Posterior variances of f(x) `[T*C]` for x `[T, D]`."""
        pieces = [self.covariance(part.unsqueeze(1)).diagonal(dim1=-2, dim2=-1).flatten() for part in self._split(x)]
        # Rounding can leave the variance at an observation a hair below zero.
        return torch.cat(pieces).clamp_min(0)

    def covariance(self, x: Tensor, rank: int | None = None) -> Tensor:
        """Posterior covariance of f(x) `[..., T*C, T*C]` for x `[..., T, D]`.

        With ``rank``, only so many directions of the data reduce the prior variance: variances are then upper bounds,
        at ``rank`` F operations a point.
        """
        batched = x.reshape(-1, *x.shape[-2:])
        if rank is None:
            covariance = self.inverse.covariance(batched, close=bool(self._updates))
        else:
            covariance = self._upper_bound(batched, rank)
        for index in range(len(self._updates)):
            half = self._updates[index].factor.half(self._cross(batched, index))
            covariance = covariance - half @ half.mT
        return covariance.reshape(*x.shape[:-2], *covariance.shape[-2:])

    def sample(self, x: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Joint samples of f(x) `[S, T*C]` for x `[T, D]`, exact in law: functions J(x) w of sampled weights."""
        return self._jvp(x, self.sample_weights(count, generator))

    def sample_weights(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Samples of the weights `[S, F]`: prior samples, moved to the data by Matheron's rule."""
        exact = self.inverse.exact
        rows, device = self._residual.shape[0], self._residual.device

        alike, own = exact.features.generators(generator)

        def normal(*shape: int, generator: torch.Generator | None = alike) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=self.inverse.dtype, device=device)

        # w0 ~ N(0, I), e ~ N(0, I):  w0 + Ψᵀ (I + Ψ Ψᵀ)⁻¹ (D^(-1/2) y - Ψ w0 - e)  has the posterior's law.
        prior = normal(count, exact.features.num_features)
        gap = self._residual * exact.row_scales - exact.apply(prior) - normal(count, rows, generator=own)
        solution = self.inverse.whitened(gap)
        weights = (prior + solution.result(solution.primal).checked()) * exact.feature_scales
        for update in self._updates:
            gap = (update.residual - self._jvp(update.x, weights)) * update.row_scales
            gap = gap - normal(count, update.row_scales.shape[0])
            weights = weights + update.factor.solve(gap) @ update.columns
        return weights

    def condition_on(self, x: Tensor, y: Tensor, noise: Tensor) -> Posterior:
        """The posterior given t more rows, by an update of rank t: the same as with all data from the start.

        Args:
            x: Inputs `[T, D]`.
            y: Targets minus prior mean `[T*C]`; rows of infinite noise may be NaN.
            noise: Noise variances `[1]` or `[T*C]`.
        """
        return self.fantasies(x, y.unsqueeze(0), noise)[0]

    def fantasies(self, x: Tensor, y: Tensor, noise: Tensor) -> list[Posterior]:
        """`condition_on` for each of several sets of targets y `[K, T*C]` at one x `[T, D]`, at the cost of one."""
        new = NoisySystem(Features(self.inverse.system.features.backend, x), self.inverse.system.variances, noise)
        residuals = torch.stack([_checked(new, row) for row in y]).to(self.inverse.dtype)
        row_scales = new.noise.rsqrt().expand(residuals.shape[1])
        columns = self.inverse.primal_columns(x) * self.inverse.exact.feature_scales
        for index, update in enumerate(self._updates):
            columns = columns - update.factor.solve(self._cross(x.unsqueeze(0), index).squeeze(0)) @ update.columns
        columns = columns * row_scales.unsqueeze(-1)
        covariance = self._jvp(x, columns) * row_scales
        covariance = (covariance + covariance.mT) / 2
        covariance.diagonal().add_(1)
        factor = cholesky(covariance)
        gaps = (residuals - self.mean(x)) * row_scales
        weights = self.weights + factor.solve(gaps) @ columns
        posteriors = []
        for residual, row in zip(residuals, weights, strict=True):
            updated = copy.copy(self)
            updated.weights = row
            updated._updates = (*self._updates, _Update(columns, factor, x, residual, row_scales))
            posteriors.append(updated)
        return posteriors

    # --- private -----------------------------------------------------------------------------------------------

    def _upper_bound(self, x: Tensor, rank: int) -> Tensor:
        """ψ ψᵀ - ψ V diag(λ / (1 + λ)) Vᵀ ψᵀ for ``rank`` eigenpairs of Ψᵀ Ψ: the prior is not truncated."""
        if self._directions is None or self._directions[0] < rank:
            # There may be fewer of them than asked for.
            self._directions = rank, self.inverse.directions(rank)
        half = self._jvp(x.flatten(0, 1), self._directions[1][:rank] * self.inverse.exact.feature_scales).mT
        half = half.unflatten(0, (x.shape[0], -1))
        return self.inverse.prior(x) - half @ half.mT

    def _jvp(self, x: Tensor, weights: Tensor) -> Tensor:
        """J(x) w `[K, T*C]`."""
        x = x.to(self.inverse.dtype)
        return self.inverse.system.features.backend.jvp(x.unsqueeze(0), weights.unsqueeze(0)).squeeze(0)

    def _cross(self, x: Tensor, index: int) -> Tensor:
        """Posterior covariance of f(x) with an update's whitened rows, given what came before, `[B, T*C, t]`."""
        columns = self._updates[index].columns
        flat = self._jvp(x.flatten(0, 1), columns).mT
        return flat.unflatten(0, (x.shape[0], -1))

    def _split(self, x: Tensor) -> list[Tensor]:
        system = self.inverse.exact
        # Ranks that hold different numbers of rows must take as many test points at once.
        rows = 0 if system.features.sharded else system.features.num_rows
        bytes_each = 8 * 4 * (system.features.num_features + rows)
        size = next(chunks(x.shape[0], bytes_each, system.features.memory_budget // 2)).stop
        return list(x.split(max(1, min(size, _ROWS))))


def _checked(system: NoisySystem, y: Tensor) -> Tensor:
    """Targets with zeros where nothing was observed."""
    if y.shape != (system.features.num_rows,):
        raise InputError(f"y has shape {tuple(y.shape)}: give one target per row, ({system.features.num_rows},).")
    missing = ~system.noise.isfinite().expand(y.shape[0])
    y = torch.where(missing, 0.0, y)
    if not bool(y.isfinite().all()):
        raise InputError("y has NaN or infinite values: give infinite noise to the rows that were not observed.")
    return y
