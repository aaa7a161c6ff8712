"""The one posterior: everything that a whitened system and targets say of f, whatever the covariance and the solver."""

from __future__ import annotations

import copy
import math
from functools import cached_property
from typing import NamedTuple, final

import torch
from torch import Tensor

from gpntk._checks import check_count, check_input, check_kinds, check_values
from gpntk.errors import InputError
from gpntk.inference.auto import AutoSolver
from gpntk.inference.covariance import AbstractCovariance
from gpntk.inference.direct import cholesky
from gpntk.inference.factors import CholeskyFactor
from gpntk.inference.outcome import SolveResult
from gpntk.inference.solver import AbstractInverse, AbstractSolver, LogDet, SolverChoice
from gpntk.inference.system import WhitenedSystem
from gpntk.memory import chunks

# Test rows predicted at once, at most.
_ROWS = 512


class LeaveOneOut(NamedTuple):
    """What all other targets say of each target, noise included; NaN where there is none."""

    mean: Tensor
    """`[n]`, or `[K, n]` for several columns of targets."""
    variance: Tensor
    """`[n]`."""


class _Update(NamedTuple):
    """Data added after the fact. All rows are whitened; one that was not observed is zero."""

    columns: Tensor
    """cov(f(·), new rows | what came before), by coefficients `[t, F]` or `[t, n]`."""
    factor: CholeskyFactor
    """Of the covariance of the new rows, noise included `[t, t]`."""
    x: Tensor
    targets: Tensor
    """`[K, T*C]`."""
    system: WhitenedSystem
    gaps: Tensor
    """Whitened targets minus their mean given what came before `[K, t]`."""


@final
class Posterior:
    """f given y = f(x) + noise, for f ~ GP(0, K): exactly, or as exactly as the solver.

    All results are float64. With features, the mean is J(x) w with weights w `[F]` computed once; a variance costs F²
    (weight space), n² (function space) or a solve (conjugate gradients).

    Args:
        system: Covariance and noise.
        y: Targets minus prior mean `[n]`; or several columns `[K, n]` that share the system, as independent outputs
            with one kernel do. Rows that were not observed may be NaN.
        solver: How systems are solved; default `AutoSolver`.

    Attributes:
        choice: The solver in charge, why, and what each would have cost.

    Raises:
        InputError: y does not fit, or is NaN where there is an observation.
        SolveError: The system could not be solved to the solver's tolerance.

    Example:
        >>> import torch, gpntk
        >>> from gpntk.inference import FeatureCovariance, Features, Posterior, WhitenedSystem
        >>> x = torch.randn(50, 3, dtype=torch.float64)
        >>> network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
        >>> features = Features(gpntk.AutoBackend(gpntk.freeze(network)), x)
        >>> system = WhitenedSystem(FeatureCovariance(features, torch.ones(1)), torch.tensor([0.01]))
        >>> posterior = Posterior(system, x.sum(-1))
        >>> posterior.mean(x[:2]).shape, posterior.covariance(x[:2]).shape, posterior.sample(x[:2], 5).shape
        (torch.Size([2]), torch.Size([2, 2]), torch.Size([5, 2]))

    References:
        Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, eqs. 2.8 to 2.12 (both spaces).
        Wilson et al. (2020), Efficiently Sampling Functions from GP Posteriors, arXiv 2002.09309, eq. 5.
    """

    def __init__(self, system: WhitenedSystem, y: Tensor, solver: AbstractSolver | None = None) -> None:
        check_kinds(WhitenedSystem, "WhitenedSystem(covariance, noise)", system=system)
        solver = AutoSolver() if solver is None else solver
        check_kinds(AbstractSolver, "a solver, WeightSpace() say, or None", solver=solver)
        check_values(system.covariance.device, y=y)
        self.choice: SolverChoice = solver.select(system)
        self.inverse: AbstractInverse = self.choice.solver.prepare(system)
        self.system = system
        self._single = y.dim() == 1
        self._targets = system.targets(y.unsqueeze(0) if self._single else y).to(self.inverse.dtype)
        with torch.no_grad():
            solution = self.inverse.whitened(self.inverse.exact.likelihood.whiten(self._targets))
            self.result: SolveResult = solution.result(self.inverse.coefficients(solution))
            self._coefficients = self.result.checked()
            self._dual = self.inverse.exact.likelihood.unwhiten(solution.dual)
        self._quad = solution.quad.sum()
        self._functions: AbstractCovariance = self.inverse.exact.covariance
        self._updates: tuple[_Update, ...] = ()
        self._directions: tuple[int, Tensor] | None = None

    @property
    def solver(self) -> AbstractSolver:
        """The solver in charge: what an automatic choice chose."""
        return self.choice.solver

    @property
    def weights(self) -> Tensor:
        """Posterior mean of the weights `[F]`; or `[K, F]` for several columns.

        For a dense covariance, the coefficients `[n]` of the kernel functions k(·, X).
        """
        return self._shaped(self._coefficients)

    # --- predictions -------------------------------------------------------------------------------------------

    def mean(self, x: Tensor) -> Tensor:
        """Posterior mean of f(x) `[T*C]`, or `[K, T*C]` for several columns, for x `[T, D]`; differentiable in x."""
        self._check_rows(x)
        return self._shaped(self._functions.values(x, self._coefficients))

    def variance(self, x: Tensor) -> Tensor:
        """Posterior variances of f(x) `[T*C]` for x `[T, D]`; columns share them."""
        self._check_rows(x)
        pieces = [self.covariance(part.unsqueeze(1)).diagonal(dim1=-2, dim2=-1).flatten() for part in self._split(x)]
        # Rounding can leave the variance at an observation a hair below zero.
        return torch.cat(pieces).clamp_min(0)

    def covariance(self, x: Tensor, rank: int | None = None) -> Tensor:
        """Posterior covariance of f(x) `[..., T*C, T*C]` for x `[..., T, D]`; columns share it.

        With ``rank``, only so many directions of the data reduce the prior variance: variances are then upper bounds,
        at ``rank`` F operations a point.
        """
        check_input(x, self._functions.device)
        if not x.numel():
            raise InputError("x has no rows: give at least one input.")
        if rank is not None:
            check_count(rank=rank)
        batched = x.reshape(-1, *x.shape[-2:])
        if rank is None:
            covariance = self.inverse.covariance(batched, close=bool(self._updates))
        else:
            covariance = self._upper_bound(batched, rank)
        for update in self._updates:
            half = update.factor.half(self._cross(batched, update))
            covariance = covariance - half @ half.mT
        return covariance.reshape(*x.shape[:-2], *covariance.shape[-2:])

    def of_matrices(self, cross: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance from k(x, X) `[B, T*C, n]` and k(x, x) `[B, T*C, T*C]`, for a dense covariance.

        X are all inputs, those of `condition_on` last. For whoever has the matrices but not x: mean `[B, T*C]`, or
        `[K, B, T*C]` for several columns, and covariance `[B, T*C, T*C]`.
        """
        exact = self.inverse.exact
        cross, prior = cross.to(self.inverse.dtype), prior.to(self.inverse.dtype)
        mean = torch.einsum("btn,kn->kbt", cross, self._coefficients)
        close = bool(self._updates)
        covariance = self.inverse.reduced(cross[..., : exact.covariance.num_rows], prior, close)
        for update in self._updates:
            half = update.factor.half(cross[..., : update.columns.shape[-1]] @ update.columns.mT)
            covariance = covariance - half @ half.mT
        return self._shaped(mean), covariance

    def sample(self, x: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Joint samples of f(x) for x `[T, D]`, `[S, T*C]`, or `[S, K, T*C]` for several columns, exact in law.

        With features, functions J(x) w of sampled weights; else by a root of the covariance of f(x).
        """
        check_count(count=count)
        self._check_rows(x)
        if self._functions.features is not None:
            weights = self.sample_weights(count, generator)
            return self._functions.values(x, weights.flatten(0, -2)).unflatten(0, weights.shape[:-1])
        return gaussian_samples(self.mean(x), self.covariance(x), count, generator)

    def sample_weights(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Samples of the weights `[S, F]`, or `[S, K, F]`: prior samples, moved to the data by Matheron's rule.

        Raises:
            InputError: The covariance is dense: it has no weights.
        """
        check_count(count=count)
        exact, features = self.inverse.exact, self.inverse.exact.weighted.features
        alike, own = features.ranks.generators(generator, features.device)

        def normal(size: int, generator: torch.Generator | None = alike) -> Tensor:
            shape = (count * len(self._coefficients), size)
            return torch.randn(*shape, generator=generator, dtype=self.inverse.dtype, device=features.device)

        # w0 ~ N(0, I), e ~ N(0, I):  w0 - Ψᵀ B⁻¹ (Ψ w0 + e)  has the posterior's law but for its mean.
        prior = normal(features.num_features)
        gap = exact.apply(prior)
        solution = self.inverse.whitened(gap + normal(gap.shape[1], own))
        assert solution.primal is not None
        weights = (prior - solution.result(solution.primal).checked()) * exact.weighted.scales
        for update in self._updates:
            gap = update.system.likelihood.whiten(self._functions.values(update.x, weights))
            weights = weights - update.factor.solve(gap + normal(gap.shape[1])) @ update.columns
        weights = weights.unflatten(0, (count, -1)) + self._coefficients
        return weights.squeeze(1) if self._single else weights

    # --- what the data say of the model ------------------------------------------------------------------------

    @property
    def log_evidence(self) -> Tensor:
        """log N(y; 0, K + D) in nats `[]`, over the rows observed and all columns.

        `gpntk.inference.log_evidence` is differentiable.
        """
        system, columns = self.inverse.exact, len(self._targets)
        logdet = self.inverse.logdet(derivatives=False).value + system.noise_logdet
        total = self._quad + columns * (logdet + system.observed * math.log(2 * math.pi))
        for update in self._updates:
            white = update.factor.half(update.gaps)
            logdet = update.factor.logdet() + update.system.noise_logdet
            total = total + white.square().sum() + columns * (logdet + update.system.observed * math.log(2 * math.pi))
        return -0.5 * total

    def leave_one_out(self) -> LeaveOneOut:
        """Mean and variance of each target given all the others, noise included; NaN where it is missing.

        By a diagonal of B⁻¹: exact in direct solvers, in weight space without any matrix `[n, n]`; estimated by random
        probes with conjugate gradients.

        Raises:
            InputError: The noise is in blocks.

        References:
            Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, eqs. 5.10-5.12.
        """
        full, system = self._together, self._together.inverse.exact
        if system.noise is None:
            raise InputError("leave_one_out of targets needs noise variances, not a root of the curvature.")
        noise = system.noise.expand(full._targets.shape[1])
        missing = ~noise.isfinite()
        diagonal = full.inverse.inverse_blocks().flatten()
        variance = torch.where(missing, torch.nan, noise / diagonal)
        return LeaveOneOut(full._shaped(full._targets - full._dual * variance), variance)

    def effective_parameters(self) -> float:
        """tr K (K + D)⁻¹, how many independent numbers the targets have taught, over all columns.

        References:
            Hastie, Tibshirani and Friedman (2009), The Elements of Statistical Learning, section 5.4.1.
        """
        full = self._together
        by_variance, by_noise = full._determinant[1:3]
        if full.inverse.exact.covariance.features is None:
            return float(full.inverse.exact.size("function") - by_noise.sum()) * len(self._targets)
        return float(by_variance.sum()) * len(self._targets)

    # --- more data ---------------------------------------------------------------------------------------------

    def condition_on(
        self, x: Tensor, y: Tensor, noise: Tensor | None = None, *, root: Tensor | None = None
    ) -> Posterior:
        """The posterior given t more rows, by an update of rank t: the same as with all data from the start.

        Args:
            x: Inputs `[T, D]`.
            y: Targets minus prior mean `[T*C]`, or `[K, T*C]`; rows of infinite noise may be NaN.
            noise: Noise variances `[1]` or `[T*C]`.
            root: Or the root of the curvature `[T, C, q]`.
        """
        check_values(self._functions.device, y=y)
        return self._conditioned(x, y.unsqueeze(0) if self._single else y, noise, root)

    def fantasies(self, x: Tensor, y: Tensor, noise: Tensor) -> list[Posterior]:
        """`condition_on` for each of several sets of targets y `[J, T*C]` at one x `[T, D]`, at the cost of one.

        Raises:
            InputError: This posterior has several columns already.
        """
        if not self._single:
            raise InputError("fantasies are of a posterior with targets [n]; give condition_on targets [K, T*C].")
        check_values(self._functions.device, y=y)
        together = self._conditioned(x, y, noise, None)
        posteriors = []
        for index in range(len(y)):
            posterior = copy.copy(together)
            own = slice(index, index + 1)
            posterior._coefficients = together._coefficients[own]
            last = together._updates[-1]
            last = last._replace(targets=last.targets[own], gaps=last.gaps[own])
            posterior._updates = (*together._updates[:-1], last)
            posteriors.append(posterior)
        return posteriors

    # --- private -----------------------------------------------------------------------------------------------

    def _check_rows(self, x: Tensor) -> None:
        check_input(x, self._functions.device)
        if x.dim() != 2 or not len(x):
            what = "no rows" if not len(x) else f"shape {tuple(x.shape)}"
            raise InputError(f"x has {what}: give [T, D], at least one row.")

    def _conditioned(self, x: Tensor, y: Tensor, noise: Tensor | None, root: Tensor | None) -> Posterior:
        self._check_rows(x)
        exact = self.inverse.exact
        new = WhitenedSystem(exact.covariance.at(x), noise, root=root)
        targets = new.targets(y).to(self.inverse.dtype)
        curvature = new.likelihood
        # 1. Covariance of every function with the new rows, given what came before.
        functions = self._functions.widened(x)
        columns = self.inverse.columns(x, self._functions)
        for update in self._updates:
            cross = self._cross(x.unsqueeze(0), update).squeeze(0)
            columns = columns - self._functions.padded(update.factor.solve(cross) @ update.columns, x)
        columns = curvature.whiten(columns.mT).mT
        # 2. That of the new rows among themselves, noise included.
        covariance = curvature.whiten(functions.values(x, columns))
        covariance = (covariance + covariance.mT) / 2
        covariance.diagonal().add_(1)
        factor = cholesky(covariance)
        # 3. The gaps between targets and predictions move the mean.
        gaps = curvature.whiten(targets - self._functions.values(x, self._coefficients))
        updated = copy.copy(self)
        for kept in ("_determinant", "_together"):
            vars(updated).pop(kept, None)
        updated._coefficients = self._functions.padded(self._coefficients, x) + factor.solve(gaps) @ columns
        updated._functions = functions
        updated._updates = (*self._updates, _Update(columns, factor, x, targets, new, gaps))
        return updated

    @cached_property
    def _determinant(self) -> LogDet:
        with torch.no_grad():
            return self.inverse.logdet(by_row=False)

    @cached_property
    def _together(self) -> Posterior:
        """The same posterior, prepared with all data from the start."""
        if not self._updates:
            return self
        system = self.inverse.system
        covariance, targets = system.covariance, [self._targets]
        noises = [] if system.noise is None else [system.noise.expand(covariance.num_rows)]
        for update in self._updates:
            covariance = covariance.extended(update.x)
            targets.append(update.targets.expand(len(self._targets), -1))
            if update.system.noise is not None:
                noises.append(update.system.noise.expand(update.targets.shape[1]))
        if len(noises) != len(targets):
            raise InputError("data of both kinds, noise variances and a root of the curvature, have no common system.")
        y = torch.cat(targets, -1)
        together = WhitenedSystem(covariance, torch.cat(noises))
        return Posterior(together, y.squeeze(0) if self._single else y, self.solver)

    def _shaped(self, columns: Tensor) -> Tensor:
        """`[K, ...]`, or without the first dimension if targets were given without it."""
        return columns.squeeze(0) if self._single else columns

    def _upper_bound(self, x: Tensor, rank: int) -> Tensor:
        """ψ ψᵀ - ψ V diag(λ / (1 + λ)) Vᵀ ψᵀ for ``rank`` eigenpairs of Ψᵀ Ψ: the prior is not truncated."""
        if self._directions is None or self._directions[0] < rank:
            # There may be fewer of them than asked for.
            self._directions = rank, self.inverse.directions(rank)
        directions = self._directions[1][:rank] * self.inverse.exact.weighted.scales
        half = self._functions.values(x.flatten(0, 1), directions).mT
        half = half.unflatten(0, (x.shape[0], -1))
        return self._functions.prior(x) - half @ half.mT

    def _cross(self, x: Tensor, update: _Update) -> Tensor:
        """Posterior covariance of f(x) with an update's whitened rows, given what came before, `[B, T*C, t]`."""
        flat = self._functions.values(x.flatten(0, 1), update.columns).mT
        return flat.unflatten(0, (x.shape[0], -1))

    def _split(self, x: Tensor) -> list[Tensor]:
        covariance = self.inverse.exact.covariance
        # Ranks that hold different numbers of rows must take as many test points at once.
        rows = 0 if covariance.sharded else covariance.num_rows
        size = 0 if covariance.features is None else covariance.features.num_features
        bytes_each = 8 * 4 * (size + rows)
        size = next(chunks(x.shape[0], bytes_each, covariance.memory_budget // 2)).stop
        return list(x.split(max(1, min(size, _ROWS))))


def gaussian_samples(mean: Tensor, covariance: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Samples `[S, ..., n]` of a Gaussian of mean `[..., n]`, by a root of its covariance `[n, n]`, which always is."""
    values, vectors = torch.linalg.eigh(covariance)
    draws = torch.randn(count, *mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return mean + draws @ (vectors * values.clamp_min(0).sqrt()).mT
