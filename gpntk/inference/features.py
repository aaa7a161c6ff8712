"""The features Φ = J(x) of all data, wherever the data are: in memory, on disk, or spread over processes.

Everything that inference needs of the data are products with Φ and Φᵀ and, for direct solvers, explicit rows of Φ. Both
are written here once against `AbstractFeatures.parts`, which hands out x piece by piece.

Vectors lead with their columns: v `[K, F]` in weight space, u `[K, n]` in function space, n = N*C rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Self, final

import torch
from torch import Tensor

from gpntk.jacobians import AbstractJacobianBackend
from gpntk.jacobians.memory import chunks

# Columns of a block of the second moment: large enough for a GEMM at full speed.
_BLOCK = 1024


def exact_dtype(device: torch.device) -> torch.dtype:
    """float64, in which factorisations and residuals are computed whatever the dtype of the data, where it exists."""
    return torch.float32 if device.type == "mps" else torch.float64


class AbstractFeatures(ABC):
    """Φ `[n, F]` by its products.

    Args:
        backend: How Jacobian products are computed.
        dtype: Of products.
        device: Of products.
    """

    def __init__(self, backend: AbstractJacobianBackend, dtype: torch.dtype, device: torch.device) -> None:
        self.backend, self.dtype, self.device = backend, dtype, device

    # --- what differs ------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """n = N*C, the rows that this process holds."""

    @abstractmethod
    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Which rows of Φ, and the inputs `[N', D]` they belong to, piece by piece."""

    @abstractmethod
    def sample(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs `[count, D]` drawn without replacement from all data, and their place among the samples held."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Self:
        """The same features computed in another precision."""

    @abstractmethod
    def remember(self, kind: Hashable, compute: Callable[[], Any]) -> Any:
        """``compute()``, or what it gave the last time for these data."""

    @property
    def sharded(self) -> bool:
        """Whether rows are spread over processes."""
        return False

    def total(self, local: Tensor) -> Tensor:
        """The sum over all processes of what each has."""
        return local

    # --- what follows ------------------------------------------------------------------------------------------

    @property
    def num_features(self) -> int:
        """F."""
        return self.backend.num_features

    def jvp(self, v: Tensor) -> Tensor:
        """Φ v `[K, n]` for v `[K, F]`."""
        pieces = [self.backend.jvp(x.unsqueeze(0), v.unsqueeze(0)).squeeze(0) for _, x in self.parts()]
        return torch.cat(pieces, -1)

    def vjp(self, u: Tensor) -> Tensor:
        """Φᵀ u `[K, F]` for u `[K, n]`."""
        total = torch.zeros(u.shape[0], self.num_features, dtype=self.dtype, device=self.device)
        for rows, x in self.parts():
            total += self.backend.vjp(x.unsqueeze(0), u[:, rows].unsqueeze(0)).squeeze(0)
        return self.total(total)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Explicit rows of Φ `[n', F]`, as many at a time as an eighth of the memory budget holds."""
        for rows, x in self.parts():
            outputs = (rows.stop - rows.start) // max(1, x.shape[0])
            bytes_each = outputs * self.num_features * x.element_size()
            for part in chunks(x.shape[0], bytes_each, self.backend.memory_budget // 8):
                block = self.backend.jacobian(x[part].unsqueeze(0)).squeeze(0)
                start = rows.start + part.start * outputs
                yield slice(start, start + block.shape[0]), block

    def second_moment(self, row_scales: Tensor | None = None) -> Tensor:
        """Φᵀ W² Φ `[F, F]` for W = diag(``row_scales`` `[n]`), n F² operations, without ever holding all of Φ."""
        total = torch.zeros(self.num_features, self.num_features, dtype=self.dtype, device=self.device)
        for rows, block in self.blocks():
            add_second_moment(total, block if row_scales is None else block * row_scales[rows].unsqueeze(-1))
        mirror(total)
        return self.total(total)

    def diagonal(self, per_layer: bool = False) -> Tensor:
        """Squared norms of the rows of Φ, of all features or by layer, `[G, n]`."""
        pieces = [self.backend.diagonal(x.unsqueeze(0), per_layer).squeeze(0) for _, x in self.parts()]
        return torch.cat(pieces, -1)


def add_second_moment(total: Tensor, block: Tensor) -> None:
    """Add BᵀB to the upper triangle of ``total`` `[F, F]`, by blocks of columns: half of the operations."""
    for start in range(0, total.shape[0], _BLOCK):
        stop = start + _BLOCK
        total[start:stop, start:].addmm_(block[:, start:stop].mT, block[:, start:])


def mirror(upper: Tensor) -> None:
    """Fill what `add_second_moment` left out, by symmetry."""
    for start in range(0, upper.shape[0], _BLOCK):
        stop = start + _BLOCK
        upper[stop:, start:stop] = upper[start:stop, stop:].mT


@final
class Features(AbstractFeatures):
    """The features of inputs x `[N, D]` in memory.

    Example:
        >>> import torch, gpntk
        >>> from gpntk.inference import Features
        >>> backend = gpntk.AutoBackend(gpntk.freeze(torch.nn.Linear(3, 2)))
        >>> features = Features(backend, torch.randn(5, 3))
        >>> features.num_rows, features.num_features, features.second_moment().shape
        (10, 8, torch.Size([8, 8]))
    """

    def __init__(self, backend: AbstractJacobianBackend, x: Tensor) -> None:
        super().__init__(backend, x.dtype, x.device)
        self.x = x
        self._outputs = backend.num_outputs(x)

    @property
    def num_rows(self) -> int:
        return self.x.shape[0] * self._outputs

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        yield slice(0, self.num_rows), self.x

    def sample(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        chosen = draw(self.x.shape[0], count, seed).to(self.device)
        return self.x[chosen], chosen

    def to(self, dtype: torch.dtype) -> Features:
        if dtype == self.dtype:
            return self
        # Cast once: what is kept for a tensor is found by its memory.
        return Features(self.backend, self.backend.remember(("cast", dtype), (self.x,), lambda: self.x.to(dtype)))

    def remember(self, kind: Hashable, compute: Callable[[], Any]) -> Any:
        return self.backend.remember(kind, (self.x,), compute)


def draw(total: int, count: int, seed: int) -> Tensor:
    """``count`` of ``total`` numbers without replacement, in increasing order, on the CPU."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randperm(total, generator=generator, device="cpu")[:count].sort().values
