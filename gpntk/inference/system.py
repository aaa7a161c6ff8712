"""The one linear system behind every Gaussian process here: a covariance and a likelihood's curvature, whitened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor

from gpntk._checks import check_kinds, check_values
from gpntk.cost import Work
from gpntk.errors import DistributedError, InputError
from gpntk.inference.covariance import AbstractCovariance, FeatureCovariance
from gpntk.inference.features import exact_dtype
from gpntk.inference.noise import AbstractNoise, BlockNoise, RowNoise
from gpntk.memory import chunks

Space = Literal["function", "weight"]


class Sizes(NamedTuple):
    """What the costs of solvers are counted from.

    Attributes:
        rows: m, rows of B, over all processes; features: F, 0 for a dense covariance.
        groups: Matrices `[n, n]` that the covariance keeps.
        columns: Right-hand sides to be solved.
        itemsize: Bytes of a value of the data.
        gram: Work of the matrix K.
        product: Work of one product with Rᵀ K R and one column.
        budget: Bytes that may be used.
        sharded: Whether rows are spread over processes.
        spectral: Whether an eigendecomposition serves all hyperparameters, and many will follow.
    """

    rows: int
    features: int
    groups: int
    columns: int
    itemsize: int
    gram: Work
    product: Work
    budget: int
    sharded: bool
    spectral: bool = False


@final
class WhitenedSystem:
    """A prior covariance K and the curvature Λ = R Rᵀ of a likelihood; for Gaussian noise D, Λ = D⁻¹ and R = D^-½.

    All solvers work on one of two matrices, whose smallest eigenvalue is at least 1: with K = Φ S Φᵀ and Ψ = Rᵀ Φ S^½

        B = I + Rᵀ K R = I + Ψ Ψᵀ  (function space)        A = I + Ψᵀ Ψ = I + S^½ Φᵀ Λ Φ S^½  (weight space)

        (K + Λ⁻¹)⁻¹ = R B⁻¹ Rᵀ,      B⁻¹ = I - Ψ A⁻¹ Ψᵀ,      log|B| = log|A| = log|I + K Λ|,

    where Λ may be singular: a row that was not observed is a zero row of R, and counts nowhere.

    Args:
        covariance: K.
        noise: Noise variances D: one for all rows `[1]`, or one per row `[n]`, infinite where nothing was observed.
        root: R `[N, C, q]` instead of ``noise``: one block for each input, of any rank.

    Raises:
        InputError: A noise variance is not positive, a shape does not fit, or there is no data.

    Example:
        >>> import torch, gpntk
        >>> from gpntk.inference import FeatureCovariance, Features, WhitenedSystem
        >>> features = Features(gpntk.AutoBackend(gpntk.freeze(torch.nn.Linear(3, 2))), torch.randn(5, 3))
        >>> system = WhitenedSystem(FeatureCovariance(features, torch.ones(1)), root=torch.ones(5, 2, 1))
        >>> system.size("function"), system.size("weight")
        (5, 8)
    """

    def __init__(
        self, covariance: AbstractCovariance, noise: Tensor | None = None, *, root: Tensor | None = None
    ) -> None:
        check_kinds(AbstractCovariance, "FeatureCovariance(features, variances)", covariance=covariance)
        self.covariance = covariance
        self.noise: Tensor | None = None
        self.root = root
        if not covariance.num_rows and not covariance.sharded:
            raise InputError("x has no rows: give at least one input.")
        if (noise is None) == (root is None):
            raise InputError("give either noise, variances of the rows, or root, the root of the curvature.")
        if root is not None:
            check_values(covariance.device, root=root)
            expected = (covariance.num_samples, covariance.num_outputs)
            if root.dim() != 3 or root.shape[:2] != expected or not bool(root.isfinite().all()):
                raise InputError(f"root must be finite [N, C, q] with N, C = {expected}, got {tuple(root.shape)}.")
            self.likelihood: AbstractNoise = BlockNoise(root.detach().to(covariance.dtype))
            self.homoscedastic = False
            return
        assert noise is not None
        check_values(covariance.device, noise=noise)
        # Hyperparameters are few: they are exact whatever the precision of the data.
        self.noise = noise.detach().to(exact_dtype(covariance.device))
        if self.noise.shape not in ((1,), (covariance.num_rows,)):
            raise InputError(
                f"noise has shape {tuple(self.noise.shape)}: give one variance (1,) or one per row "
                f"({covariance.num_rows},)."
            )
        if not bool((self.noise > 0).all()):
            raise InputError("noise variances must be positive: they are what makes K + D invertible.")
        self.homoscedastic = _homoscedastic(covariance, self.noise)
        self.likelihood = RowNoise(self.noise, covariance.num_outputs, covariance.dtype)

    def __repr__(self) -> str:
        return f"WhitenedSystem({self.covariance!r})"

    def to(self, dtype: torch.dtype) -> WhitenedSystem:
        """The same system in another precision."""
        if dtype == self.covariance.dtype:
            return self
        return WhitenedSystem(self.covariance.to(dtype), self.noise, root=self.root)

    # --- sizes -------------------------------------------------------------------------------------------------

    def size(self, space: Space) -> int:
        """Rows of B or A: m, or F."""
        if space == "function":
            return self.likelihood.size(self.covariance.num_rows)
        return self.weighted.features.num_features

    @property
    def observed(self) -> Tensor:
        """Number of rows observed, of all processes `[]`."""
        return self.covariance.total(self.likelihood.observed(self.covariance.num_rows))

    @property
    def missing(self) -> Tensor:
        """Which rows were not observed `[n]`."""
        if self.root is not None:
            return ~self.root.bool().any(-1).flatten()
        assert self.noise is not None
        return ~self.noise.isfinite().expand(self.covariance.num_rows)

    def targets(self, y: Tensor) -> Tensor:
        """Targets `[K, n]`, with zeros where nothing was observed.

        Raises:
            InputError: y has another shape, or is NaN or infinite where there is an observation.
        """
        rows = self.covariance.num_rows
        if y.dim() != 2 or y.shape[1] != rows:
            given = y.shape[1:] if y.dim() == 2 and len(y) == 1 else y.shape
            raise InputError(f"y has shape {tuple(given)}: give one target per row, ({rows},), or columns [K, {rows}].")
        y = torch.where(self.missing, 0.0, y)
        if not bool(y.isfinite().all()):
            raise InputError("y has NaN or infinite values: give infinite noise to the rows that were not observed.")
        return y

    @property
    def noise_logdet(self) -> Tensor:
        """log|Λ⁻¹| over the rows observed, of all processes `[]`."""
        return self.covariance.total(self.likelihood.logdet(self.covariance.num_rows))

    @property
    def weighted(self) -> FeatureCovariance:
        """The covariance, where it has features; else `InputError`."""
        return self.covariance.weighted

    # --- products ----------------------------------------------------------------------------------------------

    def apply(self, v: Tensor) -> Tensor:
        """Product with the whitened features, Ψ v `[K, m]`."""
        return self.likelihood.whiten(self.weighted.features.jvp(v * self.weighted.scales))

    def adjoint(self, u: Tensor) -> Tensor:
        """Product with the transposed whitened features, Ψᵀ u `[K, F]`."""
        return self.weighted.features.vjp(self.likelihood.unwhiten(u)) * self.weighted.scales

    def product(self, space: Space) -> Callable[[Tensor], Tensor]:
        """v -> Rᵀ K R v (function space) or Ψᵀ Ψ v (weight space)."""
        if space == "function":
            return self._function_product
        # Columns pass through function space a few at a time, so that it may be the larger one.
        features = self.weighted.features
        bytes_each = features.place[1] * features.num_outputs * torch.finfo(features.dtype).bits // 4
        budget = features.memory_budget // 4

        def product(v: Tensor) -> Tensor:
            parts = chunks(v.shape[0], bytes_each, budget)
            return torch.cat([self.adjoint(self.apply(v[part])) for part in parts])

        return product

    def _function_product(self, u: Tensor) -> Tensor:
        return self.likelihood.whiten(self.covariance.product(self.likelihood.unwhiten(u)))

    def matrix(self) -> Tensor:
        """The matrix of function space, B = I + Rᵀ K R `[m, m]`."""
        matrix = self.likelihood.congruence(self.covariance.gram())
        matrix.diagonal().add_(1)
        return matrix

    def rows(self, rows: slice, block: Tensor) -> Tensor:
        """Explicit rows of Ψ `[m', F]` from rows of Φ `[n', F]`, those of whole inputs."""
        outputs = self.covariance.num_outputs
        part = self.likelihood.at(slice(rows.start // outputs, rows.stop // outputs))
        return part.rows(block * self.weighted.scales)

    def diagonal(self) -> Tensor:
        """Diagonal of Rᵀ K R `[m]`, in float64."""
        exact = self.to(exact_dtype(self.covariance.device))
        if self.noise is not None:
            return exact.likelihood.whiten(exact.likelihood.whiten(exact.covariance.prior_diagonal()))
        if self.covariance.features is None:
            return exact.matrix().diagonal() - 1
        pieces = [exact.rows(*part).square().sum(-1) for part in exact.weighted.features.blocks()]
        return torch.cat(pieces) if pieces else torch.zeros(0, dtype=exact.covariance.dtype)

    def group_traces(self) -> Tensor:
        """tr Ψ_gᵀ Ψ_g of every group of weights with one variance, in float64, over all processes."""
        exact = self.to(exact_dtype(self.covariance.device))
        weighted = exact.weighted
        if self.noise is not None and not weighted.per_parameter:
            parts = exact.likelihood.whiten(exact.likelihood.whiten(weighted.features.diagonal(weighted.per_layer)))
            return weighted.features.total((parts * weighted.variances.unsqueeze(-1)).sum(-1))
        total = weighted.scales.new_zeros(weighted.features.num_features)
        for part in weighted.features.blocks():
            total += exact.rows(*part).square().sum(0)
        return weighted.by_group(weighted.features.total(total))


def _homoscedastic(covariance: AbstractCovariance, noise: Tensor) -> bool:
    """Whether all rows have the same noise variance; a process with a single row cannot tell, the others can."""
    one = noise.shape[0] == 1
    if not covariance.sharded:
        return one
    codes = torch.tensor([one and covariance.num_rows != 1, not one], dtype=torch.int64)
    common, each = covariance.total(codes).tolist()
    if common and each:
        raise DistributedError("some ranks give one noise variance, others one for each of their rows.")
    return not each
