"""Likelihoods: derivatives by automatic differentiation, and Laplace's method with each, in every space."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import gpntk
from gpntk.errors import InputError
from gpntk.inference import (
    AbstractSolver,
    ConjugateGradients,
    DenseCovariance,
    FeatureCovariance,
    Features,
    FunctionSpace,
    Nystrom,
    Posterior,
    SampledGram,
    WeightSpace,
    WhitenedSystem,
)
from gpntk.likelihoods import AbstractLikelihood, Bernoulli, Categorical, Gaussian, Poisson
from gpntk.models import LaplacePosterior
from tests.dense_gp import jacobian, network

NAN = float("nan")
CASES: dict[str, tuple[AbstractLikelihood, Tensor]] = {
    "categorical": (Categorical(), torch.tensor([0, 2, 1, 2, 0])),
    "one logit": (Categorical(), torch.tensor([0, 1, 1, 0, 1])),
    "bernoulli": (Bernoulli(), torch.tensor([[0.0, 1, 1], [1, NAN, 0], [NAN, NAN, NAN], [0, 0, 0], [1, 1, 1]])),
    "poisson": (Poisson(), torch.tensor([[0.0, 1, 4], [2, NAN, 0], [0, 0, 0], [1, 7, 2], [3, 1, NAN]])),
    "gaussian": (Gaussian(0.3), torch.tensor([[0.1, 1, 2], [NAN, 0, 1], [0, 0, 1], [2, NAN, 1], [0, 0, 0.5]])),
}


def outputs_of(name: str) -> int:
    return 1 if name == "one logit" else 3


def hessian(likelihood: AbstractLikelihood, f: Tensor, y: Tensor) -> Tensor:
    """Λ of every input `[N, C, C]`."""
    points, outputs = f.shape
    flat = torch.autograd.functional.hessian(lambda v: -likelihood.log_prob(v.view_as(f), y), f.flatten())
    assert isinstance(flat, Tensor)
    blocks = flat.view(points, outputs, points, outputs)
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)


@pytest.mark.parametrize("name", CASES)
def test_derivatives(name: str) -> None:
    likelihood, labels = CASES[name]
    outputs = outputs_of(name)
    y = likelihood.check(labels, 5, outputs)
    f = 2 * torch.randn(5, outputs).double()
    leaf = f.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(likelihood.log_prob(leaf, y), leaf)
    torch.testing.assert_close(likelihood.gradient(f, y), gradient)
    root = likelihood.root(f, y)
    torch.testing.assert_close(root @ root.mT, hessian(likelihood, f, y), rtol=1e-10, atol=1e-12)
    # tr(V ∂Λ/∂f), with V of each input's own.
    half = torch.randn(5, outputs, outputs).double()
    v = half @ half.mT
    leaf = f.clone().requires_grad_()
    roots = likelihood.root(leaf, y)
    trace = (v * (roots @ roots.mT)).sum()
    expected = torch.autograd.grad(trace + 0 * leaf.sum(), leaf)[0].nan_to_num(0.0)
    shares = likelihood.shares(f, y, root.mT @ v @ root)
    torch.testing.assert_close(likelihood.slope(f, y, shares), expected, rtol=1e-9, atol=1e-10)


def test_values_and_predictions() -> None:
    f, y = torch.randn(4, 2).double(), torch.tensor([[0.0, 1], [1, 1], [0, NAN], [NAN, 0]]).double()
    seen = ~y.isnan()
    for likelihood, law in (
        (Bernoulli(), torch.distributions.Bernoulli(logits=f)),
        (Poisson(), torch.distributions.Poisson(f.exp())),
        (Gaussian(0.5), torch.distributions.Normal(f, 0.5**0.5)),
    ):
        expected = law.log_prob(y.nan_to_num(0.0))[seen].sum()
        torch.testing.assert_close(likelihood.log_prob(f, likelihood.check(y, 4, 2)), expected)
    generator = torch.Generator().manual_seed(0)
    mean, covariance = torch.tensor([[0.3, -1.0]]).double(), torch.tensor([[[0.5, 0.2], [0.2, 1.0]]]).double()
    root = torch.linalg.cholesky(covariance[0])
    draws = mean + torch.randn(400_000, 2, generator=generator, dtype=torch.float64) @ root.mT
    assert (Bernoulli().predictive(mean, covariance) - draws.sigmoid().mean(0)).abs().max() < 0.01
    torch.testing.assert_close(Poisson().predictive(mean, covariance)[0], draws.exp().mean(0), rtol=0.01, atol=0)
    assert torch.equal(Gaussian().predictive(mean, covariance), mean)
    assert Categorical().predictive(mean, covariance).sum().item() == pytest.approx(1)


def test_labels_are_checked() -> None:
    with pytest.raises(InputError, match="Bernoulli labels must be 0 or 1"):
        Bernoulli().check(torch.tensor([0.5]), 1, 1)
    with pytest.raises(InputError, match="Poisson labels must be counts"):
        Poisson().check(torch.tensor([-1.0]), 1, 1)
    with pytest.raises(InputError, match=r"Gaussian labels must be \[N, C\] = \(2, 3\), got shape \(2, 2\)"):
        Gaussian().check(torch.zeros(2, 2), 2, 3)
    with pytest.raises(InputError, match="labels must be finite"):
        Gaussian().check(torch.tensor([math.inf]), 1, 1)
    with pytest.raises(InputError, match="noise=0: give a positive number"):
        Gaussian(0)
    with pytest.raises(InputError, match="labels has class 3"):
        Categorical().check(torch.tensor([3]), 1, 3)


# --- Laplace's method ------------------------------------------------------------------------------------------------


def newton(likelihood: AbstractLikelihood, y: Tensor, mean: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Mode and evidence by plain Newton steps with explicit matrices."""
    f = mean.clone()
    eye = torch.eye(gram.shape[0]).double()
    for _ in range(200):
        curvature = torch.block_diag(*hessian(likelihood, f, y))
        slope = likelihood.gradient(f, y).flatten()
        b = curvature @ (f - mean).flatten() + slope
        f = 0.5 * f + 0.5 * (mean + torch.linalg.solve(eye + gram @ curvature, gram @ b).view_as(f))
    curvature = torch.block_diag(*hessian(likelihood, f, y))
    energy = (f - mean).flatten() @ likelihood.gradient(f, y).flatten()
    logdet = torch.linalg.slogdet(eye + gram @ curvature).logabsdet
    return f, likelihood.log_prob(f, y) - 0.5 * energy - 0.5 * logdet


@pytest.mark.parametrize("name", CASES)
def test_mode_and_evidence(name: str) -> None:
    likelihood, labels = CASES[name]
    outputs = outputs_of(name)
    root = torch.randn(5 * outputs, 5 * outputs).double()
    gram, mean = root @ root.mT / outputs, 0.3 * torch.randn(5, outputs).double()
    posterior = LaplacePosterior(gram, labels, mean, likelihood=likelihood)
    mode, evidence = newton(likelihood, posterior.labels, mean, gram)
    torch.testing.assert_close(posterior.mode, mode, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(posterior.log_evidence, evidence, rtol=1e-9, atol=1e-9)
    leaves = mean.clone().requires_grad_(), root[:, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda m, r: LaplacePosterior(r @ r.mT / outputs, labels, m, likelihood=likelihood).log_evidence, leaves
    )


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "poisson", "gaussian"])
def test_outputs_that_share_a_kernel(name: str) -> None:
    likelihood, labels = CASES[name]
    root, mean = torch.randn(5, 5).double(), torch.randn(5, 3).double()
    k = root @ root.mT
    one = LaplacePosterior(k, labels, mean, likelihood=likelihood)
    two = LaplacePosterior(torch.kron(k, torch.eye(3).double()), labels, mean, likelihood=likelihood)
    torch.testing.assert_close(one.mode, two.mode, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(one.log_evidence, two.log_evidence)
    x = torch.arange(5).double().unsqueeze(-1)
    torch.testing.assert_close(one.covariance(x), two.covariance(x))
    for ours, theirs in zip(one.leave_one_out(), two.leave_one_out(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)
    assert one.effective_parameters() == pytest.approx(two.effective_parameters())
    leaf = root[:, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda r: LaplacePosterior(r @ r.mT, labels, mean, likelihood=likelihood).log_evidence, (leaf,)
    )


def test_a_gaussian_likelihood_is_regression() -> None:
    likelihood, labels = CASES["gaussian"]
    x, z = torch.randn(5, 2).double(), torch.randn(3, 2).double()

    def kernel(one: Tensor, two: Tensor) -> Tensor:
        base = (-torch.cdist(one, two).square()).exp()
        return base.repeat_interleave(3, -2).repeat_interleave(3, -1) + 0.1

    covariance = DenseCovariance(kernel, x, 3)
    laplace = LaplacePosterior(covariance, labels, likelihood=likelihood)
    noise = torch.where(labels.flatten().isnan(), math.inf, 0.3).double()
    exact = Posterior(WhitenedSystem(covariance, noise), labels.flatten().double())
    torch.testing.assert_close(laplace.mean(z), exact.mean(z), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(laplace.covariance(z), exact.covariance(z), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(laplace.log_evidence, exact.log_evidence, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "solver",
    [WeightSpace(), FunctionSpace(), ConjugateGradients(Nystrom(max_rank=30)), ConjugateGradients(SampledGram())],
    ids=str,
)
@pytest.mark.parametrize("name", ["categorical", "poisson"])
@pytest.mark.parametrize("layers", [1, 3])
def test_features_in_every_space(solver: AbstractSolver, name: str, layers: int) -> None:
    likelihood = CASES[name][0]
    module, x, z = network(3, 4), torch.randn(40, 5).double(), torch.randn(4, 5).double()
    labels = torch.randint(3, (40,)) if name == "categorical" else torch.randint(4, (40, 3)).double()
    features = Features(gpntk.AutoBackend(gpntk.freeze(module)), x)
    variances = (0.05 * (1 + torch.arange(layers))).double().requires_grad_()
    mean = 0.1 * torch.randn(40, 3).double()
    posterior = LaplacePosterior(
        FeatureCovariance(features, variances), labels, mean, likelihood=likelihood, solver=solver
    )

    def dense(variances: Tensor) -> LaplacePosterior:
        def kernel(one: Tensor, two: Tensor) -> Tensor:
            return FeatureCovariance(Features(features.backend, two), variances.detach()).cross(one.unsqueeze(0))[0]

        grams = FeatureCovariance(features, torch.ones(layers)).layer_grams()
        gram = torch.einsum("gnm,g->nm", grams, variances)
        data = DenseCovariance(
            lambda one, two: (
                torch.stack([kernel(*pair) for pair in zip(one, two, strict=True)])
                if one.dim() == 3
                else kernel(one, two)
            ),
            x,
            3,
            gram,
        )
        return LaplacePosterior(data, labels, mean, likelihood=likelihood)

    expected = dense(variances)
    direct = solver.is_direct
    torch.testing.assert_close(posterior.mode, expected.mode, rtol=0, atol=1e-8 if direct else 1e-5)
    # Quadratures stop at 1e-4 of the probes' norms.
    error = 1e-8 if direct else 4 * posterior.log_evidence_error + 1e-5 * 120
    assert abs(posterior.log_evidence - expected.log_evidence) <= error
    torch.testing.assert_close(posterior.mean(z), expected.mean(z), rtol=0, atol=1e-8 if direct else 1e-5)
    scale = expected.variance(z).max()
    assert (posterior.covariance(z) - expected.covariance(z)).abs().max() <= (1e-8 if direct else 4e-3) * scale
    for ours, theirs in zip(posterior.latent(z), expected.latent(z), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8 if direct else 4e-3 * float(scale))
    gradients = [torch.autograd.grad(each.log_evidence, variances)[0] for each in (posterior, expected)]
    allowed = 1e-7 if direct else 0.05 * (1 + gradients[1].abs().max() * variances.max()) / variances.min()
    assert (gradients[0] - gradients[1]).abs().max() <= allowed
    left = posterior.leave_one_out().mean, expected.leave_one_out().mean
    assert (left[0] - left[1]).abs().max() <= (1e-7 if direct else 0.02)
    more = torch.randn(2, 5).double()
    grown = [each.condition_on(more, labels[:2], mean[:2]) for each in (posterior, expected)]
    torch.testing.assert_close(grown[0].mean(z), grown[1].mean(z), rtol=0, atol=1e-8 if direct else 1e-5)


def test_softmax_in_weight_space_is_that_of_function_space() -> None:
    """At N = 500 with five classes."""
    module, x, z = network(5, 6), torch.randn(500, 5).double(), torch.randn(20, 5).double()
    labels = (jacobian(module, x)[:, -1].view(500, 5) + torch.randn(500, 5) + x).argmax(-1)
    covariance = FeatureCovariance(Features(gpntk.AutoBackend(gpntk.freeze(module)), x), torch.ones(1).double())
    one, two = (LaplacePosterior(covariance, labels, solver=solver) for solver in (WeightSpace(), FunctionSpace()))
    torch.testing.assert_close(one.log_evidence, two.log_evidence, rtol=1e-10, atol=1e-8)
    for ours, theirs in zip(one.latent(z), two.latent(z), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_samples_have_the_law() -> None:
    likelihood, labels = CASES["poisson"]
    root = torch.randn(15, 15).double()
    posterior = LaplacePosterior(root @ root.mT / 15, labels, torch.zeros(5, 3).double(), likelihood=likelihood)
    x = torch.arange(2).double().unsqueeze(-1)
    samples = posterior.sample(x, 20_000, torch.Generator().manual_seed(0))
    covariance = posterior.covariance(x)
    assert (samples.mean(0) - posterior.mean(x)).abs().max() < 0.03 * covariance.max().sqrt()
    assert (samples.T.cov() - covariance).abs().max() < 0.04 * covariance.max()
