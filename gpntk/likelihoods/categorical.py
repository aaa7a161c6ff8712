"""Labels given logits: log softmax(f)[y].

With C = 1 output, f is the logit of class 1 against class 0: the softmax of (0, f), of which only f can move.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor
from torch.nn import functional

from gpntk.errors import InputError
from gpntk.likelihoods.likelihood import AbstractLikelihood
from gpntk.likelihoods.links import Link, probabilities, with_reference
from gpntk.likelihoods.targets import check_labels


@final
@dataclass(frozen=True)
class Categorical(AbstractLikelihood):
    """Classes y `[N]`, integers from 0 to C - 1 (0 and 1 if C = 1), given logits f `[N, C]`.

    Attributes:
        link: How `predictive` approximates E[softmax(f)], see `gpntk.likelihoods.probabilities`.
    """

    link: Link = "probit"
    coupled = True

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
