"""The spectral marginal likelihood against torch's dense Gaussian."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gpntk
from gpntk.inference import Features, SpectralMarginalLikelihood
from tests.cases import reference_jacobian


def problem(size: int, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(size, rank, dtype=torch.float64, generator=generator)
    noise = torch.randn(size, dtype=torch.float64, generator=generator)
    y = features @ torch.randn(rank, dtype=torch.float64, generator=generator) + 0.3 * noise + 1.5
    return features @ features.T, y, torch.ones(size, 1, dtype=torch.float64)


def dense(gram: Tensor, y: Tensor, scale: float, noise: float, mean: Tensor | float = 0.0) -> float:
    covariance = scale * gram + noise * torch.eye(len(y), dtype=torch.float64)
    mean = torch.as_tensor(mean, dtype=torch.float64).expand_as(y)
    return torch.distributions.MultivariateNormal(mean, covariance).log_prob(y).item()


@settings(max_examples=50, deadline=None)
@given(
    size=st.integers(1, 12),
    rank=st.integers(1, 15),
    seed=st.integers(0, 99),
    scale=st.floats(1e-3, 1e3),
    noise=st.floats(1e-3, 1e3),
    level=st.floats(-3, 3),
)
def test_value(size: int, rank: int, seed: int, scale: float, noise: float, level: float) -> None:
    gram, y, ones = problem(size, rank, seed)
    likelihood = SpectralMarginalLikelihood(gram, y, ones)
    value = likelihood(scale, noise, torch.tensor([level], dtype=torch.float64))
    assert value == pytest.approx(dense(gram, y, scale, noise, level), rel=1e-9, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(extra=st.integers(3, 12), rank=st.integers(1, 6), seed=st.integers(0, 99), basis=st.booleans())
def test_nothing_nearby_is_better(extra: int, rank: int, seed: int, basis: bool) -> None:
    size = rank + extra  # enough data to see the noise: the maximum lies inside the bounds
    gram, y, ones = problem(size, rank, seed)
    fit = SpectralMarginalLikelihood(gram, y, ones if basis else None).maximize()
    level = fit.coefficients.item() if basis else 0.0
    best = dense(gram, y, fit.scale, fit.noise, level)
    assert best == pytest.approx(fit.log_marginal_likelihood, rel=1e-6, abs=1e-6)
    for factor in (0.9, 1.1):
        assert dense(gram, y, factor * fit.scale, fit.noise, level) <= best + 1e-6
        assert dense(gram, y, fit.scale, factor * fit.noise, level) <= best + 1e-6
        if basis:
            assert dense(gram, y, fit.scale, fit.noise, level + factor - 1) <= best + 1e-6


def test_global_maximum_on_a_grid() -> None:
    gram, y, _ = problem(12, 4, 3)
    fit = SpectralMarginalLikelihood(gram, y).maximize()
    grid = torch.logspace(-6, 4, 25).tolist()
    assert max(dense(gram, y, s, v) for s in grid for v in grid) <= fit.log_marginal_likelihood + 1e-9


def test_the_unit_of_the_targets_does_not_matter() -> None:
    gram, y, ones = problem(10, 4, 1)
    one = SpectralMarginalLikelihood(gram, y, ones).maximize()
    two = SpectralMarginalLikelihood(gram, 100 * y, ones).maximize()
    assert two.scale == pytest.approx(1e4 * one.scale, rel=1e-5)
    assert two.noise == pytest.approx(1e4 * one.noise, rel=1e-5)
    assert two.coefficients.item() == pytest.approx(100 * one.coefficients.item(), rel=1e-5)


@pytest.mark.parametrize("gram", [torch.zeros(5, 5), torch.ones(5, 5), torch.eye(5)])
@pytest.mark.parametrize("y", [torch.zeros(5), torch.ones(5), torch.arange(5.0)])
def test_degenerate_problems_stay_finite(gram: Tensor, y: Tensor) -> None:
    fit = SpectralMarginalLikelihood(gram.double(), y.double(), torch.ones(5, 1).double()).maximize()
    assert 0 < fit.scale < float("inf")
    assert 0 < fit.noise < float("inf")
    assert abs(fit.log_marginal_likelihood) < float("inf")


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 30),
    width=st.integers(1, 4),
    seed=st.integers(0, 99),
    basis=st.booleans(),
    scale=st.floats(1e-3, 1e3),
    noise=st.floats(1e-3, 1e3),
)
def test_either_space_gives_the_same_function(
    rows: int, width: int, seed: int, basis: bool, scale: float, noise: float
) -> None:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1)).double()
    features = Features(gpntk.jacobians.StructuredBackend(gpntk.freeze(module)), torch.randn(rows, 2).double())
    y = torch.randn(rows).double() + 2
    ones = torch.ones(rows, 1).double() if basis else None
    level = torch.tensor([1.5]).double() if basis else None
    jacobian = reference_jacobian(module, features.x)
    likelihood = SpectralMarginalLikelihood.from_features(features, y, ones)
    value = dense(jacobian @ jacobian.T, y, scale, noise, 0.0 if level is None else level)
    assert likelihood(scale, noise, level) == pytest.approx(value, rel=1e-8, abs=1e-8)
    fit, other = likelihood.maximize(), SpectralMarginalLikelihood(jacobian @ jacobian.T, y, ones).maximize()
    assert fit.log_marginal_likelihood == pytest.approx(other.log_marginal_likelihood, rel=1e-6, abs=1e-6)
