"""Pictures of predictions and learning curves; needs the extra ``gpntk[plot]``. Knows arrays, no models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike, NDArray


def learning_curves(axes: Axes, sizes: Sequence[int], scores: Mapping[str, NDArray]) -> None:
    """Draw mean +- one standard deviation over seeds of each method's scores `[S, len(sizes)]` against ``sizes``."""
    for name, values in scores.items():
        mean, deviation = values.mean(0), values.std(0)
        (line,) = axes.plot(sizes, mean, marker="o", label=name)
        axes.fill_between(sizes, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("labelled target examples")
    axes.legend(fontsize="small")


def predictions_against_truth(axes: Axes, truth: ArrayLike, mean: ArrayLike, std: ArrayLike) -> None:
    """Draw predictions with two-standard-deviation error bars against the truth, and the diagonal, all `[N]`."""
    axes.errorbar(truth, mean, yerr=2 * np.asarray(std), fmt="o", markersize=3, linewidth=0.8, alpha=0.6)
    axes.axline((0, 0), slope=1, color="black", linewidth=0.8)
    axes.set_xlabel("truth")
    axes.set_ylabel("prediction, ± 2 standard deviations")
