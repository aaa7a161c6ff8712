"""Composite Gauss-Legendre rules, and an elementwise function together with its derivative."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import final

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

# Nodes and weights on [-1, 1].
_RULE = leggauss(16)


def panels(breaks: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss-Legendre rules between neighbours of ``breaks`` `[*, B]`, each `[*, (B-1) nodes]`.

    Breaks need not be sorted; a panel of width zero counts nothing. Nodes move with the breaks under differentiation.
    """
    breaks = breaks.sort(-1).values
    left, right = breaks[..., :-1], breaks[..., 1:]
    wide = right > left
    count = int(wide.sum(-1).max()) if wide.numel() else 0
    if count < wide.shape[-1]:
        # Those of width zero last, and as few as possible of them.
        order = wide.to(torch.uint8).argsort(-1, descending=True)[..., :count]
        left, right = left.gather(-1, order), right.gather(-1, order)
    x, weights = (torch.from_numpy(values).to(breaks) for values in _RULE)
    half = ((right - left) / 2).unsqueeze(-1)
    z = ((left + right) / 2).unsqueeze(-1) + half * x
    return z.flatten(-2), (half * weights).flatten(-2)


def density(z: Tensor) -> Tensor:
    """The density of N(0, 1) at z."""
    return (-0.5 * z**2).exp() / math.sqrt(2 * math.pi)


def ladder(deviation: float, end: float, like: Tensor) -> Tensor:
    """0, ±3/σ, ±12/σ, ±48/σ, ... up to ``end``: panels for rules of 16 nodes.

    They resolve f(σ z) to rounding if f is analytic on the scale of max(1, |σ z|) (tanh, say).
    """
    steps = [0.0]
    step = 3 / max(deviation, 1e-300)
    while step < end:
        steps += [step, -step]
        step *= 4
    return like.new_tensor(steps)


@final
class Elementwise:
    """An elementwise function and its derivative at once.

    Args:
        phi: The function φ, on tensors of any shape.
    """

    def __init__(self, phi: Callable[[Tensor], Tensor]) -> None:
        self._phi = phi

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """φ(u) and φ'(u), each in the shape of u; differentiable if u is."""
        if torch.is_inference_mode_enabled() or u.is_inference():
            with torch.inference_mode(False):
                return self(u.clone())
        differentiable = torch.is_grad_enabled() and u.requires_grad
        with torch.enable_grad():
            u = u if differentiable else u.detach().requires_grad_()
            value = self._phi(u)
            if not value.requires_grad:
                return value, torch.zeros_like(u)
            (slope,) = torch.autograd.grad(value.sum(), u, create_graph=differentiable)
        return (value, slope) if differentiable else (value.detach(), slope.detach())
