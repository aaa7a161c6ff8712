"""Training data as a flow wants them, and a kernel together with them: the matrix to be filtered, and predictions."""

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

from gpntk._checks import check_input, check_kinds, check_tensors, check_values
from gpntk.dynamics.filters import GradientFilter
from gpntk.dynamics.matrix_functions import AbstractFilteredMatrix, KrylovMatrix, SpectralMatrix
from gpntk.errors import InputError
from gpntk.inference.features import exact_dtype
from gpntk.infinite import InfiniteKernels
from gpntk.infinite.infinite_kernels import Kernels
from gpntk.kernels import AbstractFeatureKernel
from gpntk.memory import TensorCache, budget_on


class OutputLayout(NamedTuple):
    """How values `[N, C]` are laid out as columns `[K, n]` for a kernel matrix `[n, n]`.

    Attributes:
        num_outputs: C.
        shared: Whether the kernel has one row per input, so that K = C and n = N; else K = 1, n = N*C, rows n*C + c.
        vector: Whether the user's values are `[N]`.
    """

    num_outputs: int
    shared: bool
    vector: bool

    @classmethod
    def of(cls, rows: int, targets: Tensor, vector: bool) -> OutputLayout:
        """For a kernel of so many rows and targets `[N, C]`."""
        samples, outputs = targets.shape
        if rows not in (samples, samples * outputs):
            per_input = f"{rows // samples} rows per input" if rows % samples == 0 else f"{rows} rows"
            raise InputError(
                f"ntk has {per_input} and y {outputs} output(s) for each of {samples} inputs: give y of shape "
                f"[N, {rows // samples}], or a kernel with one row per input (output='independent' or a number)."
            )
        return cls(outputs, rows == samples, vector)

    def columns(self, values: Tensor) -> Tensor:
        """Values of all outputs `[N, C]` as right-hand sides `[K, n]`."""
        return values.mT.contiguous() if self.shared else values.reshape(1, -1)

    def matrix(self, columns: Tensor) -> Tensor:
        """Solutions `[..., K, m]` as values of all outputs `[..., M, C]`."""
        if self.shared:
            return columns.mT
        return columns.reshape(*columns.shape[:-2], -1, self.num_outputs)

    def outputs(self, columns: Tensor) -> Tensor:
        """Columns `[..., K, m]` in the user's shape, `[..., M]` or `[..., M, C]`."""
        values = self.matrix(columns)
        return values.squeeze(-1) if self.vector else values


def as_outputs(values: Any, x: Tensor, name: str) -> Tensor:
    """Outputs f_0 of the untrained network as a matrix `[M, C]`."""
    if not isinstance(values, Tensor) or values.dim() not in (1, 2) or values.shape[0] != x.shape[0]:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(f"{name} must be a tensor [{x.shape[0]}] or [{x.shape[0]}, C], got {got}.")
    return values.unsqueeze(-1) if values.dim() == 1 else values


def check_training_data(x: Tensor, y: Tensor, loss: str) -> None:
    """Raise `InputError` unless x `[N, D]` and y are data for ``loss``, ``"mse"`` or ``"cross_entropy"``."""
    check_tensors(x=x)
    check_input(x, x.device)
    if x.dim() != 2 or not x.shape[0]:
        raise InputError(f"x must be [N, D] with N > 0, got shape {tuple(x.shape)}: give a row for each input.")
    check_values(x.device, y=y)
    if y.dim() not in (1, 2) or y.shape[0] != x.shape[0] or not y.numel():
        raise InputError(
            f"y must be [{x.shape[0]}] or [{x.shape[0]}, C] as x has {x.shape[0]} rows, got {tuple(y.shape)}."
        )
    if not bool(y.isfinite().all()):
        raise InputError("y must be finite: leave out the rows with missing values.")
    if loss == "cross_entropy":
        _check_classes(y)
    elif not y.is_floating_point():
        raise InputError(
            f"y must be floating point, got {y.dtype}: pass y.double(), or loss='cross_entropy' for classes."
        )


def _check_classes(y: Tensor) -> None:
    if not y.is_floating_point():
        if y.dim() != 1 or bool((y < 0).any()):
            raise InputError("y has classes below zero, or a column for each: give integers from 0, of shape [N].")
        return
    total = y.sum(-1) if y.dim() == 2 and y.shape[-1] > 1 else torch.ones_like(y)
    if bool((y < 0).any() or (y > 1).any() or ((total - 1).abs() > 1e-4).any()):
        raise InputError(
            "y must hold the classes' probabilities, which sum to one in each row, or integer classes [N]."
        )


def check_test_inputs(x: Tensor, train: Tensor) -> None:
    """Raise `InputError` unless x `[M, D]` is of the kind of the training inputs."""
    check_tensors(x=x)
    if (x.device, x.dtype) != (train.device, train.dtype):
        raise InputError(
            f"x is {x.dtype} on {x.device}, the training inputs are {train.dtype} on {train.device}: pass x.to(them)."
        )
    check_input(x, train.device, columns=train.shape[-1])


Method = Literal["auto", "dense", "lanczos"]

# Rows up to which a matrix is decomposed: 128 MiB in float64, and a quarter of a minute on one core.
_DENSE_ROWS = 4096


class FilterSettings(NamedTuple):
    """How filters of kernel matrices are computed; see `gpntk.GradientFlow`."""

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
