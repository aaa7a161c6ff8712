"""Classification with a sum of components by Laplace's approximation, for up to a few thousand labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from gpntk.errors import SolveError
from gpntk.inference.hyperposterior import NEGLIGIBLE, Draws, infer, log_prior
from gpntk.likelihoods import Latent, Link, probabilities
from gpntk.models.old_laplace import LaplacePosterior
from gpntk.transfer.components import SumOfComponents

# From a fiftieth of the variances of largest evidence to three times these.
_FACTORS = torch.logspace(-1.75, 0.5, 7, dtype=torch.float64)

# Bytes that posteriors of several draws may take.
_MEMORY = 2 * 2**30


@final
class DenseLaplace:
    """Class labels given logits f ~ GP(m(x), K_θ), averaged over draws of the hyperparameters θ.

    Args:
        prior: K_θ.
        x: Inputs `[N, D]`.
        labels: Classes `[N]`, integers from 0; one logit stands for two classes.
        offset: m `[N, C]`.
        parts: Those of x with itself, if they are known already.
    """

    def __init__(
        self,
        prior: SumOfComponents,
        x: Tensor,
        labels: Tensor,
        offset: Tensor,
        parts: tuple[Tensor, ...] | None = None,
    ) -> None:
        self.prior, self.x, self.labels, self._offset = prior, x, labels, offset
        self.hyperparameters = prior.hyperparameters
        self._parts = prior.parts(x, x) if parts is None else parts
        self._start: Tensor | None = None
        self.draws: Draws | None = None
        self._posteriors: list[LaplacePosterior] = []

    def fit(
        self,
        average: bool,
        fixed: Mapping[str, float] | None = None,
        start: Tensor | None = None,
        subset: DenseLaplace | None = None,
    ) -> Draws:
        """Infer the hyperparameters: those of largest evidence, and to average, their variances times common factors.

        The evidence tells terms and lengthscales apart, but tends to too large variances in all: a network that gets
        nearly all labels right is surer than the Gaussian says. The factors are weighted by the probability of each
        label given the others. With a ``subset`` of the data, the evidence is that of the subset.
        """
        draws = infer((self if subset is None else subset).log_likelihood, self.hyperparameters, False, start, fixed)
        if not average:
            self.set_draws(draws)
            return draws
        variances = torch.tensor(
            [h.variance and h.name not in (fixed or {}) for h in self.hyperparameters], device="cpu"
        )
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
        self.draws = draws._replace(logs=chosen, weights=weights, best=chosen[weights.argmax()])
        self._posteriors = list(kept.values())
        return self.draws

    def set_draws(self, draws: Draws) -> None:
        """Predict with these draws from now on."""
        self.draws, self._posteriors = draws, self._all_posteriors(draws.logs)

    @property
    def best_evidence(self) -> float:
        """Laplace's approximation of log p(labels | θ) at the draw of largest weight, in nats."""
        return self._posteriors[int(self._draws().weights.argmax())].log_evidence.item()

    def log_likelihood(self, logs: Tensor) -> Tensor:
        """Laplace's approximation of log p(labels | θ), in nats `[]`; -inf where the mode is not found."""
        try:
            posterior = self._posterior(logs, self._start)
        except SolveError:
            return torch.tensor(-math.inf, dtype=torch.float64, device="cpu")
        self._start = posterior.dual.detach()
        return posterior.log_evidence.double().cpu()

    def predict(self, x: Tensor, offset: Tensor, link: Link) -> Tensor:
        """Probabilities of the classes at x `[M, D]`, averaged over draws `[M, K]`; ``offset`` is m there."""
        return self._mixed([probabilities(*latent, link) for latent in self.latents(x, offset)])

    def latents(self, x: Tensor, offset: Tensor) -> list[Latent]:
        """Gaussian logits at x `[M, D]` under each draw."""
        parts, own = self.prior.parts(x, self.x), self.prior.blocks(x)
        latents = []
        for logs, posterior in zip(self._draws().logs, self._posteriors, strict=True):
            cross, prior = (self.prior.covariance(logs, those) for those in (parts, own))
            # One logit's kernel is the same either way, and the posterior takes it for the full one.
            prior = prior.flatten() if self.prior.shared and self.prior.num_outputs > 1 else prior
            latents.append(posterior.predict(cross, prior, offset))
        return latents

    def leave_one_out(self) -> Tensor:
        """Probabilities of the classes of each input given the other labels `[N, K]`, in closed form."""
        return self._mixed([probabilities(*posterior.leave_one_out(), "probit") for posterior in self._posteriors])

    def condition_on(self, x: Tensor, labels: Tensor, offset: Tensor) -> DenseLaplace:
        """The same with more labels, hyperparameters as they are; Newton's method starts from the old mode."""
        parts = self.prior.grown(self._parts, self.x, x)
        rows = [torch.cat(pair) for pair in ((self.x, x), (self.labels, labels), (self._offset, offset))]
        grown = DenseLaplace(self.prior, rows[0], rows[1], rows[2], parts)
        grown._start = torch.cat([self._posteriors[0].dual, torch.zeros_like(offset)])
        grown.set_draws(self._draws())
        return grown

    # --- private -----------------------------------------------------------------------------------------------

    def _draws(self) -> Draws:
        assert self.draws is not None
        return self.draws

    def _all_posteriors(self, logs: Tensor) -> list[LaplacePosterior]:
        return [self._next_posterior(point) for point in logs]

    @torch.no_grad()
    def _next_posterior(self, logs: Tensor) -> LaplacePosterior:
        """That of one draw, its mode found from the one before."""
        posterior = self._posterior(logs, self._start)
        self._start = posterior.dual
        return posterior

    def _most_posteriors(self) -> int:
        """How many fit in the memory allowed; each keeps about C + 2 matrices `[N, N]`, or two `[N*C, N*C]`."""
        rows, outputs = self._offset.shape
        matrices = (outputs + 2) * rows**2 if self.prior.shared else 2 * (rows * outputs) ** 2
        return max(1, _MEMORY // (matrices * self._offset.element_size()))

    def _left_out(self, posterior: LaplacePosterior) -> float:
        """Sum of the log probabilities of each label given all the others."""
        there = probabilities(*posterior.leave_one_out(), "probit")
        return there.gather(1, self.labels.unsqueeze(-1)).clamp_min(1e-300).log().sum().item()

    def _posterior(self, logs: Tensor, start: Tensor | None) -> LaplacePosterior:
        return LaplacePosterior(self._offset, self.prior.covariance(logs, self._parts), self.labels, start)

    def _mixed(self, values: Sequence[Tensor]) -> Tensor:
        return torch.einsum("s,s...->...", self._draws().weights.to(values[0]), torch.stack(list(values)))
