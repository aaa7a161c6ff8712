"""A run that follows a plan: parameters run as constants at their uses, and each use leaves a tap.

Like the tape, a replay counts the calls of torch functions (`torch.overrides`) that return tensors; what a call is
named and which parameters it is given must agree with the tape, call by call. (Calls that return shapes and flags do
not count: they vary with what layers remember between runs.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from gpntk.errors import NetworkError
from gpntk.jacobians.plan import Plan, function_name, operand_slots
from gpntk.jacobians.sites import Use


class Tap(NamedTuple):
    """Where one use of parameters touched the graph of a forward pass.

    Attributes:
        inputs: The layer's inputs, rows first `[N, m, ...]`; None where the rule needs none.
        edge: The point whose derivative is wanted; shape: of the tensor there; node: that made what is passed on.
        operands: The operands that are computed from parameters, with their graph, by own name.
    """

    use: Use
    inputs: Tensor | None
    edge: GradientEdge
    shape: torch.Size
    node: Node | None
    operands: dict[str, Tensor]


@final
class Replay(TorchFunctionMode):
    """Runs parameters at the given sites as constants, and leaves a `Tap` at each."""

    def __init__(self, plan: Plan, parameters: Mapping[str, Tensor], rows: int, graph: bool) -> None:
        super().__init__()
        self.taps: list[Tap] = []
        self._plan, self._rows, self._graph = plan, rows, graph
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
        used = operand_slots(func, leaves, self._names)
        site = self._plan.sites.get(self._count)
        if site is None or func != site.function:
            returned = func(*args, **kwargs)
            outputs = [leaf for leaf in tree_flatten(returned)[0] if isinstance(leaf, Tensor)]
            if outputs:
                self._pass(func, outputs, used)
            return returned
        self._count += 1
        known = {operand.slot: operand.names for use in site.uses for operand in use.operands.values()}
        if dict(used) != known:
            raise _another_path()
        copies = [self._copy(use, leaves) for use in site.uses if use.copied]
        operands = [self._constants(use, leaves) for use in site.uses if not use.copied]
        changed: tuple[tuple[Any, ...], dict[str, Any]] = tree_unflatten(leaves, structure)
        returned = (site.replacement or func)(*changed[0], **changed[1])
        self.taps += copies
        for use, derived in zip((use for use in site.uses if not use.copied), operands, strict=True):
            returned = self._tap(use, derived, leaves, returned)
        return returned

    def check(self) -> None:
        """Raise unless the run took the path that the sites were found on, and inputs are as they were."""
        if self._count != len(self._plan.functions):
            raise _another_path()
        if any(tensor._version != version for tensor, version in self._inputs):
            raise NetworkError("the input of a layer with parameters is changed in place later on.")

    def _pass(
        self, function: Callable[..., Any], outputs: list[Tensor], used: list[tuple[int, frozenset[str]]]
    ) -> None:
        """Compare a call that is no site with the plan's."""
        functions, index = self._plan.functions, self._count
        if index >= len(functions) or index in self._plan.sites or function_name(function) != functions[index]:
            raise _another_path()
        self._count += 1
        if not used:
            return
        if index not in self._plan.preludes:
            raise _another_path()
        names = frozenset[str]().union(*(some for _, some in used))
        self._kept += outputs
        self._names |= {id(output): names for output in outputs if output.requires_grad}

    def _copy(self, use: Use, leaves: list[Any]) -> Tap:
        """Give every row a copy of the operand."""
        ((own, operand),) = use.operands.items()
        original = leaves[operand.slot]
        _check_operand(original, operand.shape)
        axis = use.rows.axis
        padded = original.detach().reshape(*[1] * (use.dims - original.dim()), *original.shape)
        sizes = [self._rows if dim == axis else size for dim, size in enumerate(padded.shape)]
        copy = padded.expand(sizes).requires_grad_()
        leaves[operand.slot] = use.rows.spread(copy)
        derived = {} if operand.direct else {own: original}
        return Tap(use, None, get_gradient_edge(copy), copy.shape, None, derived)

    def _constants(self, use: Use, leaves: list[Any]) -> dict[str, Tensor]:
        derived = {}
        for own, operand in use.operands.items():
            original = leaves[operand.slot]
            _check_operand(original, operand.shape)
            if not operand.direct:
                derived[own] = original
            leaves[operand.slot] = original.detach()
        return derived

    def _tap(self, use: Use, derived: dict[str, Tensor], leaves: list[Any], returned: Tensor) -> Tensor:
        inputs = leaves[use.input_slot]
        if inputs.shape[use.rows.axis] != self._rows * use.rows.copies:
            raise _another_path()
        inputs = inputs if self._graph else inputs.detach()
        self._inputs.append((inputs, inputs._version))
        passed_on = returned
        if not returned.requires_grad:
            # A leaf, which nothing may write to.
            passed_on = returned.requires_grad_().clone()
        edge = get_gradient_edge(returned)
        self.taps.append(Tap(use, use.rows.first(inputs), edge, returned.shape, passed_on.grad_fn, derived))
        return passed_on


def _check_operand(operand: Any, shape: torch.Size) -> None:
    if not isinstance(operand, Tensor) or operand.shape != shape:
        raise _another_path()


def _another_path() -> NetworkError:
    return NetworkError(
        "the network takes another path through its layers on other rows of x (control flow that depends on values)."
    )
