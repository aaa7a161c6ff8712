"""Laplace's method for GP classification: a Gaussian at the mode of p(f | y), for softmax and Bernoulli likelihoods.

The prior is f ~ N(m, K), any m and K. All is written in the dual coefficients α, f = m + K α, so that K may be
singular: a kernel of few features is. The mode is where α = e_y - p(f); Newton's steps to it are

    α ← α + g - P K g,   g = e_y - p(f) - α,   P = (K + Λ⁻¹)⁻¹,

with P from `gpntk.models.pseudo_precision`. The logarithm of the posterior rises along such a step whatever Λ is, so
one factorisation serves several steps, as long as they converge well.
"""

from __future__ import annotations

from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpntk.errors import InputError, SolveError
from gpntk.likelihoods.links import Latent
from gpntk.likelihoods.old_categorical import Categorical, categorical, log_likelihood
from gpntk.likelihoods.targets import check_labels
from gpntk.models.pseudo_precision import AbstractPseudoPrecision, pseudo_precision

_MAX_STEPS = 200
# Halvings of one step.
_MAX_HALVINGS = 40
# A step with an old Λ promises at most this share of what the one before it did, else Λ is renewed.
_GOOD_REDUCTION = 0.1
_ADVICE = "the prior variances are too large for the precision; scale the covariance down, or use float64."


@final
class LaplacePosterior:
    """The Gaussian at the mode of p(f | y) ∝ p(y | f) N(f; m, K), with the inverse Hessian for its covariance.

        mean f̂,   S = K - K (K + Λ⁻¹)⁻¹ K,   log Z = log p(y | f̂) - ½ αᵀ K α - ½ log|I + K Λ|

    ``log_evidence`` is log Z, differentiable in m and K (once), the move of the mode with them included: to choose
    hyperparameters, construct the posterior anew at each, starting from the last one's ``dual``. At fixed
    hyperparameters all else is closed form. Two kinds of covariance are told apart by their shape:

    - K `[N*C, N*C]`, rows n*C + c. A factorisation costs (N (C - 1))³ / 3, with N instead of N (C - 1) if C = 1; a
      posterior needs about five, and keeps one such matrix beside K.
    - k `[N, N]`, for K = k ⊗ I: C independent outputs that share a kernel, as those of a new head do. A
      factorisation costs (C + 1) N³, and C matrices `[N, N]` are kept.

    Args:
        prior_mean: m `[N, C]`: logits of C >= 2 classes, or for C = 1 the logit of class 1 against class 0.
        covariance: K `[N*C, N*C]` or k `[N, N]`, positive semi-definite; float64 for variances above some hundreds.
        labels: Classes y `[N]`, integers from 0 to C - 1, or 0 and 1 if C = 1.
        start: Dual coefficients `[N, C]` to start from: those of a posterior close by, with zeros for new points.

    Attributes:
        mode: f̂ `[N, C]`.
        dual: α = K⁻¹ (f̂ - m) = e_y - p(f̂) `[N, C]`.
        log_evidence: log Z `[]`, in nats.

    Raises:
        InputError: Shapes do not fit, a value is not finite, or a label is none of the classes.
        SolveError: K is not positive semi-definite, or so large that Newton's method fails.

    Example:
        >>> import torch, gpntk
        >>> x = torch.linspace(-1, 1, 8, dtype=torch.float64)
        >>> kernel = 9 * (-2 * (x[:, None] - x) ** 2).exp()
        >>> posterior = gpntk.models.old_laplace.LaplacePosterior(torch.zeros(8, 1).double(), kernel, (x > 0).long())
        >>> latent = posterior.predict(kernel[[7]], kernel[7, 7].view(1, 1, 1), torch.zeros(1, 1).double())
        >>> latent.mean.item() > 1
        True

    References:
        Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, sections 3.4, 3.5 and 5.5.
        Immer, Korzepa and Bauer (2021), Improving predictions of Bayesian neural nets via local linearization,
        https://arxiv.org/abs/2008.08400: with K a tangent kernel, this is the Laplace-GGN posterior of the network.
    """

    mode: Tensor
    dual: Tensor
    log_evidence: Tensor

    def __init__(self, prior_mean: Tensor, covariance: Tensor, labels: Tensor, start: Tensor | None = None) -> None:
        _check(prior_mean, covariance, labels, start)
        with torch.no_grad():
            self._covariance = covariance.detach().contiguous()
            state = _find_mode(prior_mean.detach(), self._covariance, labels.long(), start)
        self._precision = state.precision
        self._likelihood = state.likelihood
        self.mode, self.dual = state.mode, state.dual
        self.log_evidence = _LogEvidence.apply(prior_mean, covariance, self._covariance, state)  # pyright: ignore[reportAttributeAccessIssue]

    def predict(self, cross: Tensor, prior: Tensor, prior_mean: Tensor) -> Latent:
        """The latent outputs at M inputs: mean m* + K* α `[M, C]`, covariance K** - K* P K*ᵀ `[M, C, C]`.

        Args:
            cross: K* = K(X*, X) `[M*C, N*C]`; or k* `[M, N]` if the posterior is that of a shared k.
            prior: K(x*, x*) `[M, C, C]`; or k(x*, x*) `[M]`.
            prior_mean: m* `[M, C]`.
        """
        count, outputs = self._check_cross(cross, prior_mean)
        shape = (count,) if self._shared else (count, outputs, outputs)
        if prior.shape != shape:
            raise InputError(f"prior must have shape {shape}, got {tuple(prior.shape)}.")
        with torch.no_grad():
            mean = prior_mean + _product(cross, self.dual, count)
            return Latent(mean, self._as_blocks(prior) - self._precision.explained(cross, joint=False))

    def covariance(self, cross: Tensor, prior: Tensor) -> Tensor:
        """Joint covariance of the latent outputs at M inputs `[M*C, M*C]`, rows m*C + c.

        Args:
            cross: As for `predict`.
            prior: K(X*, X*) `[M*C, M*C]`; or k(X*, X*) `[M, M]`.
        """
        self._check_cross(cross, None)
        if prior.shape != (cross.shape[0], cross.shape[0]):
            raise InputError(
                f"prior must be square with the rows of cross, {cross.shape[0]}, got {tuple(prior.shape)}."
            )
        with torch.no_grad():
            identity = torch.eye(self.mode.shape[1], dtype=prior.dtype, device=prior.device)
            dense = torch.kron(prior, identity) if self._shared else prior
            return dense - self._precision.explained(cross, joint=True)

    def leave_one_out(self) -> Latent:
        """Latent outputs at each training point, given the others' labels: mean `[N, C]`, covariance `[N, C, C]`.

        Takes a point's own factor out of the Gaussian, (S⁻¹ - Λ)⁻¹ and f̂ - (S⁻¹ - Λ)⁻¹ (e_y - p), block by block,
        without refitting. The sum over the points of log ``probabilities(mean, covariance)[n, y_n]`` is the
        leave-one-out log predictive density, by which hyperparameters can be compared.

        References:
            Vehtari et al. (2016), Bayesian leave-one-out cross-validation approximations for Gaussian latent variable
            models, https://arxiv.org/abs/1412.7461 (there LA-LOO).
        """
        points, outputs = self.mode.shape
        with torch.no_grad():
            if self._shared:
                prior = self._as_blocks(self._covariance.diagonal())
            else:
                blocks = self._covariance.view(points, outputs, points, outputs)
                prior = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
            posterior = prior - self._precision.explained(self._covariance, joint=False)
            # (S⁻¹ - Λ)⁻¹ = S + S R (I - Rᵀ S R)⁻¹ Rᵀ S
            right = posterior @ self._likelihood.root
            inner = -self._likelihood.root.mT @ right
            inner.diagonal(dim1=-2, dim2=-1).add_(1)
            covariance = posterior + right @ torch.linalg.solve(inner, right.mT)
            return Latent(self.mode - (covariance @ self.dual.unsqueeze(-1)).squeeze(-1), covariance)

    # --- private -----------------------------------------------------------------------------------------------

    @property
    def _shared(self) -> bool:
        return self._covariance.shape[0] != self.mode.numel()

    def _as_blocks(self, prior: Tensor) -> Tensor:
        """K(x, x) `[M, C, C]`, also from k(x, x) `[M]`."""
        if not self._shared:
            return prior
        return prior.unsqueeze(-1).expand(-1, self.mode.shape[1]).diag_embed()

    def _check_cross(self, cross: Tensor, prior_mean: Tensor | None) -> tuple[int, int]:
        """M and C."""
        outputs = self.mode.shape[1]
        rows = 1 if self._shared else outputs
        if cross.dim() != 2 or cross.shape[1] != self._covariance.shape[0] or cross.shape[0] % rows:
            raise InputError(
                f"cross must have {self._covariance.shape[0]} columns, as the covariance has, and {rows} row(s) per "
                f"input, got shape {tuple(cross.shape)}."
            )
        count = cross.shape[0] // rows
        if prior_mean is not None and prior_mean.shape != (count, outputs):
            raise InputError(f"prior_mean must be [M, C], here {(count, outputs)}, got {tuple(prior_mean.shape)}.")
        return count, outputs


class _State(NamedTuple):
    """What holds at the mode."""

    mode: Tensor
    dual: Tensor
    log_posterior: Tensor
    """log p(y | f) - ½ αᵀ K α `[]`."""
    likelihood: Categorical
    precision: AbstractPseudoPrecision


class _LogEvidence(torch.autograd.Function):
    """log Z, whose derivatives are closed forms at the mode.

    There the derivative of the log posterior in f is zero, so that f̂ moves log Z by its log-determinant alone: with
    q = -½ ∂log|B|/∂f and ∂f̂ = (I + KΛ)⁻¹ (∂m + ∂K α), u = (I + ΛK)⁻¹ q = q - P K q,

        ∂log Z = (α + u)ᵀ ∂m + ½ αᵀ ∂K α - ½ tr(P ∂K) + uᵀ ∂K α.
    """

    @staticmethod
    def forward(ctx: Any, _prior_mean: Tensor, _covariance: Tensor, detached: Tensor, state: _State) -> Tensor:
        ctx.state, ctx.covariance = state, detached
        return state.log_posterior - 0.5 * state.precision.logdet

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        state, covariance = ctx.state, ctx.covariance
        gradient, slope = state.precision.derivatives()
        q = -0.5 * slope
        u = q - state.precision.solve(_product(covariance, q, q.shape[0]))
        # ½ ααᵀ + ½ (uαᵀ + αuᵀ) = ½ ((α + u)(α + u)ᵀ - uuᵀ), summed over the outputs if they share k
        both = (state.dual + u).reshape(covariance.shape[0], -1)
        u = u.reshape(covariance.shape[0], -1)
        gradient.neg_().addmm_(both, both.mT).addmm_(u, u.mT, alpha=-1).mul_(0.5 * gradients[0])
        return gradients[0] * both.view_as(state.dual), gradient, None, None


def _find_mode(prior_mean: Tensor, covariance: Tensor, labels: Tensor, start: Tensor | None) -> _State:
    """The mode, by Newton's method with the Λ of the last steps as long as that serves."""
    points = prior_mean.shape[0]

    def log_posterior(f: Tensor, dual: Tensor) -> Tensor:
        return log_likelihood(f, labels) - 0.5 * (dual * (f - prior_mean)).sum()

    def ascend(gap: Tensor, precision: AbstractPseudoPrecision) -> tuple[Tensor, Tensor, Tensor]:
        """A step of α, that of f with it, and twice the rise that they promise."""
        step = gap - precision.solve(_product(covariance, gap, points))
        move = _product(covariance, step, points)
        return step, move, (gap * move).sum()

    dual, f = torch.zeros_like(prior_mean), prior_mean
    value = log_posterior(f, dual)
    if start is not None:
        warm = prior_mean + _product(covariance, start, points)
        warm_value = log_posterior(warm, start)
        if warm_value > value:
            dual, f, value = start, warm, warm_value
    likelihood = categorical(f, labels)
    precision, renewed, last_gain = pseudo_precision(covariance, likelihood), False, torch.inf
    epsilon = torch.finfo(f.dtype).eps
    for _ in range(_MAX_STEPS):
        # 1. What a step with the present Λ promises; more than rounding can show has a mode to rise to.
        gap, unit = likelihood.residual - dual, 1 + value.abs()
        step, move, gain = ascend(gap, precision)
        stalled = bool(gain > _GOOD_REDUCTION * last_gain)
        if gain <= epsilon**1.25 * unit or (stalled and renewed and gain <= epsilon**0.75 * unit):
            precision = pseudo_precision(covariance, likelihood)
            return _State(f, dual, value, likelihood, precision)
        # 2. A new Λ where the old one serves no longer.
        renewed = stalled
        if renewed:
            precision = pseudo_precision(covariance, likelihood)
            step, move, gain = ascend(gap, precision)
        # 3. The longest of the steps 1, ½, ¼, ... along which the log posterior does not fall, but for rounding.
        for _ in range(_MAX_HALVINGS):
            risen = log_posterior(f + move, dual + step)
            if risen >= value - epsilon**0.75 * unit:
                break
            step, move = step / 2, move / 2
        else:
            raise SolveError(f"Newton's method found no way up from a log posterior of {value:.6g}: {_ADVICE}")
        dual, f, value, last_gain = dual + step, f + move, risen, gain.item()
        likelihood = categorical(f, labels)
    raise SolveError(f"Newton's method did not find the mode in {_MAX_STEPS} steps: {_ADVICE}")


def _product(covariance: Tensor, v: Tensor, points: int) -> Tensor:
    """K v `[M, C]` for v `[N, C]` and K `[M*C, N*C]`, or k `[M, N]` of K = k ⊗ I."""
    return (covariance @ v.reshape(covariance.shape[1], -1)).view(points, -1)


def _check(prior_mean: Tensor, covariance: Tensor, labels: Tensor, start: Tensor | None) -> None:
    if prior_mean.dim() != 2 or not prior_mean.numel() or not prior_mean.is_floating_point():
        raise InputError(
            f"prior_mean must be floating point [N, C], N and C at least 1, got {prior_mean.dtype} of shape "
            f"{tuple(prior_mean.shape)}."
        )
    points, outputs = prior_mean.shape
    sizes = (points * outputs, points)
    if covariance.dim() != 2 or covariance.shape[0] != covariance.shape[1] or covariance.shape[0] not in sizes:
        raise InputError(
            f"covariance must be [N*C, N*C], here {(sizes[0], sizes[0])}, or [N, N] if the outputs share a kernel, got "
            f"shape {tuple(covariance.shape)}."
        )
    if covariance.dtype != prior_mean.dtype:
        raise InputError(f"covariance is {covariance.dtype} but prior_mean is {prior_mean.dtype}: convert one of them.")
    if start is not None and start.shape != prior_mean.shape:
        raise InputError(f"start must be [N, C], here {(points, outputs)}, got shape {tuple(start.shape)}.")
    given = {"prior_mean": prior_mean, "covariance": covariance, "start": start}
    for name, tensor in given.items():
        if tensor is not None and not tensor.isfinite().all():
            raise InputError(f"{name} has values that are not finite.")
    check_labels(labels, max(2, outputs))
    if labels.shape[0] != points:
        raise InputError(f"labels has {labels.shape[0]} classes, but prior_mean has {points} rows.")
