"""How the prior of a transfer is chosen and fitted: the same candidates at every number of labels.

1. Candidates are compared by their log evidence on a few hundred labels, by exact factorisations.
2. The chosen one is fitted to all labels. Where exact factorisations of all of them keep to a share of the time budget,
   by these; else its hyperparameters are fitted exactly to a subset, every kernel becomes features, and the variances
   are polished on all labels where that is cheap.
3. The posterior is that of all labels, by the solver that counts as the cheapest.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import product
from typing import NamedTuple, final

import torch
from torch import Tensor

from gpntk.cost import Machine
from gpntk.inference.features import draw
from gpntk.inference.hyperposterior import Draws, Treatment, log_prior
from gpntk.io import Checkpoint
from gpntk.memory import default_budget
from gpntk.transfer.candidates import FACTORISATIONS, STRONG_EVIDENCE, Candidate, Comparison, preferred
from gpntk.transfer.forms import AbstractForm, DenseForm, FeatureForm, Recipe
from gpntk.transfer.prior import PriorBuilder
from gpntk.transfer.task import AbstractModel, AbstractTask, Search
from gpntk.transfer.terms import FeatureTerm, HostTerm

logger = logging.getLogger("gpntk.transfer")

# Evaluations of the evidence until its maximum is found from a good start.
_EVALUATIONS = 20
# Share of the time budget that fitting all labels by exact factorisations may take.
_EXACT_SHARE = 1 / 8
# Labels of the subset to which hyperparameters are fitted exactly where all are too many.
_SUBSET = 1_500
# The same where they are averaged over, which takes several posteriors of the subset.
_AVERAGED = 500
# A gain in nats below which the search for the best hyperparameters of many labels ends.
_TOLERANCE = 0.02
_ROUGH = 0.1
# Variances where labels are mostly signal: of other kernels, of the tangent kernel, which few directions may need much
# of, and of the noise.
_SIGNAL, _TANGENTS, _NOISES = 0.5, (0.5, 30.0, 2000.0), (0.05, 0.5)
# Lengthscales, as a share of their medians, and the noise where labels are all signal.
_SHORT, _LITTLE_NOISE = 0.5, 0.01
# The matrix of all labels is taken where its factorisation costs so much of what features do.
PREFER_MATRIX = 1.0
# Share of a kernel's variance from which on it is said that features miss it.
_TOLERATED = 0.02
# Nyström features of a kernel, at most; the share of memory that they may take; what they may miss of the kernel's
# variance, as a share of the noise's.
_MOST_FEATURES, _FEATURE_MEMORY, _MISSED = 1_500, 0.25, 0.01


class Fit(NamedTuple):
    """A fitted model and how it was come by."""

    model: AbstractModel
    chosen: Candidate
    comparison: Comparison | None
    notes: tuple[str, ...]


@final
class Fitting:
    """Chooses the prior of a task and fits it.

    Args:
        task: The labels.
        builder: Makes priors.
        candidates: What may be chosen.
        treatment: Of hyperparameters.
        fixed: Hyperparameters that are known, by name.
        time_budget: Seconds that the fit may take.
        checkpoint: File in which all searches for hyperparameters are kept, one after another.
    """

    def __init__(
        self,
        task: AbstractTask,
        builder: PriorBuilder,
        candidates: list[Candidate],
        *,
        treatment: Treatment,
        fixed: Mapping[str, float] | None,
        time_budget: float,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self.task, self.builder, self._candidates = task, builder, candidates
        self._treatment, self._fixed, self._time_budget = treatment, fixed, time_budget
        self._some: dict[int, tuple[Tensor, Tensor]] = {}
        self._notes: tuple[str, ...] = ()
        self._others: Comparison | None = None
        self._label = ""

    def run(self) -> Fit:
        """Choose, and fit to all labels."""
        chosen, start, comparison = self.choice
        self._label = f"{chosen}, {len(self.task.x)} labels"
        average = self._treatment == "average" or (self._treatment == "auto" and self.task.averages)
        exact = self._exact_seconds
        if average and exact <= self._time_budget:
            model = self._model(chosen, None)
            draws = model.fit(True, self._fixed, start, self._search())
        elif exact <= _EXACT_SHARE * self._time_budget:
            model, draws = self._exactly(chosen, start)
        else:
            model, draws = self._many(chosen, start)
        model.set_draws(draws)
        notes = (*self._notes, *self._weaker(average, model, exact))
        for note in notes:
            logger.warning(note)
        if comparison is not None and self._others is not None:
            _, evidence, seconds = self._others
            comparison = Comparison(chosen, comparison.log_evidence | evidence, comparison.seconds | seconds)
        return Fit(model, chosen, comparison, notes)

    def against(self, other: Fitting) -> Fitting:
        """The same, or the one around another prior mean where that explains the labels better by far."""
        own, others = self.choice[2], other.choice[2]
        if own is None or others is None:
            return self
        gain = others.log_evidence[str(others.chosen)] - own.log_evidence[str(own.chosen)]
        if gain <= STRONG_EVIDENCE:
            self._others = others
            return self
        other._others = own
        other._notes = (
            f"the prior mean is {other.task.mean}, for around the network's output the labels are less likely by "
            f"{gain:.1f} nats: it may be of another task. mean='network' keeps it.",
        )
        return other

    def _weaker(self, average: bool, model: AbstractModel, exact: float) -> Iterator[str]:
        """In what this model stands back behind the one without a time budget, and what that one would cost."""
        if len(self._candidates) > 1 and self.builder.left_out is not None:
            yield self.builder.left_out
            if self.builder.error is not None:
                yield self.builder.error
        if average and exact > self._time_budget:
            yield (
                f"hyperparameters are at one best value, for an average over them would take about {exact:.3g} s, more "
                f"than time_budget={self._time_budget:g}."
            )
        if model.form.missed > _TOLERATED:
            yield (
                f"a kernel's features miss {model.form.missed:.1%} of its variance, which predictions add to "
                "their variance: more features would exceed time_budget or the memory."
            )

    # --- 1. which kernel ---------------------------------------------------------------------------------------

    @cached_property
    def choice(self) -> tuple[Candidate, Tensor | None, Comparison | None]:
        """The candidate to fit, a start, and what was compared; None where there is nothing to compare with."""
        few = len(self.task.x) > self.task.screened
        # Comparing takes the evidence, a start does not.
        compare = len(self._candidates) > 1 or self._candidates[0].mean != "auto"
        if not (few or compare):
            return self._candidates[0], None, None
        count = self.task.screened
        fits: dict[Candidate, Draws] = {}
        seconds: dict[str, float] = {}
        for number, candidate in enumerate(self._candidates, 1):
            self._label, begun = f"kernel {number} of {len(self._candidates)}, {candidate}", time.perf_counter()
            fits[candidate] = self._from_prior(self._model(candidate, count, screening=True), compare, _TOLERANCE)
            seconds[str(candidate)] = time.perf_counter() - begun
        if not compare:
            (chosen,) = fits
            return chosen, fits[chosen].best, None
        evidence = {candidate: draws.log_evidence for candidate, draws in fits.items()}
        chosen = preferred(evidence, self.builder.new_head)
        shift = self.task.log_units(self._some[count][0] if count in self._some else None)
        named_evidence = {str(candidate): value - shift for candidate, value in evidence.items()}
        return chosen, fits[chosen].best, Comparison(chosen, named_evidence, seconds)

    # --- 2. all labels -----------------------------------------------------------------------------------------

    def _exactly(self, chosen: Candidate, start: Tensor | None) -> tuple[AbstractModel, Draws]:
        """The best hyperparameters for the matrix of all labels."""
        model = self._model(chosen, None)
        if len(self.task.x) <= self.task.screened or self.task.averages:
            if start is None:
                return model, self._from_prior(model, True, None)
            return model, model.fit(False, self._fixed, start, self._search())
        start = self._warmed(chosen, start, self._size)
        return model, self._maximum(model, start, _TOLERANCE)

    def _warmed(self, chosen: Candidate, start: Tensor | None, size: int) -> Tensor | None:
        """A start for a fit to matrices of ``size`` rows: the maximum for half as many, found likewise.

        Every doubling makes an evaluation eight times as expensive, and finds the maximum closer by.
        """
        count = size // 2
        if count // self._outputs <= self.task.screened:
            return start
        start = self._warmed(chosen, start, count)
        model = self._model(chosen, count // self._outputs)
        return self._maximum(model, start, _ROUGH).best

    def _maximum(self, model: AbstractModel, start: Tensor | None, tolerance: float | None) -> Draws:
        """The best hyperparameters from a start on; of few labels also from where they are all signal.

        What fewer labels took for noise, or for a function of fewer inputs, may be more: another maximum, which the
        start would never leave. Maxima a few nats apart are told from each other, so each is found closely.
        """
        few = start is not None and len(model.form.x) * self._outputs <= _SUBSET
        tolerance = _TOLERANCE if few else tolerance
        draws = self._searched(model, start, False, tolerance)
        return self._better(model, draws, False, tolerance, _wiggly(model) or _signals(model)) if few else draws

    def _from_prior(self, model: AbstractModel, curvature: bool, tolerance: float | None) -> Draws:
        """The best hyperparameters without a start; layers' variances also from where labels are mostly signal."""
        draws = self._searched(model, None, curvature, tolerance)
        return self._better(model, draws, curvature, tolerance, _signals(model)) if self.builder.layered else draws

    def _better(
        self, model: AbstractModel, draws: Draws, curvature: bool, tolerance: float | None, starts: list[Tensor]
    ) -> Draws:
        """These draws, or those found from the likeliest of other starts."""
        start = max(starts, key=lambda logs: self._density(model, logs))
        other = self._searched(model, start, curvature, tolerance)
        return max((draws, other), key=lambda found: self._density(model, found.best))

    def _searched(self, model: AbstractModel, start: Tensor | None, curvature: bool, tolerance: float | None) -> Draws:
        return model.fit(False, self._fixed, start, self._search(curvature, tolerance))

    def _search(self, curvature: bool = True, tolerance: float | None = None) -> Search:
        return Search(curvature, tolerance, self._checkpoint, self._label)

    def _density(self, model: AbstractModel, logs: Tensor) -> float:
        with torch.no_grad():
            return float(model.log_likelihood(logs) + log_prior(logs, model.hyperparameters))

    def _many(self, chosen: Candidate, start: Tensor | None) -> tuple[AbstractModel, Draws]:
        """More labels than exact factorisations serve: hyperparameters from a subset, then all labels."""
        if self.task.averages:
            subset = self._model(chosen, max(1, _AVERAGED // self._outputs))
            best = subset.fit(True, self._fixed, start, self._search()).best
        else:
            best = self._warmed(chosen, start, 2 * min(_SUBSET, self._size))
        assert best is not None
        form = self._form(chosen, best)
        model = self.task.model(form)
        if len(best) > len(form.prior.hyperparameters) and "noise" not in (self._fixed or {}):
            # What features miss is noise to them: labels without any would have a system that is singular.
            missed = form.unexplained(best[:-1], self.task.x[: self.task.screened]).mean().cpu()
            best = torch.cat([best[:-1], best[-1:].maximum(missed.clamp_min(1e-300).log())])
        draws = Draws(best.unsqueeze(0), best.new_ones(1), math.nan, best)
        if form.num_features and self._polish_seconds(form) <= self._time_budget / 4:
            draws = self._searched(model, best, False, _TOLERANCE)
        return model, draws

    def _form(self, chosen: Candidate, logs: Tensor) -> AbstractForm:
        """All labels by features, or by their matrix where there are more features than labels."""
        prior = self.builder.build(chosen, self.task.shared("features"))
        x, budget = self.task.x, default_budget(self.task.x.device)
        most = int(min(_MOST_FEATURES, _FEATURE_MEMORY * budget / (8 * len(x)), self._affordable_features))
        missed = _MISSED * self.task.noise_of(logs)
        recipe = Recipe(logs[: len(prior.hyperparameters)], missed, max(1, most), self.task.row_per_output)
        form = FeatureForm(prior, x, recipe)
        fits = 4 * 8 * self._size**2 <= budget
        if fits and self._matrix_flops <= PREFER_MATRIX * self._feature_flops(form):
            return DenseForm(self.builder.build(chosen, self.task.shared("matrix")), x)
        return form

    # --- what it takes -----------------------------------------------------------------------------------------

    @property
    def _outputs(self) -> int:
        return 1 if self.task.shared("matrix") or self.builder.new_head else self.task.num_outputs

    @property
    def _size(self) -> int:
        """Rows of the matrix that an exact fit factorises."""
        return len(self.task.x) * self._outputs

    @property
    def _flops(self) -> float:
        return Machine.of(self.task.x.device).attained

    @property
    def _exact_seconds(self) -> float:
        """A factorisation and an inverse for each evaluation, and passes over matrices beside."""
        return _EVALUATIONS * (self.task.flops(len(self.task.x)) + 500 * self._size**2) / self._flops

    @property
    def _affordable_features(self) -> float:
        """Features of a kernel with which weight space keeps to the time budget: N C F² operations a factorisation."""
        each, solves = (self.task.num_outputs, FACTORISATIONS) if self.task.row_per_output else (1, 1)
        rows = len(self.task.x) * self.task.num_outputs
        return (self._time_budget * self._flops / (rows * solves)) ** 0.5 / each

    @property
    def _matrix_flops(self) -> float:
        """Of a posterior by the matrix of all labels."""
        return self.task.flops(len(self.task.x)) if self.task.row_per_output else self._size**3 / 3

    def _feature_flops(self, form: AbstractForm) -> float:
        """Of the same in weight space."""
        rows = FACTORISATIONS * len(self.task.x) * self.task.num_outputs if self.task.row_per_output else self._size
        return float(rows) * form.num_features**2

    def _polish_seconds(self, form: AbstractForm) -> float:
        features = form.num_features
        return (self._size * features**2 + _EVALUATIONS * features**3) / self._flops

    def _model(self, candidate: Candidate, count: int | None, screening: bool = False) -> AbstractModel:
        """The model of a candidate for so many labels, or for all of them."""
        prior = self.builder.build(candidate, self.task.shared("screening" if screening else "matrix"))
        if count is None or count >= len(self.task.x):
            return self.task.model(DenseForm(prior, self.task.x))
        if count not in self._some:
            rows = draw(len(self.task.x), count, seed=0).to(self.task.x.device)
            # The very same inputs for all that is compared on them: what is computed of them is kept.
            self._some[count] = rows, self.task.x[rows]
        rows, x = self._some[count]
        return self.task.model(DenseForm(prior, x), rows)


def _wiggly(model: AbstractModel) -> list[Tensor]:
    """Hyperparameters where labels are all signal, of a function that varies quickly; [] without lengthscales.

    From short lengthscales and little noise a search lets go of what labels do not show. From long ones it may take the
    rest for noise, and stop.
    """
    if all(h.variance for h in model.hyperparameters):
        return []
    values: list[float] = []
    for term in model.form.prior.terms:
        own = term.hyperparameters
        if isinstance(term, HostTerm):
            values += [1.0 if h.variance else _SHORT * h.median for h in own]
        else:
            values += [h.median for h in own]
    values += [_LITTLE_NOISE] * (len(model.hyperparameters) - len(values))
    return [torch.tensor(values, dtype=torch.float64, device="cpu").log()]


def _signals(model: AbstractModel) -> list[Tensor]:
    """Hyperparameters where labels are mostly signal, that of the tangent kernel of any size."""
    signals = []
    for tangent, noise in product(_TANGENTS, _NOISES):
        values: list[float] = []
        for term in model.form.prior.terms:
            level = tangent / len(term.hyperparameters) if isinstance(term, FeatureTerm) else _SIGNAL
            values += [level if h.variance else h.median for h in term.hyperparameters]
        values += [noise] * (len(model.hyperparameters) - len(values))
        signals.append(torch.tensor(values, dtype=torch.float64, device="cpu").log())
    return signals
