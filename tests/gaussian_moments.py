"""Activations and what their Gaussian moments are compared with: φ, its kinks, and dense rules."""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from gpntk.infinite import AbstractActivation, PiecewiseLinear, Quadrature, activation_of
from gpntk.infinite.closed_forms import (
    GELU,
    ABReLU,
    Erf,
    Exponential,
    Gaussian,
    Polynomial,
    RectifiedMonomial,
    Sign,
    Sine,
    Step,
    cosine,
    hermite,
    monomial,
    rbf,
)

D = torch.float64


class Case(NamedTuple):
    activation: AbstractActivation
    phi: Callable[[Tensor], Tensor]
    kinks: tuple[float, ...] = ()
    tolerance: float = 1e-12


def of(target: object, kinks: tuple[float, ...] = (), **options: object) -> Case:
    """By quadrature, with the activation that `activation_of` finds."""
    activation = activation_of(target, **options)
    assert isinstance(activation, Quadrature)
    assert activation.tolerance == 1e-10
    return Case(activation, partial(target, **options) if options else target, kinks, activation.tolerance)  # type: ignore[arg-type]


def gabor(x: Tensor) -> Tensor:
    return (-(x**2)).exp() * x.sin()


ZIGZAG = (-2.0, -0.3, 0.0, 0.7)


def zigzag(x: Tensor) -> Tensor:
    lines = torch.relu(x + 2) * -1.5 + torch.relu(x + 0.3) * 2.5 - 1.9 * torch.relu(x) + 0.2 * torch.relu(x - 0.7)
    return x + 2.4 + lines


def closed(target: object, *args: float, **options: float) -> AbstractActivation:
    """The closed form that `activation_of` finds."""
    activation = activation_of(target, *args, **options)
    assert isinstance(activation, PiecewiseLinear)
    return activation


CLOSED = {
    "identity": Case(ABReLU(1.0, 1.0), lambda x: x),
    "relu": Case(ABReLU(0.0, 1.0), torch.relu, (0.0,)),
    "leaky_relu": Case(ABReLU(0.1, 1.0), lambda x: functional.leaky_relu(x, 0.1), (0.0,)),
    "abrelu": Case(ABReLU(-0.5, 1.2), lambda x: -0.5 * x.clamp(max=0) + 1.2 * x.clamp(min=0), (0.0,)),
    "abs": Case(ABReLU(-1.0, 1.0), torch.abs, (0.0,)),
    "rectmono2": Case(RectifiedMonomial(2), lambda x: torch.relu(x) ** 2, (0.0,)),
    "rectmono3": Case(RectifiedMonomial(3), lambda x: torch.relu(x) ** 3, (0.0,)),
    "rectmono5": Case(RectifiedMonomial(5), lambda x: torch.relu(x) ** 5, (0.0,)),
    "sign": Case(Sign(), torch.sign, (0.0,)),
    "step": Case(Step(), lambda x: 0.5 + 0.5 * torch.sign(x), (0.0,)),
    "erf": Case(Erf(), torch.erf),
    "sigmoid_like": Case(
        Erf(0.5, 1 / 2.4020563531719796, 0.5), lambda x: 0.5 * torch.erf(x / 2.4020563531719796) + 0.5
    ),
    "gelu": Case(GELU(), functional.gelu),
    "sin": Case(Sine(), torch.sin),
    "cos": Case(cosine(), torch.cos),
    "sin_abc": Case(Sine(0.7, 1.3, 0.4), lambda x: 0.7 * torch.sin(1.3 * x + 0.4)),
    "cos_abc": Case(cosine(0.7, 1.3, 0.4), lambda x: 0.7 * torch.cos(1.3 * x + 0.4)),
    "rbf": Case(rbf(0.8), lambda x: math.sqrt(2) * torch.sin(math.sqrt(1.6) * x + math.pi / 4)),
    "exp": Case(Exponential(0.5, 0.3), lambda x: 0.5 * torch.exp(0.3 * x)),
    "gaussian": Case(Gaussian(1.1, 0.6), lambda x: 1.1 * torch.exp(-0.6 * x**2)),
    "monomial2": Case(monomial(2), lambda x: x**2),
    "polynomial": Case(Polynomial((0.1, 0.5, -0.2, 0.05)), lambda x: 0.1 + 0.5 * x - 0.2 * x**2 + 0.05 * x**3),
    "hardtanh": Case(closed(functional.hardtanh), functional.hardtanh, (-1.0, 1.0)),
    "relu6": Case(closed(functional.relu6), functional.relu6, (0.0, 6.0)),
    "hardsigmoid": Case(closed(functional.hardsigmoid), lambda x: (x / 6 + 0.5).clamp(0, 1), (-3.0, 3.0)),
    "clamp_max": Case(closed(torch.clamp, max=0.3), partial(torch.clamp, max=0.3), (0.3,)),
    "clamp_min": Case(closed(torch.clamp, min=-0.2), partial(torch.clamp, min=-0.2), (-0.2,)),
    "zigzag": Case(PiecewiseLinear((-2.0, -0.3, 0.0, 0.7), (1.0, -0.5, 2.0, 0.1, 0.3), 0.4), zigzag, ZIGZAG),
    "hermite4": Case(hermite(4), lambda x: (x**4 - 6 * x**2 + 3) / math.sqrt(24)),
}
BY_QUADRATURE = {
    "tanh": of(torch.tanh),
    "sigmoid": of(torch.sigmoid),
    "silu": of(functional.silu),
    "softplus": of(functional.softplus),
    "softplus_sharp": of(functional.softplus, beta=5.0),
    "mish": of(functional.mish),
    "gelu_tanh": of(functional.gelu, approximate="tanh"),
    "gabor": Case(Quadrature(gabor), gabor, tolerance=1e-10),
    "elu": of(functional.elu, (0.0,)),
    "selu": of(functional.selu, (0.0,)),
    "celu": of(functional.celu, (0.0,), alpha=0.7),
    "softsign": of(functional.softsign, (0.0,)),
    "hardtanh_by_quadrature": Case(
        Quadrature(functional.hardtanh, (-1.0, 1.0)), functional.hardtanh, (-1.0, 1.0), 1e-10
    ),
    "softshrink": of(functional.softshrink, (-0.5, 0.5)),
    "clamp_flat": of(torch.clamp, (0.2,), min=0.2),
    "hardswish": of(functional.hardswish, (-3.0, 3.0)),
}
CASES = CLOSED | BY_QUADRATURE
DISCONTINUOUS = ("sign", "step")


def value_and_slope(phi: Callable[[Tensor], Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    u = u.detach().requires_grad_()
    value = phi(u)
    (slope,) = torch.autograd.grad(value.sum(), u)
    return value.detach(), slope


def panel_rule(breaks: Tensor, nodes: int = 24) -> tuple[Tensor, Tensor]:
    """Weights of N(0, 1) included."""
    x, weights = (torch.from_numpy(array) for array in np.polynomial.legendre.leggauss(nodes))
    breaks = breaks.clamp(-10, 10).sort(-1).values
    half = breaks.diff(dim=-1)[..., None] / 2
    z = (breaks[..., :-1, None] + half + half * x).flatten(-2)
    return z, (half * weights).flatten(-2) * torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)


def dense_twin(case: Case, q1: Tensor, q2: Tensor, k: Tensor) -> Tensor:
    """E[φ(u) φ(v)], E[φ'(u) φ'(v)] of one entry by a dense rule in two dimensions; uniform panels cut at kinks."""
    # In rational numbers: 1 - c² cancels near c = 1.
    a, b, cross = (Fraction(entry.item()) for entry in (q1, q2, k))
    s = torch.tensor(max(float(1 - cross**2 / (a * b)), 0.0), dtype=D).sqrt()
    c = k / (q1 * q2).sqrt()
    even = torch.arange(-10, 10.01, 1, dtype=D)
    t = torch.tensor(case.kinks, dtype=D)
    layers = torch.tensor([0.0, *(sign * 2.0**i for i in range(-1, 5) for sign in (-1, 1))], dtype=D)
    centres = t / (c * q2.sqrt()) if c != 0 else t[:0]
    around = (centres[:, None] + layers * s / c.abs()).flatten() if c != 0 else centres
    z1, weights1 = panel_rule(torch.cat([even, t / q1.sqrt(), around]))
    given = (c * z1)[:, None]
    cuts = (t / q2.sqrt() - given) / s if s > 0 else t.expand(len(z1), -1)
    z2, weights2 = panel_rule(torch.cat([even.expand(len(z1), -1), cuts], -1))
    of_u, of_v = value_and_slope(case.phi, q1.sqrt() * z1), value_and_slope(case.phi, q2.sqrt() * (given + s * z2))
    return torch.stack([(weights1 * a * (weights2 * b).sum(-1)).sum() for a, b in zip(of_u, of_v, strict=True)])


def dense_diagonal(case: Case, q: Tensor) -> Tensor:
    z, weights = panel_rule(
        torch.cat([torch.arange(-10, 10.01, 0.25, dtype=D), torch.tensor(case.kinks, dtype=D) / q.sqrt()]), 40
    )
    return torch.stack([(weights * a**2).sum() for a in value_and_slope(case.phi, q.sqrt() * z)])
