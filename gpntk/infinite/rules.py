"""Which call of a network's ``forward`` is which rule of `gpntk.infinite.layers`: three tables, and activations."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from gpntk.infinite import branches, layers
from gpntk.infinite.activations import activation_of
from gpntk.infinite.attention import Mechanism, TiedAttention, attend
from gpntk.infinite.calls import Apply, Call, Rule
from gpntk.infinite.gaussian import AbstractActivation
from gpntk.infinite.layers import Weights, Windows
from gpntk.infinite.locally_connected import LocallyConnected
from gpntk.infinite.moments import LayerMoments
from gpntk.infinite.units import Law, Units

_Weighted = nn.Linear | nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d | LocallyConnected


def _linear(call: Call) -> Rule:
    assert isinstance(call.module, nn.Linear)
    if call.roles[0][-1] != "c":
        raise call.refuse(f"Linear acts on the last axis, which is no channel here {call.roles[0]}")
    return _weighted(call, call.module, call.module.in_features, None)


def _weighted(
    call: Call, module: _Weighted, fan_in: int, windows: Windows | None, dilations: tuple[int, ...] = ()
) -> Rule:
    return Rule(
        partial(_layer, windows=windows, dilations=dilations),
        call.roles[0],
        Units.drawn_by(call.name),
        fan_in=fan_in,
        bias=module.bias is not None,
    )


def _layer(
    states: Sequence[LayerMoments], weights: Weights | None, windows: Windows | None, dilations: Sequence[int]
) -> LayerMoments:
    assert weights is not None
    state = layers.dilate(states[0], dilations) if dilations else states[0]
    if windows is None:
        return layers.weighted(state, weights)
    return layers.weighted(state, weights, layers.filter_mean(state, windows))


def _convolution(call: Call) -> Rule:
    module = call.module
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    call.check_channels_first()
    if module.groups != 1 or any(step != 1 for step in module.dilation):
        raise call.refuse("convolutions with groups or dilation have no rule")
    if module.padding_mode not in ("zeros", "circular"):
        raise call.refuse(f"padding_mode={module.padding_mode!r} has no rule")
    sizes, circular = tuple(module.kernel_size), module.padding_mode == "circular"
    windows = Windows(sizes, tuple(module.stride), _paddings(module), circular=circular)
    return _weighted(call, module, module.in_channels * math.prod(sizes), windows)


def _transposed_convolution(call: Call) -> Rule:
    """Zeros between the positions, ``stride`` - 1 of them, and a convolution."""
    module = call.module
    assert isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d))
    call.check_channels_first()
    if len(call.args) + len(call.kwargs) > 1:
        raise call.refuse("output_size has no rule: give output_padding to the layer")
    if module.groups != 1 or any(step != 1 for step in module.dilation):
        raise call.refuse("transposed convolutions with groups or dilation have no rule")
    sizes, more = tuple(module.kernel_size), module.output_padding
    paddings = [size - 1 - int(pad) for size, pad in zip(sizes, module.padding, strict=True)]
    if min(paddings) < 0:
        raise call.refuse("padding by the filter's size or more has no rule")
    both = tuple((pad, pad + int(extra)) for pad, extra in zip(paddings, more, strict=True))
    windows = Windows(sizes, (1,) * len(sizes), both)
    return _weighted(call, module, module.in_channels * math.prod(sizes), windows, tuple(module.stride))


def _local(call: Call) -> Rule:
    """A convolution of equal positions, whatever was known of others."""
    module = call.module
    assert isinstance(module, LocallyConnected)
    call.check_channels_first()
    windows = Windows(module.kernel_size, module.stride, tuple((pad, pad) for pad in module.padding))
    rule = _weighted(call, module, module.in_channels * math.prod(module.kernel_size), windows)
    return replace(rule, apply=partial(_apart, rule.apply), forgets=True)


def _apart(shared: Apply, states: Sequence[LayerMoments], weights: Weights | None) -> LayerMoments:
    return shared([states[0].equal_positions()], weights)


def _paddings(module: nn.Conv1d | nn.Conv2d) -> tuple[tuple[int, int], ...]:
    if module.padding == "valid":
        return ((0, 0),) * len(module.kernel_size)
    if module.padding == "same":
        return tuple(((size - 1) // 2, size - 1 - (size - 1) // 2) for size in module.kernel_size)
    return tuple((int(size), int(size)) for size in module.padding)


def _average_pool(call: Call) -> Rule:
    call.check_channels_first()
    axes = len(call.positions)
    if call.module is None:
        settings = call.arguments(
            kernel_size=None, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
        )
    else:
        settings = {**vars(call.module), "divisor_override": getattr(call.module, "divisor_override", None)}
    if settings["ceil_mode"]:
        raise call.refuse("ceil_mode=True has no rule")
    sizes = _tuple(settings["kernel_size"], axes)
    strides = _tuple(settings["stride"] or sizes, axes)
    windows = Windows(sizes, strides, tuple((pad, pad) for pad in _tuple(settings["padding"], axes)))
    apply = partial(
        _pooled, windows=windows, divisor=settings["divisor_override"], count_padding=settings["count_include_pad"]
    )
    return Rule(apply, call.roles[0], call.units[0], mixes=True)


def _tuple(value: Any, axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return tuple(int(item) for item in values) * (axes if len(values) == 1 else 1)


def _pooled(
    states: Sequence[LayerMoments],
    _weights: Weights | None,
    windows: Windows,
    divisor: int | None = None,
    count_padding: bool = True,
) -> LayerMoments:
    pooled = layers.pool(states[0], windows, total=divisor is not None, count_padding=count_padding)
    return pooled if divisor is None else layers.scale(pooled, 1 / divisor)


def _adaptive_pool(call: Call) -> Rule:
    call.check_channels_first()
    before, after = call.shapes[0][2:], call.output[2:]
    if any(size % target for size, target in zip(before, after, strict=True)):
        raise call.refuse(f"adaptive pooling from {before} to {after} has windows of several sizes")
    sizes = tuple(size // target for size, target in zip(before, after, strict=True))
    windows = Windows(sizes, sizes, ((0, 0),) * len(sizes))
    return Rule(partial(_pooled, windows=windows), call.roles[0], call.units[0], mixes=True)


def _layer_norm(call: Call) -> Rule:
    if call.module is None:
        settings = call.arguments(normalized_shape=(), weight=None, bias=None, eps=1e-5)
        shape, eps = settings["normalized_shape"], settings["eps"]
    else:
        assert isinstance(call.module, nn.LayerNorm)
        shape, eps = call.module.normalized_shape, call.module.eps
    roles = call.roles[0]
    covered = set(roles[len(roles) - len(shape) :])
    if covered not in ({"c"}, {"c", *call.positions}):
        raise call.refuse(f"LayerNorm must be over the channels, or channels and all positions, not {sorted(covered)}")
    if call.units[0].law < Law.CENTRED:
        raise call.refuse(
            "LayerNorm subtracts the mean of its input's units, which is known only where it is zero: after a layer "
            "with weights, not after an activation or of the network's input"
        )
    apply = partial(_normalized, eps=float(eps), positions=len(covered) > 1)
    return Rule(apply, roles, call.units[0])


def _normalized(states: Sequence[LayerMoments], _weights: Weights | None, eps: float, positions: bool) -> LayerMoments:
    return layers.layer_norm(states[0], eps, positions)


def _attention(call: Call) -> Rule:
    assert isinstance(call.module, TiedAttention)
    if call.kwargs or len(call.args) != 2 or set(call.roles) != {("n", "s0", "c")}:
        raise call.refuse(f"it takes keys and values, both with axes rows, positions, channels, not {call.roles}")
    apply = partial(_attended, mechanism=call.module.mechanism)
    return Rule(apply, call.roles[0], call.units[1], mixes=True, attends=True)


def _attended(states: Sequence[LayerMoments], _weights: Weights | None, mechanism: Mechanism) -> LayerMoments:
    keys, values = states
    return attend(keys, values, mechanism)


def _dropout(call: Call) -> Rule:
    if call.module is None:
        settings = call.arguments(p=0.5, training=True, inplace=False)
        rate, training = settings["p"], settings["training"]
    else:
        assert isinstance(call.module, nn.Dropout)
        rate, training = call.module.p, call.module.training
    if not training or not rate:
        return branches.identity(call)
    if rate >= 1:
        raise call.refuse(f"p={rate} leaves no unit")
    # A unit that may be zero is no Gaussian.
    return Rule(partial(_dropped, keep=1 - float(rate)), call.roles[0], call.units[0].at_most(Law.CENTRED))


def _dropped(states: Sequence[LayerMoments], _weights: Weights | None, keep: float) -> LayerMoments:
    return layers.dropout(states[0], keep)


def activation_rule(target: Any, call: Call) -> Rule | None:
    """The rule of an elementwise function of Gaussian units; None for what is not one."""
    if len(call.roles) != 1 or (call.module is None and not call.args):
        return None
    activation = activation_of(target, *call.args[1:], **call.kwargs)
    if activation is None:
        return None
    if call.units[0].law is not Law.GAUSSIAN:
        raise call.refuse(
            "its input is not Gaussian: an activation must follow a layer with weights, before branches are "
            "concatenated, positions flattened or units dropped"
        )
    return Rule(partial(_activated, activation=activation), call.roles[0], call.units[0].at_most(Law.ANY))


def _activated(
    states: Sequence[LayerMoments], _weights: Weights | None, activation: AbstractActivation
) -> LayerMoments:
    return layers.activate(states[0], activation)


Make = Callable[[Call], Rule]

MODULES: dict[type[nn.Module], Make] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.ConvTranspose1d: _transposed_convolution,
    nn.ConvTranspose2d: _transposed_convolution,
    LocallyConnected: _local,
    TiedAttention: _attention,
    nn.AvgPool1d: _average_pool,
    nn.AvgPool2d: _average_pool,
    nn.AdaptiveAvgPool1d: _adaptive_pool,
    nn.AdaptiveAvgPool2d: _adaptive_pool,
    nn.Flatten: branches.flatten,
    nn.LayerNorm: _layer_norm,
    nn.Dropout: _dropout,
    nn.Identity: branches.identity,
    nn.ZeroPad2d: branches.pad,
    nn.CircularPad2d: branches.pad,
}

FUNCTIONS: dict[Any, Make] = {
    torch.flatten: branches.flatten,
    torch.reshape: branches.flatten,
    torch.mean: partial(branches.reduce, total=False),
    torch.sum: partial(branches.reduce, total=True),
    torch.squeeze: branches.squeeze,
    torch.permute: branches.permute,
    torch.transpose: branches.transpose,
    torch.cat: branches.concatenate,
    torch.concat: branches.concatenate,
    torch.add: branches.add,
    torch.sub: branches.add,
    operator.add: branches.add,
    operator.iadd: branches.add,
    operator.sub: branches.add,
    operator.isub: branches.add,
    torch.mul: partial(branches.scale, power=1),
    operator.mul: partial(branches.scale, power=1),
    operator.imul: partial(branches.scale, power=1),
    torch.div: partial(branches.scale, power=-1),
    operator.truediv: partial(branches.scale, power=-1),
    operator.itruediv: partial(branches.scale, power=-1),
    operator.neg: branches.identity,
    torch.neg: branches.identity,
    functional.avg_pool1d: _average_pool,
    functional.avg_pool2d: _average_pool,
    functional.adaptive_avg_pool1d: _adaptive_pool,
    functional.adaptive_avg_pool2d: _adaptive_pool,
    functional.layer_norm: _layer_norm,
    functional.dropout: _dropout,
    functional.pad: branches.pad,
}

METHODS: dict[Any, Make] = {
    "flatten": branches.flatten,
    "reshape": branches.flatten,
    "view": branches.flatten,
    "mean": partial(branches.reduce, total=False),
    "sum": partial(branches.reduce, total=True),
    "squeeze": branches.squeeze,
    "permute": branches.permute,
    "transpose": branches.transpose,
    "add": branches.add,
    "add_": branches.add,
    "sub": branches.add,
    "sub_": branches.add,
    "mul": partial(branches.scale, power=1),
    "mul_": partial(branches.scale, power=1),
    "div": partial(branches.scale, power=-1),
    "div_": partial(branches.scale, power=-1),
    "neg": branches.identity,
    "contiguous": branches.identity,
    "clone": branches.identity,
}

SPATIAL = {
    kind
    for kind, make in (*MODULES.items(), *FUNCTIONS.items())
    if make in (_convolution, _transposed_convolution, _local, _average_pool, _adaptive_pool)
}
"""What acts on positions, after the channels."""
