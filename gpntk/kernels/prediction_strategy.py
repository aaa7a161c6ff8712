"""How an ``ExactGP`` on one of our kernels predicts."""

from __future__ import annotations

from typing import Any, final

import torch
from gpytorch import settings
from gpytorch.models.exact_prediction_strategies import DefaultPredictionStrategy
from linear_operator.operators import DenseLinearOperator, LinearOperator, ZeroLinearOperator
from linear_operator.utils.memoize import add_to_cache, cached
from torch import Tensor

from gpntk.inference import ConjugateGradients, Posterior
from gpntk.operators import FeatureGramLinearOperator, NoisyGramLinearOperator
from gpntk.operators.noisy_gram import Problem

# Relative residual of the host's own solves; its default, 0.01, is visible in means and variances.
_TOLERANCE = 1e-6


@final
class FeaturePredictionStrategy(DefaultPredictionStrategy):
    """Predictions by `gpntk.inference.Posterior`, prepared once by the kernel's solver.

    The mean is J(x*) w, whatever N; the covariance of the test points comes back dense. Observations that
    ``settings.observation_nan_policy`` says to ignore are left out of both (the host leaves them out of the mean only).
    ``settings.fast_pred_var`` takes a low-rank cache of ``settings.max_root_decomposition_size`` features where the
    solver iterates: variances are then upper bounds, at a cost that does not depend on N. (Pleiss et al. 2018.)

    The host's own path is taken for real batches of training inputs, for gradients through cached quantities
    (``settings.detach_test_caches(False)``), and for sums with other kernels.
    """

    def exact_prediction(
        self, test_mean: Tensor, test_test_covar: Tensor | LinearOperator, test_train_covar: Tensor | LinearOperator
    ) -> tuple[Tensor, Tensor | LinearOperator]:
        posterior = self._posterior(settings.observation_nan_policy.value() or "ignore")
        x = _test_inputs(test_train_covar)
        if posterior is None or x is None or settings.detach_test_caches.off():
            with settings.cg_tolerance(_TOLERANCE), settings.eval_cg_tolerance(_TOLERANCE):
                return super().exact_prediction(test_mean, test_test_covar, test_train_covar)
        flat = posterior.mean(x.reshape(-1, x.shape[-1]))
        mean = test_mean + flat.reshape(*x.shape[:-2], -1).to(test_mean.dtype)
        if settings.skip_posterior_variances.on():
            sizes: Any = test_test_covar.shape  # the host annotates each size as the tuple of them
            return mean, ZeroLinearOperator(*sizes, dtype=mean.dtype, device=mean.device)
        fast = settings.fast_pred_var.on() and isinstance(posterior.solver, ConjugateGradients)
        rank = settings.max_root_decomposition_size.value() if fast else None
        return mean, DenseLinearOperator(posterior.covariance(x, rank).to(mean.dtype))

    def get_fantasy_strategy(
        self, inputs: Any, targets: Any, full_inputs: Any, full_targets: Any, full_output: Any, **kwargs: Any
    ) -> DefaultPredictionStrategy:
        """The strategy given more observations, by an update of their rank.

        The host's, up to ``settings.max_cholesky_size`` rows and for batches of observations; beyond, ours, which
        factorises nothing again.
        """
        policy = settings.observation_nan_policy.value() or "ignore"
        posterior = self._posterior(policy)
        few = self.num_train <= (settings.max_cholesky_size.value() or 0)
        batched = full_inputs[0].dim() > 2 or full_targets.numel() != full_output.loc.numel()
        if few or posterior is None or batched:
            return super().get_fantasy_strategy(inputs, targets, full_inputs, full_targets, full_output, **kwargs)
        likelihood = self.likelihood.get_fantasy_likelihood(**kwargs)
        strategy = FeaturePredictionStrategy(full_inputs, full_output, full_targets, likelihood)
        problem, old = strategy._problem(), self.num_train
        assert problem is not None
        noise = problem.noise if problem.noise.shape[0] == 1 else problem.noise[old:]
        x = problem.features.x[self.train_inputs[0].shape[-2] :]
        residual = (strategy.train_labels - strategy.train_prior_dist.loc.reshape(-1))[old:]
        if policy != "ignore":
            noise = torch.where(residual.isnan(), torch.inf, noise)
        with torch.no_grad():
            updated = posterior.condition_on(x, residual, noise)
        add_to_cache(strategy, "posterior", updated, policy)
        return strategy

    @cached(name="posterior")
    def _posterior(self, nan_policy: str) -> Posterior | None:
        problem, labels = self._problem(), self.train_labels
        if problem is None or labels.dim() != 1:
            return None
        missing = labels.isnan() if nan_policy != "ignore" else None
        with torch.no_grad():
            return Posterior(problem.system(missing), labels - self.train_prior_dist.loc.reshape(-1), problem.solver)

    def _problem(self) -> Problem | None:
        noisy = self.lik_train_train_covar.evaluate_kernel()
        return noisy.problem() if isinstance(noisy, NoisyGramLinearOperator) and noisy.dim() == 2 else None


def _test_inputs(test_train_covar: Tensor | LinearOperator) -> Tensor | None:
    """The test inputs behind a cross-covariance, if they still show."""
    if not isinstance(test_train_covar, LinearOperator):
        return None
    gram = test_train_covar.evaluate_kernel()
    return gram.inputs[0] if isinstance(gram, FeatureGramLinearOperator) else None
