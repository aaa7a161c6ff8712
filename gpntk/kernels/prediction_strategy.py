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
# Rows up to which the host's own path goes by a dense factorisation: half a minute and 1.6 GB.
_FACTORISED = 10_000


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
            with self._exactly(), settings.cg_tolerance(_TOLERANCE), settings.eval_cg_tolerance(_TOLERANCE):
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

        The host's, exact by a dense factorisation, up to ``settings.max_cholesky_size`` rows and where new inputs or
        targets carry a gradient; else ours, which factorises nothing again.
        """
        policy = settings.observation_nan_policy.value() or "ignore"
        posteriors, most = self._posteriors(policy), settings.max_cholesky_size.value() or 0
        graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, targets))
        if self.num_train <= most or graph or posteriors is None:
            with self._exactly():
                return super().get_fantasy_strategy(inputs, targets, full_inputs, full_targets, full_output, **kwargs)
        likelihood, held = self.likelihood.get_fantasy_likelihood(**kwargs), self.train_inputs[0].shape[-2]
        # Targets may have one batch dimension more than inputs: several values at the same places.
        places, batch = full_inputs[0].shape[:-2], full_targets.shape[: -len(full_output.event_shape)]
        mean, covariance = full_output.mean, full_output.lazy_covariance_matrix
        new_mean = mean.narrow(len(places), held, mean.shape[len(places)] - held)
        new = type(full_output)(new_mean, covariance[..., self.num_train :, self.num_train :])
        noisy = likelihood(new, inputs, **kwargs).lazy_covariance_matrix.evaluate_kernel()
        assert isinstance(noisy, NoisyGramLinearOperator)
        residuals = (full_targets.narrow(len(batch), held, new_mean.shape[len(places)]) - new_mean).flatten(len(batch))
        noise, x = noisy.noise(), full_inputs[0][..., held:, :]
        if policy != "ignore" and bool(residuals.isnan().any()):
            noise = torch.where(residuals.isnan(), torch.inf, noise)
        shared = places if noise.dim() <= len(places) + 1 else batch
        numbers = (
            torch.arange(len(posteriors), device="cpu").reshape(self.train_labels.shape[:-1]).expand(shared).flatten()
        )
        columns = residuals.reshape(-1, len(numbers), residuals.shape[-1]).transpose(0, 1)
        x = x.expand(*shared, *x.shape[-2:]).reshape(len(numbers), *x.shape[-2:])
        noise = noise.expand(*shared, noise.shape[-1]).reshape(len(numbers), -1)
        with torch.no_grad():
            updated = [
                posteriors[number].fantasies(*element)
                for number, *element in zip(numbers.tolist(), x, columns, noise, strict=True)
            ]
        full_inputs = [full.expand(*batch, *full.shape[-2:]) for full in full_inputs]
        prior = type(full_output)(
            mean.expand(*batch, *full_output.event_shape), covariance.expand(*batch, *covariance.shape[-2:])
        )
        strategy = FeaturePredictionStrategy(full_inputs, prior, full_targets, likelihood)
        add_to_cache(
            strategy, "posteriors", [each for fantasy in zip(*updated, strict=True) for each in fantasy], policy
        )
        return strategy

    def _exactly(self) -> settings.max_cholesky_size:
        """The host's own path by a factorisation; beyond its size, standard deviations of fantasies were off by 8 %."""
        most = settings.max_cholesky_size.value() or 0
        return settings.max_cholesky_size(max(most, self.num_train) if self.num_train <= _FACTORISED else most)

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
