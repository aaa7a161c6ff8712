"""Experiments in transfer learning: their metrics, runner and baselines on problems whose answers are known."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from benchmarks.transfer import metrics, pitch, regression_baselines, report, verdict
from benchmarks.transfer.__main__ import main
from benchmarks.transfer.cstr import COUNTED, KNOWN, Simulation
from benchmarks.transfer.experiment import Array, Experiment, Gaussian, Task
from benchmarks.transfer.regression_baselines import BASELINES, Affine, ard_gp, evaluate, rbf_gp

# --- metrics -------------------------------------------------------------------------------------------------------


def test_metrics_of_a_gaussian_against_closed_forms() -> None:
    y, mean = np.array([[1.0, 2.0], [3.0, -1.0], [0.0, 0.0]]), np.array([[1.0, 1.0], [3.0, 1.0], [0.0, 0.0]])
    found = metrics.scores(y, Gaussian(mean, np.full_like(mean, 2.0)))
    assert found["MSE"] == pytest.approx(5 / 6)
    assert found["RMSE"] == pytest.approx(math.sqrt(5 / 6))
    assert found["NLL"] == pytest.approx(math.log(2) + 0.5 * math.log(2 * math.pi) + 5 / 6 / 8)
    assert found["R² of output 1"] == 1
    assert found["R² of output 2"] == pytest.approx(1 - 5 / (4 + 1 - 1 / 3))


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 0.0), (1e-6, 0.5), (1e6, 0.5)])
def test_coverage_is_right_for_the_true_width_only(factor: float, expected: float) -> None:
    quantiles = stats.norm.ppf((np.arange(2000) + 0.5) / 2000)
    error = metrics.coverage_error(3 + 2 * quantiles, Gaussian(np.full(2000, 3.0), np.full(2000, 2 * factor)))
    assert error == pytest.approx(expected, abs=1e-3)


def test_coverage_error_of_a_width_that_is_half_the_true_one() -> None:
    quantiles = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    coverage = 2 * stats.norm.cdf(stats.norm.ppf(0.5 + metrics.LEVELS / 2) / 2) - 1
    error = metrics.coverage_error(quantiles, Gaussian(np.zeros(20_000), np.full(20_000, 0.5)))
    assert error == pytest.approx((metrics.LEVELS - coverage).mean(), abs=1e-3)


def test_metrics_of_probabilities_against_closed_forms() -> None:
    probabilities = np.array([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.4, 0.6]])
    found = metrics.scores(np.array([0, 0, 0, 1]), probabilities)
    assert found["accuracy"] == 0.75
    assert found["NLL"] == pytest.approx(-np.log([0.9, 0.1, 0.6, 0.6]).mean())
    assert found["ECE"] == pytest.approx(0.5 * (0.9 - 0.5) + 0.5 * (1 - 0.6))


def test_calibrated_probabilities_have_no_calibration_error() -> None:
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet([0.5, 0.5, 0.5], 50_000)
    y = (generator.random((50_000, 1)) > probabilities.cumsum(-1)).sum(-1)
    assert metrics.expected_calibration_error(y, probabilities) < 0.01
    assert metrics.expected_calibration_error((y + 1) % 3, probabilities) > 0.3


# --- runner --------------------------------------------------------------------------------------------------------


def known_errors(_data: Path, size: int, seed: int) -> tuple[Task, Array]:
    x = np.zeros((size, 1), np.float32)
    return Task(nn.Identity(), (), x, np.zeros(size), np.zeros((4, 1), np.float32), seed), np.full(4, 1.0)


def off_by(task: Task) -> Gaussian:
    """Wrong by 1 + seed, whatever the size."""
    return Gaussian(np.full(4, 2.0 + task.seed), np.full(4, 1.0))


EXPERIMENT = Experiment(known_errors, (3, 7), {"off": off_by, "right": lambda _: Gaussian(np.ones(4), np.ones(4))})


def test_an_experiment_becomes_a_table_a_file_and_a_picture(tmp_path: Path) -> None:
    *_, records = report.run(EXPERIMENT, tmp_path, EXPERIMENT.sizes, seeds=3)
    assert len(records) == 2 * 2 * 3
    np.testing.assert_allclose(report.values(records, "RMSE")["off"], [[1, 1], [2, 2], [3, 3]])

    line = next(line for line in report.table(records).splitlines() if line.startswith("off"))
    assert line.split()[1:] == ["4.667", "±", "2.3", "4.667", "±", "2.3"]  # MSE 1, 4, 9

    report.store(tmp_path / "results" / "known.json", "known", records)
    stored = json.loads((tmp_path / "results" / "known.json").read_text())
    assert stored["suite"] == "transfer-known"
    assert stored["seeds"] == [0, 1, 2]
    assert {"commit", "versions", "hardware", "threads"} <= stored.keys()
    row = next(row for row in stored["rows"] if (row["method"], row["n"]) == ("off", 7))
    assert row["RMSE"] == pytest.approx(2)
    assert row["± RMSE"] == pytest.approx(1 / math.sqrt(3))
    assert stored["records"] == records

    report.draw(tmp_path / "images" / "known.png", "known", records)
    assert (tmp_path / "images" / "known.png").stat().st_size > 10_000


def test_an_unknown_experiment_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.transfer", "sinusoid"])
    with pytest.raises(SystemExit, match="no experiment 'sinusoid': choose from sinusoids, "):
        main()


# --- baselines -----------------------------------------------------------------------------------------------------


def source() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1), Affine(5.0, 2.0)).eval()


def drawn(target: Callable[[Array], Array], size: int = 60) -> tuple[Task, Array]:
    generator = np.random.default_rng(0)
    x = generator.uniform(-2, 2, (size + 200, 2)).astype(np.float32)
    y = target(x) + 0.01 * generator.standard_normal(len(x))
    return Task(source(), (), x[:size], y[:size], x[size:], 0), y[size:]


def with_another_readout(x: Array) -> Array:
    return evaluate(source()[:-2], x) @ np.linspace(-1, 1, 16)


@pytest.mark.parametrize("name", sorted(BASELINES.keys() - {"unadapted network", "fine-tuned"}))
def test_baselines_learn_a_target_that_a_new_readout_explains(name: str) -> None:
    task, y = drawn(with_another_readout)
    found = metrics.scores(y, BASELINES[name](task))
    assert found["R²"] > 0.98
    assert found["NLL"] < metrics.scores(y, BASELINES["unadapted network"](task))["NLL"] - 1
    if name == "readout refitted":
        assert found["RMSE"] < 0.02  # noise: 0.01


def test_the_unadapted_network_knows_its_own_error() -> None:
    task, y = drawn(lambda x: evaluate(source(), x)[:, 0] + np.where(x[:, 0] > 0, 3, -3))
    prediction = BASELINES["unadapted network"](task)
    assert prediction.std == pytest.approx(3, abs=0.01)
    assert metrics.scores(y, prediction)["RMSE"] == pytest.approx(3, abs=0.01)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression_baselines, "RATES", (1e-3, 1e-2))
    monkeypatch.setattr(regression_baselines, "MOST_STEPS", 100)


@pytest.mark.usefixtures("short")
def test_fine_tuning_finds_a_network_close_by() -> None:
    task, y = drawn(lambda x: 0.5 + 1.2 * evaluate(source(), x)[:, 0])
    tuned, unadapted = (metrics.scores(y, BASELINES[name](task)) for name in ("fine-tuned", "unadapted network"))
    assert tuned["RMSE"] < unadapted["RMSE"] / 5
    assert tuned["NLL"] < unadapted["NLL"] - 1


@pytest.mark.usefixtures("short")
def test_fine_tuning_leaves_a_network_that_is_right_as_it_is() -> None:
    task, y = drawn(lambda x: evaluate(source(), x)[:, 0], size=10)
    before = {name: tensor.clone() for name, tensor in task.network.state_dict().items()}
    assert metrics.scores(y, BASELINES["fine-tuned"](task))["RMSE"] < 0.02
    torch.testing.assert_close(dict(task.network.state_dict()), before, rtol=0, atol=0)


def test_relevance_determination_pays_where_one_input_matters() -> None:
    task, y = drawn(lambda x: np.sin(3 * x[:, 0]), size=25)
    one, many = (metrics.scores(y, method(task))["RMSE"] for method in (rbf_gp, ard_gp))
    assert many < one / 3


# --- the simulation of the reactor ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_the_simulation_is_the_lstm_fed_with_known_outputs_and_then_left_alone() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(2, 16, proj_size=2, batch_first=True)
    simulation = Simulation({name: tensor.numpy() for name, tensor in lstm.state_dict().items()})
    x = torch.randn(2, 60, 4)
    with torch.no_grad():
        hidden, cell = torch.zeros(1, 2, 2), torch.zeros(1, 2, 16)
        for step in range(KNOWN):
            _, (_, cell) = lstm(x[:, [step], :2], (hidden, cell))
            hidden = x[None, :, step, 2:].contiguous()
        free, _ = lstm(x[:, KNOWN:, :2], (hidden, cell))
        expected = free[:, COUNTED.start - KNOWN :].flatten(1)
        torch.testing.assert_close(simulation(x), expected, rtol=1e-5, atol=1e-6)
        changed = x.clone()
        changed[:, KNOWN:, 2:] = 7.0  # outputs to be predicted are never looked at
        torch.testing.assert_close(simulation(changed), simulation(x), rtol=0, atol=0)


# --- verdicts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gains", "word"), [([2, 3, 4], "best"), ([-1, 0, 1.2], "tied"), ([-4, -3, -2], "worse")])
def test_the_default_is_compared_with_the_simple_method_of_best_mean(gains: list[float], word: str) -> None:
    """Errors are 5 for the better of two simple methods; the rest of the methods does not count."""
    errors = {"unadapted network": [5.0] * 3, "fine-tuned": [6.0] * 3, "Bayesian linear regression": [0.0] * 3}
    errors[verdict.OURS] = [5.0 - gain for gain in gains]
    records = [
        {"size": 10, "seed": seed, "method": name, "RMSE": value}
        for name, own in errors.items()
        for seed, value in enumerate(own)
    ]
    (found,) = verdict.verdicts("known", records)
    assert (found.word, found.rival, found.metric) == (word, "unadapted network", "RMSE")
    assert found.gain == pytest.approx(np.mean(gains))
    assert found.error == pytest.approx(np.std(gains, ddof=1) / math.sqrt(3))


# --- pitch ---------------------------------------------------------------------------------------------------------


def test_octaves_are_read_around_the_largest_bin() -> None:
    """Bins of 20 cents from 1,997.4 cents above 10 Hz on: 440 Hz lies between bins 227 and 228."""
    cents = 1200 * math.log2(44)
    below = int((cents - 1997.3794084376191) // 20)
    logits = torch.full((1, 360), -30.0)
    share = (cents - 1997.3794084376191) / 20 - below
    logits[0, below], logits[0, below + 1] = math.log(1 - share) - 5, math.log(share) - 5
    logits[0, 10] = -6.0  # far from the largest: it does not count
    assert pitch.Octaves()(logits).item() == pytest.approx(math.log2(44), abs=1e-4)


def test_frames_are_standardised_and_of_the_pitch_that_is_said() -> None:
    frames, octaves = pitch.tones(20, np.random.default_rng(0), np.random.default_rng(3))
    np.testing.assert_allclose(frames.mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(frames.std(1), 1, atol=1e-5)
    again, _ = pitch.tones(20, np.random.default_rng(0), np.random.default_rng(3))
    np.testing.assert_array_equal(frames, again)
    assert ((octaves > 3) & (octaves < math.log2(100))).all()
