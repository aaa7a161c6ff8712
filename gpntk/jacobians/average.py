"""One kernel for all outputs: the average of the outputs' own kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from gpntk.errors import InputError
from gpntk.jacobians.backend import AbstractJacobianBackend
from gpntk.memory import TensorCache
from gpntk.network import FrozenNetwork


@final
class AverageBackend(AbstractJacobianBackend):
    """Features [J_1(x), ..., J_C(x)] / sqrt(C) `[N, C*P]`, so that the Gram is (1/C) sum_c J_c J_cᵀ `[N, M]`.

    Made of one single-output backend per output, built by ``factory`` at the first x: no C x C block is ever formed.
    Cost: that of C single outputs.
    """

    def __init__(
        self,
        network: FrozenNetwork,
        factory: Callable[[FrozenNetwork], AbstractJacobianBackend],
        memory_budget: int | None = None,
    ) -> None:
        super().__init__(network, memory_budget)
        self._factory = factory
        self._single: tuple[AbstractJacobianBackend, ...] = ()
        self._features = 0

    @property
    def num_features(self) -> int:
        if not self._features:
            raise InputError("the number of features is C * P, and C is known only once the kernel has seen an input.")
        return self._features

    def num_outputs(self, x: Tensor) -> int:
        self._backends(x)
        return 1

    def jvp(self, x: Tensor, v: Tensor) -> Tensor:
        backends = self._backends(x)
        parts = v.unflatten(-1, (len(backends), -1)).unbind(-2)
        products = [backend.jvp(x, part) for backend, part in zip(backends, parts, strict=True)]
        return torch.stack(products).sum(0) / math.sqrt(len(backends))

    def vjp(self, x: Tensor, u: Tensor) -> Tensor:
        backends = self._backends(x)
        return torch.cat([backend.vjp(x, u) for backend in backends], dim=-1) / math.sqrt(len(backends))

    def gram(self, x1: Tensor, x2: Tensor, per_layer: bool = False) -> Tensor:
        first, *others = self._backends(x1)
        total = first.gram(x1, x2, per_layer)
        for backend in others:
            total = total + backend.gram(x1, x2, per_layer)
        return total / (1 + len(others))

    def diagonal(self, x: Tensor, per_layer: bool = False) -> Tensor:
        return torch.stack([backend.diagonal(x, per_layer) for backend in self._backends(x)]).mean(0)

    def _backends(self, x: Tensor) -> tuple[AbstractJacobianBackend, ...]:
        if not self._single:
            count = self.network.num_outputs(x)
            self._single = tuple(self._factory(self.network.select_output(c)) for c in range(count))
            self._features = sum(backend.num_features for backend in self._single)
            for backend in self._single:
                backend.share_cache(TensorCache(self.memory_budget // count))
        return self._single

    def __getstate__(self) -> dict[str, Any]:
        # A copy builds its own from its own network, so that it follows where that network is moved.
        return {**self.__dict__, "_single": ()}
