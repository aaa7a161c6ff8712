"""Which activation of `gpntk.infinite` a module or function of torch is.

Closed forms where there are any, else `Quadrature` with the kinks that torch's function has.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpntk.infinite.closed_forms import GELU, ABReLU, Erf, Exponential, Polynomial, Sign, Sine, cosine, monomial
from gpntk.infinite.gaussian import AbstractActivation
from gpntk.infinite.modules import Activation
from gpntk.infinite.quadrature import Quadrature
from gpntk.infinite.straight_lines import PiecewiseLinear

Make = Callable[..., AbstractActivation | None]
"""Makes an activation of the arguments that follow the input in a call."""

_AT_ZERO = (0.0,)
# From here on the jump of torch's softplus at its threshold, exp(-threshold), is nothing to a tolerance of 1e-10.
_SMOOTH_THRESHOLD = 20.0


def _relu() -> ABReLU:
    return ABReLU(0.0, 1.0)


def _leaky_relu(negative_slope: float = 0.01) -> ABReLU:
    return ABReLU(float(negative_slope), 1.0)


def _gelu(approximate: str = "none") -> AbstractActivation:
    return GELU() if approximate == "none" else Quadrature(partial(functional.gelu, approximate=approximate))


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> Quadrature | None:
    if not beta or threshold < _SMOOTH_THRESHOLD:
        return None
    return Quadrature(partial(functional.softplus, beta=beta, threshold=threshold), scale=1 / abs(beta))


def _elu(alpha: float = 1.0) -> Quadrature:
    return Quadrature(partial(functional.elu, alpha=alpha), _AT_ZERO)


def _celu(alpha: float = 1.0) -> Quadrature:
    return Quadrature(partial(functional.celu, alpha=alpha), _AT_ZERO, scale=abs(alpha))


def _selu() -> Quadrature:
    return Quadrature(functional.selu, _AT_ZERO)


def _clamp(min: float | None = None, max: float | None = None) -> AbstractActivation:
    low, high = -math.inf if min is None else float(min), math.inf if max is None else float(max)
    knots = tuple(end for end in (low, high) if math.isfinite(end))
    slopes = (*[0.0] * math.isfinite(low), 1.0, *[0.0] * math.isfinite(high))
    if low >= high:
        return Polynomial((high,))
    if not low <= 0 <= high:
        # Flat around zero: see `PiecewiseLinear`.
        return Quadrature(partial(torch.clamp, min=low, max=high), knots)
    return ABReLU(slopes[0], slopes[-1]) if knots in ((), (0.0,)) else PiecewiseLinear(knots, slopes, knots[0])


def _hardtanh(min_val: float = -1.0, max_val: float = 1.0) -> AbstractActivation:
    return _clamp(min_val, max_val)


def _softshrink(lambd: float = 0.5) -> Quadrature:
    # Flat around zero: see `PiecewiseLinear`.
    return Quadrature(partial(functional.softshrink, lambd=lambd), (-float(lambd), float(lambd)))


def _power(exponent: float) -> AbstractActivation | None:
    natural = isinstance(exponent, (int, float)) and exponent >= 0 and exponent == int(exponent)
    return monomial(int(exponent)) if natural else None


def _plain(phi: Callable[..., Tensor], kinks: tuple[float, ...] = ()) -> Make:
    return lambda: Quadrature(phi, kinks)


def _constant(activation: AbstractActivation) -> Make:
    return lambda: activation


_FUNCTIONS: dict[str, Make] = {
    "abs": _constant(ABReLU(-1.0, 1.0)),
    "celu": _celu,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "cos": _constant(cosine()),
    "elu": _elu,
    "erf": _constant(Erf()),
    "exp": _constant(Exponential()),
    "gelu": _gelu,
    "hardsigmoid": _constant(PiecewiseLinear((-3.0, 3.0), (0.0, 1 / 6, 0.0))),
    "hardswish": _plain(functional.hardswish, (-3.0, 3.0)),
    "hardtanh": _hardtanh,
    "leaky_relu": _leaky_relu,
    "logsigmoid": _plain(functional.logsigmoid),
    "mish": _plain(functional.mish),
    "neg": _constant(Polynomial((0.0, -1.0))),
    "pow": _power,
    "relu": _relu,
    "relu6": _constant(_clamp(0.0, 6.0)),
    "selu": _selu,
    "sigmoid": _plain(torch.sigmoid),
    "sign": _constant(Sign()),
    "silu": _plain(functional.silu),
    "sin": _constant(Sine()),
    "softplus": _softplus,
    "softshrink": _softshrink,
    "softsign": _plain(functional.softsign, _AT_ZERO),
    "square": _constant(monomial(2)),
    "tanh": _plain(torch.tanh),
    "tanhshrink": _plain(functional.tanhshrink),
}

_SYNONYMS = {
    "absolute": "abs",
    "clip": "clamp",
    "negative": "neg",
    "sgn": "sign",
    "special_expit": "sigmoid",
}


def _callables() -> dict[Any, Make]:
    """Every name above in torch, torch.nn.functional and among the methods of tensors, in-place forms included."""
    found: dict[Any, Make] = {operator.neg: _FUNCTIONS["neg"], operator.pow: _power}
    found |= {operator.abs: _FUNCTIONS["abs"], abs: _FUNCTIONS["abs"], torch.special.erf: _FUNCTIONS["erf"]}
    for name, make in {**_FUNCTIONS, **{name: _FUNCTIONS[to] for name, to in _SYNONYMS.items()}}.items():
        for variant in (name, name + "_"):
            homes = (vars(torch), vars(functional), vars(torch._C.TensorBase))
            found |= {home[variant]: make for home in homes if variant in home}
            if variant in vars(torch._C.TensorBase):
                found |= {variant: make, getattr(torch.Tensor, variant): make}
    return found


_CALLABLES = _callables()


_MODULES: dict[type[nn.Module], Callable[[Any], AbstractActivation | None]] = {
    Activation: lambda module: module.activation,
    nn.CELU: lambda module: _celu(module.alpha),
    nn.ELU: lambda module: _elu(module.alpha),
    nn.GELU: lambda module: _gelu(module.approximate),
    nn.Hardsigmoid: lambda _: _FUNCTIONS["hardsigmoid"](),
    nn.Hardswish: lambda _: _FUNCTIONS["hardswish"](),
    nn.Hardtanh: lambda module: _hardtanh(module.min_val, module.max_val),
    nn.Identity: lambda _: ABReLU(1.0, 1.0),
    nn.LeakyReLU: lambda module: _leaky_relu(module.negative_slope),
    nn.LogSigmoid: lambda _: _FUNCTIONS["logsigmoid"](),
    nn.Mish: lambda _: _FUNCTIONS["mish"](),
    # One slope is an activation, a slope per channel is not. The slope is read from the module, and not trained.
    nn.PReLU: lambda module: _leaky_relu(module.weight.item()) if module.weight.numel() == 1 else None,
    nn.ReLU: lambda _: _relu(),
    nn.ReLU6: lambda _: _FUNCTIONS["relu6"](),
    nn.RReLU: lambda module: None if module.training else _leaky_relu((module.lower + module.upper) / 2),
    nn.SELU: lambda _: _selu(),
    nn.SiLU: lambda _: _FUNCTIONS["silu"](),
    nn.Sigmoid: lambda _: _FUNCTIONS["sigmoid"](),
    nn.Softplus: lambda module: _softplus(module.beta, module.threshold),
    nn.Softshrink: lambda module: _softshrink(module.lambd),
    nn.Softsign: lambda _: _FUNCTIONS["softsign"](),
    nn.Tanh: lambda _: _FUNCTIONS["tanh"](),
    nn.Tanhshrink: lambda _: _FUNCTIONS["tanhshrink"](),
}


def activation_of(target: Any, *args: Any, **options: Any) -> AbstractActivation | None:
    """The activation that a module, function or tensor method is; None if it is none that is known to act elementwise.

    Args:
        target: An `nn.Module`, a function such as ``torch.relu``, the name of a method of tensors, or an
            `AbstractActivation`, which is returned.
        *args: What follows the input in a call of the function.
        **options: The same by name.

    Example:
        >>> activation_of(nn.LeakyReLU(0.2))
        ABReLU(a=0.2, b=1.0)
        >>> activation_of(torch.nn.functional.gelu)
        GELU()
        >>> activation_of(nn.Softmax(-1)) is None
        True
    """
    if isinstance(target, AbstractActivation):
        return target
    if isinstance(target, nn.Module):
        # A subclass may have another forward.
        make, args, options = _MODULES.get(type(target)), (target,), {}
    else:
        make = _CALLABLES.get(target) if isinstance(target, Hashable) else None
        args = args[:-1] if args and isinstance(args[-1], bool) else args
        options = {name: value for name, value in options.items() if name != "inplace"}
    if make is None:
        return None
    try:
        return make(*args, **options)
    except TypeError:
        # An argument that the function with a known limit does not have, or a tensor for a number.
        return None
