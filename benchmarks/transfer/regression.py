"""Experiments in transfer learning for regression: sinusoids, malaria across years, rotated faces, tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.io
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import nn
from torch.nn import functional

from benchmarks.transfer import pitch
from benchmarks.transfer.cache import cached
from benchmarks.transfer.cstr import CSTR
from benchmarks.transfer.experiment import Array, Experiment, Gaussian, Method, Task
from benchmarks.transfer.regression_baselines import BASELINES, Affine, ard_gp
from gpntk import TransferRegressor

VARIANTS: Mapping[str, Mapping[str, Any]] = {"gpntk (default)": {}}
"""What `TransferRegressor` is given besides the network, by the name it has in tables."""


def transferred(task: Task, **settings: Any) -> Gaussian:
    """`TransferRegressor` with these settings."""
    model = TransferRegressor(task.network, **settings).fit(task.x, task.y)
    return Gaussian(*model.predict(task.x_test, return_std=True))


_OURS: dict[str, Method] = {name: partial(transferred, **settings) for name, settings in VARIANTS.items()}
_IMAGES = {**BASELINES, **_OURS}
_VECTORS = {**BASELINES, "RBF GP, ARD": ard_gp, **_OURS}


# --- source networks -----------------------------------------------------------------------------------------------


def perceptron(inputs: int, hidden: Sequence[int], y: Array) -> nn.Sequential:
    """A network with tanh, untrained, whose outputs of order one become targets like y."""
    widths = [inputs, *hidden]
    pairs = zip(widths, hidden, strict=False)
    layers = chain.from_iterable((nn.Linear(before, width), nn.Tanh()) for before, width in pairs)
    return nn.Sequential(*layers, nn.Linear(widths[-1], 1), Affine(float(y.mean()), float(y.std())))


def train(network: nn.Sequential, x: Array, y: Array, *, steps: int, rate: float, batch: int = 500) -> nn.Sequential:
    """The network after AdamW on batches of x and y, its learning rate rising to ``rate`` and falling to nothing."""
    inputs, targets = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
    unit = targets.std()
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(inputs), (min(batch, len(inputs)),))
        optimizer.zero_grad()
        ((network(inputs[rows]).squeeze(-1) - targets[rows]) / unit).square().mean().backward()
        optimizer.step()
        schedule.step()
    return network.eval()


# --- sinusoids -----------------------------------------------------------------------------------------------------


class Sinusoid(NamedTuple):
    """a sin(w x + b), observed on [-5, 5] with noise of a hundredth of its amplitude.

    References:
        Yoon et al. (2018), Bayesian Model-Agnostic Meta-Learning, https://arxiv.org/abs/1806.03836, section 5.1, for
        the ranges.
        Maddox et al. (2021), Fast Adaptation with Linearized Neural Networks, for the network and 10 points.
    """

    amplitude: float
    frequency: float
    phase: float

    @classmethod
    def draw(cls, generator: np.random.Generator) -> Sinusoid:
        """Amplitude in [0.1, 5], frequency in [0.5, 2], phase in [0, 2π]."""
        return cls(generator.uniform(0.1, 5), generator.uniform(0.5, 2), generator.uniform(0, 2 * math.pi))

    def __call__(self, x: Array) -> Array:
        return self.amplitude * np.sin(self.frequency * x[:, 0] + self.phase)

    def observe(self, count: int, generator: np.random.Generator) -> tuple[Array, Array]:
        """Random inputs `[N, 1]` and what is seen there `[N]`."""
        x = generator.uniform(-5, 5, (count, 1)).astype(np.float32)
        return x, self(x) + 0.01 * self.amplitude * generator.standard_normal(count)


def sinusoids(_data: Path, size: int, seed: int) -> tuple[Task, Array]:
    """From a sinusoid seen at 100 points to another one; the test labels are without noise."""

    def source(seed: int) -> nn.Module:
        generator = np.random.default_rng(seed)
        x, y = Sinusoid.draw(generator).observe(100, generator)
        return train(perceptron(1, [40, 40], y), x, y, steps=2000, rate=1e-2)

    generator = np.random.default_rng([seed, 1])
    target = Sinusoid.draw(generator)
    x, y = target.observe(size, generator)
    x_test = np.linspace(-5, 5, 200, dtype=np.float32)[:, None]
    return Task(cached("sinusoids", seed, source), (), x, y, x_test, seed), target(x_test)


# --- malaria -------------------------------------------------------------------------------------------------------

_SOURCE_CELLS, _TEST_ROWS = 22_000, 5_000


def malaria_years(data: Path, size: int, seed: int) -> tuple[Task, Array]:
    """From the parasite rate of 2012 at 22,000 places in Nigeria to that of 2015 at other places."""
    cells = np.load(data / "malaria_years" / "nigeria_pfpr_2012_2015.npz")
    x = np.stack([cells["lon"], cells["lat"]], -1)
    x = (x - x.mean(0)) / x.std(0)
    order = np.random.default_rng(seed).permutation(len(x))
    known, rest = order[:_SOURCE_CELLS], order[_SOURCE_CELLS:]

    def source(_seed: int) -> nn.Module:
        y = cells["pfpr_2012"][known]
        return train(perceptron(2, [200, 200, 200], y), x[known], y, steps=3000, rate=3e-3)

    return _task(cached("malaria-years", seed, source), x[rest], cells["pfpr_2015"][rest], size, seed)


def _task(network: nn.Module, x: Array, y: Array, size: int, seed: int) -> tuple[Task, Array]:
    """The last rows for testing, the first ones for learning; the former are the same for all sizes."""
    tests = min(_TEST_ROWS, len(x) // 2)
    return Task(network, (), x[:size], y[:size].astype(float), x[-tests:], seed), y[-tests:].astype(float)


# --- faces ---------------------------------------------------------------------------------------------------------

_TURNS, _SIDE = 30, 23


@cache
def _turned(data: Path, seed: int) -> tuple[Array, Array, Array, Array]:
    """Patches and angles of 20 people, then of the 20 others; photographs stay together.

    Each photograph is turned 30 times by angles in [-90, 90] degrees, its central 45 x 45 pixels shrunk to 23 x 23.
    """
    faces = scipy.io.loadmat(data / "olivetti" / "olivettifaces.mat")["faces"]
    photographs = faces.T.reshape(40, 10, 64, 64).transpose(0, 1, 3, 2).astype(np.float32)
    generator = np.random.default_rng(seed)
    people = generator.permutation(40)
    return *_patches(photographs[people[:20]], generator), *_patches(photographs[people[20:]], generator)


def _patches(photographs: Array, generator: np.random.Generator) -> tuple[Array, Array]:
    """Patches `[N, 1, 23, 23]`, standardised over all pixels, and angles `[N]`: photographs in random order."""
    shuffled = generator.permutation(photographs.reshape(-1, 64, 64)).repeat(_TURNS, 0)
    angles = generator.uniform(-90, 90, len(shuffled))
    pairs = zip(shuffled, angles, strict=True)
    turned = [ndimage.rotate(image, angle, reshape=False, order=1) for image, angle in pairs]
    middle = torch.tensor(np.stack(turned))[:, None, 9:54, 9:54]
    patches = functional.interpolate(middle, size=(_SIDE, _SIDE), mode="bilinear", antialias=True).numpy()
    return (patches - patches.mean()) / patches.std(), angles


def faces(data: Path, size: int, seed: int) -> tuple[Task, Array]:
    """By what angle a face is turned, from 20 people to 20 others; no photograph is used to learn and to test."""
    x, y, x_target, y_target = _turned(data, seed)

    def source(_seed: int) -> nn.Module:
        return train(_convolutional(y), x, y, steps=2500, rate=3e-3, batch=128)

    half = len(x_target) // 2
    chosen = np.random.default_rng([seed, 2]).permutation(half)[:size]
    tests = slice(half, None, 3)
    network = cached("faces", seed, source)
    return Task(network, (), x_target[chosen], y_target[chosen], x_target[tests], seed), y_target[tests]


def _convolutional(y: Array) -> nn.Sequential:
    def layers(*widths: int) -> list[nn.Module]:
        first, second, hidden = widths
        convolutions = [nn.Conv2d(1, first, 5, stride=2), nn.ReLU(), nn.Conv2d(first, second, 3, stride=2), nn.ReLU()]
        return [*convolutions, nn.Flatten(), nn.Linear(16 * second, hidden), nn.ReLU(), nn.Linear(hidden, 1)]

    return nn.Sequential(*layers(16, 32, 64), Affine(float(y.mean()), float(y.std())))


# --- tables --------------------------------------------------------------------------------------------------------

Split = Callable[[Path], tuple[Array, Array, NDArray[np.bool_]]]
"""Inputs `[N, D]`, targets `[N]`, and which rows are of the source task `[N]`."""


@cache
def _power_plant(data: Path) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Output of a power plant: from days colder than the median to warmer ones."""
    table = np.load(data / "uci_pbp_splits" / "power-plant.npz")
    temperature = table["X"][:, 0]
    return table["X"], table["y"], temperature < np.median(temperature)


@cache
def _bike(data: Path) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Logarithm of the number of bicycles hired in an hour: from the first year to the second.

    Left out are the year, the date, and the two columns that add up to the target.
    """
    table = np.loadtxt(data / "uci_evans" / "bike" / "data.csv.gz", delimiter=",")
    return table[:, [3, *range(5, 15)]], table[:, -1], table[:, 4] < 0


def tabular(name: str, split: Split, data: Path, size: int, seed: int) -> tuple[Task, Array]:
    """From rows with one value of a covariate to rows with another."""
    x, y, of_source = split(data)
    x = ((x - x[of_source].mean(0)) / x[of_source].std(0)).astype(np.float32)
    target = np.random.default_rng(seed).permutation(np.flatnonzero(~of_source))

    def source(_seed: int) -> nn.Module:
        known = y[of_source]
        return train(perceptron(x.shape[1], [64, 64], known), x[of_source], known, steps=3000, rate=1e-2)

    return _task(cached(f"tabular-{name}", seed, source), x[target], y[target], size, seed)


REGRESSION: dict[str, Experiment] = {
    "sinusoids": Experiment(sinusoids, sizes=(10,), methods={**BASELINES, **_OURS}, seeds=20),
    "malaria_years": Experiment(malaria_years, sizes=(10, 30, 100, 300), methods=_VECTORS),
    "cstr": CSTR,
    "pitch": pitch.experiment(_OURS),
    "faces": Experiment(faces, sizes=(10, 30, 100), methods=_IMAGES),
    "tabular-power-plant": Experiment(
        partial(tabular, "power-plant", _power_plant), sizes=(10, 30, 100, 300), methods=_VECTORS
    ),
    "tabular-bike": Experiment(partial(tabular, "bike", _bike), sizes=(10, 30, 100, 300), methods=_VECTORS),
}
"""By name."""
