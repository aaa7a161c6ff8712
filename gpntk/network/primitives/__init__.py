"""Fused operations written in primitives: differentiable to any order, and open to the rules of single layers.

J(x) is a first derivative; its gradient in x a second one, and acquisition optimisers take it through `vmap`. The fused
layer and instance norms treat their saved statistics as constants there: torch 2.13 returns wrong numbers without a
word (pytorch issues #175754, #186256). So it does for `cdist` under vmap. The fused attention and recurrent kernels
raise. All are exact in primitives, and consist of calls that `gpntk.jacobians.rules` knows: linear maps, and sums and
products with a parameter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, final

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from gpntk.network.primitives import attention, lookups, norms, recurrent

__all__ = ["by_primitives", "differentiable_operations"]

_PRIMITIVES: dict[Callable[..., Any], Callable[..., Any]] = {
    **lookups.PRIMITIVES,
    **norms.PRIMITIVES,
    **recurrent.PRIMITIVES,
    **attention.PRIMITIVES,
}


def differentiable_operations() -> TorchFunctionMode:
    """A context in which norms, attention and recurrent layers are differentiable to any order; local to a thread."""
    return _Primitives()


def by_primitives(module: nn.Module) -> nn.Module:
    """``module``, whose forward passes, and those of its parts, run under `differentiable_operations` of themselves.

    For passes that are recomputed later, in a backward pass, outside of any context.
    """
    for child in module.modules():
        if not isinstance(child, torch.jit.ScriptModule):
            child.forward = _in_primitives(child.forward)
    return module


_running = threading.local()


def _in_primitives(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if getattr(_running, "on", False):
            return forward(*args, **kwargs)
        _running.on = True
        try:
            with differentiable_operations():
                return forward(*args, **kwargs)
        finally:
            _running.on = False

    return wrapped


@final
class _Primitives(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        return _PRIMITIVES.get(func, func)(*args, **(kwargs or {}))
