"""Rules for what joins, scales and reshapes the branches of a network."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import fx, nn

from gpntk.infinite import layers
from gpntk.infinite.calls import Call, Rule
from gpntk.infinite.layers import Weights
from gpntk.infinite.moments import LayerMoments
from gpntk.infinite.units import Law, Units, together


def unchanged(states: Sequence[LayerMoments], _weights: Weights | None) -> LayerMoments:
    """The only state."""
    return states[0]


def identity(call: Call) -> Rule:
    """The same values, or minus them, which have the same second moments."""
    return Rule(unchanged, call.roles[0], call.units[0])


def add(call: Call) -> Rule:
    """A sum or difference of branches that are uncorrelated: the sign is nothing to second moments."""
    factor = call.arguments(other=None, alpha=1)["alpha"]
    if len(call.roles) != 2:
        if any(isinstance(value, (int, float)) and value == 0 for value in call.args[:2]):
            # Where Python's sum begins.
            return identity(call)
        raise call.refuse("adding a constant gives units a mean, for which there is no rule")
    if not isinstance(factor, (int, float)):
        raise call.refuse(f"alpha={factor} is not a number")
    _check_uncorrelated(call)
    return Rule(partial(_sum, factors=(1.0, float(factor))), call.roles[0], together(call.units))


def _check_uncorrelated(call: Call) -> None:
    """That two branches have the same axes, no layer in common, and not both a mean."""
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


def _sum(states: Sequence[LayerMoments], _weights: Weights | None, factors: Sequence[float]) -> LayerMoments:
    scaled = [
        state if factor == 1 else layers.scale(state, factor) for state, factor in zip(states, factors, strict=True)
    ]
    return layers.add(_alike(scaled))


def _alike(states: Sequence[LayerMoments]) -> list[LayerMoments]:
    """All with pairs of positions, or none: another use of one may have asked for its pairs."""
    return list(states) if all(state.pairs for state in states) else [state.equal_positions() for state in states]


def concatenate(call: Call) -> Rule:
    """Channels beside each other: their variances differ, so that they are no draws of one Gaussian process."""
    dim = call.arguments(dim=0)["dim"]
    if call.roles[0][dim] != "c" or any(roles != call.roles[0] for roles in call.roles):
        raise call.refuse("only channels can be concatenated")
    channels = tuple(shape[dim] for shape in call.shapes)
    return Rule(partial(_beside, channels=channels), call.roles[0], together(call.units).at_most(Law.CENTRED))


def _beside(states: Sequence[LayerMoments], _weights: Weights | None, channels: Sequence[int]) -> LayerMoments:
    return layers.concatenate(_alike(states), channels)


def scale(call: Call, power: int) -> Rule:
    """A product with a number, or a quotient by one; or a product of two branches that are uncorrelated."""
    call.arguments(other=None)
    if power == 1 and len(call.roles) == 2:
        _check_uncorrelated(call)
        law = min(Law.CENTRED, max(units.law for units in call.units))
        return Rule(_product, call.roles[0], Units(law, together(call.units).sources))
    factors = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, (int, float))]
    reciprocal = power < 0 and any(isinstance(value, (int, float)) for value in call.args[:1])
    if len(call.roles) != 1 or len(factors) != 1 or reciprocal:
        raise call.refuse("only products of two branches, and products with, and quotients by, a number have a rule")
    return Rule(partial(_scaled, factor=float(factors[0]) ** power), call.roles[0], call.units[0])


def _product(states: Sequence[LayerMoments], _weights: Weights | None) -> LayerMoments:
    return layers.multiply(*_alike(states))


def _scaled(states: Sequence[LayerMoments], _weights: Weights | None, factor: float) -> LayerMoments:
    return layers.scale(states[0], factor)


def flatten(call: Call) -> Rule:
    """All positions become units; their variances may differ."""
    if call.output == call.shapes[0]:
        return identity(call)
    if len(call.output) != 2:
        raise call.refuse(f"reshaping {call.shapes[0]} to {call.output} has no rule: flatten all positions, or none")
    sizes = [size for size, role in zip(call.shapes[0], call.roles[0], strict=True) if role.startswith("s")]
    several = any(size > 1 for size in sizes)
    units = call.units[0].at_most(Law.CENTRED) if several else call.units[0]
    return Rule(_flattened, ("n", "c"), units, forgets=True)


def _flattened(states: Sequence[LayerMoments], _weights: Weights | None) -> LayerMoments:
    return layers.flatten(states[0])


def permute(call: Call) -> Rule:
    """Another order of axes."""
    order = call.args[1:] or (call.kwargs["dims"],)
    order = order[0] if isinstance(order[0], (tuple, list)) else order
    return Rule(unchanged, tuple(call.roles[0][dim] for dim in order), call.units[0])


def transpose(call: Call) -> Rule:
    """Two axes exchanged."""
    roles, dims = list(call.roles[0]), call.arguments(dim0=0, dim1=0)
    one, two = dims["dim0"], dims["dim1"]
    roles[one], roles[two] = roles[two], roles[one]
    return Rule(unchanged, tuple(roles), call.units[0])


def reduce(call: Call, total: bool) -> Rule:
    """The mean, or ``total``, over positions."""
    settings = call.arguments(dim=None, keepdim=False)
    roles, dims = call.roles[0], settings["dim"]
    dims = list(range(len(roles))) if dims is None else [dims] if isinstance(dims, int) else list(dims)
    chosen = [roles[dim] for dim in dims]
    if not all(role.startswith("s") for role in chosen):
        raise call.refuse("means and sums are over positions only")
    axes, keep = tuple(call.positions.index(role) for role in chosen), bool(settings["keepdim"])
    rest = tuple(role for role in roles if keep or role not in chosen)
    return Rule(partial(_reduced, axes=axes, total=total, keep=keep), rest, call.units[0], mixes=True)


def squeeze(call: Call) -> Rule:
    """Without axes of one position, or an output's axis of one channel."""
    roles, dims = call.roles[0], call.arguments(dim=None)["dim"]
    dims = range(len(roles)) if dims is None else [dims] if isinstance(dims, int) else dims
    chosen = [roles[dim] for dim in dims if call.shapes[0][dim] == 1]
    axes = tuple(call.positions.index(role) for role in chosen if role != "c")
    rest = tuple(role for role in roles if role not in chosen)
    return Rule(partial(_reduced, axes=axes), rest, call.units[0])


def _reduced(
    states: Sequence[LayerMoments],
    _weights: Weights | None,
    axes: Sequence[int],
    total: bool = False,
    keep: bool = False,
) -> LayerMoments:
    return layers.reduce_axes(states[0], axes, total, keep)


def pad(call: Call) -> Rule:
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
    apply = partial(_padded, paddings=tuple(paddings), circular=mode == "circular")
    return Rule(apply, call.roles[0], call.units[0])


def _padded(
    states: Sequence[LayerMoments], _weights: Weights | None, paddings: Sequence[tuple[int, int]], circular: bool
) -> LayerMoments:
    return layers.pad(states[0], paddings, circular)
