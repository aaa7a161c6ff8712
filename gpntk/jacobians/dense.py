"""Jacobian products from the materialised Jacobian: for small P, and as the plainest reference."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from gpntk.jacobians.autodiff import AutodiffBackend
from gpntk.jacobians.backend import AbstractJacobianBackend
from gpntk.jacobians.contraction import contracted_diagonal, contracted_gram, row_chunks
from gpntk.network import FrozenNetwork


@final
class DenseBackend(AbstractJacobianBackend):
    """J `[B, N*C, P]` formed by per-sample reverse mode, kept while it fits the budget, and used by matrix products.

    Use it when P is small (hundreds), where one GEMM beats anything layer by layer. Memory N*C*P values; beyond the
    budget J is formed again by chunks of rows in each product.

    Example:
        >>> import torch, gpntk
        >>> DenseBackend(gpntk.freeze(torch.nn.Linear(3, 2))).jacobian(torch.randn(1, 10, 3)).shape
        torch.Size([1, 20, 8])
    """

    def __init__(self, network: FrozenNetwork, memory_budget: int | None = None) -> None:
        super().__init__(network, memory_budget)
        self._autodiff = AutodiffBackend(network, self.memory_budget)

    def jacobian(self, x: Tensor) -> Tensor:
        return self.remember("jacobian", (x,), lambda: self._autodiff.jacobian(x))

    def jvp(self, x: Tensor, v: Tensor) -> Tensor:
        return torch.cat([v @ self.jacobian(x[:, rows]).mT for rows in row_chunks(self, x)], dim=-1)

    def vjp(self, x: Tensor, u: Tensor) -> Tensor:
        c = self.num_outputs(x)
        parts = [u[..., r.start * c : r.stop * c] @ self.jacobian(x[:, r]) for r in row_chunks(self, x)]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def gram(self, x1: Tensor, x2: Tensor, per_layer: bool = False) -> Tensor:
        return contracted_gram(self, x1, x2, per_layer)

    def diagonal(self, x: Tensor, per_layer: bool = False) -> Tensor:
        return contracted_diagonal(self, x, per_layer)
