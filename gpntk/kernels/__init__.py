"""GPyTorch kernels: of the Jacobian features of a frozen network, and of infinitely wide networks."""

from gpntk.kernels import compound as compound
from gpntk.kernels.feature_kernel import AbstractFeatureKernel, log_scale_constraint
from gpntk.kernels.finite import NNGPKernel, NTKKernel, SketchedNTKKernel
from gpntk.kernels.infinite import InfiniteNNGPKernel, InfiniteNTKKernel

__all__ = [
    "AbstractFeatureKernel",
    "InfiniteNNGPKernel",
    "InfiniteNTKKernel",
    "NNGPKernel",
    "NTKKernel",
    "SketchedNTKKernel",
    "log_scale_constraint",
]
