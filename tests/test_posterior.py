"""Samples of posteriors, and the same inference through GPyTorch."""

import subprocess
import sys

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from torch import Tensor, nn

import gpntk
from gpntk.errors import InputError
from gpntk.inference import AbstractSolver, ConjugateGradients, FeatureCovariance, Posterior, WhitenedSystem
from gpntk.kernels.prediction_strategy import PosteriorPredictionStrategy
from tests.dense_gp import DIRECT, ITERATIVE, SOLVERS, Dense, Problem, jacobian, network, relative


def case(rows: int, outputs: int, noise: Tensor) -> Problem:
    module, x = network(outputs, 4), torch.randn(rows, 5).double()
    y = x.sum(-1).sin().repeat_interleave(outputs) + 0.1 * torch.randn(rows * outputs).double()
    return Problem(module, x, y, torch.tensor([0.7]).double(), noise.double())


# --- samples ---------------------------------------------------------------------------------------------------------


def check_law(samples: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """Of S Gaussian samples, in coordinates where mean and covariance are 0 and I.

    The mean's squared norm is chi-squared / S; entries of the covariance have variance 1/S (2/S on the diagonal).
    """
    count, size = samples.shape
    values, vectors = torch.linalg.eigh(covariance)
    white = (samples - mean) @ vectors / values.sqrt()
    # Five standard deviations of a chi-squared variable.
    assert abs(count * white.mean(0).square().sum() - size) < 5 * (2 * size) ** 0.5
    off = white.T @ white / count - torch.eye(size).double()
    assert abs(count * off.square().sum() - size * (size + 1)) < 5 * (2 * 2 * size * (size + 1)) ** 0.5 + 0.2 * size**2
    assert abs(white.square().mean() - 1) < 5 * (2 / (count * size)) ** 0.5


@pytest.mark.parametrize("updates", [0, 2])
@pytest.mark.parametrize("name", SOLVERS)
def test_samples_of_weights_have_the_posteriors_law(name: str, updates: int) -> None:
    noise = 0.05 + 0.1 * torch.rand(12)
    noise[2] = torch.inf
    problem = case(12, 1, noise)
    problem.y[2] = torch.nan
    dense, posterior = problem.dense, Posterior(problem.system, problem.y, SOLVERS[name])
    for _ in range(updates):
        x, y, noise = (
            torch.randn(2, 5).double(),
            torch.tensor([0.3, torch.nan]).double(),
            torch.tensor([0.02, torch.inf]),
        )
        dense, posterior = dense.with_rows(x, y, noise.double()), posterior.condition_on(x, y, noise.double())
    samples = posterior.sample_weights(4000, torch.Generator().manual_seed(3))
    check_law(samples, dense.weights(), dense.weight_covariance())
    z = torch.randn(5, 5).double()
    drawn = posterior.sample(z, 100, torch.Generator().manual_seed(3))
    weights = posterior.sample_weights(100, torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn, weights @ jacobian(problem.module, z).T)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_low_rank_variance_is_an_upper_bound(name: str) -> None:
    problem = case(40, 1, torch.tensor([0.01]))
    z = torch.randn(6, 5).double()
    exact = problem.dense.covariance(jacobian(problem.module, z)).diagonal()
    posterior = Posterior(problem.system, problem.y, SOLVERS[name])
    bounds = [posterior.covariance(z, rank).diagonal() for rank in (2, 10, 100)]
    for bound in bounds:
        assert bool((bound >= exact * (1 - 1e-9)).all())
    assert bool((bounds[0] >= bounds[1]).all())
    torch.testing.assert_close(bounds[2], exact, rtol=1e-5, atol=0)


def test_a_low_rank_cache_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = case(40, 1, torch.tensor([0.01]))
    posterior = Posterior(problem.system, problem.y)
    made, inner = [], posterior.inverse.directions
    monkeypatch.setattr(posterior.inverse, "directions", lambda rank: made.append(rank) or inner(rank))
    for _ in range(3):
        posterior.covariance(problem.x[:2], 500)
    assert made == [500]


# --- GPyTorch --------------------------------------------------------------------------------------------------------


class TargetGP(gpytorch.models.ExactGP):
    def __init__(
        self, x: Tensor, y: Tensor, likelihood: gpytorch.likelihoods.Likelihood, module: nn.Module, **options: object
    ) -> None:
        super().__init__(x, y, likelihood)
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(gpntk.NTKKernel(module, **options))
        self.tasks = module[-1].out_features

    def forward(self, x: Tensor) -> MultivariateNormal:
        mean, covariance = self.mean_module(x), self.covar_module(x)
        if self.tasks == 1:
            return MultivariateNormal(mean, covariance)
        return MultitaskMultivariateNormal(mean.unsqueeze(-1).expand(*mean.shape, self.tasks), covariance)


def model_of(problem: Problem, solver: AbstractSolver | None, likelihood: object = None, **options: object) -> TargetGP:
    outputs = problem.module[-1].out_features
    y = problem.y if outputs == 1 else problem.y.unflatten(0, (-1, outputs))
    likelihood = likelihood or gpytorch.likelihoods.GaussianLikelihood()
    model = TargetGP(problem.x, y, likelihood, problem.module, solver=solver, **options).double()
    model.covar_module.outputscale = problem.variances
    model.mean_module.constant.data.fill_(0.2)
    if isinstance(likelihood, gpytorch.likelihoods.GaussianLikelihood):
        likelihood.noise = problem.noise
    return model


def centred(problem: Problem) -> Dense:
    return problem._replace(y=problem.y - 0.2).dense


@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("name", SOLVERS)
def test_marginal_likelihood_and_gradients_of_raw_parameters(name: str, layers: bool) -> None:
    problem = case(25, 1, torch.tensor([0.05]))
    model = model_of(problem, SOLVERS[name], layer_variances=layers)
    objective = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    value = 25 * objective(model.train()(problem.x), problem.y)
    value.backward()
    # The same by autograd through the dense formula, down to the raw parameters.
    scale, noise = model.covar_module.outputscale.reshape(1), model.likelihood.noise.reshape(1)
    if layers:
        scale = scale * model.covar_module.base_kernel.layer_variances.squeeze(-1)
    expected = problem.dense.log_marginal_likelihood(scale, noise, problem.y - model.mean_module.constant)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    error = 0.0
    if name in ITERATIVE:
        system = WhitenedSystem(FeatureCovariance(problem.features, scale), noise)
        error = SOLVERS[name].prepare(system).logdet().standard_error
    assert abs(value - expected) <= 2 * error + 1e-8 * abs(expected) + (1e-3 if error else 0)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        exact = torch.full_like(gradient, 1e-7)
        allowed = exact + 4 * error + 1e-2 * (gradient.abs() + 25) if name in ITERATIVE else exact
        assert bool(((parameter.grad - gradient).abs() <= allowed).all())


@pytest.mark.parametrize("name", SOLVERS)
def test_predictions_and_their_gradients_in_x(name: str) -> None:
    problem, z = case(25, 1, torch.tensor([0.05])), torch.randn(3, 5).double()
    model, dense = model_of(problem, SOLVERS[name]).eval(), centred(problem)
    one, two = z.clone().requires_grad_(), z.clone().requires_grad_()
    posterior, k = model(one), differentiable_jacobian(problem.module, two)
    mean, covariance = dense.mean(k) + 0.2, dense.covariance(k)
    exact = name in DIRECT
    torch.testing.assert_close(posterior.mean, mean, rtol=1e-9 if exact else 1e-5, atol=1e-9 if exact else 1e-5)
    tolerance = 1e-8 if exact else 4e-3
    scale = covariance.diagonal().max().detach()
    assert (posterior.covariance_matrix - covariance).abs().max() <= tolerance * scale
    right = torch.randn(3, 3).double()
    for ours, theirs, allowed in (
        (posterior.mean.sum(), mean.sum(), 1e-8 if exact else 1e-5),
        ((posterior.covariance_matrix * right).sum(), (covariance * right).sum(), 1e-8 if exact else 1e-1),
    ):
        gradient = torch.autograd.grad(ours, one, retain_graph=True)[0]
        reference = torch.autograd.grad(theirs, two, retain_graph=True)[0]
        assert relative(gradient, reference) < allowed


def differentiable_jacobian(module: nn.Module, x: Tensor) -> Tensor:
    """J `[N*C, F]` with a graph back to x, output by output."""
    rows = []
    for value in module(x).flatten():
        gradients = torch.autograd.grad(value, list(module.parameters()), create_graph=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("name", SOLVERS)
def test_fantasies(name: str, few: bool) -> None:
    """By the host for few rows, and by ours for more; twice in a row."""
    problem, z = case(25, 1, torch.tensor([0.05])), torch.randn(4, 5).double()
    model, dense = model_of(problem, SOLVERS[name]).eval(), centred(problem)
    with torch.no_grad(), gpytorch.settings.max_cholesky_size(800 if few else 5):
        model(z)
        for _ in range(2):
            x, y = torch.randn(2, 5).double(), torch.randn(2).double()
            model = model.get_fantasy_model(x, y)
            dense = dense.with_rows(x, y - 0.2, problem.noise)
        assert isinstance(model.prediction_strategy, PosteriorPredictionStrategy)
        posterior = model(z)
    k = jacobian(problem.module, z)
    exact = name in DIRECT
    torch.testing.assert_close(posterior.mean, dense.mean(k) + 0.2, rtol=1e-8 if exact else 1e-5, atol=1e-5)
    covariance = dense.covariance(k)
    assert (posterior.covariance_matrix - covariance).abs().max() < (1e-8 if exact else 4e-3) * covariance.max()


@pytest.mark.parametrize("name", SOLVERS)
def test_fast_predictive_variances(name: str) -> None:
    problem, z = case(40, 1, torch.tensor([0.05])), torch.randn(6, 5).double()
    k = jacobian(problem.module, z)
    exact, prior = centred(problem).covariance(k).diagonal(), problem.variances * k.square().sum(-1)
    for rank in (5, 100):
        model = model_of(problem, SOLVERS[name]).eval()
        size = gpytorch.settings.max_root_decomposition_size(rank)
        with torch.no_grad(), gpytorch.settings.fast_pred_var(), size:
            variance = model(z).variance
        assert bool((variance >= exact * (1 - 1e-7)).all())
        # Direct solvers have no use for a cache of low rank.
        most = exact * (1 + 1e-5) if rank == 100 or name in DIRECT else prior
        assert bool((variance <= most).all())


@pytest.mark.parametrize("tasks", [False, True])
@pytest.mark.parametrize("name", SOLVERS)
def test_several_outputs(name: str, tasks: bool) -> None:
    likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(num_tasks=3, has_task_noise=tasks)
    problem = case(15, 3, torch.tensor([0.05]))
    model = model_of(problem, SOLVERS[name], likelihood)
    likelihood.noise = 0.05
    noise = torch.full((45,), 0.05, dtype=torch.float64)
    if tasks:
        likelihood.task_noises = torch.tensor([0.02, 0.3, 0.1]).double()
        noise = noise + likelihood.task_noises.detach().repeat(15)
    problem = problem._replace(noise=noise)
    y = problem.y.unflatten(0, (-1, 3))
    value = 45 * gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)(model.train()(problem.x), y)
    dense, z = centred(problem), torch.randn(4, 5).double()
    k = jacobian(problem.module, z)
    error = SOLVERS[name].prepare(problem.system).logdet().standard_error
    expected = dense.log_marginal_likelihood(problem.variances, noise, problem.y - 0.2)
    assert abs(value - expected) < 2 * error + (1e-8 if name in DIRECT else 0.05)
    gradients = torch.autograd.grad(value, [likelihood.raw_noise, model.covar_module.raw_outputscale])
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    with torch.no_grad():
        posterior = model.eval()(z)
    exact = name in DIRECT
    torch.testing.assert_close(posterior.mean.flatten(), dense.mean(k) + 0.2, rtol=0, atol=1e-9 if exact else 1e-5)
    covariance = dense.covariance(k)
    assert (posterior.covariance_matrix - covariance).abs().max() < (1e-9 if exact else 4e-3) * covariance.max()


@pytest.mark.parametrize("name", SOLVERS)
def test_fixed_noise(name: str) -> None:
    noise = 0.02 + 0.1 * torch.rand(25).double()
    problem = case(25, 1, noise)
    likelihood = gpytorch.likelihoods.FixedNoiseGaussianLikelihood(noise, learn_additional_noise=True)
    model = model_of(problem, SOLVERS[name], likelihood)
    likelihood.second_noise = 0.03
    problem = problem._replace(noise=noise + 0.03)
    value = 25 * gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)(model.train()(problem.x), problem.y)
    second = torch.tensor(0.03).double().requires_grad_()
    expected = problem.dense.log_marginal_likelihood(problem.variances, noise + second, problem.y - 0.2)
    error = SOLVERS[name].prepare(problem.system).logdet().standard_error
    assert abs(value - expected) < 2 * error + 1e-3
    value.backward()
    reference = torch.autograd.grad(expected, second)[0] * torch.sigmoid(
        likelihood.second_noise_covar.raw_noise.detach()
    )
    gradient = likelihood.second_noise_covar.raw_noise.grad
    assert abs(gradient - reference) < (1e-6 if name in DIRECT else 0.05) * (abs(reference) + 25)
    z = torch.randn(4, 5).double()
    with torch.no_grad():
        posterior = model.eval()(z)
    dense, k = centred(problem), jacobian(problem.module, z)
    torch.testing.assert_close(posterior.mean, dense.mean(k) + 0.2, rtol=0, atol=1e-5)
    torch.testing.assert_close(posterior.variance, dense.covariance(k).diagonal(), rtol=2.1e-3, atol=0)


@pytest.mark.parametrize("policy", ["mask", "fill"])
@pytest.mark.parametrize("name", SOLVERS)
def test_missing_observations(name: str, policy: str) -> None:
    problem = case(25, 1, torch.tensor([0.05]))
    problem.y[[3, 4, 17]] = torch.nan
    noise = torch.where(problem.y.isnan(), torch.inf, 0.05)
    dense, z = Dense(*centred(problem._replace(noise=noise)).__dict__.values()), torch.randn(4, 5).double()
    k = jacobian(problem.module, z)
    model = model_of(problem, SOLVERS[name]).eval()
    with torch.no_grad(), gpytorch.settings.observation_nan_policy(policy), gpytorch.settings.max_cholesky_size(5):
        posterior = model(z)
        torch.testing.assert_close(posterior.mean, dense.mean(k) + 0.2, rtol=0, atol=1e-5)
        torch.testing.assert_close(posterior.variance, dense.covariance(k).diagonal(), rtol=2.1e-3, atol=0)
        new, y = torch.randn(3, 5).double(), torch.tensor([0.4, torch.nan, -0.3]).double()
        fantasy = model.get_fantasy_model(new, y)(z)
    dense = dense.with_rows(new, y - 0.2, torch.where(y.isnan(), torch.inf, 0.05))
    torch.testing.assert_close(fantasy.mean, dense.mean(k) + 0.2, rtol=0, atol=1e-5)
    torch.testing.assert_close(fantasy.variance, dense.covariance(k).diagonal(), rtol=2.1e-3, atol=0)
    if policy == "mask":
        with gpytorch.settings.observation_nan_policy(policy):
            prior = model.train()(problem.x)
            value = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)(prior, problem.y)
        expected = centred(problem._replace(noise=noise)).log_marginal_likelihood(
            problem.variances, noise, problem.y - 0.2
        )
        error = SOLVERS[name].prepare(problem._replace(noise=noise).system).logdet().standard_error
        # The host divides by all rows, observed or not.
        assert abs(25 * value - expected) < 2 * error + (1e-5 if name in DIRECT else 0.03)


def test_hyperparameters_changed_after_a_prediction_count() -> None:
    problem, z = case(20, 1, torch.tensor([0.05])), torch.randn(3, 5).double()
    k, model = jacobian(problem.module, z), model_of(problem, None).eval()
    with torch.no_grad():
        model(z)
        model.train()
        model.likelihood.noise, model.covar_module.outputscale = 0.5, 3.0
        posterior = model.eval()(z)
        model.set_train_data(problem.x[:10], problem.y[:10], strict=False)
        fewer = model(z)
    changed = problem._replace(variances=torch.tensor([3.0]).double(), noise=torch.tensor([0.5]).double())
    torch.testing.assert_close(posterior.mean, centred(changed).mean(k) + 0.2)
    torch.testing.assert_close(posterior.covariance_matrix, centred(changed).covariance(k))
    less = changed._replace(x=problem.x[:10], y=problem.y[:10])
    torch.testing.assert_close(fewer.mean, centred(less).mean(k) + 0.2)
    torch.testing.assert_close(fewer.covariance_matrix, centred(less).covariance(k))


SCRIPT = """
import warnings
warnings.filterwarnings("ignore")
import botorch
import gpytorch, torch, gpntk
from gpntk.inference import ConjugateGradients, SampledGram
from tests.test_posterior import case, centred, jacobian, model_of
torch.manual_seed(0)
problem, z = case(25, 1, torch.tensor([0.05])), torch.randn(3, 5).double()
for solver in (None, ConjugateGradients(SampledGram())):
    model = model_of(problem, solver)
    value = 25 * gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)(model.train()(problem.x), problem.y)
    dense, k = centred(problem), jacobian(problem.module, z)
    expected = dense.log_marginal_likelihood(problem.variances, problem.noise, problem.y - 0.2)
    assert abs(value - expected) < 1e-3, (value, expected)
    posterior = model.eval()(z)
    torch.testing.assert_close(posterior.mean, dense.mean(k) + 0.2, rtol=0, atol=1e-5)
    torch.testing.assert_close(posterior.variance, dense.covariance(k).diagonal(), rtol=2e-3, atol=0)
print("agrees")
"""


def test_after_botorch_was_imported() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.strip() == "agrees", done.stderr


def test_the_solver_asked_for_is_the_one_that_solves() -> None:
    problem = case(12, 1, torch.tensor([0.05]))
    model = model_of(problem, ITERATIVE["sampled"]).eval()
    with torch.no_grad():
        model(problem.x[:2])
    (posterior,) = model.prediction_strategy._posteriors("ignore")
    assert isinstance(posterior.solver, ConjugateGradients)
    assert posterior.result.iterations > 0


def test_inputs_that_are_none() -> None:
    problem = case(8, 1, torch.tensor([0.1]))
    features = gpntk.inference.Features(gpntk.AutoBackend(gpntk.freeze(problem.module)), problem.x)
    system = WhitenedSystem(FeatureCovariance(features, problem.variances), problem.noise)
    posterior = Posterior(system, problem.y)
    broken = problem.x.clone()
    broken[5, 2] = torch.nan
    for ask in (posterior.mean, posterior.variance, posterior.covariance, lambda x: posterior.sample(x, 2)):
        with pytest.raises(InputError, match=r"NaN or infinite values in 1 of 8 rows, the first at index \(5,\)"):
            ask(broken)
        with pytest.raises(InputError, match="x is a ndarray: pass a tensor"):
            ask(problem.x.numpy())
    with pytest.raises(InputError, match="y is a ndarray"):
        Posterior(system, problem.y.numpy())
    with pytest.raises(InputError, match="noise is a float"):
        WhitenedSystem(system.covariance, 0.1)
    with pytest.raises(InputError, match="variances is a float"):
        FeatureCovariance(features, 1.0)
    for count in (-1, 0, 2.5):
        for ask in (lambda n: posterior.sample(problem.x, n), posterior.sample_weights):
            with pytest.raises(InputError, match="count="):
                ask(count)
        with pytest.raises(InputError, match="rank="):
            posterior.covariance(problem.x, rank=count)
