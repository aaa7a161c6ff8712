"""The linear system behind every Gaussian process of ours: (Φ S Φᵀ + D) α = y, in its whitened form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, final

import torch
from torch import Tensor

from gpntk.errors import DistributedError, InputError
from gpntk.inference.features import AbstractFeatures, exact_dtype
from gpntk.memory import chunks

Space = Literal["function", "weight"]


@final
class NoisySystem:
    """K + D with K = Φ S Φᵀ, S the prior variance of every feature and D the noise variance of every row.

    With Ψ = D^(-1/2) Φ S^(1/2), all solvers work on I + Ψ Ψᵀ `[n, n]` (function space) or I + Ψᵀ Ψ `[F, F]` (weight
    space), whose smallest eigenvalue is at least 1:

        (K + D)⁻¹ = D^(-1/2) (I + Ψ Ψᵀ)⁻¹ D^(-1/2),    (I + Ψ Ψᵀ)⁻¹ = I - Ψ (I + Ψᵀ Ψ)⁻¹ Ψᵀ,
        log det(K + D) = log det(I + Ψ Ψᵀ) + log det(D),    det(I + Ψ Ψᵀ) = det(I + Ψᵀ Ψ).

    A row of infinite noise has not been observed: it is zero in Ψ and counts nowhere.

    Args:
        features: Φ.
        variances: S: one variance for all features `[1]`, or one per layer `[L]`.
        noise: D: one noise variance for all rows `[1]`, or one per row `[n]`.

    Raises:
        InputError: A variance is negative, infinite or NaN, a noise variance is not positive, a shape does not fit, or
            there is no data.
    """

    def __init__(self, features: AbstractFeatures, variances: Tensor, noise: Tensor) -> None:
        self.features = features
        # Hyperparameters are few: they are exact whatever the precision of the data.
        exact = exact_dtype(features.device)
        self.variances, self.noise = variances.detach().to(exact), noise.detach().to(exact)
        if not features.num_rows and not features.sharded:
            raise InputError("x has no rows: give at least one input.")
        if self.noise.shape not in ((1,), (features.num_rows,)):
            raise InputError(
                f"noise has shape {tuple(self.noise.shape)}: give one variance (1,) or one per row "
                f"({features.num_rows},)."
            )
        if not bool((self.noise > 0).all()):
            raise InputError("noise variances must be positive: they are what makes K + D invertible.")
        if not bool(((self.variances >= 0) & self.variances.isfinite()).all()):
            raise InputError("prior variances must be finite and at least zero.")
        self.homoscedastic = _homoscedastic(features, self.noise)
        dtype = features.dtype
        self.row_scales = self.noise.rsqrt().to(dtype)
        self.feature_scales = self.spread(self.variances).sqrt().to(dtype)

    def to(self, dtype: torch.dtype) -> NoisySystem:
        """The same system in another precision."""
        if dtype == self.features.dtype:
            return self
        return NoisySystem(self.features.to(dtype), self.variances, self.noise)

    @property
    def observed(self) -> Tensor:
        """Number of rows observed, of all processes `[]`."""
        return self.features.total(self.noise.isfinite().expand(self.features.num_rows).sum().to(self.noise))

    @property
    def noise_logdet(self) -> Tensor:
        """log|D| over the rows observed `[]`."""
        logs = torch.where(self.noise.isfinite(), self.noise, 1.0).log()
        return self.observed * logs.squeeze(0) if self.homoscedastic else self.features.total(logs.sum())

    def apply(self, v: Tensor) -> Tensor:
        """Ψ v `[K, n]`."""
        return self.features.jvp(v * self.feature_scales) * self.row_scales

    def adjoint(self, u: Tensor) -> Tensor:
        """Ψᵀ u `[K, F]`."""
        return self.features.vjp(u * self.row_scales) * self.feature_scales

    def product(self, space: Space) -> Callable[[Tensor], Tensor]:
        """v -> Ψ Ψᵀ v (function space) or Ψᵀ Ψ v (weight space)."""
        first, second = (self.adjoint, self.apply) if space == "function" else (self.apply, self.adjoint)
        # Columns pass through the other space a few at a time, so that it may be the larger one.
        rows = self.features.place()[1] * self.features.num_outputs
        size = self.size("weight") if space == "function" else rows
        bytes_each, budget = size * torch.finfo(self.features.dtype).bits // 4, self.features.memory_budget // 4

        def product(v: Tensor) -> Tensor:
            return torch.cat([second(first(v[part])) for part in chunks(v.shape[0], bytes_each, budget)])

        return product

    def size(self, space: Space) -> int:
        """n or F."""
        return self.features.num_rows if space == "function" else self.features.num_features

    def prior_diagonal(self, per_group: bool = False) -> Tensor:
        """Diagonal of Ψ Ψᵀ `[n]`, or of every group's part of it `[G, n]`, in float64."""
        exact = exact_dtype(self.features.device)
        parts = self.features.diagonal(self.variances.shape[0] > 1).to(exact) * self.row_scales.to(exact).square()
        parts = parts * self.variances.to(exact).unsqueeze(-1)
        return parts if per_group else parts.sum(0)

    def spread(self, variances: Tensor) -> Tensor:
        """The prior variance of every feature `[F]`, or `[1]` where all have the same, from that of every group."""
        if variances.shape == (1,):
            return variances
        groups = self.features.backend.feature_groups(self.features.device)
        layers = int(groups.max()) + 1
        if variances.shape != (layers,):
            raise InputError(
                f"variances has shape {tuple(variances.shape)}: give one prior variance (1,) or one per layer "
                f"({layers},)."
            )
        return variances[groups]

    def by_group(self, values: Tensor) -> Tensor:
        """Sums of values `[F]` over the features that share a variance `[G]`."""
        if self.variances.shape[0] == 1:
            return values.sum(-1, keepdim=True)
        groups = self.features.backend.feature_groups(self.features.device)
        return values.new_zeros(self.variances.shape[0]).index_add(0, groups, values)


def _homoscedastic(features: AbstractFeatures, noise: Tensor) -> bool:
    """Whether all rows have the same noise variance; a process with a single row cannot tell, the others can."""
    one = noise.shape[0] == 1
    if not features.sharded:
        return one
    common, each = features.total(torch.tensor([one and features.num_rows != 1, not one], dtype=torch.int64)).tolist()
    if common and each:
        raise DistributedError("some ranks give one noise variance, others one for each of their rows.")
    return not each
