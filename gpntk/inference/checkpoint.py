"""A long solve on disk: the solution so far, with a description of the system it belongs to."""

from __future__ import annotations

import os
from typing import final

import torch
from torch import Tensor

from gpntk.errors import FileFormatError, InputError
from gpntk.inference.system import Space, WhitenedSystem
from gpntk.io import Checkpoint, described


@final
class SolveCheckpoint:
    """One file for one solve; with sharded features, the first process reads and writes for all.

    A file is taken up only for the system and right-hand side it was written for, as far as they can be told without
    reading the data again: sizes, precision, noise, prior variances, and the right-hand side to the last bit, spread
    over as many processes. That it is a solution is not believed but seen from the true residual.

    Args:
        path: The file.
        system: The system, in the precision of the data.
        space: Where the solution lives.
        rhs: The whitened right-hand side `[K, n]`.
    """

    def __init__(self, path: str | os.PathLike[str], system: WhitenedSystem, space: Space, rhs: Tensor) -> None:
        self._path, self._features = path, system.weighted.features
        self._file: Checkpoint | None = None
        self._shape = rhs.shape[0], system.size(space)
        start, samples = self._features.place
        noise = [value for value in (system.noise, system.root) if value is not None]
        self._identity = {
            "rows": samples * self._features.num_outputs,
            "features": self._features.num_features,
            "columns": rhs.shape[0],
            "space": space,
            "dtype": str(self._features.dtype),
            "right-hand side": self._features.ranks.number(rhs, start),
            "noise": self._features.ranks.number(noise[0], start),
            "prior variances": described(system.weighted.variances),
        }

    def load(self) -> tuple[Tensor, int]:
        """The solution so far, in float64, and the iterations made for it; zeros if there is no file yet.

        Raises:
            FileFormatError: The file is damaged, holds something else, or belongs to another solve.
            InputError: There is no such folder.
        """
        tensors, facts = {"value": torch.zeros(*self._shape, dtype=torch.float64)}, {"iterations": 0}
        ranks, error = self._features.ranks, None
        if ranks.rank == 0:
            try:
                self._file = Checkpoint(self._path, "solve", self._identity)
                tensors, facts = self._file.begin(tensors, facts)
            except (FileFormatError, InputError) as found:
                error = found
        iterations, failed = ranks.first(torch.tensor([facts["iterations"], error is not None])).tolist()
        if error is not None:
            raise error
        if failed:
            raise FileFormatError(f"checkpoint={os.fspath(self._path)!r} cannot be used: rank 0 says why.")
        self._last = ranks.first(tensors["value"].to(self._features.device)), iterations
        return self._last

    def add(self, columns: Tensor, iterations: int, step: Tensor) -> None:
        """Write the solution last loaded or saved, some columns of which have moved on since."""
        value, before = self._last
        self._write(value.index_add(0, columns, step), before + iterations)

    def save(self, value: Tensor, iterations: int) -> None:
        """Replace what the file holds, whole or not at all."""
        self._last = value, iterations
        self._write(value, iterations)

    def _write(self, value: Tensor, iterations: int) -> None:
        if self._file is not None:
            self._file.save({"value": value.double()}, {"iterations": iterations})
