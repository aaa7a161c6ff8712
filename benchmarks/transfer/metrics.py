"""How good a prediction is: of its mean or its most probable class, and of what it says about its own error."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import accuracy_score, log_loss, mean_squared_error, r2_score

from benchmarks.transfer.experiment import Array, Gaussian, Prediction

LEVELS = np.linspace(0.05, 0.95, 19)
"""Probabilities of the central intervals whose coverage is measured."""


def scores(y: NDArray, prediction: Prediction) -> dict[str, float]:
    """All metrics of a prediction of the labels y, by name."""
    if not isinstance(prediction, Gaussian):
        return {
            "accuracy": float(accuracy_score(y, prediction.argmax(-1))),
            "NLL": float(log_loss(y, prediction, labels=np.arange(prediction.shape[1]))),
            "ECE": expected_calibration_error(y, prediction),
        }
    mean_square = float(mean_squared_error(y.ravel(), prediction.mean.ravel()))
    return {
        "MSE": mean_square,
        "RMSE": mean_square**0.5,
        **_explained(y, prediction.mean),
        "NLL": gaussian_nll(y, prediction),
        "calibration error": coverage_error(y, prediction),
    }


def gaussian_nll(y: Array, prediction: Gaussian) -> float:
    """Mean negative log density of the labels, in nats."""
    return float(-stats.norm.logpdf(y, prediction.mean, prediction.std).mean())


def coverage_error(y: Array, prediction: Gaussian) -> float:
    """Mean absolute difference between how many labels central intervals should hold and how many they do hold.

    References:
        Kuleshov et al. (2018), Accurate Uncertainties for Deep Learning Using Calibrated Regression, section 3.5, with
        absolute differences and central intervals: https://arxiv.org/abs/1807.00263.
    """
    # A label lies in all central intervals wider than the one it is on the edge of.
    edge = 1 - 2 * stats.norm.sf(np.abs(y - prediction.mean) / prediction.std)
    coverage = (edge.ravel() <= LEVELS[:, None]).mean(1)
    return float(np.abs(coverage - LEVELS).mean())


def expected_calibration_error(y: NDArray, probabilities: Array, bins: int = 15) -> float:
    """Mean absolute difference between confidence and accuracy, over bins of confidence of equal width.

    References:
        Guo et al. (2017), On Calibration of Modern Neural Networks, eq. 3: https://arxiv.org/abs/1706.04599.
    """
    confidence = probabilities.max(-1)
    surplus = confidence - (probabilities.argmax(-1) == y)
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(index, surplus)).sum() / len(y))


def _explained(y: Array, mean: Array) -> dict[str, float]:
    """R², of each output by itself."""
    if y.ndim == 1:
        return {"R²": float(r2_score(y, mean))}
    pairs = zip(*(values.reshape(-1, y.shape[-1]).T for values in (y, mean)), strict=True)
    return {f"R² of output {index}": float(r2_score(*pair)) for index, pair in enumerate(pairs, start=1)}
