"""Baselines of the experiments in transfer learning: probabilities, whatever the labels are."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks.transfer import fine_tuning, logistic
from benchmarks.transfer.cache import cached
from benchmarks.transfer.classification_baselines import baselines
from benchmarks.transfer.experiment import Task
from benchmarks.transfer.logistic import Logistic
from benchmarks.transfer.sources import classes, convolutional

CLASSES = 4


@pytest.fixture(autouse=True)
def short_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fine_tuning, "STEPS", (0, 3))
    monkeypatch.setattr(logistic, "STRENGTHS", (0.1, 10.0))


def network(outputs: int = CLASSES, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return convolutional((1, 3, 4), 8, outputs).eval()


def task(labels: list[int], outputs: int = CLASSES) -> Task:
    random = np.random.default_rng(0)
    x, x_test = (random.random((size, 1, 8, 8), dtype=np.float32) for size in (len(labels), 7))
    return Task(network(outputs), [network(outputs, 1)], x, np.array(labels), x_test, 0, CLASSES)


@pytest.mark.parametrize(("name", "same_classes"), [(n, s) for s in (True, False) for n in baselines(s)])
@pytest.mark.parametrize("labels", [[0, 1, 2, 3] * 3, [2, 0, 2, 2, 0, 2], [1]], ids=["all", "two", "one"])
def test_rows_are_probabilities(name: str, same_classes: bool, labels: list[int]) -> None:
    drawn = task(labels, CLASSES if same_classes else 3)
    before = copy.deepcopy(drawn.network.state_dict())
    first, second = (np.asarray(baselines(same_classes)[name](drawn)) for _ in range(2))
    assert first.shape == (7, CLASSES)
    assert (first >= 0).all()
    np.testing.assert_allclose(first.sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(first, second)
    assert all(torch.equal(value, before[key]) for key, value in drawn.network.state_dict().items())
    assert not drawn.network.training


def test_fine_tuning_is_adam() -> None:
    x, y = torch.rand(12, 1, 8, 8), torch.arange(12) % CLASSES
    expected = network()
    optimizer = torch.optim.Adam(expected.parameters(), 1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        functional.cross_entropy(expected(x), y).backward()
        optimizer.step()
    reached = fine_tuning.fine_tuned(network(), x, y, fine_tuning.Recipe(1e-3, 5), seed=0)
    for left, right in zip(reached.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(left, right)


def test_search_is_cross_validation() -> None:
    x, y = torch.rand(12, 1, 8, 8), torch.arange(12) % CLASSES
    fold = torch.tensor(np.random.default_rng(0).permutation(12) % fine_tuning.FOLDS)
    totals = {}
    for recipe in (fine_tuning.Recipe(rate, steps) for rate in fine_tuning.RATES for steps in fine_tuning.STEPS):
        totals[recipe] = 0.0
        for held in range(fine_tuning.FOLDS):
            kept, out = fold != held, fold == held
            trained = fine_tuning.fine_tuned(network(), x[kept], y[kept], recipe, seed=0)
            totals[recipe] += functional.cross_entropy(trained(x[out]), y[out], reduction="sum").item()
    assert fine_tuning.chosen(network(), x, y, seed=0) == min(totals, key=lambda recipe: totals[recipe])
    assert len(set(totals.values())) > len(fine_tuning.RATES)


def test_evidence_of_logistic_regression_is_laplace() -> None:
    torch.manual_seed(0)
    features, y = torch.randn(9, 2, dtype=torch.float64), torch.arange(9) % 3
    centre = torch.randn(2, 3, dtype=torch.float64)

    def log_joint(weights: torch.Tensor) -> torch.Tensor:
        prior = torch.distributions.Normal(centre, 2.0**-0.5).log_prob(weights).sum()
        return prior - functional.cross_entropy(features @ weights, y, reduction="sum")

    fit = Logistic.given(features, y, centre, 2.0)
    hessian = torch.autograd.functional.hessian(log_joint, fit.mode).reshape(6, 6)
    torch.testing.assert_close(fit.precision @ fit.precision.T, -hessian)
    scale = torch.logdet(-hessian / (2 * torch.pi))
    assert fit.evidence == pytest.approx((log_joint(fit.mode) - scale / 2).item())
    slope = torch.autograd.functional.jacobian(log_joint, fit.mode)
    assert slope.abs().max() < 1e-3


def test_average_over_weights_is_that_of_their_posterior() -> None:
    precision = torch.tensor([[4.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    fit = Logistic(torch.tensor([[0.5, -1.0]], dtype=torch.float64), torch.linalg.cholesky(precision), 0.0)
    samples = torch.distributions.MultivariateNormal(fit.mode[0], precision_matrix=precision).sample((100_000,))
    averaged = fit.averaged(torch.ones(1, 1, dtype=torch.float64), seed=0)
    torch.testing.assert_close(averaged[0], samples.softmax(1).mean(0), atol=0.03, rtol=0)


def test_classes_are_renumbered() -> None:
    x, y = classes((np.arange(6, dtype=np.float32), np.array([5, 3, 5, 7, 1, 3])), (3, 5))
    assert x.tolist() == [0, 1, 2, 5]
    assert y.tolist() == [1, 0, 1, 0]


def test_a_source_is_trained_once(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPNTK_CACHE", str(tmp_path))
    asked: list[int] = []

    def train(seed: int) -> nn.Module:
        asked.append(seed)
        return nn.Sequential(nn.Linear(1, 1), nn.Dropout()).train()

    make: Callable[[], nn.Module] = lambda: cached("line", 3, train)  # noqa: E731
    first, second = make(), make()
    assert asked == [3]
    assert not first.training
    assert torch.equal(first[0].weight, second[0].weight)  # pyright: ignore[reportIndexIssue]


def test_the_temperature_is_where_the_likelihood_is_largest() -> None:
    drawn = task([0, 1, 2, 3] * 3)
    with torch.no_grad():
        logits, at_test = (drawn.network(torch.tensor(x)).double() for x in (drawn.x, drawn.x_test))
        factors = torch.linspace(-5, 3, 80_001, dtype=torch.float64).exp()
        losses = [functional.cross_entropy(factor * logits, torch.tensor(drawn.y)).item() for factor in factors[::40]]
        expected = (factors[::40][int(np.argmin(losses))] * at_test).softmax(1)
    np.testing.assert_allclose(baselines(True)["temperature"](drawn), expected, atol=2e-3)
