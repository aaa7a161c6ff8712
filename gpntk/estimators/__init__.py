"""scikit-learn's faces of the models."""

from gpntk.estimators.classifier import TransferClassifier
from gpntk.estimators.regressor import TransferRegressor

__all__ = ["TransferClassifier", "TransferRegressor"]
