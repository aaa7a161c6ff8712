"""Sums and products with a parameter that broadcasts over rows: norms' scales and shifts, tokens, positions, gains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from gpntk.jacobians.rules.rule import AbstractLayerRule, Binding, Factors, Operations, register
from gpntk.jacobians.rules.weight_sharing import sketched

COPY = "copy"


@final
@dataclass(frozen=True)
class ElementwiseRule(AbstractLayerRule):
    """df_nc/dp itself: every row gets a copy of p of its own, whose gradient autograd sums over positions.

    Right where p is small beside the activations it meets, as the parameters of norms are. Index legend: b batch,
    n/m rows, c/d outputs, p parameters, k columns. Factors: g = df/dp `[B, N, C, P]`, no a. Flops per column:
    2*N*C*P each way. Gram: 2*N*M*C²*P. Several uses are summed.

    Attributes:
        shape: The shape of p.
    """

    shape: tuple[int, ...]

    def factors(self, inputs: Tensor | None, cotangents: Tensor) -> Factors:
        del inputs
        return Factors(None, cotangents.reshape(*cotangents.shape[:2], -1))

    def join(self, uses: list[Factors]) -> list[Factors]:
        return [Factors(None, torch.stack([_gradient(use) for use in uses]).sum(0))] if len(uses) > 1 else uses

    def jvp(self, factors: Factors, tangents: Mapping[str, Tensor]) -> Tensor:
        return torch.einsum("bkp,bncp->bknc", tangents[COPY].reshape(*tangents[COPY].shape[:2], -1), _gradient(factors))

    def vjp(self, factors: Factors, u: Tensor) -> dict[str, Tensor]:
        g = _gradient(factors)
        return {COPY: (u.flatten(2) @ g.flatten(1, 2)).reshape(*u.shape[:2], *self.shape)}

    def image(self, a: Tensor | None, w: Tensor) -> dict[str, Tensor]:
        del a
        return {COPY: w.sum(1).reshape(w.shape[0], w.shape[2], *self.shape)}

    def flat(self, factors: Factors) -> bool:
        del factors
        return True

    def gram(self, left: Factors, right: Factors) -> Tensor:
        g, g2 = _gradient(left), _gradient(right)
        return (g.flatten(1, 2) @ g2.flatten(1, 2).mT).unflatten(1, g.shape[1:3]).unflatten(3, g2.shape[1:3])

    def gradients(self, factors: Factors) -> dict[str, Tensor]:
        g = _gradient(factors)
        return {COPY: g.reshape(*g.shape[:3], *self.shape)}

    def diagonal(self, factors: Factors) -> Tensor:
        return _gradient(factors).square().sum(-1)

    def add_gram(self, out: Tensor, left: Factors, right: Factors, limit: int) -> None:
        del limit
        out.add_(self.gram(left, right))

    def operations(self, factors: Factors) -> Operations:
        _, _, c, p = _gradient(factors).shape
        return Operations(c * p, c**2 * p)

    def sketch(self, factors: Factors, features: int, generator: torch.Generator) -> Tensor:
        return sketched(_gradient(factors), features, generator)


def _gradient(factors: Factors) -> Tensor:
    assert factors.g is not None
    return factors.g


def _bind_all(*args: Any, **kwargs: Any) -> Binding:
    """Every tensor among the arguments may be a parameter; the caller keeps those that are."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return Binding(ElementwiseRule((COPY,), shape=()), None, {str(i): tensor for i, tensor in enumerate(tensors)})


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
    return Binding(ElementwiseRule((COPY,), shape=()), None, {"0": p}, _repeated)


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
