"""The spectral marginal likelihood against torch's dense Gaussian."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gpntk
from gpntk.errors import InputError
from gpntk.inference import (
    FeatureCovariance,
    Features,
    Posterior,
    SpectralMarginalLikelihood,
    WeightSpace,
    WhitenedSystem,
)
from gpntk.models import TangentGP
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


@settings(max_examples=12, deadline=None)
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


@pytest.mark.parametrize("unit", [1e-130, 1e-100, 3e77, 1e130])
def test_nor_does_a_huge_or_a_tiny_one(unit: float) -> None:
    gram, y, ones = problem(10, 4, 1)
    one = SpectralMarginalLikelihood(gram, y, ones).maximize()
    two = SpectralMarginalLikelihood(gram, unit * y, ones).maximize()
    assert two.scale / unit / unit == pytest.approx(one.scale, rel=1e-5)
    assert two.noise / unit / unit == pytest.approx(one.noise, rel=1e-5)
    assert two.coefficients.item() / unit == pytest.approx(one.coefficients.item(), rel=1e-5)
    assert two.log_marginal_likelihood == pytest.approx(one.log_marginal_likelihood - 10 * math.log(unit), rel=1e-9)


def test_a_constant_has_no_spread_but_that_of_rounding() -> None:
    gram, _, ones = problem(10, 4, 1)
    for level in (0.1, 1e-6, 1e6):
        fit = SpectralMarginalLikelihood(gram, torch.full((10,), level).double(), ones).maximize()
        assert fit.coefficients.item() == pytest.approx(level, rel=1e-6)
        assert 1e-14 * level < fit.noise**0.5 < 1e-6 * level


def test_what_is_refused() -> None:
    gram, y, _ = problem(10, 4, 1)
    for unit in (1e-200, 1e200):
        with pytest.raises(InputError, match=r"y has values of .*, whose squares torch.float64 cannot hold"):
            SpectralMarginalLikelihood(gram, unit * y)
    with pytest.raises(InputError, match="y has NaN"):
        SpectralMarginalLikelihood(gram, y.log())
    with pytest.raises(InputError, match=r"min_noise=-1.0: give a variance"):
        SpectralMarginalLikelihood(gram, y).maximize(-1.0)


@pytest.mark.parametrize("rows", [3, 20])
def test_a_network_whose_jacobian_is_zero(rows: int) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1, bias=False)).double()
    nn.init.constant_(module[0].bias, -100.0)
    x = torch.randn(rows, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y, ones = x.sum(-1), torch.ones(rows, 1, dtype=torch.float64)
    features = Features(gpntk.AutoBackend(gpntk.freeze(module)), x)
    fit = SpectralMarginalLikelihood.from_features(features, y, ones).maximize()
    # All is noise: its maximum-likelihood estimate is in closed form.
    assert fit.noise == pytest.approx(y.var(correction=0).item(), rel=1e-9)
    assert fit.coefficients.item() == pytest.approx(y.mean().item())
    covariance = FeatureCovariance(features, torch.tensor([fit.scale]))
    posterior = Posterior(WhitenedSystem(covariance, torch.tensor([fit.noise])), y, WeightSpace())
    assert not posterior.mean(x).any()
    assert not posterior.variance(x).any()
    model = TangentGP(x, y, gpntk.NTKKernel(module))
    model.fit()
    assert model.noise.item() == pytest.approx(y.square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("gram", [torch.zeros(5, 5), torch.ones(5, 5), torch.eye(5)])
@pytest.mark.parametrize("y", [torch.zeros(5), torch.ones(5), torch.arange(5.0)])
def test_degenerate_problems_stay_finite(gram: Tensor, y: Tensor) -> None:
    fit = SpectralMarginalLikelihood(gram.double(), y.double(), torch.ones(5, 1).double()).maximize()
    assert 0 < fit.scale < float("inf")
    assert 0 < fit.noise < float("inf")
    assert abs(fit.log_marginal_likelihood) < float("inf")


@settings(max_examples=12, deadline=None)
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
