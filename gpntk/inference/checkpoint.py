"""A long solve on disk: the solution so far, with a description of the system it belongs to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from gpntk.errors import FileFormatError, InputError
from gpntk.inference.system import Space, WhitenedSystem
from gpntk.io import checksum, load_tensors, save_tensors

# Digits of a checksum that fit an integer, in which those of all processes are added.
_DIGITS = 15


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
        self._path, self._features = Path(path), system.features
        self._shape = rhs.shape[0], system.size(space)
        start, samples = self._features.place()
        given = [rhs, *(value for value in (system.noise, system.root) if value is not None)]
        digests = [int(checksum({"": value.cpu()}, str(start))[:_DIGITS], 16) for value in given]
        of_all = self._features.total(torch.tensor(digests)).tolist()
        self._identity = {
            "rows": samples * self._features.num_outputs,
            "features": self._features.num_features,
            "columns": rhs.shape[0],
            "space": space,
            "dtype": str(self._features.dtype),
            "right-hand side": of_all[0],
            "noise": of_all[1],
            "prior variances": checksum({"": system.variances.cpu()}, ""),
        }

    def load(self) -> tuple[Tensor, int]:
        """The solution so far, in float64, and the iterations made for it; zeros if there is no file yet.

        Raises:
            FileFormatError: The file is damaged, holds something else, or belongs to another solve.
            InputError: There is no such folder.
        """
        value = torch.zeros(*self._shape, dtype=torch.float64)
        iterations, error = 0, None
        if self._features.rank == 0:
            try:
                value, iterations = self._read(value)
            except (FileFormatError, InputError) as found:
                error = found
        status = self._features.first(torch.tensor([iterations, error is not None])).tolist()
        if error is not None:
            raise error
        if status[1]:
            raise FileFormatError(f"checkpoint={str(self._path)!r} cannot be used: the message of rank 0 says why.")
        return self._features.first(value.to(self._features.device)), status[0]

    def save(self, value: Tensor, iterations: int) -> None:
        """Replace what the file holds, whole or not at all."""
        if self._features.rank == 0:
            facts = {"identity": self._identity, "iterations": iterations}
            save_tensors(self._path, "solve", {"value": value.double()}, facts)

    def _read(self, nothing: Tensor) -> tuple[Tensor, int]:
        if not self._path.parent.is_dir():
            raise InputError(f"checkpoint={str(self._path)!r}: there is no such folder: make it first.")
        if not self._path.exists():
            return nothing, 0
        tensors, facts = load_tensors(self._path, "solve")
        differing = [name for name, value in self._identity.items() if facts["identity"].get(name) != value]
        if differing:
            raise FileFormatError(
                f"{str(self._path)!r} is the checkpoint of another solve: it differs in {', '.join(differing)}. Give "
                "another file, or delete this one to start afresh."
            )
        # What was read is a view of the file, which is to be replaced.
        return tensors["value"].clone(), facts["iterations"]
