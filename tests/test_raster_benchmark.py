"""The benchmark on a raster: which rows are drawn, and what is measured of a fit."""

import numpy as np
import pytest
import torch

import gpntk
from benchmarks import raster
from benchmarks.inference_suites import mlp


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A raster of 40,000 pixels with a hole; its values are its own inputs."""
    monkeypatch.setenv("GPNTK_DATA", str(tmp_path))
    (tmp_path / "malaria").mkdir()
    x, y = np.arange(40_000.0), np.random.default_rng(0).standard_normal(40_000)
    z = np.where(x < 5000, np.nan, x)
    np.savez(tmp_path / "malaria" / "CentralAfrica_Pf_incidence.npz", x=x, y=y, z=z)


@pytest.mark.usefixtures("stored")
def test_rows_are_known_pixels_and_none_is_drawn_twice() -> None:
    x, labels, z, truth = raster.raster(15_000, 20_000)
    assert (len(x), len(z)) == (15_000, 20_000)
    torch.testing.assert_close(x[:, 0], labels)
    torch.testing.assert_close(z[:, 0], truth)
    assert len(torch.cat([labels, truth]).unique()) == 35_000
    assert labels.std().item() == pytest.approx(1, rel=1e-3)


def test_what_is_measured_is_the_estimators_own() -> None:
    x = torch.rand(40, 2, dtype=torch.float64)
    y, module = (3 * x[:, 0]).sin(), mlp(2, 5, 1).eval()
    row = raster.measured("ntk", module, (x[:25], y[:25]), (x[25:], y[25:]))
    mean, deviation = gpntk.TransferRegressor(module, kernel="ntk").fit(x[:25], y[:25]).predict(x[25:], return_std=True)
    truth, output = y[25:].numpy(), module(x[25:].float()).detach().squeeze(-1).numpy()
    assert row["rmse"] == pytest.approx(np.sqrt(((mean - truth) ** 2).mean()))
    assert row["ratio"] == pytest.approx(row["rmse"] / np.sqrt(((output - truth) ** 2).mean()))
    assert row["within"] == pytest.approx((abs(mean - truth) < 2 * deviation).mean())
    assert (row["rows"], row["kernel"]) == (25, "ntk")
