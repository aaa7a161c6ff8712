"""s = W[index]: a lookup."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from gpntk.jacobians.rules.rule import AbstractLayerRule, Binding, Factors, RuleSizes, register, weighted


@final
@dataclass(frozen=True)
class EmbeddingRule(AbstractLayerRule):
    """df_nc/dW[v] = sum_t [index_nt = v] g_nct: a linear layer of one-hot inputs that are never formed.

    Index legend: b batch, n/m rows, c/d outputs, t/s positions, v vocabulary, o embedding dimension, k columns.
    Factors: a = index `[B, N, T]`, g `[B, N, C, T, O]`. Flops per column: N*T*O each way.
    Gram: 2*N*M*(T²*C*O + C²*T*O). Several uses are more positions.

    Attributes:
        vocabulary: V, the number of rows of W.
    """

    vocabulary: int

    def factors(self, inputs: tuple[Tensor, ...], cotangents: Tensor) -> Factors:
        return Factors(inputs[0].flatten(1), cotangents.flatten(2, -2))

    def jvp(self, factors: Factors, tangents: Mapping[str, Tensor]) -> Tensor:
        index, g = factors.pair
        looked_up = torch.stack([table[:, rows] for table, rows in zip(tangents["weight"], index, strict=True)])
        return torch.einsum("bknto,bncto->bknc", looked_up, g)

    def vjp(self, factors: Factors, u: Tensor) -> dict[str, Tensor]:
        index, g = factors.pair
        w = weighted(g, u)  # [B, N, K, T, O]
        return {"weight": self._scattered(index.flatten(1), w.movedim(2, 1).flatten(2, 3))}

    def gradients(self, factors: Factors) -> dict[str, Tensor]:
        index, g = factors.pair
        images = self._scattered(index.flatten(0, 1), g.flatten(0, 1))
        return {"weight": images.unflatten(0, g.shape[:2])}

    def gram(self, left: Factors, right: Factors) -> Tensor:
        (index, g), (index2, g2) = left.pair, right.pair
        same = (index[:, None, :, :, None] == index2[:, :, None, None, :]).to(g.dtype)
        halfway = torch.einsum("bmnts,bmdso->bnmdto", same, g2)
        return torch.einsum("bncto,bnmdto->bncmd", g, halfway)

    def diagonal(self, factors: Factors) -> Tensor:
        index, g = factors.pair
        same = (index[..., :, None] == index[..., None, :]).to(g.dtype)
        return ((g @ g.mT) * same.unsqueeze(2)).sum((-2, -1))

    def sizes(self, factors: Factors) -> RuleSizes:
        g = factors.cotangents
        _, _, c, t, o = g.shape
        return RuleSizes(t * o * c, t**2 * c * o + c**2 * t * o, g[:, :, 0].numel(), 16 * t * max(t, c * o))

    def _scattered(self, index: Tensor, g: Tensor) -> Tensor:
        """Rows g `[B, K, T, O]` added up at their places in tables `[B, K, V, O]`, for index `[B, T]`."""
        zeros = g.new_zeros(g.shape[1], self.vocabulary, g.shape[-1])
        return torch.stack([zeros.index_add(1, rows, part) for rows, part in zip(index, g, strict=True)])


@register(Tensor.__getitem__)
def _bind_getitem(self: Tensor, index: object) -> Binding | None:
    if not isinstance(index, Tensor) or index.dtype != torch.long or self.dim() != 2:
        return None
    return Binding(EmbeddingRule(("weight",), vocabulary=self.shape[0]), (index,), {"weight": self})


@register(functional.embedding)
def _bind_embedding(input: Tensor, weight: Tensor, max_norm: float | None = None, **_options: object) -> Binding | None:
    if max_norm is not None:  # writes to the weight
        return None
    return Binding(EmbeddingRule(("weight",), vocabulary=weight.shape[0]), (input,), {"weight": weight})
