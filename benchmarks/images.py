"""Images and labels as they are stored, shared by the suites that read them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def mnist(folder: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images `[N, 28, 28]` and labels `[N]` of the part, ``"train"`` or ``"t10k"``."""

    def read(name: str, offset: int) -> NDArray[np.uint8]:
        content = gzip.decompress((folder / "mnist" / f"{part}-{name}-ubyte.gz").read_bytes())
        return np.frombuffer(content, np.uint8, offset=offset)

    return read("images-idx3", 16).reshape(-1, 28, 28), read("labels-idx1", 8)


def usps(folder: Path, part: str) -> tuple[NDArray[np.float32], NDArray[np.integer]]:
    """Images `[N, 16, 16]` from 0 to 1 and labels `[N]` of the part, ``"train"`` or ``"test"``."""
    stored = np.load(folder / "usps" / "usps.npz")
    return stored[f"x_{part}"].reshape(-1, 16, 16), stored[f"y_{part}"]


def cifar(folder: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
    """CIFAR-10 averaged to 8 x 8, images `[N, 8, 8, 3]` and labels `[N]` of the part, ``"train"`` or ``"test"``."""
    stored = np.load(folder / "cifar10" / "cifar10_8x8.npz")
    return stored[f"x_{part}"], stored[f"y_{part}"]
