"""A kernel together with its training inputs: the matrix to be inverted or filtered, and what predictions need."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, singledispatch
from typing import Any, Literal, NamedTuple, final

import torch
from gpytorch.kernels import Kernel, ScaleKernel
from linear_operator import to_linear_operator
from linear_operator.operators import LinearOperator
from torch import Tensor

from gpntk._checks import check_kinds
from gpntk.dynamics.filters import GradientFilter
from gpntk.dynamics.matrix_functions import AbstractFilteredMatrix, KrylovMatrix, SpectralMatrix
from gpntk.errors import InputError
from gpntk.inference.features import exact_dtype
from gpntk.infinite import InfiniteKernels
from gpntk.infinite.infinite_kernels import Kernels
from gpntk.kernels import AbstractFeatureKernel
from gpntk.memory import TensorCache, budget_on

Method = Literal["auto", "dense", "lanczos"]

# Rows up to which a matrix is decomposed: 128 MiB in float64, and a quarter of a minute on one core.
_DENSE_ROWS = 4096


class FilterSettings(NamedTuple):
    """How filters of kernel matrices are computed.

    Attributes:
        method: ``"dense"``, ``"lanczos"``, or ``"auto"``: dense up to 4,096 rows.
        noise: What is added to the diagonal.
        diag_reg: The same in units of the mean diagonal.
        tolerance: Error at which Lanczos stops.
        max_iterations: Most iterations of Lanczos.
    """

    method: Method
    noise: float
    diag_reg: float
    tolerance: float
    max_iterations: int


class KernelFunction(NamedTuple):
    """A kernel with fixed hyperparameters, as functions of inputs.

    Attributes:
        matrix: k(x1, x2), n rows, lazily where the kernel is lazy.
        diagonal: k(x_n, x_n) `[n]`.
        kernel: The GPyTorch kernel, if it is one.
    """

    matrix: Callable[[Tensor, Tensor], LinearOperator]
    diagonal: Callable[[Tensor], Tensor]
    kernel: Kernel | None = None


@singledispatch
def kernel_functions(ntk: Any, nngp: Any) -> tuple[KernelFunction, KernelFunction | None]:  # noqa: ARG001
    """Θ and K as functions, K None if not given. A copy: later changes would not reach what has been decomposed.

    Raises:
        InputError: It is no kernel, has a batch shape, or K is given twice.
    """
    raise InputError(f"ntk is a {type(ntk).__name__}: give a GPyTorch kernel, or gpntk.infinite.kernels(network).")


@kernel_functions.register(Kernel)
def _(ntk: Kernel, nngp: Kernel | None) -> tuple[KernelFunction, KernelFunction | None]:
    return _function(ntk, "ntk"), None if nngp is None else _function(nngp, "nngp")


@kernel_functions.register(InfiniteKernels)
def _(ntk: InfiniteKernels, nngp: Kernel | None) -> tuple[KernelFunction, KernelFunction | None]:
    if nngp is not None:
        raise InputError("ntk has both kernels of the network: leave nngp out.")
    stds = {"weight_std": ntk.weight_std.detach(), "bias_std": ntk.bias_std.detach()}
    fixed = replace(ntk, **stds)
    cache = TensorCache(budget_on(fixed.weight_std.device, fixed.memory_budget))

    def both(x1: Tensor, x2: Tensor) -> Kernels:
        # Found again by whoever asks for the other kernel.
        return cache.get("kernels", (x1, x2), lambda: fixed(x1, x2))

    return (
        KernelFunction(lambda x1, x2: to_linear_operator(both(x1, x2).ntk), lambda x: fixed.diagonal(x).ntk),
        KernelFunction(lambda x1, x2: to_linear_operator(both(x1, x2).nngp), lambda x: fixed.diagonal(x).nngp),
    )


def _function(kernel: Kernel, name: str) -> KernelFunction:
    check_kinds(Kernel, "a GPyTorch kernel", **{name: kernel})
    if kernel.batch_shape:
        raise InputError(f"{name} has batch shape {tuple(kernel.batch_shape)}: give a kernel without one.")
    fixed: Any = copy.deepcopy(kernel).requires_grad_(False)

    def matrix(x1: Tensor, x2: Tensor) -> LinearOperator:
        return to_linear_operator(fixed(x1, x2)).evaluate_kernel()

    return KernelFunction(matrix, lambda x: fixed(x, x, diag=True), fixed)


@singledispatch
def feature_kernel(kernel: Any) -> tuple[AbstractFeatureKernel, Tensor | float]:
    """The feature kernel inside a kernel, and the constant that multiplies it.

    Raises:
        InputError: There is none.
    """
    what = "an infinitely wide network's" if kernel is None else type(kernel).__name__
    raise InputError(f"weights are those of a finite network: ntk is {what}, give an NTKKernel.")


@feature_kernel.register(AbstractFeatureKernel)
def _(kernel: AbstractFeatureKernel) -> tuple[AbstractFeatureKernel, Tensor | float]:
    return kernel, 1.0


@feature_kernel.register(ScaleKernel)
def _(kernel: ScaleKernel) -> tuple[AbstractFeatureKernel, Tensor | float]:
    inner, scale = feature_kernel(kernel.base_kernel)
    return inner, scale * kernel.outputscale


@final
class TrainingKernel:
    """k and the training inputs X, each part made when it is first asked for; n = N or N*C rows.

    Args:
        function: The kernel k.
        x: X `[N, D]`.
        settings: How filters are computed.
    """

    def __init__(self, function: KernelFunction, x: Tensor, settings: FilterSettings) -> None:
        self.function = function
        self._x, self._settings = x, settings
        self._exact = exact_dtype(x.device)

    @cached_property
    def _diagonal(self) -> Tensor:
        with torch.no_grad():
            return self.function.diagonal(self._x).to(self._exact)

    @property
    def rows(self) -> int:
        """n, the rows of the kernel matrix of the training inputs."""
        return len(self._diagonal)

    @property
    def _dense(self) -> bool:
        method = self._settings.method
        return method == "dense" or (method == "auto" and self.rows <= _DENSE_ROWS)

    @cached_property
    def noise(self) -> float:
        """The noise s on the diagonal."""
        return self._settings.noise + self._settings.diag_reg * self._diagonal.mean().item()

    @cached_property
    def matrix(self) -> AbstractFilteredMatrix:
        """The matrix on the training set, in float64."""
        epsilon = torch.finfo(self._x.dtype).eps
        # The norm of a matrix of independent errors, one rounding in each entry.
        rounding = epsilon * self.rows**0.5 * self._diagonal.mean().item()
        with torch.no_grad():
            operator = self.function.matrix(self._x, self._x)
            if self._dense:
                return SpectralMatrix(operator.to_dense().to(self._exact), rounding)
        generator = torch.Generator("cpu").manual_seed(0)
        probe = torch.randn(self.rows, generator=generator, dtype=self._exact, device="cpu").to(self._x.device)

        def product(columns: Tensor) -> Tensor:
            with torch.no_grad():
                image: Any = operator @ columns.mT.to(self._x.dtype)
            return image.mT.to(self._exact)

        tolerance = max(self._settings.tolerance, epsilon)
        return KrylovMatrix(product, probe, rounding, tolerance, self._settings.max_iterations)

    def cross(self, x: Tensor) -> Tensor:
        """Kernel values between new and training inputs, k(x, X) `[m, n]`, in float64."""
        return self.function.matrix(x, self._x).to_dense().to(self._exact)

    def predictions(self, x: Tensor, value: Tensor) -> Tensor:
        """Predictions k(x, X) c `[T, K, m]` for columns c `[T, K, n]`."""
        if self._dense:
            return value @ self.cross(x).mT
        product: Any = self.function.matrix(x, self._x) @ value.flatten(0, 1).mT.to(x.dtype)
        return product.mT.unflatten(0, value.shape[:2]).to(self._exact)

    def covariance(self, x: Tensor) -> Tensor:
        """Kernel values among new inputs, k(x, x) `[m, m]`, in float64."""
        return self.function.matrix(x, x).to_dense().to(self._exact)

    def filtered_covariance(
        self, x: Tensor, times: Tensor, prior: TrainingKernel, function: GradientFilter, noisy: bool
    ) -> Tensor:
        """κ** + W κ Wᵀ - W κ*ᵀ - κ* Wᵀ `[T, m, m]`, W = k* p_t(k + s I), κ the kernel of ``prior``, in float64.

        What f(x) - W f(X), f ~ GP(0, κ), has for covariance; ``noisy``: f(X) + N(0, s), which adds s W Wᵀ.
        """
        # Lanczos has no derivative here: better none than a wrong one.
        with torch.set_grad_enabled(self._dense and torch.is_grad_enabled()):
            solved = self.matrix.filtered(function, self.noise, times, self.cross(x)).value
            cross, covariance = prior.cross(x), prior.covariance(x)
            parts = []
            for weights in solved:
                image = prior.matrix.product(weights) + (self.noise * weights if noisy else 0.0)
                mixed = weights @ cross.mT
                parts.append(covariance + weights @ image.mT - mixed - mixed.mT)
            return torch.stack(parts)
