"""A kernel together with its training inputs: the matrix to be inverted or filtered, and what predictions need."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any, Literal, NamedTuple, final

import torch
from gpytorch.kernels import Kernel
from linear_operator import to_linear_operator
from linear_operator.operators import LinearOperator
from torch import Tensor

from gpntk.dynamics.filters import GradientFilter
from gpntk.dynamics.matrix_functions import AbstractFilteredMatrix, KrylovMatrix, SpectralMatrix
from gpntk.errors import InputError
from gpntk.inference.features import exact_dtype

Method = Literal["auto", "dense", "lanczos"]

# Rows up to which a matrix is decomposed: 128 MiB in float64, and a quarter of a minute on one core.
_DENSE_ROWS = 4096


class FilterSettings(NamedTuple):
    """How filters of kernel matrices are computed.

    Attributes:
        method: ``"dense"``, ``"lanczos"``, or ``"auto"``: dense up to 4,096 rows.
        noise: What is added to the diagonal;
        diag_reg: the same in units of the mean diagonal.
        tolerance: Error at which Lanczos stops.
        max_iterations: Most iterations of Lanczos.
    """

    method: Method
    noise: float
    diag_reg: float
    tolerance: float
    max_iterations: int


@final
class TrainingKernel:
    """k and the training inputs X, each part made when it is first asked for; n = N or N*C rows.

    Args:
        kernel: k; is copied as it is, since later changes would not reach what has been decomposed.
        name: What the user calls it.
        x: X `[N, D]`.
        settings: How filters are computed.
    """

    def __init__(self, kernel: Kernel, name: str, x: Tensor, settings: FilterSettings) -> None:
        if kernel.batch_shape:
            raise InputError(f"{name} has batch shape {tuple(kernel.batch_shape)}: give a kernel without one.")
        self.kernel = copy.deepcopy(kernel).requires_grad_(False)
        self._x, self._settings = x, settings
        self._exact = exact_dtype(x.device)
        self.rows: int = self.kernel(x, x).shape[-1]
        self._dense = settings.method == "dense" or (settings.method == "auto" and self.rows <= _DENSE_ROWS)

    @cached_property
    def _level(self) -> float:
        """The mean of the diagonal."""
        with torch.no_grad():
            diagonal: Any = self.kernel(self._x, self._x, diag=True)
        return diagonal.to(self._exact).mean().item()

    @cached_property
    def noise(self) -> float:
        """s."""
        return self._settings.noise + self._settings.diag_reg * self._level

    @cached_property
    def matrix(self) -> AbstractFilteredMatrix:
        """The matrix on the training set, in float64."""
        epsilon = torch.finfo(self._x.dtype).eps
        # The norm of a matrix of independent errors, one rounding in each entry.
        rounding = epsilon * self.rows**0.5 * self._level
        with torch.no_grad():
            operator = self.between(self._x, self._x)
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

    def between(self, x1: Tensor, x2: Tensor) -> LinearOperator:
        """k(x1, x2)."""
        return to_linear_operator(self.kernel(x1, x2)).evaluate_kernel()

    def cross(self, x: Tensor) -> Tensor:
        """k(x, X) `[m, n]` in float64."""
        return self.between(x, self._x).to_dense().to(self._exact)

    def predictions(self, x: Tensor, value: Tensor) -> Tensor:
        """k(x, X) c `[T, K, m]` for columns c `[T, K, n]`."""
        if self._dense:
            return value @ self.cross(x).mT
        product: Any = self.between(x, self._x) @ value.flatten(0, 1).mT.to(x.dtype)
        return product.mT.unflatten(0, value.shape[:2]).to(self._exact)

    def covariance(self, x: Tensor) -> Tensor:
        """k(x, x) `[m, m]` in float64."""
        return self.between(x, x).to_dense().to(self._exact)

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
