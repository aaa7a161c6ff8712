"""Targets with Gaussian noise, given a prior that depends on hyperparameters: an average over their draws."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from gpntk.cost import Machine
from gpntk.errors import SolveError
from gpntk.inference import AbstractSolver, AutoSolver, Posterior, WhitenedSystem, log_evidence
from gpntk.inference.auto import sizes_of
from gpntk.inference.features import exact_dtype
from gpntk.inference.hyperposterior import Draws, Hyperparameter, infer, named
from gpntk.inference.solver import SolverChoice
from gpntk.transfer.forms import AbstractForm
from gpntk.transfer.task import AbstractModel, Prediction, Search

logger = logging.getLogger("gpntk.transfer")

# Posterior samples that variances are taken from where each would cost a solve: so many, or what there is time for.
SAMPLES, _FEWEST = 64, 8
# Seconds, as counted, beyond which a factorisation waits until variances are asked for.
_DIRECT_SECONDS = 15.0
_LARGEST_NOISE = 1e4
# Relative to the targets' variance; below it a covariance of order one cannot be factorised.
_SMALLEST_NOISE = {torch.float64: 1e-10, torch.float32: 1e-5}


class Labels(NamedTuple):
    """Targets of order one and their noise, all `[N, C]`."""

    y: Tensor
    """NaN where missing."""
    relative: Tensor | None = None
    """Noise variances up to the factor σ²; None for ones."""
    known: Tensor | None = None
    """Noise variances beside; None for zeros."""


@final
class GaussianModel(AbstractModel):
    """y = g(x) + noise with g ~ GP(0, K_θ), averaged over draws of its hyperparameters θ.

    Shared covariances make C problems of N labels, others one problem of N*C. The noise variance of a label is σ² times
    its relative noise plus its known noise.

    Args:
        form: K_θ at the inputs.
        labels: The targets.
        noise: Prior of σ², as its median and spread; None if all noise is known.
        seconds: What variances may take in all where means are iterated.
    """

    def __init__(
        self, form: AbstractForm, labels: Labels, noise: tuple[float, float] | None, seconds: float = 240.0
    ) -> None:
        bounds = (_SMALLEST_NOISE[labels.y.dtype], _LARGEST_NOISE)
        own = () if noise is None else (Hyperparameter("noise", *noise, bounds),)
        super().__init__(form, (*form.hyperparameters, *own))
        self.labels, self._noise_prior, self._seconds = labels, noise, seconds
        self._posteriors: list[list[Posterior]] = []
        self._factorised: dict[Posterior, list[Posterior]] = {}
        self._samples: dict[Posterior, Tensor] = {}

    # --- hyperparameters ---------------------------------------------------------------------------------------

    def fit(self, average: bool, fixed: Mapping[str, float] | None, start: Tensor | None, search: Search) -> Draws:
        if start is not None and not all(self.form.free):
            held = [*(not free for free in self.form.free), *([False] * (self._noise_prior is not None))]
            values = named(self.hyperparameters, start)
            names = [h.name for h, is_held in zip(self.hyperparameters, held, strict=True) if is_held]
            fixed = {**{name: values[name] for name in names}, **(fixed or {})}
        return infer(self.log_likelihood, self.hyperparameters, average, start, fixed, **search._asdict())

    def log_likelihood(self, logs: Tensor) -> Tensor:
        try:
            covariance = self.form.differentiable(self._of_form(logs))
            parts = [log_evidence(covariance, noise, y) for y, noise in self._problems(self.labels, logs)]
        except SolveError:
            return torch.tensor(-math.inf, dtype=torch.float64, device="cpu")
        return torch.stack(parts).sum().double().cpu()

    def set_draws(self, draws: Draws) -> None:
        self.drawn = draws
        self._posteriors = [self._posterior(logs) for logs in draws.logs]
        self._factorised, self._samples = {}, {}

    def log_evidence(self) -> float:
        best = int(self.draws.weights.argmax())
        if not all(posterior.solver.is_direct for posterior in self._posteriors[best]):
            return math.nan
        with torch.no_grad():
            return sum(float(posterior.log_evidence) for posterior in self._posteriors[best])

    # --- predictions -------------------------------------------------------------------------------------------

    def predict(self, x: Tensor, covariance: bool = False) -> Prediction:
        """The posterior of g at x `[M, D]`: the moments of the mixture over draws."""
        moments = [
            (self._mean(posteriors, x), self._spread(logs, posteriors, x, covariance))
            for logs, posteriors in zip(self.draws.logs, self._posteriors, strict=True)
        ]
        return self._mixed(moments)

    def mean(self, x: Tensor) -> Tensor:
        """The posterior mean of g at x `[M, D]`: `[M*C]`."""
        means = torch.stack([self._mean(posteriors, x) for posteriors in self._posteriors])
        return self.draws.weights.to(means) @ means

    def noise_variance(self) -> float:
        return 0.0 if self._noise_prior is None else float(self.draws.weights @ self.draws.logs[:, -1].exp())

    def leave_one_out(self) -> Prediction:
        """Mean and variance of each label given all the others `[N*C]`, noise included; NaN where it is missing."""
        moments = []
        for posteriors in self._posteriors:
            left_out = [posterior.leave_one_out() for posterior in posteriors]
            means = self._rows([each.mean for each in left_out])
            moments.append((means, self._rows([each.variance for each in left_out], len(means))))
        return self._mixed(moments)

    def effective_parameters(self) -> float:
        counts = [sum(posterior.effective_parameters() for posterior in own) for own in self._posteriors]
        return float(self.draws.weights @ torch.tensor(counts, dtype=torch.float64, device="cpu"))

    def condition_on(self, x: Tensor, labels: Labels) -> GaussianModel:
        """The same with more labels, hyperparameters as they are, at the cost of the new ones."""
        old, new = self.labels, labels
        relative = joined((old.y, old.relative), (new.y, new.relative), fill=1.0)
        together = Labels(torch.cat([old.y, new.y]), relative, joined((old.y, old.known), (new.y, new.known), fill=0.0))
        grown = GaussianModel(self.form.extended(x), together, self._noise_prior, self._seconds)
        grown.drawn = self.drawn
        for logs, posteriors in zip(self.draws.logs, self._posteriors, strict=True):
            problems = self._problems(labels, logs)
            if len(problems) != len(posteriors):
                grown._posteriors.append(grown._posterior(logs))
                continue
            pairs = zip(posteriors, problems, strict=True)
            own = [old.condition_on(x, y, noise) for old, (y, noise) in pairs]
            grown._posteriors.append(own)
            if posteriors[0] in self._factorised:
                pairs = zip(self._factorised[posteriors[0]], problems, strict=True)
                grown._factorised[own[0]] = [old.condition_on(x, y, noise) for old, (y, noise) in pairs]
        return grown

    @property
    def note(self) -> str:
        posterior = self._posteriors[0][0]
        if posterior.solver.is_direct:
            return f"{posterior.solver}, {self.form.note}"
        return f"{type(posterior.solver).__name__}, {self.form.note}; {_deviations(posterior, self._seconds)}"

    # --- private -----------------------------------------------------------------------------------------------

    def _of_form(self, logs: Tensor) -> Tensor:
        return logs if self._noise_prior is None else logs[:-1]

    def _problems(self, labels: Labels, logs: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Targets `[n]`, or columns `[C, N]` that share a system, with noise variances `[1]` or `[n]`."""
        y = labels.y.to(exact_dtype(labels.y.device))
        seen = ~y.isnan()
        level = y.new_zeros(()) if self._noise_prior is None else logs[-1].exp().to(y)
        shared = self.form.shared
        if labels.relative is None and labels.known is None and bool(seen.all()):
            return [(y.mT.contiguous() if shared else y.flatten(), level.unsqueeze(0))]
        noise = level * (torch.ones_like(y) if labels.relative is None else labels.relative)
        noise = noise if labels.known is None else noise + labels.known
        noise = torch.where(seen, noise, math.inf)
        if not shared:
            return [(y.flatten(), noise.flatten())]
        # One factorisation serves all outputs whose labels and noises are alike.
        if bool((noise.detach() == noise.detach()[:, :1]).all()):
            return [(y.mT.contiguous(), noise[:, 0])]
        return list(zip(y.mT, noise.mT, strict=True))

    def _posterior(self, logs: Tensor) -> list[Posterior]:
        with torch.no_grad():
            covariance = self.form.covariance(self._of_form(logs))
            return [
                Posterior(*_solvable(WhitenedSystem(covariance, noise), y))
                for y, noise in self._problems(self.labels, logs)
            ]

    def _mean(self, posteriors: Sequence[Posterior], x: Tensor) -> Tensor:
        return self._rows([posterior.mean(x) for posterior in posteriors])

    def _spread(self, logs: Tensor, posteriors: Sequence[Posterior], x: Tensor, joint: bool) -> Tensor:
        """Variances `[M*C]` or covariance `[M*C, M*C]`."""
        unexplained = self.form.unexplained(self._of_form(logs), x)
        outputs = self.labels.y.shape[1]
        posteriors = self._with_variances(logs, posteriors)
        if not joint:
            variances = [self._covariance(posterior, x, joint) + unexplained for posterior in posteriors]
            return self._rows(variances, len(x) * outputs)
        covariances = [self._covariance(posterior, x, joint) + unexplained.diag() for posterior in posteriors]
        if not self.form.shared:
            return covariances[0]
        by_output = torch.stack(covariances).expand(outputs, -1, -1).movedim(0, -1).diag_embed()  # [M, M, C, C]
        return by_output.movedim(2, 1).flatten(2).flatten(0, 1)

    def _with_variances(self, logs: Tensor, posteriors: Sequence[Posterior]) -> Sequence[Posterior]:
        """The same posteriors by factorisations, where means were cheaper without and samples are no cheaper."""
        first = posteriors[0]
        if first.solver.is_direct or (solver := _deviations(first, self._seconds).solver) is None:
            return posteriors
        if first not in self._factorised:
            covariance = self.form.covariance(self._of_form(logs))
            self._factorised[first] = [
                Posterior(WhitenedSystem(covariance, noise), y, solver)
                for y, noise in self._problems(self.labels, logs)
            ]
        return self._factorised[first]

    def _covariance(self, posterior: Posterior, x: Tensor, joint: bool) -> Tensor:
        """Variances `[n]` or covariance `[n, n]` of one problem: exact, or from samples where each costs a solve."""
        if posterior.solver.is_direct:
            return posterior.covariance(x) if joint else posterior.variance(x)
        if posterior not in self._samples:
            how = _deviations(posterior, self._seconds)
            logger.warning("%s: a factorisation would take about %.3g s.", how, how.seconds)
            generator = torch.Generator(x.device).manual_seed(0)
            self._samples[posterior] = posterior.sample_weights(how.samples, generator)
        # The exact covariance: iterations may run in single precision, samples are refined in double.
        samples = self._samples[posterior]
        values = posterior.inverse.exact.covariance.values(x, samples.flatten(0, -2)).to(self.labels.y)
        mean = posterior.mean(x)
        deviations = (values.unflatten(0, (len(samples), -1)) - mean.reshape(-1, mean.shape[-1])).flatten(0, 1)
        return deviations.mT @ deviations / len(deviations) if joint else deviations.square().mean(0)

    def _rows(self, parts: Sequence[Tensor], size: int | None = None) -> Tensor:
        """What the problems give, `[C, M]` or C times `[M]`, or `[M]` for all outputs, as `[M*C]`."""
        if not self.form.shared:
            return parts[0]
        columns = parts[0] if len(parts) == 1 else torch.stack(list(parts))
        if columns.dim() == 1:
            outputs = 1 if size is None else size // len(columns)
            columns = columns.expand(outputs, -1)
        return columns.mT.reshape(-1)

    def _mixed(self, moments: list[tuple[Tensor, Tensor]]) -> Prediction:
        means, spreads = (torch.stack(values) for values in zip(*moments, strict=True))
        weights = self.draws.weights.to(means)
        mean = weights @ means
        deviation = means - mean
        if spreads.dim() == means.dim():
            return Prediction(mean, weights @ (spreads + deviation.square()))
        return Prediction(mean, torch.einsum("s,sij->ij", weights, spreads) + (deviation.mT * weights) @ deviation)


def joined(*pairs: tuple[Tensor, Tensor | None], fill: float) -> Tensor | None:
    """What there is beside labels, one after the other: ``fill`` where there is None; None if nowhere is any."""
    if all(part is None for _, part in pairs):
        return None
    return torch.cat([torch.full_like(y, fill) if part is None else part for y, part in pairs])


def _solvable(system: WhitenedSystem, y: Tensor) -> tuple[WhitenedSystem, Tensor, AbstractSolver]:
    """The system with its solver: direct, for then variances are exact; or made for a mean alone.

    Conjugate gradients run in single precision, twice as fast, and are refined in double.
    """
    choice = AutoSolver().select(system)
    if choice.solver.is_direct and _seconds(choice, system) > _DIRECT_SECONDS:
        choice = AutoSolver(columns=1).select(system)
    if choice.solver.is_direct:
        return system, y, choice.solver
    return system.to(torch.float32), y, choice.solver


class _Deviations(NamedTuple):
    """How variances come from a posterior whose means are iterated."""

    solver: AbstractSolver | None
    """What factorises the system when they are first asked for; None for samples."""
    samples: int
    seconds: float
    """What a factorisation takes, as counted."""

    def __str__(self) -> str:
        if self.solver is None:
            return f"deviations from {self.samples} samples, to {100 / math.sqrt(2 * self.samples):.0f} %"
        return f"deviations exact, by {self.solver} when first asked for, which may take {self.seconds:.3g} s"


def _deviations(posterior: Posterior, most: float) -> _Deviations:
    """A factorisation where it is worth the samples that it saves and keeps to ``most`` seconds, or samples that do."""
    system = posterior.inverse.exact
    choice = AutoSolver(columns=SAMPLES).select(system)
    seconds = _seconds(choice, system)
    if choice.solver.is_direct and seconds <= most:
        return _Deviations(choice.solver, 0, seconds)
    solve = posterior.solver.cost(sizes_of(system, columns=1)).product
    affordable = most * Machine.of(system.covariance.device).attained / solve.flops
    return _Deviations(None, int(min(SAMPLES, max(_FEWEST, affordable))), seconds)


def _seconds(choice: SolverChoice, system: WhitenedSystem) -> float:
    """What the cheapest factorisation takes."""
    machine = Machine.of(system.covariance.device)
    direct = [cost.once for cost in choice.costs if cost.strategy in ("weight space", "function space")]
    return min((work.seconds(machine) for work in direct), default=0.0)
