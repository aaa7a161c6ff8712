"""What one would do without us: the usual ways to use a trained network, or none, with few labels for regression.

A source network is an ``nn.Sequential`` whose last two modules are the readout and `Affine`, its units; what comes
before them are its features. Targets are `[n]`.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.linear_model import BayesianRidge
from sklearn.model_selection import KFold
from torch import Tensor, nn

from benchmarks.transfer.experiment import Array, Gaussian, Method, Task

# Rows a network is evaluated at, at once.
_ROWS = 1000


class Affine(nn.Module):
    """Turns standardised outputs into the units of the targets."""

    shift: Tensor
    scale: Tensor

    def __init__(self, shift: float, scale: float) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(shift))
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        return self.shift + self.scale * x


def evaluate(network: nn.Module, x: Array) -> Array:
    """What the network returns for the rows of x, in float64."""
    with torch.no_grad():
        return torch.cat([network(rows) for rows in _tensor(x).split(_ROWS)]).double().numpy()


# --- the network as it is, and its readout -------------------------------------------------------------------------


def unadapted(task: Task) -> Gaussian:
    """The network as it is; its root mean squared residual is the standard deviation."""
    residual = task.y - evaluate(task.network, task.x)[:, 0]
    mean = evaluate(task.network, task.x_test)[:, 0]
    return Gaussian(mean, np.full_like(mean, np.sqrt(np.square(residual).mean())))


def refitted_readout(task: Task) -> Gaussian:
    """Bayesian ridge regression on the features, its two variances by the marginal likelihood."""
    features = _features(task.network)
    model = BayesianRidge().fit(evaluate(features, task.x), task.y)
    return Gaussian(*model.predict(evaluate(features, task.x_test), return_std=True))


# --- fine-tuning ---------------------------------------------------------------------------------------------------

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
MOST_STEPS = 300
# Steps between two looks at the error left out.
_STRIDE = 10


def fine_tuned(task: Task) -> Gaussian:
    """All weights trained further by Adam on all labels at once.

    Learning rate and number of steps, none included, are those of least error in 5-fold cross-validation; that error is
    the noise variance.
    """
    errors = np.zeros((len(RATES), MOST_STEPS // _STRIDE + 1))
    for kept, left_out in KFold(5, shuffle=True, random_state=task.seed).split(task.x):
        for row, rate in enumerate(RATES):
            path = _training(task.network, task.x[kept], task.y[kept], rate)
            looks = islice(path, 0, MOST_STEPS + 1, _STRIDE)
            errors[row] += [np.square(task.y[left_out] - evaluate(net, task.x[left_out])[:, 0]).sum() for net in looks]
    row, look = np.unravel_index(errors.argmin(), errors.shape)
    path = _training(task.network, task.x, task.y, RATES[row])
    mean = evaluate(next(islice(path, int(look) * _STRIDE, None)), task.x_test)[:, 0]
    return Gaussian(mean, np.full_like(mean, np.sqrt(errors.min() / len(task.x))))


def _training(network: nn.Module, x: Array, y: Array, rate: float) -> Iterator[nn.Module]:
    """A copy of the network after 0, 1, 2, ... steps of Adam on x and y."""
    network = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), rate, fused=True)
    inputs, targets = _tensor(x), _tensor(y)
    # Errors of order one, which Adam's smallest denominator is made for.
    unit = targets.std()
    while True:
        yield network
        optimizer.zero_grad()
        ((network(inputs).squeeze(-1) - targets) / unit).square().mean().backward()
        optimizer.step()


# --- Bayesian linear regression on features that are trained with it ------------------------------------------------

_EVIDENCE_RATES = (1e-4, 1e-3, 1e-2)
_EVIDENCE_STEPS = 200


def bayesian_linear_regression(task: Task) -> Gaussian:
    """Bayesian linear regression whose features, the source network's to begin with, are trained by its evidence.

    Of all steps of Adam at three learning rates, the one of largest marginal likelihood is kept.

    References:
        Perrone et al. (2018), Scalable Hyperparameter Transfer Learning, section 3.
    """
    paths = (_EvidenceAscent(_features(task.network), task.x, task.y, rate) for rate in _EVIDENCE_RATES)
    best = max((path.climb() for path in paths), key=lambda path: path.evidence)
    return best.predict(task.x_test)


class _EvidenceAscent:
    """y = Φ w + noise, y standardised, with features Φ and a constant, w ~ N(0, s I): all trained by the evidence."""

    def __init__(self, features: nn.Module, x: Array, y: Array, rate: float) -> None:
        self._features, self._x, self._rate = copy.deepcopy(features), _tensor(x), rate
        self._shift, self._unit = y.mean(), y.std()
        self._y = torch.tensor((y - self._shift) / self._unit, dtype=torch.float64)
        with torch.no_grad():
            power = self._phi(self._x).square().sum(-1).mean()
        # log s and log noise: features explain about all of y at first.
        self._variances = torch.stack([-power.log(), torch.tensor(0.1).double().log()]).requires_grad_()
        self.evidence = -math.inf

    def climb(self) -> _EvidenceAscent:
        """Self, at the best of all steps."""
        slow = {"params": self._features.parameters(), "lr": self._rate}
        optimizer = torch.optim.Adam([slow, {"params": [self._variances], "lr": 0.05}])
        best = self._features, self._variances
        for _ in range(_EVIDENCE_STEPS + 1):
            optimizer.zero_grad()
            value = self._value()
            if value.item() > self.evidence:
                self.evidence = value.item()
                best = copy.deepcopy(self._features), self._variances.detach().clone()
            (-value / len(self._y)).backward()
            optimizer.step()
        self._features, self._variances = best
        return self

    def predict(self, x: Array) -> Gaussian:
        """Posterior means and standard deviations, noise included, in the units of y."""
        with torch.no_grad():
            root = self._root(self._phi(self._x))
            scale, noise = self._scale_and_noise()
            phi = self._phi(_tensor(x))
            cross = scale * phi @ self._phi(self._x).mT
            mean = cross @ torch.cholesky_solve(self._y[:, None], root)[:, 0]
            explained = torch.linalg.solve_triangular(root, cross.mT, upper=False).square().sum(0)
            std = (scale * phi.square().sum(-1) - explained).clamp_min(0).add(noise).sqrt()
        return Gaussian(self._shift + self._unit * mean.numpy(), self._unit * std.numpy())

    def _phi(self, x: Tensor) -> Tensor:
        return nn.functional.pad(self._features(x).double(), (0, 1), value=1.0)

    def _scale_and_noise(self) -> Tensor:
        return self._variances.clamp_min(math.log(1e-6)).exp()

    def _root(self, phi: Tensor) -> Tensor:
        scale, noise = self._scale_and_noise()
        return torch.linalg.cholesky(scale * phi @ phi.mT + noise * torch.eye(len(phi), dtype=torch.float64))

    def _value(self) -> Tensor:
        return torch.distributions.MultivariateNormal(
            torch.zeros_like(self._y), scale_tril=self._root(self._phi(self._x))
        ).log_prob(self._y)


# --- Gaussian processes without the network -------------------------------------------------------------------------


def rbf_gp(task: Task, relevance: bool = False) -> Gaussian:
    """A GP with a squared exponential kernel, all hyperparameters by the marginal likelihood from five starts.

    With ``relevance``, each input dimension has a length scale of its own.
    """
    x, x_test = (values.reshape(len(values), -1).astype(np.float64) for values in (task.x, task.x_test))
    typical = x.std() * math.sqrt(x.shape[1])
    lengths: Any = np.full(x.shape[1], typical) if relevance else typical
    kernel = ConstantKernel(1.0, (1e-3, 1e3)) * RBF(lengths, (0.01 * typical, 100 * typical))
    model = GaussianProcessRegressor(
        kernel + WhiteKernel(0.1, (1e-6, 10.0)), normalize_y=True, n_restarts_optimizer=4, random_state=task.seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # with few points some optimum lies on a bound
        model.fit(x, task.y)
    mean, std, *_ = model.predict(x_test, return_std=True)
    return Gaussian(np.asarray(mean, float), np.asarray(std, float))


def ard_gp(task: Task) -> Gaussian:
    """The same with automatic relevance determination."""
    return rbf_gp(task, relevance=True)


# --- all of them ---------------------------------------------------------------------------------------------------

BASELINES: dict[str, Method] = {
    "unadapted network": unadapted,
    "readout refitted": refitted_readout,
    "fine-tuned": fine_tuned,
    "Bayesian linear regression": bayesian_linear_regression,
    "RBF GP": rbf_gp,
}


def _features(network: nn.Module) -> nn.Module:
    assert isinstance(network, nn.Sequential)
    return network[:-2]


def _tensor(values: Array) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32)
