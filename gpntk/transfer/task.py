"""What the labels of a transfer are, and the model that they ask for: one interface for targets and for classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Self

from torch import Tensor

from gpntk.inference.hyperposterior import Draws, Hyperparameter
from gpntk.io import Checkpoint
from gpntk.likelihoods import Link
from gpntk.transfer.candidates import MeanChoice
from gpntk.transfer.forms import AbstractForm
from gpntk.transfer.prior import Medians

Stage = Literal["screening", "matrix", "features"]
"""What a prior is made for: a comparison of candidates, all labels by their matrix, or all labels by features."""


class Prediction(NamedTuple):
    """A Gaussian prediction: mean `[N*C]`, and a variance `[N*C]` or covariance `[N*C, N*C]`, rows n*C + c."""

    mean: Tensor
    spread: Tensor


class Checks(NamedTuple):
    """What leaving each label out says; see `gpntk.transfer.report.Report`."""

    score: float | None = None
    log_density: float | None = None
    calibration: Mapping[float, float] = {}


class Search(NamedTuple):
    """How hyperparameters are searched for; see `gpntk.inference.hyperposterior.infer`."""

    curvature: bool = True
    tolerance: float | None = None
    checkpoint: Checkpoint | None = None
    label: str = "hyperparameters"


class AbstractModel(ABC):
    """Labels given f ~ GP(m, K_θ), averaged over draws of the hyperparameters θ.

    Args:
        form: K_θ at the inputs.
        hyperparameters: θ.
    """

    def __init__(self, form: AbstractForm, hyperparameters: tuple[Hyperparameter, ...]) -> None:
        self.form, self.hyperparameters = form, hyperparameters
        self.drawn: Draws | None = None

    @property
    def draws(self) -> Draws:
        """The draws in use."""
        assert self.drawn is not None
        return self.drawn

    @abstractmethod
    def fit(self, average: bool, fixed: Mapping[str, float] | None, start: Tensor | None, search: Search) -> Draws:
        """Infer the hyperparameters; see `gpntk.inference.hyperposterior.infer`."""

    @abstractmethod
    def log_likelihood(self, logs: Tensor) -> Tensor:
        """log p(labels | θ), in nats `[]`, differentiable in ``logs`` `[H]`; -inf where it cannot be computed."""

    @abstractmethod
    def set_draws(self, draws: Draws) -> None:
        """Predict with these draws from now on."""

    @abstractmethod
    def noise_variance(self) -> float:
        """σ², the mean over draws; 0 where labels are classes."""

    @abstractmethod
    def log_evidence(self) -> float:
        """Log evidence of the labels at the best draw, in nats; NaN if it is only known by estimates."""

    @abstractmethod
    def effective_parameters(self) -> float | None:
        """tr K (K + D)⁻¹, how many independent numbers the labels have taught; None if unknown."""

    @property
    @abstractmethod
    def note(self) -> str:
        """How it was solved, in words."""


class AbstractTask(ABC):
    """Labels of N inputs x, and what a GP of C outputs takes them for.

    Args:
        x: Inputs `[N, D]`.
        num_outputs: C.
        mean: Prior mean.
        medians: Of the priors.

    Attributes:
        plain_mean: The prior mean without the network.
        screened: Rows on which candidates are compared.
        averages: Whether hyperparameters are averaged over unless the user says else.
        row_per_output: Whether a model needs a row of features per output even where outputs are independent and alike.
    """

    plain_mean: MeanChoice
    screened: int
    averages: bool
    row_per_output: bool = False

    def __init__(self, x: Tensor, num_outputs: int, mean: MeanChoice, medians: Medians) -> None:
        self.x, self.num_outputs, self.medians = x, num_outputs, medians
        self.mean: MeanChoice = mean

    @property
    @abstractmethod
    def units(self) -> Tensor | None:
        """What each output is measured in `[C]`; None for ones."""

    def root(self, count: int) -> Tensor | None:  # noqa: ARG002
        """R of the curvature at the prior mean of the first N = ``count`` inputs `[N, C, q]`; None if all are alike."""
        return None

    # --- for a fit ---------------------------------------------------------------------------------------------

    @abstractmethod
    def shared(self, stage: Stage) -> bool:
        """Whether all outputs are given the same, independent kernel."""

    @abstractmethod
    def flops(self, samples: int) -> float:
        """Operations of one evaluation of the evidence of so many inputs, by exact factorisations."""

    @abstractmethod
    def model(self, form: AbstractForm, rows: Tensor | None = None) -> Any:
        """The `AbstractModel` of these rows' labels; of all for None."""

    @abstractmethod
    def noise_of(self, logs: Tensor) -> float:
        """The noise variance at the hyperparameters of a model, or what stands for it."""

    @abstractmethod
    def log_units(self, rows: Tensor | None = None) -> float:
        """What a log density of the rows' labels gains by being measured in units, in nats."""

    # --- with a fitted model -----------------------------------------------------------------------------------

    @abstractmethod
    def predict(self, model: Any, x: Tensor, covariance: bool, observation_noise: bool) -> Prediction:
        """Posterior at x `[M, D]` of targets; classes have none."""

    @abstractmethod
    def mean_at(self, model: Any, x: Tensor) -> Tensor:
        """Mean of the posterior at x, without variances `[M*C]`."""

    @abstractmethod
    def probabilities(self, model: Any, x: Tensor, link: Link) -> Tensor:
        """Of the classes at x `[M, D]`: `[M, K]`; targets have none."""

    @abstractmethod
    def leave_one_out(self, model: Any) -> Any:
        """What all other labels say of each."""

    @abstractmethod
    def grown(
        self, model: Any, x: Tensor, y: Tensor, known_noise: Tensor | None, weights: Tensor | None
    ) -> tuple[Self, Any]:
        """The same with more labels, hyperparameters as they are, and its model."""

    # --- for reports and files ---------------------------------------------------------------------------------

    @abstractmethod
    def variant(self, rows: Tensor, mean: MeanChoice) -> Self:
        """The task of some rows, under another prior mean."""

    @abstractmethod
    def seems_trained_on(self) -> bool:
        """Whether the prior mean hits the labels so closely that the network has most likely seen them before."""

    @abstractmethod
    def residual(self, rows: Tensor) -> Tensor:
        """What the prior mean leaves unexplained of some rows' labels, in units `[N, C]`."""

    @abstractmethod
    def checks(self, model: Any) -> Checks:
        """What leaving each label out says."""

    @abstractmethod
    def data(self) -> dict[str, Tensor]:
        """Inputs and labels by name, for a file."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What was learned from the labels without a model, by name, for a file."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` gave."""
