"""Embeddings as plain lookups; distances between rows and activations with parameters, which torch gets wrong.

torch's own embeddings leave the row of ``padding_idx`` out of reverse-mode derivatives but not of forward-mode ones,
and rescale derivatives where ``scale_grad_by_freq`` is set. Here the padding row is constant in both, and nothing is
rescaled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,  # noqa: ARG001
    sparse: bool = False,  # noqa: ARG001
) -> Tensor:
    if max_norm is not None:
        return functional.embedding(input, weight, padding_idx, max_norm, norm_type)
    found = functional.embedding(input, weight)
    if padding_idx is None:
        return found
    padding = input == padding_idx % weight.shape[0]
    return torch.where(padding.unsqueeze(-1), found.detach(), found)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    if input.dim() != 2 or mode == "max" or max_norm is not None or padding_idx is not None:
        options = (max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights, include_last_offset)
        return functional.embedding_bag(input, weight, offsets, *options, padding_idx)
    found = functional.embedding(input, weight)
    if per_sample_weights is not None:
        found = found * per_sample_weights.unsqueeze(-1)
    return found.mean(-2) if mode == "mean" else found.sum(-2)


def _prelu(input: Tensor, weight: Tensor) -> Tensor:
    # Under two nested vmaps of one size, torch 2.13 gets the derivative of the fused function wrong without a word.
    slope = weight if weight.numel() == 1 else weight.view(-1, *[1] * (input.dim() - 2))
    return torch.where(input > 0, input, input * slope)


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:  # noqa: ARG001
    """``torch.cdist``, whose backward pass torch 2.13 gets wrong under vmap, and which has no forward mode."""
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, dim=-1)


PRIMITIVES: dict[Callable[..., Any], Callable[..., Tensor]] = {
    functional.embedding: _embedding,
    functional.embedding_bag: _embedding_bag,
    functional.prelu: _prelu,
    torch.prelu: _prelu,
    torch.cdist: _cdist,
}
