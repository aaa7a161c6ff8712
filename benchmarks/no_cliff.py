"""More labels, never a worse model: the default estimator from 500 to 50,000 labels of one task.

``python -m benchmarks.no_cliff [LABELS ...] [--seeds S]`` prints single sizes; ``python -m benchmarks.run --suite
no-cliff`` runs all and writes the results, of which ``benchmarks.picture`` draws ``docs/images/no-cliff.png``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits
from torch import nn

import gpntk

Array = NDArray[np.float64]

NOISE = 0.05
POINTS = 2000
SEEDS = {500: 5, 1990: 5, 2010: 5, 10_010: 3, 50_000: 1}
"""Repetitions at each number of labels."""
METHODS = ("gpntk.TransferRegressor", "dense GP on the residual, NumPy")
_SUBSET = 500
# Labels up to which the dense GP runs beside ours.
MOST_DENSE = 2010


class Task(NamedTuple):
    """Labelled inputs `[N, 3]` with noisy targets `[N]`, and points `[M, 3]` with the noise-free truth `[M]`."""

    x: Array
    y: Array
    points: Array
    truth: Array


class Prediction(NamedTuple):
    """Means and standard deviations of the noise-free function `[M]`, and what they took."""

    mean: Array
    deviation: Array
    kernel: str
    solver: str
    fit_s: float
    fit_cpu_s: float
    predict_s: float


def source(x: Array) -> Array:
    """What the network has learned, sin 2a + bc/2."""
    return np.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] / 2


def task(labels: int, seed: int) -> Task:
    """The source's function plus a bump and a sine that the network does not know; noise of deviation 0.05."""
    generator = np.random.default_rng(seed)
    x = generator.uniform(-2, 2, (labels + POINTS, 3))
    truth = source(x) + 1.5 * np.exp(-4 * ((x - 0.5) ** 2).sum(1)) + 0.5 * np.sin(5 * x[:, 1])
    y = truth + NOISE * generator.standard_normal(len(x))
    return Task(x[:labels], y[:labels], x[labels:], truth[labels:])


def network(steps: int = 1500) -> nn.Sequential:
    """MLP 3-24-24-1, trained by Adam on the source's function."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(steps):
        x = torch.rand(256, 3, generator=generator) * 4 - 2
        loss = (module(x).squeeze(1) - torch.sin(2 * x[:, 0]) - x[:, 1] * x[:, 2] / 2).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module.eval()


def adapted(module: nn.Module, data: Task) -> Prediction:
    """By the library's estimator as it is by default."""
    start = _clocks()
    model = gpntk.TransferRegressor(module).fit(data.x, data.y)
    fitted = _clocks()
    mean, deviation = model.predict(data.points, return_std=True, observation_noise=False)
    predict_s = (_clocks() - fitted)[0]
    return Prediction(mean, deviation, model.kernel_, model.report_.method, *(fitted - start), predict_s)


def dense(module: nn.Module, data: Task) -> Prediction:
    """By a GP on the network's residual in plain NumPy, squared exponential with a length for each input.

    Hyperparameters at the evidence's maximum on the first 500 labels, then one Cholesky factorisation of all.
    """
    start = _clocks()
    residual = data.y - _outputs(module, data.x)
    few = slice(_SUBSET)
    initial = np.log([1.0, 1.0, 1.0, residual.std(), 0.1])
    found = minimize(negative_evidence, initial, (data.x[few], residual[few]), "L-BFGS-B", jac=True)
    lengths, scale, noise = np.exp(found.x[:3]), np.exp(found.x[3]), np.exp(found.x[4])
    kernel = scale**2 * _squared_exponential(data.x / lengths, data.x / lengths)
    factor = cho_factor(kernel + noise**2 * np.eye(len(kernel)), lower=True)
    weights = cho_solve(factor, residual)
    fitted = _clocks()
    cross = scale**2 * _squared_exponential(data.points / lengths, data.x / lengths)
    mean = _outputs(module, data.points) + cross @ weights
    variance = scale**2 - (solve_triangular(factor[0], cross.T, lower=True) ** 2).sum(0)
    deviation = np.sqrt(np.maximum(variance, 0))
    predict_s = (_clocks() - fitted)[0]
    return Prediction(mean, deviation, "squared exponential", "Cholesky", *(fitted - start), predict_s)


def measured(sizes: Iterable[int], seeds: int | None = None) -> list[dict[str, Any]]:
    """One row for each size and method: errors, coverage and times, means over seeds with standard errors."""
    module = network()
    rows = []
    for labels in sizes:
        tasks = [task(labels, seed) for seed in range(seeds or SEEDS.get(labels, 1))]
        rows.append(_row(METHODS[0], adapted, module, tasks))
        if labels <= MOST_DENSE:
            with threadpool_limits(torch.get_num_threads()):
                rows.append(_row(METHODS[1], dense, module, tasks))
    return rows


def no_cliff(_device: torch.device, _dtype: torch.dtype) -> list[dict[str, Any]]:
    """A network of sin 2a + bc/2 adapted to that plus a bump and a sine, by the default estimator, beside a dense GP.

    MLP 3-24-24-1; three inputs, uniform on [-2, 2]; targets with noise of standard deviation 0.05. `rmse`: against the
    noise-free function on 2,000 points (`network_rmse`: the network as it is), mean over seeds and its standard error,
    and of seed 0; `within`: share of those points at which the truth lies within two standard deviations of the
    noise-free function's posterior; `fit_s` and `predict_s` (2,000 means and standard deviations): medians over seeds,
    `fit_cpu_s` in processor time. Everything in float64. A few points in the bump decide the error at 500 labels. The
    dense GP has the network's residual for its targets, and its hyperparameters from the first 500.
    """
    return measured(SEEDS)


SUITES: dict[str, Callable[[torch.device, torch.dtype], list[dict[str, Any]]]] = {"no-cliff": no_cliff}


def _row(
    name: str, method: Callable[[nn.Module, Task], Prediction], module: nn.Module, tasks: list[Task]
) -> dict[str, Any]:
    predictions = [method(module, data) for data in tasks]
    pairs = list(zip(tasks, predictions, strict=True))
    errors = [_rmse(found.mean, data.truth) for data, found in pairs]
    within = [np.mean(np.abs(found.mean - data.truth) < 2 * found.deviation) for data, found in pairs]
    return {
        "labels": len(tasks[0].x),
        "method": name,
        "seeds": len(tasks),
        "kernel": " / ".join(dict.fromkeys(found.kernel for found in predictions)),
        "solver": predictions[0].solver,
        "network_rmse": float(np.mean([_rmse(_outputs(module, data.points), data.truth) for data in tasks])),
        "rmse": float(np.mean(errors)),
        "± rmse": _standard_error(errors),
        "rmse_seed_0": errors[0],
        "within": float(np.mean(within)),
        "± within": _standard_error(within),
        "within_seed_0": float(within[0]),
        "fit_s": float(np.median([found.fit_s for found in predictions])),
        "fit_cpu_s": float(np.median([found.fit_cpu_s for found in predictions])),
        "predict_s": float(np.median([found.predict_s for found in predictions])),
    }


def _clocks() -> Array:
    """Wall time and processor time of this process."""
    return np.array([time.perf_counter(), time.process_time()])


def _standard_error(values: list[Any]) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else float("nan")


def _rmse(found: Array, truth: Array) -> float:
    return float(np.sqrt(np.mean((found - truth) ** 2)))


def _outputs(module: nn.Module, x: Array) -> Array:
    with torch.no_grad():
        return module(torch.as_tensor(x, dtype=torch.float32)).squeeze(-1).double().numpy()


def _squared_exponential(x: Array, z: Array) -> Array:
    distances = (x**2).sum(1)[:, None] + (z**2).sum(1) - 2 * x @ z.T
    return np.exp(-0.5 * np.maximum(distances, 0))


def negative_evidence(logs: Array, x: Array, y: Array) -> tuple[float, Array]:
    """Minus log p(y) and its gradient in the logarithms of lengths, scale and noise (Rasmussen & Williams, 5.9)."""
    lengths, scale, noise = np.exp(logs[:3]), np.exp(logs[3]), np.exp(logs[4])
    kernel = scale**2 * _squared_exponential(x / lengths, x / lengths)
    factor = cho_factor(kernel + (noise**2 + 1e-10) * np.eye(len(y)), lower=True)
    weights, inverse = cho_solve(factor, y), cho_solve(factor, np.eye(len(y)))
    value = 0.5 * y @ weights + np.log(np.diag(factor[0])).sum() + 0.5 * len(y) * math.log(2 * math.pi)
    inner = inverse - np.outer(weights, weights)
    weighted = inner * kernel
    squares = [(weighted * (column[:, None] - column) ** 2).sum() for column in (x / lengths).T]
    gradient = [0.5 * square for square in squares] + [weighted.sum(), noise**2 * np.trace(inner)]
    return float(value), np.array(gradient)


def main() -> None:
    """Print the rows of the sizes asked for, as they come; write nothing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.no_cliff", description=__doc__)
    parser.add_argument("labels", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--seeds", type=int, help="repetitions of each size")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for labels in options.labels:
        for row in measured([labels], options.seeds):
            print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
