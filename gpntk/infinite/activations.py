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
from torch import nn
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


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> Quadrature | None:
    if not beta or threshold < _SMOOTH_THRESHOLD:
        return None
    return Quadrature(partial(functional.softplus, beta=beta, threshold=threshold), scale=1 / abs(beta))


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


def _power(exponent: float) -> AbstractActivation | None:
    natural = isinstance(exponent, (int, float)) and exponent >= 0 and exponent == int(exponent)
    return monomial(int(exponent)) if natural else None


# By torch's names and arguments.
_FUNCTIONS: dict[str, Make] = {
    "abs": lambda: ABReLU(-1.0, 1.0),
    "celu": lambda alpha=1.0: Quadrature(partial(functional.celu, alpha=alpha), _AT_ZERO, scale=abs(alpha)),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "cos": cosine,
    "elu": lambda alpha=1.0: Quadrature(partial(functional.elu, alpha=alpha), _AT_ZERO),
    "erf": Erf,
    "exp": Exponential,
    "gelu": lambda approximate="none": (
        GELU() if approximate == "none" else Quadrature(partial(functional.gelu, approximate=approximate))
    ),
    "hardsigmoid": lambda: PiecewiseLinear((-3.0, 3.0), (0.0, 1 / 6, 0.0)),
    "hardswish": lambda: Quadrature(functional.hardswish, (-3.0, 3.0)),
    "hardtanh": lambda min_val=-1.0, max_val=1.0: _clamp(min_val, max_val),
    "leaky_relu": lambda negative_slope=0.01: ABReLU(float(negative_slope), 1.0),
    "logsigmoid": lambda: Quadrature(functional.logsigmoid),
    "mish": lambda: Quadrature(functional.mish),
    "neg": lambda: Polynomial((0.0, -1.0)),
    "pow": _power,
    "relu": lambda: ABReLU(0.0, 1.0),
    "relu6": lambda: _clamp(0.0, 6.0),
    "selu": lambda: Quadrature(functional.selu, _AT_ZERO),
    "sigmoid": lambda: Quadrature(torch.sigmoid),
    "sign": Sign,
    "silu": lambda: Quadrature(functional.silu),
    "sin": Sine,
    "softplus": _softplus,
    # Flat around zero: see `PiecewiseLinear`.
    "softshrink": lambda lambd=0.5: Quadrature(
        partial(functional.softshrink, lambd=lambd), (-float(lambd), float(lambd))
    ),
    "softsign": lambda: Quadrature(functional.softsign, _AT_ZERO),
    "square": lambda: monomial(2),
    "tanh": lambda: Quadrature(torch.tanh),
    "tanhshrink": lambda: Quadrature(functional.tanhshrink),
}

_SYNONYMS = {"absolute": "abs", "clip": "clamp", "negative": "neg", "sgn": "sign", "special_expit": "sigmoid"}


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


# The function that each module is, and its attributes that are the arguments.
_SAME: dict[type[nn.Module], tuple[str, ...]] = {
    nn.CELU: ("celu", "alpha"),
    nn.ELU: ("elu", "alpha"),
    nn.GELU: ("gelu", "approximate"),
    nn.Hardsigmoid: ("hardsigmoid",),
    nn.Hardswish: ("hardswish",),
    nn.Hardtanh: ("hardtanh", "min_val", "max_val"),
    nn.LeakyReLU: ("leaky_relu", "negative_slope"),
    nn.LogSigmoid: ("logsigmoid",),
    nn.Mish: ("mish",),
    nn.ReLU: ("relu",),
    nn.ReLU6: ("relu6",),
    nn.SELU: ("selu",),
    nn.SiLU: ("silu",),
    nn.Sigmoid: ("sigmoid",),
    nn.Softplus: ("softplus", "beta", "threshold"),
    nn.Softshrink: ("softshrink", "lambd"),
    nn.Softsign: ("softsign",),
    nn.Tanh: ("tanh",),
    nn.Tanhshrink: ("tanhshrink",),
}


def _by_function(module: nn.Module) -> AbstractActivation | None:
    name, *attributes = _SAME[type(module)]
    return _FUNCTIONS[name](*(getattr(module, attribute) for attribute in attributes))


_MODULES: dict[type[nn.Module], Callable[[Any], AbstractActivation | None]] = {
    **dict.fromkeys(_SAME, _by_function),
    Activation: lambda module: module.activation,
    nn.Identity: lambda _: ABReLU(1.0, 1.0),
    # One slope is an activation, a slope per channel is not. The slope is read from the module, and not trained.
    nn.PReLU: lambda module: ABReLU(module.weight.item(), 1.0) if module.weight.numel() == 1 else None,
    nn.RReLU: lambda module: None if module.training else ABReLU((module.lower + module.upper) / 2, 1.0),
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
