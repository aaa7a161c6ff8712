"""Classification as regression on transformed labels, in closed form given the hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from gpntk.inference.hyperposterior import Draws
from gpntk.likelihoods import Link, dirichlet_targets, probabilities
from gpntk.likelihoods.links import with_reference
from gpntk.transfer.components import SumOfComponents
from gpntk.transfer.dense import DenseGP, Prediction

# The targets' noise is known; a learned one only has to be too small to matter.
_NEGLIGIBLE_NOISE = 1e-6


@final
class DenseDirichlet:
    """Independent GPs for the logarithms of the Gamma variables behind each class's probability.

    Args:
        prior: Their covariance, shared.
        x: Inputs `[N, D]`.
        labels: Classes `[N]`, integers from 0.
        offset: Prior logits `[N, C]`; one logit stands for two classes.
        num_classes: K.

    References:
        Milios et al. (2018), Dirichlet-based Gaussian Processes for Large-scale Calibrated Classification,
        https://arxiv.org/abs/1805.10915.
    """

    def __init__(self, prior: SumOfComponents, x: Tensor, labels: Tensor, offset: Tensor, num_classes: int) -> None:
        self._classes = num_classes
        # What a class that has not been seen is given: no prior mean lies below it.
        self._floor = dirichlet_targets(labels, num_classes, dtype=x.dtype).targets.min()
        targets, noise = self._targets(labels, offset)
        unused = (_NEGLIGIBLE_NOISE, 1.0)
        self._gp = DenseGP(prior, x, targets, unused, known_noise=noise)
        self.hyperparameters = prior.hyperparameters

    @property
    def draws(self) -> Draws | None:
        """Draws of the prior's hyperparameters, and the noise as the last."""
        return self._gp.draws

    def fit(self, average: bool, fixed: Mapping[str, float] | None = None, start: Tensor | None = None) -> Draws:
        """Infer the hyperparameters; see `gpntk.inference.hyperposterior.infer`."""
        return self._gp.fit(average, {**(fixed or {}), "noise": _NEGLIGIBLE_NOISE}, start)

    def set_draws(self, draws: Draws) -> None:
        """Predict with these draws from now on."""
        self._gp.set_draws(draws)

    @property
    def best_evidence(self) -> float:
        """Log density of the transformed labels at the draw of largest weight, in nats."""
        assert self._gp.draws is not None
        with torch.no_grad():
            return self._gp.log_likelihood(self._gp.draws.best).item()

    def predict(self, x: Tensor, offset: Tensor, link: Link) -> Tensor:
        """Probabilities of the classes at x `[M, D]`: `[M, K]`."""
        return self._probabilities(self._gp.predict(x), offset, link)

    def leave_one_out(self) -> Tensor:
        """Probabilities of the classes of each input given the other labels `[N, K]`."""
        left_out = self._gp.leave_one_out()
        # The variance of the label is that of the latent value and its noise.
        noise = self._gp.known_noise.reshape(-1)
        latent = Prediction(left_out.mean, (left_out.spread - noise).clamp_min(0))
        return self._probabilities(latent, self._offset, "probit")

    def condition_on(self, x: Tensor, labels: Tensor, offset: Tensor) -> DenseDirichlet:
        """The same with more labels, hyperparameters as they are."""
        grown = DenseDirichlet.__new__(DenseDirichlet)
        grown.__dict__ = {**self.__dict__}
        old = self._offset
        targets, noise = grown._targets(labels, offset)
        grown._offset = torch.cat([old, offset])
        grown._gp = self._gp.condition_on(x, targets, known_noise=noise)
        return grown

    def _targets(self, labels: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        self._offset = offset
        targets, noise = dirichlet_targets(labels, self._classes, dtype=offset.dtype)
        return targets - self._mean(offset), noise

    def _mean(self, offset: Tensor) -> Tensor:
        """Prior mean `[N, K]`: log probabilities, those of all classes alike for logits that are zero."""
        return with_reference(offset).log_softmax(-1).clamp_min(self._floor)

    def _probabilities(self, latent: Prediction, offset: Tensor, link: Link) -> Tensor:
        mean = latent.mean.unflatten(0, (-1, self._classes)) + self._mean(offset)
        return probabilities(mean, latent.spread.unflatten(0, (-1, self._classes)).diag_embed(), link)
