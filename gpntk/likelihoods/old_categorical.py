"""Labels given logits: the log-likelihood log softmax(f)[y] and its derivatives in f.

With C = 1 output, f is the logit of class 1 against class 0: the softmax of (0, f), of which only f can move.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gpntk.likelihoods.links import with_reference


class Categorical(NamedTuple):
    """log p(y | f) to second order at f `[N, C]`, with p = softmax(f), s = √p and K classes (K = C, or 2 if C = 1)."""

    log_likelihood: Tensor
    """Sum over the data `[]`."""
    residual: Tensor
    """e_y - p, the gradient `[N, C]`."""
    probabilities: Tensor
    """p `[N, C]`."""
    basis: Tensor
    """H, an orthonormal basis of what is orthogonal to s `[N, K, K-1]`."""
    root: Tensor
    """R = diag(s) H with R Rᵀ = Λ = diag(p) - p pᵀ, less the Hessian `[N, C, K-1]`."""


def log_likelihood(f: Tensor, labels: Tensor) -> Tensor:
    """Σ_n log softmax(f_n)[y_n] `[]` for f `[N, C]` and classes y `[N]`."""
    return -functional.cross_entropy(with_reference(f), labels, reduction="sum")


def categorical(f: Tensor, labels: Tensor) -> Categorical:
    """The `Categorical` likelihood of classes y `[N]` at f `[N, C]`.

    Λ = diag(s) (I - s sᵀ) diag(s) has rank K - 1. The reflection I - (s + e_1)(s + e_1)ᵀ / (1 + s_1) maps s to -e_1:
    its other columns are H, exact however small a probability is.
    """
    outputs = f.shape[-1]
    logs = with_reference(f).log_softmax(-1)
    p, s = logs.exp(), (0.5 * logs).exp()
    indicator = functional.one_hot(labels, logs.shape[-1]).to(f)
    first, others = s[:, :1], s[:, 1:]
    inner = torch.eye(others.shape[-1], dtype=f.dtype, device=f.device) - torch.einsum(
        "ni,nj->nij", others, others / (1 + first)
    )
    basis = torch.cat([-others.unsqueeze(-2), inner], -2)
    root = s.unsqueeze(-1) * basis
    value = logs.gather(-1, labels.unsqueeze(-1)).sum()
    return Categorical(value, (indicator - p)[:, -outputs:], p[:, -outputs:], basis, root[:, -outputs:])
