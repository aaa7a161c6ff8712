"""Multinomial logistic regression with a Gaussian prior, its strength by Laplace's approximation of the evidence."""

from __future__ import annotations

import math
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional

STRENGTHS = tuple(10 ** (power / 2) for power in range(-8, 7))
"""Precisions of the prior that are compared."""
_SAMPLES = 256


class Logistic(NamedTuple):
    """The posterior over weights `[F, K]`: its mode, and the Cholesky factor of its precision `[FK, FK]`."""

    mode: Tensor
    precision: Tensor
    evidence: float

    @classmethod
    def fit(cls, features: Tensor, y: Tensor, centre: Tensor) -> Self:
        """The posterior of largest evidence for features `[N, F]`, classes `[N]` and a prior mean `[F, K]`."""
        return max((cls.given(features, y, centre, strength) for strength in STRENGTHS), key=lambda fit: fit.evidence)

    @classmethod
    def given(cls, features: Tensor, y: Tensor, centre: Tensor, strength: float) -> Self:
        """The posterior for a prior of the given precision: Newton's method with step halving."""
        targets = functional.one_hot(y, centre.shape[1]).to(features)

        def objective(weights: Tensor) -> float:
            fit = (targets * functional.log_softmax(features @ weights, 1)).sum()
            return (fit - strength / 2 * (weights - centre).square().sum()).item()

        weights, value = centre, objective(centre)
        while True:
            probabilities = (features @ weights).softmax(1)
            slope = features.T @ (targets - probabilities) - strength * (weights - centre)
            precision = torch.linalg.cholesky(_curvature(features, probabilities, strength))
            step = torch.cholesky_solve(slope.reshape(-1, 1), precision).reshape(weights.shape)
            size = 1.0
            while (reached := objective(weights + size * step)) < value and size > 1e-6:
                size /= 2
            if reached - value < 1e-8 * (1 + abs(value)):
                break
            weights, value = weights + size * step, reached
        evidence = value + weights.numel() / 2 * math.log(strength) - precision.diagonal().log().sum().item()
        return cls(weights, precision, evidence)

    def plug_in(self, features: Tensor) -> Tensor:
        """Probabilities `[M, K]` of the mode."""
        return (features @ self.mode).softmax(1)

    def averaged(self, features: Tensor, seed: int) -> Tensor:
        """Probabilities `[M, K]`, mean over samples of the weights."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(self.mode.numel(), _SAMPLES, generator=generator, dtype=features.dtype)
        steps = torch.linalg.solve_triangular(self.precision.T, noise, upper=True)
        weights = self.mode + steps.T.reshape(_SAMPLES, *self.mode.shape)
        return torch.stack([(features @ sample).softmax(1) for sample in weights]).mean(0)


def _curvature(features: Tensor, probabilities: Tensor, strength: float) -> Tensor:
    """The negative Hessian `[FK, FK]`: sum over n of h hᵀ ⊗ (diag(p) - p pᵀ), and the prior's precision."""
    weighted = (features.unsqueeze(2) * probabilities.unsqueeze(1)).flatten(1)
    size, classes = features.shape[1], probabilities.shape[1]
    curvature = -weighted.T @ weighted
    blocks = curvature.view(size, classes, size, classes).diagonal(dim1=1, dim2=3)
    blocks += torch.einsum("nf,nk,ng->fgk", features, probabilities, features)
    curvature.diagonal().add_(strength)
    return curvature
