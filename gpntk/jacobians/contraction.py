"""Grams and diagonals by contracting explicit Jacobians, block by block within the memory budget."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gpntk.jacobians.backend import AbstractJacobianBackend
from gpntk.memory import chunks

# Features summed at once by a matrix product: of few rows, each sum is one after another, and its rounding grows.
_FEATURES = 2**16


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """A Bᵀ `[..., n, m]` for A `[..., n, F]` and B `[..., m, F]`, to the precision of their dtype whatever F.

    In float32, a plain product of five rows and F = 10⁷ is off by 1e-3; slice by slice, as fast, by 1e-6.
    """
    pairs = zip(a.split(_FEATURES, -1), b.split(_FEATURES, -1), strict=True)
    return functools.reduce(torch.add, (left @ right.mT for left, right in pairs))


def row_chunks(backend: AbstractJacobianBackend, x: Tensor) -> list[slice]:
    """Chunks of the rows of x `[B, N, D]` whose Jacobian, and a copy of it, fit the budget."""
    row_bytes = 2 * x.shape[0] * backend.num_outputs(x) * backend.num_features * x.element_size()
    return list(chunks(x.shape[1], row_bytes, backend.memory_budget))


def contracted_gram(backend: AbstractJacobianBackend, x1: Tensor, x2: Tensor, per_layer: bool) -> Tensor:
    """J_g(x1) J_g(x2)ᵀ `[B, G, N*C, M*C]`: 2*N*M*C²*P flops once the Jacobians are there."""
    groups = backend.layer_slices(per_layer)
    blocks = []
    for rows in row_chunks(backend, x1):
        left = backend.jacobian(x1[:, rows])
        columns = []
        for others in row_chunks(backend, x2):
            right = left if x1 is x2 and rows == others else backend.jacobian(x2[:, others])
            columns.append(torch.stack([inner_products(left[..., g], right[..., g]) for g in groups], dim=1))
        blocks.append(torch.cat(columns, dim=-1))
    return torch.cat(blocks, dim=-2)


def contracted_diagonal(backend: AbstractJacobianBackend, x: Tensor, per_layer: bool) -> Tensor:
    """|J_g(x)|² row by row, `[B, G, N*C]`."""
    groups = backend.layer_slices(per_layer)
    parts = []
    for rows in row_chunks(backend, x):
        jacobian = backend.jacobian(x[:, rows])
        parts.append(torch.stack([jacobian[..., g].square().sum(-1) for g in groups], dim=1))
    return torch.cat(parts, dim=-1)
