"""Class labels given logits, by Laplace's approximation, given a prior that depends on hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from gpntk.errors import SolveError
from gpntk.inference.hyperposterior import NEGLIGIBLE, Draws, infer, log_prior
from gpntk.likelihoods import Latent, Link, probabilities
from gpntk.models import LaplacePosterior
from gpntk.transfer.forms import AbstractForm
from gpntk.transfer.task import AbstractModel, Search

# From a fiftieth of the variances of largest evidence to three times these.
_FACTORS = torch.logspace(-1.75, 0.5, 7, dtype=torch.float64)
# Bytes that posteriors of several draws may take.
_MEMORY = 2 * 2**30


@final
class LaplaceModel(AbstractModel):
    """Class labels given logits f ~ GP(m(x), K_θ), averaged over draws of the hyperparameters θ.

    Args:
        form: K_θ at the inputs.
        labels: Classes `[N]`, integers from 0; one logit stands for two classes.
        offset: m `[N, C]`.
        subset: The model of some of the data, whose evidence sets the hyperparameters; None for this one.
    """

    def __init__(self, form: AbstractForm, labels: Tensor, offset: Tensor, subset: LaplaceModel | None = None) -> None:
        super().__init__(form, form.hyperparameters)
        self.labels, self._offset, self._subset = labels, offset, subset
        self._start: Tensor | None = None
        self._posteriors: list[LaplacePosterior] = []

    # --- hyperparameters ---------------------------------------------------------------------------------------

    def fit(self, average: bool, fixed: Mapping[str, float] | None, start: Tensor | None, search: Search) -> Draws:
        """Those of largest evidence; and to average, their variances times common factors.

        The evidence tells terms and lengthscales apart, but tends to too large variances in all: a network that gets
        nearly all labels right is surer than the Gaussian says. The factors are weighted by the probability of each
        label given the others.
        """
        evidence = (self if self._subset is None else self._subset).log_likelihood
        draws = infer(evidence, self.hyperparameters, False, start, fixed, **search._asdict())
        if not average:
            return draws
        names = fixed or {}
        variances = torch.tensor([h.variance and h.name not in names for h in self.hyperparameters], device="cpu")
        logs = draws.best + _FACTORS.log().unsqueeze(-1) * variances
        priors = [log_prior(point, self.hyperparameters).item() for point in logs]
        densities: list[float] = []
        kept: dict[int, LaplacePosterior] = {}
        for index, point in enumerate(logs):
            kept[index] = self._next_posterior(point)
            densities.append(self._left_out(kept[index]) + priors[index])
            best = max(densities)
            # In the order of their weights, the least first; only so many fit.
            for other in sorted(kept, key=densities.__getitem__):
                if densities[other] < best + math.log(NEGLIGIBLE) or len(kept) > self._most_posteriors():
                    del kept[other]
        weights = torch.tensor([densities[index] for index in kept], dtype=logs.dtype, device="cpu").softmax(0)
        chosen = logs[list(kept)]
        self.drawn = draws._replace(logs=chosen, weights=weights, best=chosen[weights.argmax()])
        self._posteriors = list(kept.values())
        return self.drawn

    def set_draws(self, draws: Draws) -> None:
        if self.drawn is not draws:  # which `fit` has prepared already
            self.drawn, self._posteriors = draws, [self._next_posterior(point) for point in draws.logs]

    def log_likelihood(self, logs: Tensor) -> Tensor:
        try:
            posterior = self._posterior(logs, self._start, graph=True)
        except SolveError:
            return torch.tensor(-math.inf, dtype=torch.float64, device="cpu")
        self._start = posterior.dual.detach()
        return posterior.log_evidence.double().cpu()

    def log_evidence(self) -> float:
        return self._posteriors[int(self.draws.weights.argmax())].log_evidence.item()

    def noise_variance(self) -> float:
        return 0.0

    def effective_parameters(self) -> float:
        counts = [posterior.effective_parameters() for posterior in self._posteriors]
        return float(self.draws.weights @ torch.tensor(counts, dtype=torch.float64, device="cpu"))

    @property
    def note(self) -> str:
        return f"Laplace, {self._posteriors[0].choice.solver}, {self.form.note}"

    # --- predictions -------------------------------------------------------------------------------------------

    def predict(self, x: Tensor, offset: Tensor, link: Link) -> Tensor:
        """Probabilities of the classes at x `[M, D]`, averaged over draws `[M, K]`; ``offset`` is m there."""
        return self._mixed([probabilities(*latent, link) for latent in self.latents(x, offset)])

    @torch.no_grad()
    def latents(self, x: Tensor, offset: Tensor) -> list[Latent]:
        """Gaussian logits at x `[M, D]` under each draw."""
        latents = []
        for logs, posterior in zip(self.draws.logs, self._posteriors, strict=True):
            mean, covariance = posterior.latent(x, offset.to(posterior.dual))
            left = self.form.unexplained(logs, x).reshape(len(x), -1).expand(-1, mean.shape[1])
            latents.append(Latent(mean, covariance + left.diag_embed()))
        return latents

    def leave_one_out(self) -> Tensor:
        """Probabilities of the classes of each input given the other labels `[N, K]`, in closed form."""
        return self._mixed([probabilities(*posterior.leave_one_out(), "probit") for posterior in self._posteriors])

    def condition_on(self, x: Tensor, labels: Tensor, offset: Tensor) -> LaplaceModel:
        """The same with more labels, hyperparameters as they are; Newton's method starts from the old mode."""
        rows = [torch.cat(pair) for pair in ((self.labels, labels), (self._offset, offset))]
        grown = LaplaceModel(self.form.extended(x), rows[0], rows[1])
        grown.drawn = self.drawn
        grown._posteriors = [
            posterior.condition_on(x, labels, offset.to(posterior.dual)) for posterior in self._posteriors
        ]
        return grown

    # --- private -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _next_posterior(self, logs: Tensor) -> LaplacePosterior:
        """That of one draw, its mode found from the one before."""
        posterior = self._posterior(logs, self._start, graph=False)
        self._start = posterior.dual
        return posterior

    def _most_posteriors(self) -> int:
        """How many fit in the memory allowed; each keeps about C + 2 matrices `[N, N]`, or two `[N*C, N*C]`."""
        rows, outputs = self._offset.shape
        if self.form.num_features:
            return max(1, _MEMORY // (16 * self.form.num_features**2))
        matrices = (outputs + 2) * rows**2 if self.form.shared else 2 * (rows * outputs) ** 2
        return max(1, _MEMORY // (matrices * 8))

    def _left_out(self, posterior: LaplacePosterior) -> float:
        """Sum of the log probabilities of each label given all the others."""
        there = probabilities(*posterior.leave_one_out(), "probit")
        return there.gather(1, self.labels.unsqueeze(-1)).clamp_min(1e-300).log().sum().item()

    def _posterior(self, logs: Tensor, start: Tensor | None, graph: bool) -> LaplacePosterior:
        covariance = self.form.differentiable(logs) if graph else self.form.covariance(logs)
        return LaplacePosterior(covariance, self.labels, self._offset, start=start)

    def _mixed(self, values: list[Tensor]) -> Tensor:
        return torch.einsum("s,s...->...", self.draws.weights.to(values[0]), torch.stack(values))
