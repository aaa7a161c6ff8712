"""Pictures of predictions, learning curves and phases; needs the extra ``gpntk[plot]``. Knows arrays, no models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
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


def phase_diagram(
    axes: Axes, weight_variances: ArrayLike, bias_variances: ArrayLike, susceptibility: ArrayLike
) -> QuadMesh:
    """Draw χ₁ `[B, W]` over σ_w² `[W]` and σ_b² `[B]`, and the line χ₁ = 1 between order and chaos.

    Takes what `gpntk.infinite.phases.phase_diagram` returns under ``"susceptibility"``. Blue is ordered, red chaotic;
    returned is the map, for a colour bar.

    References:
        Schoenholz et al. (2017), Deep Information Propagation, https://arxiv.org/abs/1611.01232, figure 1.
    """
    weights, biases, values = map(np.asarray, (weight_variances, bias_variances, susceptibility))
    # The colours' middle is at one, and both halves reach as far as the farther one.
    reach = max(float(np.nanmax(np.abs(values - 1))), np.finfo(float).tiny)
    mesh = axes.pcolormesh(weights, biases, values, cmap="RdBu_r", shading="nearest")
    mesh.set_clim(1 - reach, 1 + reach)
    _critical_line(axes, weights, biases, values)
    _name_variances(axes)
    return mesh


def accuracy_map(
    axes: Axes,
    weight_variances: ArrayLike,
    bias_variances: ArrayLike,
    accuracy: ArrayLike,
    susceptibility: ArrayLike | None = None,
) -> QuadMesh:
    """Draw accuracies `[B, W]` over σ_w² `[W]` and σ_b² `[B]`, a cross at the best one; with χ₁, the line χ₁ = 1.

    Entries that are NaN stay empty; returned is the map, for a colour bar.

    References:
        Lee et al. (2018), Deep Neural Networks as Gaussian Processes, https://arxiv.org/abs/1711.00165, figure 4.
    """
    weights, biases, values = map(np.asarray, (weight_variances, bias_variances, accuracy))
    mesh = axes.pcolormesh(weights, biases, values, cmap="viridis", shading="nearest")
    row, column = np.unravel_index(np.nanargmax(values), values.shape)
    axes.plot(weights[column], biases[row], "X", color="white", markeredgecolor="black", markersize=9)
    if susceptibility is not None:
        _critical_line(axes, weights, biases, np.asarray(susceptibility))
    _name_variances(axes)
    return mesh


def _critical_line(axes: Axes, weights: NDArray, biases: NDArray, susceptibility: NDArray) -> None:
    # contour warns where a level is nowhere reached.
    if np.nanmin(susceptibility) < 1 < np.nanmax(susceptibility):
        axes.contour(weights, biases, susceptibility, levels=[1.0], colors="black", linewidths=1.5)


def _name_variances(axes: Axes) -> None:
    axes.set_xlabel("σ_w²")
    axes.set_ylabel("σ_b²")
