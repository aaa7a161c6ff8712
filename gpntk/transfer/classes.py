"""Classification as the task of a transfer: labels that are classes, given logits or given transformed labels."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Self, final

import torch
from torch import Tensor
from torch.nn import functional

from gpntk.errors import InputError
from gpntk.inference.features import draw
from gpntk.likelihoods import Categorical, Link, dirichlet_targets, probabilities
from gpntk.likelihoods.links import with_reference
from gpntk.likelihoods.targets import check_labels
from gpntk.transfer.candidates import FACTORISATIONS, MeanChoice
from gpntk.transfer.forms import AbstractForm, DenseForm
from gpntk.transfer.gaussian import GaussianModel, Labels, joined
from gpntk.transfer.laplace import LaplaceModel
from gpntk.transfer.prior import LOGITS, RESIDUAL_LOGITS
from gpntk.transfer.task import AbstractTask, Checks, Prediction, Stage

# Logits up to which the tangent kernel between different outputs is kept; beyond, they share its mean over outputs.
FULL_LIMIT = 300
_SCREENED = 100
# Bins of the most probable class's probability, of which a report gives frequencies.
_BINS = 10
# Inputs whose evidence sets the hyperparameters of Laplace's method; more of them hardly move it.
_EVIDENCE_ROWS = 300
# Nats a label below which, at so many labels, a network that is no less sure of them has seen them before.
_INTERPOLATED, _ENOUGH = 0.005, 100
# Inputs up to which Dirichlet regression averages, which needs C factorisations kept for every draw.
_AVERAGED_DIRICHLET = 300


class AbstractClassTask(AbstractTask, ABC):
    """Classes of inputs, given K classes and a prior mean for C logits.

    Args:
        x: Inputs `[N, D]`.
        labels: Classes `[N]`, integers from 0 to K - 1.
        num_classes: K.
        num_logits: C: K, or one for two classes.
        mean: Prior mean of the logits.
        offset: The network's outputs `[N, C]` at given inputs.
        weights: Of the labels `[N]`, see `DirichletTask`; None for ones.
    """

    plain_mean = "zero"
    screened = _SCREENED
    most_averaged: float
    """Inputs up to which hyperparameters are averaged over."""

    def __init__(
        self,
        x: Tensor,
        labels: Tensor,
        *,
        num_classes: int,
        num_logits: int,
        mean: MeanChoice,
        offset: Callable[[Tensor], Tensor],
        weights: Tensor | None = None,
    ) -> None:
        medians = RESIDUAL_LOGITS if mean == "network" else LOGITS
        check_labels(labels, num_classes)
        super().__init__(x, self.outputs_of(num_classes, num_logits), mean, medians)
        self.labels, self.num_classes, self.num_logits, self._network_outputs = labels, num_classes, num_logits, offset
        self.weights = weights
        self.reference, self.averages = len(x), len(x) <= self.most_averaged

    @property
    def units(self) -> None:
        return None

    def log_units(self, rows: Tensor | None = None) -> float:  # noqa: ARG002
        return 0.0

    def offset(self, x: Tensor) -> Tensor:
        """The prior mean of the logits `[N, C]`."""
        if self.mean == "network":
            return self._network_outputs(x)
        return torch.zeros(x.shape[0], self.num_logits, dtype=x.dtype, device=x.device)

    def noise_of(self, logs: Tensor) -> float:  # noqa: ARG002
        # Logits matter to about one.
        return 1.0

    def predict(self, model: Any, x: Tensor, covariance: bool, observation_noise: bool) -> Prediction:  # noqa: ARG002
        raise InputError("a likelihood of classes has no targets: call probabilities instead of predict.")

    def mean_at(self, model: Any, x: Tensor) -> Tensor:
        return self.predict(model, x, False, False).mean

    def grown(
        self, model: Any, x: Tensor, y: Tensor, known_noise: Tensor | None, weights: Tensor | None
    ) -> tuple[Self, Any]:
        if known_noise is not None:
            raise InputError("known_noise is for targets: labels that are classes have none.")
        check_labels(y, self.num_classes)
        grown = copy.copy(self)
        grown.x, grown.labels = torch.cat([self.x, x]), torch.cat([self.labels, y])
        grown.weights = joined((self.x[:, 0], self.weights), (x[:, 0], weights), fill=1.0)
        return grown, self.grown_model(model, x, y, weights)

    def variant(self, rows: Tensor, mean: MeanChoice) -> AbstractClassTask:
        # Evidences are compared by one method; labels with weights have the other alone.
        kind = LaplaceTask if self.weights is None else DirichletTask
        return kind(
            self.x[rows],
            self.labels[rows],
            num_classes=self.num_classes,
            num_logits=self.num_logits,
            mean=mean,
            offset=self._network_outputs,
            weights=None if self.weights is None else self.weights[rows],
        )

    def seems_trained_on(self) -> bool:
        if self.mean != "network" or len(self.x) < _ENOUGH:
            return False
        logits = with_reference(self.offset(self.x))
        return functional.cross_entropy(logits, self.labels).item() < _INTERPOLATED

    def residual(self, rows: Tensor) -> Tensor:
        latent = self.offset(self.x[rows])
        expected = probabilities(latent, torch.zeros_like(latent).diag_embed())
        return functional.one_hot(self.labels[rows], self.num_classes) - expected

    def checks(self, model: Any) -> Checks:
        left_out = self.leave_one_out(model)
        top, classes = left_out.max(-1)
        right = (classes == self.labels).double()
        own = left_out.gather(1, self.labels.unsqueeze(-1)).clamp_min(torch.finfo(left_out.dtype).tiny)
        bins = (top * _BINS).long().clamp_max(_BINS - 1)
        calibration = {
            top[bins == index].mean().item(): right[bins == index].mean().item() for index in bins.unique().tolist()
        }
        return Checks(right.mean().item(), own.log().mean().item(), calibration)

    def data(self) -> dict[str, Tensor]:
        data = {"x": self.x, "labels": self.labels}
        return data if self.weights is None else {**data, "weights": self.weights}

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.reference = int(state["reference"])

    @staticmethod
    @abstractmethod
    def outputs_of(num_classes: int, num_logits: int) -> int:
        """Number of outputs C that the GP has."""

    @abstractmethod
    def grown_model(self, model: Any, x: Tensor, labels: Tensor, weights: Tensor | None) -> Any:
        """The model given more labels as well, hyperparameters as they are."""


@final
class LaplaceTask(AbstractClassTask):
    """Softmax or Bernoulli labels given logits f ~ GP(f(x; w*), K): Newton's method to the mode, and a Gaussian."""

    most_averaged = math.inf
    row_per_output = True

    @staticmethod
    def outputs_of(num_classes: int, num_logits: int) -> int:  # noqa: ARG004
        return num_logits

    def flops(self, samples: int) -> float:
        # Each is C + 1 factorisations of N rows, or one of N (C - 1).
        size, outputs = float(samples), self.num_outputs
        return FACTORISATIONS * (
            size**3 * (outputs + 1) if self.shared("matrix") else (size * max(1, outputs - 1)) ** 3 / 3
        )

    def shared(self, stage: Stage) -> bool:
        # Features are the cheaper the fewer they are: those of all outputs together.
        return stage == "screening" or (stage == "matrix" and self.reference * self.num_outputs > FULL_LIMIT)

    def model(self, form: AbstractForm, rows: Tensor | None = None) -> LaplaceModel:
        _without(self.weights)
        x, labels = (self.x, self.labels) if rows is None else (self.x[rows], self.labels[rows])
        subset = None
        if len(x) > _EVIDENCE_ROWS:
            some = draw(len(x), _EVIDENCE_ROWS, seed=0).to(x.device)
            form_of_some = DenseForm(form.prior, x[some])
            subset = LaplaceModel(form_of_some, labels[some], self.offset(x[some]))
        return LaplaceModel(form, labels, self.offset(x), subset)

    def root(self, count: int) -> Tensor | None:
        if self.mean != "network":
            return None
        return Categorical().root(self.offset(self.x[:count]), self.labels[:count])

    def probabilities(self, model: LaplaceModel, x: Tensor, link: Link) -> Tensor:
        return model.predict(x, self.offset(x), link)

    def leave_one_out(self, model: LaplaceModel) -> Tensor:
        return model.leave_one_out()

    def grown_model(self, model: LaplaceModel, x: Tensor, labels: Tensor, weights: Tensor | None) -> LaplaceModel:
        _without(weights)
        return model.condition_on(x, labels, self.offset(x))


@final
class DirichletTask(AbstractClassTask):
    """Independent GPs for the logarithms of the Gamma variables behind each class's probability.

    A weight divides the variances of a label's noise: its log likelihood times the weight.

    References:
        Milios et al. (2018), Dirichlet-based Gaussian Processes for Large-scale Calibrated Classification,
        https://arxiv.org/abs/1805.10915.
    """

    most_averaged = _AVERAGED_DIRICHLET

    @staticmethod
    def outputs_of(num_classes: int, num_logits: int) -> int:  # noqa: ARG004
        return num_classes

    def flops(self, samples: int) -> float:
        return self.num_classes * float(samples) ** 3

    def shared(self, stage: Stage) -> bool:
        return stage != "features"

    def model(self, form: AbstractForm, rows: Tensor | None = None) -> GaussianModel:
        x, labels = (self.x, self.labels) if rows is None else (self.x[rows], self.labels[rows])
        weights = self.weights if rows is None or self.weights is None else self.weights[rows]
        return GaussianModel(form, self._transformed(x, labels, weights), None)

    def probabilities(self, model: GaussianModel, x: Tensor, link: Link) -> Tensor:
        return self._of(model.predict(x), x, link)

    def leave_one_out(self, model: GaussianModel) -> Tensor:
        left_out = model.leave_one_out()
        # The variance of a transformed label is that of the latent value and its noise.
        assert model.labels.known is not None
        latent = (left_out.spread - model.labels.known.reshape(-1)).clamp_min(0)
        return self._of(Prediction(left_out.mean, latent), model.form.x, "probit")

    def grown_model(self, model: GaussianModel, x: Tensor, labels: Tensor, weights: Tensor | None) -> GaussianModel:
        return model.condition_on(x, self._transformed(x, labels, weights))

    def _transformed(self, x: Tensor, labels: Tensor, weights: Tensor | None) -> Labels:
        targets, noise = dirichlet_targets(labels, self.num_classes, dtype=x.dtype)
        noise = noise if weights is None else noise / weights.unsqueeze(-1)
        return Labels(targets - self._mean(x), known=noise)

    def _mean(self, x: Tensor) -> Tensor:
        """Prior mean `[N, K]`: log probabilities, those of all classes alike for logits that are zero."""
        # What a class that has not been seen is given: no prior mean lies below it.
        unseen = torch.zeros(1, dtype=torch.long, device=x.device)
        floor = dirichlet_targets(unseen, max(2, self.num_classes), dtype=x.dtype).targets.min()
        return with_reference(self.offset(x)).log_softmax(-1).clamp_min(floor)

    def _of(self, latent: Prediction, x: Tensor, link: Link) -> Tensor:
        mean = latent.mean.unflatten(0, (-1, self.num_classes)) + self._mean(x)
        return probabilities(mean, latent.spread.unflatten(0, (-1, self.num_classes)).diag_embed(), link)


def _without(weights: Tensor | None) -> None:
    if weights is not None:
        raise InputError(
            "weights of labels do not go into Laplace's method: take likelihood='dirichlet', which has them."
        )
