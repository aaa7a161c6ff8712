"""s_o = xᵀ W_o y + b_o: a bilinear map of two inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from gpntk.jacobians.rules.rule import (
    AbstractLayerRule,
    Binding,
    Factors,
    RuleSizes,
    gram_of_gradients,
    register,
    weighted,
)


@final
@dataclass(frozen=True)
class BilinearRule(AbstractLayerRule):
    """df_nc/dW = sum_t g_nct ⊗ x_nt ⊗ y_nt and df_nc/db = sum_t g_nct.

    Index legend: b batch, n/m rows, c/d outputs, t positions, i/j features of x and y, o output features, k columns.
    Factors: a = [x, y] `[B, N, T, I + J]`, g `[B, N, C, T, O]`. Flops per column: 2*N*T*O*I*J each way.
    Gram: by per-sample gradients, 2*N*M*C²*O*I*J.

    Attributes:
        features: I.
    """

    features: int

    def factors(self, inputs: tuple[Tensor, ...], cotangents: Tensor) -> Factors:
        return Factors(torch.cat(inputs, -1).flatten(1, -2), cotangents.flatten(2, -2))

    def jvp(self, factors: Factors, tangents: Mapping[str, Tensor]) -> Tensor:
        (x, y), g = self._inputs(factors), factors.cotangents
        terms = []
        if "weight" in tangents:
            s = torch.einsum("bnti,bkoij,bntj->bntko", x, tangents["weight"], y)
            terms.append(torch.einsum("bntko,bncto->bknc", s, g))
        if "bias" in tangents:
            terms.append(torch.einsum("bko,bncto->bknc", tangents["bias"], g))
        return torch.stack(terms).sum(0)

    def vjp(self, factors: Factors, u: Tensor) -> dict[str, Tensor]:
        (x, y), w = self._inputs(factors), weighted(factors.g, u)  # w [B, N, K, T, O]
        images = {}
        if "weight" in self.own:
            images["weight"] = torch.einsum("bnkto,bnti,bntj->bkoij", w, x, y)
        if "bias" in self.own:
            images["bias"] = w.sum((1, 3))
        return images

    def gradients(self, factors: Factors) -> dict[str, Tensor]:
        (x, y), g = self._inputs(factors), factors.cotangents
        images = {}
        if "weight" in self.own:
            images["weight"] = torch.einsum("bncto,bnti,bntj->bncoij", g, x, y)
        if "bias" in self.own:
            images["bias"] = g.sum(3)
        return images

    def gram(self, left: Factors, right: Factors) -> Tensor:
        one = self.gradients(left)
        return gram_of_gradients(one, one if left is right else self.gradients(right))

    def sizes(self, factors: Factors) -> RuleSizes:
        (x, y), g = self._inputs(factors), factors.cotangents
        c, t, o = g.shape[2:]
        weight = x.shape[-1] * y.shape[-1] * o
        return RuleSizes(t * (weight + c * o), c**2 * weight, g[:, :, 0].numel(), tile=c * weight)

    def _inputs(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """x `[B, N, T, I]` and y `[B, N, T, J]`."""
        a, _ = factors.pair
        return a[..., : self.features], a[..., self.features :]


@register(functional.bilinear)
def _bind_bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Binding:
    operands = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return Binding(BilinearRule(tuple(operands), features=weight.shape[1]), (input1, input2), operands)
