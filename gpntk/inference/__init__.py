"""Exact GP inference on feature kernels."""

from gpntk.inference.prediction_strategy import FeaturePredictionStrategy
from gpntk.inference.spectral import SpectralFit, SpectralMarginalLikelihood

__all__ = ["FeaturePredictionStrategy", "SpectralFit", "SpectralMarginalLikelihood"]
