"""s = a Wᵀ + b, at one or many positions; also x @ W."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from gpntk.jacobians.rules import weight_sharing
from gpntk.jacobians.rules.rule import AbstractLayerRule, Binding, Factors, Operations, register
from gpntk.jacobians.rules.weight_sharing import Positions


@final
@dataclass(frozen=True)
class LinearRule(AbstractLayerRule):
    """df_nc/dW = sum_t g_nct a_ntᵀ and df_nc/db = sum_t g_nct.

    Index legend: b batch, n/m rows, c/d outputs, t positions, i input features, o output features, k columns.
    Factors: a `[B, N, T, I]`, g `[B, N, C, T, O]`, or None for the identity (the network's last layer).
    Flops per column: 2*N*T*O*I each way. Gram: for T = 1 the product of forward and backward covariances,
    (a·a' + 1)(g·g'), 2*N*M*(I + C²*O); for T > 1 see `positions`. Several uses are more positions.

    Attributes:
        transposed: The parameter is Wᵀ `[I, O]`.
        outputs: O.
    """

    transposed: bool
    outputs: int

    def factors(self, inputs: Tensor | None, cotangents: Tensor) -> Factors:
        assert inputs is not None
        return Factors(inputs.flatten(1, -2), cotangents.flatten(2, -2))

    def join(self, uses: list[Factors]) -> list[Factors]:
        if any(use.g is None for use in uses) or len(uses) == 1:
            return uses
        a, g = zip(*map(_pair, uses), strict=True)
        return [Factors(torch.cat(a, 2), torch.cat(g, 3))]

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

    def image(self, a: Tensor | None, w: Tensor) -> dict[str, Tensor]:
        w = w.transpose(2, 3)  # [B, N, T, K, O]
        columns, outputs = w.shape[3:]
        result = {}
        if "weight" in self.own:
            assert a is not None
            # One GEMM for all columns: [K*O, N*T] @ [N*T, I].
            product = w.flatten(1, 2).flatten(2).mT @ a.flatten(1, 2)
            result["weight"] = self._oriented(product.unflatten(1, (columns, outputs)))
        if "bias" in self.own:
            result["bias"] = w.sum((1, 2))
        return result

    def flat(self, factors: Factors) -> bool:
        return factors.g is None or factors.g.shape[3] == 1

    def gram(self, left: Factors, right: Factors) -> Tensor:
        if left.g is None or right.g is None:
            forward = self._forward(left, right)
            eye = torch.eye(self._outputs(left), dtype=forward.dtype, device=forward.device)
            return forward[:, :, None, :, None] * eye[:, None]
        if self.flat(left):
            g, g2 = left.g[:, :, :, 0], right.g[:, :, :, 0]
            backward = (g.flatten(1, 2) @ g2.flatten(1, 2).mT).unflatten(1, g.shape[1:3]).unflatten(3, g2.shape[1:3])
            return backward if self.own == ("bias",) else self._forward(left, right)[:, :, None, :, None] * backward
        return super().gram(left, right)

    def add_gram(self, out: Tensor, left: Factors, right: Factors, limit: int) -> None:
        if self.flat(left):
            out.add_(self.gram(left, right))
            return
        one, two = _pair(left)[1], _pair(right)[1]
        if "weight" in self.own:
            weight_sharing.add_gram(
                out, lambda rows: _positions(left, rows), lambda rows: _positions(right, rows), right is left, limit
            )
        if "bias" in self.own:
            weight_sharing.add_outer(out, one.sum(3), two.sum(3), limit)

    def diagonal(self, factors: Factors) -> Tensor:
        a, g = factors
        assert a is not None
        if g is None or g.shape[3] == 1:
            backward = 1.0 if g is None else g[:, :, :, 0].square().sum(-1)
            forward = a[:, :, 0].square().sum(-1, keepdim=True) * ("weight" in self.own) + ("bias" in self.own)
            return (forward * backward).expand(-1, -1, self._outputs(factors))
        total = weight_sharing.diagonal(_positions(factors, slice(None))) if "weight" in self.own else None
        if "bias" in self.own:
            term = g.sum(3).square().sum(-1)
            total = term if total is None else total + term
        assert total is not None
        return total

    def operations(self, factors: Factors) -> Operations:
        a, g = factors
        assert a is not None
        outputs, positions_, size = (1, 1, self.outputs) if g is None else g.shape[2:]
        inputs = a.shape[3] if "weight" in self.own else 0
        pair = (
            inputs + outputs**2 * size
            if positions_ == 1
            else weight_sharing.cheapest(outputs, positions_, inputs, size)[1]
        )
        return Operations(positions_ * size * (inputs + outputs), pair)

    def num_positions(self, factors: Factors) -> int:
        return 1 if factors.g is None else factors.g.shape[3]

    def sketch(self, factors: Factors, features: int, generator: torch.Generator) -> Tensor:
        a, g = factors
        assert a is not None
        if g is None:
            g = torch.eye(self._outputs(factors), dtype=a.dtype, device=a.device)[:, None].expand(
                *a.shape[:2], -1, 1, -1
            )
        # The bias is the weight of an input that is one.
        parts = [a] if "weight" in self.own else []
        parts += [a.new_ones(*a.shape[:3], 1)] if "bias" in self.own else []
        return weight_sharing.sketch(Positions(torch.cat(parts, -1), g), features, generator)

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


def _pair(factors: Factors) -> tuple[Tensor, Tensor]:
    assert factors.a is not None
    assert factors.g is not None
    return factors.a, factors.g


def _positions(factors: Factors, rows: slice) -> Positions:
    return Positions(*_pair(factors.rows(rows)))


@register(functional.linear)
def _bind_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Binding:
    operands = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return Binding(LinearRule(tuple(operands), transposed=False, outputs=weight.shape[0]), input, operands)


@register(torch.mm, Tensor.mm)
def _bind_mm(input: Tensor, mat2: Tensor) -> Binding | None:
    return _bind_matmul(input, mat2)


@register(torch.matmul, Tensor.matmul, Tensor.__matmul__)
def _bind_matmul(input: Tensor, other: Tensor) -> Binding | None:
    if other.dim() != 2 or input.dim() < 2:
        return None
    return Binding(LinearRule(("weight",), transposed=True, outputs=other.shape[1]), input, {"weight": other})
