"""Hyperparameters from their posterior: its maximum, or draws to average over.

With few labels the marginal likelihood is nearly flat in some directions, and its maximum may take noise for signal or
signal for noise. A wide prior keeps it in bounds, and an average over the posterior says how little is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, final

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from tqdm import tqdm

from gpntk.errors import InputError, SolveError

Treatment = Literal["auto", "average", "maximum"]
"""What is done with hyperparameters: averaged over, put at their maximum, or the first up to 300 labels."""

LogDensity = Callable[[Tensor], Tensor]
"""From the logarithms of the hyperparameters `[H]` to a log density `[]`; -inf where it cannot be computed."""

# Degrees of freedom of the priors: tails that give way when the data disagree.
_FREEDOM = 4.0
_DRAWS = 32
# Draws that matter less than this are left out.
NEGLIGIBLE = 1e-3
# Effective number of draws below which they do not stand for the posterior, whose maximum then does.
_FEWEST = 4
_STARTS = 2


class Hyperparameter(NamedTuple):
    """The logarithm of a positive number, with the centre and width of its prior."""

    name: str
    median: float
    spread: float
    """In powers of e."""
    bounds: tuple[float, float] = (1e-8, 1e6)
    variance: bool = True
    """Whether it is the variance of a term."""


class Draws(NamedTuple):
    """Weighted draws of the hyperparameters; a single one for their maximum."""

    logs: Tensor
    """Logarithms `[S, H]`."""
    weights: Tensor
    """Positive, with sum one `[S]`."""
    log_evidence: float
    """Logarithm of the integral of likelihood times prior over the hyperparameters, in nats."""
    best: Tensor
    """Where their posterior density is largest `[H]`."""

    def state(self) -> dict[str, Tensor]:
        """All but the evidence, by name, for a file."""
        return {"draws.logs": self.logs, "draws.weights": self.weights, "draws.best": self.best}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Draws:
        """What `state` gave; the evidence is not known any more."""
        return cls(state["draws.logs"], state["draws.weights"], math.nan, state["draws.best"])


def named(hyperparameters: Sequence[Hyperparameter], logs: Tensor) -> dict[str, float]:
    """Values by name, from their logarithms `[H]`."""
    return dict(zip((h.name for h in hyperparameters), logs.exp().tolist(), strict=True))


def log_prior(logs: Tensor, hyperparameters: Sequence[Hyperparameter]) -> Tensor:
    """Log density of independent Student-t priors on the logarithms of the hyperparameters `[]`."""
    centre, spread = _priors(hyperparameters)
    constant = math.lgamma((_FREEDOM + 1) / 2) - math.lgamma(_FREEDOM / 2) - 0.5 * math.log(_FREEDOM * math.pi)
    scaled = (logs - centre) / spread
    return (constant - spread.log() - (_FREEDOM + 1) / 2 * torch.log1p(scaled.square() / _FREEDOM)).sum()


def infer(
    log_likelihood: LogDensity,
    hyperparameters: Sequence[Hyperparameter],
    average: bool,
    start: Tensor | None = None,
    fixed: Mapping[str, float] | None = None,
) -> Draws:
    """The posterior of the hyperparameters, given their log likelihood as a differentiable function; float64.

    The maximum is found by L-BFGS from the centre of the prior and from a draw of it (or from ``start`` alone). To
    average, 32 points of a low-discrepancy sequence are laid out as the Gaussian with the curvature there, and weighted
    by importance.

    Args:
        log_likelihood: Of all hyperparameters.
        hyperparameters: Their names and priors.
        average: Whether to return several draws or the maximum.
        start: Where to start from `[H]`.
        fixed: Values of those that are known, by name.

    Raises:
        InputError: ``fixed`` names something else, or a value is not positive.
        SolveError: The likelihood is finite at none of the starts.
    """
    known = _known(hyperparameters, fixed or {})
    free = [h for h, value in zip(hyperparameters, known, strict=True) if value.isnan()]
    if len(free) < len(known):
        unknown = known.isnan()

        def complete(logs: Tensor) -> Tensor:
            return known.masked_scatter(unknown, logs)

        start = None if start is None else start[unknown]
        draws = infer(lambda logs: log_likelihood(complete(logs)), free, average, start)
        logs = torch.stack([complete(logs) for logs in draws.logs])
        return draws._replace(logs=logs, best=complete(draws.best))

    def density(logs: Tensor) -> Tensor:
        return log_likelihood(logs) + log_prior(logs, hyperparameters)

    if not hyperparameters:
        empty = torch.zeros(1, 0, dtype=torch.float64, device="cpu")
        return Draws(empty, empty.new_ones(1), density(empty[0]).item(), empty[0])
    mode = _maximum(density, hyperparameters, start)
    precision = _curvature(density, mode)
    eigenvalues, vectors = torch.linalg.eigh(precision)
    _, spread = _priors(hyperparameters)
    # Nowhere wider than twice the widest prior: a flat direction is not known better than before the data.
    eigenvalues = eigenvalues.clamp_min(0.25 / spread.max().item() ** 2)
    normalizer = 0.5 * (len(mode) * math.log(2 * math.pi) - eigenvalues.log().sum().item())
    with torch.no_grad():
        maximum = Draws(mode.unsqueeze(0), mode.new_ones(1), density(mode).item() + normalizer, mode)
    if not average:
        return maximum
    uniform = torch.quasirandom.SobolEngine(len(mode), scramble=True, seed=0).draw(_DRAWS, dtype=torch.float64)
    standard = torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))
    low, high = _bounds(hyperparameters)
    logs = (mode + (standard * eigenvalues.rsqrt()) @ vectors.mT).clamp(low, high)
    proposal = -0.5 * standard.square().sum(-1) - normalizer
    with torch.no_grad():
        ratios = torch.stack([density(point) for point in logs]) - proposal
    weights = ratios.softmax(0)
    log_evidence = ratios.logsumexp(0).item() - math.log(_DRAWS)
    if 1 / weights.square().sum() < _FEWEST:
        return maximum
    kept = weights > NEGLIGIBLE
    return Draws(logs[kept], weights[kept] / weights[kept].sum(), log_evidence, mode)


def _known(hyperparameters: Sequence[Hyperparameter], fixed: Mapping[str, float]) -> Tensor:
    """Logarithms of the values in ``fixed``, NaN for the others `[H]`."""
    names = [hyperparameter.name for hyperparameter in hyperparameters]
    for name, value in fixed.items():
        if name not in names:
            raise InputError(f"hyperparameters has {name!r}, but those of this model are {', '.join(names)}.")
        if not value > 0:
            raise InputError(f"hyperparameters[{name!r}] = {value}: give a positive number.")
    return torch.tensor([fixed.get(name, math.nan) for name in names], dtype=torch.float64, device="cpu").log()


def _maximum(density: LogDensity, hyperparameters: Sequence[Hyperparameter], start: Tensor | None) -> Tensor:
    low, high = (bound.numpy() for bound in _bounds(hyperparameters))
    bounds = list(zip(low, high, strict=True))
    with tqdm(desc="hyperparameters", delay=2, leave=False) as bar:
        losses = [_Loss(density, point, bar) for point in _starting_points(hyperparameters, start)]
        found = [loss for loss in losses if loss.found]
        for loss in found:
            minimize(loss, loss.best, jac=True, method="L-BFGS-B", bounds=bounds, options=loss.tolerances)
    if not found:
        raise SolveError("the covariance of the labels cannot be factorised: check X for NaN and rows of huge values.")
    return torch.tensor(min(found, key=lambda loss: loss.lowest).best, dtype=torch.float64, device="cpu")


@final
class _Loss:
    """Minus a log density in units of its first gradient, so that the first step is no longer than one power of e.

    Without, thousands of labels send it to the corner of the bounds. Where the density cannot be computed the value
    rises with the distance from the best point so far: line searches come back.
    """

    def __init__(self, density: LogDensity, start: np.ndarray, bar: tqdm) -> None:
        self._density, self._bar = density, bar
        self.best, self.lowest = start, math.inf
        value, gradient = self._evaluate(start)
        self.found = math.isfinite(value)
        self._unit = max(1.0, float(np.linalg.norm(gradient)))

    @property
    def tolerances(self) -> dict[str, float]:
        """SciPy's own, in nats."""
        return {"gtol": 1e-5 / self._unit, "ftol": max(2.2e-9 / self._unit, 1e-13)}

    def __call__(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = self._evaluate(point)
        if math.isfinite(value):
            return value / self._unit, gradient / self._unit
        away = point - self.best
        return self.lowest / self._unit + 1 + float(away @ away), 2 * away

    def _evaluate(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        self._bar.update()
        value, gradient = _value_and_gradient(self._density, torch.tensor(point, dtype=torch.float64, device="cpu"))
        if math.isfinite(value) and -value.item() < self.lowest:
            self.best, self.lowest = point.copy(), -value.item()
        return -value.item(), -gradient.numpy()


def _starting_points(hyperparameters: Sequence[Hyperparameter], start: Tensor | None) -> list[np.ndarray]:
    if start is not None:
        return [start.numpy()]
    centre, spread = _priors(hyperparameters)
    generator = torch.Generator("cpu").manual_seed(0)
    shifts = torch.randn(_STARTS - 1, len(centre), generator=generator, dtype=torch.float64, device="cpu")
    return [centre.numpy(), *(centre + shifts * spread).numpy()]


def _curvature(density: LogDensity, mode: Tensor) -> Tensor:
    """Minus the second derivative `[H, H]`, by differences of gradients."""
    step = 1e-3  # logarithms

    def gradient(logs: Tensor) -> Tensor:
        return -_value_and_gradient(density, logs)[1]

    shifts = step * torch.eye(len(mode), dtype=torch.float64, device="cpu")
    curvature = torch.stack([(gradient(mode + shift) - gradient(mode - shift)) / (2 * step) for shift in shifts])
    curvature = torch.nan_to_num(curvature, nan=0.0, posinf=0.0, neginf=0.0)
    return (curvature + curvature.mT) / 2


def _value_and_gradient(density: LogDensity, logs: Tensor) -> tuple[Tensor, Tensor]:
    # Whoever predicts with networks may have switched gradients off.
    with torch.inference_mode(False), torch.enable_grad():
        logs = logs.clone().requires_grad_()
        value = density(logs)
        if not torch.isfinite(value):
            return value.detach(), torch.zeros_like(logs)
        return value.detach(), torch.autograd.grad(value, logs)[0]


def _priors(hyperparameters: Sequence[Hyperparameter]) -> tuple[Tensor, Tensor]:
    centre = torch.tensor([math.log(h.median) for h in hyperparameters], dtype=torch.float64, device="cpu")
    return centre, torch.tensor([h.spread for h in hyperparameters], dtype=torch.float64, device="cpu")


def _bounds(hyperparameters: Sequence[Hyperparameter]) -> tuple[Tensor, Tensor]:
    low, high = torch.tensor([h.bounds for h in hyperparameters], dtype=torch.float64, device="cpu").log().mT
    return low, high
