"""Turn a trained PyTorch network into a Gaussian process: f(x; w + d) = f(x; w) + J(x) d, d ~ N(0, S).

The names that most programs need stand here. Everything else has a room: `gpntk.jacobians`, `gpntk.inference`,
`gpntk.infinite`, `gpntk.operators`, `gpntk.models`, `gpntk.likelihoods`, `gpntk.plotting`, `gpntk.testing`. A room that
is not loaded yet is loaded when it is first used.
"""

import importlib
from types import ModuleType

from gpntk import errors
from gpntk.dynamics import GradientFlow
from gpntk.estimators import TransferClassifier, TransferRegressor
from gpntk.jacobians import AutoBackend, AutodiffBackend, BackwardBackend, DenseBackend, StructuredBackend
from gpntk.kernels import InfiniteNNGPKernel, InfiniteNTKKernel, NNGPKernel, NTKKernel, SketchedNTKKernel
from gpntk.means import NetworkMean
from gpntk.network import FrozenNetwork, freeze
from gpntk.transfer import TransferGP

__version__ = "0.1.0"

__all__ = [
    "AutoBackend",
    "AutodiffBackend",
    "BackwardBackend",
    "DenseBackend",
    "FrozenNetwork",
    "GradientFlow",
    "InfiniteNNGPKernel",
    "InfiniteNTKKernel",
    "NNGPKernel",
    "NTKKernel",
    "NetworkMean",
    "SketchedNTKKernel",
    "StructuredBackend",
    "TransferClassifier",
    "TransferGP",
    "TransferRegressor",
    "errors",
    "freeze",
]

_ROOMS = (
    "inference",
    "infinite",
    "jacobians",
    "kernels",
    "likelihoods",
    "models",
    "network",
    "operators",
    "plotting",
    "testing",
)


def __getattr__(name: str) -> ModuleType:
    """A room that is not loaded yet; for any other name an error that says in which room the name is."""
    if name in _ROOMS:
        return importlib.import_module(f"gpntk.{name}")
    message = f"module 'gpntk' has no attribute {name!r}"
    if not name.startswith("_"):
        homes = [
            room for room in _ROOMS if room != "plotting" and hasattr(importlib.import_module(f"gpntk.{room}"), name)
        ]
        message += "".join(f"; gpntk.{room}.{name} exists" for room in homes)
    raise AttributeError(message)


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS, "__version__"])
