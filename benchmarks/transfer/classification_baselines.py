"""What a network adapted to a few labels is compared with; each a function of a task that returns probabilities."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn import functional

import gpntk
from benchmarks.transfer.experiment import Array, Method, Task
from benchmarks.transfer.fine_tuning import chosen, fine_tuned
from benchmarks.transfer.logistic import Logistic

DROPOUT_SAMPLES = 30


def baselines(same_classes: bool) -> dict[str, Method]:
    """All of them by name; where the target has classes of its own, networks get a new readout, zero at first."""
    methods: dict[str, Callable[..., Array]] = {
        "readout": readout,
        "fine-tuning": fine_tuning,
        "LP-FT": probed_then_tuned,
        "ABLR": ablr,
        "MC dropout": mc_dropout,
        "deep ensemble": deep_ensemble,
    }
    result: dict[str, Method] = {name: partial(method, same_classes=same_classes) for name, method in methods.items()}
    of_source = {"unadapted": unadapted, "temperature": temperature} if same_classes else {}
    return of_source | {"RBF GP": rbf_gp} | result


def ours(**arguments: Any) -> Method:
    """`gpntk.TransferClassifier` with these arguments."""

    def method(task: Task) -> Array:
        model = gpntk.TransferClassifier(task.network, num_classes=task.num_classes, **arguments)
        return model.fit(task.x, task.y).predict_proba(task.x_test)

    return method


def unadapted(task: Task) -> Array:
    """The source network as it is."""
    return _probabilities(task.network, _tensors(task)[2]).numpy()


def temperature(task: Task) -> Array:
    """The source network, its logits divided by the temperature of largest likelihood: Guo et al. (2017)."""
    x, y, x_test = _tensors(task)
    with torch.no_grad():
        logits, at_test = task.network(x).double(), task.network(x_test).double()

    def loss(log_factor: float) -> float:
        return functional.cross_entropy(math.exp(log_factor) * logits, y).item()

    found = minimize_scalar(loss, bounds=(-5.0, 3.0), method="bounded")
    return (math.exp(found.x) * at_test).softmax(1).numpy()  # pyright: ignore[reportAttributeAccessIssue]


def readout(task: Task, same_classes: bool) -> Array:
    """Logistic regression on the features before the readout; weights at the mode.

    The prior is centred at the source's readout or at zero and has a strength, all by the larger evidence.
    """
    network, x, y, x_test = _adapted(task, same_classes)
    return _logistic(network, x, y, same_classes).plug_in(_features(network, x_test)).numpy()


def fine_tuning(task: Task, same_classes: bool) -> Array:
    """All weights trained with Adam, its learning rate and number of steps by 5-fold cross-validation."""
    network, x, y, x_test = _adapted(task, same_classes)
    recipe = chosen(network, x, y, seed=task.seed)
    return _probabilities(fine_tuned(network, x, y, recipe, seed=task.seed), x_test).numpy()


def probed_then_tuned(task: Task, same_classes: bool) -> Array:
    """Fine-tuning from a readout fitted first, by logistic regression: Kumar et al. (2022), LP-FT."""
    network, x, y, x_test = _adapted(task, same_classes)
    mode, last = _logistic(network, x, y, same_classes).mode.T.float(), network[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.copy_(mode[:, :-1])
        last.bias.copy_(mode[:, -1])
    recipe = chosen(network, x, y, seed=task.seed)
    return _probabilities(fine_tuned(network, x, y, recipe, seed=task.seed), x_test).numpy()


def mc_dropout(task: Task, same_classes: bool) -> Array:
    """The same with dropout in training and prediction, mean of 30 predictions: Gal and Ghahramani (2016)."""
    network, x, y, x_test = _adapted(task, same_classes)
    recipe = chosen(network, x, y, seed=task.seed, dropout=True)
    network = fine_tuned(network, x, y, recipe, seed=task.seed, dropout=True).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.seed)
        return sum(_probabilities(network, x_test) for _ in range(DROPOUT_SAMPLES)).numpy() / DROPOUT_SAMPLES


def deep_ensemble(task: Task, same_classes: bool) -> Array:
    """Source networks of five seeds, each fine-tuned by the recipe of the first, mean of their probabilities."""
    network, x, y, x_test = _adapted(task, same_classes)
    recipe = chosen(network, x, y, seed=task.seed)
    members = [network, *(_with_readout(member, task, same_classes) for member in task.ensemble)]
    tuned = [fine_tuned(member, x, y, recipe, seed=task.seed + index) for index, member in enumerate(members)]
    return torch.stack([_probabilities(member, x_test) for member in tuned]).mean(0).numpy()


def ablr(task: Task, same_classes: bool) -> Array:
    """Bayesian logistic regression on the features of the fine-tuned network: Perrone et al. (2018) for classes."""
    network, x, y, x_test = _adapted(task, same_classes)
    network = fine_tuned(network, x, y, chosen(network, x, y, seed=task.seed), seed=task.seed)
    return _logistic(network, x, y, same_classes).averaged(_features(network, x_test), task.seed).numpy()


def rbf_gp(task: Task) -> Array:
    """Regression on one-hot labels, a GP of the inputs for each class with the same RBF kernel and noise by ML-II.

    The probability of a class is that of its noisy value being the largest. Better here than scikit-learn's
    ``GaussianProcessClassifier`` and than Dirichlet regression with the same kernel.
    """
    x, y, x_test = _tensors(task)
    distances = torch.cdist(x.flatten(1), x.flatten(1)).double()
    targets = functional.one_hot(y, _num_classes(task)).double() - 1 / _num_classes(task)
    # Log lengthscale, variance and noise, at first and as the centre of a wide prior, without which ten labels say
    # nothing about them.
    start = torch.tensor([(distances.max() / 2).clamp_min(1e-3).log(), -2.0, -4.0], dtype=torch.float64)
    logs = start.clone().requires_grad_()

    def factor() -> Tensor:
        noise = (logs[2].exp() + 1e-6) * torch.eye(len(x), dtype=torch.float64)
        return torch.linalg.cholesky(_rbf(distances, logs) + noise)

    def loss() -> Tensor:
        optimizer.zero_grad()
        whitened = torch.linalg.solve_triangular(factor(), targets, upper=False)
        misfit = whitened.square().sum() / 2 + targets.shape[1] * factor().diagonal().log().sum()
        value = misfit + ((logs - start) / 2).square().sum() / 2
        value.backward()
        return value

    optimizer = torch.optim.LBFGS([logs], max_iter=60, line_search_fn="strong_wolfe")
    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        cross = _rbf(torch.cdist(x.flatten(1), x_test.flatten(1)).double(), logs)
        half = torch.linalg.solve_triangular(factor(), cross, upper=False)
        means = half.T @ torch.linalg.solve_triangular(factor(), targets, upper=False)
        variances = logs[1].exp() - half.square().sum(0) + logs[2].exp()
        return _largest(means / variances.clamp_min(1e-12).sqrt().unsqueeze(1)).numpy()


def _rbf(distances: Tensor, logs: Tensor) -> Tensor:
    return (logs[1] - distances.square() / (2 * (2 * logs[0]).exp())).exp()


def _largest(means: Tensor) -> Tensor:
    """Probability of each of K independent normals of unit variance being the largest, by quadrature `[M, K]`."""
    nodes, weights = (torch.tensor(values) for values in np.polynomial.hermite_e.hermegauss(32))
    result = torch.zeros_like(means)
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        below = torch.special.log_ndtr(means.unsqueeze(2) - means.unsqueeze(1) + node)
        result += weight * (below.sum(2) - below.diagonal(dim1=1, dim2=2)).exp()
    return result / result.sum(1, keepdim=True)


# --- Pieces --------------------------------------------------------------------------------------------------------


def _tensors(task: Task) -> tuple[Tensor, Tensor, Tensor]:
    return torch.tensor(task.x), torch.tensor(np.asarray(task.y, np.int64)), torch.tensor(task.x_test)


def _num_classes(task: Task) -> int:
    assert task.num_classes is not None
    return task.num_classes


def _adapted(task: Task, same_classes: bool) -> tuple[nn.Sequential, Tensor, Tensor, Tensor]:
    return _with_readout(task.network, task, same_classes), *_tensors(task)


def _with_readout(network: nn.Module, task: Task, same_classes: bool) -> nn.Sequential:
    """The network, with a readout for the task's classes: its own where they are the same, zero elsewhere."""
    assert isinstance(network, nn.Sequential)
    network = copy.deepcopy(network).eval()
    if not same_classes:
        last = network[-1]
        assert isinstance(last, nn.Linear)
        network[-1] = nn.Linear(last.in_features, _num_classes(task))
        nn.init.zeros_(network[-1].weight)
        nn.init.zeros_(network[-1].bias)
    return network


@torch.no_grad()
def _probabilities(network: nn.Module, x: Tensor) -> Tensor:
    return network(x).softmax(1)


@torch.no_grad()
def _features(network: nn.Sequential, x: Tensor) -> Tensor:
    """What the readout sees `[N, F]`, and a one for its bias."""
    return functional.pad(network[:-1](x).double(), (0, 1), value=1.0)


def _logistic(network: nn.Sequential, x: Tensor, y: Tensor, same_classes: bool) -> Logistic:
    """The posterior over the readout's weights, its prior centred where the evidence is largest."""
    features, last = _features(network, x), network[-1]
    assert isinstance(last, nn.Linear)
    centre = torch.cat([last.weight.detach(), last.bias.detach().unsqueeze(1)], 1).T.double()
    centres = [centre, torch.zeros_like(centre)] if same_classes else [torch.zeros_like(centre)]
    return max((Logistic.fit(features, y, each) for each in centres), key=lambda fit: fit.evidence)
