"""Uses that share parameters: tied weights, layers called twice, and weights computed from others.

J is the sum of the uses' parts, so J Jᵀ has a term for every *pair* of uses of the same parameters. Uses of the same
parameters by the same rule are joined into one with more positions. Where a parameter is used in several ways, or
through a tensor computed from it, the Gram goes through per-sample gradients, which add up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from gpntk.jacobians.rules import AbstractLayerRule, Factors
from gpntk.jacobians.uses import Operand, Use, Uses


@final
@dataclass(frozen=True)
class SharedUses:
    """Uses of the same operands by one rule.

    Attributes:
        key: Tells those of a network apart.
        uses: The uses, in the order in which they run.
        group: The group of parameters, by default the layer, that they belong to.
        needs_gradients: Whether the Gram must go through per-sample gradients.
    """

    key: int
    rule: AbstractLayerRule
    operands: dict[str, Operand]
    uses: tuple[Use, ...]
    group: str
    needs_gradients: bool


def group_uses(all_uses: Uses, group_of: Callable[[str], str]) -> tuple[SharedUses, ...]:
    """All uses of a network, those together that share their operands and their rule.

    Parameters that one call uses, but that are in several groups, take per-sample gradients: there their Grams come
    apart.
    """
    groups: dict[object, list[Use]] = {}
    for index, call in all_uses.calls.items():
        for position, use in enumerate(call.uses):
            same = tuple((own, operand.names, operand.form) for own, operand in use.operands.items())
            key = (use.rule, same) if not use.derived else (index, position)
            groups.setdefault(key, []).append(use)
    counts = Counter(name for uses in groups.values() for name in uses[0].names)
    shared = []
    for key, uses in enumerate(groups.values()):
        first = uses[0]
        owners = {group_of(name) for name in first.names}
        needs_gradients = first.derived or len(owners) > 1 or any(counts[name] > 1 for name in first.names)
        shared.append(SharedUses(key, first.rule, first.operands, tuple(uses), min(owners), needs_gradients))
    return tuple(shared)


class Derived(NamedTuple):
    """A tensor computed from parameters, as a map from them, to first order.

    Attributes:
        value: The tensor, with its graph.
        parameters: The parameters at the graph's leaves, by name.
    """

    value: Tensor
    parameters: dict[str, Tensor]

    def pull(self, images: Tensor, lead: int) -> dict[str, Tensor]:
        """The adjoint of the map, for images with ``lead`` dimensions in front: of each parameter `[..., *shape]`."""
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
        return {
            name: image.unflatten(0, images.shape[:lead]) for name, image in zip(self.parameters, pulled, strict=True)
        }

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
    """What one run leaves of uses that share parameters.

    Attributes:
        factors: Of the uses, joined into one.
        derived: Their operands that are computed from parameters, by own name.
    """

    factors: Factors
    derived: dict[str, Derived]

    def map(self, function: Callable[[Tensor], Tensor]) -> Part:
        """``function`` of every tensor among the factors."""
        return Part(Factors(*(None if t is None else function(t) for t in self.factors)), self.derived)

    def rows(self, rows: slice) -> Part:
        """The part of some of the N rows."""
        return Part(self.factors.rows(rows), self.derived)


def operand_tangents(shared: SharedUses, part: Part, tangents: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tangents of parameters `[B, K, *shape]` by name, as those of the operands by own name."""
    return {
        own: part.derived[own].push(tangents)
        if own in part.derived
        else _reshaped(tangents[min(operand.names)], operand.form)
        for own, operand in shared.operands.items()
    }


def parameter_images(
    shared: SharedUses, part: Part, images: dict[str, Tensor], lead: int
) -> Iterator[tuple[str, Tensor]]:
    """Images of operands by own name, as those of parameters by name, flat: ``lead`` dimensions and one more."""
    for own, image in images.items():
        if own in part.derived:
            for name, pulled in part.derived[own].pull(image, lead).items():
                yield name, pulled.reshape(*image.shape[:lead], -1)
        else:
            yield min(shared.operands[own].names), image.reshape(*image.shape[:lead], -1)


def _reshaped(tangent: Tensor, form: torch.Size) -> Tensor:
    return tangent.reshape(*tangent.shape[:2], *form)
