"""The second moment of features that are spread over processes, as a lazy operator that all of them hold."""

from __future__ import annotations

from typing import Any, final

import torch
from linear_operator.operators import LinearOperator
from linear_operator.utils.memoize import cached
from torch import Tensor

from gpntk.errors import InputError
from gpntk.inference import AbstractFeatures


@final
class ShardedLinearOperator(LinearOperator):
    """Φᵀ W Φ `[F, F]` with W the diagonal of row weights, by one all-reduce of `[K, F]` per product.

    A matrix that is the same on all ranks, made of rows that are not: algorithms of linear_operator (conjugate
    gradients, Lanczos) run on every rank unchanged, each with all numbers, as long as all ranks make the same calls and
    their random generators are alike. It is as good for features in one process.

    Args:
        row_weights: W, at least zero: one for each of this process's rows `[n]`.
        features: Φ.

    Example:
        >>> import torch, gpntk
        >>> from gpntk.inference import Features
        >>> x = torch.randn(20, 3)
        >>> features = Features(gpntk.AutoBackend(gpntk.freeze(torch.nn.Linear(3, 1))), x)
        >>> moment = ShardedLinearOperator(torch.ones(20), features=features)
        >>> moment.shape, torch.allclose((moment @ torch.eye(4))[:3, :3], x.T @ x, atol=1e-4)
        (torch.Size([4, 4]), True)
        >>> moment.add_jitter(1.0).solve(torch.ones(4)).shape
        torch.Size([4])
    """

    def __init__(self, row_weights: Tensor, *, features: AbstractFeatures) -> None:
        if row_weights.shape != (features.num_rows,):
            raise InputError(
                f"row_weights has shape {tuple(row_weights.shape)}: give one weight per row, ({features.num_rows},)."
            )
        if not bool((row_weights >= 0).all()):
            raise InputError("row weights must be at least zero.")
        super().__init__(row_weights, features=features)
        self._row_weights, self._features = row_weights, features

    @property
    def dtype(self) -> torch.dtype:
        return self._features.dtype

    @property
    def device(self) -> torch.device:
        return self._features.device

    def _size(self) -> torch.Size:
        return torch.Size([self._features.num_features] * 2)

    def _transpose_nonbatch(self) -> ShardedLinearOperator:
        return self

    def _matmul(self, rhs: Tensor) -> Tensor:
        columns = rhs.unsqueeze(0) if rhs.dim() == 1 else rhs.mT
        # Batches of columns are so many more columns.
        flat = columns.reshape(-1, columns.shape[-1]).to(self.dtype)
        image = self._features.vjp(self._features.jvp(flat) * self._row_weights)
        return image.squeeze(0) if rhs.dim() == 1 else image.reshape(columns.shape).mT

    def _bilinear_derivative(self, left_vecs: Tensor, right_vecs: Tensor) -> tuple[Tensor | None, ...]:
        if not self._row_weights.requires_grad:
            return (None,)
        # d(uᵀ Φᵀ W Φ v)/dw_i = (Φu)_i (Φv)_i, of this process's own rows.
        left, right = (self._features.jvp(v.mT.reshape(-1, self.shape[-1])) for v in (left_vecs, right_vecs))
        return ((left * right).sum(0),)

    def _diagonal(self) -> Tensor:
        total = torch.zeros(self.shape[-1], dtype=self.dtype, device=self.device)
        for rows, block in self._features.blocks():
            total += self._row_weights[rows] @ block.square()
        return self._features.total(total)

    @cached
    def to_dense(self) -> Tensor:
        scales = self._row_weights.detach().sqrt().unsqueeze(-1)
        return self._features.second_moment(lambda rows, block: block * scales[rows])

    def _get_indices(self, row_index: Any, col_index: Any, *batch_indices: Any) -> Tensor:
        return self.to_dense()[(*batch_indices, row_index, col_index)]

    def _expand_batch(self, batch_shape: torch.Size | list[int]) -> LinearOperator:
        if len(batch_shape):
            raise NotImplementedError("a sharded operator has no batches: products take batches of columns.")
        return self
