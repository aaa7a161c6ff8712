"""Links against numerical integration, plain Monte Carlo and the laws they obey."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import norm
from torch import Tensor

from gpntk.errors import InputError
from gpntk.likelihoods import LINKS, Link, probabilities


def latent(rows: int, outputs: int, seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mean = 2 * torch.randn(rows, outputs, generator=generator, dtype=torch.float64)
    root = torch.randn(rows, outputs, outputs, generator=generator, dtype=torch.float64)
    return mean, scale * root @ root.mT


def bernoulli(mean: float, variance: float) -> float:
    """E[σ(f)] by adaptive quadrature."""
    deviation = variance**0.5
    value, _ = quad(
        lambda z: expit(mean + deviation * z) * norm.pdf(z), -12, 12, epsabs=1e-12, points=[-mean / deviation]
    )
    return value


@settings(max_examples=40, deadline=None)
@given(mean=st.floats(-8, 8), variance=st.floats(0.01, 50))
def test_bernoulli_by_quadrature(mean: float, variance: float) -> None:
    expected = bernoulli(mean, variance)
    arguments = torch.tensor([[mean]]).double(), torch.tensor([[[variance]]]).double()
    # Half the draws lie one in each of equal parts of the quantiles: a monotone function is off by at most one part.
    for link, samples, tolerance in (
        ("monte_carlo", 512, 2 / 512),
        ("monte_carlo", 2**14, 2**-13),
        ("probit", 2, 0.02),
    ):
        result = probabilities(*arguments, link, samples)
        assert result.shape == (1, 2)
        assert result[0, 1].item() == pytest.approx(expected, abs=tolerance)
        assert result.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("outputs", [2, 3, 10])
def test_softmax_by_plain_monte_carlo(outputs: int) -> None:
    mean, covariance = latent(4, outputs, seed=outputs)
    draws = torch.distributions.MultivariateNormal(mean, covariance).sample(torch.Size([100_000])).softmax(-1)
    result, precise = (probabilities(mean, covariance, "monte_carlo", num_samples=size) for size in (512, 2**15))
    # Three standard errors of the plain draws, which are at most 0.0016 each.
    assert (precise - draws.mean(0)).abs().max() < 5e-3
    assert (result - precise).abs().max() < 1e-2
    naive = torch.stack([part.mean(0) for part in draws[: 512 * 100].split(512)])
    assert (result - precise).square().mean() < 0.5 * (naive - precise).square().mean()


def test_two_classes_are_one_logit() -> None:
    mean, covariance = latent(6, 2, seed=0)
    difference = torch.tensor([[-1.0, 1.0]]).double()
    logit = probabilities(mean @ difference.mT, difference @ covariance @ difference.mT, "monte_carlo")
    np.testing.assert_allclose(logit, probabilities(mean, covariance, "monte_carlo"), atol=5e-3)
    # The mean of a Dirichlet of two classes that fits the logits has their softmax, whatever the variance.
    bridged = probabilities(mean @ difference.mT, difference @ covariance @ difference.mT, "laplace_bridge")
    np.testing.assert_allclose(bridged[:, 1], (mean @ difference.mT)[:, 0].sigmoid(), atol=1e-12)


def test_laplace_bridge_inverts_the_laplace_approximation_of_a_dirichlet() -> None:
    # In the basis softmax, Dir(α) has mode log α - mean(log α) and covariance diag(1/α) centred on both sides.
    alpha = torch.tensor([[3.0, 0.7, 12.0, 5.0], [1.0, 1.0, 1.0, 2.0]]).double()
    centre = torch.eye(4).double() - 0.25
    covariance = centre @ (1 / alpha).diag_embed() @ centre
    # Given that they sum to zero already; a level of small variance makes conditioning on it well defined.
    covariance = covariance + 1e-9
    mean = alpha.log() @ centre
    expected = alpha / alpha.sum(-1, keepdim=True)
    np.testing.assert_allclose(probabilities(mean, covariance, "laplace_bridge"), expected, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    link=st.sampled_from(list(LINKS)),
    outputs=st.integers(1, 6),
    seed=st.integers(0, 999),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
    spread=st.sampled_from([1.0, 1e3]),
)
def test_probabilities(link: Link, outputs: int, seed: int, scale: float, spread: float) -> None:
    mean, covariance = latent(3, outputs, seed, scale)
    result = probabilities(spread * mean, covariance, link)
    assert result.shape == (3, max(2, outputs))
    assert (result >= 0).all()
    np.testing.assert_allclose(result.sum(-1), 1, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(link=st.sampled_from(["probit", "monte_carlo"]), outputs=st.integers(1, 5), seed=st.integers(0, 999))
def test_without_variance_it_is_the_softmax(link: Link, outputs: int, seed: int) -> None:
    mean, covariance = latent(3, outputs, seed, scale=0.0)
    logits = mean if outputs > 1 else torch.cat([torch.zeros_like(mean), mean], -1)
    np.testing.assert_allclose(probabilities(mean, covariance, link), logits.softmax(-1), atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(link=st.sampled_from(list(LINKS)), outputs=st.integers(2, 5), seed=st.integers(0, 999))
def test_renaming_classes(link: Link, outputs: int, seed: int) -> None:
    mean, covariance = latent(3, outputs, seed)
    order = torch.randperm(outputs, generator=torch.Generator().manual_seed(seed))
    renamed = probabilities(mean[:, order], covariance[:, order][:, :, order], link)
    # Draws are not renamed with the classes.
    tolerance = 0.02 if link == "monte_carlo" else 1e-12
    np.testing.assert_allclose(renamed, probabilities(mean, covariance, link)[:, order], atol=tolerance)


@settings(max_examples=20, deadline=None)
@given(outputs=st.integers(2, 5), seed=st.integers(0, 999), shift=st.floats(-100, 100))
def test_a_common_level_does_not_matter(outputs: int, seed: int, shift: float) -> None:
    mean, covariance = latent(3, outputs, seed)
    result = probabilities(mean, covariance, "monte_carlo")
    np.testing.assert_allclose(probabilities(mean + shift, covariance, "monte_carlo"), result, atol=1e-10)
    # A common variance changes the draws that are made, not their distribution.
    np.testing.assert_allclose(probabilities(mean, covariance + 2, "monte_carlo"), result, atol=0.02)
    # Where the variances are equal, levels drop out of the closed forms too.
    equal = torch.eye(outputs).double().expand(3, -1, -1)
    for link in LINKS:
        np.testing.assert_allclose(
            probabilities(mean + shift, equal, link), probabilities(mean, equal, link), atol=1e-10
        )


def test_more_variance_is_less_certainty() -> None:
    mean = torch.tensor([[3.0, 0.0, 0.0]]).double()
    for link in ("probit", "monte_carlo"):
        tops = [probabilities(mean, v * torch.eye(3).double()[None], link)[0, 0].item() for v in (0.0, 1.0, 10.0, 1e4)]
        assert tops == sorted(tops, reverse=True)
        assert tops[-1] == pytest.approx(1 / 3, abs=0.03)


def test_draws_are_reproducible_and_leave_the_global_generator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, covariance = latent(50, 3, seed=1)
    state = torch.get_rng_state()
    one = probabilities(mean, covariance, "monte_carlo", seed=3)
    assert torch.equal(state, torch.get_rng_state())
    monkeypatch.setattr("gpntk.likelihoods.links._CHUNK", 512 * 3 * 7)
    np.testing.assert_allclose(probabilities(mean, covariance, "monte_carlo", seed=3), one, atol=1e-14)
    assert (one - probabilities(mean, covariance, "monte_carlo", seed=4)).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": torch.zeros(3)}, r"mean must be floating point \[M, C\]"),
        ({"mean": torch.zeros(3, 2).long()}, r"mean must be floating point \[M, C\]"),
        ({"mean": torch.tensor([[torch.nan, 0.0]] * 3)}, "mean has values that are not finite"),
        ({"covariance": torch.zeros(3, 2)}, r"covariance must be \[M, C, C\], here \(3, 2, 2\)"),
        ({"covariance": torch.full((3, 2, 2), torch.inf)}, "covariance has values that are not finite"),
        ({"link": "logit"}, "link='logit': choose one of 'probit', 'monte_carlo', 'laplace_bridge'"),
        ({"num_samples": 5}, "num_samples=5 must be even"),
        ({"num_samples": 0}, "num_samples=0: give a whole number"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    arguments = {"mean": torch.zeros(3, 2), "covariance": torch.zeros(3, 2, 2), "link": "probit", **change}
    with pytest.raises(InputError, match=message):
        probabilities(**arguments)
