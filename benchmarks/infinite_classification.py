"""Suites of classification with infinitely wide networks: published accuracies. Data are read from ``GPNTK_DATA``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import gpntk
from benchmarks import images
from benchmarks.angle_gp import AngleKernel, OneHotRegression
from benchmarks.inference_suites import data_folder, peak_gib
from gpntk.likelihoods import one_hot_targets

_CLASSES = 10


class Published(NamedTuple):
    """A row of table 1 of Lee et al. (2018), *Deep Neural Networks as Gaussian Processes*, for MNIST."""

    size: int
    activation: type[nn.Module]
    depth: int
    weight_variance: float
    bias_variance: float
    accuracy: float


SMALL = (
    Published(1000, nn.ReLU, 20, 1.45, 0.28, 0.9279),
    Published(1000, nn.Tanh, 20, 1.96, 0.62, 0.9266),
    Published(10_000, nn.ReLU, 7, 0.61, 0.07, 0.9765),
    Published(10_000, nn.Tanh, 2, 1.62, 0.28, 0.9773),
)
LARGE = Published(50_000, nn.ReLU, 1, 0.10, 0.48, 0.9875)


def mnist(device: torch.device, _dtype: torch.dtype) -> list[dict[str, Any]]:
    """MNIST, GP classification by regression: accuracies on the 10,000 test images beside Lee et al. 2018, table 1.

    As in the authors' code: every image less its mean, over its standard deviation; k0 = σ_b² + σ_w² x·x'/784; targets
    0.9 and -0.1; noise 1e-10, ten times more until the Cholesky factorisation succeeds; `depth` counts hidden layers.
    `their_subset`: the first images of each class among the last 50,000 training images, as their code takes them;
    `mean` and `deviation` over 5 (at 10,000: 2) random subsets of those 50,000. float64; `table_error` is that of the
    kernel's table, see `angle_gp`, relative to what is not constant in the variance.
    """
    random_subsets = {1000: 5, 10_000: 2}
    return [_compared(row, random_subsets[row.size], device, torch.float64) for row in SMALL]


def mnist50k(device: torch.device, _dtype: torch.dtype) -> list[dict[str, Any]]:
    """The same with all 50,000 training images, in float32 with the matrix factorised in place.

    One step of refinement, whose residual is that of K + noise with sums in float64; `unrefined`: accuracy without.
    """
    return [_compared(LARGE, 0, device, torch.float32)]


def mnist_float32(device: torch.device, _dtype: torch.dtype) -> list[dict[str, Any]]:
    """What float32 costs at 10,000 images: accuracy, and error of the test means against float64 with the same noise.

    `refined_error`: after one step of refinement, whose residual has sums in float64.
    """
    rows = []
    for published in (LARGE, SMALL[2], SMALL[3]):
        data = _Mnist(device, published._replace(size=10_000))
        kernel = AngleKernel(_fully_connected(published), device)
        chosen = data.first_of_each_class()
        single = OneHotRegression(kernel, data.x[chosen].float(), data.y[chosen])
        double = OneHotRegression(kernel, data.x[chosen], data.y[chosen], single.noise)
        exact = double.means(data.z)
        means = {"error": single.means(data.z.float())}
        single.refine()
        means["refined_error"] = single.means(data.z.float())
        rows.append(
            {
                "activation": published.activation.__name__,
                "depth": published.depth,
                "noise": single.noise,
                **{name: ((mean.double() - exact).norm() / exact.norm()).item() for name, mean in means.items()},
                "accuracy_float64": _accuracy(exact, data.t),
                **{name.replace("error", "accuracy"): _accuracy(mean, data.t) for name, mean in means.items()},
            }
        )
    return rows


def cifar(device: torch.device, _dtype: torch.dtype) -> list[dict[str, Any]]:
    """CIFAR-10 averaged to 8 x 8: fully connected, convolutional and pooled GPs (Novak et al. 2019), 5 seeds.

    500 random training images, the 1,000 test images that are stored; every image less its mean, over its standard
    deviation. ReLU, σ_w² = 2, σ_b² = 0.01, convolutions 3 x 3 with zero padding; `flatten` has a linear layer on all
    positions, `pool` one on their mean. Depth (1, 2 or 3 hidden layers; with `pool`: 2) and noise, in units of the mean
    variance, are those with the most correct leave-one-out predictions; noises are 0.001, 0.003, ..., 10. `accuracy`:
    mean over seeds; `difference`: to the row above, mean over seeds and its standard error. float32 kernels.
    """
    return _cifar(500, 1000, ("fully connected", "flatten", "pool"), device)


def cifar2000(device: torch.device, _dtype: torch.dtype) -> list[dict[str, Any]]:
    """The same with 2,000 training images, without `pool`, whose kernel would take hours.

    Tested on all 1,000 test images that are stored and 4,000 training images that no seed draws.
    """
    return _cifar(2000, 5000, ("fully connected", "flatten"), device)


SUITES: dict[str, Callable[[torch.device, torch.dtype], list[dict[str, Any]]]] = {
    "mnist": mnist,
    "mnist50k": mnist50k,
    "mnist-float32": mnist_float32,
    "cifar": cifar,
    "cifar2000": cifar2000,
}


# --- MNIST ---------------------------------------------------------------------------------------------------------


def _compared(published: Published, random_subsets: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    start = time.perf_counter()
    data = _Mnist(device, published)
    kernel = AngleKernel(_fully_connected(published), device)
    x, z = data.x.to(dtype), data.z.to(dtype)
    row = published._asdict() | {"activation": published.activation.__name__}
    row["published"] = row.pop("accuracy")
    chosen = data.first_of_each_class()
    model = OneHotRegression(kernel, x[chosen], data.y[chosen])
    if dtype == torch.float32:
        row["unrefined"] = _accuracy(model.means(z), data.t)
        model.refine()
    row["their_subset"] = _accuracy(model.means(z), data.t)
    row["noise"] = model.noise
    del model
    if random_subsets:
        scores = []
        for seed in range(random_subsets):
            chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: published.size]
            model = OneHotRegression(kernel, x[chosen], data.y[chosen])
            scores.append(_accuracy(model.means(z), data.t))
        row["mean"] = sum(scores) / len(scores)
        row["deviation"] = torch.tensor(scores, dtype=torch.float64).std().item()
    row["table_error"] = kernel.error(data.z[:100])
    row["seconds"] = time.perf_counter() - start
    row["peak_gib"] = peak_gib()
    return row


class _Mnist:
    """Training images x and labels y (the last 50,000, as in the paper), test images z and labels t."""

    def __init__(self, device: torch.device, published: Published) -> None:
        self._per_class = published.size // _CLASSES
        (x, y), (z, t) = (images.mnist(data_folder(), part) for part in ("train", "t10k"))
        self.x, self.z = (_standardised(torch.tensor(values).double(), device) for values in (x, z))
        self.y, self.t = (torch.tensor(labels).long().to(device) for labels in (y, t))
        self.x, self.y = self.x[10_000:], self.y[10_000:]

    def first_of_each_class(self) -> Tensor:
        """Indices of as many training images, the first of each class; all if there are not so many."""
        if self._per_class * _CLASSES == len(self.y):
            return torch.arange(len(self.y))
        return torch.cat([(self.y == label).nonzero().squeeze(1)[: self._per_class] for label in range(_CLASSES)])


def _fully_connected(published: Published) -> gpntk.InfiniteNNGPKernel:
    """The kernel of inputs with two components: x·x'/D is all that it knows of inputs."""
    layers: list[nn.Module] = []
    for index in range(published.depth):
        layers += [nn.Linear(2 if index == 0 else 1, 1), published.activation()]
    stds = math.sqrt(published.weight_variance), math.sqrt(published.bias_variance)
    return gpntk.InfiniteNNGPKernel(nn.Sequential(*layers, nn.Linear(1, 1)), *stds, learn=False).double()


# --- CIFAR-10 ------------------------------------------------------------------------------------------------------

_PARTS = ("train", "test")
_NOISES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)


def _wide(depth: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for index in range(depth):
        layers += [nn.Linear(192 if index == 0 else 1, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(1, 1))


def _convolutional(depth: int, pool: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += [nn.Conv2d(3 if index == 0 else 1, 1, 3, padding=1), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1)] if pool else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1 if pool else 64, 1))


_CIFAR: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "fully connected": (_wide, (1, 2, 3)),
    "flatten": (partial(_convolutional, pool=False), (1, 2, 3)),
    "pool": (partial(_convolutional, pool=True), (2,)),
}


def _cifar(size: int, tests: int, names: tuple[str, ...], device: torch.device) -> list[dict[str, Any]]:
    stored = {part: images.cifar(data_folder(), part) for part in _PARTS}
    inputs = {
        part: _standardised(torch.tensor(x).float().permute(0, 3, 1, 2), device) for part, (x, _) in stored.items()
    }
    labels = {part: torch.tensor(y).long().to(device) for part, (_, y) in stored.items()}
    # The first training images are drawn from, the last are test images where there are not enough of these.
    drawn, more = 40_000, max(tests - len(labels["test"]), 0)
    test = tuple(torch.cat([part["test"], part["train"][drawn : drawn + more]])[:tests] for part in (inputs, labels))
    results: dict[str, list[tuple[float, int, float, float]]] = {name: [] for name in names}
    start = time.perf_counter()
    seconds = dict.fromkeys(names, 0.0)
    for seed in range(5):
        chosen = torch.randperm(drawn, generator=torch.Generator().manual_seed(seed))[:size].to(device)
        train = inputs["train"][chosen], labels["train"][chosen]
        for name in names:
            results[name].append(_best(*_CIFAR[name], train, test))
            seconds[name] += time.perf_counter() - start
            start = time.perf_counter()
    rows, before = [], None
    for name, runs in results.items():
        scores = torch.tensor([run[0] for run in runs], dtype=torch.float64)
        gain = scores - (scores if before is None else before)
        before = scores
        rows.append(
            {
                "network": name,
                "accuracy": scores.mean().item(),
                "deviation": scores.std().item(),
                "difference": gain.mean().item(),
                "difference_error": gain.std().item() / math.sqrt(len(gain)),
                "depths": "/".join(str(run[1]) for run in runs),
                "noises": "/".join(f"{run[2]:g}" for run in runs),
                "leave_one_out": sum(run[3] for run in runs) / len(runs),
                "seconds": seconds[name] / len(runs),
            }
        )
    return rows


def _best(
    make: Callable[[int], nn.Module],
    depths: tuple[int, ...],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
) -> tuple[float, int, float, float]:
    """Test accuracy, depth, noise and leave-one-out accuracy of the choice with the largest of these."""
    (x, y), (z, t) = train, test
    targets = one_hot_targets(y, _CLASSES, torch.float64)
    chosen: tuple[float, int, float, float] = (0.0, 0, 0.0, -1.0)
    best: tuple[gpntk.InfiniteNNGPKernel, Tensor] | None = None
    for depth in depths:
        kernel = gpntk.InfiniteNNGPKernel(
            make(depth), math.sqrt(2), 0.1, input_shape=(3, 8, 8), learn=False, memory_budget=2**25
        )
        with torch.no_grad():
            gram = kernel(x).to_dense().double()
        for relative in _NOISES:
            inverse = torch.linalg.inv(gram + relative * gram.diagonal().mean() * torch.eye(len(x)).to(gram))
            coefficients = inverse @ targets
            # Rasmussen and Williams (2006), eq. 5.12.
            left_out = _accuracy(targets - coefficients / inverse.diagonal().unsqueeze(-1), y)
            if left_out > chosen[3]:
                chosen, best = (0.0, depth, relative, left_out), (kernel, coefficients)
    assert best is not None
    kernel, coefficients = best
    with torch.no_grad():
        means = kernel(z, x).to_dense().double() @ coefficients
    return (_accuracy(means, t), *chosen[1:])


def _standardised(images: Tensor, device: torch.device) -> Tensor:
    """Every image `[N, D]` less its mean, over its standard deviation."""
    flat = images.flatten(1).to(device)
    flat = flat - flat.mean(1, keepdim=True)
    return flat / flat.square().mean(1, keepdim=True).sqrt()


def _accuracy(means: Tensor, labels: Tensor) -> float:
    return (means.argmax(1) == labels).double().mean().item()
