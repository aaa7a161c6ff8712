"""Fused operations written in primitives: differentiable to any order, and open to the rules of single layers.

J(x) is a first derivative; its gradient in x a second one, and acquisition optimisers take it through `vmap`. The fused
layer and instance norms treat their saved statistics as constants there: torch 2.13 returns wrong numbers without a
word (pytorch issues #175754, #186256). So it does for `cdist` under vmap. The fused attention and recurrent kernels
raise. All are exact in primitives, and consist of calls that `gpntk.jacobians.rules` knows: linear maps, and sums and
products with a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from torch.overrides import TorchFunctionMode

from gpntk.network.primitives import activations, attention, distances, lookups, norms, recurrent

__all__ = ["differentiable_operations"]

_PRIMITIVES: dict[Callable[..., Any], Callable[..., Any]] = {
    **activations.PRIMITIVES,
    **distances.PRIMITIVES,
    **lookups.PRIMITIVES,
    **norms.PRIMITIVES,
    **recurrent.PRIMITIVES,
    **attention.PRIMITIVES,
}


def differentiable_operations() -> TorchFunctionMode:
    """A context in which norms, attention and recurrent layers are differentiable to any order; local to a thread."""
    return _Primitives()


@final
class _Primitives(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        return _PRIMITIVES.get(func, func)(*args, **(kwargs or {}))
