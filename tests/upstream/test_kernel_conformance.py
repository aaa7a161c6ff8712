"""gpytorch's own suite for kernels, run on ours."""

import unittest

import gpytorch
import torch
from gpytorch.test.base_kernel_test_case import BaseKernelTestCase
from torch import Tensor, nn

import gpntk


class AnyWidth(nn.Module):
    """A network of 10 inputs that takes any number of features up to 10: the host's data has 2, 4, 6 and 10."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(nn.functional.pad(x, (0, 10 - x.shape[-1])))


class TestNTKKernel(unittest.TestCase, BaseKernelTestCase):
    def create_kernel_no_ard(self, **kwargs: object) -> gpytorch.kernels.Kernel:
        torch.manual_seed(1)
        return gpntk.NTKKernel(AnyWidth(), **kwargs)


class TestNTKKernelLayerVariances(unittest.TestCase, BaseKernelTestCase):
    def create_kernel_no_ard(self, **kwargs: object) -> gpytorch.kernels.Kernel:
        torch.manual_seed(1)
        return gpntk.NTKKernel(AnyWidth(), layer_variances=True, **kwargs)


class TestNTKKernelAutodiff(unittest.TestCase, BaseKernelTestCase):
    def create_kernel_no_ard(self, **kwargs: object) -> gpytorch.kernels.Kernel:
        torch.manual_seed(1)
        return gpntk.NTKKernel(AnyWidth(), backend=gpntk.jacobians.AutodiffBackend, **kwargs)


class TestNTKKernelStructured(unittest.TestCase, BaseKernelTestCase):
    def create_kernel_no_ard(self, **kwargs: object) -> gpytorch.kernels.Kernel:
        torch.manual_seed(1)
        return gpntk.NTKKernel(AnyWidth(), backend=gpntk.jacobians.StructuredBackend, **kwargs)


class TestNNGPKernel(unittest.TestCase, BaseKernelTestCase):
    def create_kernel_no_ard(self, **kwargs: object) -> gpytorch.kernels.Kernel:
        torch.manual_seed(1)
        return gpntk.NNGPKernel(AnyWidth(), **kwargs)
