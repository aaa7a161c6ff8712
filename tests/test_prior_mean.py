"""Whether the network's output is the prior mean: the labels decide, and the estimator says so."""

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import gpntk

Array = NDArray[np.float64]


class Wave(nn.Module):
    """a sin(w x), known exactly, with a linear readout."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.readout = nn.Linear(1, 1).double(), nn.Linear(1, 1).double()
        with torch.no_grad():
            for layer, weight in ((self.inner, 1.5), (self.readout, 4.0)):
                layer.weight.fill_(weight)
                layer.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(self.inner(x).sin())


def labels(target: str, size: int = 25) -> tuple[Array, Array]:
    random = np.random.default_rng(0)
    x = random.uniform(-4, 4, (size, 1))
    values = {"its own": 4.4 * np.sin(1.5 * x[:, 0]), "another": 3 + np.cos(0.7 * x[:, 0] + 1)}
    return x, values[target] + 0.02 * random.standard_normal(size)


def test_another_task_is_not_explained_around_the_network(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    x, y = labels("another")
    with caplog.at_level(logging.WARNING, "gpntk"):
        model = gpntk.TransferRegressor(Wave()).fit(x, y)
    assert model.kernel_ == "stationary, mean constant"
    assert "mean='network' keeps it" in caplog.text
    # As good as the one that was told.
    points = np.linspace(-4, 4, 50)[:, None]
    truth = 3 + np.cos(0.7 * points[:, 0] + 1)
    told = gpntk.TransferRegressor(Wave(), mean="constant", kernel="stationary").fit(x, y)
    np.testing.assert_allclose(model.predict(points), told.predict(points), atol=1e-6)
    assert np.abs(model.predict(points) - truth).max() < 0.1
    # The gain that is said is the difference of the evidences compared.
    compared = model._model.comparison
    assert compared is not None
    around = max(value for name, value in compared.log_evidence.items() if "mean" not in name)
    assert compared.log_evidence[model.kernel_] > around + 3
    report = model.report_
    assert report.log_evidence[report.kernel] > report.log_evidence["around the network's output"] + 3
    assert "one of another task" in str(report)
    # A file keeps it, and more labels too.
    model.save(tmp_path / "model")
    loaded = gpntk.TransferRegressor.load(tmp_path / "model", Wave())
    np.testing.assert_allclose(loaded.predict(points), model.predict(points), atol=1e-9)
    assert loaded.kernel_ == model.kernel_
    model.partial_fit(points[:5], truth[:5])
    assert np.abs(model.predict(points) - truth).max() < 0.1


def test_its_own_task_is_explained_around_the_network(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "gpntk"):
        model = gpntk.TransferRegressor(Wave()).fit(*labels("its own"))
    assert "mean" not in model.kernel_
    assert "prior mean" not in caplog.text
    far = np.array([[40 * math.pi]])
    # Far from all labels the prior mean is left.
    assert model.predict(far + 1 / 3)[0] == pytest.approx(Wave()(torch.tensor(far + 1 / 3)).item(), abs=1.5)


@pytest.mark.parametrize("given", [{"mean": "network"}, {"kernel": "ntk"}])
def test_what_is_given_is_kept(given: dict[str, str]) -> None:
    model = gpntk.TransferRegressor(Wave(), **given).fit(*labels("another"))
    assert "mean" not in model.kernel_
    assert model._model.task.mean == "network"
