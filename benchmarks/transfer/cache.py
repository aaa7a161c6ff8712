"""Trained source networks kept on disk, so that every method and every run starts from the same ones."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn


def cached(name: str, seed: int, train: Callable[[int], nn.Module]) -> nn.Module:
    """The network ``train(seed)`` returned when it was first asked for under this name, in eval mode.

    It lies in the folder ``GPNTK_CACHE``, by default one under the system's folder of temporary files. Loading
    unpickles what is there; remove the folder after a change to how a source is trained.
    """
    folder = Path(os.environ.get("GPNTK_CACHE") or Path(tempfile.gettempdir()) / "gpntk-transfer")
    path = folder / f"{name}-{seed}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = train(seed)
        unfinished = path.with_suffix(f".{os.getpid()}")
        torch.save(network, unfinished)
        unfinished.replace(path)
    return torch.load(path, weights_only=False).eval()
