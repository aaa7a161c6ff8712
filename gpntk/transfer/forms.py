"""The prior at the data, in one of two forms: exactly, as a matrix, or by features, for any number of rows."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple, final

import torch
from torch import Tensor

from gpntk.inference import DenseCovariance, FeatureCovariance, Features
from gpntk.inference.covariance import AbstractCovariance
from gpntk.inference.features import exact_dtype
from gpntk.inference.hyperposterior import Hyperparameter
from gpntk.kernels import AbstractFeatureKernel
from gpntk.kernels.nystrom import NystromFeatures, nystrom_features, stacked
from gpntk.transfer.terms import AbstractTerm, FeatureTerm, SumOfTerms


class AbstractForm(ABC):
    """K_θ at the data, as a function of the hyperparameters θ.

    Args:
        prior: The prior covariance.
        x: Inputs `[N, D]`.

    Attributes:
        shared: Whether there is one row per input for all outputs, or one for each.
        free: Which hyperparameters can change.
        recipe: How its features are made; None for a matrix.
        num_features: Number of features F; 0 for a matrix.
        missed: The largest share of a kernel's variance that its features miss; 0 for a matrix.
        note: What the form is, in words.
    """

    free: Sequence[bool]
    recipe: Recipe | None = None
    num_features: int = 0
    missed: float = 0.0
    note: str = "exact kernel matrix"

    def __init__(self, prior: SumOfTerms, x: Tensor) -> None:
        self.prior, self.x = prior, x
        self.shared, self.num_outputs = prior.shared, prior.num_outputs
        self.hyperparameters: tuple[Hyperparameter, ...] = prior.hyperparameters
        self.free = [True] * len(self.hyperparameters)

    @abstractmethod
    def covariance(self, logs: Tensor) -> AbstractCovariance:
        """K_θ for posteriors, at the hyperparameters whose logarithms are ``logs`` `[H]`."""

    @abstractmethod
    def differentiable(self, logs: Tensor) -> AbstractCovariance | Tensor:
        """K_θ with a graph to ``logs``, for the evidence."""

    @abstractmethod
    def unexplained(self, logs: Tensor, x: Tensor) -> Tensor:
        """Prior variances at x `[T, D]` that the form misses: `[T*C]`, or `[T]` if it is shared."""

    @abstractmethod
    def extended(self, x: Tensor) -> AbstractForm:
        """The same at the data and, after them, at x `[T, D]`."""


@final
class DenseForm(AbstractForm):
    """The prior as the kernel matrix of all labels `[n, n]`, exactly.

    Args:
        prior: The prior covariance.
        x: Inputs `[N, D]`.
    """

    def covariance(self, logs: Tensor) -> DenseCovariance:
        with torch.no_grad():
            gram = self.prior.matrix(logs, self.x, self.x)
        rows = 1 if self.shared else self.num_outputs
        return DenseCovariance(partial(self.prior.matrix, logs), self.x, rows, gram)

    def differentiable(self, logs: Tensor) -> Tensor:
        return self.prior.matrix(logs, self.x, self.x).to(exact_dtype(self.x.device))

    def unexplained(self, logs: Tensor, x: Tensor) -> Tensor:  # noqa: ARG002
        return x.new_zeros(len(x) * (1 if self.shared else self.num_outputs))

    def extended(self, x: Tensor) -> DenseForm:
        return DenseForm(self.prior, torch.cat([self.x, x]))


class Recipe(NamedTuple):
    """What the features of a prior are made by."""

    logs: Tensor
    """Hyperparameters that the Nyström features are made for `[H]`."""
    missed: float
    """Prior variance that the features of a kernel may miss."""
    most: int
    """Nyström features of a kernel, at most."""
    row_per_output: bool = False
    """Whether there are rows for every output even where outputs are independent and alike."""

    def state(self) -> dict[str, Tensor]:
        """By name, for a file."""
        return {f"form.{name}": torch.as_tensor(value, device="cpu") for name, value in self._asdict().items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Recipe | None:
        """What `state` gave; None if it was that of a matrix."""
        if "form.logs" not in state:
            return None
        missed, most, per_output = (state[f"form.{name}"].item() for name in cls._fields[1:])
        return cls(state["form.logs"], float(missed), int(most), bool(per_output))


@final
class FeatureForm(AbstractForm):
    """K_θ = Φ S Φᵀ: features of the network, and Nyström features of every other kernel, side by side.

    The lengths of the latter stay where they are; the variances of all terms may change. What Nyström features miss of
    the prior variance at new inputs is known exactly, and belongs to the predictive variance.

    Args:
        prior: The prior covariance.
        x: Inputs `[N, D]`.
        recipe: How the features are made.
        reference: They are made of so many first rows; None for all.

    References:
        Quiñonero-Candela and Rasmussen (2005), A Unifying View of Sparse Approximate Gaussian Process Regression.
    """

    def __init__(self, prior: SumOfTerms, x: Tensor, recipe: Recipe, reference: int | None = None) -> None:
        super().__init__(prior, x)
        self.recipe, self._then = recipe, recipe.logs.detach()
        self.shared = prior.shared and not recipe.row_per_output
        rows = x[:reference]
        self._sources: list[AbstractFeatureKernel | NystromFeatures] = [
            term.features if isinstance(term, FeatureTerm) else _features_of(term, own, rows, recipe)
            for term, own in zip(prior.terms, prior.split(self._then), strict=True)
        ]
        grouped = [isinstance(term, FeatureTerm) and term.grouped for term in prior.terms]
        self._backend = stacked(self._sources, grouped, 1 if self.shared else prior.num_outputs, x[:1])
        self.features = Features(self._backend, x)
        self.free = [free for term in prior.terms for free in _free(term)]
        self.num_features = self._backend.num_features
        self.missed = max((s.unexplained for s in self._sources if isinstance(s, NystromFeatures)), default=0.0)
        notes = map(_note, prior.terms, self._sources)
        self.note = " + ".join(note for note in notes if note) + " features"

    def covariance(self, logs: Tensor) -> FeatureCovariance:
        return FeatureCovariance(self.features, self._variances(logs))

    def differentiable(self, logs: Tensor) -> FeatureCovariance:
        return self.covariance(logs)

    def unexplained(self, logs: Tensor, x: Tensor) -> Tensor:
        rows = x.new_zeros(len(x), dtype=exact_dtype(x.device))
        made = self.prior.split(self._then)
        for term, source, then, ratio in zip(self.prior.terms, self._sources, made, self._ratios(logs), strict=True):
            if isinstance(source, NystromFeatures):
                left = term.diagonal(then, x) - source(x).square().sum(-1)
                rows = rows + ratio * left.clamp_min(0)
        return rows if self.shared else rows.repeat_interleave(self.num_outputs)

    def extended(self, x: Tensor) -> FeatureForm:
        grown = copy.copy(self)
        grown.x = torch.cat([self.x, x])
        grown.features = Features(self._backend, grown.x)
        return grown

    def _variances(self, logs: Tensor) -> Tensor:
        """Prior variances of all groups of features `[G]`."""
        parts = [
            term.variances(own) if isinstance(term, FeatureTerm) else ratio.reshape(1)
            for term, own, ratio in zip(self.prior.terms, self.prior.split(logs), self._ratios(logs), strict=True)
        ]
        return torch.cat(parts)

    def _ratios(self, logs: Tensor) -> list[Tensor]:
        """The variance of each term over the one that its features are made for."""
        now, then = self.prior.split(logs), self.prior.split(self._then)
        return [
            torch.ones((), dtype=logs.dtype, device=logs.device)
            if term.scale is None
            else (one[term.scale] - other[term.scale].to(one)).exp()
            for term, one, other in zip(self.prior.terms, now, then, strict=True)
        ]


def _note(term: AbstractTerm, source: AbstractFeatureKernel | NystromFeatures) -> str:
    if not isinstance(source, NystromFeatures):
        return f"{source.num_features} tangent"
    if not term.hyperparameters:
        return ""
    return f"{source.size} Nyström (missing {source.unexplained:.1e} of {term.hyperparameters[0].name})"


def _free(term: AbstractTerm) -> list[bool]:
    if isinstance(term, FeatureTerm):
        return [True] * len(term.hyperparameters)
    return [index == term.scale for index in range(len(term.hyperparameters))]


def _features_of(term: AbstractTerm, logs: Tensor, x: Tensor, recipe: Recipe) -> NystromFeatures:
    kernel = partial(SumOfTerms([term], 1).matrix, logs)
    return nystrom_features(kernel, lambda rows: term.diagonal(logs, rows), x, recipe.missed, recipe.most)
