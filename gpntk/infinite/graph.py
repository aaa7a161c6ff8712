"""A module's ``forward`` as a list of calls, with what is seen of each when it runs."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.nn.parameter import is_lazy

from gpntk._types import Extract
from gpntk.errors import InputError, UnsupportedLayerError
from gpntk.infinite.activations import Activation
from gpntk.infinite.attention import TiedAttention
from gpntk.infinite.calls import WAY_OUT
from gpntk.infinite.locally_connected import LocallyConnected

# Two numbers of rows tell the axis of rows from one that has the same size by chance.
_ROWS = (2, 3)
# What may be asked of a tensor without looking at its values.
_QUESTIONS = ("size", "dim", "ndimension", "numel", "shape", "ndim", "dtype", "device")
# Own modules that have a rule.
_LEAVES = (Activation, LocallyConnected, TiedAttention)


@final
@dataclass(frozen=True)
class Seen:
    """A tensor that was seen in two runs.

    Attributes:
        shape: In the first.
        rows: Which axis has a row for every input; None if none has.
    """

    shape: tuple[int, ...]
    rows: int | None


@final
@dataclass(frozen=True)
class Traced:
    """Attributes: module: With its calls as ``module.graph``; seen: every tensor; constants: every other result."""

    module: fx.GraphModule
    seen: dict[fx.Node, Seen]
    constants: dict[fx.Node, Any]


def name_of(node: fx.Node) -> str:
    """The qualified name of a module, the name of a method, or a function's as torch.fx numbers it."""
    return str(node.target) if node.op in ("call_module", "call_method") else node.name


def run_forward(module: nn.Module, shape: tuple[int, ...], extract: Extract | None) -> Traced:
    """The calls of a module on inputs of one shape.

    Raises:
        UnsupportedLayerError: ``forward`` depends on values, takes several inputs, or changes a tensor that it uses
            again.
        InputError: It does not run on such inputs.
    """
    if any(map(is_lazy, module.parameters())):
        raise InputError("the network has lazy layers whose sizes are not known yet: run it on an input once.")
    traced = _trace(module, extract)
    parameter = next(module.parameters(), torch.zeros(0))
    was = {name: child.training for name, child in module.named_modules()}
    traced.eval()
    try:
        runs = [_Run(traced) for _ in _ROWS]
        with torch.no_grad():
            for rows, run in zip(_ROWS, runs, strict=True):
                run.run(torch.zeros(rows, *shape, dtype=parameter.dtype, device=parameter.device))
    except UnsupportedLayerError:
        raise
    except Exception as error:
        raise InputError(f"the network does not run on inputs of shape {shape}: {error}") from None
    finally:
        for name, child in module.named_modules():
            child.training = was[name]
    return _compared(traced, runs[0].results, runs[1].results)


class _Proxy(fx.Proxy):
    """A proxy that tells ``h += g``, which changes a tensor, from ``h + g``."""

    def _in_place(self, function: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> Any:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._in_place(operator.itruediv, other)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _LEAVES) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def _trace(module: nn.Module, extract: Extract | None) -> fx.GraphModule:
    arguments = list(inspect.signature(module.forward).parameters.values())
    defaults = {entry.name: entry.default for entry in arguments[1:] if entry.default is not entry.empty}
    single = [entry for entry in arguments if entry.name not in defaults]
    if len(single) != 1 or single[0].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
        raise UnsupportedLayerError("forward takes several inputs: a kernel is a function of one.")
    tracer = _Tracer()
    try:
        graph = tracer.trace(module, defaults or None)
    except Exception as error:
        raise UnsupportedLayerError(
            f"torch.fx cannot trace the network ({error}): its forward may depend on values. {WAY_OUT}"
        ) from None
    if extract is not None:
        _append(tracer, graph, extract)
    return fx.GraphModule(module, graph)


def _append(tracer: _Tracer, graph: fx.Graph, extract: Extract) -> None:
    """Let a graph return what ``extract`` makes of its result."""
    end = next(node for node in reversed(graph.nodes) if node.op == "output")

    def proxied(entry: Any) -> Any:
        return tracer.proxy(entry) if isinstance(entry, fx.Node) else entry

    returned = map_aggregate(end.args[0], proxied)
    with graph.inserting_before(end):
        try:
            end.args = (tracer.create_arg(extract(returned)),)
        except Exception as error:
            raise InputError(f"extract cannot take what the network returns, {end.args[0]}: {error!r}.") from None


class _Run(fx.Interpreter):
    """One run, which notices what is changed in place."""

    def __init__(self, module: fx.GraphModule) -> None:
        # Nothing is freed, so that two tensors with the same memory are views of each other.
        super().__init__(module, garbage_collect_values=False)
        self.extra_traceback = False
        self.results: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        before = {node: self.results[node]._version for node in n.all_input_nodes if self._is_tensor(node)}
        result = super().run_node(n)
        changed = [node for node, version in before.items() if self.results[node]._version != version]
        for node in changed:
            self._check_unused(n, self.results[node])
        self.results[n] = result
        return result

    def _is_tensor(self, node: fx.Node) -> bool:
        return isinstance(self.results[node], Tensor)

    def _check_unused(self, writer: fx.Node, changed: Tensor) -> None:
        """That what was computed before, and has the memory that ``writer`` changes, has no later use."""
        later = set(_after(writer))
        memory = changed.untyped_storage().data_ptr()
        for node, value in self.results.items():
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() == memory and later & set(node.users):
                raise UnsupportedLayerError(
                    f"{name_of(writer)} changes {name_of(node)} in place, which is used again afterwards: use the "
                    f"form that is not in place, or its result only. {WAY_OUT}"
                )


def _after(node: fx.Node) -> Iterator[fx.Node]:
    while node.op != "output":
        node = node.next
        yield node


def _compared(traced: fx.GraphModule, one: dict[fx.Node, Any], two: dict[fx.Node, Any]) -> Traced:
    """What both runs saw."""
    seen: dict[fx.Node, Seen] = {}
    constants: dict[fx.Node, Any] = {}
    for node in traced.graph.nodes:
        first, second = one[node], two[node]
        if isinstance(first, Tensor):
            grown = [
                dim for dim, sizes in enumerate(zip(first.shape, second.shape, strict=False)) if sizes[0] != sizes[1]
            ]
            is_rows = len(grown) == 1 and (first.shape[grown[0]], second.shape[grown[0]]) == _ROWS
            seen[node] = Seen(tuple(first.shape), grown[0] if is_rows else None)
        elif node.op != "output":
            constants[node] = _constant(node, first, second, set(seen))
    return Traced(traced, seen, constants)


def _constant(node: fx.Node, first: Any, second: Any, tensors: set[fx.Node]) -> Any:
    """A result that is no tensor; the node itself where it depends on the number of rows."""
    question = node.args[1] if node.target is getattr else node.target
    if any(entry in tensors for entry in node.all_input_nodes) and question not in _QUESTIONS:
        kind = getattr(node.target, "__name__", str(node.target))
        raise UnsupportedLayerError(f"{name_of(node)} ({kind}) has no known limit. {WAY_OUT}")
    return first if first == second else node


def with_constants(arguments: Any, constants: dict[fx.Node, Any]) -> Any:
    """A call's arguments, with the values of those that are no tensors."""
    return map_aggregate(arguments, lambda entry: constants.get(entry, entry) if isinstance(entry, fx.Node) else entry)
