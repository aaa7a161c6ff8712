"""Fantasies of an ``ExactGP`` beyond the size that the host factorises: batches, noises, gradients."""

import gpytorch
import pytest
import torch
from torch import Tensor

from gpntk.inference import FunctionSpace, Posterior
from gpntk.kernels.prediction_strategy import PosteriorPredictionStrategy
from tests.dense_gp import SOLVERS, Dense, Problem, jacobian
from tests.test_posterior import case, centred, model_of

BEYOND = gpytorch.settings.max_cholesky_size(5)


def conditioned(problem: Problem, x: Tensor, y: Tensor, noise: Tensor | None = None) -> Dense:
    noise = problem.noise.expand(len(y)) if noise is None else noise
    return centred(problem).with_rows(x, y - 0.2, torch.where(y.isnan(), torch.inf, noise))


def check(
    posterior: gpytorch.distributions.MultivariateNormal, dense: list[Dense], problem: Problem, z: Tensor
) -> None:
    k, shape = jacobian(problem.module, z), posterior.mean.shape
    means, covariances = (
        values.reshape(len(dense), *values.shape[values.dim() - trailing :])
        for values, trailing in ((posterior.mean, len(posterior.event_shape)), (posterior.covariance_matrix, 2))
    )
    assert shape[: len(shape) - len(posterior.event_shape)].numel() == len(dense)
    for mean, covariance, each in zip(means, covariances, dense, strict=True):
        torch.testing.assert_close(mean.flatten(), each.mean(k) + 0.2, rtol=0, atol=1e-5)
        expected = each.covariance(k)
        assert (covariance - expected).abs().max() < 4e-3 * expected.max()


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("name", SOLVERS)
def test_batches(name: str, outputs: int) -> None:
    """Of places, and of several values at the same places; and fantasies of the fantasies."""
    likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(3, has_task_noise=False) if outputs > 1 else None
    problem, z = case(25, outputs, torch.tensor([0.05])), torch.randn(4, 5).double()
    model = model_of(problem, SOLVERS[name], likelihood).eval()
    model.likelihood.noise = problem.noise
    x, y = torch.randn(2, 3, 5).double(), torch.randn(4, 2, 3, outputs).double()
    given = y if outputs > 1 else y.squeeze(-1)
    with torch.no_grad(), BEYOND:
        model(z)
        same_number, more_values = model.get_fantasy_model(x, given[0]), model.get_fantasy_model(x, given)
        for fantasy, values in ((same_number, y[:1]), (more_values, y)):
            assert isinstance(fantasy.prediction_strategy, PosteriorPredictionStrategy)
            batch = (2,) if fantasy is same_number else (4, 2)
            dense = [conditioned(problem, x[i], values[f, i].flatten()) for f in range(len(values)) for i in range(2)]
            check(fantasy(z.expand(*batch, 4, 5)), dense, problem, z)
        again = same_number.get_fantasy_model(x.flip(0)[:, :1], given[1][:, :1])
        pairs = [
            conditioned(problem, torch.cat([x[i], x[1 - i][:1]]), torch.cat([y[0, i], y[1, i, :1]]).flatten())
            for i in range(2)
        ]
        check(again(z.expand(2, 4, 5)), pairs, problem, z)


def test_a_noise_of_their_own_and_missing_values() -> None:
    noise = 0.05 + 0.1 * torch.rand(25).double()
    problem, z = case(25, 1, noise), torch.randn(4, 5).double()
    likelihood = gpytorch.likelihoods.FixedNoiseGaussianLikelihood(noise)
    model = model_of(problem, FunctionSpace(), likelihood).eval()
    x, y, new = torch.randn(2, 3, 5).double(), torch.randn(2, 3).double(), 0.1 + torch.rand(2, 3).double()
    y[1, 2] = torch.nan
    with torch.no_grad(), BEYOND, gpytorch.settings.observation_nan_policy("mask"):
        model(z)
        posterior = model.get_fantasy_model(x, y, noise=new)(z.expand(2, 4, 5))
    check(posterior, [conditioned(problem, x[i], y[i], new[i]) for i in range(2)], problem, z)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_gradients_with_respect_to_new_inputs(batch: tuple[int, ...]) -> None:
    """By the host, with an exact factorisation; it cuts those of variances, unless caches are not detached."""
    problem, z = case(25, 1, torch.tensor([0.05])), torch.randn(1, 5).double()
    x, y = torch.randn(*batch, 2, 5).double().requires_grad_(), torch.randn(*batch, 2).double()
    model = model_of(problem, FunctionSpace()).eval()
    with BEYOND, gpytorch.settings.detach_test_caches(False):
        model(z)
        posterior = model.get_fantasy_model(x, y)(z.expand(*batch, 1, 5))
        (posterior.mean.sum() + posterior.variance.sum()).backward()

    def total(x: Tensor) -> float:
        k, pairs = jacobian(problem.module, z), zip(x.reshape(-1, 2, 5), y.reshape(-1, 2), strict=True)
        dense = [conditioned(problem, one, values) for one, values in pairs]
        return sum(float(each.mean(k) + each.covariance(k)[0, 0]) for each in dense)

    step = torch.zeros_like(x)
    step[..., 1, 3] = 1e-5
    with torch.no_grad():
        expected = (total(x + step) - total(x - step)) / 2e-5
    assert x.grad is not None
    assert x.grad[..., 1, 3].sum().item() == pytest.approx(expected, rel=1e-4)


def test_several_targets_cost_one_update() -> None:
    problem = case(25, 1, torch.tensor([0.05]))
    posterior, x = Posterior(problem.system, problem.y), torch.randn(2, 5).double()
    y, z = torch.randn(3, 2).double(), torch.randn(4, 5).double()
    fantasies = posterior.fantasies(x, y, problem.noise)
    for fantasy, values in zip(fantasies, y, strict=True):
        alone = posterior.condition_on(x, values, problem.noise)
        torch.testing.assert_close(fantasy.mean(z), alone.mean(z))
        torch.testing.assert_close(fantasy.covariance(z), alone.covariance(z))
        assert fantasy._updates[0].columns is fantasies[0]._updates[0].columns
