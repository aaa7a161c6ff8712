"""What a label says of f, to second order: the interface of all likelihoods, and those there are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final, get_args

import torch
from torch import Tensor
from torch.nn import functional

from gpntk._checks import check_choice, check_positive, check_values
from gpntk.errors import InputError
from gpntk.likelihoods.links import Link, probabilities, with_reference
from gpntk.likelihoods.targets import check_labels


class AbstractLikelihood(ABC):
    """log p(y | f) = Σ_n log p(y_n | f_n) for f `[N, C]`, concave in f; a missing label says nothing.

    Λ_n = -∂²log p/∂f∂fᵀ `[C, C]` follows from curvatures λ `[N, C]` in one of two forms: diag(λ), or (``coupled``)
    diag(λ) - λ λᵀ with λ summing to one, of rank C - 1. With C = 1 coupled output there is a second one that is fixed,
    in front, and λ is `[N, 2]`.
    """

    coupled: bool = False
    """Whether the outputs of an input know of each other."""

    @abstractmethod
    def check(self, y: Tensor, samples: int, outputs: int) -> Tensor:
        """The labels as the other methods take them.

        Raises:
            InputError: They do not fit N = ``samples`` inputs and C = ``outputs``.
        """

    @abstractmethod
    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        """Log likelihood of all labels, log p(y | f) `[]`, in nats."""

    @abstractmethod
    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """Gradient of the log likelihood, ∂log p(y | f)/∂f `[N, C]`."""

    @abstractmethod
    def curvature(self, f: Tensor, y: Tensor) -> Tensor:
        """λ `[N, C]`, at least zero; zero where a label is missing."""

    @abstractmethod
    def slope(self, f: Tensor, y: Tensor, shares: Tensor) -> Tensor:
        """tr(V_n ∂Λ_n/∂f_n) `[N, C]` for a covariance V, from its `shares`: how log|B| changes with f."""

    @abstractmethod
    def predictive(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """E[y] for f ~ N(mean `[M, C]`, covariance `[M, C, C]`): probabilities of classes, or means `[M, C]`."""

    @final
    def root(self, f: Tensor, y: Tensor) -> Tensor:
        """R `[N, C, q]` with R Rᵀ = Λ; q = C, or the rank C - 1 where coupled (1 if C = 1)."""
        scales = self.curvature(f, y).sqrt()
        if not self.coupled:
            return scales.diag_embed()
        # Λ = diag(s) (I - s sᵀ) diag(s), and H spans what is orthogonal to s.
        return (scales.unsqueeze(-1) * _basis(scales))[:, -f.shape[-1] :]

    @final
    def shares(self, f: Tensor, y: Tensor, explained: Tensor) -> Tensor:
        """λ_c V_cc `[N, C]` from Rᵀ V R `[N, q, q]`; where coupled, V is that of f_c - Σ_d λ_d f_d."""
        if not self.coupled:
            return explained.diagonal(dim1=-2, dim2=-1)
        basis = _basis(self.curvature(f, y).sqrt())
        return torch.einsum("nkq,nqr,nkr->nk", basis, explained, basis)


def check_targets(y: Tensor, samples: int, outputs: int, name: str) -> Tensor:
    """Labels `[N, C]` of independent outputs, also given as `[N]` for C = 1 or as `[N*C]`; NaN where missing."""
    check_values(y.device if isinstance(y, Tensor) else torch.device("cpu"), labels=y)
    if y.numel() != samples * outputs or y.dim() > 2:
        raise InputError(f"{name} labels must be [N, C] = {(samples, outputs)}, got shape {tuple(y.shape)}.")
    y = y.reshape(samples, outputs)
    y = y if y.is_floating_point() else y.to(torch.get_default_dtype())
    if bool(y.isinf().any()):
        raise InputError(f"{name} labels must be finite, or NaN where missing.")
    return y


def _basis(s: Tensor) -> Tensor:
    """An orthonormal basis H of what is orthogonal to unit vectors s `[N, K]`, `[N, K, K-1]`.

    The reflection I - (s + e_1)(s + e_1)ᵀ / (1 + s_1) maps s to -e_1: its other columns are H, exact however small an
    entry is.
    """
    first, others = s[:, :1], s[:, 1:]
    inner = torch.eye(others.shape[-1], dtype=s.dtype, device=s.device) - torch.einsum(
        "ni,nj->nij", others, others / (1 + first)
    )
    return torch.cat([-others.unsqueeze(-2), inner], -2)


@final
@dataclass(frozen=True)
class Categorical(AbstractLikelihood):
    """Classes y `[N]`, integers from 0 to C - 1 (0 and 1 if C = 1), given logits f `[N, C]`.

    Attributes:
        link: How `predictive` approximates E[softmax(f)], see `gpntk.likelihoods.probabilities`.
    """

    link: Link = "probit"
    coupled = True

    def __post_init__(self) -> None:
        check_choice(get_args(Link), link=self.link)

    def check(self, y: Tensor, samples: int, outputs: int) -> Tensor:
        check_labels(y, max(2, outputs))
        if y.shape[0] != samples:
            raise InputError(f"labels has {y.shape[0]} classes, but there are {samples} inputs.")
        return y.long()

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        return -functional.cross_entropy(with_reference(f), y, reduction="sum")

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        p = with_reference(f).softmax(-1)
        return (functional.one_hot(y, p.shape[-1]).to(f) - p)[:, -f.shape[-1] :]

    def curvature(self, f: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        return with_reference(f).softmax(-1)

    def slope(self, f: Tensor, y: Tensor, shares: Tensor) -> Tensor:  # noqa: ARG002
        # With Π = I - 1 pᵀ, shares are p_c (Π S Πᵀ)_cc of all K classes, and tr(S ∂Λ/∂f) = Λ diag(Π S Πᵀ).
        p = with_reference(f).softmax(-1)[:, -f.shape[-1] :]
        return shares[:, -f.shape[-1] :] - p * shares.sum(-1, keepdim=True)

    def predictive(self, mean: Tensor, covariance: Tensor) -> Tensor:
        return probabilities(mean, covariance, self.link)


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
        check_positive(noise=self.noise)

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
