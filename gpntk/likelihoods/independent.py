"""Likelihoods whose outputs are independent given f: Λ is diagonal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from gpntk.errors import InputError
from gpntk.likelihoods.likelihood import AbstractLikelihood, check_targets
from gpntk.likelihoods.links import probabilities


def _seen(values: Tensor, y: Tensor) -> Tensor:
    """Zero where a label is missing."""
    return torch.where(y.isnan(), 0.0, values)


@final
@dataclass(frozen=True)
class Bernoulli(AbstractLikelihood):
    """Yes or no, y `[N, C]` of zeros and ones, each given its own logit f; several outputs are several labels.

    NaN is a missing label.
    """

    def check(self, y: Tensor, samples: int, outputs: int) -> Tensor:
        y = check_targets(y, samples, outputs, "Bernoulli")
        if not bool(((y == 0) | (y == 1) | y.isnan()).all()):
            raise InputError("Bernoulli labels must be 0 or 1, or NaN where missing.")
        return y

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        targets = y.nan_to_num(0.0).to(f)
        return -_seen(functional.binary_cross_entropy_with_logits(f, targets, reduction="none"), y).sum()

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        return _seen(y.nan_to_num(0.0).to(f) - f.sigmoid(), y)

    def curvature(self, f: Tensor, y: Tensor) -> Tensor:
        return _seen(f.sigmoid() * (-f).sigmoid(), y)

    def slope(self, f: Tensor, y: Tensor, shares: Tensor) -> Tensor:  # noqa: ARG002
        return shares * (1 - 2 * f.sigmoid())

    def predictive(self, mean: Tensor, covariance: Tensor) -> Tensor:
        variances = covariance.diagonal(dim1=-2, dim2=-1).reshape(-1, 1, 1)
        return probabilities(mean.reshape(-1, 1), variances)[:, 1].view_as(mean)


@final
@dataclass(frozen=True)
class Poisson(AbstractLikelihood):
    """Counts y `[N, C]` with rates exp(f); NaN is a missing count."""

    def check(self, y: Tensor, samples: int, outputs: int) -> Tensor:
        y = check_targets(y, samples, outputs, "Poisson")
        if not bool((((y >= 0) & (y == y.round())) | y.isnan()).all()):
            raise InputError("Poisson labels must be counts 0, 1, 2, ..., or NaN where missing.")
        return y

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        counts = y.nan_to_num(0.0).to(f)
        return _seen(counts * f - f.exp() - (counts + 1).lgamma(), y).sum()

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        return _seen(y.nan_to_num(0.0).to(f) - f.exp(), y)

    def curvature(self, f: Tensor, y: Tensor) -> Tensor:
        return _seen(f.exp(), y)

    def slope(self, f: Tensor, y: Tensor, shares: Tensor) -> Tensor:  # noqa: ARG002
        return shares

    def predictive(self, mean: Tensor, covariance: Tensor) -> Tensor:
        return (mean + covariance.diagonal(dim1=-2, dim2=-1) / 2).exp()


@final
@dataclass(frozen=True)
class Gaussian(AbstractLikelihood):
    """y `[N, C]` = f plus Gaussian noise; NaN is a missing value. Laplace's method is exact for it.

    Attributes:
        noise: Its variance.
    """

    noise: float = 1.0

    def __post_init__(self) -> None:
        if not self.noise > 0:
            raise InputError(f"noise={self.noise} must be positive.")

    def check(self, y: Tensor, samples: int, outputs: int) -> Tensor:
        return check_targets(y, samples, outputs, "Gaussian")

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        gaps = _seen(f - y.nan_to_num(0.0).to(f), y)
        return -0.5 * (gaps.square().sum() / self.noise + (~y.isnan()).sum() * math.log(2 * math.pi * self.noise))

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        return _seen(y.nan_to_num(0.0).to(f) - f, y) / self.noise

    def curvature(self, f: Tensor, y: Tensor) -> Tensor:
        return _seen(torch.full_like(f, 1 / self.noise), y)

    def slope(self, f: Tensor, y: Tensor, shares: Tensor) -> Tensor:  # noqa: ARG002
        return torch.zeros_like(f)

    def predictive(self, mean: Tensor, covariance: Tensor) -> Tensor:  # noqa: ARG002
        return mean
