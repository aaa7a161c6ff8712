"""The uses of a network's parameters, bundled: those of the same parameters by the same rule belong together.

J is the sum of the uses' parts, so J Jᵀ has a term for every *pair* of uses of the same parameters. Uses in a bundle
are joined into one (more positions, say). What cannot be joined is *entangled*: a parameter in several bundles, or
used through a tensor computed from it; its Gram goes through per-sample gradients, which simply add up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from gpntk.jacobians.plan import Plan
from gpntk.jacobians.rules import AbstractLayerRule, Factors
from gpntk.jacobians.sites import Operand, Use
from gpntk.network.selection import layer_name


@final
@dataclass(frozen=True)
class Bundle:
    """Uses with one rule and the same operands.

    Attributes:
        key: Identifies the bundle.
        uses: The uses, in the order in which they run.
        layer: The layer that owns the parameters.
        entangled: Whether its Gram must go through per-sample gradients.
    """

    key: int
    rule: AbstractLayerRule
    operands: dict[str, Operand]
    uses: tuple[Use, ...]
    layer: str
    entangled: bool

    @property
    def names(self) -> frozenset[str]:
        """The parameters used."""
        return self.uses[0].names


def make_bundles(plan: Plan) -> tuple[Bundle, ...]:
    """The bundles of all uses of a plan."""
    groups: dict[object, list[Use]] = {}
    for index, site in plan.sites.items():
        for position, use in enumerate(site.uses):
            same = tuple((own, operand.names, operand.form) for own, operand in use.operands.items())
            key = (use.rule, same) if not use.entangled else (index, position)
            groups.setdefault(key, []).append(use)
    counts = Counter(name for uses in groups.values() for name in uses[0].names)
    bundles = []
    for key, uses in enumerate(groups.values()):
        first = uses[0]
        layers = {layer_name(name) for name in first.names}
        entangled = first.entangled or len(layers) > 1 or any(counts[name] > 1 for name in first.names)
        bundles.append(Bundle(key, first.rule, first.operands, tuple(uses), min(layers), entangled))
    return tuple(bundles)


class Derived(NamedTuple):
    """A tensor computed from parameters, as a map from them, to first order.

    Attributes:
        value: The tensor, with its graph.
        parameters: The parameters at the graph's leaves, by name.
    """

    value: Tensor
    parameters: dict[str, Tensor]

    def pull(self, images: Tensor) -> dict[str, Tensor]:
        """The adjoint of the map, for `[..., *shape]`: `[..., *shape]` of each parameter."""
        lead = images.shape[: images.dim() - self.value.dim()]
        with torch.inference_mode(False):
            pulled = torch.autograd.grad(
                self.value,
                tuple(self.parameters.values()),
                images.reshape(-1, *self.value.shape),
                retain_graph=True,
                create_graph=torch.is_grad_enabled() and images.requires_grad,
                is_grads_batched=True,
                allow_unused=True,
                materialize_grads=True,
            )
        return {name: image.unflatten(0, lead) for name, image in zip(self.parameters, pulled, strict=True)}

    def push(self, tangents: dict[str, Tensor]) -> Tensor:
        """The map itself, for tangents `[B, K, *shape]` of each parameter: `[B, K, *shape]`.

        As the adjoint of the adjoint, which needs no forward-mode formulas.
        """
        chosen = [tangents[name] for name in self.parameters]
        lead = chosen[0].shape[:2]
        with torch.inference_mode(False):
            graph = torch.is_grad_enabled() and any(tangent.requires_grad for tangent in chosen)
            with torch.enable_grad():
                dual = torch.zeros_like(self.value).requires_grad_()
                pulled = torch.autograd.grad(
                    self.value, tuple(self.parameters.values()), dual, create_graph=True, allow_unused=True
                )
            pairs = [(image, tangent) for image, tangent in zip(pulled, chosen, strict=True) if image is not None]
            (pushed,) = torch.autograd.grad(
                [image for image, _ in pairs],
                dual,
                [tangent.flatten(0, 1) for _, tangent in pairs],
                create_graph=graph,
                is_grads_batched=True,
            )
        return pushed.unflatten(0, lead)


class Part(NamedTuple):
    """What one run leaves of one bundle.

    Attributes:
        factors: Of its uses, joined as far as they can be.
        derived: Its operands that are computed from parameters, by own name.
    """

    factors: tuple[Factors, ...]
    derived: dict[str, Derived]

    def map(self, function: Callable[[Tensor], Tensor]) -> Part:
        """``function`` of every tensor among the factors."""
        return Part(
            tuple(Factors(*(None if t is None else function(t) for t in factors)) for factors in self.factors),
            self.derived,
        )

    def rows(self, rows: slice) -> Part:
        """The part of some of the N rows."""
        return Part(tuple(factors.rows(rows) for factors in self.factors), self.derived)


def operand_tangents(bundle: Bundle, part: Part, tangents: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tangents of parameters `[B, K, *shape]` by name, as those of the bundle's operands by own name."""
    return {
        own: part.derived[own].push(tangents)
        if own in part.derived
        else _reshaped(tangents[min(operand.names)], operand.form)
        for own, operand in bundle.operands.items()
    }


def parameter_images(bundle: Bundle, part: Part, images: dict[str, Tensor], lead: int) -> Iterator[tuple[str, Tensor]]:
    """Images of operands by own name, as those of parameters by name, flat: ``lead`` dimensions and one more."""
    for own, image in images.items():
        if own in part.derived:
            for name, pulled in part.derived[own].pull(image).items():
                yield name, pulled.reshape(*image.shape[:lead], -1)
        else:
            yield min(bundle.operands[own].names), image.reshape(*image.shape[:lead], -1)


def _reshaped(tangent: Tensor, form: torch.Size) -> Tensor:
    return tangent.reshape(*tangent.shape[:2], *form)
