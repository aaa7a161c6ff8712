"""P = (K + Λ⁻¹)⁻¹, the one matrix that Laplace's method inverts, for a dense K and for K = k ⊗ I.

Λ = R Rᵀ is block-diagonal over the data, `[C, C]` each, and singular. Hence P is formed as

    P = R B⁻¹ Rᵀ = Λ - Λ S Λ,   B = I + Rᵀ K R,   S = K - K P K,   log|B| = log|I + K Λ|,

S being the posterior covariance: B has no eigenvalue below one. Rows of K are n*C + c, vectors are `[N, C]`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from gpntk.errors import SolveError
from gpntk.likelihoods.old_categorical import Categorical

# Rows transformed at once.
_ROWS = 1024


class AbstractPseudoPrecision(ABC):
    """P = (K + Λ⁻¹)⁻¹ for one K and Λ."""

    logdet: Tensor
    """log|B| `[]`."""

    @abstractmethod
    def solve(self, v: Tensor) -> Tensor:
        """P v `[N, C]` for v `[N, C]`."""

    @abstractmethod
    def derivatives(self) -> tuple[Tensor, Tensor]:
        """∂log|B| in the covariance as it was given (P, or the sum of its diagonal blocks), and in f `[N, C]`."""

    @abstractmethod
    def explained(self, cross: Tensor, joint: bool) -> Tensor:
        """K* P K*ᵀ for K* `[M*C, N*C]`, or k* `[M, N]`: its blocks `[M, C, C]`, or all of it `[M*C, M*C]`."""


def pseudo_precision(covariance: Tensor, likelihood: Categorical) -> AbstractPseudoPrecision:
    """P for K `[N*C, N*C]`, or for k `[N, N]` that C independent outputs share.

    Raises:
        SolveError: K is not positive semi-definite.
    """
    if covariance.shape[0] == likelihood.probabilities.numel():
        return DensePseudoPrecision(covariance, likelihood)
    return SharedPseudoPrecision(covariance, likelihood)


@final
class DensePseudoPrecision(AbstractPseudoPrecision):
    """P for a dense K: one Cholesky factorisation of B, which has N*(C-1) rows, or N if C = 1."""

    def __init__(self, covariance: Tensor, likelihood: Categorical) -> None:
        self._likelihood, self._root = likelihood, likelihood.root
        system = _congruence(covariance, self._root)
        system.diagonal().add_(1)
        self._factor = _cholesky(system)
        self.logdet = _logdet(self._factor)

    def solve(self, v: Tensor) -> Tensor:
        reduced = (self._root.mT @ v.unsqueeze(-1)).reshape(-1, 1)
        solved = torch.cholesky_solve(reduced, self._factor)
        return (self._root @ solved.view(v.shape[0], -1, 1)).squeeze(-1)

    def derivatives(self) -> tuple[Tensor, Tensor]:
        points, size = self._root.shape[0], self._root.shape[2]
        inverse = torch.cholesky_inverse(self._factor)
        blocks = inverse.view(points, size, points, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        # Rᵀ S R = I - B⁻¹ holds block by block.
        explained = torch.eye(size, dtype=inverse.dtype, device=inverse.device) - blocks
        basis = self._likelihood.basis
        shares = torch.einsum("nkq,nqr,nkr->nk", basis, explained, basis)
        return _congruence(inverse, self._root.mT), _from_shares(shares, self._likelihood.probabilities)

    def explained(self, cross: Tensor, joint: bool) -> Tensor:
        points, outputs, _ = self._root.shape
        reduced = cross.view(-1, points, outputs).transpose(0, 1) @ self._root
        reduced = reduced.permute(0, 2, 1).reshape(-1, cross.shape[0])
        white = torch.linalg.solve_triangular(self._factor, reduced, upper=False)
        if joint:
            return white.mT @ white
        white = white.view(white.shape[0], -1, outputs)
        return torch.einsum("amc,amd->mcd", white, white)


@final
class SharedPseudoPrecision(AbstractPseudoPrecision):
    """P for K = k ⊗ I_C: a factorisation of N rows per class, and one that couples them.

    With E_c = (k + 1/p_c)⁻¹ = s_c A_c s_c, A_c = (I + s_c k s_c)⁻¹, the blocks of P between classes c and d are

        P_cd = E_c δ_cd - E_c M⁻¹ E_d,   M = Σ_c E_c,   log|B| = log|M| + Σ_c log|I + s_c k s_c|.

    References:
        Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, section 3.5 and algorithm 3.3.
    """

    def __init__(self, covariance: Tensor, likelihood: Categorical) -> None:
        self._probabilities, self._scales = likelihood.probabilities, likelihood.probabilities.sqrt()
        points, classes = self._scales.shape
        self._inverses = covariance.new_empty(classes, points, points)
        coupling = torch.zeros_like(covariance)
        self.logdet = covariance.new_zeros(())
        for inverse, s in self._classes:
            system = s.unsqueeze(-1) * covariance * s
            system.diagonal().add_(1)
            factor = _cholesky(system)
            self.logdet = self.logdet + _logdet(factor)
            torch.cholesky_inverse(factor, out=inverse)
            coupling += s.unsqueeze(-1) * inverse * s
        self._coupling = _cholesky(coupling)
        self.logdet = self.logdet + _logdet(self._coupling)

    def solve(self, v: Tensor) -> Tensor:
        apart = self._apart(v)
        common = torch.cholesky_solve(apart.sum(-1, keepdim=True), self._coupling)
        return apart - self._apart(common.expand_as(v))

    def derivatives(self) -> tuple[Tensor, Tensor]:
        total = self._coupling @ self._coupling.mT
        shares = torch.empty_like(self._scales)
        for index, (inverse, s) in enumerate(self._classes):
            white = torch.linalg.solve_triangular(self._coupling, s.unsqueeze(-1) * inverse, upper=False)
            shares[:, index] = white.square().sum(0) - inverse.diagonal()
            white *= s
            total -= white.mT @ white
        return total, _from_shares(shares + 1 - self._probabilities, self._probabilities)

    def explained(self, cross: Tensor, joint: bool) -> Tensor:
        right = torch.stack([s.unsqueeze(-1) * (inverse @ (s * cross).mT) for inverse, s in self._classes], -1)
        white = torch.linalg.solve_triangular(self._coupling, right.flatten(1), upper=False).view_as(right)
        if not joint:
            apart = torch.einsum("mn,nmc->mc", cross, right)
            return apart.diag_embed() - torch.einsum("nmc,nmd->mcd", white, white)
        white = white.flatten(1)
        apart = torch.einsum("ln,nmc->lmc", cross, right)
        return _block_diagonal(apart) - white.mT @ white

    @property
    def _classes(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self._inverses, self._scales.mT, strict=True))

    def _apart(self, v: Tensor) -> Tensor:
        """E_c v_c `[N, C]`, each class by itself."""
        return self._scales * (self._inverses @ (self._scales * v).mT.unsqueeze(-1)).squeeze(-1).mT


# --- private ---------------------------------------------------------------------------------------------------------


def _congruence(matrix: Tensor, blocks: Tensor) -> Tensor:
    """Xᵀ A X `[N*J, N*J]` for A `[N*I, N*I]` and X block-diagonal, given as `[N, I, J]`; A is not copied."""
    points, rows, columns = blocks.shape
    matrix = matrix.view(points, rows, points * rows)
    result = matrix.new_empty(points, columns, points * columns)
    step = max(1, _ROWS // rows)
    for start in range(0, points, step):
        part = slice(start, start + step)
        left = (blocks[part].mT @ matrix[part]).view(-1, points, rows)
        result[part] = (left.transpose(0, 1) @ blocks).transpose(0, 1).reshape(-1, columns, points * columns)
    return result.view(points * columns, points * columns)


def _from_shares(shares: Tensor, probabilities: Tensor) -> Tensor:
    """∂log|B|/∂f = tr(S ∂Λ/∂f) `[N, C]`, from the diagonal of H Rᵀ S R Hᵀ `[N, K]`.

    With Π = I - 1 pᵀ, that diagonal is p_c (Π S Πᵀ)_cc, and tr(S ∂Λ/∂f) = Λ diag(Π S Πᵀ), as rows of Λ sum to zero.
    """
    outputs = probabilities.shape[-1]
    return shares[:, -outputs:] - probabilities * shares.sum(-1, keepdim=True)


def _cholesky(matrix: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    if info != 0:
        raise SolveError(
            "the covariance is not positive semi-definite to the accuracy of its precision: check that it is symmetric "
            "and of rows n*C + c, scale it down, or use float64."
        )
    return factor


def _logdet(factor: Tensor) -> Tensor:
    return 2 * factor.diagonal().log().sum()


def _block_diagonal(blocks: Tensor) -> Tensor:
    """`[M*C, M*C]` with rows m*C + c, from C matrices `[M, M, C]`."""
    rows, _, outputs = blocks.shape
    return blocks.diag_embed().permute(0, 2, 1, 3).reshape(rows * outputs, -1)
