"""s = a Wᵀ + b, at one or many positions; also x @ W."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn import functional

from gpntk.jacobians.rules import weight_sharing
from gpntk.jacobians.rules.rule import AbstractLayerRule, Binding, Factors, RuleSizes, outer, register, weighted
from gpntk.jacobians.rules.weight_sharing import Positions


@final
@dataclass(frozen=True)
class LinearRule(AbstractLayerRule):
    """df_nc/dW = sum_t g_nct a_ntᵀ and df_nc/db = sum_t g_nct.

    Index legend: b batch, n/m rows, c/d outputs, t positions, i input features, o output features, k columns.
    Factors: a `[B, N, T, I]`, g `[B, N, C, T, O]`, or None for the identity (the network's last layer).
    Flops per column: 2*N*T*O*I each way. Gram: for T = 1 the product of forward and backward covariances,
    (a·a' + 1)(g·g'), 2*N*M*(I + C²*O); for T > 1 see `weight_sharing`. Several uses are more positions.

    Attributes:
        transposed: The parameter is Wᵀ `[I, O]`.
        outputs: O.
    """

    transposed: bool
    outputs: int
    takes_identity: ClassVar[bool] = True

    def factors(self, inputs: tuple[Tensor, ...], cotangents: Tensor) -> Factors:
        return Factors(inputs[0].flatten(1, -2), cotangents.flatten(2, -2))

    def jvp(self, factors: Factors, tangents: Mapping[str, Tensor]) -> Tensor:
        a, g = factors
        assert a is not None
        s = None
        if "weight" in tangents:
            weight = self._oriented(tangents["weight"])
            # One GEMM for all columns: [N*T, I] @ [I, K*O].
            s = a.flatten(1, 2) @ weight.flatten(1, 2).mT
            s = s.view(*a.shape[:3], weight.shape[1], -1)
        if "bias" in tangents:
            bias = tangents["bias"][:, None, None]
            s = bias if s is None else s + bias
        assert s is not None
        if g is None:
            return s[:, :, 0].transpose(1, 2).expand(-1, -1, a.shape[1], -1)
        if g.shape[2] == 1:
            # One output: a product and a sum, rather than a small matrix product per row.
            return (s * g.transpose(2, 3)).sum((2, 4)).mT.unsqueeze(-1)
        return torch.einsum("bntko,bncto->bknc", s.expand(*a.shape[:3], -1, -1), g)

    def vjp(self, factors: Factors, u: Tensor) -> dict[str, Tensor]:
        w = weighted(factors.g, u).transpose(2, 3)  # [B, N, T, K, O]
        columns, outputs = w.shape[3:]
        result = {}
        if "weight" in self.own:
            assert factors.a is not None
            # One GEMM for all columns: [K*O, N*T] @ [N*T, I].
            product = w.flatten(1, 2).flatten(2).mT @ factors.a.flatten(1, 2)
            result["weight"] = self._oriented(product.unflatten(1, (columns, outputs)))
        if "bias" in self.own:
            result["bias"] = w.sum((1, 2))
        return result

    def gradients(self, factors: Factors) -> dict[str, Tensor]:
        positions = Positions(*factors.pair)
        result = {}
        if "weight" in self.own:
            result["weight"] = self._oriented(weight_sharing.gradients(positions))
        if "bias" in self.own:
            result["bias"] = positions.g.sum(3)
        return result

    def gram(self, left: Factors, right: Factors) -> Tensor:
        if left.g is None or right.g is None:
            forward = self._forward(left, right)
            eye = torch.eye(self._outputs(left), dtype=forward.dtype, device=forward.device)
            return forward[:, :, None, :, None] * eye[:, None]
        if left.g.shape[3] == 1:
            backward = outer(left.g[:, :, :, 0], right.g[:, :, :, 0])
            return backward if self.own == ("bias",) else self._forward(left, right)[:, :, None, :, None] * backward
        terms = []
        if "weight" in self.own:
            terms.append(weight_sharing.gram(Positions(*left.pair), Positions(*right.pair)))
        if "bias" in self.own:
            terms.append(outer(left.g.sum(3), right.g.sum(3)))
        return terms[0] if len(terms) == 1 else terms[0].add(terms[1])

    def diagonal(self, factors: Factors) -> Tensor:
        a, g = factors
        assert a is not None
        if g is None or g.shape[3] == 1:
            backward = 1.0 if g is None else g[:, :, :, 0].square().sum(-1)
            forward = a[:, :, 0].square().sum(-1, keepdim=True) * ("weight" in self.own) + ("bias" in self.own)
            return (forward * backward).expand(-1, -1, self._outputs(factors))
        total = weight_sharing.diagonal(Positions(*factors.pair)) if "weight" in self.own else None
        if "bias" in self.own:
            term = g.sum(3).square().sum(-1)
            total = term if total is None else total + term
        assert total is not None
        return total

    def sizes(self, factors: Factors) -> RuleSizes:
        a, g = factors
        assert a is not None
        inputs = a.shape[3] if "weight" in self.own else 0
        if g is None:
            return RuleSizes(self.outputs * (inputs + 1), inputs + self.outputs, 1, tile=0)
        outputs, positions, size = g.shape[2:]
        product, column = positions * size * (inputs + outputs), g[:, :, 0].numel()
        if positions == 1:
            return RuleSizes(product, inputs + outputs**2 * size, column, tile=0)
        sizes = outputs, positions, inputs, size
        return RuleSizes(product, weight_sharing.cheapest(*sizes)[1], column, weight_sharing.tile(*sizes))

    def _forward(self, left: Factors, right: Factors) -> Tensor:
        """a·a' [weight] + 1 [bias], `[B, N, M]`."""
        assert left.a is not None
        assert right.a is not None
        a, a2 = left.a[:, :, 0], right.a[:, :, 0]
        if "weight" not in self.own:
            return a.new_ones(*a.shape[:2], a2.shape[1])
        return torch.baddbmm(a.new_ones(1), a, a2.mT) if "bias" in self.own else a @ a2.mT

    def _outputs(self, factors: Factors) -> int:
        return self.outputs if factors.g is None else factors.g.shape[2]

    def _oriented(self, weight: Tensor) -> Tensor:
        return weight.mT if self.transposed else weight


@register(functional.linear)
def _bind_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Binding:
    operands = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return _binding(input, operands, transposed=False, outputs=weight.shape[0])


@register(torch.mm, Tensor.mm)
def _bind_mm(input: Tensor, mat2: Tensor) -> Binding | None:
    return _bind_matmul(input, mat2)


@register(torch.matmul, Tensor.matmul, Tensor.__matmul__)
def _bind_matmul(input: Tensor, other: Tensor) -> Binding | None:
    if other.dim() != 2 or input.dim() < 2:
        return None
    return _binding(input, {"weight": other}, transposed=True, outputs=other.shape[1])


def _binding(input: Tensor, operands: dict[str, Tensor], transposed: bool, outputs: int) -> Binding:
    own = tuple(operands)
    rule, mirrored = (LinearRule(own, transposed=way, outputs=outputs) for way in (transposed, not transposed))
    return Binding(rule, (input,), operands, mirrored=mirrored)
