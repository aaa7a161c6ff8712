"""The Jacobian of a network as a lazy operator."""

from __future__ import annotations

from typing import Any, final

import torch
from linear_operator import to_linear_operator
from linear_operator.operators import LinearOperator
from linear_operator.utils.memoize import cached
from torch import Tensor

from gpntk.jacobians.backend import AbstractJacobianBackend
from gpntk.operators.batching import batch_product, row_to_sample, zero_product

_ALL = slice(None)


@final
class JacobianLinearOperator(LinearOperator):
    """J(x) `[..., N*C, F]`, or its transpose, as products.

    Args:
        x: Inputs `[..., N, D]`.
        backend: How products are computed; passed by reference, never copied.
        transposed: Represent J(x)ᵀ `[..., F, N*C]` instead.

    Example:
        >>> import torch
        >>> from gpntk import AutoBackend, FrozenNetwork
        >>> backend = AutoBackend(FrozenNetwork(torch.nn.Linear(3, 2)))
        >>> jacobian = JacobianLinearOperator(torch.randn(5, 3), backend=backend)
        >>> jacobian.shape, (jacobian.mT @ torch.ones(10)).shape
        (torch.Size([10, 8]), torch.Size([8]))
    """

    def __init__(self, x: Tensor, *, backend: AbstractJacobianBackend, transposed: bool = False) -> None:
        super().__init__(x, backend=backend, transposed=transposed)
        self._x, self._backend, self._transposed = x, backend, transposed

    def __repr__(self) -> str:
        return f"{type(self).__name__}{list(self.shape)}"

    def _size(self) -> torch.Size:
        rows = self._x.shape[-2] * self._backend.num_outputs(self._x)
        matrix = (rows, self._backend.num_features)
        return torch.Size([*self._x.shape[:-2], *(reversed(matrix) if self._transposed else matrix)])

    def _matmul(self, rhs: Tensor) -> Tensor:
        if 0 in self.shape or 0 in rhs.shape:
            return zero_product(self.shape, rhs)
        product = self._backend.vjp if self._transposed else self._backend.jvp
        return batch_product(product, self._x, rhs.mT).mT

    def _t_matmul(self, rhs: Any) -> Tensor:
        return self._transpose_nonbatch()._matmul(rhs)

    def _transpose_nonbatch(self) -> JacobianLinearOperator:
        return JacobianLinearOperator(self._x, backend=self._backend, transposed=not self._transposed)

    @cached
    def to_dense(self) -> Tensor:
        if 0 in self.shape:
            return self._x.new_zeros(self.shape)
        flat = self._backend.jacobian(self._x.reshape(-1, *self._x.shape[-2:]))
        # A copy: what a backend keeps for later products is not the caller's to change.
        dense = flat.reshape(*self._x.shape[:-2], *flat.shape[-2:]).clone()
        return dense.mT if self._transposed else dense

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        rows, columns = (col_index, row_index) if self._transposed else (row_index, col_index)
        samples = row_to_sample(rows, self.shape[-1 if self._transposed else -2], self._backend.num_outputs(self._x))
        if samples is None or not isinstance(columns, slice) or columns != _ALL:
            # Some outputs of a sample, or some parameters: no product is cheaper than the rows themselves.
            return to_linear_operator(self.to_dense()[(*batch_indices, row_index, col_index)])
        x = self._x[(*batch_indices, samples, _ALL)]
        return JacobianLinearOperator(x, backend=self._backend, transposed=self._transposed)

    def _get_indices(self, row_index: Any, col_index: Any, *batch_indices: Any) -> Tensor:
        return self.to_dense()[(*batch_indices, row_index, col_index)]

    def _expand_batch(self, batch_shape: torch.Size | list[int]) -> JacobianLinearOperator:
        x = self._x.expand(*batch_shape, *self._x.shape[-2:])
        return JacobianLinearOperator(x, backend=self._backend, transposed=self._transposed)
