"""(K + D)⁻¹ once it is prepared: solves, log-determinant with derivatives, posterior covariances."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from gpntk.inference.features import exact_dtype
from gpntk.inference.outcome import Outcome, SolveResult
from gpntk.inference.preconditioners import nystrom
from gpntk.inference.system import NoisySystem


class LogDet(NamedTuple):
    """log|I + Ψ Ψᵀ| and its derivatives.

    Attributes:
        value: In nats `[]`.
        by_variance: Derivative with respect to the logarithm of every prior variance `[G]`.
        by_noise: That of log|K + D| with respect to the logarithm of every noise variance, in the shape of the noise:
            diag (I + Ψ Ψᵀ)⁻¹ `[n]`, or its sum `[1]`.
        standard_error: Of ``value``, where it is estimated; else 0.
    """

    value: Tensor
    by_variance: Tensor
    by_noise: Tensor
    standard_error: float = 0.0


class Solution(NamedTuple):
    """The solution of a whitened system in both spaces, exact up to the solve that made it.

    Attributes:
        dual: (I + Ψ Ψᵀ)⁻¹ b `[K, n]`.
        primal: Ψᵀ dual = (I + Ψᵀ Ψ)⁻¹ Ψᵀ b `[K, F]`.
        outcomes: Of each column; iterations: Products made; residual_norms: relative to b `[K]`.
        quad: bᵀ dual `[K]`, off by the square of what dual is off by.
    """

    dual: Tensor
    primal: Tensor
    outcomes: tuple[Outcome, ...]
    iterations: int
    residual_norms: Tensor
    quad: Tensor

    def result(self, value: Tensor) -> SolveResult:
        """``value``, made of this solution, with what is said of it."""
        return SolveResult(value, self.outcomes, self.iterations, self.residual_norms)


class AbstractInverse(ABC):
    """The inverse of a `NoisySystem`; all numbers that leave it are float64."""

    def __init__(self, system: NoisySystem) -> None:
        self.system = system
        self.dtype = exact_dtype(system.features.device)
        self.exact = system.to(self.dtype)

    # --- what differs ------------------------------------------------------------------------------------------

    @abstractmethod
    def whitened(self, rhs: Tensor) -> Solution:
        """(I + Ψ Ψᵀ)⁻¹ b for b `[K, n]`."""

    @abstractmethod
    def logdet(self, by_row: bool = True) -> LogDet:
        """log|I + Ψ Ψᵀ| with derivatives; those with respect to a noise per row, which cost, only if ``by_row``."""

    @abstractmethod
    def covariance(self, x: Tensor, close: bool = False) -> Tensor:
        """Posterior covariance of f(x) `[B, T*C, T*C]` for x `[B, T, D]`; differentiable in x to first order.

        With ``close``, good enough for something nearly as large to be taken from it.
        """

    @abstractmethod
    def primal_columns(self, x: Tensor) -> Tensor:
        """(I + Ψᵀ Ψ)⁻¹ ψ(x)ᵀ as rows `[T*C, F]` for x `[T, D]`."""

    # --- what follows ------------------------------------------------------------------------------------------

    def primal_quad(self, dual: Tensor, primal: Tensor) -> Tensor:
        """bᵀ (I + Ψ Ψᵀ)⁻¹ b `[K]` = min over p of |b - Ψ p|² + |p|², near its minimum, for dual = b - Ψ primal."""
        return self.exact.features.total(dual.square().sum(-1)) + primal.square().sum(-1)

    def dual_quad(self, rhs: Tensor, dual: Tensor, primal: Tensor) -> Tensor:
        """bᵀ (I + Ψ Ψᵀ)⁻¹ b `[K]` = max over u of 2 bᵀu - |u|² - |Ψᵀu|², near its maximum, for primal = Ψᵀ dual."""
        return self.exact.features.total((dual * (2 * rhs - dual)).sum(-1)) - primal.square().sum(-1)

    def solve(self, rhs: Tensor) -> SolveResult:
        """(K + D)⁻¹ b for b `[K, n]`."""
        solution = self.whitened(rhs.to(self.dtype) * self.exact.row_scales)
        return solution.result(solution.dual * self.exact.row_scales)

    def weights(self, rhs: Tensor) -> SolveResult:
        """S Φᵀ (K + D)⁻¹ b `[K, F]`, the posterior mean of the weights, for b `[K, n]`."""
        solution = self.whitened(rhs.to(self.dtype) * self.exact.row_scales)
        return solution.result(solution.primal * self.exact.feature_scales)

    def log_determinant(self) -> Tensor:
        """log|K + D| `[]`, in nats."""
        return self.logdet().value + self.exact.noise_logdet

    def variance(self, x: Tensor) -> Tensor:
        """Posterior variances of f(x) `[T*C]` for x `[T, D]`."""
        return self.covariance(x.unsqueeze(1)).diagonal(dim1=-2, dim2=-1).flatten().clamp_min(0)

    def directions(self, rank: int) -> Tensor:
        """V diag(λ / (1 + λ))^(1/2), for about the largest ``rank`` eigenpairs of Ψᵀ Ψ, as rows `[r, F]`.

        A Nyström approximation, which is from below: so is the reduction of variances made from it.
        """
        like = self.exact.feature_scales.new_empty(self.exact.size("weight"))
        values, vectors = nystrom(self.exact.product("weight"), like, rank, 0.0, seed=0)
        return (vectors * (values / (1 + values)).sqrt()).mT

    def test_features(self, x: Tensor) -> Tensor:
        """Explicit rows ψ(x) = J(x) S^(1/2) `[B, T*C, F]` for x `[B, T, D]`."""
        return self.system.features.backend.jacobian(x.to(self.dtype)) * self.exact.feature_scales

    def cross(self, x: Tensor) -> Tensor:
        """ψ(x) Ψᵀ `[B*T*C, n]` for x `[B, T, D]`: prior covariance with the whitened data."""
        flat = x.to(self.dtype).flatten(0, 1)
        pieces = [
            self.combined(self.system.features.backend.gram(flat.unsqueeze(0), part.unsqueeze(0), self.grouped))
            for _, part in self.exact.features.parts()
        ]
        return torch.cat(pieces, -1).squeeze(0) * self.exact.row_scales

    def prior(self, x: Tensor) -> Tensor:
        """Prior covariance of f(x) `[B, T*C, T*C]`."""
        x = x.to(self.dtype)
        return self.combined(self.system.features.backend.gram(x, x, self.grouped))

    def combined(self, parts: Tensor) -> Tensor:
        """Sum of the groups' Grams `[B, G, n, m]`, each times its variance."""
        return torch.einsum("bgnm,g->bnm", parts, self.exact.variances)

    @property
    def grouped(self) -> bool:
        """Whether layers have variances of their own."""
        return self.system.variances.shape[0] > 1


def in_batches(rows: Tensor, batch: int) -> Tensor:
    """`[B*T, R]` as `[B, T, R]`."""
    return rows.unflatten(0, (batch, -1))
