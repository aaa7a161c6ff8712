"""Backends that hold their features as a matrix."""

from __future__ import annotations

from abc import ABC

import torch
from torch import Tensor

from gpntk.jacobians.backend import AbstractJacobianBackend
from gpntk.jacobians.contraction import contracted_diagonal, contracted_gram, inner_products, row_chunks


class AbstractExplicitBackend(AbstractJacobianBackend, ABC):
    """Products by matrix products with ``jacobian(x)`` `[B, N*C, F]`, formed by chunks of rows within the budget."""

    def jvp(self, x: Tensor, v: Tensor) -> Tensor:
        return torch.cat([inner_products(v, self.jacobian(x[:, rows])) for rows in row_chunks(self, x)], dim=-1)

    def vjp(self, x: Tensor, u: Tensor) -> Tensor:
        c = self.num_outputs(x)
        parts = [u[..., r.start * c : r.stop * c] @ self.jacobian(x[:, r]) for r in row_chunks(self, x)]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def gram(self, x1: Tensor, x2: Tensor, per_layer: bool = False) -> Tensor:
        return contracted_gram(self, x1, x2, per_layer)

    def diagonal(self, x: Tensor, per_layer: bool = False) -> Tensor:
        return contracted_diagonal(self, x, per_layer)
