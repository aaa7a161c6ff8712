"""Which call of a network's ``forward`` does what of `gpntk.infinite.layers`: three tables, and activations.

A rule reads the arguments of one call, refuses what has no limit, and says what becomes of the moments, as a function
of `gpntk.infinite.layers` with its settings.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from gpntk.infinite import layers
from gpntk.infinite.activations import activation_of
from gpntk.infinite.layers import Windows
from gpntk.infinite.modules import LocallyConnected, TiedAttention
from gpntk.infinite.program import Call, Law, Rule, Units

_Weighted = nn.Linear | nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d | LocallyConnected

# --- layers with weights ------------------------------------------------------------------------------------------


def _weighted(call: Call, module: _Weighted, fan_in: int, forgets: bool = False, **settings: Any) -> Rule:
    return Rule(
        partial(layers.weighted, **settings),
        call.roles[0],
        Units.drawn_by(call.name),
        forgets=forgets,
        fan_in=fan_in,
        bias=module.bias is not None,
    )


def _linear(call: Call) -> Rule:
    assert isinstance(call.module, nn.Linear)
    if call.roles[0][-1] != "c":
        raise call.refuse(f"Linear acts on the last axis, which is no channel here {call.roles[0]}")
    return _weighted(call, call.module, call.module.in_features)


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
    return _weighted(call, module, module.in_channels * math.prod(sizes), windows=windows)


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
    windows, fan_in = Windows(sizes, (1,) * len(sizes), both), module.in_channels * math.prod(sizes)
    return _weighted(call, module, fan_in, windows=windows, strides=tuple(module.stride))


def _local(call: Call) -> Rule:
    """A convolution of equal positions, whatever was known of others."""
    module = call.module
    assert isinstance(module, LocallyConnected)
    call.check_channels_first()
    windows = Windows(module.kernel_size, module.stride, tuple((pad, pad) for pad in module.padding))
    fan_in = module.in_channels * math.prod(module.kernel_size)
    return _weighted(call, module, fan_in, forgets=True, windows=windows, shared=False)


def _paddings(module: nn.Conv1d | nn.Conv2d) -> tuple[tuple[int, int], ...]:
    if module.padding == "valid":
        return ((0, 0),) * len(module.kernel_size)
    if module.padding == "same":
        return tuple(((size - 1) // 2, size - 1 - (size - 1) // 2) for size in module.kernel_size)
    return tuple((int(size), int(size)) for size in module.padding)


# --- pooling, normalisation, attention, dropout, activations ------------------------------------------------------


def _average_pool(call: Call) -> Rule:
    call.check_channels_first()
    axes = len(call.positions)
    if call.module is None:
        settings = call.arguments(
            kernel_size=None, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
        )
    else:
        settings = {"divisor_override": None, **vars(call.module)}
    if settings["ceil_mode"]:
        raise call.refuse("ceil_mode=True has no rule")
    sizes = _tuple(settings["kernel_size"], axes)
    strides = _tuple(settings["stride"] or sizes, axes)
    windows = Windows(sizes, strides, tuple((pad, pad) for pad in _tuple(settings["padding"], axes)))
    divisor, count_padding = settings["divisor_override"], settings["count_include_pad"]
    apply = partial(layers.pool, windows=windows, divisor=divisor, count_padding=count_padding)
    return Rule(apply, call.roles[0], call.units[0], mixes=True)


def _tuple(value: Any, axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return tuple(int(item) for item in values) * (axes if len(values) == 1 else 1)


def _adaptive_pool(call: Call) -> Rule:
    call.check_channels_first()
    before, after = call.shapes[0][2:], call.output[2:]
    if any(size % target for size, target in zip(before, after, strict=True)):
        raise call.refuse(f"adaptive pooling from {before} to {after} has windows of several sizes")
    sizes = tuple(size // target for size, target in zip(before, after, strict=True))
    windows = Windows(sizes, sizes, ((0, 0),) * len(sizes))
    return Rule(partial(layers.pool, windows=windows), call.roles[0], call.units[0], mixes=True)


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
    apply = partial(layers.layer_norm, eps=float(eps), positions=len(covered) > 1)
    return Rule(apply, roles, call.units[0])


def _attention(call: Call) -> Rule:
    assert isinstance(call.module, TiedAttention)
    if call.kwargs or len(call.args) != 2 or set(call.roles) != {("n", "s0", "c")}:
        raise call.refuse(f"it takes keys and values, both with axes rows, positions, channels, not {call.roles}")
    apply = partial(layers.attend, mechanism=call.module.mechanism)
    return Rule(apply, call.roles[0], call.units[1], mixes=True, attends=True)


def _dropout(call: Call) -> Rule:
    if call.module is None:
        settings = call.arguments(p=0.5, training=True, inplace=False)
        rate, training = settings["p"], settings["training"]
    else:
        assert isinstance(call.module, nn.Dropout)
        rate, training = call.module.p, call.module.training
    if not training or not rate:
        return _identity(call)
    if rate >= 1:
        raise call.refuse(f"p={rate} leaves no unit")
    # A unit that may be zero is no Gaussian.
    return Rule(partial(layers.dropout, keep=1 - float(rate)), call.roles[0], call.units[0].at_most(Law.CENTRED))


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
    return Rule(partial(layers.activate, activation=activation), call.roles[0], call.units[0].at_most(Law.ANY))


# --- what joins, scales and reshapes branches -----------------------------------------------------------------------


def _identity(call: Call) -> Rule:
    """The same values, or minus them, which have the same second moments."""
    return Rule(layers.unchanged, call.roles[0], call.units[0])


def _add(call: Call) -> Rule:
    """A sum or difference of branches that are uncorrelated: the sign is nothing to second moments."""
    factor = call.arguments(other=None, alpha=1)["alpha"]
    if len(call.roles) != 2:
        if any(isinstance(value, (int, float)) and value == 0 for value in call.args[:2]):
            # Where Python's sum begins.
            return _identity(call)
        raise call.refuse("adding a constant gives units a mean, for which there is no rule")
    if not isinstance(factor, (int, float)):
        raise call.refuse(f"alpha={factor} is not a number")
    _check_uncorrelated(call)
    return Rule(partial(layers.add, factor=float(factor)), call.roles[0], Units.together(call.units))


def _check_uncorrelated(call: Call) -> None:
    """Raise unless two branches have the same axes, no layer in common, and not both a mean."""
    if call.roles[0] != call.roles[1] or call.shapes[0] != call.shapes[1]:
        raise call.refuse(f"operands of shapes {call.shapes[0]} and {call.shapes[1]} have no rule")
    common = sorted(call.units[0].sources & call.units[1].sources)
    if common:
        raise call.refuse(
            f"both operands are made of the outputs of {', '.join(common)}, so that they are correlated; only branches "
            "that end in different layers with weights can be joined"
        )
    if all(units.law is Law.ANY for units in call.units):
        raise call.refuse("two branches that do not end in a layer with weights are not independent")


def _concatenate(call: Call) -> Rule:
    """Channels beside each other: their variances differ, so that they are no draws of one Gaussian process."""
    dim = call.arguments(dim=0)["dim"]
    if call.roles[0][dim] != "c" or any(roles != call.roles[0] for roles in call.roles):
        raise call.refuse("only channels can be concatenated")
    channels = tuple(shape[dim] for shape in call.shapes)
    return Rule(
        partial(layers.concatenate, channels=channels), call.roles[0], Units.together(call.units).at_most(Law.CENTRED)
    )


def _scale(call: Call, power: int) -> Rule:
    """A product with a number, or a quotient by one; or a product of two branches that are uncorrelated."""
    call.arguments(other=None)
    if power == 1 and len(call.roles) == 2:
        _check_uncorrelated(call)
        law = min(Law.CENTRED, max(units.law for units in call.units))
        return Rule(layers.multiply, call.roles[0], Units(law, Units.together(call.units).sources))
    factors = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, (int, float))]
    reciprocal = power < 0 and any(isinstance(value, (int, float)) for value in call.args[:1])
    if len(call.roles) != 1 or len(factors) != 1 or reciprocal:
        raise call.refuse("only products of two branches, and products with, and quotients by, a number have a rule")
    return Rule(partial(layers.scale, factor=float(factors[0]) ** power), call.roles[0], call.units[0])


def _flatten(call: Call) -> Rule:
    """All positions become units; their variances may differ."""
    if call.output == call.shapes[0]:
        return _identity(call)
    if len(call.output) != 2:
        raise call.refuse(f"reshaping {call.shapes[0]} to {call.output} has no rule: flatten all positions, or none")
    sizes = [size for size, role in zip(call.shapes[0], call.roles[0], strict=True) if role.startswith("s")]
    several = any(size > 1 for size in sizes)
    units = call.units[0].at_most(Law.CENTRED) if several else call.units[0]
    return Rule(layers.flatten, ("n", "c"), units, forgets=True)


def _permute(call: Call) -> Rule:
    """Another order of axes."""
    order = call.args[1:] or (call.kwargs["dims"],)
    order = order[0] if isinstance(order[0], (tuple, list)) else order
    return Rule(layers.unchanged, tuple(call.roles[0][dim] for dim in order), call.units[0])


def _transpose(call: Call) -> Rule:
    """Two axes exchanged."""
    roles, dims = list(call.roles[0]), call.arguments(dim0=0, dim1=0)
    one, two = dims["dim0"], dims["dim1"]
    roles[one], roles[two] = roles[two], roles[one]
    return Rule(layers.unchanged, tuple(roles), call.units[0])


def _reduce(call: Call, total: bool) -> Rule:
    """The mean, or ``total``, over positions."""
    settings = call.arguments(dim=None, keepdim=False)
    roles, dims = call.roles[0], settings["dim"]
    dims = list(range(len(roles))) if dims is None else [dims] if isinstance(dims, int) else list(dims)
    chosen = [roles[dim] for dim in dims]
    if not all(role.startswith("s") for role in chosen):
        raise call.refuse("means and sums are over positions only")
    axes, keep = tuple(call.positions.index(role) for role in chosen), bool(settings["keepdim"])
    rest = tuple(role for role in roles if keep or role not in chosen)
    return Rule(partial(layers.reduce_axes, axes=axes, total=total, keep=keep), rest, call.units[0], mixes=True)


def _squeeze(call: Call) -> Rule:
    """Without axes of one position, or an output's axis of one channel."""
    roles, dims = call.roles[0], call.arguments(dim=None)["dim"]
    dims = range(len(roles)) if dims is None else [dims] if isinstance(dims, int) else dims
    chosen = [roles[dim] for dim in dims if call.shapes[0][dim] == 1]
    axes = tuple(call.positions.index(role) for role in chosen if role != "c")
    rest = tuple(role for role in roles if role not in chosen)
    return Rule(partial(layers.reduce_axes, axes=axes), rest, call.units[0])


def _pad(call: Call) -> Rule:
    """Positions with the value zero, or those of the other end, around the others."""
    call.check_channels_first()
    if call.module is None:
        settings = call.arguments(pad=(), mode="constant", value=0)
        amounts, mode = settings["pad"], settings["mode"]
        if mode not in ("constant", "circular") or settings["value"]:
            raise call.refuse(f"padding with mode={mode!r} and value={settings['value']} has no rule")
    else:
        assert isinstance(call.module, (nn.ZeroPad2d, nn.CircularPad2d))
        amounts, mode = call.module.padding, "circular" if isinstance(call.module, nn.CircularPad2d) else "constant"
    paddings = [(0, 0)] * len(call.positions)
    if isinstance(amounts, fx.Node) or len(amounts) > 2 * len(paddings):
        raise call.refuse("only positions can be padded, by numbers")
    # The last axis comes first.
    for index in range(len(amounts) // 2):
        paddings[-1 - index] = int(amounts[2 * index]), int(amounts[2 * index + 1])
    apply = partial(layers.pad, paddings=tuple(paddings), circular=mode == "circular")
    return Rule(apply, call.roles[0], call.units[0])


# --- tables -------------------------------------------------------------------------------------------------------

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
    nn.Flatten: _flatten,
    nn.LayerNorm: _layer_norm,
    nn.Dropout: _dropout,
    nn.Identity: _identity,
    nn.ZeroPad2d: _pad,
    nn.CircularPad2d: _pad,
}

_CALLS: tuple[tuple[Make, tuple[Any, ...]], ...] = (
    (_flatten, (torch.flatten, torch.reshape, "flatten", "reshape", "view")),
    (partial(_reduce, total=False), (torch.mean, "mean")),
    (partial(_reduce, total=True), (torch.sum, "sum")),
    (_squeeze, (torch.squeeze, "squeeze")),
    (_permute, (torch.permute, "permute")),
    (_transpose, (torch.transpose, "transpose")),
    (_concatenate, (torch.cat, torch.concat)),
    (_add, (torch.add, operator.add, operator.iadd, "add", "add_")),
    (_add, (torch.sub, operator.sub, operator.isub, "sub", "sub_")),
    (partial(_scale, power=1), (torch.mul, operator.mul, operator.imul, "mul", "mul_")),
    (partial(_scale, power=-1), (torch.div, operator.truediv, operator.itruediv, "div", "div_")),
    (_identity, (torch.neg, operator.neg, "neg", "contiguous", "clone")),
    (_average_pool, (functional.avg_pool1d, functional.avg_pool2d)),
    (_adaptive_pool, (functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d)),
    (_layer_norm, (functional.layer_norm,)),
    (_dropout, (functional.dropout,)),
    (_pad, (functional.pad,)),
)

CALLS: dict[Any, Make] = {target: make for make, targets in _CALLS for target in targets}
"""Rules of functions, and of tensors' methods by name."""

SPATIAL = {
    kind
    for kind, make in (*MODULES.items(), *CALLS.items())
    if make in (_convolution, _transposed_convolution, _local, _average_pool, _adaptive_pool)
}
"""What acts on positions, after the channels."""
