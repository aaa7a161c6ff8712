"""s = W[index]: a lookup."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from gpntk.jacobians.rules import weight_sharing
from gpntk.jacobians.rules.rule import AbstractLayerRule, Binding, Factors, Operations, register


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

    def factors(self, inputs: Tensor | None, cotangents: Tensor) -> Factors:
        assert inputs is not None
        return Factors(inputs.flatten(1), cotangents.flatten(2, -2))

    def join(self, uses: list[Factors]) -> list[Factors]:
        index, g = zip(*uses, strict=True)
        return [Factors(torch.cat(index, 2), torch.cat(g, 3))]

    def jvp(self, factors: Factors, tangents: Mapping[str, Tensor]) -> Tensor:
        index, g = _pair(factors)
        looked_up = torch.stack([table[:, rows] for table, rows in zip(tangents["weight"], index, strict=True)])
        return torch.einsum("bknto,bncto->bknc", looked_up, g)

    def image(self, a: Tensor | None, w: Tensor) -> dict[str, Tensor]:
        assert a is not None
        columns = w.movedim(2, 1).flatten(2, 3)  # [B, K, N*T, O]
        zeros = w.new_zeros(columns.shape[1], self.vocabulary, w.shape[-1])
        images = [zeros.index_add(1, rows.flatten(), part) for rows, part in zip(a, columns, strict=True)]
        return {"weight": torch.stack(images)}

    def add_gram(self, out: Tensor, left: Factors, right: Factors, limit: int) -> None:
        (index, g), (index2, g2) = _pair(left), _pair(right)
        _, _, c, t, o = g.shape

        def block(rows: slice, columns: slice) -> Tensor:
            same = (index[:, None, rows, :, None] == index2[:, columns, None, None, :]).to(g.dtype)
            halfway = torch.einsum("bmnts,bmdso->bnmdto", same, g2[:, columns])
            return torch.einsum("bncto,bnmdto->bncmd", g[:, rows], halfway)

        bytes_each = 32 * g.element_size() * g.shape[0] * t * max(t, c * o)
        weight_sharing.add_blockwise(out, bytes_each, block, right is left, limit)

    def diagonal(self, factors: Factors) -> Tensor:
        index, g = _pair(factors)
        same = (index[..., :, None] == index[..., None, :]).to(g.dtype)
        return ((g @ g.mT) * same.unsqueeze(2)).sum((-2, -1))

    def operations(self, factors: Factors) -> Operations:
        _, _, c, t, o = _pair(factors)[1].shape
        return Operations(t * o * c, t**2 * c * o + c**2 * t * o)

    def num_positions(self, factors: Factors) -> int:
        return 1 if factors.g is None else factors.g.shape[3]

    def sketch(self, factors: Factors, features: int, generator: torch.Generator) -> Tensor:
        index, g = _pair(factors)
        first = weight_sharing.normal((features, self.vocabulary), g, generator)
        second = weight_sharing.normal((features, g.shape[-1]), g, generator)
        return torch.einsum("bntf,bnctf->bncf", first.mT[index], g @ second.mT) / features**0.5


def _pair(factors: Factors) -> tuple[Tensor, Tensor]:
    assert factors.a is not None
    assert factors.g is not None
    return factors.a, factors.g


@register(Tensor.__getitem__)
def _bind_getitem(self: Tensor, index: object) -> Binding | None:
    if not isinstance(index, Tensor) or index.dtype != torch.long or self.dim() != 2:
        return None
    return Binding(EmbeddingRule(("weight",), vocabulary=self.shape[0]), index, {"weight": self})


@register(functional.embedding)
def _bind_embedding(input: Tensor, weight: Tensor, max_norm: float | None = None, **_options: object) -> Binding | None:
    if max_norm is not None:  # writes to the weight
        return None
    return Binding(EmbeddingRule(("weight",), vocabulary=weight.shape[0]), input, {"weight": weight})
