"""GP models on feature kernels."""

from gpntk.models.regression import TangentGP

__all__ = ["TangentGP"]
