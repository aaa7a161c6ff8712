"""The two passes through the network that leave every layer's factors: one forward, C backward."""

from __future__ import annotations

import warnings
from typing import final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gpntk.errors import NetworkError, UnruledError
from gpntk.jacobians.bundles import Bundle, Derived, Part, make_bundles
from gpntk.jacobians.plan import Plan, make_plan
from gpntk.jacobians.replay import Replay, Tap
from gpntk.jacobians.rules import Factors, LinearRule
from gpntk.memory import frozen, tracks_gradient
from gpntk.network import FrozenNetwork

Parts = dict[int, Part]
"""What the passes leave on some rows, by the key of the bundle."""


@final
class FactorPasses:
    """x `[B, N, D]` to the factors of every bundle of uses.

    Args:
        network: The network.
        x: Rows `[N, D]` from which the uses of its parameters are found.

    Raises:
        UnruledError: Some selected parameters are used in ways that have no rule.
        NetworkError: The calls of the network depend on the rows, or use none of its selected parameters.
    """

    plan: Plan
    bundles: tuple[Bundle, ...]

    def __init__(self, network: FrozenNetwork, x: Tensor) -> None:
        with torch.inference_mode(False):
            self.plan = make_plan(network, frozen(x))
        if self.plan.unruled:
            raise UnruledError(self.plan.unruled)
        if not self.plan.sites:
            raise NetworkError("the network uses none of its selected parameters.")
        self.bundles = make_bundles(self.plan)
        self._network = network
        self._bundle_of = {use.number: bundle for bundle in self.bundles for use in bundle.uses}

    def parts(self, x: Tensor) -> Parts:
        """The factors of the rows of x, with a graph back to x where its gradient is tracked."""
        batch, rows, _ = x.shape
        graph = tracks_gradient(x)
        with torch.inference_mode(False):
            inputs = (x if graph else frozen(x)).flatten(0, 1)
            selected = self._network.selected(x.dtype, x.device)
            parameters = {name: tensor.detach().requires_grad_() for name, tensor in selected.items()}
            with torch.enable_grad(), Replay(self.plan, parameters, batch * rows, graph) as replay:
                outputs = self._network(inputs, parameters)
            replay.check()
            taps = replay.taps
            last = [self._is_output(tap, outputs) for tap in taps]
            wanted = [tap for tap, identity in zip(taps, last, strict=True) if not identity]
            cotangents = _output_backwards(outputs, wanted, graph)
        factors: dict[int, list[Factors]] = {bundle.key: [] for bundle in self.bundles}
        derived: dict[int, dict[str, Derived]] = {bundle.key: {} for bundle in self.bundles}
        cotangents.reverse()
        for tap, identity in zip(taps, last, strict=True):
            bundle = self._bundle_of[tap.use.number]
            # Popped, so that each is freed as it is used.
            factors[bundle.key].append(_factors(tap, None if identity else cotangents.pop(), (batch, rows)))
            for own, value in tap.operands.items():
                names = sorted(tap.use.operands[own].names)
                derived[bundle.key][own] = Derived(value, {name: parameters[name] for name in names})
        return {
            bundle.key: Part(tuple(bundle.rule.join(factors[bundle.key])), derived[bundle.key])
            for bundle in self.bundles
        }

    def _is_output(self, tap: Tap, outputs: Tensor) -> bool:
        """Whether the layer's output is the network's, so that its cotangents are the identity."""
        bundle = self._bundle_of[tap.use.number]
        if not isinstance(bundle.rule, LinearRule) or bundle.entangled or len(bundle.uses) > 1:
            return False
        return tap.node is outputs.grad_fn and tap.shape == outputs.shape and tap.use.rows.copies == 1


def _output_backwards(outputs: Tensor, taps: list[Tap], graph: bool) -> list[Tensor]:
    """df_c/ds at every tap s, for every output c: `[C, *shape]`."""
    if not taps:
        return []
    edges = [tap.edge for tap in taps]
    if outputs.shape[1] == 1:
        grads = torch.autograd.grad(outputs.sum(), edges, create_graph=graph, allow_unused=True)
        grads = [None if grad is None else grad.unsqueeze(0) for grad in grads]
    else:
        grads = _batched_grads(outputs, edges, graph)
    return [
        outputs.new_zeros(outputs.shape[1], *tap.shape) if grad is None else grad
        for tap, grad in zip(taps, grads, strict=True)
    ]


def _batched_grads(outputs: Tensor, edges: list[GradientEdge], graph: bool) -> tuple[Tensor | None, ...]:
    rows, count = outputs.shape
    unit = torch.eye(count, dtype=outputs.dtype, device=outputs.device).unsqueeze(1).expand(count, rows, count)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")
            return torch.autograd.grad(
                outputs, edges, unit, is_grads_batched=True, create_graph=graph, retain_graph=True, allow_unused=True
            )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        # A backward pass that cannot be batched: one by one, which raises again what is really wrong.
        each = [
            torch.autograd.grad(outputs, edges, part, create_graph=graph, retain_graph=True, allow_unused=True)
            for part in unit
        ]
        return tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*each, strict=True))


def _factors(tap: Tap, cotangents: Tensor | None, batch: tuple[int, int]) -> Factors:
    """The factors of one use, its rows split into `[B, N]`."""
    if cotangents is None:
        assert tap.inputs is not None
        flat = Factors(tap.inputs.flatten(1, -2), None)
    elif tap.use.copied:
        flat = tap.use.rule.factors(None, cotangents.movedim(tap.use.rows.axis + 1, 0))
    else:
        flat = tap.use.rule.factors(tap.inputs, tap.use.rows.first(cotangents, leading=1).movedim(0, 1))
    return Factors(*(None if tensor is None else tensor.unflatten(0, batch) for tensor in flat))


def joined(blocks: list[Parts]) -> Parts:
    """The factors of consecutive rows as one; empties ``blocks``' parts, each freed as it is copied."""
    if len(blocks) == 1:
        return blocks[0]
    result = {}
    for key in list(blocks[0]):
        parts = [block.pop(key) for block in blocks]
        factors = tuple(_concatenated([part.factors[i] for part in parts]) for i in range(len(parts[0].factors)))
        result[key] = Part(factors, parts[0].derived)
    return result


def _concatenated(pieces: list[Factors]) -> Factors:
    a, g = zip(*pieces, strict=True)
    return Factors(*(None if some[0] is None else torch.cat(some, 1) for some in (a, g)))
