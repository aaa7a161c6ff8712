"""GPyTorch kernels: of the Jacobian features of a frozen network, and of infinitely wide networks."""

from gpntk.kernels.feature_kernel import AbstractFeatureKernel, log_scale_constraint
from gpntk.kernels.finite import NNGPKernel, NTKKernel, SketchedNTKKernel
from gpntk.kernels.infinite import InfiniteNNGPKernel, InfiniteNTKKernel
from gpntk.kernels.weight_prior import g_prior

__all__ = [
    "AbstractFeatureKernel",
    "InfiniteNNGPKernel",
    "InfiniteNTKKernel",
    "NNGPKernel",
    "NTKKernel",
    "SketchedNTKKernel",
    "g_prior",
    "log_scale_constraint",
]
