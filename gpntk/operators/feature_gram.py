"""The Gram matrix of Jacobian features as a lazy operator."""

from __future__ import annotations

from typing import Any, final

import torch
from linear_operator import to_linear_operator
from linear_operator.operators import DiagLinearOperator, LinearOperator
from linear_operator.utils.memoize import cached
from torch import Tensor

from gpntk.cost import Machine, cheapest
from gpntk.errors import InputError
from gpntk.inference import AbstractSolver, AutoSolver, FeatureCovariance, Features
from gpntk.jacobians.backend import AbstractJacobianBackend
from gpntk.memory import chunks, tracks_gradient
from gpntk.operators.batching import Index, batch_product, collapse, flatten_batch, row_to_sample, zero_product
from gpntk.operators.noisy_gram import AbstractGramLinearOperator, NoisyGramLinearOperator, elements, noisy_gram

_ALL = slice(None)


@final
class FeatureGramLinearOperator(AbstractGramLinearOperator):
    """J(x1) S J(x2)ᵀ `[..., N*C, M*C]`, with S = variance_g on the features of group g.

    Products cost one vjp and one jvp; sub-rows and sub-columns are the same operator on fewer inputs; a constant factor
    is folded into the variances, and an added diagonal gives a `NoisyGramLinearOperator`. First derivatives are exact
    through products and solves, second ones through ``to_dense``.

    Args:
        x1: Row inputs `[..., N, D]`.
        x2: Column inputs `[..., M, D]`.
        variances: Prior variance of each group of features `[..., G, 1]`: G = 1, or one per layer.
        backend: How Jacobian products are computed; passed by reference, never copied.
        solver: How systems with this matrix plus a diagonal are solved; default `gpntk.inference.AutoSolver`.

    Example:
        >>> import torch
        >>> from gpntk import AutoBackend, FrozenNetwork
        >>> backend = AutoBackend(FrozenNetwork(torch.nn.Linear(3, 1)))
        >>> x = torch.randn(5, 3)
        >>> gram = FeatureGramLinearOperator(x, x, torch.ones(1, 1), backend=backend)
        >>> torch.allclose(gram.to_dense(), x @ x.T + 1, atol=1e-6)
        True
    """

    def __init__(
        self,
        x1: Tensor,
        x2: Tensor,
        variances: Tensor,
        *,
        backend: AbstractJacobianBackend,
        solver: AbstractSolver | None = None,
    ) -> None:
        super().__init__(x1, x2, variances, backend=backend, solver=solver)
        self._x1, self._x2, self._variances = x1, x2, variances
        self._backend, self._solver = backend, solver
        if self._per_layer and x1.numel():
            backend.num_outputs(x1)  # the groups may depend on it
            if variances.shape[-2] != backend.num_groups:
                raise InputError(
                    f"variances has {variances.shape[-2]} prior variances, but the features have {backend.num_groups} "
                    "group(s): give one variance, or one per group."
                )

    # --- shape -------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"{type(self).__name__}{list(self.shape)}"

    def _size(self) -> torch.Size:
        batch = torch.broadcast_shapes(*(arg.shape[:-2] for arg in (self._x1, self._x2, self._variances)))
        outputs = self._backend.num_outputs(self._x1)
        return torch.Size([*batch, self._x1.shape[-2] * outputs, self._x2.shape[-2] * outputs])

    def _transpose_nonbatch(self) -> FeatureGramLinearOperator:
        return self._like(self._x2, self._x1, self._variances)

    def _expand_batch(self, batch_shape: torch.Size | list[int]) -> FeatureGramLinearOperator:
        return self._like(*(arg.expand(*batch_shape, *arg.shape[-2:]) for arg in self._arguments))

    def _unsqueeze_batch(self, dim: int) -> FeatureGramLinearOperator:
        return self._like(*(arg.unsqueeze(dim) for arg in self._expand_batch(self.batch_shape)._arguments))

    def _permute_batch(self, *dims: int) -> FeatureGramLinearOperator:
        full = self._expand_batch(self.batch_shape)._arguments
        return self._like(*(arg.permute(*dims, -2, -1) for arg in full))

    # --- products ----------------------------------------------------------------------------------------------

    def _matmul(self, rhs: Tensor) -> Tensor:
        if 0 in self.shape or 0 in rhs.shape:
            return zero_product(self.shape, rhs)
        if self._by_gram(rhs.shape[-1]):
            return self.to_dense() @ rhs
        features = batch_product(self._backend.vjp, self._x2, rhs.mT)
        if self._per_layer:
            return batch_product(self._backend.jvp, self._x1, features * self._feature_variances.unsqueeze(-2)).mT
        return batch_product(self._backend.jvp, self._x1, features).mT * self._variances

    def _by_gram(self, columns: int) -> bool:
        """Whether 20 products cost less by the Gram itself: a function of sizes alone, whatever was asked before."""
        x = collapse(self._x1)
        if not self._same_inputs or tracks_gradient(x) or x.shape[:-2].numel() > 1:
            return False
        costs = self._backend.costs(x.reshape(1, *x.shape[-2:]), columns)
        kept = (1 + self._variances.shape[-2]) * self._x1.element_size() * self.shape[-2] * self.shape[-1]
        if not costs or kept > self._backend.memory_budget // 2:
            return False
        return cheapest(costs, Machine.of(x.device)) == "Gram"

    def _t_matmul(self, rhs: Any) -> Tensor:
        return self._transpose_nonbatch()._matmul(rhs)

    def _bilinear_derivative(self, left_vecs: Tensor, right_vecs: Tensor) -> tuple[Tensor | None, ...]:
        if self._x1.requires_grad or self._x2.requires_grad:
            return super()._bilinear_derivative(left_vecs, right_vecs)
        if not self._variances.requires_grad:
            return None, None, None
        # d(uᵀ K v)/d(variance_g) = sum over columns and features of g of (J1ᵀ u) (J2ᵀ v): two vjps, no graph.
        left = batch_product(self._backend.vjp, self._x1, left_vecs.mT)
        right = batch_product(self._backend.vjp, self._x2, right_vecs.mT)
        per_feature = (left * right).sum(-2)
        if not self._per_layer:
            return None, None, per_feature.sum(-1)[..., None, None].sum_to_size(self._variances.shape)
        per_layer = per_feature.new_zeros(*per_feature.shape[:-1], self._variances.shape[-2])
        per_layer = per_layer.index_add(-1, self._backend.feature_groups(self._x1.device), per_feature)
        return None, None, per_layer.unsqueeze(-1).sum_to_size(self._variances.shape)

    @cached
    def to_dense(self) -> Tensor:
        if 0 in self.shape:
            return self._x1.new_zeros(self.shape)
        x1, x2 = collapse(self._x1), collapse(self._x2)
        batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
        one = flatten_batch(x1, batch)
        two = one if self._same_inputs else flatten_batch(x2, batch)
        grams = self._backend.remember(
            ("gram", self._per_layer), (one, two), lambda: self._backend.gram(one, two, self._per_layer)
        )
        grams = grams.unflatten(0, batch) if batch else grams[0]
        if not self._per_layer:
            return (grams.squeeze(-3) * self._variances).expand(self.shape)
        return (grams * self._variances.unsqueeze(-1)).sum(-3).expand(self.shape)

    def _diagonal(self) -> Tensor:
        if 0 in self.shape:
            return self._x1.new_zeros(self.shape[:-1])
        if not self._same_inputs:
            batch = self.batch_shape
            one, two = (flatten_batch(x, batch).flatten(0, 1).unsqueeze(1) for x in (self._x1, self._x2))
            blocks = self._backend.gram(one, two, self._per_layer).diagonal(dim1=-2, dim2=-1)
            parts = blocks.unflatten(0, (-1, self._x1.shape[-2])).movedim(-2, -3).flatten(-2)
        else:
            batch = collapse(self._x1).shape[:-2]
            parts = self._backend.diagonal(flatten_batch(collapse(self._x1), batch), self._per_layer)
        parts = parts.unflatten(0, batch) if batch else parts[0]
        return (parts * self._variances).sum(-2).expand(self.shape[:-1])

    def zero_mean_mvn_samples(self, num_samples: int) -> Tensor:
        """Exact samples of N(0, K) `[S, ..., N*C]`: one tangent product J S^(1/2) e per sample, no root of K."""
        if not self._same_inputs:
            return super().zero_mean_mvn_samples(num_samples)
        self._backend.num_outputs(self._x1)  # the number of features may depend on it
        size = self._backend.num_features
        scale = self._feature_variances.sqrt().unsqueeze(-2)
        batch, samples = self.batch_shape, []
        bytes_each = 3 * batch.numel() * size * self._x1.element_size()
        for part in chunks(num_samples, bytes_each, self._backend.memory_budget):
            shape = (*batch, part.stop - part.start, size)
            noise = torch.randn(shape, dtype=self._x1.dtype, device=self._x1.device)
            samples.append(batch_product(self._backend.jvp, self._x1, noise * scale))
        return torch.cat(samples, dim=-2).movedim(-2, 0)

    # --- constants and diagonals stay inside -------------------------------------------------------------------

    def mul(self, other: float | Tensor | LinearOperator) -> LinearOperator:
        """K times a constant, or a constant for each element of a batch (for which the host would form K)."""
        if isinstance(other, Tensor) and other.shape[-2:] == (1, 1):
            return self._mul_constant(other[..., 0, 0])
        return super().mul(other)

    def _mul_constant(self, other: float | Tensor) -> FeatureGramLinearOperator:
        factor = torch.as_tensor(other, dtype=self._variances.dtype, device=self._variances.device)
        return self._like(self._x1, self._x2, self._variances * factor[..., None, None])

    def add_diagonal(self, diag: Tensor) -> NoisyGramLinearOperator:
        """The kernel matrix plus a diagonal, K + diag(d), as a `NoisyGramLinearOperator`."""
        added: Any = super().add_diagonal(diag)
        return noisy_gram(added._linear_op, added._diag_tensor)

    def __add__(self, other: Tensor | LinearOperator | float) -> LinearOperator | Tensor:
        if isinstance(other, DiagLinearOperator):
            return noisy_gram(self, other)
        return super().__add__(other)

    def covariances(self, batch_shape: torch.Size) -> list[FeatureCovariance] | None:
        x = collapse(self._x1)
        if x.shape[:-2].numel() != 1 or not self._same_inputs or tracks_gradient(x) or 0 in self.shape:
            return None
        features = Features(self._backend, x.reshape(x.shape[-2:]))
        return [FeatureCovariance(features, each) for each in elements(self._variances.squeeze(-1), batch_shape)]

    @property
    def solver(self) -> AbstractSolver:
        return self._solver or AutoSolver()

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """The inputs of rows and columns, x1 `[..., N, D]` and x2 `[..., M, D]`."""
        return self._x1, self._x2

    # --- indexing ----------------------------------------------------------------------------------------------

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        rows, columns = self.shape[-2:]
        outputs = self._backend.num_outputs(self._x1)
        samples = row_to_sample(row_index, rows, outputs), row_to_sample(col_index, columns, outputs)
        if samples[0] is None or samples[1] is None:
            # Some outputs of a sample: evaluate the samples that are touched, then pick.
            touched = [self._touched(index, size) for index, size in ((row_index, rows), (col_index, columns))]
            block = self._getitem(touched[0][0], touched[1][0], *batch_indices).to_dense()
            return to_linear_operator(block[..., touched[0][1], :][..., touched[1][1]])
        x1, x2, variances = self._expand_batch(self.batch_shape)._arguments
        return self._like(
            x1[(*batch_indices, samples[0], _ALL)], x2[(*batch_indices, samples[1], _ALL)], variances[batch_indices]
        )

    def _touched(self, index: Index, size: int) -> tuple[slice, Tensor]:
        """The smallest aligned slice of rows that covers ``index``, and the index inside it."""
        outputs = self._backend.num_outputs(self._x1)
        rows = torch.arange(size, device=self._x1.device)[index]
        first = int(rows.min()) // outputs * outputs if rows.numel() else 0
        last = (int(rows.max()) // outputs + 1) * outputs if rows.numel() else 0
        return slice(first, last), rows - first

    def _get_indices(self, row_index: Any, col_index: Any, *batch_indices: Any) -> Tensor:
        indices = torch.broadcast_tensors(row_index, col_index, *batch_indices)
        row, column, *where = (index.flatten() for index in indices)
        if not where:
            rows, row_of = torch.unique(row, return_inverse=True)
            columns, column_of = torch.unique(column, return_inverse=True)
            if rows.numel() * columns.numel() <= 2 * row.numel():
                # Whole rows (pivoted Cholesky asks for those): one small block.
                return self._block(rows, columns)[row_of, column_of].view(indices[0].shape)
        return self._entries(row, column, tuple(where)).view(indices[0].shape)

    def _entries(self, row: Tensor, column: Tensor, where: tuple[Tensor, ...]) -> Tensor:
        """Single entries: each pair of samples as a batch of its own."""
        outputs = self._backend.num_outputs(self._x1)
        x1, x2, variances = self._expand_batch(self.batch_shape)._arguments
        bytes_each = 2 * outputs * self._backend.num_features * self._x1.element_size()
        parts = []
        for part in chunks(row.numel(), bytes_each, self._backend.memory_budget):
            batch = tuple(index[part] for index in where)
            one = x1[(*batch, row[part] // outputs)].unsqueeze(1)
            two = x2[(*batch, column[part] // outputs)].unsqueeze(1)
            grams = self._backend.gram(one, two, self._per_layer)
            entry = torch.arange(grams.shape[0], device=grams.device)
            picked = grams[entry, :, row[part] % outputs, column[part] % outputs]
            parts.append((picked * (variances[batch] if batch else variances).squeeze(-1)).sum(-1))
        return torch.cat(parts) if parts else self._x1.new_zeros(0)

    def _block(self, rows: Tensor, columns: Tensor) -> Tensor:
        """K[rows][:, columns] for sorted rows and columns, through the samples they belong to."""
        outputs = self._backend.num_outputs(self._x1)
        one, two = torch.unique(rows // outputs), torch.unique(columns // outputs)
        # All samples are the same tensor still, whose factors are at hand.
        x1 = self._x1 if one.numel() == self._x1.shape[-2] else self._x1[one]
        x2 = self._x2 if two.numel() == self._x2.shape[-2] else self._x2[two]
        block = self._like(x1, x2, self._variances).to_dense()
        left = torch.searchsorted(one, rows // outputs) * outputs + rows % outputs
        right = torch.searchsorted(two, columns // outputs) * outputs + columns % outputs
        return block[left][:, right]

    @property
    def _arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._x1, self._x2, self._variances

    def _like(self, x1: Tensor, x2: Tensor, variances: Tensor) -> FeatureGramLinearOperator:
        return FeatureGramLinearOperator(x1, x2, variances, backend=self._backend, solver=self._solver)

    @property
    def _per_layer(self) -> bool:
        return self._variances.shape[-2] > 1

    @property
    def _feature_variances(self) -> Tensor:
        """The variance of every feature, `[..., F]` (or `[..., 1]` for a single group)."""
        variances = self._variances.squeeze(-1)
        return variances[..., self._backend.feature_groups(variances.device)] if self._per_layer else variances

    @property
    def _same_inputs(self) -> bool:
        """Whether x1 and x2 may be taken for one tensor: equal values, and no gradient to keep apart."""
        one, two = self._x1, self._x2
        if one is two:
            return True
        if one.shape != two.shape or tracks_gradient(one) or tracks_gradient(two):
            return False
        same_memory = one.data_ptr() == two.data_ptr() and one.stride() == two.stride()
        return same_memory or torch.equal(one, two)
