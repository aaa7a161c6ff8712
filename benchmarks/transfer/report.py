"""Experiments run, and what came of them: records, tables, a file of results and a picture."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

from benchmarks.measure import provenance
from benchmarks.transfer.experiment import Array, Experiment
from benchmarks.transfer.metrics import scores
from gpntk.plotting import learning_curves

Record = dict[str, Any]
"""Size, seed and method of one fit, its metrics, and the seconds that fitting and predicting took."""

_KEYS = ("size", "seed", "method")
# Metrics of which the picture shows the first few there are.
_DRAWN = ("RMSE", "accuracy", "NLL", "calibration error", "ECE")


def run(experiment: Experiment, data: Path, sizes: Sequence[int], seeds: int) -> Iterator[list[Record]]:
    """Every method on every task; no method sees a test label. Yields what there is after each size."""
    records: list[Record] = []
    tasks = [(seed, size) for size in sizes for seed in range(seeds)]
    bar = tqdm(tasks, "tasks", leave=False)
    for seed, size in bar:
        task, y_test = experiment.draw(data, size, seed)
        for name, method in experiment.methods.items():
            bar.set_postfix_str(f"n = {size}, seed {seed}: {name}")
            torch.manual_seed(seed)
            start = time.perf_counter()
            prediction = method(task)
            seconds = time.perf_counter() - start
            measured = {**scores(y_test, prediction), "seconds": seconds}
            records.append({"size": size, "seed": seed, "method": name, **measured})
        if seed == seeds - 1:
            yield records


def values(records: Sequence[Record], metric: str) -> dict[str, Array]:
    """A metric `[seeds, sizes]` of each method."""
    sizes = _distinct(records, "size")
    return {
        name: np.array([[r[metric] for r in records if (r["method"], r["size"]) == (name, size)] for size in sizes]).T
        for name in _distinct(records, "method")
    }


def table(records: Sequence[Record]) -> str:
    """Mean ± standard error over seeds: for each metric, methods down and sizes across."""
    sizes, lines = _distinct(records, "size"), []
    for metric in _metrics(records):
        lines.append(f"{metric:<28}" + "".join(f"{f'n = {size}':>22}" for size in sizes))
        for name, measured in values(records, metric).items():
            cells = (f"{mean:.4g} ± {error:.2g}" for mean, error in zip(*_mean_and_error(measured), strict=True))
            lines.append(f"{name:<28}" + "".join(f"{cell:>22}" for cell in cells))
        lines.append("")
    return "\n".join(lines)


def rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per size and method: means over seeds, each followed by its standard error."""
    metrics = {metric: values(records, metric) for metric in _metrics(records)}
    result = []
    for column, size in enumerate(_distinct(records, "size")):
        for name in _distinct(records, "method"):
            row: dict[str, Any] = {"n": size, "method": name}
            for metric, measured in metrics.items():
                mean, error = _mean_and_error(measured[name][:, [column]])
                row |= {metric: mean.item(), f"± {metric}": error.item()}
            result.append(row)
    return result


def store(path: Path, name: str, records: Sequence[Record]) -> None:
    """Write the rows, all records and where they come from."""
    seeds = _distinct(records, "seed")
    about = {"suite": f"transfer-{name}", **provenance(torch.device("cpu"), torch.float32, seeds[0]), "seeds": seeds}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "rows": rows(records), "records": records}, indent=1) + "\n")


def draw(path: Path, name: str, records: Sequence[Record]) -> None:
    """Draw learning curves of the main metrics side by side."""
    drawn = [metric for metric in _DRAWN if metric in records[0]]
    figure, panels = plt.subplots(1, len(drawn), figsize=(5 * len(drawn), 4.5), layout="constrained")
    for axes, metric in zip(panels, drawn, strict=True):
        measured = values(records, metric)
        learning_curves(axes, _distinct(records, "size"), measured)
        axes.set_ylim(*_limits(list(measured.values())))
        axes.set_title(metric)
        axes.get_legend().set_visible(axes is panels[0])
    figure.suptitle(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# --- private -------------------------------------------------------------------------------------------------------


def _distinct(records: Sequence[Record], key: str) -> list[Any]:
    return list(dict.fromkeys(record[key] for record in records))


def _metrics(records: Sequence[Record]) -> list[str]:
    return [key for key in records[0] if key not in _KEYS]


def _mean_and_error(measured: Array) -> tuple[Array, Array]:
    """Mean over seeds and its standard error, which one seed does not tell."""
    count = len(measured)
    error = measured.std(0, ddof=1) / math.sqrt(count) if count > 1 else np.full(measured.shape[1], np.nan)
    return measured.mean(0), error


def _limits(measured: Sequence[Array]) -> tuple[float, float]:
    """Tukey's fences around the means: what is far worse than the rest must not hide it."""
    means = np.concatenate([values.mean(0) for values in measured])
    low, high = np.quantile(means[np.isfinite(means)], [0.25, 0.75])
    fence = 1.5 * (high - low) or 1.0
    return max(means.min(), low - fence) - 0.1 * fence, min(means.max(), high + fence) + 0.1 * fence
