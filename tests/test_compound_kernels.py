"""An ``ExactGP`` on sums and products with a kernel of ours, and on infinite kernels, predicts by our posterior."""

from __future__ import annotations

from collections.abc import Callable

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import Kernel, LinearKernel, RBFKernel, ScaleKernel
from torch import Tensor, nn

import gpntk
from gpntk.inference import DenseCovariance
from gpntk.kernels.prediction_strategy import PosteriorPredictionStrategy
from tests.dense_gp import network


def tangent() -> Kernel:
    return ScaleKernel(gpntk.NTKKernel(network(1, 4)))


def infinite() -> Kernel:
    return gpntk.InfiniteNTKKernel(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1)))


KERNELS: dict[str, Callable[[], Kernel]] = {
    "infinite": lambda: ScaleKernel(infinite()),
    "sum, ours first": lambda: tangent() + ScaleKernel(RBFKernel()),
    "sum, ours last": lambda: ScaleKernel(RBFKernel()) + tangent(),
    "sum of three": lambda: LinearKernel() + infinite() + tangent(),
    "product": lambda: RBFKernel(active_dims=(0, 2)) * tangent(),
    "scaled sum": lambda: ScaleKernel(RBFKernel(active_dims=(1,)) + tangent()),
}


class GP(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, kernel: Kernel, likelihood: gpytorch.likelihoods.Likelihood) -> None:
        super().__init__(x, y, likelihood)
        self.mean_module, self.covar_module = gpytorch.means.ConstantMean(), kernel

    def forward(self, x: Tensor) -> MultivariateNormal:
        mean = self.mean_module(x)
        if mean.dim() < self.train_targets.dim():
            return MultitaskMultivariateNormal(mean.unsqueeze(-1).expand(*mean.shape, 3), self.covar_module(x))
        return MultivariateNormal(mean, self.covar_module(x))


def model_of(kernel: Kernel, x: Tensor, y: Tensor, likelihood: object = None) -> GP:
    likelihood = likelihood or gpytorch.likelihoods.GaussianLikelihood()
    model = GP(x, y, kernel, likelihood).double().eval()
    if isinstance(likelihood, gpytorch.likelihoods.GaussianLikelihood):
        likelihood.noise = 0.05
    model.mean_module.constant.data.fill_(0.2)
    return model


def dense(model: GP, x: Tensor, y: Tensor, noise: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Rasmussen and Williams (2006), eqs. 2.23 and 2.24, from the kernel's matrices."""
    seen = ~y.flatten().isnan()
    gram, cross, prior = (model.covar_module(*pair).to_dense() for pair in ((x, x), (z, x), (z, z)))
    matrix, cross = gram[seen][:, seen] + noise.expand(len(gram))[seen].diag(), cross[:, seen]
    mean = 0.2 + cross @ torch.linalg.solve(matrix, y.flatten()[seen] - 0.2)
    return mean, prior - cross @ torch.linalg.solve(matrix, cross.mT)


@pytest.mark.parametrize("name", KERNELS)
def test_predictions(name: str) -> None:
    x, z, y = torch.randn(20, 5).double(), torch.randn(2, 4, 5).double(), torch.randn(20).double()
    model = model_of(KERNELS[name](), x, y)
    noise = model.likelihood.noise.detach()
    # Beyond what the host would factorise.
    with gpytorch.settings.max_cholesky_size(5):
        inputs = z[0].clone().requires_grad_()
        posterior = model(inputs)
        assert isinstance(model.prediction_strategy, PosteriorPredictionStrategy)
        (ours,) = model.prediction_strategy._posteriors("ignore")
        assert isinstance(ours.system.covariance, DenseCovariance)
        mean, covariance = dense(model, x, y, noise, inputs)
        torch.testing.assert_close(posterior.mean, mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(posterior.covariance_matrix, covariance, rtol=1e-9, atol=1e-9)
        right = torch.randn(4, 4).double()
        both = posterior.mean.sum(), mean.sum()
        torch.testing.assert_close(*(torch.autograd.grad(v, inputs, retain_graph=True)[0] for v in both))
        gradients = [
            torch.autograd.grad((value * right).sum(), inputs)[0] for value in (posterior.covariance_matrix, covariance)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-8)
        with torch.no_grad():
            batched = model(z)
            for part, each in zip(z, zip(batched.mean, batched.covariance_matrix, strict=True), strict=True):
                for one, two in zip(each, dense(model, x, y, noise, part), strict=True):
                    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["infinite", "sum, ours last", "product"])
def test_fantasies_and_missing_values(name: str) -> None:
    x, z, y = torch.randn(20, 5).double(), torch.randn(4, 5).double(), torch.randn(20).double()
    y[[2, 7]] = torch.nan
    model = model_of(KERNELS[name](), x, y)
    noise = model.likelihood.noise.detach()
    with torch.no_grad(), gpytorch.settings.observation_nan_policy("mask"), gpytorch.settings.max_cholesky_size(5):
        model(z)
        for step in range(2):
            new, more = torch.randn(3, 5).double(), torch.randn(3).double()
            more[step] = torch.nan
            x, y = torch.cat([x, new]), torch.cat([y, more])
            model = model.get_fantasy_model(new, more)
        assert isinstance(model.prediction_strategy, PosteriorPredictionStrategy)
        posterior = model(z)
        mean, covariance = dense(model, x, y, noise, z)
    torch.testing.assert_close(posterior.mean, mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(posterior.covariance_matrix, covariance, rtol=1e-8, atol=1e-8)


def test_several_outputs_in_a_sum() -> None:
    module = network(3, 4)
    kernel = gpntk.NTKKernel(module) + gpntk.NTKKernel(module, parameters="4.*")
    x, z, y = torch.randn(8, 5).double(), torch.randn(2, 5).double(), torch.randn(8, 3).double()
    likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(3, has_task_noise=False)
    model = model_of(kernel, x, y, likelihood)
    likelihood.noise = 0.05
    with torch.no_grad():
        posterior = model(z)
        mean, covariance = dense(model, x, y, likelihood.noise.detach(), z)
    torch.testing.assert_close(posterior.mean.flatten(), mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(posterior.covariance_matrix, covariance, rtol=1e-8, atol=1e-8)


def test_fixed_noise_in_a_sum() -> None:
    x, z, y = torch.randn(20, 5).double(), torch.randn(4, 5).double(), torch.randn(20).double()
    noise = 0.02 + 0.1 * torch.rand(20).double()
    model = model_of(KERNELS["sum, ours last"](), x, y, gpytorch.likelihoods.FixedNoiseGaussianLikelihood(noise))
    with torch.no_grad():
        posterior = model(z)
        for one, two in zip((posterior.mean, posterior.covariance_matrix), dense(model, x, y, noise, z), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)


def test_the_hosts_own_sums_are_left_alone() -> None:
    x, y = torch.randn(6, 5).double(), torch.randn(6).double()
    model = model_of(RBFKernel() + LinearKernel(), x, y)
    with torch.no_grad():
        model(x[:2] + 1)
    assert not isinstance(model.prediction_strategy, PosteriorPredictionStrategy)
