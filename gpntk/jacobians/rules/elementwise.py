"""Sums and products with a parameter that broadcasts over rows: norms' scales and shifts, tokens, positions, gains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from gpntk.jacobians.rules.rule import AbstractLayerRule, Binding, Factors, RuleSizes, outer, register

COPY = "copy"


@final
@dataclass(frozen=True)
class ElementwiseRule(AbstractLayerRule):
    """df_nc/dp itself: every row gets a copy of p of its own, whose gradient autograd sums over positions.

    Right where p is small beside the activations it meets, as the parameters of norms are. Index legend: b batch,
    n/m rows, c/d outputs, p parameters, k columns. Factors: g = df/dp `[B, N, C, P]`, no a. Flops per column:
    2*N*C*P each way. Gram: 2*N*M*C²*P. Several uses are summed. Images are flat, `[B, K, P]`.
    """

    def factors(self, inputs: tuple[Tensor, ...], cotangents: Tensor) -> Factors:
        del inputs
        return Factors(None, cotangents.reshape(*cotangents.shape[:2], -1))

    def join(self, uses: list[Factors]) -> Factors:
        return Factors(None, torch.stack([use.cotangents for use in uses]).sum(0))

    def jvp(self, factors: Factors, tangents: Mapping[str, Tensor]) -> Tensor:
        return torch.einsum("bkp,bncp->bknc", tangents[COPY].reshape(*tangents[COPY].shape[:2], -1), factors.cotangents)

    def vjp(self, factors: Factors, u: Tensor) -> dict[str, Tensor]:
        return {COPY: u.flatten(2) @ factors.cotangents.flatten(1, 2)}

    def gram(self, left: Factors, right: Factors) -> Tensor:
        return outer(left.cotangents, right.cotangents)

    def gradients(self, factors: Factors) -> dict[str, Tensor]:
        return {COPY: factors.cotangents}

    def sizes(self, factors: Factors) -> RuleSizes:
        g = factors.cotangents
        _, _, c, p = g.shape
        return RuleSizes(c * p, c**2 * p, g[:, :, 0].numel(), tile=0)


RULE = ElementwiseRule((COPY,))


def _bind_all(*args: Any, **kwargs: Any) -> Binding:
    """Every tensor among the arguments may be a parameter; the caller keeps those that are."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return Binding(RULE, (), {str(i): tensor for i, tensor in enumerate(tensors)}, copied=True)


def _bind_inplace(self: Tensor, *args: Any, **kwargs: Any) -> Binding:
    del self
    return _bind_all(*args, **kwargs)


def _repeated(p: Tensor, *sizes: Any) -> Tensor:
    """`repeat` of a p that has its copies along the rows already."""
    sizes = tuple(sizes[0]) if isinstance(sizes[0], (tuple, list)) else sizes
    return p.repeat(*(1 if p.shape[dim] == size else size for dim, size in enumerate(sizes)))


@register(Tensor.repeat)
def _bind_repeat(p: Tensor, *sizes: Any) -> Binding | None:
    if not sizes:
        return None
    lengths = tuple(sizes[0]) if isinstance(sizes[0], (tuple, list)) else sizes
    if any(length != 1 for length in lengths[1:]) or p.dim() < len(lengths) or p.shape[0] != 1:
        return None
    return Binding(RULE, (), {"0": p}, _repeated, copied=True)


_ELEMENTWISE = (
    "add",
    "sub",
    "subtract",
    "mul",
    "multiply",
    "div",
    "divide",
    "true_divide",
    "addcmul",
    "addcdiv",
    "lerp",
)
register(*(getattr(torch, name) for name in _ELEMENTWISE), torch.rsub, torch.where, torch.maximum, torch.minimum)(
    _bind_all
)
register(*(getattr(Tensor, name) for name in _ELEMENTWISE), Tensor.__rsub__, Tensor.__rdiv__)(_bind_all)
register(*(getattr(Tensor, f"{name}_") for name in _ELEMENTWISE))(_bind_inplace)
register(Tensor.expand, Tensor.expand_as, Tensor.broadcast_to, torch.broadcast_to)(_bind_all)
