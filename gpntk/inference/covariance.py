"""The prior of f at the data: a covariance from features of a network, or from any kernel matrix.

Rows are data-major: row n*C + c is output c of input n. A posterior mean, or a column that conditions on more data, is
a combination of the covariance's functions; what it is a combination of differs: features x -> J(x) w with weights w
`[F]`, or kernel functions x -> k(x, X) a with one coefficient per row of the data `[n]`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from gpntk._checks import check_kinds, check_values
from gpntk.errors import InputError
from gpntk.inference.features import AbstractFeatures, Features, exact_dtype
from gpntk.memory import chunks


class AbstractCovariance(ABC):
    """K = k(X, X) `[n, n]`, n = N*C, and its values at other inputs.

    Args:
        samples: N, inputs that this process holds.
        outputs: C, rows for each.
        dtype: Of the matrices.
        device: Of the matrices.
        memory_budget: Bytes that work stays within.
        features: Φ with K = Φ S Φᵀ, where there is one.
    """

    def __init__(  # noqa: PLR0917
        self,
        samples: int,
        outputs: int,
        dtype: torch.dtype,
        device: torch.device,
        memory_budget: int,
        features: AbstractFeatures | None = None,
    ) -> None:
        self.num_samples, self.num_outputs = samples, outputs
        self.dtype, self.device, self.memory_budget = dtype, device, memory_budget
        self.features = features

    @abstractmethod
    def gram(self) -> Tensor:
        """K `[n, n]`; not to be changed in place."""

    @abstractmethod
    def cross(self, x: Tensor) -> Tensor:
        """Prior covariance of f(x) with f at the data, k(x, X) `[B, T*C, n]`; x `[B, T, D]`, differentiable."""

    @abstractmethod
    def prior(self, x: Tensor) -> Tensor:
        """Prior covariance of f(x), k(x, x) `[B, T*C, T*C]`, for x `[B, T, D]`; differentiable in x."""

    @abstractmethod
    def prior_diagonal(self) -> Tensor:
        """Prior variances at the data, the diagonal of K `[n]`."""

    @abstractmethod
    def product(self, u: Tensor) -> Tensor:
        """The product with the prior covariance, K u `[K, n]`, for columns u `[K, n]`."""

    @abstractmethod
    def coefficients(self, dual: Tensor) -> Tensor:
        """What `values` needs for the functions x -> k(x, X) a, a = ``dual`` `[K, n]`: weights `[K, F]`, or a."""

    @abstractmethod
    def values(self, x: Tensor, coefficients: Tensor) -> Tensor:
        """Those functions at x `[T, D]`, `[K, T*C]`; differentiable in x. Missing last coefficients are zero."""

    @abstractmethod
    def representers(self, x: Tensor) -> Tensor:
        """The coefficients of the functions k(·, x) for x `[T, D]`, `[T*C, F]`; or `[T*C, n + T*C]`, see `widened`."""

    @abstractmethod
    def padded(self, coefficients: Tensor, x: Tensor) -> Tensor:
        """Coefficients `[K, F]`, or `[K, n]` of the first n rows of the data, as those in ``widened(x)``."""

    @abstractmethod
    def widened(self, x: Tensor) -> AbstractCovariance:
        """The covariance whose `values` know `representers` of x `[T, D]`: this one, or that with x among its data."""

    @abstractmethod
    def inputs(self, rows: int) -> Iterator[Tensor]:
        """The inputs of the data, ``rows`` at a time at most."""

    @abstractmethod
    def at(self, x: Tensor) -> AbstractCovariance:
        """The same prior at x `[T, D]` alone."""

    @abstractmethod
    def extended(self, x: Tensor) -> AbstractCovariance:
        """The same prior at the data and, after them, at x `[T, D]`."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> AbstractCovariance:
        """The same covariance in another precision."""

    @property
    @abstractmethod
    def weighted(self) -> FeatureCovariance:
        """The same as a covariance of features.

        Raises:
            InputError: There are none.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}{[self.num_rows, self.num_rows]}"

    @property
    def num_rows(self) -> int:
        """n = N*C, the rows that this process holds."""
        return self.num_samples * self.num_outputs

    @property
    def sharded(self) -> bool:
        """Whether rows are spread over processes."""
        return self.features is not None and self.features.sharded

    def total(self, local: Tensor) -> Tensor:
        """The sum over all processes of what each has."""
        return local if self.features is None else self.features.total(local)


@final
class FeatureCovariance(AbstractCovariance):
    """K = Φ S Φᵀ with a diagonal prior covariance S of the weights.

    Args:
        features: Φ: in memory, streamed, or spread over processes.
        variances: Prior variance S of the weights: one `[1]`, one per layer of the network `[L]`, or one per parameter
            `[F]`; a graph back to it is kept for `gpntk.inference.log_evidence`.

    Raises:
        InputError: A variance is negative, infinite or NaN, or the shape does not fit.

    Example:
        >>> import torch, gpntk
        >>> from gpntk.inference import FeatureCovariance, Features
        >>> features = Features(gpntk.AutoBackend(gpntk.freeze(torch.nn.Linear(3, 2))), torch.randn(5, 3))
        >>> FeatureCovariance(features, torch.ones(1)).gram().shape
        torch.Size([10, 10])
    """

    features: AbstractFeatures  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, features: AbstractFeatures, variances: Tensor) -> None:
        check_kinds(AbstractFeatures, "Features(backend, x)", features=features)
        check_values(features.device, variances=variances)
        super().__init__(
            features.num_samples,
            features.num_outputs,
            features.dtype,
            features.device,
            features.memory_budget,
            features,
        )
        self.given = variances
        # Hyperparameters are few: they are exact whatever the precision of the data.
        self.variances = variances.detach().to(exact_dtype(features.device))
        if not bool(((self.variances >= 0) & self.variances.isfinite()).all()):
            raise InputError("variances: prior variances must be finite and at least zero.")
        self._groups: Tensor | None = None
        self.per_parameter = False
        if self.variances.shape != (1,):
            groups = features.backend.feature_groups(features.device)
            layers, size = int(groups.max()) + 1, features.num_features
            if self.variances.shape == (layers,):
                self._groups = groups
            elif self.variances.shape == (size,):
                self.per_parameter = True
            else:
                raise InputError(
                    f"variances has shape {tuple(self.variances.shape)}: give one prior variance (1,), one per layer "
                    f"({layers},), or one per parameter ({size},)."
                )
        spread = self.spread(self.variances)
        self._spread, self.scales = spread.to(features.dtype), spread.sqrt().to(features.dtype)

    @property
    def weighted(self) -> FeatureCovariance:
        return self

    @property
    def per_layer(self) -> bool:
        """Whether layers have variances of their own."""
        return self._groups is not None

    def gram(self) -> Tensor:
        if self.per_parameter:
            rows = [self.features.jvp(block * self._spread) for _, block in self.features.blocks()]
            matrix = torch.cat(rows)
            return (matrix + matrix.mT) / 2
        return torch.einsum("gnm,g->nm", self.layer_grams(), self.variances.to(self.dtype))

    def layer_grams(self) -> Tensor:
        """Φ_g Φ_gᵀ of every layer `[L, n, n]`, or Φ Φᵀ `[1, n, n]` if all have one variance; kept with the features."""

        def compute() -> Tensor:
            x = torch.cat([x for _, x in self.features.parts()]).unsqueeze(0)
            return self.features.backend.gram(x, x, self.per_layer).squeeze(0)

        return self.features.remember(("gram", self.per_layer, self.dtype), compute)

    def cross(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.per_parameter:
            rows = self._rows(x) * self._spread
            return self.features.jvp(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        flat = x.flatten(0, 1).unsqueeze(0)
        backend = self.features.backend
        pieces = [
            self._combined(backend.gram(flat, part.unsqueeze(0), self.per_layer)) for _, part in self.features.parts()
        ]
        return torch.cat(pieces, -1).squeeze(0).unflatten(0, (x.shape[0], -1))

    def prior(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.per_parameter:
            rows = self.rows(x)
            return rows @ rows.mT
        return self._combined(self.features.backend.gram(x, x, self.per_layer))

    def prior_diagonal(self) -> Tensor:
        if not self.per_parameter:
            return self.variances.to(self.dtype) @ self.features.diagonal(self.per_layer)
        pieces = [block.square() @ self._spread for _, block in self.features.blocks()]
        return torch.cat(pieces) if pieces else self.scales.new_zeros(0)

    def product(self, u: Tensor) -> Tensor:
        # Columns pass through weight space a few at a time, so that it may be the larger one.
        bytes_each = self.features.num_features * torch.finfo(self.dtype).bits // 4
        parts = chunks(u.shape[0], bytes_each, self.memory_budget // 4)
        return torch.cat([self.features.jvp(self.features.vjp(u[part]) * self._spread) for part in parts])

    def coefficients(self, dual: Tensor) -> Tensor:
        return self.features.vjp(dual) * self._spread

    def values(self, x: Tensor, coefficients: Tensor) -> Tensor:
        x = x.to(self.dtype).unsqueeze(0)
        return self.features.backend.jvp(x, coefficients.unsqueeze(0)).squeeze(0)

    def representers(self, x: Tensor) -> Tensor:
        return self.rows(x.unsqueeze(0)).squeeze(0) * self.scales

    def padded(self, coefficients: Tensor, x: Tensor) -> Tensor:  # noqa: ARG002
        return coefficients

    def widened(self, x: Tensor) -> FeatureCovariance:  # noqa: ARG002
        return self

    def inputs(self, rows: int) -> Iterator[Tensor]:
        for _, x in self.features.parts():
            yield from x.split(rows)

    def at(self, x: Tensor) -> FeatureCovariance:
        return FeatureCovariance(Features(self.features.backend, x.to(self.dtype)), self.given)

    def extended(self, x: Tensor) -> FeatureCovariance:
        return FeatureCovariance(self.features.extended(x), self.given)

    def to(self, dtype: torch.dtype) -> FeatureCovariance:
        return self if dtype == self.dtype else FeatureCovariance(self.features.to(dtype), self.given)

    def rows(self, x: Tensor) -> Tensor:
        """Rows of features times prior deviations, J(x) S^½ `[B, T*C, F]` for x `[B, T, D]`."""
        return self._rows(x.to(self.dtype)) * self.scales

    def spread(self, values: Tensor) -> Tensor:
        """Values in the shape of the variances as one for each parameter `[F]`, or `[1]` if all have the same."""
        return values if self._groups is None else values[self._groups]

    def by_group(self, values: Tensor) -> Tensor:
        """Sums of values `[F]` over the features that share a variance, in the shape of the variances."""
        if self._groups is not None:
            return values.new_zeros(self.variances.shape[0]).index_add(0, self._groups, values)
        return values if self.per_parameter else values.sum(-1, keepdim=True)

    def _rows(self, x: Tensor) -> Tensor:
        return self.features.backend.jacobian(x)

    def _combined(self, parts: Tensor) -> Tensor:
        """Sum of the layers' Grams `[B, L, n, m]`, each times its variance."""
        return torch.einsum("bgnm,g->bnm", parts, self.variances.to(self.dtype))
