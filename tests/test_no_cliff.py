"""The benchmark of one task at growing numbers of labels: its task, its baseline, its rows and its picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import check_grad
from scipy.stats import multivariate_normal
from torch import nn

import gpntk
from benchmarks import no_cliff, picture


def zero() -> nn.Module:
    """A network that says nothing."""
    layer = nn.Linear(3, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer.eval()


def test_only_the_labels_are_noisy_and_the_network_has_never_seen_the_bump() -> None:
    data = no_cliff.task(20_000, 0)
    known = no_cliff.source(data.x) + 0.5 * np.sin(5 * data.x[:, 1])
    beyond = data.y - known - 1.5 * np.exp(-4 * ((data.x - 0.5) ** 2).sum(1))
    assert beyond.std() == pytest.approx(no_cliff.NOISE, rel=0.02)
    bump = data.truth - no_cliff.source(data.points) - 0.5 * np.sin(5 * data.points[:, 1])
    assert bump.min() >= -1e-15
    assert 1 < bump.max() < 1.5


def test_the_baselines_evidence_and_its_gradient() -> None:
    data, logs = no_cliff.task(30, 0), np.log([0.7, 1.1, 1.9, 0.8, 0.3])
    lengths, scale, noise = np.exp(logs[:3]), 0.8, 0.3
    scaled = data.x / lengths
    covariance = scale**2 * np.exp(-0.5 * ((scaled[:, None] - scaled) ** 2).sum(-1)) + noise**2 * np.eye(30)
    expected = -multivariate_normal(np.zeros(30), covariance).logpdf(data.y)
    found, _ = no_cliff.negative_evidence(logs, data.x, data.y)
    assert found == pytest.approx(expected, rel=1e-8)
    difference = check_grad(*(lambda v, i=i: no_cliff.negative_evidence(v, data.x, data.y)[i] for i in (0, 1)), logs)
    assert difference < 1e-4


def test_rows_and_picture_of_small_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"network": zero, "adapted": no_cliff.dense, "POINTS": 200, "MOST_DENSE": 60}.items():
        monkeypatch.setattr(no_cliff, name, value)
    rows = no_cliff.measured([40, 60, 80], seeds=2)
    assert [row["labels"] for row in rows] == [40, 40, 60, 60, 80]
    errors = [no_cliff.dense(zero(), data).mean - data.truth for data in (no_cliff.task(40, 0), no_cliff.task(40, 1))]
    first, second = (np.sqrt((error**2).mean()) for error in errors)
    assert rows[0]["rmse"] == pytest.approx((first + second) / 2)
    assert rows[0]["± rmse"] == pytest.approx(abs(first - second) / 2)
    for row in rows:
        assert row["rmse"] < row["network_rmse"]
        assert 0.5 < row["within"] <= 1
    picture.no_cliff(rows, tmp_path / "no-cliff.png")
    assert (tmp_path / "no-cliff.png").stat().st_size > 10_000


def test_the_estimator_is_asked_for_the_noise_free_function() -> None:
    data = no_cliff.task(40, 0)
    found = no_cliff.adapted(zero(), data)
    model = gpntk.TransferRegressor(zero()).fit(data.x, data.y)
    mean, noisy = model.predict(data.points, return_std=True)
    np.testing.assert_allclose(found.mean, mean)
    np.testing.assert_allclose(found.deviation**2, noisy**2 - model.noise_variance_)
    assert found.kernel == model.kernel_


class Known(nn.Module):
    """The source's function itself, with two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 0.5], dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (torch.sin(self.weight[0] * x[:, 0]) + self.weight[1] * x[:, 1] * x[:, 2]).unsqueeze(-1)


def test_a_bump_is_not_taken_for_noise_because_fewer_labels_did() -> None:
    """300 of these labels show the sine alone; all show the bump, whose lengthscales are short in every column."""
    data = no_cliff.task(1000, 2)
    model = gpntk.TransferRegressor(Known(), kernel="ntk+stationary").fit(data.x, data.y)
    lengths = [value for name, value in model.hyperparameters_.items() if "lengthscale" in name]
    assert max(lengths) < 0.6
    ours, baseline = model.predict(data.points), no_cliff.dense(Known(), data).mean
    assert np.square(ours - data.truth).mean() < 1.1 * np.square(baseline - data.truth).mean()


def test_the_network_learns_its_function() -> None:
    x = torch.rand(500, 3) * 4 - 2
    error = no_cliff.network(steps=200)(x).squeeze(-1).detach().numpy() - no_cliff.source(x.numpy())
    assert np.sqrt((error**2).mean()) < 0.3
