"""Hyperparameters from their posterior: its maximum, or draws to average over.

With few labels the marginal likelihood is nearly flat in some directions, and its maximum may take noise for signal or
signal for noise. A wide prior keeps it in bounds, and an average over the posterior says how little is known.

`infer` takes `gpntk.inference.maximum`, the one search of every fit, for positive hyperparameters with priors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, final

import torch
from torch import Tensor
from torch.distributions import StudentT

from gpntk._checks import check_flags, check_functions, check_kinds, check_positive, check_tensors
from gpntk.errors import InputError, SolveError
from gpntk.inference.maximum import Point, maximize
from gpntk.io import Checkpoint

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
# Of a sum of weights.
_ROUNDING = 1e-6
# Numbers of an interval.
_ENDS = 2
# Of logarithms, for second derivatives.
_STEP = 1e-3


class Prior(Protocol):
    """A density of a positive number: a distribution of torch, a prior of GPyTorch."""

    def log_prob(self, value: Tensor) -> Tensor: ...


@final
@dataclass(frozen=True)
class Hyperparameter:
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

    def __post_init__(self) -> None:
        check_positive(median=self.median, spread=self.spread)
        if not (isinstance(self.bounds, tuple) and len(self.bounds) == _ENDS and 0 < self.bounds[0] <= self.bounds[1]):
            raise InputError(f"bounds={self.bounds!r}: give two positive numbers, the larger one last.")


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
    def from_state(cls, state: Mapping[str, Tensor], count: int) -> Draws:
        """What `state` gave of so many hyperparameters; the evidence is not known any more.

        Raises:
            InputError: Shapes do not fit together.
        """
        logs, weights, best = (state[f"draws.{name}"] for name in ("logs", "weights", "best"))
        if logs.dim() != 2 or weights.shape != logs.shape[:1] or best.shape != logs.shape[1:] or not logs.numel():
            raise InputError(f"draws.logs {list(logs.shape)} and draws.weights {list(weights.shape)} do not fit.")
        if len(best) != count:
            raise InputError(f"draws.best has {len(best)} hyperparameters, but the model has {count}.")
        if {logs.dtype, weights.dtype, best.dtype} != {torch.float64}:
            raise InputError("draws are float64.")
        if not bool((weights > 0).all()) or abs(weights.sum().item() - 1) > _ROUNDING:
            raise InputError("draws.weights must be positive, with sum one.")
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
    label: str = "hyperparameters",
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
        label: What the progress bar calls it.

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
    check_functions(log_likelihood=log_likelihood)
    check_flags(average=average, curvature=curvature)
    known = _known(hyperparameters, {} if fixed is None else fixed)
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
        evaluate,
        [point.numpy() for point in starts],
        bounds.numpy(),
        tolerance=tolerance,
        checkpoint=checkpoint,
        label=label,
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


# --- private ---------------------------------------------------------------------------------------------------------


def _known(hyperparameters: Sequence[Hyperparameter], fixed: Mapping[str, float]) -> Tensor:
    """Logarithms of the values in ``fixed``, NaN for the others `[H]`."""
    check_kinds(Sequence, "a list of Hyperparameter", hyperparameters=hyperparameters)
    check_kinds(Mapping, "a mapping of names to values", fixed=fixed)
    for hyperparameter in hyperparameters:
        check_kinds(Hyperparameter, "a list of Hyperparameter", hyperparameters=hyperparameter)
    names = [hyperparameter.name for hyperparameter in hyperparameters]
    for name, value in fixed.items():
        if name not in names:
            raise InputError(f"hyperparameters has {name!r}, but those of this model are {', '.join(names)}.")
        check_positive(**{f"hyperparameters[{name!r}]": value})
    return torch.tensor([fixed.get(name, math.nan) for name in names], dtype=torch.float64, device="cpu").log()


def _starting_points(hyperparameters: Sequence[Hyperparameter], start: Tensor | None) -> list[Tensor]:
    if start is not None:
        check_tensors(start=start)
        if start.shape != (len(hyperparameters),):
            raise InputError(f"start has shape {tuple(start.shape)}: give [H], here ({len(hyperparameters)},).")
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
