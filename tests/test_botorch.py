"""BoTorch's models and acquisition functions on our kernels; botorch is an extra, so this file may be skipped."""

import copy
import pickle

import gpytorch
import pytest
import torch
from torch import Tensor, nn

botorch = pytest.importorskip("botorch")

from botorch.acquisition import LogNoisyExpectedImprovement, qKnowledgeGradient  # noqa: E402
from botorch.acquisition.logei import qLogNoisyExpectedImprovement  # noqa: E402
from botorch.fit import fit_gpytorch_mll  # noqa: E402
from botorch.models import SingleTaskGP  # noqa: E402
from botorch.models.transforms import Normalize, Standardize  # noqa: E402
from botorch.optim import optimize_acqf  # noqa: E402
from botorch.sampling import SobolQMCNormalSampler  # noqa: E402

import gpntk  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    # BoTorch's own remarks on small optimisations, and linear_operator's on eager kernels.
    "ignore::botorch.exceptions.warnings.BotorchWarning",
    "ignore::linear_operator.utils.warnings.NumericalWarning",
)
BOUNDS = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)


def surrogate() -> SingleTaskGP:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    with torch.no_grad():
        network[0].weight.mul_(3)
    x = torch.rand(12, 2, dtype=torch.float64)
    y = (3 * x[:, :1]).sin() + x[:, 1:].square()
    kernel = gpytorch.kernels.ScaleKernel(gpntk.NTKKernel(network))
    return SingleTaskGP(x, y, covar_module=kernel, input_transform=Normalize(2), outcome_transform=Standardize(1))


@pytest.fixture
def model() -> SingleTaskGP:
    model = surrogate()
    fit_gpytorch_mll(gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model))
    return model.eval()


def test_fit_trains_hyperparameters_only(model: SingleTaskGP) -> None:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"likelihood.noise_covar.raw_noise", "mean_module.raw_constant", "covar_module.raw_outputscale"}
    assert model.covar_module.base_kernel.network.dtype == torch.float64


def test_posterior_has_exact_gradients(model: SingleTaskGP) -> None:
    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        posterior = model.posterior(x)
        return posterior.mean, posterior.variance

    assert torch.autograd.gradcheck(moments, torch.rand(2, 3, 2, dtype=torch.float64, requires_grad=True))


def test_joint_batches(model: SingleTaskGP) -> None:
    x = torch.rand(5, 3, 2, dtype=torch.float64)
    posterior = model.posterior(x)
    assert posterior.rsample(torch.Size([7])).shape == (7, 5, 3, 1)
    torch.testing.assert_close(posterior.mean[2], model.posterior(x[2]).mean)
    torch.testing.assert_close(
        posterior.distribution.covariance_matrix[2], model.posterior(x[2]).distribution.covariance_matrix
    )


def test_acquisition_functions(model: SingleTaskGP) -> None:
    noisy = qLogNoisyExpectedImprovement(model, model.train_inputs[0], prune_baseline=False)
    candidate, value = optimize_acqf(noisy, BOUNDS, q=2, num_restarts=2, raw_samples=8, options={"maxiter": 5})
    assert candidate.shape == (2, 2)
    assert torch.isfinite(value)
    knowledge = qKnowledgeGradient(model, num_fantasies=3)
    candidate, value = optimize_acqf(knowledge, BOUNDS, q=1, num_restarts=2, raw_samples=4, options={"maxiter": 3})
    assert torch.isfinite(value)


def test_known_noise() -> None:
    x = torch.rand(8, 2, dtype=torch.float64)
    noise = torch.full((8, 1), 0.01, dtype=torch.float64)
    kernel = gpntk.NTKKernel(nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)))
    model = SingleTaskGP(x, x.sum(-1, keepdim=True), noise, covar_module=kernel, outcome_transform=None)
    acquisition = LogNoisyExpectedImprovement(model, x, num_fantasies=4)
    assert torch.isfinite(acquisition(torch.rand(2, 1, 2, dtype=torch.float64))).all()


def test_fantasies_and_conditioning(model: SingleTaskGP) -> None:
    x, z = torch.rand(2, 2, dtype=torch.float64), torch.rand(4, 2, dtype=torch.float64)
    fantasies = model.fantasize(x, SobolQMCNormalSampler(torch.Size([3])))
    assert fantasies.posterior(z).mean.shape == (3, 4, 1)


def test_conditioning_equals_a_model_of_all_data() -> None:
    kernel = gpytorch.kernels.ScaleKernel(gpntk.NTKKernel(nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))))
    x, y = torch.rand(10, 2, dtype=torch.float64), torch.rand(10, 1, dtype=torch.float64)
    z = torch.rand(4, 2, dtype=torch.float64)
    part = SingleTaskGP(x[:7], y[:7], covar_module=kernel, outcome_transform=None)
    part.likelihood.noise = 0.1
    part.posterior(z)
    conditioned = part.condition_on_observations(x[7:], y[7:])
    whole = SingleTaskGP(x, y, covar_module=copy.deepcopy(kernel), outcome_transform=None)
    whole.load_state_dict(part.state_dict())
    one, two = conditioned.posterior(z), whole.posterior(z)
    torch.testing.assert_close(one.mean, two.mean, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(one.variance, two.variance, rtol=1e-6, atol=1e-9)


def test_copies_and_pickles(model: SingleTaskGP) -> None:
    z = torch.rand(4, 2, dtype=torch.float64)
    expected = model.posterior(z).variance
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin.posterior(z).variance, expected)
    fresh = surrogate()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh.eval().posterior(z).mean, model.posterior(z).mean)
