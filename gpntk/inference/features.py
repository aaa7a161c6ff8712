"""The features Φ = J(x) of all data, wherever the data are: in memory, on disk, or spread over processes.

Everything that inference needs of the data are products with Φ and Φᵀ and, for direct solvers, explicit rows of Φ. Both
are written here once against `AbstractFeatures.parts`, which hands out x piece by piece.

Vectors lead with their columns: v `[K, F]` in weight space, u `[K, n]` in function space, n = N*C rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from contextlib import nullcontext
from typing import Any, Self, final

import numpy as np
import torch
from torch import Tensor

from gpntk._checks import check_input, check_kinds
from gpntk.errors import InputError
from gpntk.inference.ranks import AbstractRanks, Alone
from gpntk.jacobians import AbstractJacobianBackend
from gpntk.memory import chunks, passing

# Columns of a block of the second moment: large enough for a GEMM at full speed.
_BLOCK = 1024
# Explicit rows at a time, at most: products with them are no faster for being larger, and copies of them add up.
_BLOCK_BYTES = 2**28


def exact_dtype(device: torch.device) -> torch.dtype:
    """float64, in which factorisations and residuals are computed whatever the dtype of the data, where it exists."""
    return torch.float32 if device.type == "mps" else torch.float64


class AbstractFeatures(ABC):
    """The features of all data, a matrix Φ `[n, F]` known by its products.

    Args:
        backend: How Jacobian products are computed.
        dtype: Of products.
        device: Of products.
        samples: N, the inputs that this process holds.
        outputs: C, rows of Φ for each.
        ranks: The processes that share the rows; by default there is but this one.
        place: Where the samples held stand among those of all processes, and how many those are.
        memory_budget: Bytes that work outside the backend stays within, the same in all processes, as they must do the
            same; default: that of the backend.
    """

    def __init__(
        self,
        backend: AbstractJacobianBackend,
        dtype: torch.dtype,
        device: torch.device,
        samples: int,
        outputs: int,
        *,
        ranks: AbstractRanks | None = None,
        place: tuple[int, int] | None = None,
        memory_budget: int | None = None,
    ) -> None:
        self.backend, self.dtype, self.device = backend, dtype, device
        self.num_samples, self.num_outputs = samples, outputs
        self.ranks: AbstractRanks = ranks or Alone()
        self.place, self._memory_budget = place or (0, samples), memory_budget

    def __repr__(self) -> str:
        return f"{type(self).__name__}{[self.num_rows, self.num_features]}"

    # --- what differs ------------------------------------------------------------------------------------------

    @abstractmethod
    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Which rows of Φ, and the inputs `[N', D]` they belong to, piece by piece; nothing if there are none."""

    @abstractmethod
    def take(self, chosen: Tensor) -> Tensor:
        """The inputs `[M, D]` at increasing places ``chosen`` `[M]` among the samples held."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Self:
        """The same features computed in another precision."""

    @abstractmethod
    def remember(self, kind: Hashable, compute: Callable[[], Any]) -> Any:
        """``compute()``, or what it gave the last time for these data."""

    @abstractmethod
    def holds(self, kind: Hashable) -> bool:
        """Whether `remember` would compute nothing."""

    # --- what follows ------------------------------------------------------------------------------------------

    @property
    def sharded(self) -> bool:
        """Whether rows are spread over processes."""
        return self.ranks.count > 1

    @property
    def memory_budget(self) -> int:
        """Bytes that work outside the backend stays within."""
        return self.backend.memory_budget if self._memory_budget is None else self._memory_budget

    def total(self, local: Tensor) -> Tensor:
        """The sum over all processes of what each has; the memory of ``local`` may be used for it."""
        return self.ranks.total(local)

    @property
    def num_rows(self) -> int:
        """n = N*C, the rows that this process holds."""
        return self.num_samples * self.num_outputs

    def sample(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs drawn from those of all processes without replacement, ``count`` in all, and their places here.

        The same ones however the data are spread.
        """
        start, total = self.place
        chosen = draw(total, count, seed) - start
        chosen = chosen[(chosen >= 0) & (chosen < self.num_samples)].to(self.device)
        return self.take(chosen), chosen

    @property
    def num_features(self) -> int:
        """Number of features, F."""
        return self.backend.num_features

    def jvp(self, v: Tensor) -> Tensor:
        """Products of the features with weights, Φ v `[K, n]`, for v `[K, F]`."""
        pieces = [self.backend.jvp(x.unsqueeze(0), v.unsqueeze(0)).squeeze(0) for _, x in self.parts()]
        return torch.cat(pieces, -1) if pieces else v.new_zeros(v.shape[0], 0)

    def vjp(self, u: Tensor) -> Tensor:
        """Products of the transposed features, Φᵀ u `[K, F]`, for u `[K, n]`."""
        total = torch.zeros(u.shape[0], self.num_features, dtype=self.dtype, device=self.device)
        for rows, x in self.parts():
            total += self.backend.vjp(x.unsqueeze(0), u[:, rows].unsqueeze(0)).squeeze(0)
        return self.total(total)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Explicit rows of Φ `[n', F]`, as many at a time as an eighth of the memory budget holds, or 256 MB."""
        for rows, x in self.parts():
            bytes_each = self.num_outputs * self.num_features * x.element_size()
            most = min(self.backend.memory_budget // 8, _BLOCK_BYTES)
            for part in chunks(x.shape[0], bytes_each, most):
                # What is kept of a piece would push out of the cache what is kept of all.
                with nullcontext() if part == slice(0, x.shape[0]) else passing(x):
                    block = self.backend.jacobian(x[part].unsqueeze(0)).squeeze(0)
                start = rows.start + part.start * self.num_outputs
                yield slice(start, start + block.shape[0]), block

    def second_moment(self, transform: Callable[[slice, Tensor], Tensor] | None = None) -> Tensor:
        """ΦᵀΦ `[F, F]`, n F² operations, without ever holding all of Φ.

        Args:
            transform: From rows of Φ `[n', F]`, given with their places, to the rows whose second moment it is.
        """
        total = torch.zeros(self.num_features, self.num_features, dtype=self.dtype, device=self.device)
        for rows, block in self.blocks():
            add_second_moment(total, block if transform is None else transform(rows, block))
        mirror(total)
        return self.total(total)

    def extended(self, x: Tensor) -> Features:
        """The features of the data and, after them, of x `[T, D]`; all of the inputs are then in memory.

        Raises:
            InputError: Rows are spread over processes.
        """
        if self.sharded:
            raise InputError("sharded features cannot be extended: condition_on adds data without that.")
        return Features(self.backend, torch.cat([*(part for _, part in self.parts()), x.to(self.dtype)]))

    def diagonal(self, per_layer: bool = False) -> Tensor:
        """Squared norms of the rows of Φ, of all features or by layer, `[G, n]`."""
        pieces = [self.backend.diagonal(x.unsqueeze(0), per_layer).squeeze(0) for _, x in self.parts()]
        groups = self.backend.num_groups if per_layer else 1
        return torch.cat(pieces, -1) if pieces else torch.zeros(groups, 0, dtype=self.dtype, device=self.device)


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

    Args:
        backend: How Jacobian products are computed; what is kept of x is kept in its cache.
        x: `[N, D]`.

    Raises:
        InputError: x is not finite, real floating and `[N, D]`, is on another device, or does not fit the network.

    Example:
        >>> import torch, gpntk
        >>> from gpntk.inference import Features
        >>> backend = gpntk.AutoBackend(gpntk.freeze(torch.nn.Linear(3, 2)))
        >>> features = Features(backend, torch.randn(5, 3))
        >>> features.num_rows, features.num_features, features.second_moment().shape
        (10, 8, torch.Size([8, 8]))
    """

    def __init__(self, backend: AbstractJacobianBackend, x: Tensor) -> None:
        check_kinds(AbstractJacobianBackend, "a backend, gpntk.AutoBackend(frozen) say", backend=backend)
        check_input(x, backend.device)
        if x.dim() != 2:
            raise InputError(f"x has shape {tuple(x.shape)}: give [N, D], x.flatten(1) of images say.")
        # Without a row, no network needs to be asked how many outputs it has.
        super().__init__(backend, x.dtype, x.device, x.shape[0], backend.num_outputs(x) if x.shape[0] else 1)
        self.x = x

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        if self.num_samples:
            yield slice(0, self.num_rows), self.x

    def take(self, chosen: Tensor) -> Tensor:
        return self.x[chosen]

    def to(self, dtype: torch.dtype) -> Features:
        if dtype == self.dtype:
            return self
        # Cast once: what is kept for a tensor is found by its memory.
        return Features(self.backend, self.backend.remember(("cast", dtype), (self.x,), lambda: self.x.to(dtype)))

    def remember(self, kind: Hashable, compute: Callable[[], Any]) -> Any:
        return self.backend.remember(kind, (self.x,), compute)

    def holds(self, kind: Hashable) -> bool:
        return self.backend.holds(kind, (self.x,))


def draw(total: int, count: int, seed: int) -> Tensor:
    """``count`` of ``total`` numbers without replacement, or all of them, in increasing order, on the CPU."""
    drawn = np.random.default_rng(seed).choice(total, min(count, total), replace=False, shuffle=False)
    return torch.from_numpy(np.sort(drawn))
