"""Infinite-width kernels in BoTorch: beside its own kernel of that sort, in its models and acquisition functions."""

import copy
import math
import pickle

import gpytorch
import pytest
import torch
from torch import Tensor, nn

botorch = pytest.importorskip("botorch")

from botorch.acquisition import LogExpectedImprovement  # noqa: E402
from botorch.acquisition.logei import qLogNoisyExpectedImprovement  # noqa: E402
from botorch.fit import fit_gpytorch_mll  # noqa: E402
from botorch.models import SingleTaskGP  # noqa: E402
from botorch.models.kernels.infinite_width_bnn import InfiniteWidthBNNKernel  # noqa: E402
from botorch.models.transforms import Normalize, Standardize  # noqa: E402
from botorch.optim import optimize_acqf  # noqa: E402
from botorch.sampling import SobolQMCNormalSampler  # noqa: E402

import gpntk  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    # BoTorch's own remarks on small optimisations, and linear_operator's on eager kernels.
    "ignore::botorch.exceptions.warnings.BotorchWarning",
    "ignore::linear_operator.utils.warnings.NumericalWarning",
)
KERNELS = [gpntk.InfiniteNNGPKernel, gpntk.InfiniteNTKKernel]
BOUNDS = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)


def perceptron(depth: int, inputs: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers = [layer for i in range(depth) for layer in (nn.Linear(8 if i else inputs, 8), activation())]
    return nn.Sequential(*layers, nn.Linear(8, 1))


def pair(depth: int, inputs: int, variances: tuple[float, float]) -> tuple[gpytorch.kernels.Kernel, ...]:
    """Our kernel and BoTorch's, with the same variances of weights and biases."""
    weight, bias = torch.tensor(variances, dtype=torch.float64)
    ours = gpntk.InfiniteNNGPKernel(perceptron(depth, inputs), bias_std=1.0).double()
    ours.weight_std, ours.bias_std = weight.sqrt(), bias.sqrt()
    theirs = InfiniteWidthBNNKernel(depth=depth).double()
    theirs.weight_var, theirs.bias_var = weight, bias
    return ours, theirs


# --- BoTorch's own kernel of an infinitely wide ReLU network ----------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 3, 6])
@pytest.mark.parametrize("variances", [(2.0, 0.3), (1.5, 0.01)])
def test_values_are_those_of_botorch(depth: int, variances: tuple[float, float]) -> None:
    ours, theirs = pair(depth, 5, variances)
    x, z = torch.randn(9, 5).double(), torch.randn(2, 3, 5).double()
    torch.testing.assert_close(ours(x, z).to_dense(), theirs(x, z).to_dense(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours(x, diag=True), theirs(x, diag=True), rtol=1e-13, atol=0)


def test_gradients_are_those_of_botorch() -> None:
    ours, theirs = pair(3, 4, (1.8, 0.2))
    x, z, weights = torch.randn(6, 4).double(), torch.randn(5, 4).double(), torch.randn(6, 5).double()
    gradients = []
    for kernel in (ours, theirs):
        inputs = x.clone().requires_grad_()
        (weights * kernel(inputs, z).to_dense()).sum().backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-11, atol=1e-12)
    # Ours are of log σ for each layer, theirs of softplus⁻¹(σ²) for all: both as derivatives in σ².
    for name in ("weight", "bias"):
        std, raw = getattr(ours, f"{name}_std").detach()[0], getattr(theirs, f"raw_{name}_var")
        mine = getattr(ours, f"raw_{name}_std").grad.sum() / (2 * std.square())
        torch.testing.assert_close(mine, (raw.grad / raw.detach().sigmoid()).squeeze(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_diagonal_is_exact(dtype: torch.dtype) -> None:
    # BoTorch keeps arccos away from 1 by 1e-7, which puts its k(x, x) wrong by as much for each layer.
    depth, (weight, bias) = 3, (2.0, 0.3)
    ours, theirs = (kernel.to(dtype) for kernel in pair(depth, 5, (weight, bias)))
    x = torch.randn(20, 5, dtype=dtype)
    exact = weight * x.double().square().mean(-1) + bias
    for _ in range(depth):
        exact = weight * exact / 2 + bias
    for value in (ours(x).to_dense().diagonal(), ours(x, x.clone()).to_dense().diagonal()):
        assert ((value.double() - exact) / exact).abs().max() < 20 * torch.finfo(dtype).eps
    if dtype == torch.float64:
        assert ((theirs(x).to_dense().diagonal() - exact) / exact).abs().max() > 1e-8


@pytest.mark.parametrize("kernel_class", KERNELS)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Tanh])
def test_gradients_are_finite_and_those_of_differences_where_points_meet(
    kernel_class: type, activation: type[nn.Module]
) -> None:
    kernel = kernel_class(perceptron(2, 3, activation)).double()
    x = torch.randn(5, 3).double()
    met = torch.cat([x[:2], -x[2:3], 1.5 * x[3:4], torch.zeros(1, 3), x[4:] + 1e-9]).requires_grad_()
    value = kernel(met, x).to_dense()
    assert value.isfinite().all()
    assert torch.autograd.grad(value.sum(), met)[0].isfinite().all()
    # Along the diagonal k(x, x), whose points meet whatever x is.
    inputs, step, direction = x.clone().requires_grad_(), 1e-5, torch.randn(5, 3).double()
    (gradient,) = torch.autograd.grad(kernel(inputs, diag=True).sum(), inputs)
    ahead, behind = (kernel(x + sign * step * direction, diag=True).sum() for sign in (1, -1))
    assert ((ahead - behind) / (2 * step)).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-7)


# --- models and acquisition functions ---------------------------------------------------------------------------------


def surrogate(kernel_class: type) -> SingleTaskGP:
    x = torch.rand(14, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    y = (5 * x[:, :1]).sin() + (x[:, 1:] - 0.4).square()
    kernel = gpytorch.kernels.ScaleKernel(kernel_class(perceptron(2, 2)))
    return SingleTaskGP(x, y, covar_module=kernel, input_transform=Normalize(2), outcome_transform=Standardize(1))


@pytest.fixture(params=KERNELS, ids=["nngp", "ntk"], scope="module")
def fitted(request: pytest.FixtureRequest) -> tuple[SingleTaskGP, float, float]:
    """A fitted model, and its marginal likelihood before and after."""
    model = surrogate(request.param)
    likelihood = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    before = _objective(likelihood)
    fit_gpytorch_mll(likelihood)
    return model.eval(), before, _objective(likelihood)


@torch.no_grad()
def _objective(likelihood: gpytorch.mlls.ExactMarginalLogLikelihood) -> float:
    model = likelihood.model.train()
    value = likelihood(model(*model.train_inputs), model.train_targets).item()
    model.eval()
    return value


def test_fit_learns_all_variances(fitted: tuple[SingleTaskGP, float, float]) -> None:
    model, before, after = fitted
    assert model.covar_module.base_kernel.weight_std.dtype == torch.float64
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {f"covar_module.base_kernel.raw_{name}_std" for name in ("weight", "bias")} < trained
    assert after > before + 0.5
    start = surrogate(type(model.covar_module.base_kernel)).covar_module.base_kernel
    assert ((model.covar_module.base_kernel.weight_std - start.weight_std).abs() > 1e-3).any()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_posterior_is_the_formula(fitted: tuple[SingleTaskGP, float, float]) -> None:
    model = fitted[0]
    z = torch.rand(5, 2, dtype=torch.float64)
    with torch.no_grad():
        posterior = model.posterior(z)
        x, scaled = model.input_transform(surrogate(gpntk.InfiniteNNGPKernel).train_inputs[0]), model.input_transform(z)
        kernel, mean = model.covar_module, model.mean_module.constant
        noisy = kernel(x).to_dense() + model.likelihood.noise * torch.eye(14)
        cross = kernel(scaled, x).to_dense()
        expected = mean + cross @ torch.linalg.solve(noisy, model.train_targets - mean)
        covariance = kernel(scaled).to_dense() - cross @ torch.linalg.solve(noisy, cross.T)
        scale = model.outcome_transform.stdvs.squeeze()
        expected = expected * scale + model.outcome_transform.means.squeeze()
        torch.testing.assert_close(posterior.mean.squeeze(-1), expected, rtol=1e-6, atol=1e-8)
        actual = posterior.distribution.covariance_matrix
        torch.testing.assert_close(actual, scale**2 * covariance, rtol=1e-5, atol=1e-8)
        batched = model.posterior(z.unsqueeze(1))
    torch.testing.assert_close(batched.mean.squeeze(), posterior.mean.squeeze(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(batched.variance.squeeze(), posterior.variance.squeeze(), rtol=1e-6, atol=1e-10)


def test_posterior_has_exact_gradients(fitted: tuple[SingleTaskGP, float, float]) -> None:
    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        posterior = fitted[0].posterior(x)
        return posterior.mean, posterior.variance

    assert torch.autograd.gradcheck(moments, torch.rand(2, 2, 2, dtype=torch.float64, requires_grad=True))


def test_acquisition_has_gradients_everywhere_and_is_optimised(fitted: tuple[SingleTaskGP, float, float]) -> None:
    model = fitted[0]
    x = surrogate(gpntk.InfiniteNNGPKernel).train_inputs[0]
    acquisition = LogExpectedImprovement(model, best_f=0.5)
    places = torch.cat([x, x + 1e-10, torch.zeros(1, 2), torch.ones(1, 2)]).unsqueeze(1).requires_grad_()
    value = acquisition(places)
    (gradient,) = torch.autograd.grad(value.sum(), places)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    candidate, value = optimize_acqf(acquisition, BOUNDS, q=1, num_restarts=4, raw_samples=64)
    assert ((candidate >= BOUNDS[0]) & (candidate <= BOUNDS[1])).all()
    with torch.no_grad():
        axis = torch.linspace(0, 1, 21, dtype=torch.float64)
        grid = acquisition(torch.cartesian_prod(axis, axis).unsqueeze(1)).max()
    assert value >= grid - 1e-3
    joint = qLogNoisyExpectedImprovement(
        model, x, prune_baseline=False, sampler=SobolQMCNormalSampler(torch.Size([16]))
    )
    candidates, value = optimize_acqf(joint, BOUNDS, q=2, num_restarts=2, raw_samples=8, options={"maxiter": 5})
    assert candidates.shape == (2, 2)
    assert value.isfinite()


def test_fantasies_copies_and_state(fitted: tuple[SingleTaskGP, float, float]) -> None:
    model = fitted[0]
    x, z = torch.rand(2, 2, dtype=torch.float64), torch.rand(4, 2, dtype=torch.float64)
    fantasies = model.fantasize(x, SobolQMCNormalSampler(torch.Size([3])))
    assert fantasies.posterior(z).mean.shape == (3, 4, 1)
    assert (fantasies.posterior(x).variance < model.posterior(x).variance + 1e-12).all()
    expected = model.posterior(z).variance
    torch.testing.assert_close(copy.deepcopy(model).posterior(z).variance, expected)
    fresh = surrogate(type(model.covar_module.base_kernel))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh.eval().posterior(z).variance, expected)


def test_models_can_be_pickled(fitted: tuple[SingleTaskGP, float, float]) -> None:
    z = torch.rand(4, 2, dtype=torch.float64)
    twin = pickle.loads(pickle.dumps(fitted[0]))
    torch.testing.assert_close(twin.posterior(z).variance, fitted[0].posterior(z).variance)


def test_a_kernel_of_some_dimensions() -> None:
    x = torch.rand(6, 3, dtype=torch.float64)
    kernel = gpntk.InfiniteNNGPKernel(perceptron(2, 2), math.sqrt(2), 0.1, active_dims=(0, 2)).double()
    plain = gpntk.InfiniteNNGPKernel(perceptron(2, 2), math.sqrt(2), 0.1).double()
    torch.testing.assert_close(kernel(x).to_dense(), plain(x[:, [0, 2]]).to_dense())
