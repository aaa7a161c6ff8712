"""Experiments in classification: digits of another post office, noisy ones, ones never seen; vehicles after animals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import nn

from benchmarks.transfer import sources
from benchmarks.transfer.cache import cached
from benchmarks.transfer.classification_baselines import baselines, ours
from benchmarks.transfer.experiment import Experiment, Method, Task
from benchmarks.transfer.sources import ANIMALS, VEHICLES, Images

TESTS = 2000
# Clean images of 8 x 8 that the source of noisy ones is trained on, and the most labels of noisy ones.
_CLEAN, _LARGEST = 600, 300

VARIANTS: dict[str, dict[str, object]] = {"gpntk (default)": {}}
"""Arguments of `gpntk.TransferClassifier` beside the network and the number of classes."""


def mnist_usps(folder: Path, size: int, seed: int) -> tuple[Task, NDArray]:
    """A network trained on all of MNIST at 16 x 16; labels of USPS, the first 2,000 images of its test part."""
    networks = sources.sources("mnist", lambda: sources.mnist(folder, "train"))
    return _task(networks, sources.usps(folder, "train"), sources.usps(folder, "test"), size, seed)


def digits_noise(_folder: Path, size: int, seed: int) -> tuple[Task, NDArray]:
    """A network trained on 600 clean digits of 8 x 8 pixels; labels of others with noise of deviation 0.35."""
    x, y = load_digits(return_X_y=True)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order]

    def source(_seed: int) -> nn.Module:
        network = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        sources.fit(network, torch.tensor(x[:_CLEAN]), torch.tensor(y[:_CLEAN]), epochs=150)
        return network

    networks = [cached("digits-noise", seed * sources.ENSEMBLE + member, source) for member in range(sources.ENSEMBLE)]
    noisy = x[_CLEAN:] + 0.35 * generator.standard_normal((len(x) - _CLEAN, 64)).astype(np.float32)
    labels = y[_CLEAN:]
    tests = slice(_LARGEST, None)
    return Task(networks[0], networks[1:], noisy[:size], labels[:size], noisy[tests], seed, 10), labels[tests]


def digits_new_classes(folder: Path, size: int, seed: int) -> tuple[Task, NDArray]:
    """A network trained on the digits 0 to 4 of MNIST; labels of the digits 5 to 9, tests from the test part."""
    seen, new = tuple(range(5)), tuple(range(5, 10))
    train, test = (sources.mnist(folder, part) for part in ("train", "t10k"))
    networks = sources.sources("mnist-0-4", lambda: sources.classes(train, seen))
    return _task(networks, sources.classes(train, new), sources.classes(test, new), size, seed)


def cifar(folder: Path, size: int, seed: int) -> tuple[Task, NDArray]:
    """A network trained on the animals of CIFAR-10 at 8 x 8; labels of vehicles, the last 2,000 of them for tests."""
    data = sources.cifar(folder)
    networks = sources.sources("cifar-animals", lambda: sources.classes(data, ANIMALS), (3, 16, 32))
    x, y = sources.classes(data, VEHICLES)
    return _task(networks, (x[:-TESTS], y[:-TESTS]), (x[-TESTS:], y[-TESTS:]), size, seed)


def _task(networks: list[nn.Module], pool: Images, test: Images, size: int, seed: int) -> tuple[Task, NDArray]:
    """Rows of the pool drawn at random, those of a smaller size among those of a larger one."""
    (x, y), (x_test, y_test) = pool, test
    rows = np.random.default_rng(seed).permutation(len(x))[:size]
    first = seed % len(networks)
    others = networks[first + 1 :] + networks[:first]
    task = Task(networks[first], others, x[rows], y[rows], x_test[:TESTS], seed, int(y.max()) + 1)
    return task, y_test[:TESTS]


def _methods(same_classes: bool) -> dict[str, Method]:
    variants = {name: ours(new_head=not same_classes, **arguments) for name, arguments in VARIANTS.items()}
    return baselines(same_classes) | variants


CLASSIFICATION: dict[str, Experiment] = {
    "mnist_usps": Experiment(mnist_usps, (10, 30, 100, 300, 1000), _methods(same_classes=True)),
    "digits_noise": Experiment(digits_noise, (10, 30, 100, 300), _methods(same_classes=True), seeds=12),
    "digits_new_classes": Experiment(digits_new_classes, (10, 20, 50, 100, 200), _methods(same_classes=False)),
    "cifar": Experiment(cifar, (20, 100, 500), _methods(same_classes=False)),
}
