"""The systems that Newton's method for the mode of p(f | y) solves, one for each curvature Λ = R Rᵀ it meets.

P = (K + Λ⁻¹)⁻¹ is needed alone; Λ is block-diagonal over the inputs, and may be singular. Vectors are `[N, C]`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from gpntk.inference import Outcome
from gpntk.inference.covariance import AbstractCovariance
from gpntk.inference.direct import cholesky, not_factorised
from gpntk.inference.factors import CholeskyFactor
from gpntk.inference.solver import AbstractInverse, LogDet
from gpntk.likelihoods import AbstractLikelihood


class AbstractNewtonSystem(ABC):
    """P for one K and the curvature of a likelihood at f."""

    @abstractmethod
    def solve(self, v: Tensor) -> Tensor:
        """Product with the pseudo-precision P = (K + Λ⁻¹)⁻¹, P v `[N, C]`."""

    @abstractmethod
    def logdet(self) -> LogDet:
        """Logarithm of the determinant that the evidence needs, log|I + K Λ|."""

    @abstractmethod
    def shares(self) -> Tensor:
        """λ_c V_cc for the posterior covariance V, see `AbstractLikelihood.shares`."""

    @abstractmethod
    def slope(self, dual: Tensor, u: Tensor) -> Tensor:
        """½ ααᵀ + ½ (uαᵀ + αuᵀ) - ½ P as it acts on what K is made of: `[n, n]`, or on the prior variances."""

    @abstractmethod
    def covariance(self, x: Tensor) -> Tensor:
        """Posterior covariance `[B, T*C, T*C]` for x `[B, T, D]`."""


@final
class WhitenedNewtonSystem(AbstractNewtonSystem):
    """Any covariance with C rows for each input, by any solver: function space, weight space, conjugate gradients.

    Args:
        inverse: The system of K and of the likelihood's root at f, prepared.
        likelihood: That of the labels.
        labels: y.
        f: `[N, C]`.
    """

    def __init__(self, inverse: AbstractInverse, likelihood: AbstractLikelihood, labels: Tensor, f: Tensor) -> None:
        self._inverse, self._likelihood, self._labels, self._f = inverse, likelihood, labels, f

    def solve(self, v: Tensor) -> Tensor:
        return self._inverse.solve(v.reshape(1, -1)).checked().view_as(v)

    def logdet(self) -> LogDet:
        return self._inverse.logdet(derivatives=False)

    def shares(self) -> Tensor:
        # Rᵀ V R = I - B⁻¹ holds block by block.
        explained = -self._inverse.inverse_blocks()
        explained.diagonal(dim1=-2, dim2=-1).add_(1)
        return self._likelihood.shares(self._f, self._labels, explained)

    def slope(self, dual: Tensor, u: Tensor) -> Tensor:
        covariance = self._inverse.exact.covariance
        if covariance.features is None:
            return outer_slope(self._inverse.precision(), dual.reshape(-1, 1), u.reshape(-1, 1))
        weighted = covariance.weighted
        alpha, moved = weighted.features.vjp(torch.stack([dual.flatten(), u.flatten()]))
        by_variance = self._inverse.logdet(by_row=False).by_variance / weighted.variances
        return weighted.by_group(0.5 * alpha.square() + alpha * moved) - 0.5 * by_variance

    def covariance(self, x: Tensor) -> Tensor:
        return self._inverse.covariance(x)


@final
class IndependentNewtonSystem(AbstractNewtonSystem):
    """K = k ⊗ I for C outputs with one dense kernel: a factorisation of N rows per output, and one that couples them.

    With E_c = (k + 1/λ_c)⁻¹ = s_c A_c s_c, A_c = (I + s_c k s_c)⁻¹, the blocks of P between outputs c and d are

        P_cd = E_c δ_cd - E_c M⁻¹ E_d,   M = Σ_c E_c,   log|B| = log|M| + Σ_c log|I + s_c k s_c|;

    where the likelihood does not couple its outputs, P_cd = E_c δ_cd.

    Args:
        covariance: k, dense, with one row for each input.
        likelihood: That of the labels.
        labels: y.
        f: `[N, C]`.

    References:
        Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, section 3.5 and algorithm 3.3.
    """

    def __init__(
        self, covariance: AbstractCovariance, likelihood: AbstractLikelihood, labels: Tensor, f: Tensor
    ) -> None:
        self._covariance = covariance
        self._curvature = likelihood.curvature(f, labels)
        self._scales = self._curvature.sqrt()
        gram = covariance.gram()
        points, outputs = self._scales.shape
        self._inverses = gram.new_empty(outputs, points, points)
        self._logdet = gram.new_zeros(())
        coupling = torch.zeros_like(gram) if likelihood.coupled else None
        for inverse, s in self._outputs:
            matrix = s.unsqueeze(-1) * gram * s
            matrix.diagonal().add_(1)
            factor = cholesky(matrix)
            self._logdet = self._logdet + factor.logdet()
            torch.cholesky_inverse(factor.lower, out=inverse)
            if coupling is not None:
                coupling += s.unsqueeze(-1) * inverse * s
        self._coupling: Tensor | None = None
        if coupling is not None:
            # Not of the form I + H: M may be as small as the curvatures are.
            lower, failed = torch.linalg.cholesky_ex(coupling)
            if bool(failed):
                raise not_factorised(points, Outcome.NOT_POSITIVE)
            self._coupling = lower
            self._logdet = self._logdet + CholeskyFactor(lower).logdet()

    def solve(self, v: Tensor) -> Tensor:
        apart = self._apart(v)
        if self._coupling is None:
            return apart
        common = torch.cholesky_solve(apart.sum(-1, keepdim=True), self._coupling)
        return apart - self._apart(common.expand_as(v))

    def logdet(self) -> LogDet:
        return LogDet(self._logdet)

    def shares(self) -> Tensor:
        shares = torch.empty_like(self._scales)
        for index, (inverse, s) in enumerate(self._outputs):
            shares[:, index] = 1 - inverse.diagonal()
            if self._coupling is not None:
                white = torch.linalg.solve_triangular(self._coupling, s.unsqueeze(-1) * inverse, upper=False)
                shares[:, index] += white.square().sum(0) - self._curvature[:, index]
        return shares

    def slope(self, dual: Tensor, u: Tensor) -> Tensor:
        total = torch.zeros_like(self._inverses[0])
        for inverse, s in self._outputs:
            precision = s.unsqueeze(-1) * inverse
            if self._coupling is not None:
                white = torch.linalg.solve_triangular(self._coupling, precision, upper=False) * s
                total -= white.mT @ white
            total += precision * s
        return outer_slope(total, dual, u)

    def covariance(self, x: Tensor) -> Tensor:
        cross, prior = self._covariance.cross(x), self._covariance.prior(x)
        batch, tests, outputs = *cross.shape[:2], self._scales.shape[1]
        flat = cross.flatten(0, 1)
        right = torch.stack([s.unsqueeze(-1) * (inverse @ (s * flat).mT) for inverse, s in self._outputs], -1)
        batched = right.unflatten(1, (batch, tests))
        # Between the points of a batch element, for every output by itself, and then what couples them.
        reduced = prior.unsqueeze(-1) - torch.einsum("btn,nbsc->btsc", cross, batched)
        covariance = reduced.diag_embed().permute(0, 1, 3, 2, 4)
        if self._coupling is not None:
            white = torch.linalg.solve_triangular(self._coupling, right.flatten(1), upper=False).view_as(batched)
            covariance = covariance + torch.einsum("nbtc,nbsd->btcsd", white, white)
        return covariance.reshape(batch, tests * outputs, tests * outputs)

    @property
    def _outputs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self._inverses, self._scales.mT, strict=True))

    def _apart(self, v: Tensor) -> Tensor:
        """E_c v_c `[N, C]`, each output by itself."""
        return self._scales * (self._inverses @ (self._scales * v).mT.unsqueeze(-1)).squeeze(-1).mT


def outer_slope(precision: Tensor, dual: Tensor, u: Tensor) -> Tensor:
    """½ ααᵀ + ½ (uαᵀ + αuᵀ) - ½ P `[n, n]`, in the memory of P, for columns `[n, K]`.

    The first two are ½ ((α + u)(α + u)ᵀ - uuᵀ).
    """
    both = dual + u
    return precision.neg_().addmm_(both, both.mT).addmm_(u, u.mT, alpha=-1).mul_(0.5)
