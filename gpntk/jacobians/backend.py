"""The interface of a Jacobian backend: four products, from which the rest follows.

Layout inside every backend: B batches, N rows, C outputs, K columns, F features (F = P, the selected parameters, unless
said otherwise), G groups of features. Columns lead, so that one column is contiguous in memory:

    x [B, N, D]    u [B, K, N*C]    v [B, K, F]    gram [B, G, N*C, M*C]    diagonal [B, G, N*C]

Rows of the Jacobian are data-major: row n*C + c belongs to output c of row n. Groups are the whole of F (G = 1), or the
network's layers (`per_layer=True`): K = sum_g variance_g K_g, so a prior variance per layer costs no new product.

Laws, for every backend (see `gpntk.testing`):

    <u, jvp(x, v)> = <vjp(x, u), v>              adjoint
    jvp(x, vjp(x2, u)) = gram(x, x2).sum(1) u    Gram
    diagonal(x) = diag gram(x, x)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from gpntk.cost import Cost
from gpntk.memory import TensorCache, chunks, default_budget
from gpntk.network import FrozenNetwork

_SKETCH_BLOCK = 32


class AbstractJacobianBackend(ABC):
    """How products with J(x) = df(x; w)/dw `[N*C, P]` are computed.

    Every product is differentiable in x and in its other arguments. What depends on x alone is kept in ``cache``.
    """

    def __init__(self, network: FrozenNetwork, memory_budget: int | None = None) -> None:
        self.network = network
        self.memory_budget = default_budget(network.device) if memory_budget is None else int(memory_budget)
        self.cache = TensorCache(self.memory_budget)

    def remember(self, kind: Hashable, tensors: tuple[Tensor, ...], compute: Callable[[], Any]) -> Any:
        """``compute()``, or what it gave the last time for the same tensors and the same weights; never change it."""
        return self.cache.get((kind, self.network.version), tensors, compute)

    def holds(self, kind: Hashable, tensors: tuple[Tensor, ...]) -> bool:
        """Whether `remember` would compute nothing."""
        return self.cache.holds((kind, self.network.version), tensors)

    def share_cache(self, cache: TensorCache) -> None:
        """Keep what is kept in ``cache``, within its budget."""
        self.cache = cache

    @property
    def num_features(self) -> int:
        """F, the number of columns of J."""
        return self.network.num_params

    def num_outputs(self, x: Tensor) -> int:
        """C, rows of J per row of x."""
        return self.network.num_outputs(x)

    @abstractmethod
    def jvp(self, x: Tensor, v: Tensor) -> Tensor:
        """J(x) v `[B, K, N*C]` for v `[B, K, F]`."""

    @abstractmethod
    def vjp(self, x: Tensor, u: Tensor) -> Tensor:
        """J(x)ᵀ u `[B, K, F]` for u `[B, K, N*C]`."""

    @abstractmethod
    def gram(self, x1: Tensor, x2: Tensor, per_layer: bool = False) -> Tensor:
        """J_g(x1) J_g(x2)ᵀ for every group g, `[B, G, N*C, M*C]`."""

    @abstractmethod
    def diagonal(self, x: Tensor, per_layer: bool = False) -> Tensor:
        """Diagonal of ``gram(x, x)``, `[B, G, N*C]`, without forming it."""

    def costs(self, x: Tensor, columns: int) -> tuple[Cost, ...]:  # noqa: ARG002
        """What products with so many columns cost by each strategy, the cheapest first; empty if not counted."""
        return ()

    def jacobian(self, x: Tensor) -> Tensor:
        """J(x) itself, `[B, N*C, F]`: each row of x as a batch of its own, one unit cotangent per output."""
        batch, rows, _ = x.shape
        outputs = self.num_outputs(x)
        unit = torch.eye(outputs, dtype=x.dtype, device=x.device).expand(batch * rows, outputs, outputs)
        return self.vjp(x.reshape(batch * rows, 1, -1), unit).reshape(batch, rows * outputs, self.num_features)

    def sketch(self, x: Tensor, features: int, seed: int) -> Tensor:
        """J(x) R / sqrt(F) `[B, N*C, F]` for a standard normal R `[P, F]`, or a cheaper one that serves as well."""
        outputs, size = self.num_outputs(x), self.num_features
        blocks = []
        for rows in chunks(x.shape[1], 2 * x.shape[0] * outputs * size * x.element_size(), self.memory_budget // 2):
            jacobian = self.jacobian(x[:, rows])
            parts = []
            # R by blocks of one size, so that it depends on the seed alone; drawn on one device for the same reason.
            for index in range(0, features, _SKETCH_BLOCK):
                generator = torch.Generator("cpu").manual_seed(seed + index)
                shape = (min(_SKETCH_BLOCK, features - index), size)
                r = torch.randn(shape, generator=generator, dtype=x.dtype, device="cpu").to(x.device)
                parts.append(jacobian @ r.mT / features**0.5)
            blocks.append(torch.cat(parts, -1))
        return torch.cat(blocks, 1)

    def feature_groups(self, device: torch.device) -> Tensor:
        """The number of the layer that each feature belongs to, `[F]`; features may repeat the P parameters."""
        sizes = torch.tensor([columns.stop - columns.start for columns in self.layer_slices(True)], device=device)
        once = torch.arange(sizes.numel(), device=device).repeat_interleave(sizes)
        return once.repeat(self.num_features // once.numel())

    def layer_slices(self, per_layer: bool) -> tuple[slice, ...]:
        """The groups as slices of F."""
        if not per_layer:
            return (slice(0, self.num_features),)
        return tuple(columns for _, columns in self.network.layers)
