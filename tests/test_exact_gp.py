"""GPyTorch's ExactGP on our kernels, against the dense formulas."""

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from torch import Tensor

import gpntk
from gpntk.kernels.prediction_strategy import PosteriorPredictionStrategy
from gpntk.models import TangentGP
from tests.cases import mlp, reference_jacobian, scale_and_noise

SINGLE = mlp(1).double().eval()
MODULE = mlp(3).double().eval()


class TargetGP(gpytorch.models.ExactGP):
    """The README's model."""

    def __init__(self, x: Tensor, y: Tensor, likelihood: gpytorch.likelihoods.Likelihood) -> None:
        super().__init__(x, y, likelihood)
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(gpntk.NTKKernel(SINGLE))

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def fitted(rows: int) -> tuple[TargetGP, Tensor, Tensor]:
    x = torch.randn(rows, 5).double()
    y = x[:, 0].sin() + 0.1 * torch.randn(rows).double()
    model = TargetGP(x, y, gpytorch.likelihoods.GaussianLikelihood()).double()
    model.likelihood.noise = 0.05
    model.covar_module.outputscale = 0.7
    return model.eval(), x, y


def dense_posterior(model: TargetGP, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    scale, noise = model.covar_module.outputscale.detach(), model.likelihood.noise.detach()
    j, k = reference_jacobian(SINGLE, x), reference_jacobian(SINGLE, z)
    noisy = scale * j @ j.T + noise * torch.eye(len(x)).double()
    cross = scale * k @ j.T
    covariance = scale * k @ k.T - cross @ torch.linalg.solve(noisy, cross.T)
    return cross @ torch.linalg.solve(noisy, y), covariance


@pytest.mark.parametrize("fast", [False, True])
def test_posterior_by_cholesky(fast: bool) -> None:
    model, x, y = fitted(40)
    z = torch.randn(6, 5).double()
    mean, covariance = dense_posterior(model, x, y, z)
    with torch.no_grad(), gpytorch.settings.fast_pred_var(fast):
        posterior = model(z)
    torch.testing.assert_close(posterior.mean, mean, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(posterior.covariance_matrix, covariance, rtol=1e-7, atol=1e-9)


def test_posterior_by_conjugate_gradients_is_as_good() -> None:
    model, x, y = fitted(120)
    z = torch.randn(6, 5).double()
    mean, covariance = dense_posterior(model, x, y, z)
    with torch.no_grad(), gpytorch.settings.max_cholesky_size(10), gpytorch.settings.max_cg_iterations(2000):
        posterior = model(z)
        assert isinstance(model.prediction_strategy, PosteriorPredictionStrategy)
        torch.testing.assert_close(posterior.mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(posterior.variance, covariance.diagonal(), rtol=1e-3, atol=1e-6)


def test_marginal_likelihood_and_its_gradients() -> None:
    model, x, y = fitted(30)
    model.train()
    objective = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    value = objective(model(x), y) * 30
    value.backward()
    scale = model.covar_module.outputscale.detach().requires_grad_()
    noise = model.likelihood.noise.detach().requires_grad_()
    j = reference_jacobian(SINGLE, x)
    covariance = scale * j @ j.T + noise * torch.eye(30).double()
    exact = torch.distributions.MultivariateNormal(torch.zeros(30).double(), covariance).log_prob(y)
    exact.backward()
    torch.testing.assert_close(value, exact)
    chain = torch.sigmoid(model.covar_module.raw_outputscale.detach())
    torch.testing.assert_close(model.covar_module.raw_outputscale.grad, scale.grad * chain)


def test_gradient_of_the_posterior_in_x() -> None:
    model, _, _ = fitted(20)
    z = torch.randn(3, 5).double().requires_grad_()

    def moments(z: Tensor) -> tuple[Tensor, Tensor]:
        posterior = model(z)
        return posterior.mean, posterior.covariance_matrix

    assert torch.autograd.gradcheck(moments, z)


def test_fantasies_equal_conditioning_on_all_data() -> None:
    model, x, y = fitted(30)
    x_new, y_new, z = torch.randn(4, 5).double(), torch.randn(4).double(), torch.randn(6, 5).double()
    with torch.no_grad():
        model(z)
        fantasy = model.get_fantasy_model(x_new, y_new)
        posterior = fantasy(z)
    assert isinstance(fantasy.prediction_strategy, PosteriorPredictionStrategy)
    mean, covariance = dense_posterior(model, torch.cat([x, x_new]), torch.cat([y, y_new]), z)
    torch.testing.assert_close(posterior.mean, mean, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(posterior.covariance_matrix, covariance, rtol=1e-6, atol=1e-8)


def test_multi_output_posterior() -> None:
    x, z = torch.randn(12, 5).double(), torch.randn(4, 5).double()
    y = torch.randn(12, 3).double()
    model = TangentGP(x, y, gpntk.NTKKernel(MODULE))
    model.initialize(**scale_and_noise(0.8, 0.3))
    with torch.no_grad():
        posterior = model.eval()(z)
    j, k = reference_jacobian(MODULE, x), reference_jacobian(MODULE, z)
    noisy, cross = 0.8 * j @ j.T + 0.3 * torch.eye(36).double(), 0.8 * k @ j.T
    torch.testing.assert_close(posterior.mean.flatten(), cross @ torch.linalg.solve(noisy, y.flatten()))
    covariance = 0.8 * k @ k.T - cross @ torch.linalg.solve(noisy, cross.T)
    torch.testing.assert_close(posterior.covariance_matrix, covariance, rtol=1e-7, atol=1e-9)


def test_fit_reaches_a_stationary_point_and_reports_it() -> None:
    x = torch.randn(40, 5).double()
    y = x[:, 0] + 0.3 * torch.randn(40).double() + 2
    model = TangentGP(x, y, gpntk.NTKKernel(SINGLE, layer_variances=True), constant_mean=True)
    seen = []
    value = model.fit(callback=lambda step, nats: seen.append(nats))
    assert value == max(seen)
    assert value > seen[0] + 1
    model.train()
    objective = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    objective(model(x), y).backward()
    assert max(p.grad.abs().max() for p in model.parameters()) < 1e-4  # nats per observation
    assert value == pytest.approx(objective(model(x), y).item() * 40, rel=1e-9)


class IndependentGPs(gpytorch.models.ExactGP):
    """Three outputs on one x, each with its own scale and noise."""

    def __init__(self, x: Tensor, y: Tensor, solver: gpntk.inference.AbstractSolver) -> None:
        batch = torch.Size([3])
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood(batch_shape=batch))
        self.mean_module = gpytorch.means.ZeroMean(batch_shape=batch)
        kernel = gpntk.NTKKernel(SINGLE, solver=solver)
        self.covar_module = gpytorch.kernels.ScaleKernel(kernel, batch_shape=batch)

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


@pytest.mark.parametrize("solver", [gpntk.inference.FunctionSpace(), gpntk.inference.WeightSpace()])
def test_independent_outputs_are_a_batch_of_posteriors(solver: gpntk.inference.AbstractSolver) -> None:
    x, z = torch.randn(900, 5).double(), torch.randn(4, 5).double()
    y = torch.stack([x[:, 0].sin(), x[:, 1].cos(), x[:, 2]]) + 0.1 * torch.randn(3, 900).double()
    model = IndependentGPs(x, y, solver).double()
    scales, noises = torch.tensor([0.5, 1.0, 2.0]).double(), torch.tensor([[0.1], [0.02], [0.3]]).double()
    model.covar_module.outputscale, model.likelihood.noise = scales, noises
    value = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)(model(x), y)
    value.sum().backward()
    with torch.no_grad():
        posterior = model.eval()(z)
        batched = model(z.expand(2, 1, 4, 5))
    j, k = reference_jacobian(SINGLE, x), reference_jacobian(SINGLE, z)
    assert value.shape == (3,)
    assert batched.mean.shape == (2, 3, 4)
    for index in range(3):
        scale, noise = scales[index].clone().requires_grad_(), noises[index, 0].clone().requires_grad_()
        noisy, cross = scale * j @ j.T + noise * torch.eye(900).double(), (scale * k @ j.T).detach()
        exact = torch.distributions.MultivariateNormal(torch.zeros(900).double(), noisy).log_prob(y[index]) / 900
        exact.backward()
        torch.testing.assert_close(value[index], exact)
        chain = torch.sigmoid(model.covar_module.raw_outputscale.detach()[index])
        torch.testing.assert_close(model.covar_module.raw_outputscale.grad[index], scale.grad * chain)
        noisy = noisy.detach()
        torch.testing.assert_close(posterior.mean[index], cross @ torch.linalg.solve(noisy, y[index]))
        covariance = scale.detach() * k @ k.T - cross @ torch.linalg.solve(noisy, cross.T)
        torch.testing.assert_close(posterior.covariance_matrix[index], covariance, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(batched.mean[1, index], posterior.mean[index])
        torch.testing.assert_close(batched.covariance_matrix[1, index], posterior.covariance_matrix[index])
