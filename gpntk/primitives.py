"""Fused operations that torch cannot differentiate often enough, written in primitives.

J(x) is a first derivative; its gradient in x a second one, and acquisition optimisers take it through `vmap`. The fused
layer and instance norms treat their saved statistics as constants there: torch 2.13 returns wrong numbers without a
word (pytorch issues #175754, #186256). The fused attention and recurrent kernels raise. All are exact in primitives.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_SWITCHES = threading.RLock()


def differentiable_operations() -> TorchFunctionMode:
    """A context in which norms, attention and recurrent layers are differentiable to any order; local to a thread."""
    return _Primitives()


@contextmanager
def _plain_recurrent_kernels() -> Iterator[None]:
    """Composite recurrent layers, by switches of the whole process: one thread at a time may turn them."""
    # torch.backends.mkldnn.flags would also touch an Intel GPU setting, with a warning on every other machine.
    with _SWITCHES, torch.backends.cudnn.flags(enabled=False):
        enabled = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            yield
        finally:
            torch._C._set_mkldnn_enabled(enabled)


def _standardized(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centered = x - x.mean(dims, keepdim=True)
    return centered * (centered.square().mean(dims, keepdim=True) + eps).rsqrt()


def _layer_norm(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,  # noqa: ARG001 (only torch.layer_norm has it)
) -> Tensor:
    scaled = _standardized(input, tuple(range(-len(normalized_shape), 0)), eps)
    scaled = scaled if weight is None else scaled * weight
    return scaled if bias is None else scaled + bias


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return functional.instance_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    scaled = _standardized(input, tuple(range(2, input.dim())), eps)
    channel = (-1, *[1] * (input.dim() - 2))
    scaled = scaled if weight is None else scaled * weight.view(channel)
    return scaled if bias is None else scaled + bias.view(channel)


_PRIMITIVES: dict[Callable[..., Any], Callable[..., Tensor]] = {
    functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    functional.instance_norm: _instance_norm,
}
_RECURRENT = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})
_ATTENTION = frozenset({functional.multi_head_attention_forward, functional.scaled_dot_product_attention})


@final
class _Primitives(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if func in _RECURRENT:
            with _plain_recurrent_kernels():
                return func(*args, **(kwargs or {}))
        if func in _ATTENTION:
            with _SWITCHES, sdpa_kernel(SDPBackend.MATH):
                return func(*args, **(kwargs or {}))
        return _PRIMITIVES.get(func, func)(*args, **(kwargs or {}))
