import matplotlib as mpl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gpntk import TransferClassifier, TransferRegressor
from gpntk.infinite import activation_of
from gpntk.infinite import phases as phases_of
from gpntk.plotting import accuracy_map, learning_curves, phase_diagram, plot_report, predictions_against_truth
from gpntk.transfer.report import Report

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.contour import QuadContourSet
from matplotlib.lines import AxLine
from matplotlib.patches import Rectangle


def test_learning_curves_draw_means_and_bands() -> None:
    _, axes = plt.subplots()
    scores = {"one": np.array([[3.0, 2.0], [5.0, 2.0]]), "two": np.ones((2, 2))}
    learning_curves(axes, [10, 100], scores)
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [4.0, 2.0])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "two"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10", "100"]


def test_error_bars_are_two_standard_deviations() -> None:
    _, axes = plt.subplots()
    predictions_against_truth(axes, [0.0, 1.0], [0.1, 0.9], [0.2, 0.3])
    (bars,) = axes.containers
    segments = bars.lines[2][0].get_segments()
    np.testing.assert_allclose([segment[:, 1] for segment in segments], [[-0.3, 0.5], [0.3, 1.5]])


def critical_lines(axes: Axes) -> list[NDArray]:
    """Vertices `[V, 2]` of every contour."""
    drawn = [child for child in axes.get_children() if isinstance(child, QuadContourSet)]
    return [path.vertices for contour in drawn for path in contour.get_paths() if len(path.vertices)]


def test_the_critical_line_of_relu_is_at_weight_variance_two() -> None:
    # χ₁ = σ_w²/2 whatever the bias.
    weights, biases = torch.linspace(1.0, 3.5, 6), torch.linspace(0.0, 1.0, 3)
    susceptibility = phases_of.phase_diagram(activation_of(nn.ReLU()), weights, biases)["susceptibility"]
    _, axes = plt.subplots()
    mesh = phase_diagram(axes, weights, biases, susceptibility)
    np.testing.assert_allclose(mesh.get_array(), np.tile(np.linspace(0.5, 1.75, 6), (3, 1)))
    (line,) = critical_lines(axes)
    np.testing.assert_allclose(line[:, 0], 2.0, rtol=1e-6)
    np.testing.assert_allclose([line[:, 1].min(), line[:, 1].max()], [0.0, 1.0])
    # As dark at 1 + d as at 1 - d: order is blue, chaos red, the line white.
    np.testing.assert_allclose(mesh.get_clim(), [0.25, 1.75])
    red, _, blue, _ = mesh.to_rgba([0.3, 1.7]).T
    assert blue[0] > red[0]
    assert red[1] > blue[1]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("σ_w²", "σ_b²")


def test_no_line_where_all_is_ordered() -> None:
    _, axes = plt.subplots()
    phase_diagram(axes, [0.5, 1.0], [0.0, 0.1], np.array([[0.2, 0.5], [0.2, 0.5]]))
    assert not critical_lines(axes)


def test_cells_lie_around_their_variances() -> None:
    _, axes = plt.subplots()
    mesh = accuracy_map(axes, [1.0, 2.0, 3.0], [0.1, 0.2], np.arange(6.0).reshape(2, 3))
    corners = mesh.get_coordinates()
    np.testing.assert_allclose(corners[0, :, 0], [0.5, 1.5, 2.5, 3.5])
    np.testing.assert_allclose(corners[:, 0, 1], [0.05, 0.15, 0.25])


def test_the_map_marks_the_best_accuracy() -> None:
    _, axes = plt.subplots()
    accuracy = np.array([[0.5, np.nan, 0.7], [0.6, 0.9, 0.8]])
    mesh = accuracy_map(axes, [1.0, 2.0, 3.0], [0.1, 0.2], accuracy, np.array([[0.5, 1.5, 2.5], [0.5, 1.5, 2.5]]))
    (cross,) = axes.lines
    assert cross.get_marker() == "X"
    np.testing.assert_allclose(cross.get_xydata(), [[2.0, 0.2]])
    np.testing.assert_array_equal(np.ma.getmaskarray(mesh.get_array()), np.isnan(accuracy))
    (line,) = critical_lines(axes)
    np.testing.assert_allclose(line[:, 0], 1.5)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("σ_w²", "σ_b²")


def report(**changes: object) -> Report:
    values: dict[str, object] = {
        "kernel": "ntk",
        "method": "exact kernel matrix",
        "notes": (),
        "log_evidence": {"ntk": -10.0, "stationary alone": -14.5, "readout alone": -9.0},
        "left_out": {"ntk": -1.0},
        "effective_parameters": 3.0,
        "alignment": 0.4,
        "chance": 0.1,
        "score": 0.9,
        "log_density": -1.0,
        "calibration": {0.9: 0.7, 0.5: 0.6},
        "advice": "The source network helps by 4.5 nats over a GP on the inputs.",
    }
    return Report(**(values | changes))


def bars(axes: Axes) -> list[Rectangle]:
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def test_a_report_is_drawn_below_its_advice() -> None:
    figure = plot_report(report())
    assert figure.get_suptitle() == "The source network helps by 4.5 nats over a GP on the inputs."
    evidence, calibration, alignment = figure.axes
    np.testing.assert_allclose([bar.get_width() for bar in bars(evidence)], [-1.0, -5.5, 0.0])
    assert [label.get_text() for label in evidence.get_yticklabels()] == ["ntk", "stationary alone", "readout alone"]
    # The first prior stands above.
    low, high = evidence.get_ylim()
    assert low > high
    diagonal, curve = calibration.lines
    assert isinstance(diagonal, AxLine)
    assert (diagonal.get_xy1(), diagonal.get_slope()) == ((0, 0), 1)
    np.testing.assert_allclose(curve.get_xydata(), [[0.5, 0.6], [0.9, 0.7]])
    np.testing.assert_allclose([bar.get_height() for bar in bars(alignment)], [0.4, 0.1])


def test_a_report_without_calibration_goes_into_a_given_figure() -> None:
    whole = plt.figure()
    left, right = whole.subfigures(1, 2)
    assert plot_report(report(calibration={}), right) is right
    assert not left.axes
    _, calibration, _ = right.axes
    assert not calibration.lines[1].get_xydata().size


def test_the_reports_of_the_estimators_are_drawn() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.rand(12, 2, dtype=torch.float64).numpy()
    regressor = TransferRegressor(network, new_head=True).fit(x, x[:, 0])
    classifier = TransferClassifier(network, kernel="nngp").fit(x, x[:, 0] > x[:, 1])
    for drawn in (regressor.report_, classifier.report_):
        figure = plot_report(drawn)
        assert " ".join(figure.get_suptitle().split()) == drawn.advice
        assert len(bars(figure.axes[0])) == len(drawn.log_evidence)
