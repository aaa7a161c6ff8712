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
    comes back dense. ``fast_pred_var``, batches of models and missing observations take the host's own path.
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
        host_path = (
            settings.fast_pred_var.on()
            or settings.skip_posterior_variances.on()
            or settings.observation_nan_policy.value() != "ignore"
        )
        if host_path:
            return super().exact_predictive_covar(test_test_covar, test_train_covar)
        cross = to_dense(test_train_covar).mT
        noisy = self._noisy_train_covar()
        if noisy.shape[-1] <= (settings.max_cholesky_size.value() or 0):
            # K* (L Lᵀ)⁻¹ K*ᵀ = (L⁻¹ K*ᵀ)ᵀ (L⁻¹ K*ᵀ): symmetric, and never larger than K** by more than rounding.
            half = torch.linalg.solve_triangular(self._train_cholesky(), cross, upper=False)
            correction = half.mT @ half
        else:
            with _tight_solves():
                correction = cross.mT @ noisy.solve(cross)
        return DenseLinearOperator(to_dense(test_test_covar) - correction)

    @cached(name="noisy_train_covar")
    def _noisy_train_covar(self) -> LinearOperator:
        covar = self.lik_train_train_covar
        return (covar.detach() if settings.detach_test_caches.on() else covar).evaluate_kernel()

    @cached(name="train_cholesky")
    def _train_cholesky(self) -> Tensor:
        return to_dense(self._noisy_train_covar().cholesky())


def _tight_solves() -> settings.cg_tolerance:
    return settings.cg_tolerance(min(settings.cg_tolerance.value() or _TOLERANCE, _TOLERANCE))
