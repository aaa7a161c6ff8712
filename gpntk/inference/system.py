"""The linear system behind every Gaussian process of ours: (Φ S Φᵀ + D) α = y, in its whitened form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, final

import torch
from torch import Tensor

from gpntk.errors import InputError
from gpntk.inference.features import AbstractFeatures, exact_dtype

Space = Literal["function", "weight"]


@final
class NoisySystem:
    """K + D with K = Φ S Φᵀ, S the prior variance of every feature and D the noise variance of every row.

    With Ψ = D^(-1/2) Φ S^(1/2), all solvers work on I + Ψ Ψᵀ `[n, n]` (function space) or I + Ψᵀ Ψ `[F, F]` (weight
    space), whose smallest eigenvalue is at least 1:

        (K + D)⁻¹ = D^(-1/2) (I + Ψ Ψᵀ)⁻¹ D^(-1/2),    (I + Ψ Ψᵀ)⁻¹ = I - Ψ (I + Ψᵀ Ψ)⁻¹ Ψᵀ,
        log|K + D| = log|I + Ψ Ψᵀ| + log|D|,           |I + Ψ Ψᵀ| = |I + Ψᵀ Ψ|.

    A row of infinite noise has not been observed: it is zero in Ψ and counts nowhere.

    Args:
        features: Φ.
        variances: S: one variance for all features `[1]`, or one per layer `[L]`.
        noise: D: one noise variance for all rows `[1]`, or one per row `[n]`.

    Raises:
        InputError: A variance is negative or NaN, a noise variance is not positive, or a shape does not fit.
    """

    def __init__(self, features: AbstractFeatures, variances: Tensor, noise: Tensor) -> None:
        self.features = features
        self.variances, self.noise = variances.detach(), noise.detach()
        if self.noise.shape not in ((1,), (features.num_rows,)):
            raise InputError(
                f"noise has shape {tuple(self.noise.shape)}: give one variance (1,) or one per row "
                f"({features.num_rows},)."
            )
        if not bool((self.noise > 0).all()):
            raise InputError("noise variances must be positive: they are what makes K + D invertible.")
        if not bool((self.variances >= 0).all()):
            raise InputError("prior variances must be at least zero.")
        dtype = features.dtype
        self.row_scales = self.noise.rsqrt().to(dtype)
        per_layer = self.variances.shape[0] > 1
        spread = self.variances[features.backend.feature_groups(features.device)] if per_layer else self.variances
        self.feature_scales = spread.sqrt().to(dtype)

    def to(self, dtype: torch.dtype) -> NoisySystem:
        """The same system in another precision."""
        if dtype == self.features.dtype:
            return self
        return NoisySystem(self.features.to(dtype), self.variances.to(dtype), self.noise.to(dtype))

    @property
    def homoscedastic(self) -> bool:
        """Whether all rows have the same noise."""
        return self.noise.shape[0] == 1

    @property
    def observed(self) -> Tensor:
        """Number of rows observed, of all processes `[]`."""
        rows = self.noise.new_tensor(self.features.num_rows)
        return self.features.total(rows if self.homoscedastic else self.noise.isfinite().sum().to(rows))

    @property
    def noise_logdet(self) -> Tensor:
        """log|D| over the rows observed `[]`."""
        if self.homoscedastic:
            return self.observed * self.noise.log().squeeze(0)
        return self.features.total(self.noise[self.noise.isfinite()].log().sum())

    def apply(self, v: Tensor) -> Tensor:
        """Ψ v `[K, n]`."""
        return self.features.jvp(v * self.feature_scales) * self.row_scales

    def adjoint(self, u: Tensor) -> Tensor:
        """Ψᵀ u `[K, F]`."""
        return self.features.vjp(u * self.row_scales) * self.feature_scales

    def product(self, space: Space) -> Callable[[Tensor], Tensor]:
        """v -> Ψ Ψᵀ v (function space) or Ψᵀ Ψ v (weight space)."""
        if space == "function":
            return lambda v: self.apply(self.adjoint(v))
        return lambda v: self.adjoint(self.apply(v))

    def size(self, space: Space) -> int:
        """n or F."""
        return self.features.num_rows if space == "function" else self.features.num_features

    def prior_diagonal(self, per_group: bool = False) -> Tensor:
        """Diagonal of Ψ Ψᵀ `[n]`, or of every group's part of it `[G, n]`, in float64."""
        exact = exact_dtype(self.features.device)
        parts = self.features.diagonal(self.variances.shape[0] > 1).to(exact) * self.row_scales.to(exact).square()
        parts = parts * self.variances.to(exact).unsqueeze(-1)
        return parts if per_group else parts.sum(0)

    def by_group(self, values: Tensor) -> Tensor:
        """Sums of values `[F]` over the features that share a variance `[G]`."""
        if self.variances.shape[0] == 1:
            return values.sum(-1, keepdim=True)
        groups = self.features.backend.feature_groups(self.features.device)
        return values.new_zeros(self.variances.shape[0]).index_add(0, groups, values)
