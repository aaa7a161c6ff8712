"""Pictures of predictions, learning curves, reports and phases; needs the extra ``gpntk[plot]``. Knows no models."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpntk._checks import as_tensor, check_kinds
from gpntk.errors import InputError, KindError

try:
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure, SubFigure
except ModuleNotFoundError as error:
    raise ImportError(
        "gpntk.plotting draws with matplotlib, which is not installed: pip install matplotlib."
    ) from error


@runtime_checkable
class ReportLike(Protocol):
    """What `plot_report` draws; `gpntk.transfer.report.Report` has it."""

    @property
    def log_evidence(self) -> Mapping[str, float]:
        """In nats, by prior."""
        ...

    @property
    def alignment(self) -> float:
        """Of the tangent kernel with what the network leaves unexplained."""
        ...

    @property
    def chance(self) -> float:
        """Mean of the alignment over independent residuals."""
        ...

    @property
    def calibration(self) -> Mapping[float, float]:
        """Nominal against leave-one-out frequency."""
        ...

    @property
    def advice(self) -> str:
        """One sentence of advice."""
        ...


def learning_curves(axes: Axes, sizes: Sequence[int], scores: Mapping[str, NDArray]) -> None:
    """Draw mean +- one standard deviation over seeds of each method's scores `[S, len(sizes)]` against ``sizes``."""
    check_kinds(Axes, "matplotlib's axes", axes=axes)
    check_kinds(Mapping, "scores [S, len(sizes)] by the names of methods", scores=scores)
    places = _array("sizes", sizes, None)
    if not (places > 0).all():
        raise InputError(f"sizes={sizes}: give positive numbers, for they are drawn by their logarithms.")
    for name, values in scores.items():
        table = _array(f"scores[{name!r}]", values, None, len(places))
        mean, deviation = table.mean(0), table.std(0)
        (line,) = axes.plot(sizes, mean, marker="o", label=name)
        axes.fill_between(sizes, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("labelled target examples")
    axes.legend(fontsize="small")


def predictions_against_truth(axes: Axes, truth: ArrayLike, mean: ArrayLike, std: ArrayLike) -> None:
    """Draw predictions with two-standard-deviation error bars against the truth, and the diagonal, all `[N]`."""
    check_kinds(Axes, "matplotlib's axes", axes=axes)
    places = _array("truth", truth, None)
    means, deviations = (_array(name, one, len(places)) for name, one in (("mean", mean), ("std", std)))
    if not (deviations >= 0).all():
        raise InputError("std has values below zero, or NaN: give standard deviations.")
    axes.errorbar(places, means, yerr=2 * deviations, fmt="o", markersize=3, linewidth=0.8, alpha=0.6)
    axes.axline((0, 0), slope=1, color="black", linewidth=0.8)
    axes.set_xlabel("truth")
    axes.set_ylabel("prediction, ± 2 standard deviations")


def plot_report(report: ReportLike, figure: Figure | SubFigure | None = None) -> Figure | SubFigure:
    """Draw the ``report_`` of an estimator; its advice is the title.

    Three panels: log evidence of each prior below that of the best, calibration beside the diagonal on which it would
    be perfect (empty where it is not known), and the alignment beside what chance would give.

    Args:
        report: The report.
        figure: Where to draw; a new figure by default.

    Returns:
        The figure.

    Example:
        >>> import torch, gpntk
        >>> from gpntk.plotting import plot_report
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> x = torch.rand(20, 2).numpy()
        >>> model = gpntk.TransferRegressor(network, mean="constant").fit(x, x[:, 0])
        >>> len(plot_report(model.report_).axes)
        3
    """
    if not isinstance(report, ReportLike):
        raise KindError(f"report is a {type(report).__name__}: give the report_ of an estimator.")
    if figure is None:
        figure = plt.figure(figsize=(11, 3.5), layout="constrained")
    check_kinds(Figure | SubFigure, "a figure of matplotlib's", figure=figure)
    evidence, calibration, alignment = figure.subplots(1, 3)
    _evidence_bars(evidence, report.log_evidence)
    _calibration_curve(calibration, report.calibration)
    bars = alignment.bar(["this task", "chance"], [report.alignment, report.chance], color=["C0", "0.7"])
    alignment.bar_label(bars, fmt="%.2g", padding=3)
    alignment.margins(y=0.15)
    alignment.set_title("alignment with the tangent kernel", fontsize="medium")
    figure.suptitle(textwrap.fill(report.advice, 110), fontsize="medium")
    return figure


def phase_diagram(
    axes: Axes, weight_variances: ArrayLike, bias_variances: ArrayLike, susceptibility: ArrayLike
) -> QuadMesh:
    """Draw χ₁ `[B, W]` over σ_w² `[W]` and σ_b² `[B]`, and the line χ₁ = 1 between order and chaos.

    Takes what `gpntk.infinite.phases.phase_diagram` returns under ``"susceptibility"``. Blue is ordered, red chaotic;
    returned is the map, for a colour bar.

    References:
        Schoenholz et al. (2017), Deep Information Propagation, https://arxiv.org/abs/1611.01232, figure 1.
    """
    weights, biases = _grid(axes, weight_variances, bias_variances)
    values = _array("susceptibility", susceptibility, len(biases), len(weights))
    if np.isnan(values).all():
        raise InputError("susceptibility is NaN everywhere: there is nothing to draw.")
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
    weights, biases = _grid(axes, weight_variances, bias_variances)
    values = _array("accuracy", accuracy, len(biases), len(weights))
    if np.isnan(values).all():
        raise InputError("accuracy is NaN everywhere: there is nothing to draw.")
    mesh = axes.pcolormesh(weights, biases, values, cmap="viridis", shading="nearest")
    row, column = np.unravel_index(np.nanargmax(values), values.shape)
    axes.plot(weights[column], biases[row], "X", color="white", markeredgecolor="black", markersize=9)
    if susceptibility is not None:
        _critical_line(axes, weights, biases, _array("susceptibility", susceptibility, len(biases), len(weights)))
    _name_variances(axes)
    return mesh


def _grid(axes: Axes, weights: ArrayLike, biases: ArrayLike) -> tuple[NDArray, NDArray]:
    """Both axes of a map of variances."""
    check_kinds(Axes, "matplotlib's axes", axes=axes)
    grid = [_array(f"{name}_variances", one, None) for name, one in (("weight", weights), ("bias", biases))]
    for name, one in zip(("weight", "bias"), grid, strict=True):
        if not len(one) or not np.isfinite(one).all():
            raise InputError(f"{name}_variances={one}: give finite numbers, at least one.")
    return grid[0], grid[1]


def _array(name: str, values: ArrayLike, *shape: int | None) -> NDArray:
    """Real numbers of this shape, in which None is any size."""
    array = as_tensor(values, name).double().numpy()
    if array.ndim != len(shape) or any(size not in (None, own) for size, own in zip(shape, array.shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise InputError(f"{name} has shape {array.shape}: give [{wanted}].")
    return array


def _evidence_bars(axes: Axes, log_evidence: Mapping[str, float]) -> None:
    values = np.fromiter(log_evidence.values(), float)
    relative = values - values.max()
    bars = axes.barh(list(log_evidence), relative)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.use_sticky_edges = False  # room for the labels on both sides
    axes.margins(x=0.2)
    axes.invert_yaxis()
    axes.set_title("log evidence below the best, nats", fontsize="medium")


def _calibration_curve(axes: Axes, calibration: Mapping[float, float]) -> None:
    axes.axline((0, 0), slope=1, color="black", linewidth=0.8)
    nominal = sorted(calibration)
    axes.plot(nominal, [calibration[level] for level in nominal], "o:")
    axes.set(xlim=(0, 1.05), ylim=(0, 1.05), xlabel="nominal", ylabel="observed, labels left out")
    axes.set_title("calibration", fontsize="medium")


def _critical_line(axes: Axes, weights: NDArray, biases: NDArray, susceptibility: NDArray) -> None:
    # contour warns where a level is nowhere reached.
    if np.nanmin(susceptibility) < 1 < np.nanmax(susceptibility):
        axes.contour(weights, biases, susceptibility, levels=[1.0], colors="black", linewidths=1.5)


def _name_variances(axes: Axes) -> None:
    axes.set_xlabel("σ_w²")
    axes.set_ylabel("σ_b²")
