"""Draw the pictures in ``docs/images`` that show results of suites: ``growth.png`` and ``no-cliff.png``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"


def main() -> None:
    """Draw them all."""
    growth(json.loads((RESULTS / "growth-cpu-2.json").read_text())["rows"], IMAGES / "growth.png")
    now, before = (json.loads((RESULTS / f"no-cliff{when}-cpu-1.json").read_text()) for when in ("", "-before"))
    old = [row | {"method": f"{row['method']}, before"} for row in before["rows"] if row["method"].startswith("gpntk")]
    no_cliff(now["rows"] + old, IMAGES / "no-cliff.png")


def growth(rows: list[dict[str, Any]], picture: Path) -> None:
    """Time of inference against N and against P; prints the slopes of the last two decades or so of each curve."""
    split = next(index for index in range(1, len(rows)) if rows[index]["rows"] < rows[index - 1]["rows"])
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, part, size, label in (
        (panels[0], rows[:split], "rows", f"N, with P = {rows[0]['features']:,}"),
        (panels[1], rows[split:], "features", f"P, with N = {rows[-1]['rows']:,}"),
    ):
        sizes, times = [row[size] for row in part], [row["seconds"] for row in part]
        slope = math.log(times[-1] / times[-3]) / math.log(sizes[-1] / sizes[-3])
        axes.loglog(sizes, times, color="gray", linewidth=0.8)
        for solver in dict.fromkeys(row["solver"] for row in part):
            own = [row for row in part if row["solver"] == solver]
            axes.loglog([row[size] for row in own], [row["seconds"] for row in own], "o", label=solver)
        axes.set_xlabel(label)
        axes.set_ylabel("seconds, mean and 100 variances")
        axes.set_title(f"slope at the end: {slope:.2f}")
        axes.legend(fontsize="small")
        print(f"{label}: slope {slope:.2f} over the last three points")
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def no_cliff(rows: list[dict[str, Any]], picture: Path) -> None:
    """Error and coverage against the number of labels, bars of two standard errors over seeds."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        labels = [row["labels"] for row in own]
        for axes, value in zip(panels, ("rmse", "within"), strict=True):
            bars = [2 * row[f"± {value}"] for row in own]
            axes.errorbar(labels, [row[value] for row in own], bars, marker="o", capsize=3, label=name)
    error, coverage = panels
    error.axhline(rows[0]["network_rmse"], color="gray", linestyle="--", label="network, not adapted")
    error.set(xscale="log", yscale="log", xlabel="labels", ylabel="RMSE against the noise-free function")
    error.legend(fontsize="small", loc="center right")
    coverage.axhspan(0.9, 0.99, color="gray", alpha=0.2)
    coverage.set(xscale="log", ylim=(0, 1.02), xlabel="labels", ylabel="truths within 2 standard deviations")
    figure.savefig(picture, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
