"""Jacobian products from the materialised Jacobian: for small P, and as the plainest reference."""

from __future__ import annotations

from typing import final

from torch import Tensor

from gpntk.jacobians.autodiff import AutodiffBackend
from gpntk.jacobians.explicit import AbstractExplicitBackend
from gpntk.network import FrozenNetwork


@final
class DenseBackend(AbstractExplicitBackend):
    """J `[B, N*C, P]` formed by per-sample reverse mode, kept while it fits the budget, and used by matrix products.

    By forward mode if C > P. Use it when P is small (hundreds), where one GEMM beats anything layer by layer. Memory
    N*C*P values; beyond the budget J is formed again by chunks of rows in each product.

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
