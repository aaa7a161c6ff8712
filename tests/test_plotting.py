import matplotlib as mpl
import numpy as np

from gpntk.plotting import learning_curves, predictions_against_truth

mpl.use("Agg")
from matplotlib import pyplot as plt


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
