"""Attention as its projections and a plain softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def _scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (tensor.repeat_interleave(groups, -3) for tensor in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * scale) @ key.mT
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None:
        weights = scores.softmax(-1)
    else:
        masked = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        # Who attends to nothing gets zero, and no NaN in the derivative either.
        nothing = (masked == -torch.inf).all(-1, keepdim=True)
        weights = masked.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    if dropout_p > 0:
        weights = functional.dropout(weights, dropout_p)
    return weights @ value


# torch's own function hands the whole call to a torch function mode; a copy that does not look for one runs its body,
# whose projections the mode then sees one by one.
_multi_head_attention_forward = FunctionType(
    functional.multi_head_attention_forward.__code__,
    {
        **vars(functional),
        "has_torch_function": lambda _tensors: False,
        "scaled_dot_product_attention": _scaled_dot_product_attention,
    },
    argdefs=functional.multi_head_attention_forward.__defaults__,
)

PRIMITIVES: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.scaled_dot_product_attention: _scaled_dot_product_attention,
    functional.multi_head_attention_forward: _multi_head_attention_forward,
}
