"""Activations and output gradients of every use: one forward pass that captures, C backward passes.

In the forward pass, parameters run as constants at their uses, and each use leaves a `Tap`: the layer's inputs, and the
point of the graph whose derivative is wanted. Like the recording that found the uses, it counts the calls of torch
functions (`torch.overrides`) that return tensors; what a call is named and which parameters it is given must agree,
call by call. (Calls that return shapes and flags do not count: they vary with what layers remember between runs.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from gpntk.errors import NetworkError, UnruledError
from gpntk.jacobians.rules import AbstractLayerRule, Factors
from gpntk.jacobians.shared import Derived, Part, SharedUses, group_uses
from gpntk.jacobians.uses import Use, Uses, find_uses, function_name, operands_of
from gpntk.memory import frozen, is_out_of_memory, tracks_gradient
from gpntk.network import FrozenNetwork

Parts = dict[int, Part]
"""What the passes leave on some rows, by the key of the uses that share parameters."""


@final
class Capture:
    """From x `[B, N, D]` to the factors of all uses of parameters.

    Args:
        network: The network.
        x: Rows `[N, D]` from which the uses of its parameters are found.

    Raises:
        UnruledError: Some selected parameters are used in ways that have no rule.
        NetworkError: The calls of the network depend on the rows, or use none of its selected parameters.
    """

    uses: Uses
    shared: tuple[SharedUses, ...]

    def __init__(self, network: FrozenNetwork, x: Tensor) -> None:
        with torch.inference_mode(False):
            self.uses = find_uses(network, frozen(x))
        if self.uses.unruled:
            raise UnruledError(self.uses.unruled)
        if not self.uses.calls:
            raise NetworkError("the network uses none of its selected parameters.")
        self.shared = group_uses(self.uses, network.group_of)
        self._network = network
        self._shared_of = {use.number: shared for shared in self.shared for use in shared.uses}

    def parts(self, x: Tensor, sums: Tensor | None = None) -> Parts:
        """The factors of the rows of x, with a graph back to x where its gradient is tracked.

        Of the outputs f(x), or of ``f(x) @ sums`` for sums `[C, R]`.
        """
        batch, rows, _ = x.shape
        graph = tracks_gradient(x)
        with torch.inference_mode(False):
            inputs = (x if graph else frozen(x)).flatten(0, 1)
            selected = self._network.selected(x.dtype, x.device)
            parameters = {name: tensor.detach().requires_grad_() for name, tensor in selected.items()}
            with torch.enable_grad():
                with _Capturing(self.uses, parameters, batch * rows, graph) as mode:
                    outputs = self._network(inputs, parameters)
                outputs = outputs if sums is None else outputs @ sums
            mode.check()
            taps = mode.taps
            last = [self._is_output(tap, outputs) for tap in taps]
            wanted = [tap for tap, identity in zip(taps, last, strict=True) if not identity]
            cotangents = _output_backwards(outputs, wanted, graph, batched=not self._network.scripted)
        factors: dict[int, list[Factors]] = {shared.key: [] for shared in self.shared}
        derived: dict[int, dict[str, Derived]] = {shared.key: {} for shared in self.shared}
        cotangents.reverse()
        for tap, identity in zip(taps, last, strict=True):
            key = self._shared_of[tap.use.number].key
            # Popped, so that each is freed as it is used.
            factors[key].append(_factors(tap, None if identity else cotangents.pop(), (batch, rows)))
            for own, value in tap.operands.items():
                names = sorted(tap.use.operands[own].names)
                derived[key][own] = Derived(value, {name: parameters[name] for name in names})
        return {
            shared.key: Part(_joined(shared.rule, factors[shared.key]), derived[shared.key]) for shared in self.shared
        }

    def _is_output(self, tap: Tap, outputs: Tensor) -> bool:
        """Whether the layer's output is the network's, so that its cotangents are the identity."""
        shared = self._shared_of[tap.use.number]
        if not shared.rule.takes_identity or shared.needs_gradients or len(shared.uses) > 1:
            return False
        return tap.node is outputs.grad_fn and tap.shape == outputs.shape and tap.use.rows.copies == 1


# --- private: the passes ---------------------------------------------------------------------------------------


class Tap(NamedTuple):
    """Where one use of parameters touched the graph of a forward pass.

    Attributes:
        inputs: The layer's inputs, rows first `[N, m, ...]`.
        edge: The point whose derivative is wanted; shape: of the tensor there; node: that made what is passed on.
        operands: The operands that are computed from parameters, with their graph, by own name.
    """

    use: Use
    inputs: tuple[Tensor, ...]
    edge: GradientEdge
    shape: torch.Size
    node: Node | None
    operands: dict[str, Tensor]


@final
class _Capturing(TorchFunctionMode):
    """Runs parameters at their uses as constants, and leaves a `Tap` at each."""

    def __init__(self, uses: Uses, parameters: Mapping[str, Tensor], rows: int, graph: bool) -> None:
        super().__init__()
        self.taps: list[Tap] = []
        self._uses, self._rows, self._graph = uses, rows, graph
        self._count = 0
        self._inputs: list[tuple[Tensor, int]] = []
        # What depends on parameters alone; the tensors are kept so that their ids stay theirs.
        self._kept: list[Tensor] = list(parameters.values())
        self._names = {id(tensor): frozenset([name]) for name, tensor in parameters.items()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        leaves, structure = tree_flatten((args, kwargs))
        used = operands_of(func, leaves, self._names)
        call = self._uses.calls.get(self._count)
        if call is None or func != call.function:
            returned = func(*args, **kwargs)
            outputs = [leaf for leaf in tree_flatten(returned)[0] if isinstance(leaf, Tensor)]
            if outputs:
                self._pass(func, outputs, used)
            return returned
        self._count += 1
        known = {operand.place: operand.names for use in call.uses for operand in use.operands.values()}
        if dict(used) != known:
            raise _another_path()
        copies = [self._copy(use, leaves) for use in call.uses if use.copied]
        operands = [self._constants(use, leaves) for use in call.uses if not use.copied]
        changed: tuple[tuple[Any, ...], dict[str, Any]] = tree_unflatten(leaves, structure)
        returned = (call.replacement or func)(*changed[0], **changed[1])
        self.taps += copies
        for use, derived in zip((use for use in call.uses if not use.copied), operands, strict=True):
            returned = self._tap(use, derived, leaves, returned)
        return returned

    def check(self) -> None:
        """Raise unless the run took the path that the uses were found on, and inputs are as they were."""
        if self._count != len(self._uses.functions):
            raise _another_path()
        if any(tensor._version != version for tensor, version in self._inputs):
            raise NetworkError("the input of a layer with parameters is changed in place later on.")

    def _pass(
        self, function: Callable[..., Any], outputs: list[Tensor], used: list[tuple[int, frozenset[str]]]
    ) -> None:
        """Compare a call that uses nothing by a rule with the one recorded."""
        functions, index = self._uses.functions, self._count
        if index >= len(functions) or index in self._uses.calls or function_name(function) != functions[index]:
            raise _another_path()
        self._count += 1
        if not used:
            return
        if index not in self._uses.constant:
            raise _another_path()
        names = frozenset[str]().union(*(some for _, some in used))
        self._kept += outputs
        self._names |= {id(output): names for output in outputs if output.requires_grad}

    def _copy(self, use: Use, leaves: list[Any]) -> Tap:
        """Give every row a copy of the operand."""
        ((own, operand),) = use.operands.items()
        original = leaves[operand.place]
        _check_operand(original, operand.shape)
        axis = use.rows.axis
        padded = original.detach().reshape(*[1] * (use.dims - original.dim()), *original.shape)
        sizes = [self._rows if dim == axis else size for dim, size in enumerate(padded.shape)]
        copy = padded.expand(sizes).requires_grad_()
        leaves[operand.place] = use.rows.spread(copy)
        derived = {} if operand.direct else {own: original}
        return Tap(use, (), get_gradient_edge(copy), copy.shape, None, derived)

    def _constants(self, use: Use, leaves: list[Any]) -> dict[str, Tensor]:
        derived = {}
        for own, operand in use.operands.items():
            original = leaves[operand.place]
            _check_operand(original, operand.shape)
            if not operand.direct:
                derived[own] = original
            leaves[operand.place] = original.detach()
        return derived

    def _tap(self, use: Use, derived: dict[str, Tensor], leaves: list[Any], returned: Tensor) -> Tensor:
        inputs = [leaves[place] if self._graph else leaves[place].detach() for place in use.input_places]
        if any(tensor.shape[use.rows.axis] != self._rows * use.rows.copies for tensor in inputs):
            raise _another_path()
        self._inputs += [(tensor, tensor._version) for tensor in inputs]
        passed_on = returned
        if not returned.requires_grad:
            # A leaf, which nothing may write to.
            passed_on = returned.requires_grad_().clone()
        edge = get_gradient_edge(returned)
        first = tuple(use.rows.first(tensor) for tensor in inputs)
        self.taps.append(Tap(use, first, edge, returned.shape, passed_on.grad_fn, derived))
        return passed_on


def _check_operand(operand: Any, shape: torch.Size) -> None:
    if not isinstance(operand, Tensor) or operand.shape != shape:
        raise _another_path()


def _another_path() -> NetworkError:
    return NetworkError(
        "the network takes another path through its layers on other rows of x (control flow that depends on values)."
    )


def _output_backwards(outputs: Tensor, taps: list[Tap], graph: bool, batched: bool) -> list[Tensor]:
    """df_c/ds at every tap s, for every output c: `[C, *shape]`."""
    if not taps:
        return []
    edges = [tap.edge for tap in taps]
    if outputs.shape[1] == 1:
        grads = torch.autograd.grad(outputs.sum(), edges, create_graph=graph, allow_unused=True)
        grads = [None if grad is None else grad.unsqueeze(0) for grad in grads]
    else:
        grads = _each_grads(outputs, edges, graph, batched)
    return [
        outputs.new_zeros(outputs.shape[1], *tap.shape) if grad is None else grad
        for tap, grad in zip(taps, grads, strict=True)
    ]


def _each_grads(outputs: Tensor, edges: list[GradientEdge], graph: bool, batched: bool) -> tuple[Tensor | None, ...]:
    rows, count = outputs.shape
    unit = torch.eye(count, dtype=outputs.dtype, device=outputs.device).unsqueeze(1).expand(count, rows, count)

    def grads(part: Tensor, batched: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            outputs, edges, part, is_grads_batched=batched, create_graph=graph, retain_graph=True, allow_unused=True
        )

    if batched:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")
                return grads(unit, batched=True)
        except RuntimeError as error:
            # Else a backward pass that cannot be batched: one by one, which raises again what is really wrong.
            if is_out_of_memory(error):
                raise
    each = [grads(part, batched=False) for part in unit]
    return tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*each, strict=True))


def _factors(tap: Tap, cotangents: Tensor | None, batch: tuple[int, int]) -> Factors:
    """The factors of one use, its rows split into `[B, N]`."""
    if cotangents is None:
        flat = Factors(tap.inputs[0].flatten(1, -2), None)
    elif tap.use.copied:
        flat = tap.use.rule.factors((), cotangents.movedim(tap.use.rows.axis + 1, 0))
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
        result[key] = Part(_concatenated([part.factors for part in parts]), parts[0].derived)
    return result


def _joined(rule: AbstractLayerRule, uses: list[Factors]) -> Factors:
    return rule.join(uses) if len(uses) > 1 else uses[0]


def _concatenated(pieces: list[Factors]) -> Factors:
    a, g = zip(*pieces, strict=True)
    return Factors(*(None if some[0] is None else torch.cat(some, 1) for some in (a, g)))
