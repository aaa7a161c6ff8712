"""GPyTorch kernels whose features are Jacobians of a frozen network."""

from gpntk.kernels.feature_kernel import AbstractFeatureKernel, log_scale_constraint
from gpntk.kernels.nngp import NNGPKernel
from gpntk.kernels.ntk import NTKKernel
from gpntk.kernels.sketched import SketchedNTKKernel

__all__ = ["AbstractFeatureKernel", "NNGPKernel", "NTKKernel", "SketchedNTKKernel", "log_scale_constraint"]
