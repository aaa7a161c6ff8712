"""What a label says of f, to second order: the interface of all likelihoods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from gpntk.errors import InputError


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
