"""The variational GP against scipy's optimum of the same bound, numerical evidence and Laplace's method."""

import gpytorch
import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

import gpntk
from gpntk.errors import InputError
from gpntk.inference import DenseCovariance
from gpntk.likelihoods import probabilities
from gpntk.models import LaplacePosterior, VariationalGP, greedy_inducing_points
from tests.test_classification import blobs


def rbf(lengthscale: float, variance: float) -> gpytorch.kernels.ScaleKernel:
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()).double().requires_grad_(False)
    kernel.base_kernel.lengthscale, kernel.outputscale = lengthscale, variance
    return kernel


def best_gaussian(covariance: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean, variances and bound of the best Gaussian for a logistic likelihood, by Gauss-Hermite and BFGS."""
    size = len(labels)
    lower = np.tril_indices(size)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    precision, (_, prior_logdet) = np.linalg.inv(covariance), np.linalg.slogdet(covariance)

    def unpack(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        factor = np.zeros((size, size))
        factor[lower] = v[size:]
        return v[:size], factor @ factor.T

    def negative(v: np.ndarray) -> float:
        mean, posterior = unpack(v)
        f = mean[:, None] + np.sqrt(posterior.diagonal())[:, None] * nodes
        expected = -(np.logaddexp(0, (1 - 2 * labels)[:, None] * f) @ weights).sum()
        trace = np.trace(precision @ posterior) + mean @ precision @ mean - size
        divergence = 0.5 * (trace + prior_logdet - np.linalg.slogdet(posterior)[1])
        return divergence - expected

    start = np.concatenate([np.zeros(size), np.linalg.cholesky(covariance)[lower]])
    found = minimize(negative, start, method="BFGS", options={"gtol": 1e-7})
    mean, posterior = unpack(found.x)
    return mean, posterior.diagonal(), -found.fun


def test_the_best_gaussian() -> None:
    x = torch.tensor([[-1.0], [-0.3], [0.1], [0.9], [1.4]]).double()
    labels = torch.tensor([0, 1, 0, 1, 1])
    kernel = rbf(0.7, 4.0)
    model = VariationalGP(x, kernel, gpytorch.means.ZeroMean(), num_outputs=1)
    model.fit(x, labels, epochs=200, num_samples=2048)
    bound = model._bound(x, labels, torch.randn(200_000, 5, 1, dtype=torch.float64), total=5).item()
    mean, variance, expected = best_gaussian(kernel(x).to_dense().numpy(), labels.numpy())
    latent = model.predict(x)
    np.testing.assert_allclose(latent.mean[:, 0], mean, atol=0.03)
    np.testing.assert_allclose(latent.covariance[:, 0, 0], variance, rtol=0.03)
    # The host's jitter and the noise of the steps can only lower it.
    assert expected - 0.02 < bound < expected + 0.005


def test_the_bound_is_below_the_evidence() -> None:
    x = torch.tensor([[-0.5], [0.5]]).double()
    labels = torch.tensor([0, 1])
    kernel = rbf(1.0, 3.0)
    model = VariationalGP(x, kernel, gpytorch.means.ZeroMean(), num_outputs=3)
    model.fit(x, labels, epochs=60, num_samples=256)
    bound = model._bound(x, labels, torch.randn(100_000, 2, 3, dtype=torch.float64), total=2).item()
    # Weights of draws from the approximation q: E_q[log w] is its bound, log E_q[w] the evidence.
    q = model(x)
    prior = torch.distributions.MultivariateNormal(
        torch.zeros(6).double(), torch.kron(kernel(x).to_dense(), torch.eye(3).double())
    )
    draws = torch.distributions.MultivariateNormal(q.mean.flatten(), q.covariance_matrix)
    f = draws.sample(torch.Size([200_000]))
    log_likelihood = f.view(-1, 2, 3).log_softmax(-1)[:, [0, 1], labels].sum(-1)
    log_weights = log_likelihood + prior.log_prob(f) - draws.log_prob(f)
    assert bound == pytest.approx(log_weights.mean().item(), abs=0.01)
    assert bound < log_weights.exp().mean().log().item() < bound + 0.2


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_bound_of_a_batch(outputs: int) -> None:
    # As many rows as classes; at the start the divergence from the prior is zero.
    x = torch.randn(3, 2, dtype=torch.float64)
    labels = torch.tensor([0, 1, 1])
    kernel, mean = rbf(1.0, 2.0), gpytorch.means.ConstantMean().double()
    mean.constant = 0.7
    model = VariationalGP(torch.randn(4, 2).double(), kernel, mean, outputs)
    value = model._bound(x, labels, torch.randn(50_000, 3, outputs, dtype=torch.float64), total=9)
    f = 0.7 + 2**0.5 * torch.randn(100_000, 3, outputs, dtype=torch.float64)
    logits = f if outputs > 1 else torch.cat([torch.zeros_like(f), f], -1)
    expected = 3 * logits.log_softmax(-1)[:, torch.arange(3), labels].sum(-1).mean()
    assert value.item() == pytest.approx(expected.item(), abs=0.08)


def slice_samples(gram: Tensor, labels: Tensor, outputs: int, count: int) -> Tensor:
    """Draws of f `[S, N, C]` from its exact posterior, by elliptical slice sampling (Murray et al. 2010)."""
    root = torch.linalg.cholesky(gram + 1e-8 * torch.eye(len(gram)).double())

    def log_likelihood(f: Tensor) -> float:
        return -torch.nn.functional.cross_entropy(f, labels, reduction="sum").item()

    f, kept = root @ torch.randn(len(gram), outputs, dtype=torch.float64), []
    for _ in range(count):
        other = root @ torch.randn(len(gram), outputs, dtype=torch.float64)
        threshold = log_likelihood(f) + torch.rand(()).log().item()
        angle = 2 * torch.pi * torch.rand(()).item()
        low, high = angle - 2 * torch.pi, angle
        while log_likelihood(f * np.cos(angle) + other * np.sin(angle)) < threshold:
            low, high = (angle, high) if angle < 0 else (low, angle)
            angle = low + (high - low) * torch.rand(()).item()
        f = f * np.cos(angle) + other * np.sin(angle)
        kept.append(f)
    return torch.stack(kept[count // 10 :])


def test_few_inducing_points_say_what_sampling_the_posterior_says() -> None:
    x, labels = blobs(100)
    kernel = rbf(0.6, 4.0)
    with torch.no_grad():
        gram = kernel(x).to_dense()
    # The labels of the last forty are not shown.
    samples = slice_samples(gram[:60, :60], labels[:60], 3, 12_000)
    weights = torch.linalg.solve(gram[:60, :60] + 1e-8 * torch.eye(60).double(), gram[:60, 60:]).mT
    variance = 4 - (weights * gram[60:, :60]).sum(-1, keepdim=True)
    noise = torch.randn(len(samples), 40, 3, dtype=torch.float64)
    expected = (weights @ samples + variance.clamp_min(0).sqrt() * noise).softmax(-1).mean(0)
    model = VariationalGP(greedy_inducing_points(x[:60], kernel, 30), kernel, gpytorch.means.ZeroMean(), 3)
    model.fit(x[:60], labels[:60], epochs=60, batch_size=30)
    variational = probabilities(*model.predict(x[60:]), "monte_carlo")
    zeros = torch.zeros(100, 3, dtype=torch.float64)
    every = DenseCovariance.of_matrix(gram)
    posterior = LaplacePosterior(DenseCovariance(every.kernel, every.x[:60]), labels[:60], zeros[:60])
    latent = posterior.latent(every.x[60:])
    laplace = probabilities(*latent, "monte_carlo")
    assert (variational - expected).abs().max() < 0.05
    assert (laplace - expected).abs().max() < 0.1


def test_hyperparameters_are_learned() -> None:
    x, labels = blobs(150)
    bounds = []
    for learned in (False, True):
        kernel = rbf(5.0, 0.1).requires_grad_(learned)
        model = VariationalGP(x[::5], kernel, gpytorch.means.ConstantMean(), num_outputs=3)
        bounds.append(model.fit(x, labels, epochs=60, lr=0.1))
    assert bounds[1] > bounds[0] + 20
    assert kernel.outputscale > 0.5


def test_network_prior() -> None:
    x, labels = blobs(60)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    kernel = gpntk.NTKKernel(network, output="independent")
    points = greedy_inducing_points(x, kernel, 20)
    model = VariationalGP(points, kernel, gpntk.NetworkMean(network), num_outputs=3)
    with torch.no_grad():
        before = model.predict(x)
        np.testing.assert_allclose(before.mean, network(x), atol=1e-10)
        variances = kernel(x, diag=True)
    # The host adds 1e-6 to the diagonal.
    np.testing.assert_allclose(before.covariance, variances[:, None, None] * torch.eye(3), rtol=1e-3, atol=1e-5)
    model.fit(x, labels, epochs=30)
    after = probabilities(*model.predict(x))
    assert (after.argmax(-1) == labels).double().mean() > 0.95
    assert after[torch.arange(60), labels].log().mean() > probabilities(*before)[torch.arange(60), labels].log().mean()


def test_seeds() -> None:
    x, labels = blobs(60)
    means = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(means))
        model = VariationalGP(x[::4], rbf(0.7, 3.0), gpytorch.means.ZeroMean(), num_outputs=3)
        model.fit(x, labels, epochs=3, batch_size=16, seed=seed)
        means.append(model.predict(x).mean)
    assert torch.equal(means[0], means[1])
    assert not torch.equal(means[0], means[2])


def test_greedy_inducing_points() -> None:
    x = torch.randn(30, 2, dtype=torch.float64)
    kernel = rbf(0.8, 1.0)
    with torch.no_grad():
        gram = kernel(x).to_dense() + torch.rand(30, dtype=torch.float64).mul(0.1).diag()
    points = greedy_inducing_points(x, _Fixed(x, gram), 6)
    chosen: list[int] = []
    for _ in range(6):
        conditional = gram - gram[:, chosen] @ gram[chosen][:, chosen].inverse() @ gram[chosen]
        chosen.append(int(conditional.diagonal().argmax()))
    np.testing.assert_allclose(points, x[chosen])


class _Fixed(gpytorch.kernels.Kernel):
    """A kernel known at some points only."""

    def __init__(self, x: Tensor, gram: Tensor) -> None:
        super().__init__()
        self.x, self.gram = x, gram

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **_: object) -> Tensor:
        rows, columns = (torch.cdist(part, self.x).argmin(-1) for part in (x1, x2))
        return self.gram[rows, columns] if diag else self.gram[rows][:, columns]


def test_no_more_inducing_points_than_the_kernel_has_features() -> None:
    x = torch.randn(50, 2, dtype=torch.float64)
    assert len(greedy_inducing_points(x, gpytorch.kernels.LinearKernel().double(), 20)) <= 4


def test_bad_input() -> None:
    x, labels = blobs(12)
    network = nn.Linear(2, 3).double()
    with pytest.raises(InputError, match="kernel has 3 outputs per input: construct it with output='independent'"):
        VariationalGP(x, gpntk.NTKKernel(network), gpytorch.means.ZeroMean(), 3)
    with pytest.raises(InputError, match=r"inducing_points must be \[..., N, D\]"):
        VariationalGP(x[:, 0], rbf(1.0, 1.0), gpytorch.means.ZeroMean(), 3)
    model = VariationalGP(x, rbf(1.0, 1.0), gpytorch.means.ZeroMean(), 2)
    with pytest.raises(InputError, match="labels has class 2"):
        model.fit(x, labels)
    with pytest.raises(InputError, match="x has 12 rows and labels 11"):
        model.fit(x, labels[1:] % 2)
    with pytest.raises(InputError, match="x contains NaN"):
        model.fit(x * torch.nan, labels % 2)
