"""Elementwise work that needs much memory per entry, a part of the entries at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def by_chunks(
    function: Callable[..., Tensor], arguments: Sequence[Tensor], entries: int, trailing: Sequence[int] | None = None
) -> Tensor:
    """``function(*arguments)``, computed for about ``entries`` of the entries at a time.

    Under automatic differentiation nothing is kept but the arguments: a part is computed again in the backward pass.

    Args:
        function: Acts on every entry by itself, and may append dimensions.
        arguments: Tensors that broadcast together, not counting their ``trailing`` dimensions.
        entries: Entries computed together, at least one.
        trailing: Number of last dimensions of each argument that do not belong to entries; zeros if None.
    """
    trailing = trailing or [0] * len(arguments)
    shapes = [argument.shape[: argument.dim() - last] for argument, last in zip(arguments, trailing, strict=True)]
    shape = torch.broadcast_shapes(*shapes)
    if shape.numel() > max(entries, 1):
        # Dimensions are counted from the last one that belongs to entries.
        back = max(range(len(shape)), key=lambda dim: shape[dim])
        size = shape[back]
        dim = back - len(shape)
        parts = []
        for start, length in ((0, size // 2), (size // 2, size - size // 2)):
            cut = [
                argument.narrow(dim - last, start, length) if len(own) >= -dim and own[dim] > 1 else argument
                for argument, own, last in zip(arguments, shapes, trailing, strict=True)
            ]
            parts.append(by_chunks(function, cut, entries, trailing))
        return torch.cat(parts, back)
    if torch.is_grad_enabled() and any(argument.requires_grad for argument in arguments):
        result = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(result, Tensor)
        return result
    return function(*arguments)
