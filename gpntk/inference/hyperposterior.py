"""Hyperparameters from their posterior: its maximum, or draws to average over.

With few labels the marginal likelihood is nearly flat in some directions, and its maximum may take noise for signal or
signal for noise. A wide prior keeps it in bounds, and an average over the posterior says how little is known.

`maximize` is the one search for a maximum that every fit uses; `infer` is what is made of it for positive
hyperparameters with priors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor
from torch.distributions import StudentT
from tqdm import tqdm

from gpntk._checks import check_count
from gpntk.errors import InputError, SolveError
from gpntk.io import Checkpoint

Treatment = Literal["auto", "average", "maximum"]
"""What is done with hyperparameters: averaged over, put at their maximum, or the first up to 300 labels."""

LogDensity = Callable[[Tensor], Tensor]
"""From the logarithms of the hyperparameters `[H]` to a log density `[]`; -inf where it cannot be computed."""

Point = NDArray[np.float64]

# Degrees of freedom of the priors: tails that give way when the data disagree.
_FREEDOM = 4.0
_DRAWS = 32
# Draws that matter less than this are left out.
NEGLIGIBLE = 1e-3
# Effective number of draws below which they do not stand for the posterior, whose maximum then does.
_FEWEST = 4
_STARTS = 2
# Of logarithms, for second derivatives.
_STEP = 1e-3


class Prior(Protocol):
    """A density of a positive number: a distribution of torch, a prior of GPyTorch."""

    def log_prob(self, value: Tensor) -> Tensor: ...


class Hyperparameter(NamedTuple):
    """A positive number, with its prior."""

    name: str
    median: float
    """A typical value, where searches start; the median of the default prior."""
    spread: float
    """How well it is known, in powers of e; the scale of the default prior."""
    bounds: tuple[float, float] = (1e-8, 1e6)
    variance: bool = True
    """Whether it is the variance of a term."""
    prior: Prior | None = None
    """Its density; None for a logarithm that follows Student's t with four degrees of freedom. One that ends somewhere
    needs ``bounds`` that end there."""


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
        """What `state` gave; the evidence is not known any more.

        Raises:
            InputError: Shapes do not fit together.
        """
        logs, weights, best = (state[f"draws.{name}"] for name in ("logs", "weights", "best"))
        if logs.dim() != 2 or weights.shape != logs.shape[:1] or best.shape != logs.shape[1:] or not logs.numel():
            raise InputError(f"draws.logs {list(logs.shape)} and draws.weights {list(weights.shape)} do not fit.")
        return cls(logs, weights, math.nan, best)


def named(hyperparameters: Sequence[Hyperparameter], logs: Tensor) -> dict[str, float]:
    """Values by name, from their logarithms `[H]`."""
    return dict(zip((h.name for h in hyperparameters), logs.exp().tolist(), strict=True))


def log_prior(logs: Tensor, hyperparameters: Sequence[Hyperparameter]) -> Tensor:
    """Log density of the logarithms of independent hyperparameters `[]`.

    A prior p of the value θ gives log θ the density p(θ) θ.
    """
    centre, spread = _centres(hyperparameters)
    default = torch.tensor([h.prior is None for h in hyperparameters], dtype=torch.bool, device="cpu")
    density = StudentT(_FREEDOM, centre, spread, validate_args=False).log_prob(logs)[default].sum()
    for log, hyperparameter in zip(logs, hyperparameters, strict=True):
        if hyperparameter.prior is not None:
            density = density + hyperparameter.prior.log_prob(log.exp()).sum() + log
    return density


def infer(
    log_likelihood: LogDensity,
    hyperparameters: Sequence[Hyperparameter],
    average: bool,
    start: Tensor | None = None,
    fixed: Mapping[str, float] | None = None,
    *,
    curvature: bool = True,
    tolerance: float | None = None,
    checkpoint: Checkpoint | None = None,
) -> Draws:
    """The posterior of the hyperparameters, given their log likelihood as a differentiable function; float64.

    The maximum is found by L-BFGS from the centre of the prior and from a draw of it (or from ``start`` alone). To
    average, 32 points of a low-discrepancy sequence are laid out as the Gaussian with the curvature there, and weighted
    by importance.

    Args:
        log_likelihood: Of all hyperparameters; where it raises `SolveError`, the search turns back.
        hyperparameters: Their names and priors.
        average: Whether to return several draws or the maximum.
        start: Where to start from `[H]`.
        fixed: Values of those that are known, by name.
        curvature: Whether the evidence at the maximum is wanted, which takes one gradient for each hyperparameter; else
            it is NaN.
        tolerance: Nats that a step must gain for the search to go on; default: as far as rounding allows.
        checkpoint: File of the search for the maximum, which goes on from there.

    Raises:
        InputError: ``fixed`` names something else, or a value is not positive.
        SolveError: The likelihood is finite at none of the starts.
        FileFormatError: ``checkpoint`` is damaged, or belongs to something else.

    Example:
        Scale and noise of a kernel matrix; features go the same way, by a `gpntk.inference.FeatureCovariance`.

        >>> import torch
        >>> from gpntk.inference import log_evidence
        >>> x = torch.linspace(0, 1, 30, dtype=torch.float64)
        >>> gram, y = (-8 * (x[:, None] - x) ** 2).exp(), (4 * x).sin()
        >>> wide = [Hyperparameter("scale", median=1.0, spread=3.0), Hyperparameter("noise", median=0.1, spread=3.0)]
        >>> best = infer(lambda logs: log_evidence(logs[0].exp() * gram, logs[1:].exp(), y), wide, average=False).best
        >>> scale, noise = best.exp().tolist()
        >>> noise < 1e-6 < scale
        True
    """
    known = _known(hyperparameters, fixed or {})
    free = known.isnan()
    places = [place for place, value in enumerate(known.tolist()) if math.isnan(value)]
    unknown = [hyperparameters[place] for place in places]

    def density(logs: Tensor) -> Tensor:
        try:
            return log_likelihood(logs) + log_prior(logs[places], unknown)
        except SolveError:
            return torch.full((), -math.inf, dtype=torch.float64, device="cpu")

    if not unknown:
        with torch.no_grad():
            return Draws(known.unsqueeze(0), known.new_ones(1), density(known).item(), known)
    low, high = torch.tensor([h.bounds for h in hyperparameters], dtype=torch.float64, device="cpu").log().mT
    starts = [torch.where(free, point, known) for point in _starting_points(hyperparameters, start)]
    bounds = torch.stack([torch.where(free, bound, known) for bound in (low, high)], -1)

    def evaluate(point: Point) -> tuple[float, Point]:
        value, gradient = _value_and_gradient(density, torch.tensor(point, dtype=torch.float64, device="cpu"))
        return value, torch.where(free, gradient, 0.0).numpy()

    found = maximize(
        evaluate, [point.numpy() for point in starts], bounds.numpy(), tolerance=tolerance, checkpoint=checkpoint
    )
    mode = torch.tensor(found.point, dtype=torch.float64, device="cpu")
    if not (average or curvature):
        return Draws(mode.unsqueeze(0), mode.new_ones(1), math.nan, mode)
    eigenvalues, vectors = torch.linalg.eigh(_curvature(density, mode, free))
    # Nowhere wider than twice the widest prior: a flat direction is not known better than before the data.
    eigenvalues = eigenvalues.clamp_min(0.25 / max(h.spread for h in unknown) ** 2)
    normalizer = 0.5 * (len(unknown) * math.log(2 * math.pi) - eigenvalues.log().sum().item())
    maximum = Draws(mode.unsqueeze(0), mode.new_ones(1), found.value + normalizer, mode)
    if not average:
        return maximum
    uniform = torch.quasirandom.SobolEngine(len(unknown), scramble=True, seed=0).draw(_DRAWS, dtype=torch.float64)
    standard = torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))
    logs = mode.repeat(_DRAWS, 1)
    logs[:, free] += (standard * eigenvalues.rsqrt()) @ vectors.mT
    logs = logs.clamp(*bounds.mT)
    proposal = -0.5 * standard.square().sum(-1) - normalizer
    with torch.no_grad():
        ratios = torch.stack([density(point) for point in logs]) - proposal
    weights = ratios.softmax(0)
    log_evidence = ratios.logsumexp(0).item() - math.log(_DRAWS)
    if 1 / weights.square().sum() < _FEWEST:
        return maximum
    kept = weights > NEGLIGIBLE
    return Draws(logs[kept], weights[kept] / weights[kept].sum(), log_evidence, mode)


# --- the maximum -----------------------------------------------------------------------------------------------------


class Maximum(NamedTuple):
    """The best point of a search `[H]`, the log density there in nats, and the steps of L-BFGS taken in all."""

    point: Point
    value: float
    steps: int


def maximize(
    evaluate: Callable[[Point], tuple[float, Point]],
    starts: Sequence[Point],
    bounds: NDArray[np.float64] | None = None,
    *,
    max_steps: int = 1000,
    tolerance: float | None = None,
    rounding: float = 1e-13,
    checkpoint: Checkpoint | None = None,
    callback: Callable[[int, float], None] | None = None,
) -> Maximum:
    """The largest value of a log density near any of ``starts``, by L-BFGS within bounds.

    With a ``checkpoint``, the best point is written after each step. A search that finds the file goes on from there,
    and returns at once if it had ended.

    Args:
        evaluate: The log density at a point `[H]` and its gradient; -inf where it cannot be computed.
        starts: Points to start from.
        bounds: Smallest and largest values `[H, 2]`; equal ones where a coordinate is known.
        max_steps: Most steps, those before a resumption included.
        tolerance: Nats that a step must gain for the search to go on; default: SciPy's own.
        rounding: Relative rounding of the values: where they rise by no more, the search has ended.
        checkpoint: File of the search.
        callback: Is given the number of each step, from 0, and the best value so far.

    Raises:
        InputError: ``max_steps`` or ``tolerance`` is negative.
        SolveError: The density is finite at none of the starts.

    Example:
        >>> import numpy as np
        >>> found = maximize(lambda x: (float(-(x - 1) @ (x - 1)), -2 * (x - 1)), [np.zeros(2)])
        >>> found.point.round(6).tolist()
        [1.0, 1.0]
    """
    check_count(0, max_steps=max_steps)
    if tolerance is not None and not tolerance > 0:
        raise InputError(f"tolerance={tolerance}: give a positive number of nats.")
    tensors, facts = (
        {"point": torch.tensor(starts[0], device="cpu")},
        {"value": -math.inf, "steps": 0, "finished": False},
    )
    if checkpoint is not None:
        tensors, facts = checkpoint.begin(tensors, facts)
    best = Maximum(tensors["point"].numpy(), facts["value"], facts["steps"])
    if facts["finished"]:
        return best
    with tqdm(desc="hyperparameters", delay=2, leave=False) as bar:
        search = _Search(evaluate, best, bar, checkpoint, callback)
        points = [best.point] if math.isfinite(best.value) else starts
        ended = [search.run(point, bounds, max_steps, tolerance, rounding) for point in points]
    if not math.isfinite(search.best.value):
        raise SolveError("the covariance of the labels cannot be factorised: check X for NaN and rows of huge values.")
    search.keep(finished=all(ended))
    return search.best


@final
class _Search:
    """The best point so far, here and in a file, of searches for the maximum of a log density.

    Each search works in units of its first gradient, so that the first step is no longer than one power of e: else
    thousands of labels send it to the corner of the bounds. Where the density cannot be computed, its value falls with
    the distance from the best point of this search, and line searches come back.
    """

    def __init__(
        self,
        evaluate: Callable[[Point], tuple[float, Point]],
        best: Maximum,
        bar: Any,
        checkpoint: Checkpoint | None,
        callback: Callable[[int, float], None] | None,
    ) -> None:
        self._evaluate, self.best = evaluate, best
        self._bar, self._checkpoint, self._callback = bar, checkpoint, callback
        self._unit, self._here, self._highest = 1.0, best.point, -math.inf

    def run(self, start: Point, bounds: Point | None, max_steps: int, tolerance: float | None, rounding: float) -> bool:
        """Search from one start; whether that has ended by itself."""
        self._highest = -math.inf
        value, gradient = self._at(start)
        left = max_steps - self.best.steps
        if not math.isfinite(value) or left <= 0:
            return left > 0
        self._unit = max(1.0, float(np.linalg.norm(gradient)))
        # SciPy's own, in nats; that of values is relative to the largest of them, or to the unit.
        gtol, ftol = 1e-5, 2.2e-9 / self._unit
        if tolerance is not None:
            gtol, ftol = 1e-3 * tolerance, tolerance / max(self._unit, abs(value))
        options = {"maxiter": left, "gtol": gtol / self._unit, "ftol": max(ftol, rounding)}
        found = minimize(self, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options, callback=self._step)
        return found.nit < left

    def __call__(self, point: Point) -> tuple[float, Point]:
        """What is minimised, with its gradient."""
        value, gradient = self._at(point)
        if math.isfinite(value):
            return -value / self._unit, -gradient / self._unit
        away = point - self._here
        return 1 - self._highest / self._unit + float(away @ away), 2 * away

    def keep(self, finished: bool) -> None:
        """Write the best point to the file."""
        if self._checkpoint is not None:
            facts = {"value": self.best.value, "steps": self.best.steps, "finished": finished}
            self._checkpoint.save({"point": torch.tensor(self.best.point, device="cpu")}, facts)

    def _at(self, point: Point) -> tuple[float, Point]:
        self._bar.update()
        value, gradient = self._evaluate(point)
        if math.isfinite(value) and value > self._highest:
            self._here, self._highest = point.copy(), value
            if value > self.best.value:
                self.best = self.best._replace(point=self._here, value=value)
        return value, gradient

    def _step(self, _: Point) -> None:
        self.best = self.best._replace(steps=self.best.steps + 1)
        self.keep(finished=False)
        if self._callback is not None:
            self._callback(self.best.steps - 1, self.best.value)


# --- private ---------------------------------------------------------------------------------------------------------


def _known(hyperparameters: Sequence[Hyperparameter], fixed: Mapping[str, float]) -> Tensor:
    """Logarithms of the values in ``fixed``, NaN for the others `[H]`."""
    names = [hyperparameter.name for hyperparameter in hyperparameters]
    for name, value in fixed.items():
        if name not in names:
            raise InputError(f"hyperparameters has {name!r}, but those of this model are {', '.join(names)}.")
        if not 0 < value < math.inf:
            raise InputError(f"hyperparameters[{name!r}] = {value}: give a positive number.")
    return torch.tensor([fixed.get(name, math.nan) for name in names], dtype=torch.float64, device="cpu").log()


def _starting_points(hyperparameters: Sequence[Hyperparameter], start: Tensor | None) -> list[Tensor]:
    if start is not None:
        return [start.double().cpu()]
    centre, spread = _centres(hyperparameters)
    generator = torch.Generator("cpu").manual_seed(0)
    shifts = torch.randn(_STARTS - 1, len(centre), generator=generator, dtype=torch.float64, device="cpu")
    return [centre, *(centre + shifts * spread)]


def _curvature(density: LogDensity, mode: Tensor, free: Tensor) -> Tensor:
    """Minus the second derivative in the free coordinates, by differences of gradients."""
    _, here = _value_and_gradient(density, mode)
    shifts = _STEP * torch.eye(len(mode), dtype=mode.dtype, device="cpu")[free]
    there = torch.stack([_value_and_gradient(density, mode + shift)[1] for shift in shifts])
    curvature = torch.nan_to_num((here - there)[:, free] / _STEP, nan=0.0, posinf=0.0, neginf=0.0)
    return (curvature + curvature.mT) / 2


def _value_and_gradient(density: LogDensity, logs: Tensor) -> tuple[float, Tensor]:
    # Whoever predicts with networks may have switched gradients off.
    with torch.inference_mode(False), torch.enable_grad():
        logs = logs.clone().requires_grad_()
        value = density(logs)
        if not torch.isfinite(value):
            return -math.inf, torch.zeros_like(logs)
        return value.item(), torch.autograd.grad(value, logs)[0]


def _centres(hyperparameters: Sequence[Hyperparameter]) -> tuple[Tensor, Tensor]:
    centre = torch.tensor([math.log(h.median) for h in hyperparameters], dtype=torch.float64, device="cpu")
    return centre, torch.tensor([h.spread for h in hyperparameters], dtype=torch.float64, device="cpu")
