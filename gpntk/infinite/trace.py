"""From an ``nn.Module`` to the recursion of its infinite-width limit: one step for each call in its ``forward``.

The module is traced by ``torch.fx``, and run on inputs of zeros for the shapes between its layers. Followed along are
what each axis of a tensor means (rows, channels, which become infinitely many, and spatial positions), and how its
units are distributed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn
from torch.fx.node import map_arg
from torch.nn.utils.parametrize import is_parametrized

from gpntk._types import Extract
from gpntk.errors import InputError, UnsupportedLayerError
from gpntk.infinite.calls import WAY_OUT, Call, Rule
from gpntk.infinite.graph import Traced, name_of, run_forward, with_constants
from gpntk.infinite.program import Program, Step, paired
from gpntk.infinite.rules import FUNCTIONS, METHODS, MODULES, SPATIAL, activation_rule
from gpntk.infinite.units import INPUT, Units


def trace(module: nn.Module, input_shape: Sequence[int], extract: Extract | None = None) -> Program:
    """The recursion of a module whose inputs have shape ``input_shape``.

    Args:
        module: The network.
        input_shape: Of one input, without the axis of rows.
        extract: Turns what the network returns (a dict, say) into the output that is meant.

    Raises:
        UnsupportedLayerError: A call has no limit that is known here; the message names it.
        InputError: The module does not run on such inputs.
    """
    shape = tuple(int(size) for size in input_shape)
    if not 1 <= len(shape) <= 3:
        raise InputError(f"input_shape={shape} must be of features, or of channels and one or two axes of positions.")
    # torch.fx looks into the one layer that a network may be.
    traced = run_forward(nn.Sequential(module) if isinstance(module, tuple(MODULES)) else module, shape, extract)
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


def _channels_last(nodes: Sequence[fx.Node], modules: Mapping[str, nn.Module], shape: tuple[int, ...]) -> bool:
    """Tokens have their channels last, images first: told by whether a convolution or a pooling sees them."""
    kinds = {type(modules[str(node.target)]) if node.op == "call_module" else node.target for node in nodes}
    return len(shape) > 1 and not kinds & SPATIAL


class _Compiler:
    """Steps, collected node by node."""

    def __init__(self, traced: Traced, modules: Mapping[str, nn.Module], channels_last: bool) -> None:
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
            name=name_of(node),
            module=self._modules[str(node.target)] if node.op == "call_module" else None,
            args=with_constants(node.args, constants),
            kwargs=dict(with_constants(node.kwargs, constants)),
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
            made = (METHODS if node.op == "call_method" else FUNCTIONS).get(node.target)
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
    """That a module computes with its own parameters what its class says."""
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
