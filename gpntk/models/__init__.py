"""GP models on feature kernels, and targets for classification."""

from gpntk.models.classification import one_hot_targets
from gpntk.models.regression import TangentGP

__all__ = ["TangentGP", "one_hot_targets"]
