"""What a layer rule is, and which layer types have one.

For a layer applied to a, giving s, a rule knows how its parameters move f through s: with g = df/ds (one per output of
the network), products with the layer's block of J need a and g only, never a per-sample gradient of the weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn


class Factors(NamedTuple):
    """What one forward pass and C output-backwards leave of a layer.

    Attributes:
        a: Layer inputs `[B, N, T, I]`; T positions share the weight (T = 1 for a plain Linear), I input features.
        g: Derivatives of the network's outputs with respect to the layer's outputs, `[B, N, C, T, O]`.
    """

    a: Tensor
    g: Tensor

    def rows(self, rows: slice) -> Factors:
        """The factors of some of the N rows."""
        return Factors(self.a[:, rows], self.g[:, rows])


class AbstractLayerRule(ABC):
    """Products with one layer's block of the Jacobian, from its `Factors`.

    ``names`` maps the layer's own names of its selected parameters ("weight", "bias") to the network's. Tangents and
    cotangent images are dictionaries by own name: `[B, K, *shape]`.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = dict(names)

    @abstractmethod
    def factors(self, inputs: Tensor, cotangents: Tensor) -> Factors:
        """Factors from the layer's inputs `[N, ...]` and df/ds `[N, C, ...]`, with B = 1."""

    @abstractmethod
    def jvp(self, factors: Factors, tangents: Mapping[str, Tensor]) -> Tensor:
        """The layer's part of J v, `[B, K, N, C]`."""

    @abstractmethod
    def vjp(self, factors: Factors, u: Tensor) -> dict[str, Tensor]:
        """The layer's part of Jᵀ u for u `[B, K, N, C]`: `[B, K, *shape]` by own name."""

    @abstractmethod
    def gram(self, left: Factors, right: Factors) -> Tensor:
        """The layer's part of J Jᵀ, `[B, N, C, M, C]`."""

    def diagonal(self, factors: Factors) -> Tensor:
        """Diagonal of ``gram(factors, factors)``, `[B, N, C]`: each row as a batch of its own."""
        batch, rows = factors.a.shape[:2]
        single = Factors(*(tensor.flatten(0, 1).unsqueeze(1) for tensor in factors))
        return self.gram(single, single)[:, 0, :, 0].diagonal(dim1=-2, dim2=-1).unflatten(0, (batch, rows))


_RULES: dict[type[nn.Module], Callable[[Mapping[str, str]], AbstractLayerRule]] = {}


def register(*types: type[nn.Module]) -> Callable[[type[AbstractLayerRule]], type[AbstractLayerRule]]:
    """Class decorator: this rule serves exactly these layer types (a subclass may compute something else)."""

    def decorate(rule: type[AbstractLayerRule]) -> type[AbstractLayerRule]:
        _RULES.update(dict.fromkeys(types, rule))
        return rule

    return decorate


def rule_for(layer: nn.Module, names: Mapping[str, str]) -> AbstractLayerRule | None:
    """The rule for a layer's selected parameters, or None where there is none."""
    rule = _RULES.get(type(layer))
    return None if rule is None else rule(names)
