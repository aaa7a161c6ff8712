"""Hyperparameters: priors of any kind, the one search and its checkpoint, against quadrature and closed forms."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpytorch.priors import GammaPrior, LogNormalPrior
from scipy.integrate import quad
from torch import Tensor, nn

import gpntk
from gpntk.errors import FileFormatError, InputError, SolveError
from gpntk.inference import FeatureCovariance, Features, log_evidence
from gpntk.inference.hyperposterior import Hyperparameter, infer, log_prior
from gpntk.inference.maximum import maximize
from gpntk.io import Checkpoint
from tests.cases import mlp, reference_jacobian

Point = Any


def bowl(point: Point) -> tuple[float, Point]:
    """-Σ_i i (x_i - 1)², scaled up: many labels."""
    weights = 1e4 * np.arange(1, len(point) + 1)
    return float(-weights @ (point - 1) ** 2), -2 * weights * (point - 1)


@pytest.mark.parametrize("prior", [GammaPrior(3.0, 6.0), LogNormalPrior(0.5, 0.7), torch.distributions.HalfNormal(2.0)])
def test_a_prior_of_the_value_is_one_of_its_logarithm(prior: Any) -> None:
    own = Hyperparameter("a", 1.0, 1.0, prior=prior)

    def density(log: float) -> float:
        return log_prior(torch.tensor([log], dtype=torch.float64), [own]).exp().item()

    assert quad(density, -30, 10)[0] == pytest.approx(1.0, abs=1e-5)
    assert density(0.3) == pytest.approx(
        prior.log_prob(torch.tensor(math.exp(0.3))).exp().item() * math.exp(0.3), rel=1e-6
    )


def test_an_average_under_a_prior_of_gpytorch_against_quadrature() -> None:
    pair = [Hyperparameter("a", 0.5, 1.0, prior=GammaPrior(3.0, 6.0)), Hyperparameter("b", 2.0, 1.5)]

    def likelihood(x: Tensor) -> Tensor:
        return -0.5 * ((x - 0.4) / 0.6).square().sum()

    def density(x: float) -> float:
        log = torch.tensor([x], dtype=torch.float64)
        return (likelihood(log) + log_prior(log, pair[:1])).exp().item()

    total = quad(density, -10, 5)[0]
    mean = quad(lambda x: x * density(x), -10, 5)[0] / total
    draws = infer(likelihood, pair, average=True, fixed={"b": math.exp(0.4)})
    assert draws.log_evidence == pytest.approx(math.log(total), abs=0.02)
    assert (draws.weights @ draws.logs[:, 0]).item() == pytest.approx(mean, abs=0.02)
    assert torch.equal(draws.logs[:, 1], torch.full_like(draws.logs[:, 1], 0.4))


def test_all_hyperparameters_may_be_known() -> None:
    pair = [Hyperparameter("a", 1.0, 1.0), Hyperparameter("b", 1.0, 1.0)]
    draws = infer(lambda x: -x.sum(), pair, average=True, fixed={"a": math.e, "b": math.exp(2)})
    torch.testing.assert_close(draws.logs, torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    assert draws.log_evidence == pytest.approx(-3.0)


def test_curvature_is_paid_for_only_where_it_is_wanted() -> None:
    three, calls = [Hyperparameter(name, 1.0, 1.0) for name in "abc"], 0

    def likelihood(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return -5 * (x - 0.5).square().sum()

    with_it = infer(likelihood, three, average=False)
    more, calls = calls, 0
    without = infer(likelihood, three, average=False, curvature=False)
    assert more - calls == 1 + 3
    assert torch.equal(without.best, with_it.best)
    assert math.isnan(without.log_evidence)


# --- the search ------------------------------------------------------------------------------------------------------


def test_the_maximum_within_bounds() -> None:
    found = maximize(bowl, [np.zeros(3), np.full(3, -4.0)], np.array([[-9.0, 9.0], [-9.0, 0.5], [2.0, 2.0]]))
    np.testing.assert_allclose(found.point, [1.0, 0.5, 2.0], atol=1e-6)
    assert found.value == bowl(found.point)[0]


def test_a_tolerance_ends_the_search_early() -> None:
    def valley(point: Point) -> tuple[float, Point]:
        x, y = point
        return -((1 - x) ** 2) - 100 * (y - x * x) ** 2, np.array(
            [2 * (1 - x) + 400 * x * (y - x * x), -200 * (y - x * x)]
        )

    far, near = (maximize(valley, [np.array([-1.2, 1.0])], tolerance=tolerance) for tolerance in (1.0, None))
    assert far.steps < near.steps
    assert near.value == pytest.approx(0.0, abs=1e-6)


def test_searches_turn_back_from_where_nothing_can_be_computed() -> None:
    def walled(point: Point) -> tuple[float, Point]:
        return (-math.inf, np.zeros(2)) if point.max() > 1.01 else bowl(point)

    np.testing.assert_allclose(maximize(walled, [np.array([0.9, -3.0])]).point, 1.0, atol=1e-5)
    with pytest.raises(SolveError, match="cannot be factorised"):
        maximize(walled, [np.full(2, 3.0)])


def test_arguments_that_make_no_sense() -> None:
    for options, message in (({"max_steps": -1}, "max_steps=-1"), ({"tolerance": -1.0}, "tolerance=-1.0")):
        with pytest.raises(InputError, match=message):
            maximize(bowl, [np.zeros(2)], **options)


class StoppedError(Exception):
    pass


def test_a_search_that_was_stopped_goes_on_from_its_best_point(tmp_path: Path) -> None:
    pair = [Hyperparameter("a", 1.0, 1.0), Hyperparameter("b", 1.0, 1.0)]
    calls, limit = 0, 4

    def likelihood(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > limit:
            raise StoppedError
        return -50 * (x - torch.tensor([3.0, -2.0], dtype=torch.float64)).square().sum()

    def checkpoint(what: str = "this") -> Checkpoint:
        return Checkpoint(tmp_path / "file", "fit", {"what": what})

    with pytest.raises(StoppedError):
        infer(likelihood, pair, average=True, checkpoint=checkpoint())
    calls, limit = 0, 1000
    resumed = infer(likelihood, pair, average=True, checkpoint=checkpoint())
    afterwards, calls = calls, 0
    whole = infer(likelihood, pair, average=True)
    assert afterwards < calls
    torch.testing.assert_close(resumed.best, whole.best, rtol=0, atol=1e-4)
    assert resumed.log_evidence == pytest.approx(whole.log_evidence, abs=1e-3)
    # The search has ended: what is left is the average.
    calls = 0
    again = infer(likelihood, pair, average=True, checkpoint=checkpoint())
    assert calls == 1 + 2 + 32
    torch.testing.assert_close(again.logs, resumed.logs)
    with pytest.raises(FileFormatError, match="another fit: its what: this, but here: that"):
        infer(likelihood, pair, average=True, checkpoint=checkpoint("that"))


# --- scale and noise of one kernel -----------------------------------------------------------------------------------


def searched(evidence: Any, starts: list[list[float]]) -> tuple[float, float, float]:
    """Scale, noise and value where the evidence of both logarithms is largest."""

    def evaluate(point: Point) -> tuple[float, Point]:
        logs = torch.tensor(point).requires_grad_()
        value = evidence(*logs.exp().split(1))
        return value.item(), torch.autograd.grad(value, logs)[0].numpy()

    bounds = np.log([[1e-8, 1e6]] * 2)
    found = maximize(evaluate, [np.array(start) for start in starts], bounds)
    return *np.exp(found.point), found.value


def gaussian(gram: Tensor, y: Tensor, scale: float, noise: float) -> float:
    covariance = scale * gram + noise * torch.eye(len(y), dtype=torch.float64)
    return torch.distributions.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y).item()


@pytest.mark.parametrize("unit", [1.0, 1e-3, 1e3])
def test_the_largest_evidence_of_a_scale_and_a_noise(unit: float) -> None:
    """No value on a grid over 20 powers of ten is larger, nor is one nearby; the unit of y does not matter."""
    generator = torch.Generator().manual_seed(3)
    features, e = (torch.randn(12, size, dtype=torch.float64, generator=generator) for size in (4, 1))
    y = unit * (features.sum(-1) + 0.3 * e[:, 0])
    gram, log = features @ features.T, 2 * math.log(unit)
    starts = [[log, log - 2], [log - 4, log]]
    scale, noise, value = searched(lambda scale, noise: log_evidence(scale * gram, noise, y), starts)
    assert value == pytest.approx(gaussian(gram, y, scale, noise), rel=1e-9)
    grid = (unit**2 * torch.logspace(-6, 4, 25)).tolist()
    others = [(s, v) for s in grid for v in grid]
    others += [(0.9 * scale, noise), (1.1 * scale, noise), (scale, 0.9 * noise), (scale, 1.1 * noise)]
    assert max(gaussian(gram, y, *other) for other in others) <= value + 1e-9


@pytest.mark.parametrize(("rows", "width"), [(12, 6), (40, 2)])
def test_features_and_their_matrix_have_the_same_maximum(rows: int, width: int) -> None:
    """In function space and in weight space."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1)).double()
    features = Features(gpntk.AutoBackend(gpntk.freeze(module)), torch.randn(rows, 2).double())
    y = torch.randn(rows).double() + 2 * features.x[:, 0]
    jacobian = reference_jacobian(module, features.x)
    gram = jacobian @ jacobian.T
    found = searched(lambda s, v: log_evidence(FeatureCovariance(features, s), v, y), [[0.0, 0.0]])
    dense = searched(lambda s, v: log_evidence(s * gram, v, y), [[0.0, 0.0]])
    assert found == pytest.approx(dense, rel=1e-4)
    assert found[2] == pytest.approx(gaussian(gram, y, *found[:2]), rel=1e-9)


def test_a_network_whose_jacobian_is_zero_has_noise_alone() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1, bias=False)).double()
    nn.init.constant_(module[0].bias, -100.0)
    for rows in (3, 20):
        x = torch.randn(rows, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        features, y = Features(gpntk.AutoBackend(gpntk.freeze(module)), x), x.sum(-1)
        found = searched(lambda s, v, f=features, y=y: log_evidence(FeatureCovariance(f, s), v, y), [[0.0, 0.0]])
        assert found[1] == pytest.approx(y.square().mean().item(), rel=1e-4)


# --- a transfer that was stopped -------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [False, True])
def test_a_transfer_that_was_stopped_goes_on(classes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, dtype=torch.float64, generator=generator)
    y = x[:, 0].sin() + 0.1 * torch.randn(40, dtype=torch.float64, generator=generator)
    kind = gpntk.TransferClassifier if classes else gpntk.TransferRegressor
    labels = (y > 0).numpy() if classes else y.numpy()
    save, left = Checkpoint.save, 7

    def stopping(self: Checkpoint, *args: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise StoppedError
        save(self, *args)

    def fitted(**options: Any) -> Any:
        return kind(mlp(1).double().eval(), kernel="auto", checkpoint=tmp_path / "file", **options).fit(x, labels)

    def predicted(model: Any) -> Any:
        return model.predict_proba(x[:9]) if classes else model.predict(x[:9])

    monkeypatch.setattr(Checkpoint, "save", stopping)
    with pytest.raises(StoppedError):
        fitted()
    left = 10**6
    resumed = fitted()
    written, left = 10**6 - left, 10**6
    again = fitted()
    assert left == 10**6  # all searches had ended
    np.testing.assert_allclose(predicted(again), predicted(resumed), rtol=1e-10)
    (tmp_path / "file").unlink()
    whole = fitted()
    assert written < 10**6 - left
    np.testing.assert_allclose(predicted(resumed), predicted(whole), atol=1e-2)
    with pytest.raises(FileFormatError, match=r"another fit: its options: .*, but here: "):
        fitted(layer_variances=True)
    x = x + 1
    with pytest.raises(FileFormatError, match="another fit: its data x: float64"):
        fitted()
