"""From an ``nn.Module`` to the recursion of its infinite-width limit: one step for each call in its ``forward``.

The module is traced by ``torch.fx``, and run on inputs of zeros for the shapes between its layers. Followed along are
what each axis of a tensor means (rows, channels, which become infinitely many, and spatial positions), and how its
units are distributed. (Structured Jacobians record one run by a ``TorchFunctionMode``; here any input's calls count.)
"""

from __future__ import annotations

import contextlib
import inspect
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from gpntk._checks import as_shape, check_kinds, is_number
from gpntk._types import Extract
from gpntk.errors import InputError, UnsupportedLayerError
from gpntk.infinite.modules import Activation, LocallyConnected, TiedAttention
from gpntk.infinite.program import INPUT, WAY_OUT, Call, Program, Rule, Step, Units, paired
from gpntk.infinite.rules import CALLS, MODULES, SPATIAL, activation_rule

# Two numbers of rows tell the axis of rows from one that has the same size by chance.
_ROWS = (2, 3)
# What may be asked of a tensor without looking at its values.
_QUESTIONS = ("size", "dim", "ndimension", "numel", "shape", "ndim", "dtype", "device")
# Own modules that have a rule.
_LEAVES = (Activation, LocallyConnected, TiedAttention)


def trace(module: nn.Module, input_shape: Sequence[int] | int | None = None, extract: Extract | None = None) -> Program:
    """The recursion of a module whose inputs have shape ``input_shape``.

    Args:
        module: The network.
        input_shape: Shape of one input, without the axis of rows. Not needed where the first layer is ``Linear``.
        extract: Turns what the network returns (a dict, say) into the output that is meant.

    Raises:
        UnsupportedLayerError: A call has no limit that is known here; the message names it.
        InputError: ``input_shape`` is none, or the module does not run on such inputs.
    """
    shape = _input_shape(module, input_shape)
    if not 1 <= len(shape) <= 3:
        raise InputError(f"input_shape={shape} must be of features, or of channels and one or two axes of positions.")
    # torch.fx looks into the one layer that a network may be.
    traced = _run_forward(nn.Sequential(module) if isinstance(module, tuple(MODULES)) else module, shape, extract)
    modules = dict(traced.module.named_modules())
    start, *nodes, end = [node for node in traced.module.graph.nodes if node in traced.seen or node.op == "output"]
    if extract is not None:
        needed = _ancestors(end)
        nodes = [node for node in nodes if node in needed]

    def compiled(channels_last: bool) -> Program:
        compiler = _Compiler(traced, modules, channels_last)
        compiler.place(start)
        for node in nodes:
            compiler.add(node)
        return compiler.program(end.args[0], shape)

    likely = _channels_last(nodes, modules, shape)
    try:
        return compiled(likely)
    except UnsupportedLayerError as error:
        # A network that begins with a permutation, say. Which axis the first weights act on is all that matters.
        with contextlib.suppress(UnsupportedLayerError):
            if len(shape) > 1:
                return compiled(not likely)
        raise error from None


def _input_shape(module: nn.Module, given: Sequence[int] | int | None) -> tuple[int, ...]:
    check_kinds(nn.Module, "an nn.Module", network=module)
    if given is not None:
        return as_shape((given,) if is_number(given) else given)
    first = next((child for child in module.modules() if list(child.parameters(recurse=False))), None)
    if not isinstance(first, nn.Linear):
        raise InputError("input_shape is needed: the shape of one input, such as (3, 32, 32).")
    return (first.in_features,)


def _channels_last(nodes: Sequence[fx.Node], modules: Mapping[str, nn.Module], shape: tuple[int, ...]) -> bool:
    """Tokens have their channels last, images first: told by whether a convolution or a pooling sees them."""
    kinds = {type(modules[str(node.target)]) if node.op == "call_module" else node.target for node in nodes}
    return len(shape) > 1 and not kinds & SPATIAL


class _Compiler:
    """Collects the steps of a program, node by node."""

    def __init__(self, traced: _Traced, modules: Mapping[str, nn.Module], channels_last: bool) -> None:
        self._traced, self._modules, self._channels_last = traced, modules, channels_last
        self._numbers: dict[fx.Node, int] = {}
        self._roles: dict[fx.Node, tuple[str, ...]] = {}
        self._units: dict[fx.Node, Units] = {}
        self._steps: list[Step] = []
        self._layers: dict[str, tuple[int, bool]] = {}
        self._owners: dict[int, str] = {}

    def place(self, node: fx.Node) -> None:
        spatial = tuple(f"s{index}" for index in range(len(self._traced.seen[node].shape) - 2))
        roles = ("n", *spatial, "c") if self._channels_last and spatial else ("n", "c", *spatial)
        self._numbers[node], self._roles[node], self._units[node] = 0, roles, INPUT

    def add(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            raise UnsupportedLayerError(f"{node.target}: parameters used outside of a layer have no rule. {WAY_OUT}")
        seen, constants = self._traced.seen, self._traced.constants
        inputs = [value for value in _nodes(node) if value in seen]
        call = Call(
            name=_name_of(node),
            module=self._modules[str(node.target)] if node.op == "call_module" else None,
            args=_with_constants(node.args, constants),
            kwargs=dict(_with_constants(node.kwargs, constants)),
            roles=[self._roles[value] for value in inputs],
            units=[self._units[value] for value in inputs],
            shapes=[seen[value].shape for value in inputs],
            output=seen[node].shape,
        )
        rule = self._rule(node, call)
        if seen[node].rows != rule.roles.index("n"):
            raise call.refuse(
                f"its result, of shape {call.output} for two inputs, has no axis of inputs: begin its shape by the "
                "number of inputs"
            )
        layer = None if rule.fan_in is None else self._layer(call, rule.fan_in, rule.bias)
        self._steps.append(Step(rule, tuple(self._numbers[value] for value in inputs), layer))
        self._numbers[node], self._roles[node], self._units[node] = len(self._steps), rule.roles, rule.units

    def _layer(self, call: Call, fan_in: int, bias: bool) -> int:
        """The number of a layer with weights of its own."""
        assert call.module is not None
        if call.name in self._layers:
            raise call.refuse("it is called twice, so that its uses are not independent")
        for parameter in call.module.parameters():
            owner = self._owners.setdefault(id(parameter), call.name)
            if owner != call.name:
                raise call.refuse(f"it shares parameters with {owner}, so that they are not independent")
        self._layers[call.name] = fan_in, bias
        return len(self._layers) - 1

    def _rule(self, node: fx.Node, call: Call) -> Rule:
        if call.module is not None:
            _check_plain(call, call.module)
            made = next((make for kind, make in MODULES.items() if isinstance(call.module, kind)), None)
            target: Any = call.module
        else:
            made = CALLS.get(node.target)
            target = node.target
        if made is not None:
            return made(call)
        rule = activation_rule(target, call)
        if rule is None:
            kind = type(call.module).__name__ if call.module is not None else getattr(target, "__name__", str(target))
            raise UnsupportedLayerError(
                f"{call.name} ({kind}) has no known limit. An elementwise function has one as the layer "
                f"gpntk.infinite.Activation. {WAY_OUT}"
            )
        return rule

    def program(self, end: Any, shape: tuple[int, ...]) -> Program:
        if not isinstance(end, fx.Node) or self._numbers.get(end) != len(self._steps):
            raise UnsupportedLayerError("forward must return one tensor, the result of its last call.")
        if len(self._roles[end]) > 2:
            raise UnsupportedLayerError(f"the output has positions left {self._roles[end]}: flatten or pool them.")
        fan_ins = tuple(fan_in for fan_in, _ in self._layers.values())
        biases = tuple(bias for _, bias in self._layers.values())
        positions = max(
            math.prod(size for size, role in zip(self._traced.seen[node].shape, roles, strict=True) if role[0] == "s")
            for node, roles in self._roles.items()
        )
        names, steps = tuple(self._layers), tuple(self._steps)
        return Program(steps, paired(steps), names, fan_ins, biases, shape, self._channels_last, positions)


def _check_plain(call: Call, module: nn.Module) -> None:
    """Raise unless a module computes with its own parameters what its class says."""
    if is_parametrized(module):
        raise call.refuse("it is parametrized, so that its weights are not independent draws: remove that")
    if module._forward_pre_hooks or module._forward_hooks:
        raise call.refuse("it has hooks, which may change what it computes: remove them")


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """The nodes that a value is made of."""
    found, rest = set[fx.Node](), [node]
    while rest:
        new = set(rest.pop().all_input_nodes) - found
        found |= new
        rest += new
    return found


def _nodes(node: fx.Node) -> list[fx.Node]:
    """The nodes among a call's arguments, in order, with repetitions."""
    found: list[fx.Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


# --- the calls of a module -----------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class _Seen:
    """A tensor that was seen in two runs.

    Attributes:
        shape: Its shape in the first.
        rows: Which axis has a row for every input; None if none has.
    """

    shape: tuple[int, ...]
    rows: int | None


@final
@dataclass(frozen=True)
class _Traced:
    """A module's ``forward`` as a list of calls, with what was seen of each when it ran.

    Attributes:
        module: The module, with its calls as ``module.graph``.
        seen: Every result that is a tensor.
        constants: Every other result.
    """

    module: fx.GraphModule
    seen: dict[fx.Node, _Seen]
    constants: dict[fx.Node, Any]


def _name_of(node: fx.Node) -> str:
    """The qualified name of a module, the name of a method, or a function's as torch.fx numbers it."""
    return str(node.target) if node.op in ("call_module", "call_method") else node.name


def _run_forward(module: nn.Module, shape: tuple[int, ...], extract: Extract | None) -> _Traced:
    """The calls of a module on inputs of one shape.

    Raises:
        UnsupportedLayerError: ``forward`` depends on values, takes several inputs, or changes a tensor used again.
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
        raise InputError(f"the network does not run on inputs of shape {shape}: {error}") from error
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
        inputs = {node: self.results[node] for node in n.all_input_nodes}
        before = {node: value._version for node, value in inputs.items() if isinstance(value, Tensor)}
        result = super().run_node(n)
        for node, version in before.items():
            if inputs[node]._version != version:
                self._check_unused(n, inputs[node])
        self.results[n] = result
        return result

    def _check_unused(self, writer: fx.Node, changed: Tensor) -> None:
        """Raise if what was computed before, and has the memory that ``writer`` changes, has a later use."""
        later = set(_after(writer))
        memory = changed.untyped_storage().data_ptr()
        for node, value in self.results.items():
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() == memory and later & set(node.users):
                raise UnsupportedLayerError(
                    f"{_name_of(writer)} changes {_name_of(node)} in place, which is used again afterwards: use the "
                    f"form that is not in place, or its result only. {WAY_OUT}"
                )


def _after(node: fx.Node) -> Iterator[fx.Node]:
    while node.op != "output":
        node = node.next
        yield node


def _compared(traced: fx.GraphModule, one: dict[fx.Node, Any], two: dict[fx.Node, Any]) -> _Traced:
    """What both runs have in common: axes of rows, shapes and constants."""
    seen: dict[fx.Node, _Seen] = {}
    constants: dict[fx.Node, Any] = {}
    for node in traced.graph.nodes:
        first, second = one[node], two[node]
        if isinstance(first, Tensor):
            grown = [
                dim for dim, sizes in enumerate(zip(first.shape, second.shape, strict=False)) if sizes[0] != sizes[1]
            ]
            is_rows = len(grown) == 1 and (first.shape[grown[0]], second.shape[grown[0]]) == _ROWS
            seen[node] = _Seen(tuple(first.shape), grown[0] if is_rows else None)
        elif node.op != "output":
            constants[node] = _constant(node, first, second, set(seen))
    return _Traced(traced, seen, constants)


def _constant(node: fx.Node, first: Any, second: Any, tensors: set[fx.Node]) -> Any:
    """A result that is no tensor; the node itself where it depends on the number of rows."""
    question = node.args[1] if node.target is getattr else node.target
    if any(entry in tensors for entry in node.all_input_nodes) and question not in _QUESTIONS:
        kind = getattr(node.target, "__name__", str(node.target))
        raise UnsupportedLayerError(f"{_name_of(node)} ({kind}) has no known limit. {WAY_OUT}")
    return first if first == second else node


def _with_constants(arguments: Any, constants: dict[fx.Node, Any]) -> Any:
    """A call's arguments, with the values of those that are no tensors."""
    return map_aggregate(arguments, lambda entry: constants.get(entry, entry) if isinstance(entry, fx.Node) else entry)
