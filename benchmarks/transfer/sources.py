"""Images at the size of their target task, and the small convolutional networks trained on the source task."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import images
from benchmarks.transfer.cache import cached
from benchmarks.transfer.experiment import Array

ENSEMBLE = 5
"""Source networks of each kind, trained from different seeds."""

Images = tuple[Array, NDArray[np.integer]]
"""Images `[N, channels, side, side]`, float32, and their labels `[N]`."""

ANIMALS = (2, 3, 4, 5, 6, 7)
VEHICLES = (0, 1, 8, 9)


# --- Data ----------------------------------------------------------------------------------------------------------


@cache
def mnist(folder: Path, part: str) -> Images:
    """MNIST at 16 x 16 from 0 to 1: the 20 x 20 pixels that the digits were fitted to, shrunk by linear interpolation.

    USPS digits fill their 16 x 16 pixels in the same way.
    """
    x, y = images.mnist(folder, part)
    middle = torch.tensor(x[:, None, 4:24, 4:24]).float() / 255
    shrunk = functional.interpolate(middle, size=(16, 16), mode="bilinear", antialias=True)
    return shrunk.numpy(), y.astype(np.int64)


@cache
def usps(folder: Path, part: str) -> Images:
    """USPS as it is stored, 16 x 16 from 0 to 1."""
    x, y = images.usps(folder, part)
    return x[:, None].astype(np.float32), y.astype(np.int64)


@cache
def cifar(folder: Path) -> Images:
    """The 50,000 training images of CIFAR-10 averaged to 8 x 8, scaled to about unit variance."""
    x, y = images.cifar(folder, "train")
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2) / np.float32(64) - 2), y.astype(np.int64)


def classes(data: Images, chosen: tuple[int, ...]) -> Images:
    """Images of the chosen classes alone, labelled 0, 1, ... in the order given."""
    x, y = data
    kept = np.isin(y, chosen)
    return x[kept], np.array(chosen).argsort()[np.searchsorted(sorted(chosen), y[kept])]


# --- Networks ------------------------------------------------------------------------------------------------------


def sources(name: str, data: Callable[[], Images], channels: tuple[int, int, int] = (1, 12, 24)) -> list[nn.Module]:
    """The trained networks of this name, from the cache where they are there."""

    def train(_seed: int) -> nn.Module:
        x, y = (torch.tensor(values) for values in data())
        network = convolutional(channels, x.shape[-1], int(y.max()) + 1)
        fit(network, x, y)
        return network

    return [cached(name, seed, train) for seed in range(ENSEMBLE)]


def convolutional(channels: tuple[int, int, int], side: int, outputs: int) -> nn.Sequential:
    """Two 3 x 3 convolutions with max pooling and a hidden layer of 32 with dropout; the readout comes last."""
    first, second, third = channels
    return nn.Sequential(
        nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(second, third, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(third * (side // 4) ** 2, 32),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(32, outputs),
    )


def fit(network: nn.Module, x: Tensor, y: Tensor, epochs: int = 8, batch: int = 128) -> None:
    """Train with Adam, its learning rate falling from 2e-3 to 0 along a cosine."""
    steps = math.ceil(len(x) / batch) * epochs
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(batch):
            optimizer.zero_grad()
            functional.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    network.eval()
