"""Laplace's method: a Gaussian at the mode of p(f | y), for any likelihood that is concave in f.

The prior is f ~ N(m, K), any m and K. All is written in the dual coefficients α, f = m + K α, so that K may be
singular: a kernel of few features is. The mode is where α is the gradient g(f) of log p(y | f); Newton's steps are

    α ← α + r - P K r,   r = g(f) - α,   P = (K + Λ⁻¹)⁻¹ = R B⁻¹ Rᵀ,

each a solve of a `WhitenedSystem` whose noise is a block per input. The logarithm of the posterior rises along such a
step whatever Λ is, so that one factorisation serves several steps, as long as they converge well.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpntk._checks import check_input, check_kinds, check_values
from gpntk.errors import InputError, SolveError
from gpntk.inference import (
    AbstractSolver,
    AutoSolver,
    DenseCovariance,
    FunctionSpace,
    WhitenedSystem,
)
from gpntk.inference.covariance import AbstractCovariance
from gpntk.inference.features import exact_dtype
from gpntk.inference.posterior import gaussian_samples
from gpntk.inference.solver import SolverChoice
from gpntk.likelihoods import AbstractLikelihood, Categorical, Latent
from gpntk.models.newton import AbstractNewtonSystem, IndependentNewtonSystem, WhitenedNewtonSystem

_MAX_STEPS = 200
# Halvings of one step.
_MAX_HALVINGS = 40
# A step with an old Λ promises at most this share of what the one before it did, else Λ is renewed: a factorisation
# costs as much as dozens of steps.
_GOOD_REDUCTION = 0.5
# Test points predicted at once.
_ROWS = 256
_ADVICE = "the prior variances are too large for the precision; scale the covariance down."


@final
class LaplacePosterior:
    """The Gaussian at the mode of p(f | y) ∝ p(y | f) N(f; m, K), with the inverse Hessian for its covariance.

        mean f̂,   V = K - K (K + Λ⁻¹)⁻¹ K,   log Z = log p(y | f̂) - ½ αᵀ K α - ½ log|I + K Λ|

    All in float64. ``log_evidence`` is log Z, differentiable in m and in what K is made of (once), the move of the mode
    with them included: to choose hyperparameters, construct the posterior anew at each, starting from the last one's
    ``dual``. With R `[N, C, q]` the root of Λ, q = C - 1 for C >= 2 classes, a Newton step costs as much as
    the solver: (N q)³ / 3 in function space, N q F² in weight space (K of features; at most `[F, F]` is kept), or some
    products by conjugate gradients. About five are needed. A dense kernel with one row per input for C outputs is
    K = k ⊗ I, independent outputs that share a kernel, as those of a new head do: a step then costs (C + 1) N³.

    Args:
        covariance: K, or a matrix `[N*C, N*C]` (or `[N, N]`, for k ⊗ I), which then can predict at the data only.
        labels: y, as the likelihood wants them: for classes, integers `[N]`.
        prior_mean: m `[N, C]`; default: zeros, with as many outputs as the covariance has.
        likelihood: log p(y | f); default: `gpntk.likelihoods.Categorical`.
        solver: How systems are solved; default `AutoSolver`.
        start: Dual coefficients `[N, C]` to start from: those of a posterior close by, with zeros for new points.

    Attributes:
        mode: f̂ `[N, C]`.
        dual: α = K⁻¹ (f̂ - m) = ∂log p(y | f̂)/∂f `[N, C]`.
        log_evidence: log Z `[]`, in nats.
        log_evidence_error: Its standard error, where conjugate gradients estimate the determinant; else 0.
        choice: The solver in charge, why, and what others would have cost.

    Raises:
        InputError: Shapes do not fit, a value is not finite, or a label is none of the likelihood's.
        SolveError: K is not positive semi-definite, or so large that Newton's method fails.

    Example:
        >>> import torch, gpntk
        >>> from gpntk.inference import DenseCovariance
        >>> x = torch.linspace(-1, 1, 8, dtype=torch.float64).unsqueeze(-1)
        >>> covariance = DenseCovariance(lambda one, two: 9 * (-2 * (one - two.mT) ** 2).exp(), x)
        >>> posterior = gpntk.models.LaplacePosterior(covariance, (x[:, 0] > 0).long())
        >>> posterior.mean(x[-1:]).item() > 1
        True

    References:
        Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, sections 3.4, 3.5 and 5.5.
        Immer, Korzepa and Bauer (2021), Improving predictions of Bayesian neural nets via local linearization,
        https://arxiv.org/abs/2008.08400: with K a tangent kernel, this is the Laplace-GGN posterior of the network.
    """

    mode: Tensor
    dual: Tensor
    log_evidence: Tensor

    def __init__(
        self,
        covariance: AbstractCovariance | Tensor,
        labels: Tensor,
        prior_mean: Tensor | None = None,
        *,
        likelihood: AbstractLikelihood | None = None,
        solver: AbstractSolver | None = None,
        start: Tensor | None = None,
    ) -> None:
        given, mean = _as_covariance(covariance, prior_mean)
        self.likelihood = Categorical() if likelihood is None else likelihood
        self._given, self._solver = given, AutoSolver() if solver is None else solver
        check_kinds(AbstractLikelihood, "a likelihood, Categorical() say", likelihood=self.likelihood)
        check_kinds(AbstractSolver, "a solver, WeightSpace() say, or None", solver=self._solver)
        _check(given, mean, start)
        self.labels = self.likelihood.check(labels, *mean.shape)
        # With a graph, where there is one: the matrix K, or the prior variances.
        hyperparameters = given.gram() if given.features is None else given.weighted.given
        self._exact = exact = given.to(exact_dtype(given.device))
        self._mean = mean.detach().to(exact.dtype)
        with torch.no_grad():
            if exact.num_rows == self._mean.numel():
                self.choice: SolverChoice = self._solver.select(self._whitened(self._mean))
            else:
                self.choice = SolverChoice(FunctionSpace(), "outputs share a dense kernel: each is factorised.")
            self.mode, self.dual = self._find_mode(start)
            self._at_mode = self._system(self.mode)
            self._determinant = self._at_mode.logdet()
        self.log_evidence_error = 0.5 * self._determinant.standard_error
        self.log_evidence = _LogEvidence.apply(mean, hyperparameters, self)  # pyright: ignore[reportAttributeAccessIssue]

    # --- predictions -------------------------------------------------------------------------------------------

    def mean(self, x: Tensor) -> Tensor:
        """Mean of f(x) - m(x), K(x, X) α `[T*C]` for x `[T, D]`; add the prior mean."""
        check_input(x, self._exact.device)
        columns = self._exact.values(x, self._exact.coefficients(self._columns(self.dual)))
        return columns.mT.flatten()

    def variance(self, x: Tensor) -> Tensor:
        """Posterior variances of f(x) `[T*C]` for x `[T, D]`."""
        return self.latent(x).covariance.diagonal(dim1=-2, dim2=-1).flatten().clamp_min(0)

    def covariance(self, x: Tensor) -> Tensor:
        """Posterior covariance of f(x) `[..., T*C, T*C]` for x `[..., T, D]`."""
        check_input(x, self._exact.device)
        batched = self._at_mode.covariance(x.reshape(-1, *x.shape[-2:]))
        return batched.reshape(*x.shape[:-2], *batched.shape[-2:])

    def latent(self, x: Tensor, prior_mean: Tensor | None = None) -> Latent:
        """Outputs f(x) at each of x `[T, D]`: mean `[T, C]` and covariance `[T, C, C]`; prior mean m(x) `[T, C]`."""
        mean = self.mean(x).unflatten(0, (len(x), -1))
        if prior_mean is not None and prior_mean.shape != mean.shape:
            raise InputError(f"prior_mean must be [T, C], here {tuple(mean.shape)}, got {tuple(prior_mean.shape)}.")
        return Latent(mean if prior_mean is None else mean + prior_mean, self._blocks(x.split(_ROWS)))

    def predict(self, x: Tensor, prior_mean: Tensor | None = None) -> Tensor:
        """E[y] at x `[T, D]`: probabilities of classes `[T, K]`, or means `[T, C]`."""
        return self.likelihood.predictive(*self.latent(x, prior_mean))

    def sample(self, x: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Joint samples of f(x) - m(x) `[S, T*C]` for x `[T, D]`."""
        return gaussian_samples(self.mean(x), self.covariance(x), count, generator)

    # --- what the labels say of the model ----------------------------------------------------------------------

    def leave_one_out(self) -> Latent:
        """Outputs at each training point, given the others' labels: mean `[N, C]`, covariance `[N, C, C]`.

        Takes a point's own factor out of the Gaussian, (V⁻¹ - Λ)⁻¹ and f̂ - (V⁻¹ - Λ)⁻¹ α, block by block, without
        refitting. The sum over the points of the log probabilities of their labels is the leave-one-out log predictive
        density, by which hyperparameters can be compared.

        References:
            Vehtari et al. (2016), Bayesian leave-one-out cross-validation approximations for Gaussian latent variable
            models, https://arxiv.org/abs/1412.7461 (there LA-LOO).
        """
        with torch.no_grad():
            posterior, root = self._blocks(self._exact.inputs(_ROWS)), self.likelihood.root(self.mode, self.labels)
            # (V⁻¹ - Λ)⁻¹ = V + V R (I - Rᵀ V R)⁻¹ Rᵀ V
            right = posterior @ root
            inner = -root.mT @ right
            inner.diagonal(dim1=-2, dim2=-1).add_(1)
            covariance = posterior + right @ torch.linalg.solve(inner, right.mT)
            return Latent(self.mode - (covariance @ self.dual.unsqueeze(-1)).squeeze(-1), covariance)

    def effective_parameters(self) -> float:
        """tr K (K + Λ⁻¹)⁻¹, how many independent numbers the labels have taught."""
        with torch.no_grad():
            return float(self._at_mode.shares().sum())

    # --- more data ---------------------------------------------------------------------------------------------

    def condition_on(self, x: Tensor, labels: Tensor, prior_mean: Tensor | None = None) -> LaplacePosterior:
        """The posterior with more labels, at x `[T, D]`; Newton's method starts from the old mode."""
        new = self.mode.new_zeros(x.shape[0], self.mode.shape[1])
        checked = self.likelihood.check(labels, *new.shape)
        return LaplacePosterior(
            self._given.extended(x),
            torch.cat([self.labels, checked.to(self.labels)]),
            torch.cat([self._mean, new if prior_mean is None else prior_mean.to(new)]),
            likelihood=self.likelihood,
            solver=self._solver,
            start=torch.cat([self.dual, new]),
        )

    def _system(self, f: Tensor) -> AbstractNewtonSystem:
        """What is to be solved at f `[N, C]`; all steps by one solver."""
        if self._exact.num_rows != f.numel():
            return IndependentNewtonSystem(self._exact, self.likelihood, self.labels, f)
        inverse = self.choice.solver.prepare(self._whitened(f))
        return WhitenedNewtonSystem(inverse, self.likelihood, self.labels, f)

    def _whitened(self, f: Tensor) -> WhitenedSystem:
        return WhitenedSystem(self._exact, root=self.likelihood.root(f, self.labels))

    def _columns(self, v: Tensor) -> Tensor:
        """v `[N, C]` as columns for K: one of all rows, `[1, N*C]`, or one for each output that shares it, `[C, N]`."""
        return v.reshape(1, -1) if self._exact.num_rows == v.numel() else v.mT

    def _product(self, v: Tensor) -> Tensor:
        """K v `[N, C]`."""
        return self._exact.product(self._columns(v)).mT.reshape(v.shape)

    def _blocks(self, parts: Iterable[Tensor]) -> Tensor:
        """Posterior covariance of f at single inputs, given in parts: `[T, C, C]`."""
        return torch.cat([self._at_mode.covariance(x.unsqueeze(1)) for x in parts])

    def _log_posterior(self, f: Tensor, dual: Tensor) -> Tensor:
        """log p(y | f) - ½ αᵀ K α `[]`."""
        return self.likelihood.log_prob(f, self.labels) - 0.5 * (dual * (f - self._mean)).sum()

    def _find_mode(self, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """f̂ and α at the mode, by Newton's method with the Λ of the last steps as long as that serves."""

        def ascend(gap: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """A step of α, that of f with it, and twice the rise that they promise."""
            step = gap - system.solve(self._product(gap))
            move = self._product(step)
            return step, move, (gap * move).sum()

        dual, f = torch.zeros_like(self._mean), self._mean
        value = self._log_posterior(f, dual)
        if start is not None:
            warm_dual = start.to(dual)
            warm = f + self._product(warm_dual)
            if self._log_posterior(warm, warm_dual) > value:
                dual, f, value = warm_dual, warm, self._log_posterior(warm, warm_dual)
        system, renewed, last_gain = self._system(f), False, torch.inf
        epsilon = torch.finfo(f.dtype).eps
        for _ in range(_MAX_STEPS):
            # 1. What a step with the present Λ promises; more than rounding can show has a mode to rise to.
            gap, unit = self.likelihood.gradient(f, self.labels) - dual, 1 + value.abs()
            step, move, gain = ascend(gap)
            stalled = bool(gain > _GOOD_REDUCTION * last_gain)
            if gain <= epsilon**1.25 * unit or (stalled and renewed and gain <= epsilon**0.75 * unit):
                return f, dual
            # 2. A new Λ where the old one serves no longer.
            renewed = stalled
            if renewed:
                system = self._system(f)
                step, move, gain = ascend(gap)
            # 3. The longest of the steps 1, ½, ¼, ... along which the log posterior does not fall, but for rounding.
            for _ in range(_MAX_HALVINGS):
                risen = self._log_posterior(f + move, dual + step)
                if risen >= value - epsilon**0.75 * unit:
                    break
                step, move = step / 2, move / 2
            else:
                raise SolveError(f"Newton's method found no way up from a log posterior of {value:.6g}: {_ADVICE}")
            dual, f, value, last_gain = dual + step, f + move, risen, gain.item()
        raise SolveError(f"Newton's method did not find the mode in {_MAX_STEPS} steps: {_ADVICE}")


class _LogEvidence(torch.autograd.Function):
    """log Z, whose derivatives are closed forms at the mode.

    There the derivative of the log posterior in f is zero, so that f̂ moves log Z by its log-determinant alone: with
    q = -½ ∂log|B|/∂f and ∂f̂ = (I + KΛ)⁻¹ (∂m + ∂K α), u = (I + ΛK)⁻¹ q = q - P K q,

        ∂log Z = (α + u)ᵀ ∂m + ½ αᵀ ∂K α - ½ tr(P ∂K) + uᵀ ∂K α.
    """

    @staticmethod
    def forward(ctx: Any, prior_mean: Tensor, hyperparameters: Tensor, posterior: LaplacePosterior) -> Tensor:
        ctx.posterior, ctx.dtypes = posterior, (prior_mean.dtype, hyperparameters.dtype)
        return posterior._log_posterior(posterior.mode, posterior.dual) - 0.5 * posterior._determinant.value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        posterior: LaplacePosterior = ctx.posterior
        system, dual = posterior._at_mode, posterior.dual
        q = -0.5 * posterior.likelihood.slope(posterior.mode, posterior.labels, system.shares())
        u = q - system.solve(posterior._product(q))
        by_mean = gradients[0] * (dual + u)
        by_hyperparameters = None
        if ctx.needs_input_grad[1]:
            by_hyperparameters = (gradients[0] * system.slope(dual, u)).to(ctx.dtypes[1])
        return by_mean.to(ctx.dtypes[0]), by_hyperparameters, None


def _as_covariance(
    covariance: AbstractCovariance | Tensor, prior_mean: Tensor | None
) -> tuple[AbstractCovariance, Tensor]:
    """The covariance as one, and the prior mean `[N, C]`."""
    check_kinds(
        AbstractCovariance | Tensor, "FeatureCovariance(features, variances), or a matrix", covariance=covariance
    )
    if prior_mean is not None:
        check_values(covariance.device, prior_mean=prior_mean)
    if isinstance(covariance, Tensor):
        if prior_mean is None or prior_mean.dim() != 2:
            raise InputError("prior_mean must be [N, C]: a covariance that is a matrix does not say what C is.")
        points, outputs = prior_mean.shape
        rows = covariance.shape[0]
        if covariance.dim() != 2 or rows != covariance.shape[1] or rows not in (points, points * outputs):
            raise InputError(
                f"covariance must be [N*C, N*C], here {(points * outputs,) * 2}, or [N, N] if the outputs share a "
                f"kernel, got shape {tuple(covariance.shape)}."
            )
        check_input(covariance.detach(), covariance.device, "covariance")
        return DenseCovariance.of_matrix(covariance, rows // points), prior_mean
    if prior_mean is None:
        shape = covariance.num_samples, covariance.num_outputs
        prior_mean = torch.zeros(shape, dtype=covariance.dtype, device=covariance.device)
    return covariance, prior_mean


def _check(covariance: AbstractCovariance, prior_mean: Tensor, start: Tensor | None) -> None:
    if prior_mean.dim() != 2 or not prior_mean.numel() or not prior_mean.is_floating_point():
        raise InputError(
            f"prior_mean must be floating point [N, C], N and C at least 1, got {prior_mean.dtype} of shape "
            f"{tuple(prior_mean.shape)}."
        )
    points, outputs = prior_mean.shape
    shared = covariance.num_outputs == 1 and covariance.features is None
    if points != covariance.num_samples or (outputs != covariance.num_outputs and not shared):
        raise InputError(
            f"prior_mean is {tuple(prior_mean.shape)}, but the covariance has {covariance.num_samples} inputs and "
            f"{covariance.num_outputs} rows for each; only dense ones with one row each are shared by several outputs."
        )
    if start is not None:
        check_values(prior_mean.device, start=start)
    if start is not None and start.shape != prior_mean.shape:
        raise InputError(f"start must be [N, C], here {(points, outputs)}, got shape {tuple(start.shape)}.")
    for name, tensor in (("prior_mean", prior_mean), ("start", start)):
        if tensor is not None and not tensor.isfinite().all():
            raise InputError(f"{name} has values that are not finite.")
