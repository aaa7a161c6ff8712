"""The interface of a Jacobian backend: what its features are, and how products with them are computed.

Layout inside every backend: B batches, N rows, C outputs, K columns, F features (F = P, the selected parameters, unless
said otherwise), G groups of features. Columns lead, so that one column is contiguous in memory:

    x [B, N, D]    u [B, K, N*C]    v [B, K, F]    gram [B, G, N*C, M*C]    diagonal [B, G, N*C]

Rows of the Jacobian are data-major: row n*C + c belongs to output c of row n. Groups are the whole of F (G = 1), or the
network's layers (`per_layer=True`): K = sum_g variance_g K_g, so a prior variance per layer costs no new product.

Laws, for every backend (see `gpntk.testing`):

    <u, jvp(x, v)> = <vjp(x, u), v>              adjoint
    jvp(x, vjp(x2, u)) = gram(x, x2).sum(1) u    Gram
    diagonal(x) = diag gram(x, x)
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from gpntk._checks import check_kinds
from gpntk.cost import Cost
from gpntk.jacobians.rules import inner_products
from gpntk.memory import TensorCache, budget_on, chunks
from gpntk.network import FrozenNetwork

Groups = tuple[tuple[slice, ...], ...]
"""For every group of features, the columns of J that belong to it."""


class AbstractJacobianBackend(ABC):
    """How products with the features J(x) `[N*C, F]` are computed.

    Every product is differentiable in x and in its other arguments. What depends on x alone is kept in ``cache``.

    Args:
        device: Where the features are computed.
        memory_budget: Bytes that temporaries, and what is kept, stay within; default `gpntk.memory.default_budget`.
    """

    def __init__(self, device: torch.device, memory_budget: int | None = None) -> None:
        self.memory_budget = budget_on(device, memory_budget)
        self.cache = TensorCache(self.memory_budget)
        # Tells the entries of backends that share a cache apart; copies and pickles of a backend share theirs.
        self._identity = uuid.uuid4().hex

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_features:,} features)"

    # --- what the features are ---------------------------------------------------------------------------------

    @property
    @abstractmethod
    def num_features(self) -> int:
        """F, the number of columns of J."""

    @abstractmethod
    def num_outputs(self, x: Tensor) -> int:
        """The number of outputs C, rows of J for every row of x."""

    @property
    @abstractmethod
    def groups(self) -> Groups:
        """The columns of every group that may have a prior variance of its own, e.g. of every layer."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype in which the weights are stored; computations run in the dtype of x."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the features are computed."""

    @property
    @abstractmethod
    def version(self) -> Hashable:
        """Changes whenever the function behind the features does."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The weights that the features are derivatives with respect to, by name, to tell features apart by."""

    # --- products ----------------------------------------------------------------------------------------------

    @abstractmethod
    def jvp(self, x: Tensor, v: Tensor) -> Tensor:
        """Jacobian-vector products J(x) v `[B, K, N*C]` for v `[B, K, F]`."""

    @abstractmethod
    def vjp(self, x: Tensor, u: Tensor) -> Tensor:
        """Vector-Jacobian products J(x)ᵀ u `[B, K, F]` for u `[B, K, N*C]`."""

    @abstractmethod
    def gram(self, x1: Tensor, x2: Tensor, per_layer: bool = False) -> Tensor:
        """Tangent kernel of every group g of parameters, J_g(x1) J_g(x2)ᵀ `[B, G, N*C, M*C]`."""

    @abstractmethod
    def diagonal(self, x: Tensor, per_layer: bool = False) -> Tensor:
        """Diagonal of ``gram(x, x)``, `[B, G, N*C]`, without forming it."""

    @abstractmethod
    def jacobian(self, x: Tensor) -> Tensor:
        """The matrix of features J(x) itself, `[B, N*C, F]`."""

    @abstractmethod
    def costs(self, x: Tensor, columns: int) -> tuple[Cost, ...]:
        """What products with so many columns cost by each strategy, the cheapest first; empty if not counted."""

    # --- what follows ------------------------------------------------------------------------------------------

    @property
    def num_groups(self) -> int:
        """The number of groups G that ``per_layer=True`` tells apart."""
        return len(self.groups)

    def feature_groups(self, device: torch.device) -> Tensor:
        """The number of the group that each feature belongs to, `[F]`."""
        numbers = torch.empty(self.num_features, dtype=torch.long, device=device)
        for number, group in enumerate(self.groups):
            for columns in group:
                numbers[columns] = number
        return numbers

    def remember(self, kind: Hashable, tensors: tuple[Tensor, ...], compute: Callable[[], Any]) -> Any:
        """``compute()``, or what it gave the last time for the same tensors and the same weights; never change it."""
        return self.cache.get((kind, self._identity, self.version), tensors, compute)

    def holds(self, kind: Hashable, tensors: tuple[Tensor, ...]) -> bool:
        """Whether `remember` would compute nothing."""
        return self.cache.holds((kind, self._identity, self.version), tensors)

    def share_cache(self, cache: TensorCache) -> None:
        """Keep what is kept in ``cache``, within its budget."""
        self.cache = cache


class AbstractNetworkBackend(AbstractJacobianBackend, ABC):
    """The features are made of one frozen network.

    Args:
        network: The network, with the parameters to differentiate selected.
        memory_budget: Bytes that temporaries, and what is kept, stay within.
    """

    def __init__(self, network: FrozenNetwork, memory_budget: int | None = None) -> None:
        check_kinds(FrozenNetwork, "it frozen, gpntk.freeze(network)", network=network)
        super().__init__(network.device, memory_budget)
        self.network = network

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.network.summary})"

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def version(self) -> Hashable:
        return self.network.version

    def weights(self) -> dict[str, Tensor]:
        return self.network.selected(self.dtype, self.device)


class AbstractTangentBackend(AbstractNetworkBackend, ABC):
    """The features are J(x) = df(x; w)/dw `[N*C, P]` themselves; every layer is a group, or what the network says."""

    @property
    def num_features(self) -> int:
        return self.network.num_params

    def num_outputs(self, x: Tensor) -> int:
        return self.network.num_outputs(x)

    @property
    def groups(self) -> Groups:
        return tuple(columns for _, columns in self.network.groups)


class AbstractDeferredBackend(AbstractJacobianBackend, ABC):
    """Products by another backend, which is made when the first x is seen."""

    @abstractmethod
    def run(self, x: Tensor, product: Callable[[AbstractJacobianBackend], Any]) -> Any:
        """``product`` of the backend that does the work for x."""

    def jvp(self, x: Tensor, v: Tensor) -> Tensor:
        return self.run(x, lambda backend: backend.jvp(x, v))

    def vjp(self, x: Tensor, u: Tensor) -> Tensor:
        return self.run(x, lambda backend: backend.vjp(x, u))

    def gram(self, x1: Tensor, x2: Tensor, per_layer: bool = False) -> Tensor:
        # What suits the many rows suits the few.
        larger = x1 if x1.shape[1] >= x2.shape[1] else x2
        return self.run(larger, lambda backend: backend.gram(x1, x2, per_layer))

    def diagonal(self, x: Tensor, per_layer: bool = False) -> Tensor:
        return self.run(x, lambda backend: backend.diagonal(x, per_layer))

    def jacobian(self, x: Tensor) -> Tensor:
        return self.run(x, lambda backend: backend.jacobian(x))

    def costs(self, x: Tensor, columns: int) -> tuple[Cost, ...]:
        return self.run(x, lambda backend: backend.costs(x, columns))


def jacobian_by_rows(backend: AbstractJacobianBackend, x: Tensor) -> Tensor:
    """J(x) `[B, N*C, F]` by vjp: each row of x as a batch of its own, one unit cotangent per output."""
    batch, rows, _ = x.shape
    outputs = backend.num_outputs(x)
    unit = torch.eye(outputs, dtype=x.dtype, device=x.device).expand(batch * rows, outputs, outputs)
    return backend.vjp(x.reshape(batch * rows, 1, -1), unit).reshape(batch, rows * outputs, backend.num_features)


def row_chunks(backend: AbstractJacobianBackend, x: Tensor) -> list[slice]:
    """Chunks of the rows of x `[B, N, D]` whose Jacobian, and a copy of it, fit the budget."""
    row_bytes = 2 * x.shape[0] * backend.num_outputs(x) * backend.num_features * x.element_size()
    return list(chunks(x.shape[1], row_bytes, backend.memory_budget))


def contracted_jvp(backend: AbstractJacobianBackend, x: Tensor, v: Tensor) -> Tensor:
    """J(x) v `[B, K, N*C]` by the rows of J, a chunk of them at a time."""
    return torch.cat([inner_products(v, backend.jacobian(x[:, rows])) for rows in row_chunks(backend, x)], dim=-1)


def contracted_vjp(backend: AbstractJacobianBackend, x: Tensor, u: Tensor) -> Tensor:
    """J(x)ᵀ u `[B, K, F]` by the rows of J, a chunk of them at a time."""
    c = backend.num_outputs(x)
    parts = [u[..., r.start * c : r.stop * c] @ backend.jacobian(x[:, r]) for r in row_chunks(backend, x)]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def contracted_gram(backend: AbstractJacobianBackend, x1: Tensor, x2: Tensor, per_layer: bool) -> Tensor:
    """J_g(x1) J_g(x2)ᵀ `[B, G, N*C, M*C]`: 2*N*M*C²*F flops once the Jacobians are there."""
    groups = _groups(backend, per_layer)
    blocks = []
    for rows in row_chunks(backend, x1):
        left = backend.jacobian(x1[:, rows])
        columns = []
        for others in row_chunks(backend, x2):
            right = left if x1 is x2 and rows == others else backend.jacobian(x2[:, others])
            terms = [sum(inner_products(left[..., part], right[..., part]) for part in group) for group in groups]
            columns.append(torch.stack(terms, dim=1))  # pyright: ignore[reportArgumentType]
        blocks.append(torch.cat(columns, dim=-1))
    return torch.cat(blocks, dim=-2)


def contracted_diagonal(backend: AbstractJacobianBackend, x: Tensor, per_layer: bool) -> Tensor:
    """Squared norms of the rows of every group of the Jacobian, |J_g(x)|² `[B, G, N*C]`."""
    groups = _groups(backend, per_layer)
    parts = []
    for rows in row_chunks(backend, x):
        jacobian = backend.jacobian(x[:, rows])
        terms = [sum(jacobian[..., part].square().sum(-1) for part in group) for group in groups]
        parts.append(torch.stack(terms, dim=1))  # pyright: ignore[reportArgumentType]
    return torch.cat(parts, dim=-1)


def _groups(backend: AbstractJacobianBackend, per_layer: bool) -> Groups:
    return backend.groups if per_layer else ((slice(0, backend.num_features),),)
