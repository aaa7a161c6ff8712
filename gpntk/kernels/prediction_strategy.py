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

    Several outputs that share x, with hyperparameters of their own or not, are a batch of posteriors. The host's own
    path is taken for batches of training inputs, for gradients through cached quantities
    (``settings.detach_test_caches(False)``), and for sums with other kernels.
    """

    def exact_prediction(
        self, test_mean: Tensor, test_test_covar: Tensor | LinearOperator, test_train_covar: Tensor | LinearOperator
    ) -> tuple[Tensor, Tensor | LinearOperator]:
        posteriors = self._posteriors(settings.observation_nan_policy.value() or "ignore")
        x = _test_inputs(test_train_covar)
        if posteriors is None or x is None or settings.detach_test_caches.off():
            with settings.cg_tolerance(_TOLERANCE), settings.eval_cg_tolerance(_TOLERANCE):
                return super().exact_prediction(test_mean, test_test_covar, test_train_covar)
        # The batch of the training data comes last.
        batch = torch.broadcast_shapes(x.shape[:-2], self.train_labels.shape[:-1])
        inputs = x.expand(*batch, *x.shape[-2:]).reshape(-1, len(posteriors), *x.shape[-2:]).transpose(0, 1)
        pairs = list(zip(posteriors, inputs, strict=True))
        means = torch.stack(
            [posterior.mean(part.flatten(0, 1)).unflatten(0, (len(part), -1)) for posterior, part in pairs]
        )
        mean = test_mean + means.transpose(0, 1).reshape(*batch, -1).to(test_mean.dtype)
        if settings.skip_posterior_variances.on():
            sizes: Any = test_test_covar.shape  # the host annotates each size as the tuple of them
            return mean, ZeroLinearOperator(*sizes, dtype=mean.dtype, device=mean.device)
        fast = settings.fast_pred_var.on() and isinstance(posteriors[0].solver, ConjugateGradients)
        rank = settings.max_root_decomposition_size.value() if fast else None
        covariances = torch.stack([posterior.covariance(part, rank) for posterior, part in pairs]).transpose(0, 1)
        return mean, DenseLinearOperator(covariances.reshape(*batch, *covariances.shape[-2:]).to(mean.dtype))

    def get_fantasy_strategy(
        self, inputs: Any, targets: Any, full_inputs: Any, full_targets: Any, full_output: Any, **kwargs: Any
    ) -> DefaultPredictionStrategy:
        """The strategy given more observations, by an update of their rank.

        The host's, up to ``settings.max_cholesky_size`` rows and for batches of observations; beyond, ours, which
        factorises nothing again.
        """
        policy = settings.observation_nan_policy.value() or "ignore"
        posteriors = self._posteriors(policy)
        few = self.num_train <= (settings.max_cholesky_size.value() or 0)
        batched = full_inputs[0].dim() > 2 or full_targets.numel() != full_output.loc.numel()
        if few or posteriors is None or batched or len(posteriors) > 1:
            return super().get_fantasy_strategy(inputs, targets, full_inputs, full_targets, full_output, **kwargs)
        likelihood = self.likelihood.get_fantasy_likelihood(**kwargs)
        strategy = FeaturePredictionStrategy(full_inputs, full_output, full_targets, likelihood)
        problems, old = strategy._problems(), self.num_train
        assert problems is not None
        (problem,) = problems
        noise = problem.noise if problem.noise.shape[0] == 1 else problem.noise[old:]
        x = problem.features.x[self.train_inputs[0].shape[-2] :]
        residual = (strategy.train_labels - strategy.train_prior_dist.loc.reshape(-1))[old:]
        if policy != "ignore":
            noise = torch.where(residual.isnan(), torch.inf, noise)
        with torch.no_grad():
            updated = posteriors[0].condition_on(x, residual, noise)
        add_to_cache(strategy, "posteriors", [updated], policy)
        return strategy

    @cached(name="posteriors")
    def _posteriors(self, nan_policy: str) -> list[Posterior] | None:
        """One for every element of the labels' batch."""
        problems = self._problems()
        if problems is None:
            return None
        labels = self.train_labels.reshape(len(problems), -1)
        residuals = labels - self.train_prior_dist.loc.expand_as(self.train_labels).reshape(labels.shape)
        posteriors = []
        with torch.no_grad():
            for problem, residual in zip(problems, residuals, strict=True):
                missing = residual.isnan() if nan_policy != "ignore" else None
                posteriors.append(Posterior(problem.system(missing), residual, problem.solver))
        return posteriors

    def _problems(self) -> list[Problem] | None:
        noisy = self.lik_train_train_covar.evaluate_kernel()
        if not isinstance(noisy, NoisyGramLinearOperator) or noisy.batch_shape != self.train_labels.shape[:-1]:
            return None
        return noisy.problems()


def _test_inputs(test_train_covar: Tensor | LinearOperator) -> Tensor | None:
    """The test inputs behind a cross-covariance, if they still show."""
    if not isinstance(test_train_covar, LinearOperator):
        return None
    gram = test_train_covar.evaluate_kernel()
    return gram.inputs[0] if isinstance(gram, FeatureGramLinearOperator) else None
