"""Between the hosts' batch conventions `[..., N, D]` and the backends' layout `[B, N, D]`, columns leading."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gpntk.memory import tracks_gradient

Index = slice | Tensor | int


def collapse(x: Tensor) -> Tensor:
    """Reduce every batch dimension of x that is only an ``expand`` to size one, unless a gradient tells them apart."""
    if tracks_gradient(x):
        return x
    for dim in range(x.dim() - 2):
        if x.shape[dim] > 1 and x.stride(dim) == 0:
            x = x.narrow(dim, 0, 1)
    return x


def batch_product(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor) -> Tensor:
    """``product(x, w)`` for x `[..., N, D]` and columns w `[..., K, R]` whose batch dimensions broadcast.

    Where x has a single batch element, all batches of columns go through one product.
    """
    batch = torch.broadcast_shapes(x.shape[:-2], w.shape[:-2])
    single = collapse(x)
    if single.shape[:-2].numel() == 1:
        columns = w.shape[:-1].numel()
        result = product(single.reshape(1, *x.shape[-2:]), w.reshape(1, columns, w.shape[-1]))
        return result.reshape(*w.shape[:-1], result.shape[-1]).expand(*batch, w.shape[-2], result.shape[-1])
    result = product(flatten_batch(x, batch), flatten_batch(w, batch))
    return result.reshape(*batch, *result.shape[-2:])


def zero_product(shape: torch.Size, rhs: Tensor) -> Tensor:
    """The product of a matrix `[..., R, S]` with ``rhs`` `[..., S, K]` where some dimension is zero."""
    return rhs.new_zeros(*torch.broadcast_shapes(shape[:-2], rhs.shape[:-2]), shape[-2], rhs.shape[-1])


def flatten_batch(x: Tensor, batch: torch.Size) -> Tensor:
    """`[..., N, D]` expanded to ``batch`` as `[B, N, D]`."""
    return x.expand(*batch, *x.shape[-2:]).reshape(batch.numel(), *x.shape[-2:])


def row_to_sample(index: Index, num_rows: int, outputs: int) -> Index | None:
    """The index of samples that selects the same as an index of Jacobian rows n*C + c; None if it splits a sample."""
    if outputs == 1:
        return index
    if isinstance(index, slice):
        start, stop, step = index.indices(num_rows)
        if step == 1 and start % outputs == 0 and stop % outputs == 0:
            return slice(start // outputs, max(stop, start) // outputs)
    return None
