"""s = a Wᵀ + b, at one or many positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from gpntk.jacobians.layers.rule import AbstractLayerRule, Factors, register


@final
@register(nn.Linear)
class LinearRule(AbstractLayerRule):
    """df_nc/dW = sum_t g_nct a_ntᵀ and df_nc/db = sum_t g_nct.

    Index legend: b batch, n/m rows, c/d outputs, t/s positions, i input features, o output features, k columns.
    Flops per column: 2*N*T*O*I each way. Gram: 2*N*M*(I + C²*O) for T = 1; for T > 1 the cheaper of position pairs,
    2*N*M*T²*(I + C²*O), and per-sample weight gradients, 2*N*M*C²*O*I. For T = 1 the Gram is the classical product of
    forward and backward covariances, (a·a' + 1) (g·g').
    """

    def factors(self, inputs: Tensor, cotangents: Tensor) -> Factors:
        rows, outputs = cotangents.shape[:2]
        a = inputs.reshape(1, rows, -1, inputs.shape[-1])
        return Factors(a, cotangents.reshape(1, rows, outputs, a.shape[2], cotangents.shape[-1]))

    def jvp(self, factors: Factors, tangents: Mapping[str, Tensor]) -> Tensor:
        a, g = factors
        batch, rows, positions, _ = a.shape
        columns = next(iter(tangents.values())).shape[1]
        s = a.new_zeros(())
        if "weight" in tangents:
            # One GEMM for all columns: [N*T, I] @ [I, K*O].
            s = a.flatten(1, 2) @ tangents["weight"].flatten(1, 2).mT
            s = s.view(batch, rows, positions, columns, -1)
        if "bias" in tangents:
            s = s + tangents["bias"][:, None, None]
        s = s.expand(batch, rows, positions, columns, g.shape[-1])
        if g.shape[2] == 1:
            return (s * g.permute(0, 1, 3, 2, 4)).sum((2, 4)).mT.unsqueeze(-1)
        return torch.einsum("bntko,bncto->bknc", s, g)

    def vjp(self, factors: Factors, u: Tensor) -> dict[str, Tensor]:
        a, g = factors
        if g.shape[2] == 1:
            w = u.permute(0, 2, 3, 1).unsqueeze(-1) * g.permute(0, 1, 3, 2, 4)
        else:
            w = torch.einsum("bknc,bncto->bntko", u, g)
        result = {}
        if "weight" in self.names:
            # One GEMM for all columns: [K*O, N*T] @ [N*T, I].
            product = w.flatten(1, 2).flatten(2).mT @ a.flatten(1, 2)
            result["weight"] = product.unflatten(1, (u.shape[1], -1))
        if "bias" in self.names:
            result["bias"] = w.sum((1, 2))
        return result

    def gram(self, left: Factors, right: Factors) -> Tensor:
        n, m = left.a.shape[1], right.a.shape[1]
        c, t, o = left.g.shape[2:]
        i = left.a.shape[-1]
        if t == 1:
            return self._pairs(left.a[:, :, 0], left.g[:, :, :, 0], right.a[:, :, 0], right.g[:, :, :, 0])
        if t**2 * (i + c**2 * o) <= c**2 * o * i + c * t * o * i * (n + m) / (n * m):
            return self._position_pairs(left, right)
        return self._weight_gradients(left, right)

    def _pairs(self, a: Tensor, g: Tensor, a2: Tensor, g2: Tensor) -> Tensor:
        """(a·a' [weight] + 1 [bias]) (g·g') for a `[b, n, i]`, g `[b, n, c, o]`: `[b, n, c, m, c]`."""
        backward = (g.flatten(1, 2) @ g2.flatten(1, 2).mT).unflatten(1, g.shape[1:3]).unflatten(3, g2.shape[1:3])
        if "weight" not in self.names:
            return backward
        forward = a @ a2.mT if "bias" not in self.names else torch.baddbmm(a.new_ones(1), a, a2.mT)
        return forward[:, :, None, :, None] * backward

    def _position_pairs(self, left: Factors, right: Factors) -> Tensor:
        """sum_ts of `_pairs`, one left position at a time: workspace n*m*t*c²."""
        a2, g2 = right.a.flatten(1, 2), right.g.transpose(2, 3).flatten(1, 2)
        total = left.a.new_zeros(())
        for t in range(left.a.shape[2]):
            pairs = self._pairs(left.a[:, :, t], left.g[:, :, :, t], a2, g2)
            total = total + pairs.unflatten(3, right.a.shape[1:3]).sum(4)
        return total

    def _weight_gradients(self, left: Factors, right: Factors) -> Tensor:
        """Contract per-sample gradients of W and b: workspace (n + m)*c*o*i."""
        total = left.a.new_zeros(())
        if "weight" in self.names:
            one, two = (torch.einsum("bncto,bnti->bncoi", g, a).flatten(3) for a, g in (left, right))
            total = total + torch.einsum("bncp,bmdp->bncmd", one, two)
        if "bias" in self.names:
            total = total + torch.einsum("bnco,bmdo->bncmd", left.g.sum(3), right.g.sum(3))
        return total
