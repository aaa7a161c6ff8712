"""p_t(A + s I) b for a positive semi-definite A: by one eigendecomposition, or by Lanczos from products alone.

Two forms of A with the same members: `SpectralMatrix` holds A and decomposes it once, after which every t, s and
learning rate cost two products with the eigenvectors; `KrylovMatrix` knows products with A only, and projects A onto
the Krylov space of b, span{b, A b, ..., Aᵏ⁻¹ b}, with orthonormal basis V_k and tridiagonal T_k = V_kᵀ A V_k,

    p_t(A + s I) b ≈ ‖b‖ V_k p_t(T_k + s I) e_1.

The space serves every t, s and rate, for it depends on none of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple, final

import torch
from torch import Tensor

from gpntk.dynamics.filters import GradientFilter
from gpntk.errors import SolveError

# Iterations between two looks at the error.
_STRIDE = 8
# Times at which the defect is followed.
_GRID = 96
# A flow is over after this many of its longest time constants.
_LONG = 40.0
# Iterations that serve to find a largest eigenvalue.
_LARGEST_ITERATIONS = 300
# Bytes that the Krylov spaces of the columns treated together may take.
_BYTES = 2**28
# Of estimates of rounding.
_SAFETY = 4


class Filtered(NamedTuple):
    """A filtered matrix times columns, p_t(A + s I) B.

    Attributes:
        value: `[T, K, n]`, one column of B per row.
        error: ‖(A + s I)(value - exact)‖ / ‖b‖ `[T]`, the largest over columns: Lanczos' bound, which is followed at
            some hundred times, plus an estimate of rounding; None for an eigendecomposition.
    """

    value: Tensor
    error: Tensor | None


class AbstractFilteredMatrix(ABC):
    """A symmetric positive semi-definite matrix A `[n, n]` whose filters can be applied."""

    @abstractmethod
    def filtered(self, function: GradientFilter, noise: float, times: Tensor, columns: Tensor) -> Filtered:
        """p_t(A + s I) B for the columns `[K, n]`, s = ``noise`` and the ``times`` `[T]`."""

    @abstractmethod
    def largest_eigenvalue(self) -> float:
        """The largest eigenvalue λ_max of A."""

    @abstractmethod
    def product(self, columns: Tensor) -> Tensor:
        """A B for the columns of B `[..., n]`."""


@final
class SpectralMatrix(AbstractFilteredMatrix):
    """A, held and decomposed once: 9 n³ operations and 16 n² bytes. Take it where n is at most some thousands.

    Eigenvalues of A + s I no larger than rounding are taken for zero: in such a direction nothing is learned once p_t
    would exceed the inverse of that bound, and amplify it.

    Args:
        gram: A `[n, n]`, in the precision in which to compute.
        rounding: Norm of what rounding has added to A.

    Example:
        >>> import torch
        >>> matrix = SpectralMatrix(torch.diag(torch.tensor([1.0, 4.0])), 1e-7)
        >>> matrix.filtered(GradientFilter(1.0), 0.0, torch.tensor([torch.inf]), torch.ones(1, 2)).value
        tensor([[[1.0000, 0.2500]]])
    """

    def __init__(self, gram: Tensor, rounding: float) -> None:
        self.gram = (gram + gram.mT) / 2
        self._rounding = rounding

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues `[n]`, of which rounding leaves some below zero, and their vectors `[n, n]`."""
        values, vectors = torch.linalg.eigh(self.gram)
        return values.clamp_min(0), vectors

    def filtered(self, function: GradientFilter, noise: float, times: Tensor, columns: Tensor) -> Filtered:
        # p(A + s I) = U diag(p(λ + s)) Uᵀ
        values, vectors = self._spectrum
        stable = _StableFilter(function, noise, _smallest(values, self._rounding))
        return Filtered((stable(values, times).unsqueeze(1) * (columns @ vectors)) @ vectors.mT, None)

    def largest_eigenvalue(self) -> float:
        return self._spectrum[0][-1].item()

    def product(self, columns: Tensor) -> Tensor:
        return columns @ self.gram


@final
class KrylovMatrix(AbstractFilteredMatrix):
    """A by its products: k products and k² n operations a column, k n values of memory. Take it where n is large.

    The Krylov space of the first right-hand side is kept, and grows as later t need it. Not differentiable.

    The approximation c_k(t) = ‖b‖ V_k p_t(T_k) e_1 of c(t) obeys c_k' = η (b - A c_k + d(t) v_{k+1}) with the defect
    d(t) = β_k ‖b‖ e_kᵀ p_t(T_k) e_1, which is at hand. So A (c_k - c)(t) is the convolution of d v_{k+1} with
    η A exp(-η A t), and integration by parts bounds its norm by |d(t)| plus the total variation of d up to t; for the
    heavy ball times (1 + μ)/(1 - μ). The bound holds for every t, however small the eigenvalues of A.

    Args:
        product: A B for the columns of B `[K, n]`.
        probe: A vector `[n]` in the precision and on the device in which to compute, with a part along the eigenvector
            of λ_max: a random one.
        rounding: Norm of what rounding adds to A in products; see `SpectralMatrix`.
        tolerance: Bound of Lanczos at which the iterations stop; see `Filtered`.
        max_iterations: Most iterations.

    Raises:
        SolveError: The tolerance is not reached.

    References:
        Saad (1992), Analysis of some Krylov subspace approximations to the matrix exponential operator.
        Botchev, Grimm and Hochbruck (2013), Residual, restarting and Richardson iteration for the matrix exponential,
        https://arxiv.org/abs/1112.5670, section 2.
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        probe: Tensor,
        rounding: float,
        tolerance: float = 1e-12,
        max_iterations: int = 1000,
    ) -> None:
        self._product, self._probe, self._rounding = product, probe, rounding
        self._tolerance, self._max_iterations = tolerance, min(max_iterations, probe.numel())
        self._first: tuple[Tensor, list[_KrylovSpace]] | None = None

    def filtered(self, function: GradientFilter, noise: float, times: Tensor, columns: Tensor) -> Filtered:
        columns = columns.detach()
        if self._first is None or not torch.equal(self._first[0], columns):
            bytes_each = self._max_iterations * columns.shape[-1] * columns.element_size()
            pieces = columns.split(max(1, _BYTES // bytes_each))
            spaces = [_KrylovSpace(self._product, piece) for piece in pieces]
            self._first = self._first or (columns, spaces)
        else:
            spaces = self._first[1]
        parts, errors = zip(*(self._converged(space, function, noise, times) for space in spaces), strict=True)
        return Filtered(torch.cat(parts, 1), torch.stack(errors).amax(0))

    def largest_eigenvalue(self) -> float:
        return self._largest

    @cached_property
    def _largest(self) -> float:
        space, largest, before = _KrylovSpace(self._product, self._probe.unsqueeze(0)), 0.0, -1.0
        most = min(_LARGEST_ITERATIONS, self._probe.numel())
        while space.size < most and abs(largest - before) > self._tolerance * largest:
            space.extend(min(_STRIDE, most - space.size))
            before, largest = largest, space.ritz().values.max().item()
        return largest

    def product(self, columns: Tensor) -> Tensor:
        return self._product(columns)

    def _converged(
        self, space: _KrylovSpace, function: GradientFilter, noise: float, times: Tensor
    ) -> tuple[Tensor, Tensor]:
        """p_t(A + s I) b `[T, K, n]` and its error `[T]`."""
        while True:
            ritz = space.ritz()
            smallest = _smallest(ritz.values, self._rounding)
            stable = _StableFilter(function, noise, smallest)
            error = _error(stable, times, ritz)
            if bool((error <= max(self._tolerance, 10 * torch.finfo(error.dtype).eps)).all()):
                weights = stable(ritz.values, times)
                # What rounding adds to A moves A p_t(A) b by the largest p_t times that, or by a last digit.
                rounding = smallest * weights.flatten(1).amax(-1) + _SAFETY * torch.finfo(error.dtype).eps
                return space.combine(ritz.vectors, weights * ritz.first), error + rounding
            if space.size >= self._max_iterations:
                raise _not_converged(space.size, error, self._tolerance)
            space.extend(min(_STRIDE, self._max_iterations - space.size))


@final
class _StableFilter:
    """p_t(λ + s) `[T, ...]`, but zero where it would be larger than the inverse of the ``smallest`` eigenvalue."""

    def __init__(self, function: GradientFilter, noise: float, smallest: float) -> None:
        self.function, self.noise, self._smallest = function, noise, smallest

    def __call__(self, values: Tensor, times: Tensor) -> Tensor:
        filtered = self.function(values + self.noise, times)
        amplified = (values + self.noise <= self._smallest) & (filtered * self._smallest > 1)
        return torch.where(amplified, 0.0, filtered)


class _Ritz(NamedTuple):
    """T_k = S diag(θ) Sᵀ, for each of K columns.

    Attributes:
        values: θ `[K, k]`.
        vectors: S `[K, k, k]`.
        first: Sᵀ e_1 `[K, k]`.
        last: β_k Sᵀ e_k `[K, k]`.
    """

    values: Tensor
    vectors: Tensor
    first: Tensor
    last: Tensor


@final
class _KrylovSpace:
    """V_k and T_k for A and each of the columns `[K, n]`, reorthogonalised in full."""

    def __init__(self, product: Callable[[Tensor], Tensor], columns: Tensor) -> None:
        self._product = product
        self._norms = torch.linalg.vector_norm(columns, dim=-1, keepdim=True)
        self._basis = (columns / torch.where(self._norms > 0, self._norms, 1.0)).unsqueeze(1)  # [K, k + 1, n]
        self._diagonal: list[Tensor] = []
        self._off_diagonal: list[Tensor] = []
        self.extend(1)

    @property
    def size(self) -> int:
        """Number of Lanczos steps made, k."""
        return len(self._diagonal)

    def extend(self, steps: int) -> None:
        """Make so many more Lanczos steps: the Krylov space grows by ``steps`` dimensions."""
        first = self._basis.shape[1]
        room = self._basis.new_zeros(self._basis.shape[0], steps, self._basis.shape[2])
        self._basis = torch.cat([self._basis, room], 1)
        for index in range(first, first + steps):
            basis = self._basis[:, :index]
            image = self._product(basis[:, -1])
            self._diagonal.append((basis[:, -1] * image).sum(-1))
            scale = torch.linalg.vector_norm(image, dim=-1)
            for _twice in range(2):
                image = image - ((basis @ image.unsqueeze(-1)).mT @ basis).squeeze(-2)
            norm = torch.linalg.vector_norm(image, dim=-1)
            # Where the space is invariant, what is left is rounding, and there is no next vector.
            alive = norm > 10 * torch.finfo(norm.dtype).eps * scale
            self._off_diagonal.append(torch.where(alive, norm, 0.0))
            self._basis[:, index] = torch.where(alive, 1 / norm, 0.0).unsqueeze(-1) * image

    def ritz(self) -> _Ritz:
        """Ritz values and vectors: the eigendecomposition of the tridiagonal matrix T_k."""
        diagonal, off = torch.stack(self._diagonal, -1), torch.stack(self._off_diagonal, -1)
        inner = off[..., :-1]
        matrix = torch.diag_embed(diagonal) + torch.diag_embed(inner, 1) + torch.diag_embed(inner, -1)
        values, vectors = torch.linalg.eigh(matrix)
        return _Ritz(values.clamp_min(0), vectors, vectors[..., 0, :], vectors[..., -1, :] * off[..., -1:])

    def combine(self, vectors: Tensor, weights: Tensor) -> Tensor:
        """Combinations of the Lanczos vectors, ‖b‖ V_k S w `[T, K, n]` for S `[K, k, k]` and w `[T, K, k]`."""
        weights = torch.einsum("kij,tkj->tki", vectors, weights)
        return self._norms * torch.einsum("tkj,kjn->tkn", weights, self._basis[:, : weights.shape[-1]])


def _smallest(values: Tensor, rounding: float) -> float:
    """The smallest eigenvalue to be told from zero: by rounding in A, and in its eigendecomposition."""
    return _SAFETY * (rounding + torch.finfo(values.dtype).eps * values.max().item())


def _error(stable: _StableFilter, times: Tensor, ritz: _Ritz) -> Tensor:
    """gain (|d(t)| + total variation of d up to t) / ‖b‖ `[T]`, the largest over columns."""
    grid = _grid(stable.function, times, ritz.values + stable.noise)
    defect = (stable(ritz.values, grid) * ritz.first * ritz.last).sum(-1)  # [G, K]
    start = torch.zeros_like(defect[:1])
    variation = torch.diff(defect, dim=0, prepend=start).abs().cumsum(0)
    at = torch.searchsorted(grid, times)
    return stable.function.gain * (defect.abs() + variation)[at].amax(-1)


def _grid(function: GradientFilter, times: Tensor, values: Tensor) -> Tensor:
    """Times at which to follow the defect, ``times`` among them, in order."""
    constants = 1 / (function.rate * values[values > 0])
    if not constants.numel():
        return times.unique()
    fastest, slowest = 0.1 * constants.min().item(), _LONG * constants.max().item()
    finite = times[times.isfinite()]
    end = slowest if bool(times.isinf().any()) else min(slowest, finite.max().item())
    first = max(1.0, fastest) if function.discrete else fastest
    exponents = torch.linspace(0, 1, _GRID, dtype=times.dtype, device=times.device)
    grid = first * max(1.0, end / first) ** exponents
    if function.discrete:
        # The first steps one by one.
        each = torch.arange(_GRID, dtype=times.dtype, device=times.device)
        grid = torch.cat([each[each <= end], grid.round()])
    return torch.cat([grid, times]).unique()


def _not_converged(iterations: int, error: Tensor, tolerance: float) -> SolveError:
    return SolveError(
        f"Lanczos is off by about {error.max().item():.1e} of the initial residual after {iterations} iterations, and "
        f"{tolerance:.1e} was asked for: allow more with max_iterations, raise the tolerance, take an earlier t or a "
        "larger noise, or method='dense'."
    )
