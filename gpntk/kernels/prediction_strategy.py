"""What the host does with kernels that contain one of ours: how an ``ExactGP`` predicts, and what it must not do.

Sums and products of kernels, and the matrices of scaled ones, are the host's own classes, made by the left part's + or
by the user. Of kernels of networks, which have C rows per input, they do not ask all that is needed: the questions are
asked here, where it is imported. All other kernels go on as they were.
"""

from __future__ import annotations

from abc import ABC
from functools import partial, wraps
from typing import Any, NamedTuple, final

import torch
from gpytorch import settings
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import AdditiveKernel, Kernel, ProductKernel
from gpytorch.lazy import LazyEvaluatedKernelTensor
from gpytorch.likelihoods import Likelihood
from gpytorch.models.exact_prediction_strategies import DefaultPredictionStrategy
from linear_operator import to_dense
from linear_operator.operators import AddedDiagLinearOperator, DenseLinearOperator, LinearOperator, ZeroLinearOperator
from linear_operator.utils.memoize import add_to_cache, cached
from torch import Tensor

from gpntk.errors import InputError
from gpntk.inference import AbstractSolver, AutoSolver, DenseCovariance, Posterior, WhitenedSystem
from gpntk.inference.auto import largest_dense
from gpntk.memory import tracks_gradient
from gpntk.operators import FeatureGramLinearOperator
from gpntk.operators.noisy_gram import NoisyGramLinearOperator, noise_of

# Relative residual of the host's own solves; its default, 0.01, is visible in means and variances.
_TOLERANCE = 1e-6


class AbstractNetworkKernel(Kernel, ABC):
    """A kernel made from a network, finite or infinite: with it, an ``ExactGP`` predicts by our posterior."""

    def prediction_strategy(
        self, train_inputs: Any, train_prior_dist: MultivariateNormal, train_labels: Tensor, likelihood: Likelihood
    ) -> PosteriorPredictionStrategy:
        """How an ``ExactGP`` with this kernel predicts."""
        return PosteriorPredictionStrategy(train_inputs, train_prior_dist, train_labels, likelihood)


@final
class PosteriorPredictionStrategy(DefaultPredictionStrategy):
    """Predictions by `gpntk.inference.Posterior`, prepared once by the kernel's solver.

    With a bare kernel of features, the mean is J(x*) w, whatever N. Sums and products with other kernels, and infinite
    kernels, are dense covariances for the same posterior. The covariance of the test points comes back dense.
    Observations that ``settings.observation_nan_policy`` says to ignore are left out of both (the host leaves them out
    of the mean only). ``settings.fast_pred_var`` takes a low-rank cache of ``settings.max_root_decomposition_size``
    features where the solver iterates: variances are then upper bounds, at a cost that does not depend on N. (Pleiss et
    al. 2018.)

    Several outputs that share x, with hyperparameters of their own or not, are a batch of posteriors of features. The
    host's own path is taken for batches of training inputs, for other batches of kernels, and for gradients through
    cached quantities (``settings.detach_test_caches(False)``).
    """

    def exact_prediction(
        self, test_mean: Tensor, test_test_covar: Tensor | LinearOperator, test_train_covar: Tensor | LinearOperator
    ) -> tuple[Tensor, Tensor | LinearOperator]:
        posteriors = self._posteriors(settings.observation_nan_policy.value() or "ignore")
        dense = posteriors is not None and posteriors[0].system.covariance.features is None
        x = None if dense else _test_inputs(test_train_covar)
        if posteriors is None or (x is None and not dense) or settings.detach_test_caches.off():
            with self._exactly(), settings.cg_tolerance(_TOLERANCE), settings.eval_cg_tolerance(_TOLERANCE):
                return super().exact_prediction(test_mean, test_test_covar, test_train_covar)
        if x is None:
            return _from_matrices(posteriors, test_mean, to_dense(test_test_covar), to_dense(test_train_covar))
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
        fast = settings.fast_pred_var.on() and not posteriors[0].solver.is_direct
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
        graph = any(tracks_gradient(tensor) for tensor in (*inputs, targets))
        if self.num_train <= most or graph or posteriors is None:
            with self._exactly():
                return super().get_fantasy_strategy(inputs, targets, full_inputs, full_targets, full_output, **kwargs)
        likelihood = self.likelihood.get_fantasy_likelihood(**kwargs)
        batch = full_targets.shape[: -len(full_output.event_shape)]
        new = self._new_rows(
            likelihood(self._new_part(full_output), inputs, **kwargs), full_inputs, full_targets, batch
        )
        if policy != "ignore":
            new = new.without_missing()
        with torch.no_grad():
            updated = [
                posteriors[number].fantasies(*element)
                for number, *element in zip(*new.by_posterior(self.train_labels.shape[:-1]), strict=True)
            ]
        full_inputs = [full.expand(*batch, *full.shape[-2:]) for full in full_inputs]
        covariance = full_output.lazy_covariance_matrix
        prior = type(full_output)(
            full_output.mean.expand(*batch, *full_output.event_shape), covariance.expand(*batch, *covariance.shape[-2:])
        )
        strategy = PosteriorPredictionStrategy(full_inputs, prior, full_targets, likelihood)
        # What `_posteriors` would compute from all data; one element of the batch after the other.
        each = [posterior for fantasy in zip(*updated, strict=True) for posterior in fantasy]
        add_to_cache(strategy, "posteriors", each, policy)
        return strategy

    def _exactly(self) -> settings.max_cholesky_size:
        """The host's own path by a factorisation; beyond its size, standard deviations of fantasies were off by 8 %."""
        most = settings.max_cholesky_size.value() or 0
        dense = largest_dense(self.train_labels.device)
        return settings.max_cholesky_size(max(most, self.num_train) if self.num_train <= dense else most)

    @cached(name="posteriors")
    def _posteriors(self, nan_policy: str) -> list[Posterior] | None:
        """One for every element of the labels' batch."""
        systems = self._systems()
        if systems is None:
            return None
        labels = self.train_labels.reshape(len(systems), -1)
        residuals = labels - self.train_prior_dist.loc.expand_as(self.train_labels).reshape(labels.shape)
        posteriors = []
        with torch.no_grad():
            for (system, solver), residual in zip(systems, residuals, strict=True):
                known = system
                if nan_policy != "ignore" and bool(residual.isnan().any()):
                    assert system.noise is not None
                    noise = torch.where(residual.isnan(), torch.inf, system.noise.expand(residual.shape[0]))
                    known = WhitenedSystem(system.covariance, noise)
                posteriors.append(Posterior(known, residual, solver))
        return posteriors

    def _systems(self) -> list[tuple[WhitenedSystem, AbstractSolver]] | None:
        """The systems behind the covariance of the labels, one for every element of their batch."""
        noisy = self.lik_train_train_covar.evaluate_kernel()
        batch = self.train_labels.shape[:-1]
        if isinstance(noisy, NoisyGramLinearOperator) and noisy.batch_shape == batch:
            systems = noisy.systems()
            if systems is not None:
                return [(system, noisy.solver) for system in systems]
        prior = self.train_prior_dist.lazy_covariance_matrix
        lazy = isinstance(prior, LazyEvaluatedKernelTensor) and isinstance(noisy, AddedDiagLinearOperator)
        if not lazy or batch or noisy.batch_shape or prior.x1.dim() > 2 or tracks_gradient(prior.x1):
            return None
        with torch.no_grad():
            inner: Any = noisy._linear_op  # the host annotates it as a pair of operators
            gram, noise = inner.to_dense(), noise_of(noisy._diag_tensor)
        outputs = gram.shape[-1] // prior.x1.shape[-2]
        kernel = partial(_matrix, kernel=prior.kernel, params=prior.params)
        covariance = DenseCovariance(kernel, prior.x1, outputs, gram)
        return [(WhitenedSystem(covariance, noise), AutoSolver())]

    def _new_part(self, full: Any) -> Any:
        """The prior of all rows, of the new ones only."""
        held, places = self.train_inputs[0].shape[-2], full.mean.dim() - len(full.event_shape)
        mean = full.mean.narrow(places, held, full.mean.shape[places] - held)
        covariance = full.lazy_covariance_matrix
        return type(full)(mean, covariance[..., self.num_train :, self.num_train :])

    def _new_rows(self, noisy: Any, full_inputs: Any, full_targets: Tensor, batch: torch.Size) -> _NewRows:
        """Inputs, residuals and noise of the new rows, given their noisy prior."""
        held, mean = self.train_inputs[0].shape[-2], noisy.mean
        places = full_inputs[0].shape[:-2]
        targets = full_targets.narrow(len(batch), held, mean.shape[len(places)])
        covariance = noisy.lazy_covariance_matrix.evaluate_kernel()
        assert isinstance(covariance, AddedDiagLinearOperator)
        residuals = (targets - mean).flatten(len(batch))
        return _NewRows(full_inputs[0][..., held:, :], residuals, noise_of(covariance._diag_tensor), batch)


class _NewRows(NamedTuple):
    """New observations whose targets may have one batch dimension more than x: several values at the same places."""

    x: Tensor
    """`[*places, T, D]`."""
    residuals: Tensor
    """`[*batch, T*C]`."""
    noise: Tensor
    """`[..., T*C]`, or `[..., 1]`."""
    batch: torch.Size

    def without_missing(self) -> _NewRows:
        """With infinite noise where a target is NaN."""
        if not bool(self.residuals.isnan().any()):
            return self
        return self._replace(noise=torch.where(self.residuals.isnan(), torch.inf, self.noise))

    def by_posterior(self, elements: torch.Size) -> tuple[list[int], Tensor, Tensor, Tensor]:
        """For each place: the number of its posterior among ``elements``, x `[T, D]`, targets `[J, T*C]` and noise."""
        places = self.x.shape[:-2]
        shared = places if self.noise.dim() <= len(places) + 1 else self.batch
        numbers = torch.arange(elements.numel(), device="cpu").reshape(elements).expand(shared).flatten().tolist()
        columns = self.residuals.reshape(-1, len(numbers), self.residuals.shape[-1]).transpose(0, 1)
        x = self.x.expand(*shared, *self.x.shape[-2:]).reshape(len(numbers), *self.x.shape[-2:])
        noise = self.noise.expand(*shared, self.noise.shape[-1]).reshape(len(numbers), -1)
        return numbers, x, columns, noise


def _matrix(one: Tensor, two: Tensor, kernel: Kernel, params: dict[str, Any]) -> Tensor:
    """The matrix of a kernel at inputs from which its dimensions have been chosen."""
    return LazyEvaluatedKernelTensor(one, two, kernel=kernel, **params).to_dense()


def _from_matrices(
    posteriors: list[Posterior], test_mean: Tensor, prior: Tensor, cross: Tensor
) -> tuple[Tensor, LinearOperator]:
    """Predictions of dense covariances: the host has evaluated them, and shows x no longer."""
    # The batch of the training data comes last.
    batch = torch.broadcast_shapes(prior.shape[:-2], cross.shape[:-2])
    prior, cross = (v.expand(*batch, *v.shape[-2:]).reshape(-1, *v.shape[-2:]) for v in (prior, cross))
    count = len(posteriors)
    found = [posterior.of_matrices(cross[i::count], prior[i::count]) for i, posterior in enumerate(posteriors)]
    mean, covariance = (torch.stack(parts, 1).flatten(0, 1) for parts in zip(*found, strict=True))
    covariance = covariance.reshape(*batch, *covariance.shape[-2:]).to(test_mean.dtype)
    return test_mean + mean.reshape(*batch, -1).to(test_mean.dtype), DenseLinearOperator(covariance)


def _test_inputs(test_train_covar: Tensor | LinearOperator) -> Tensor | None:
    """The test inputs behind a cross-covariance, if they still show."""
    if not isinstance(test_train_covar, LinearOperator):
        return None
    gram = test_train_covar.evaluate_kernel()
    return gram.inputs[0] if isinstance(gram, FeatureGramLinearOperator) else None


def _has_network(kernel: Kernel) -> bool:
    return any(isinstance(part, AbstractNetworkKernel) for part in kernel.modules())


def _compound_strategy(
    kernel: Kernel,
    train_inputs: Any,
    train_prior_dist: MultivariateNormal,
    train_labels: Tensor,
    likelihood: Likelihood,
) -> DefaultPredictionStrategy:
    """That of a sum or a product of kernels: ours if it contains one of ours, else the host's."""
    strategy = PosteriorPredictionStrategy if _has_network(kernel) else DefaultPredictionStrategy
    return strategy(train_inputs, train_prior_dist, train_labels, likelihood)


def _with_equal_rows(forward: Any) -> Any:
    """``forward`` of a sum or a product whose parts have equally many rows per input: torch would broadcast one row."""

    @wraps(forward)
    def checked(kernel: Any, x1: Tensor, x2: Tensor, *args: Any, **params: Any) -> Any:
        if _has_network(kernel):
            rows = [part.num_outputs_per_input(x1, x2) for part in kernel.kernels]
            if len(set(rows)) > 1:
                parts = ", ".join(f"{type(part).__name__} {n}" for part, n in zip(kernel.kernels, rows, strict=True))
                raise InputError(
                    f"the parts of {type(kernel).__name__} differ in their rows per input: {parts}. A network of C "
                    "outputs has C: for one output, give its kernel output=0 (its number) or output='independent'; for "
                    f"all, make the others gpytorch.kernels.MultitaskKernel(..., num_tasks={max(rows)})."
                )
        return forward(kernel, x1, x2, *args, **params)

    return checked


def _plus(gram: Any, other: Any) -> Any:
    """A lazy matrix plus the noise of the labels, of which there must be one for each row."""
    if isinstance(other, LinearOperator) and other.shape[-1] != gram.shape[-1] and _has_network(gram.kernel):
        raise InputError(
            f"the kernel has {gram.shape[-1]} rows, but the likelihood's noise is of {other.shape[-1]} values: a "
            "network of C outputs has C rows per input. For one output, take output=0 (its number) or "
            "output='independent'. For all, return a MultitaskMultivariateNormal with a mean [N, C], "
            "gpntk.NetworkMean's say, and use a MultitaskGaussianLikelihood."
        )
    return LinearOperator.__add__(gram, other)


for _host in (AdditiveKernel, ProductKernel):
    if "prediction_strategy" not in vars(_host):
        setattr(_host, "prediction_strategy", _compound_strategy)  # noqa: B010
        setattr(_host, "forward", _with_equal_rows(_host.forward))  # noqa: B010
if "__add__" not in vars(LazyEvaluatedKernelTensor):
    setattr(LazyEvaluatedKernelTensor, "__add__", _plus)  # noqa: B010
