"""How J, its transpose and J Jᵀ act. Pure torch: no GPyTorch here."""

from gpntk.jacobians.auto import AutoBackend, Choice
from gpntk.jacobians.autodiff import AutodiffBackend
from gpntk.jacobians.backend import AbstractJacobianBackend
from gpntk.jacobians.backward import BackwardBackend
from gpntk.jacobians.dense import DenseBackend, ExplicitBackend
from gpntk.jacobians.scaled import ScaledBackend
from gpntk.jacobians.sketch import SketchBackend
from gpntk.jacobians.stacked import AverageBackend, StackedBackend, split_parameters
from gpntk.jacobians.structured import StructuredBackend

__all__ = [
    "AbstractJacobianBackend",
    "AutoBackend",
    "AutodiffBackend",
    "AverageBackend",
    "BackwardBackend",
    "Choice",
    "DenseBackend",
    "ExplicitBackend",
    "ScaledBackend",
    "SketchBackend",
    "StackedBackend",
    "StructuredBackend",
    "split_parameters",
]
