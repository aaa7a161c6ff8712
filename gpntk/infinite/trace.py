"""From an ``nn.Module`` to the recursion of its infinite-width limit: one step for each call in its ``forward``.

The module is traced by ``torch.fx``, and run once on one input of zeros for the shapes between its layers. What each
axis of a tensor means is followed along: rows, channels (which become infinitely many) and spatial positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.fx.passes.shape_prop import ShapeProp

from gpntk.errors import InputError, UnsupportedLayerError
from gpntk.infinite.layers import Parametrization, Weights
from gpntk.infinite.moments import Block, LayerMoments, inner_products, own_products
from gpntk.infinite.rules import FUNCTIONS, METHODS, MODULES, Call, Rule, activation_rule

_WAY_OUT = "gpntk.infinite.monte_carlo estimates the kernels of any architecture."


class Step(NamedTuple):
    """One call: what it does to the moments of its inputs, and which earlier values those are."""

    rule: Rule
    inputs: tuple[int, ...]
    layer: int | None


@final
@dataclass(frozen=True)
class Program:
    """The recursion of one network.

    Attributes:
        steps: In order; value 0 is the input, value i + 1 the result of step i.
        pairs: Of every value, whether it is needed at pairs of positions.
        layers: Names of the layers with weights.
        fan_ins: Their numbers of inputs.
        biases: Whether they have a bias.
        input_shape: Of one input.
        channels_last: Whether its channels are the last axis, not the first.
    """

    steps: tuple[Step, ...]
    pairs: tuple[bool, ...]
    layers: tuple[str, ...]
    fan_ins: tuple[int, ...]
    biases: tuple[bool, ...]
    input_shape: tuple[int, ...]
    channels_last: bool

    @property
    def positions(self) -> int:
        """Largest number of positions, or pairs of them, of any value."""
        sizes = self.input_shape[:-1] if self.channels_last else self.input_shape[1:]
        total = 1
        for size in sizes:
            total *= size
        return total**2 if any(self.pairs) else total

    def run(
        self, start: LayerMoments, weights: Sequence[Weights], settle: Callable[[LayerMoments], LayerMoments]
    ) -> LayerMoments:
        """The moments of the output; ``settle`` is applied after every step."""
        values: list[LayerMoments | None] = [start]
        last_use = self._last_uses()
        for number, step in enumerate(self.steps):
            states = [_known(values[index]) for index in step.inputs]
            own = None if step.layer is None else weights[step.layer]
            state = settle(step.rule.apply(states, own))
            values.append(state if self.pairs[number + 1] else state.equal_positions())
            for index in step.inputs:
                if last_use[index] == number:
                    values[index] = None
        return _known(values[-1])

    def _last_uses(self) -> dict[int, int]:
        return {index: number for number, step in enumerate(self.steps) for index in step.inputs}

    def start(self, x1: Tensor, x2: Tensor, ntk: bool) -> LayerMoments:
        """The moments of the inputs, x `[N, D]`."""
        one, two = self._shaped(x1), self._shaped(x2)
        pairs = self.pairs[0]
        nngps = inner_products(one, two, pairs), own_products(one, pairs), own_products(two, pairs)
        blocks = [Block(nngp, torch.zeros_like(nngp) if ntk else None) for nngp in nngps]
        axes = one.dim() - 2
        return LayerMoments(*blocks, axes=axes, pairs=pairs and axes > 0, gaussian=False)

    def _shaped(self, x: Tensor) -> Tensor:
        shaped = x.reshape(x.shape[0], *self.input_shape)
        return shaped.movedim(-1, 1) if self.channels_last and len(self.input_shape) > 1 else shaped


def _known(state: LayerMoments | None) -> LayerMoments:
    assert state is not None
    return state


def trace(module: nn.Module, input_shape: Sequence[int]) -> Program:
    """The recursion of a module whose inputs have shape ``input_shape``.

    Raises:
        UnsupportedLayerError: A layer has no limit that is known here; the message names it.
    """
    shape = tuple(int(size) for size in input_shape)
    graph = _graph(module, shape)
    modules = dict(graph.named_modules())
    nodes = [node for node in graph.graph.nodes if node.op not in ("placeholder", "output")]
    if sum(node.op == "placeholder" for node in graph.graph.nodes) != 1:
        raise UnsupportedLayerError("forward takes several inputs: a kernel is a function of one.")
    (start,) = (node for node in graph.graph.nodes if node.op == "placeholder")
    (end,) = (node for node in graph.graph.nodes if node.op == "output")
    compiler = _Compiler(modules, _channels_last(nodes, modules, shape), len(shape))
    compiler.place(start)
    for node in nodes:
        compiler.add(node)
    return compiler.program(end.args[0], shape)


def _graph(module: nn.Module, shape: tuple[int, ...]) -> fx.GraphModule:
    try:
        graph = fx.symbolic_trace(module)
    except Exception as error:
        raise UnsupportedLayerError(
            f"torch.fx cannot trace the network ({error}): its forward may depend on values. {_WAY_OUT}"
        ) from None
    parameter = next(module.parameters(), torch.zeros(0))
    was = {name: child.training for name, child in module.named_modules()}
    try:
        ShapeProp(graph.eval()).propagate(torch.zeros(2, *shape, dtype=parameter.dtype, device=parameter.device))
    except Exception as error:
        raise InputError(f"the network does not run on inputs of shape {shape}: {error}") from None
    finally:
        for name, child in module.named_modules():
            child.training = was[name]
    return graph


def _channels_last(nodes: Sequence[fx.Node], modules: Mapping[str, nn.Module], shape: tuple[int, ...]) -> bool:
    """Tokens have their channels last, images first: told by whether a convolution or a pooling sees them."""
    spatial = (nn.Conv1d, nn.Conv2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
    called = [modules[str(node.target)] for node in nodes if node.op == "call_module"]
    return len(shape) > 1 and not any(isinstance(module, spatial) for module in called)


class _Compiler:
    """Steps, collected node by node."""

    def __init__(self, modules: Mapping[str, nn.Module], channels_last: bool, axes: int) -> None:
        self._modules, self._channels_last, self._axes = modules, channels_last, axes
        self._numbers: dict[fx.Node, int] = {}
        self._roles: dict[fx.Node, tuple[str, ...]] = {}
        self._steps: list[Step] = []
        self._layers: dict[str, tuple[int, bool]] = {}

    def place(self, node: fx.Node) -> None:
        spatial = tuple(f"s{index}" for index in range(self._axes - 1))
        self._numbers[node] = 0
        self._roles[node] = ("n", *spatial, "c") if self._channels_last and spatial else ("n", "c", *spatial)

    def add(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            raise UnsupportedLayerError(f"{node.target}: parameters used outside of a layer have no rule. {_WAY_OUT}")
        inputs = _nodes(node)
        call = Call(
            name=_name(node),
            module=self._modules[str(node.target)] if node.op == "call_module" else None,
            args=node.args,
            kwargs=dict(node.kwargs),
            roles=[self._roles[value] for value in inputs],
            shapes=[tuple(value.meta["tensor_meta"].shape) for value in inputs],
            output=tuple(node.meta["tensor_meta"].shape),
        )
        rule = self._rule(node, call)
        layer = None
        if rule.fan_in is not None:
            if call.name in self._layers:
                raise UnsupportedLayerError(f"{call.name} is called twice: its uses are not independent. {_WAY_OUT}")
            layer = len(self._layers)
            self._layers[call.name] = rule.fan_in, rule.bias
        self._steps.append(Step(rule, tuple(self._numbers[value] for value in inputs), layer))
        self._numbers[node], self._roles[node] = len(self._steps), rule.roles

    def _rule(self, node: fx.Node, call: Call) -> Rule:
        if call.module is not None:
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
            raise UnsupportedLayerError(f"{call.name} ({kind}) has no known limit. {_WAY_OUT}")
        return rule

    def program(self, end: Any, shape: tuple[int, ...]) -> Program:
        if not isinstance(end, fx.Node) or self._numbers.get(end) != len(self._steps):
            raise UnsupportedLayerError("forward must return one tensor, the result of its last call.")
        if len(self._roles[end]) > 2:
            raise UnsupportedLayerError(f"the output has positions left {self._roles[end]}: flatten or pool them.")
        pairs = [False] * (len(self._steps) + 1)
        for number in range(len(self._steps) - 1, -1, -1):
            step = self._steps[number]
            for index in step.inputs:
                pairs[index] = pairs[index] or step.rule.mixes or (pairs[number + 1] and not step.rule.forgets)
        fan_ins = tuple(fan_in for fan_in, _ in self._layers.values())
        biases = tuple(bias for _, bias in self._layers.values())
        return Program(
            tuple(self._steps), tuple(pairs), tuple(self._layers), fan_ins, biases, shape, self._channels_last
        )


def _nodes(node: fx.Node) -> list[fx.Node]:
    """The nodes among a call's arguments, in order, with repetitions."""
    found: list[fx.Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op in ("call_module", "call_method") else node.name


__all__ = ["Parametrization", "Program", "Step", "trace"]
