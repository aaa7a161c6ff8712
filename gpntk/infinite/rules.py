"""Which call of a network's ``forward`` is which rule of `gpntk.infinite.layers`: three tables, and activations."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import torch
from torch import nn
from torch.nn import functional

from gpntk.errors import UnsupportedLayerError
from gpntk.infinite import layers
from gpntk.infinite.activations import activation_of
from gpntk.infinite.layers import Weights, Windows
from gpntk.infinite.moments import LayerMoments

Apply = Callable[[Sequence[LayerMoments], "Weights | None"], LayerMoments]


@final
@dataclass(frozen=True)
class Call:
    """One call in ``forward``.

    Attributes:
        name: Its qualified name; module: if it is one.
        args: As given, with nodes for tensors; kwargs likewise.
        roles: Of every tensor argument's axes: ``"n"``, ``"c"``, ``"s0"``, ``"s1"``.
        shapes: Of every tensor argument; output: of the result.
    """

    name: str
    module: nn.Module | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    roles: list[tuple[str, ...]]
    shapes: list[tuple[int, ...]]
    output: tuple[int, ...]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument of a function, by place or name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def refuse(self, reason: str) -> UnsupportedLayerError:
        """The error to be raised."""
        return UnsupportedLayerError(f"{self.name}: {reason}; gpntk.infinite.monte_carlo estimates any architecture.")


@final
@dataclass(frozen=True)
class Rule:
    """What a call does.

    Attributes:
        apply: On the moments of its inputs, with the prior of its weights.
        roles: Of the result's axes.
        mixes: Whether it needs pairs of positions.
        forgets: Whether its result has no positions left to be paired.
        fan_in: Of a layer with weights; bias: whether it has one.
    """

    apply: Apply
    roles: tuple[str, ...]
    mixes: bool = False
    forgets: bool = False
    fan_in: int | None = None
    bias: bool = field(default=False)


def _plain(function: Callable[[LayerMoments], LayerMoments]) -> Apply:
    """A rule of one input without weights."""
    return lambda states, _weights: function(states[0])


def _spatial(roles: tuple[str, ...]) -> list[str]:
    return sorted(role for role in roles if role.startswith("s"))


def _identity(call: Call) -> Rule:
    return Rule(_plain(lambda state: state), call.roles[0])


def _linear(call: Call) -> Rule:
    assert isinstance(call.module, nn.Linear)
    if call.roles[0][-1] != "c":
        raise call.refuse(f"Linear acts on the last axis, which is no channel here {call.roles[0]}")
    return Rule(
        lambda states, weights: layers.weighted(states[0], _given(weights)),
        call.roles[0],
        fan_in=call.module.in_features,
        bias=call.module.bias is not None,
    )


def _given(weights: Weights | None) -> Weights:
    assert weights is not None
    return weights


def _convolution(call: Call) -> Rule:
    module = call.module
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    _channels_first(call)
    if module.groups != 1 or any(step != 1 for step in module.dilation):
        raise call.refuse("convolutions with groups or dilation have no rule")
    if module.padding_mode not in ("zeros", "circular"):
        raise call.refuse(f"padding_mode={module.padding_mode!r} has no rule")
    windows = Windows(
        tuple(module.kernel_size), tuple(module.stride), _paddings(call), circular=module.padding_mode == "circular"
    )

    def apply(states: Sequence[LayerMoments], weights: Weights | None) -> LayerMoments:
        return layers.weighted(states[0], _given(weights), layers.filter_mean(states[0], windows))

    fan_in = module.in_channels
    for size in module.kernel_size:
        fan_in *= size
    return Rule(apply, call.roles[0], fan_in=fan_in, bias=module.bias is not None)


def _paddings(call: Call) -> tuple[tuple[int, int], ...]:
    module = call.module
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    if module.padding == "valid":
        return ((0, 0),) * len(module.kernel_size)
    if module.padding == "same":
        return tuple(((size - 1) // 2, size - 1 - (size - 1) // 2) for size in module.kernel_size)
    return tuple((int(size), int(size)) for size in module.padding)


def _channels_first(call: Call) -> None:
    roles = call.roles[0]
    if roles != ("n", "c", *_spatial(roles)):
        raise call.refuse(f"its input must have axes rows, channels, positions, not {roles}")


def _average_pool(call: Call) -> Rule:
    _channels_first(call)
    axes = len(call.roles[0]) - 2
    module = call.module
    if module is None:
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        defaults = (None, None, 0, False, True, None)
        settings = {n: call.argument(i + 1, n, d) for i, (n, d) in enumerate(zip(names, defaults, strict=True))}
    else:
        settings = {**vars(module), "divisor_override": getattr(module, "divisor_override", None)}
    if settings["ceil_mode"]:
        raise call.refuse("ceil_mode=True has no rule")
    sizes = _tuple(settings["kernel_size"], axes)
    strides = _tuple(settings["stride"] or sizes, axes)
    windows = Windows(sizes, strides, tuple((pad, pad) for pad in _tuple(settings["padding"], axes)))
    divisor, counted = settings["divisor_override"], settings["count_include_pad"]

    def apply(state: LayerMoments) -> LayerMoments:
        pooled = layers.pool(state, windows, total=divisor is not None, count_padding=counted)
        return pooled if divisor is None else layers.scale(pooled, 1 / divisor)

    return Rule(_plain(apply), call.roles[0], mixes=True)


def _tuple(value: Any, axes: int) -> tuple[int, ...]:
    return (int(value),) * axes if isinstance(value, int) else tuple(int(item) for item in value)


def _adaptive_pool(call: Call) -> Rule:
    _channels_first(call)
    before, after = call.shapes[0][2:], call.output[2:]
    if any(size % target for size, target in zip(before, after, strict=True)):
        raise call.refuse(f"adaptive pooling from {before} to {after} has windows of several sizes")
    sizes = tuple(size // target for size, target in zip(before, after, strict=True))
    windows = Windows(sizes, sizes, ((0, 0),) * len(sizes))
    return Rule(_plain(partial(layers.pool, windows=windows)), call.roles[0], mixes=True)


def _flatten(call: Call) -> Rule:
    if len(call.output) == 2:
        return Rule(_plain(layers.flatten), ("n", "c"), forgets=True)
    if call.output == call.shapes[0]:
        return _identity(call)
    raise call.refuse(f"reshaping {call.shapes[0]} to {call.output} has no rule: flatten all positions, or none")


def _reduce(call: Call, total: bool) -> Rule:
    dims = call.argument(1, "dim")
    roles = call.roles[0]
    dims = list(range(len(roles))) if dims is None else [dims] if isinstance(dims, int) else list(dims)
    chosen = [roles[dim] for dim in dims]
    if not all(role.startswith("s") for role in chosen):
        raise call.refuse("means and sums are over positions only")
    axes = [_spatial(roles).index(role) for role in chosen]
    if call.argument(2, "keepdim", False):
        raise call.refuse("keepdim=True has no rule")
    rest = tuple(role for role in roles if role not in chosen)
    return Rule(_plain(partial(layers.reduce_axes, axes=axes, total=total)), rest, mixes=True)


def _permute(call: Call) -> Rule:
    roles = call.roles[0]
    order = call.args[1:] if call.module is None else ()
    order = order[0] if len(order) == 1 and not isinstance(order[0], int) else order
    return Rule(_plain(lambda state: state), tuple(roles[dim] for dim in order))


def _transpose(call: Call) -> Rule:
    roles = list(call.roles[0])
    one, two = call.argument(1, "dim0"), call.argument(2, "dim1")
    roles[one], roles[two] = roles[two], roles[one]
    return Rule(_plain(lambda state: state), tuple(roles))


def _layer_norm(call: Call) -> Rule:
    if call.module is None:
        shape, eps = call.argument(1, "normalized_shape"), call.argument(4, "eps", 1e-5)
    else:
        assert isinstance(call.module, nn.LayerNorm)
        shape, eps = call.module.normalized_shape, call.module.eps
    roles = call.roles[0]
    covered = set(roles[len(roles) - len(shape) :])
    if covered != {"c"} and covered != {"c", *_spatial(roles)}:
        raise call.refuse(f"LayerNorm must be over the channels, or channels and all positions, not {sorted(covered)}")
    positions = len(covered) > 1
    return Rule(_plain(partial(layers.layer_norm, eps=float(eps), positions=positions)), roles)


def _dropout(call: Call) -> Rule:
    training = call.module.training if call.module is not None else call.argument(2, "training", True)
    rate = getattr(call.module, "p", None) if call.module is not None else call.argument(1, "p", 0.5)
    if not training or not rate:
        return _identity(call)
    return Rule(_plain(partial(layers.dropout, keep=1 - float(rate))), call.roles[0])


def _add(call: Call) -> Rule:
    if len(call.roles) != 2:
        raise call.refuse("adding a constant gives units a mean, for which there is no rule")
    if call.args[0] is call.args[1]:
        raise call.refuse("both terms are the same tensor: multiply it by 2")
    if call.roles[0] != call.roles[1] or call.shapes[0] != call.shapes[1]:
        raise call.refuse(f"terms of shapes {call.shapes[0]} and {call.shapes[1]}")

    def apply(states: Sequence[LayerMoments], _weights: Weights | None) -> LayerMoments:
        if sum(not state.gaussian for state in states) > 1:
            raise call.refuse("two branches that do not end in a layer with weights are not independent")
        return layers.add(states)

    return Rule(apply, call.roles[0])


def _concatenate(call: Call) -> Rule:
    dim = call.argument(1, "dim", 0)
    if call.roles[0][dim] != "c":
        raise call.refuse("only channels can be concatenated")
    channels = [shape[dim] for shape in call.shapes]
    return Rule(lambda states, _weights: layers.concatenate(states, channels), call.roles[0])


def _scale(call: Call, power: int) -> Rule:
    factors = [value for value in call.args if isinstance(value, (int, float))]
    if len(call.roles) != 1 or len(factors) != 1 or (power < 0 and call.args[0] is factors[0]):
        raise call.refuse("only products with, and quotients by, a number have a rule")
    return Rule(_plain(partial(layers.scale, factor=float(factors[0]) ** power)), call.roles[0])


def _pad(call: Call) -> Rule:
    _channels_first(call)
    if call.module is None:
        amounts, mode = call.argument(1, "pad", ()), call.argument(2, "mode", "constant")
        value = call.argument(3, "value", 0)
        if mode not in ("constant", "circular") or value:
            raise call.refuse(f"padding with mode={mode!r} and value={value} has no rule")
    else:
        assert isinstance(call.module, (nn.ZeroPad2d, nn.CircularPad2d))
        amounts, mode = call.module.padding, "circular" if isinstance(call.module, nn.CircularPad2d) else "constant"
    paddings = [(0, 0)] * (len(call.roles[0]) - 2)
    # The last axis comes first.
    for index in range(len(amounts) // 2):
        paddings[-1 - index] = int(amounts[2 * index]), int(amounts[2 * index + 1])
    return Rule(_plain(partial(layers.pad, paddings=paddings, circular=mode == "circular")), call.roles[0])


def activation_rule(target: Any, call: Call) -> Rule | None:
    """The rule of an elementwise function of Gaussian units; None for what is not one."""
    if len(call.roles) != 1:
        return None
    activation = activation_of(target, *call.args[1:], **call.kwargs)
    if activation is None:
        return None

    def apply(state: LayerMoments) -> LayerMoments:
        if not state.gaussian:
            raise call.refuse("its input is not Gaussian: an activation must follow a layer with weights")
        return layers.activate(state, activation)

    return Rule(_plain(apply), call.roles[0])


Make = Callable[[Call], Rule]

MODULES: dict[type[nn.Module], Make] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.AvgPool1d: _average_pool,
    nn.AvgPool2d: _average_pool,
    nn.AdaptiveAvgPool1d: _adaptive_pool,
    nn.AdaptiveAvgPool2d: _adaptive_pool,
    nn.Flatten: _flatten,
    nn.LayerNorm: _layer_norm,
    nn.Dropout: _dropout,
    nn.Identity: _identity,
    nn.ZeroPad2d: _pad,
    nn.CircularPad2d: _pad,
}

FUNCTIONS: dict[Any, Make] = {
    torch.flatten: _flatten,
    torch.reshape: _flatten,
    torch.mean: partial(_reduce, total=False),
    torch.sum: partial(_reduce, total=True),
    torch.permute: _permute,
    torch.transpose: _transpose,
    torch.cat: _concatenate,
    torch.concat: _concatenate,
    torch.add: _add,
    operator.add: _add,
    operator.iadd: _add,
    operator.sub: _add,
    torch.sub: _add,
    torch.mul: partial(_scale, power=1),
    operator.mul: partial(_scale, power=1),
    operator.truediv: partial(_scale, power=-1),
    torch.div: partial(_scale, power=-1),
    operator.neg: _identity,
    functional.avg_pool1d: _average_pool,
    functional.avg_pool2d: _average_pool,
    functional.adaptive_avg_pool1d: _adaptive_pool,
    functional.adaptive_avg_pool2d: _adaptive_pool,
    functional.layer_norm: _layer_norm,
    functional.dropout: _dropout,
    functional.pad: _pad,
}

METHODS: dict[Any, Make] = {
    "flatten": _flatten,
    "reshape": _flatten,
    "view": _flatten,
    "mean": partial(_reduce, total=False),
    "sum": partial(_reduce, total=True),
    "permute": _permute,
    "transpose": _transpose,
    "add": _add,
    "add_": _add,
    "contiguous": _identity,
    "clone": _identity,
}
