"""Parameters in disjoint sets, each with the backend that suits it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from gpntk.jacobians.backend import AbstractJacobianBackend
from gpntk.memory import TensorCache
from gpntk.network import FrozenNetwork


@final
class SplitBackend(AbstractJacobianBackend):
    """J = [J_1, J_2, ...] by columns: products add up, and so do Grams, J Jᵀ = sum_i J_i J_iᵀ.

    Use it where a few parameters have no structured rule: those go by automatic differentiation, the others by theirs.

    Args:
        network: The network with all selected parameters.
        backends: One backend per set, each on ``network.restrict(names)`` for names that together are all, once.

    Example:
        >>> import torch, gpntk
        >>> network = gpntk.freeze(torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.PReLU(8), torch.nn.Linear(8, 1)))
        >>> parts = [
        ...     gpntk.jacobians.StructuredBackend(network.restrict(["0.weight", "0.bias", "2.weight", "2.bias"])),
        ...     gpntk.jacobians.AutodiffBackend(network.restrict(["1.weight"])),
        ... ]
        >>> SplitBackend(network, parts).vjp(torch.randn(1, 5, 3), torch.ones(1, 2, 5)).shape
        torch.Size([1, 2, 49])
    """

    def __init__(
        self, network: FrozenNetwork, backends: Sequence[AbstractJacobianBackend], memory_budget: int | None = None
    ) -> None:
        super().__init__(network, memory_budget)
        self.backends = tuple(backends)
        self.share_cache(self.cache)

    def share_cache(self, cache: TensorCache) -> None:
        super().share_cache(cache)
        for backend in self.backends:
            backend.share_cache(cache)

    def jvp(self, x: Tensor, v: Tensor) -> Tensor:
        return torch.stack([backend.jvp(x, self._columns(backend, v)) for backend in self.backends]).sum(0)

    def vjp(self, x: Tensor, u: Tensor) -> Tensor:
        result = u.new_zeros(*u.shape[:2], self.num_features)
        for backend in self.backends:
            part = backend.vjp(x, u)
            for name, columns in backend.network.slices.items():
                result[..., self.network.slices[name]] = part[..., columns]
        return result

    def gram(self, x1: Tensor, x2: Tensor, per_layer: bool = False) -> Tensor:
        return self._sum(lambda backend: backend.gram(x1, x2, per_layer), per_layer)

    def diagonal(self, x: Tensor, per_layer: bool = False) -> Tensor:
        return self._sum(lambda backend: backend.diagonal(x, per_layer), per_layer)

    def sketch(self, x: Tensor, features: int, seed: int) -> Tensor:
        parts = [backend.sketch(x, features, seed + index) for index, backend in enumerate(self.backends)]
        return torch.stack(parts).sum(0)

    def _sum(self, term: Callable[[AbstractJacobianBackend], Tensor], per_layer: bool) -> Tensor:
        if not per_layer:
            return torch.stack([term(backend) for backend in self.backends]).sum(0)
        groups = {name: index for index, (name, _) in enumerate(self.network.layers)}
        total = None
        for backend in self.backends:
            part = term(backend)
            if total is None:
                total = part.new_zeros(part.shape[0], len(groups), *part.shape[2:])
            for index, (name, _) in enumerate(backend.network.layers):
                total[:, groups[name]] += part[:, index]
        assert total is not None
        return total

    def _columns(self, backend: AbstractJacobianBackend, v: Tensor) -> Tensor:
        return torch.cat([v[..., self.network.slices[name]] for name in backend.network.names], dim=-1)
