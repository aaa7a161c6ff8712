"""Nyström features of any kernel: k(x, x') ≈ φ(x)·φ(x'), so that a kernel of GPyTorch's joins those of a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpntk.inference.dense_covariance import Kernel
from gpntk.inference.features import draw
from gpntk.jacobians import AbstractJacobianBackend, ExplicitBackend, StackedBackend
from gpntk.kernels.feature_kernel import AbstractFeatureKernel

# Candidates for a point, at most; rows on which what is left unexplained is measured.
_CANDIDATES = 8_000
_MEASURED = 1_000
# Shares of the variance that may always, and must never, be missed.
_LEAST, _MOST = 1e-9, 1e-2


class NystromFeatures(NamedTuple):
    """φ(x) = L⁻¹ k(Z, x) `[N, M]` for points Z with k(Z, Z) = L Lᵀ: φ(x)·φ(x') is k's orthogonal projection onto Z.

    Attributes:
        kernel: k.
        points: Z `[M, D]`.
        lower: L `[M, M]`.
        unexplained: Share of the prior variance that the features miss, on rows that did not choose the points.
    """

    kernel: Kernel
    points: Tensor
    lower: Tensor
    unexplained: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        cross = self.kernel(self.points, x)
        return torch.linalg.solve_triangular(self.lower, cross.to(self.lower), upper=False).mT

    @property
    def size(self) -> int:
        """M, the number of features."""
        return len(self.points)


@torch.no_grad()
def nystrom_features(
    kernel: Kernel, variance: Callable[[Tensor], Tensor], x: Tensor, missed: float, most: int
) -> NystromFeatures:
    """Features of k at greedily chosen rows of x: each where the variance that those before it leave is largest.

    Chosen until they explain all but ``missed`` of the prior variance, on average over the candidates: a pivoted
    Cholesky factorisation, M² operations for each candidate.

    Args:
        kernel: k, of one row per input.
        variance: k(x, x) `[N]` for x `[N, D]`.
        x: Inputs `[N, D]`.
        missed: Variance that may be missed; not below 1e-9 nor above a hundredth of all of it.
        most: Features at most.

    Example:
        >>> import torch
        >>> def rbf(x, z):
        ...     return (-0.5 * torch.cdist(x, z).square()).exp()
        >>> x = torch.rand(500, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> found = nystrom_features(rbf, lambda x: x.new_ones(len(x)), x, 1e-6, 200)
        >>> found.size < 60 and found.unexplained < 1e-5
        True

    References:
        Burt, Rasmussen and van der Wilk (2020), Convergence of Sparse Variational Inference in Gaussian Processes
        Regression, https://arxiv.org/abs/2008.00323 (greedy points).
        Williams and Seeger (2001), Using the Nyström Method to Speed Up Kernel Machines, NIPS 13.
    """
    chosen = draw(len(x), min(len(x), _CANDIDATES), seed=0).to(x.device)
    candidates = x[chosen]
    left = variance(candidates)
    total: float = left.sum().item()
    most = min(most, len(candidates))
    rows, pivots = left.new_zeros(most, len(candidates)), []
    enough = min(max(missed * len(left), _LEAST * total), _MOST * total)
    while len(pivots) < most and float(left.sum()) > enough:
        pivot = int(left.argmax())
        count = len(pivots)
        row = kernel(candidates[pivot : pivot + 1], candidates).to(left).squeeze(0)
        row = (row - rows[:count, pivot] @ rows[:count]) / left[pivot].sqrt()
        rows[count], left = row, (left - row.square()).clamp_min(0)
        left[pivot] = 0
        pivots.append(pivot)
    where = torch.tensor(pivots, dtype=torch.long, device=x.device)
    # Rows of the factor at the pivots are the factor of k(Z, Z).
    found = NystromFeatures(kernel, candidates[where], rows[: len(pivots), where].mT.tril().contiguous())
    others = x[draw(len(x), min(len(x), _MEASURED), seed=1).to(x.device)]
    own = variance(others)
    gaps = (own - found(others).square().sum(-1)).clamp_min(0)
    return found._replace(unexplained=float(gaps.sum() / own.sum()) if total > 0 else 0.0)


def stacked(
    parts: Sequence[AbstractFeatureKernel | NystromFeatures], grouped: Sequence[bool], outputs: int, x: Tensor
) -> AbstractJacobianBackend:
    """The features of several kernels side by side: those of the sum of the kernels.

    Args:
        parts: Kernels of ours, and features of others.
        grouped: Whether each layer of a part has a prior variance of its own, or all its features share one.
        outputs: C, to which kernels of one row per input are extended as independent outputs.
        x: An input `[1, D]`.
    """
    backends = [
        _of_outputs(part.backend, outputs, x) if isinstance(part, AbstractFeatureKernel) else _explicit(part, outputs)
        for part in parts
    ]
    return StackedBackend(backends, by_layer=list(grouped))


def _of_outputs(backend: AbstractJacobianBackend, outputs: int, x: Tensor) -> AbstractJacobianBackend:
    """Features of one row per input, as those of independent outputs."""
    if backend.num_outputs(x) == outputs:
        return backend

    def rows(x: Tensor) -> Tensor:
        return backend.jacobian(x.unsqueeze(0)).squeeze(0)

    return ExplicitBackend(rows, backend.num_features, outputs, dtype=backend.dtype, device=backend.device)


def _explicit(found: NystromFeatures, outputs: int) -> ExplicitBackend:
    return ExplicitBackend(found, found.size, outputs, dtype=found.points.dtype, device=found.points.device)
