"""Classification by regression, against numpy, scikit-learn's GPs and what GPyTorch predicts."""

from typing import Any

import gpytorch
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF
from sklearn.preprocessing import LabelBinarizer
from torch import Tensor, nn

import gpntk
from gpntk.errors import InputError
from gpntk.likelihoods import dirichlet_targets, one_hot_targets, probabilities
from gpntk.models import TangentGP
from tests.cases import scale_and_noise


def blobs(count: int = 40, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    angle = 2 * torch.pi * labels / classes
    noise = 0.3 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return torch.stack([angle.cos(), angle.sin()], -1).double() + noise, labels


def test_ten_classes_have_the_targets_of_the_paper() -> None:
    targets = one_hot_targets(torch.tensor([3, 0]), 10, torch.float64)
    np.testing.assert_allclose(targets[0], [-0.1, -0.1, -0.1, 0.9, -0.1, -0.1, -0.1, -0.1, -0.1, -0.1], atol=1e-16)
    np.testing.assert_allclose(targets[1], [0.9, *[-0.1] * 9], atol=1e-16)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(7, 12))
def test_targets_are_centred_indicators(labels: list[int], classes: int) -> None:
    targets = one_hot_targets(torch.tensor(labels), classes, torch.float64).numpy()
    indicators = LabelBinarizer().fit(range(classes)).transform(labels)
    np.testing.assert_allclose(targets, indicators - indicators.mean(1, keepdims=True), atol=1e-15)
    assert targets.argmax(1).tolist() == labels


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integers_of_every_size(dtype: torch.dtype) -> None:
    targets = one_hot_targets(torch.tensor([1, 0], dtype=dtype))
    assert targets.dtype == torch.get_default_dtype()
    assert targets.tolist() == [[-0.5, 0.5], [0.5, -0.5]]


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (torch.tensor([0.0, 1.0]), 2, "must be integers, got torch.float32"),
        (torch.tensor([True, False]), 2, "must be integers, got torch.bool"),
        (torch.tensor([[0, 1]]), 2, r"vector of at least one class, got shape \(1, 2\)"),
        (torch.tensor([], dtype=torch.long), 2, r"at least one class, got shape \(0,\)"),
        (torch.tensor([0, -1]), 2, "class -1, but num_classes=2 allows 0 to 1"),
        (torch.tensor([0, 5]), 5, "class 5, but num_classes=5 allows 0 to 4"),
        (torch.tensor([0, 0]), None, "num_classes=1"),
    ],
)
def test_bad_labels(labels: Tensor, classes: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        one_hot_targets(labels, classes)


def test_gradient_flow_is_the_regression_of_scikit_learn() -> None:
    x, labels = blobs()
    targets = one_hot_targets(labels, dtype=x.dtype)
    kernel = gpytorch.kernels.RBFKernel().double()
    kernel.lengthscale = 0.7
    mean = gpntk.GradientFlow(kernel, x[:30], targets[:30], nngp=kernel, noise=0.01).posterior(x[30:]).mean
    peer = GaussianProcessRegressor(RBF(kernel.lengthscale.item()), alpha=0.01, optimizer=None)
    np.testing.assert_allclose(mean, peer.fit(x[:30], targets[:30]).predict(x[30:]), atol=1e-10)
    assert (mean.argmax(-1) == labels[30:]).float().mean() >= 0.9


class BatchGP(gpytorch.models.ExactGP):
    """A GP per class with one kernel, for targets `[C, N]`."""

    def __init__(self, x: Tensor, y: Tensor, kernel: gpytorch.kernels.Kernel) -> None:
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.covar_module = kernel

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        classes = self.train_targets.shape[0]
        covariance: Any = self.covar_module(x)
        return gpytorch.distributions.MultivariateNormal(
            x.new_zeros(classes, x.shape[-2]), covariance.expand(classes, x.shape[-2], x.shape[-2])
        )


def test_a_batch_of_exact_gps_of_gpytorch() -> None:
    x, labels = blobs()
    targets = one_hot_targets(labels, dtype=x.dtype)
    network = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    kernel = gpntk.InfiniteNNGPKernel(network, bias_std=0.3, learn=False).double()
    model = BatchGP(x[:30], targets[:30].mT, kernel).double().eval()
    model.likelihood.noise = 0.01
    with torch.no_grad():
        gram, cross = kernel(x[:30]).to_dense(), kernel(x[30:], x[:30]).to_dense()
        mean = model(x[30:]).mean
    expected = cross.numpy() @ np.linalg.solve(gram.numpy() + 0.01 * np.eye(30), targets[:30].numpy())
    np.testing.assert_allclose(mean.mT, expected, atol=1e-8)
    assert (mean.argmax(0) == labels[30:]).float().mean() >= 0.9


def test_tangent_gp_with_an_output_per_class() -> None:
    x, labels = blobs()
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 3)).double()
    kernel = gpntk.NTKKernel(network)
    targets = one_hot_targets(labels, dtype=x.dtype)
    model = TangentGP(x[:30], targets[:30], kernel).eval()
    model.initialize(**scale_and_noise(2.0, 0.05))
    with torch.no_grad():
        gram, cross = kernel(x[:30]).to_dense(), kernel(x[30:], x[:30]).to_dense()
        mean = model(x[30:]).mean
    solved = np.linalg.solve(2 * gram.numpy() + 0.05 * np.eye(90), targets[:30].flatten().numpy())
    np.testing.assert_allclose(mean.flatten(), 2 * cross.numpy() @ solved, atol=1e-8)
    assert (mean.argmax(-1) == labels[30:]).float().mean() >= 0.9


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.integers(5, 8), st.sampled_from([1e-4, 0.01, 0.5]))
def test_dirichlet_targets_are_the_log_normals_of_the_paper(labels: list[int], classes: int, epsilon: float) -> None:
    targets, noise = dirichlet_targets(torch.tensor(labels), classes, epsilon, torch.float64)
    assert targets.shape == noise.shape == (len(labels), classes)
    # The log-normal with this mean and variance of the logarithm has the moments of Gamma(α, 1), α and α.
    alpha = epsilon + LabelBinarizer().fit(range(classes)).transform(labels)
    mean = (targets + noise / 2).exp().numpy()
    np.testing.assert_allclose(mean, alpha, rtol=1e-9)
    np.testing.assert_allclose(noise.expm1().numpy() * mean**2, alpha, rtol=1e-9)


def test_dirichlet_regression_predicts_probabilities() -> None:
    x, labels = blobs(60)
    targets, noise = dirichlet_targets(labels[:45], dtype=torch.float64)
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = 0.8, 8.0
    with torch.no_grad():
        gram, cross = kernel(x[:45]).to_dense(), kernel(x[45:], x[:45]).to_dense()
    level = targets.mean()
    precisions = (gram + noise.mT.diag_embed()).inverse()
    mean = level + torch.einsum("mn,cnk,kc->mc", cross, precisions, targets - level)
    variance = 8 - torch.einsum("mn,cnk,mk->mc", cross, precisions, cross)
    result = probabilities(mean, variance.diag_embed(), "monte_carlo")
    assert (result.argmax(-1) == labels[45:]).float().mean() >= 0.9
    assert result[torch.arange(15), labels[45:]].log().mean() > -0.4


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan")])
def test_bad_alpha_epsilon(epsilon: float) -> None:
    with pytest.raises(InputError, match=r"alpha_epsilon=.*: give a positive number"):
        dirichlet_targets(torch.tensor([0, 1]), alpha_epsilon=epsilon)
    with pytest.raises(InputError, match="labels has class 3"):
        dirichlet_targets(torch.tensor([0, 3]), 3)
