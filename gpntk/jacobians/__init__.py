"""How J, its transpose and J Jᵀ act. Pure torch: no GPyTorch here."""

from gpntk.jacobians.auto import AutoBackend, Choice
from gpntk.jacobians.autodiff import AutodiffBackend
from gpntk.jacobians.average import AverageBackend
from gpntk.jacobians.backend import AbstractJacobianBackend
from gpntk.jacobians.dense import DenseBackend
from gpntk.jacobians.sketch import SketchBackend
from gpntk.jacobians.split import SplitBackend
from gpntk.jacobians.structured import StructuredBackend

__all__ = [
    "AbstractJacobianBackend",
    "AutoBackend",
    "AutodiffBackend",
    "AverageBackend",
    "Choice",
    "DenseBackend",
    "SketchBackend",
    "SplitBackend",
    "StructuredBackend",
]
