"""How an ``ExactGP`` on one of our kernels predicts."""

from __future__ import annotations

from typing import final

import torch
from gpytorch import settings
from gpytorch.models.exact_prediction_strategies import DefaultPredictionStrategy
from linear_operator import to_dense
from linear_operator.operators import DenseLinearOperator, LinearOperator
from linear_operator.utils.memoize import cached
from torch import Tensor

# Relative residual that the mean and the variances are solved to; the host's default, 0.01, is visible in both.
_TOLERANCE = 1e-6


@final
class FeaturePredictionStrategy(DefaultPredictionStrategy):
    """The host's prediction, with our own noisy operator in the predictive covariance.

    The host rebuilds a plain operator there, whose conjugate gradients stall near a relative residual of 1e-5 and give
    wrong variances without a word. Here the training covariance is factorised once (up to
    ``settings.max_cholesky_size``) or solved to a relative residual of 1e-6, and the covariance of the test points
    comes back dense. Observations that ``settings.observation_nan_policy`` says to ignore are left out of it (the host
    leaves them out of the mean only); with batches of labels, a row that is missing in one is left out for all.
    ``fast_pred_var`` takes the host's own path.
    """

    @property
    def mean_cache(self) -> Tensor:
        """(K + noise)⁻¹ (y - m), to a relative residual of 1e-6."""
        with _tight_solves():
            return super().mean_cache

    def exact_predictive_covar(
        self, test_test_covar: LinearOperator, test_train_covar: LinearOperator
    ) -> LinearOperator:
        """K** - K* (K + noise)⁻¹ K*ᵀ."""
        if settings.fast_pred_var.on() or settings.skip_posterior_variances.on():
            return super().exact_predictive_covar(test_test_covar, test_train_covar)
        cross = to_dense(test_train_covar).mT
        policy = settings.observation_nan_policy.value() or "ignore"
        detached, observed = settings.detach_test_caches.on(), self._observed(policy)
        noisy = self._detached_covar(policy) if detached else self._noisy_covar(policy)
        cross = cross if observed is None else cross[..., observed, :]
        if noisy.shape[-1] <= (settings.max_cholesky_size.value() or 0):
            # K* (L Lᵀ)⁻¹ K*ᵀ = (L⁻¹ K*ᵀ)ᵀ (L⁻¹ K*ᵀ): symmetric, and never larger than K** by more than rounding.
            root = self._detached_cholesky(policy) if detached else to_dense(noisy.cholesky())
            half = torch.linalg.solve_triangular(root, cross, upper=False)
            correction = half.mT @ half
        else:
            with _tight_solves():
                correction = cross.mT @ noisy.solve(cross)
        return DenseLinearOperator(to_dense(test_test_covar) - correction)

    def _observed(self, nan_policy: str) -> Tensor | None:
        """Index of the observations that count, or None for all of them."""
        if nan_policy == "ignore":
            return None
        missing = self.train_labels.isnan()
        return (~missing.reshape(-1, missing.shape[-1]).any(0)).nonzero().squeeze(-1) if missing.any() else None

    def _noisy_covar(self, nan_policy: str) -> LinearOperator:
        """K + noise of the training data, with its graph."""
        covar, observed = self.lik_train_train_covar.evaluate_kernel(), self._observed(nan_policy)
        if observed is None:
            return covar
        return DenseLinearOperator(to_dense(covar)[..., observed, :][..., observed])

    # What carries a graph is not kept: a graph serves one backward pass, and a cache every later one.

    @cached(name="detached_covar")
    def _detached_covar(self, nan_policy: str) -> LinearOperator:
        with torch.no_grad():
            return self._noisy_covar(nan_policy).detach()

    @cached(name="detached_cholesky")
    def _detached_cholesky(self, nan_policy: str) -> Tensor:
        with torch.no_grad():
            return to_dense(self._detached_covar(nan_policy).cholesky())


def _tight_solves() -> settings.cg_tolerance:
    return settings.cg_tolerance(min(settings.cg_tolerance.value() or _TOLERANCE, _TOLERANCE))
