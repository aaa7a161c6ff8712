"""Factors A = R Rᵀ of positive definite matrices: what direct solvers and preconditioners are both made of.

Vectors lead with their columns, `[K, n]`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor


class AbstractFactor(ABC):
    """A factor R of a positive definite matrix A = R Rᵀ `[n, n]`."""

    @abstractmethod
    def half(self, v: Tensor) -> Tensor:
        """Solve with the factor: R⁻¹ v `[..., K, n]`."""

    @abstractmethod
    def half_transposed(self, v: Tensor) -> Tensor:
        """Solve with the transposed factor: R⁻ᵀ v `[..., K, n]`."""

    @abstractmethod
    def logdet(self) -> Tensor:
        """Logarithm of the determinant, log|A| `[]`."""

    @abstractmethod
    def inverse_diagonal(self) -> Tensor:
        """Diagonal of the inverse, diag(A⁻¹) `[n]`."""

    @abstractmethod
    def inverse(self) -> Tensor:
        """The inverse A⁻¹ `[n, n]`, in new memory."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory of the tensors it holds."""

    def solve(self, v: Tensor) -> Tensor:
        """Solve the system: A⁻¹ v `[..., K, n]`."""
        return self.half_transposed(self.half(v))


@final
class CholeskyFactor(AbstractFactor):
    """The triangular factor of Cholesky, A = L Lᵀ, R = L.

    Args:
        lower: L `[n, n]`, lower triangular.
    """

    def __init__(self, lower: Tensor) -> None:
        self.lower = lower

    def half(self, v: Tensor) -> Tensor:
        # X Lᵀ = v; as one matrix, for torch would copy L for every batch.
        return torch.linalg.solve_triangular(self.lower.mT, _matrix(v), upper=True, left=False).view(v.shape)

    def half_transposed(self, v: Tensor) -> Tensor:
        # X L = v
        return torch.linalg.solve_triangular(self.lower, _matrix(v), upper=False, left=False).view(v.shape)

    def logdet(self) -> Tensor:
        return 2 * self.lower.diagonal().log().sum()

    def inverse_diagonal(self) -> Tensor:
        return self.inverse().diagonal()

    def inverse(self) -> Tensor:
        return torch.cholesky_inverse(self.lower)

    @property
    def nbytes(self) -> int:
        return self.lower.nbytes


def _matrix(v: Tensor) -> Tensor:
    return v.reshape(-1, v.shape[-1])


@final
class SpectralFactor(AbstractFactor):
    """The symmetric root R = A^½ by eigenvectors, A = U diag(values) Uᵀ + rest (I - U Uᵀ).

    Args:
        values: Eigenvalues `[r]`, positive.
        vectors: U `[n, r]`, orthonormal, r <= n.
        rest: The eigenvalue of all other directions.
    """

    def __init__(self, values: Tensor, vectors: Tensor, rest: float = 1.0) -> None:
        self.values, self.vectors, self.rest = values, vectors, rest

    def half(self, v: Tensor) -> Tensor:
        return self._function(v, self.values.rsqrt(), self.rest**-0.5)

    def half_transposed(self, v: Tensor) -> Tensor:
        return self.half(v)

    def solve(self, v: Tensor) -> Tensor:
        return self._function(v, 1 / self.values, 1 / self.rest)

    def logdet(self) -> Tensor:
        size, rank = self.vectors.shape
        return self.values.log().sum() + (size - rank) * math.log(self.rest)

    def inverse_diagonal(self) -> Tensor:
        return 1 / self.rest + self.vectors.square() @ (1 / self.values - 1 / self.rest)

    def inverse(self) -> Tensor:
        return self.solve(torch.eye(self.vectors.shape[0], dtype=self.vectors.dtype, device=self.vectors.device))

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.vectors.nbytes

    def _function(self, v: Tensor, on_values: Tensor, on_rest: float) -> Tensor:
        """f(A) v = f(rest) v + U (f(values) - f(rest)) Uᵀ v."""
        return on_rest * v + ((v @ self.vectors) * (on_values - on_rest)) @ self.vectors.mT


@final
class BlockFactor(AbstractFactor):
    """Factors of the blocks of a block-diagonal matrix A.

    Args:
        factors: Of the blocks.
        indices: Coordinates of each block.
    """

    def __init__(self, factors: Sequence[AbstractFactor], indices: Sequence[Tensor]) -> None:
        self._blocks = tuple(zip(factors, indices, strict=True))

    def half(self, v: Tensor) -> Tensor:
        result = torch.empty_like(v)
        for factor, index in self._blocks:
            result[..., index] = factor.half(v[..., index])
        return result

    def half_transposed(self, v: Tensor) -> Tensor:
        result = torch.empty_like(v)
        for factor, index in self._blocks:
            result[..., index] = factor.half_transposed(v[..., index])
        return result

    def logdet(self) -> Tensor:
        return torch.stack([factor.logdet() for factor, _ in self._blocks]).sum()

    def inverse_diagonal(self) -> Tensor:
        parts = [factor.inverse_diagonal() for factor, _ in self._blocks]
        result = parts[0].new_empty(sum(part.numel() for part in parts))
        for part, (_, index) in zip(parts, self._blocks, strict=True):
            result[index] = part
        return result

    def inverse(self) -> Tensor:
        parts = [factor.inverse() for factor, _ in self._blocks]
        size = sum(len(part) for part in parts)
        result = parts[0].new_zeros(size, size)
        for part, (_, index) in zip(parts, self._blocks, strict=True):
            result[index.unsqueeze(-1), index] = part
        return result

    @property
    def nbytes(self) -> int:
        return sum(factor.nbytes + index.nbytes for factor, index in self._blocks)


@final
class ScaledFactor(AbstractFactor):
    """The factor of a matrix that is scaled on both sides, T A T with a diagonal T.

    Args:
        factor: Of A.
        scales: Diagonal of T `[n]`, positive.
    """

    def __init__(self, factor: AbstractFactor, scales: Tensor) -> None:
        self.factor, self.scales = factor, scales

    def half(self, v: Tensor) -> Tensor:
        return self.factor.half(v / self.scales)

    def half_transposed(self, v: Tensor) -> Tensor:
        return self.factor.half_transposed(v) / self.scales

    def logdet(self) -> Tensor:
        return self.factor.logdet() + 2 * self.scales.log().sum()

    def inverse_diagonal(self) -> Tensor:
        return self.factor.inverse_diagonal() / self.scales.square()

    def inverse(self) -> Tensor:
        return self.factor.inverse() / self.scales / self.scales.unsqueeze(-1)

    @property
    def nbytes(self) -> int:
        return self.factor.nbytes + self.scales.nbytes
