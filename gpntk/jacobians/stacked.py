"""Features side by side, Φ = [√w₁ Φ₁ | √w₂ Φ₂ | ...]: their kernel is the weighted sum of the kernels.

`StackedBackend` is the general case. Two of its uses have names: `split_parameters`, where the parameters of one
network go by different backends, and `AverageBackend`, where the outputs of one network share one kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate
from typing import Any, final

import torch
from torch import Tensor

from gpntk._checks import check_functions, check_kinds, check_not_negative
from gpntk.cost import Cost
from gpntk.errors import InputError
from gpntk.jacobians.backend import (
    AbstractDeferredBackend,
    AbstractJacobianBackend,
    AbstractNetworkBackend,
    AbstractTangentBackend,
    Groups,
)
from gpntk.memory import TensorCache
from gpntk.network import FrozenNetwork


@final
class StackedBackend(AbstractJacobianBackend):
    """Φ = [√w₁ Φ₁ | √w₂ Φ₂ | ...] `[N*C, F₁ + F₂ + ...]`, so that the Gram is K = w₁ K₁ + w₂ K₂ + ...

    Products add up, and cost what those of the parts cost together. Groups of features (`per_layer=True`) are those of
    the parts, one after the other: each part, or each of its layers, can have a prior variance of its own.

    Args:
        backends: Backends of equal numbers of outputs C.
        weights: w, at least zero; default all one.
        by_layer: Whether every layer is a group of its own, for all parts or for each; a part with False is one group.
        columns: For each part, the slices of F that its features are, in its order; default one part after another.
        numbers: For each part, the numbers of the groups that its groups belong to; default one part after another.
        memory_budget: Bytes that the parts keep together; default the smallest budget among them.

    Raises:
        InputError: There is no backend, or the parts have different numbers of outputs.

    Example:
        >>> import torch, gpntk
        >>> network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> tangents = gpntk.AutoBackend(gpntk.freeze(network))
        >>> linear = gpntk.jacobians.ExplicitBackend(lambda x: x, num_features=3)
        >>> backend, x = StackedBackend([tangents, linear]), torch.randn(1, 5, 3)
        >>> torch.allclose(backend.gram(x, x), tangents.gram(x, x) + x @ x.mT, atol=1e-5), backend.num_groups
        (True, 3)
    """

    def __init__(
        self,
        backends: Sequence[AbstractJacobianBackend],
        weights: Sequence[float] | None = None,
        *,
        by_layer: bool | Sequence[bool] = True,
        columns: Sequence[Sequence[slice]] | None = None,
        numbers: Sequence[Sequence[int]] | None = None,
        memory_budget: int | None = None,
    ) -> None:
        self.backends = _listed(backends)
        smallest = min(backend.memory_budget for backend in backends)
        super().__init__(backends[0].device, smallest if memory_budget is None else memory_budget)
        given = [1.0] * len(backends) if weights is None else weights
        check_kinds(Sequence, "a number for each backend", weights=given)
        check_not_negative(**{f"weights[{number}]": weight for number, weight in enumerate(given)})
        check_kinds(bool | Sequence, "True, False, or one for each backend", by_layer=by_layer)
        self._scales = [weight**0.5 for weight in given]
        self._by_layer = [by_layer] * len(backends) if isinstance(by_layer, bool) else list(by_layer)
        if not len(self._scales) == len(self._by_layer) == len(backends):
            raise InputError(f"weights and by_layer need one entry for each of {len(backends)} backends.")
        self._placed, self._numbers = columns, numbers
        self.share_cache(TensorCache(self.memory_budget, len(backends)))

    @property
    def terms(self) -> list[tuple[AbstractJacobianBackend, float]]:
        """The parts, each with the factor √w of its features."""
        return list(zip(self.backends, self._scales, strict=True))

    # --- what the features are ---------------------------------------------------------------------------------

    @property
    def num_features(self) -> int:
        return sum(backend.num_features for backend in self.backends)

    def num_outputs(self, x: Tensor) -> int:
        counts = [backend.num_outputs(x) for backend in self.backends]
        if len(set(counts)) > 1:
            raise InputError(f"the stacked backends have {counts} outputs: they must have equally many.")
        return counts[0]

    @property
    def groups(self) -> Groups:
        parts = zip(self._own_groups(), self._group_numbers(), self._columns(), strict=True)
        groups: dict[int, list[slice]] = {}
        for own, numbers, columns in parts:
            for group, number in zip(own, numbers, strict=True):
                groups.setdefault(number, []).extend(piece for part in group for piece in _within(part, columns))
        return tuple(tuple(groups[number]) for number in sorted(groups))

    @property
    def dtype(self) -> torch.dtype:
        return self.backends[0].dtype

    @property
    def device(self) -> torch.device:
        return self.backends[0].device

    @property
    def version(self) -> Hashable:
        return tuple(backend.version for backend in self.backends)

    def weights(self) -> dict[str, Tensor]:
        parts = enumerate(backend.weights() for backend in self.backends)
        return {f"{index}.{name}": weight for index, part in parts for name, weight in part.items()}

    def share_cache(self, cache: TensorCache) -> None:
        super().share_cache(cache)
        for backend in self.backends:
            backend.share_cache(cache)

    # --- products ----------------------------------------------------------------------------------------------

    def jvp(self, x: Tensor, v: Tensor) -> Tensor:
        self.num_outputs(x)  # numbers of features may depend on it
        parts = zip(self.backends, self._scales, self._columns(), strict=True)
        terms = [
            _scaled(backend.jvp(x, torch.cat([v[..., part] for part in columns], -1)), scale)
            for backend, scale, columns in parts
        ]
        return torch.stack(terms).sum(0)

    def vjp(self, x: Tensor, u: Tensor) -> Tensor:
        return self._side_by_side([backend.vjp(x, u) for backend in self.backends])

    def jacobian(self, x: Tensor) -> Tensor:
        return self._side_by_side([backend.jacobian(x) for backend in self.backends])

    def gram(self, x1: Tensor, x2: Tensor, per_layer: bool = False) -> Tensor:
        return self._sum(lambda backend, layers: backend.gram(x1, x2, layers), per_layer)

    def diagonal(self, x: Tensor, per_layer: bool = False) -> Tensor:
        return self._sum(lambda backend, layers: backend.diagonal(x, layers), per_layer)

    def costs(self, x: Tensor, columns: int) -> tuple[Cost, ...]:
        first, *others = (backend.costs(x, columns) for backend in self.backends)
        return tuple(sum_costs(cost, others) for cost in first) if all(others) else ()

    # --- private -----------------------------------------------------------------------------------------------

    def _side_by_side(self, parts: list[Tensor]) -> Tensor:
        parts = [_scaled(part, scale) for part, scale in zip(parts, self._scales, strict=True)]
        if self._placed is None:
            return torch.cat(parts, -1)
        result = parts[0].new_empty(*parts[0].shape[:-1], self.num_features)
        for part, columns in zip(parts, self._placed, strict=True):
            sizes = [columns.stop - columns.start for columns in columns]
            for piece, place in zip(part.split(sizes, -1), columns, strict=True):
                result[..., place] = piece
        return result

    def _sum(self, term: Callable[[AbstractJacobianBackend, bool], Tensor], per_layer: bool) -> Tensor:
        total = None
        parts = zip(self.backends, self._scales, self._by_layer, strict=True)
        for index, (backend, scale, by_layer) in enumerate(parts):
            part = _scaled(term(backend, per_layer and by_layer), scale**2)
            if not per_layer:
                total = part if total is None else total + part
                continue
            if total is None:
                total = part.new_zeros(part.shape[0], self.num_groups, *part.shape[2:])
            total = total.index_add(1, torch.tensor(self._group_numbers()[index], device=part.device), part)
        assert total is not None
        return total

    def _columns(self) -> Sequence[Sequence[slice]]:
        if self._placed is not None:
            return self._placed
        ends = list(accumulate(backend.num_features for backend in self.backends))
        return [(slice(start, end),) for start, end in zip([0, *ends], ends, strict=False)]

    def _own_groups(self) -> list[Groups]:
        """Groups of every part, by its own columns."""
        parts = zip(self.backends, self._by_layer, strict=True)
        return [backend.groups if by else ((slice(0, backend.num_features),),) for backend, by in parts]

    def _group_numbers(self) -> Sequence[Sequence[int]]:
        if self._numbers is not None:
            return self._numbers
        ends = list(accumulate(map(len, self._own_groups())))
        return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def split_parameters(
    network: FrozenNetwork, backends: Sequence[AbstractTangentBackend], memory_budget: int | None = None
) -> StackedBackend:
    """J of one network by several backends, each for some of its parameters; columns and layers are the network's.

    Use it where a few parameters have no structured rule: those go by automatic differentiation, the others by theirs.

    Args:
        network: The network with all selected parameters.
        backends: Each on ``network.restrict(names)``, for names that together are all, once.
        memory_budget: Bytes that all of them keep together.

    Example:
        >>> import torch, gpntk
        >>> network = gpntk.freeze(torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.PReLU(8), torch.nn.Linear(8, 1)))
        >>> parts = [
        ...     gpntk.jacobians.StructuredBackend(network.restrict(["0.weight", "0.bias", "2.weight", "2.bias"])),
        ...     gpntk.jacobians.AutodiffBackend(network.restrict(["1.weight"])),
        ... ]
        >>> split_parameters(network, parts).vjp(torch.randn(1, 5, 3), torch.ones(1, 2, 5)).shape
        torch.Size([1, 2, 49])
    """
    check_kinds(FrozenNetwork, "it frozen, gpntk.freeze(network)", network=network)
    for backend in _listed(backends):
        check_kinds(AbstractNetworkBackend, "backends of parts of the network", backends=backend)
    groups = {name: number for number, (name, _) in enumerate(network.groups)}
    return StackedBackend(
        backends,
        columns=[[network.slices[name] for name in backend.network.names] for backend in backends],
        numbers=[[groups[name] for name, _ in backend.network.groups] for backend in backends],
        memory_budget=memory_budget,
    )


@final
class AverageBackend(AbstractDeferredBackend, AbstractNetworkBackend):
    """Features [J_1(x), ..., J_C(x)] / sqrt(C) `[N, C*P]`, so that the Gram is (1/C) sum_c J_c J_cᵀ `[N, M]`.

    One kernel for all outputs, the average of their own. Made of one single-output backend per output at the first x:
    no C x C block is ever formed. Cost: that of C single outputs.

    Args:
        network: The network.
        factory: Makes a backend for one output of the network.
        memory_budget: Bytes that all of them keep together.
    """

    def __init__(
        self,
        network: FrozenNetwork,
        factory: Callable[[FrozenNetwork], AbstractJacobianBackend],
        memory_budget: int | None = None,
    ) -> None:
        super().__init__(network, memory_budget)
        check_functions(factory=factory)
        self._factory = factory
        self._outputs = 0
        self._stacked: StackedBackend | None = None

    @property
    def num_features(self) -> int:
        return self._stack().num_features

    def num_outputs(self, x: Tensor) -> int:
        return self.run(x, lambda _: 1)

    @property
    def groups(self) -> Groups:
        return self._stack().groups

    def run(self, x: Tensor, product: Callable[[AbstractJacobianBackend], Any]) -> Any:
        if not self._outputs:
            self._outputs = self.network.num_outputs(x)
        return product(self._stack())

    def _stack(self) -> StackedBackend:
        count = self._outputs
        if not count:
            raise InputError("the number of features is C * P, and C is known only once the kernel has seen an input.")
        if self._stacked is None:
            parts = [self._factory(self.network.select_output(c)) for c in range(count)]
            layers = range(parts[0].num_groups)
            self._stacked = StackedBackend(
                parts, [1 / count] * count, numbers=[layers] * count, memory_budget=self.memory_budget
            )
        return self._stacked

    def __getstate__(self) -> dict[str, Any]:
        # A copy builds its own from its own network, so that it follows where that network is moved.
        return {**self.__dict__, "_stacked": None}


def sum_costs(cost: Cost, others: Sequence[tuple[Cost, ...]]) -> Cost:
    """The cost of ``cost`` and of what each of ``others`` takes by the same strategy, or by its cheapest."""
    for costs in others:
        other = next((other for other in costs if other.strategy == cost.strategy), costs[0])
        once, product = cost.once + other.once, cost.product + other.product
        cost = Cost(cost.strategy, once, product, cost.kept + other.kept, cost.fits and other.fits)
    return cost


def _listed(backends: Any) -> tuple[AbstractJacobianBackend, ...]:
    check_kinds(Sequence, "a list of backends", backends=backends)
    for backend in backends:
        check_kinds(AbstractJacobianBackend, "a list of backends", backends=backend)
    if not backends:
        raise InputError("backends is empty: give at least one.")
    return tuple(backends)


def _scaled(part: Tensor, scale: float) -> Tensor:
    return part if scale == 1 else part * scale


def _within(part: slice, columns: Sequence[slice]) -> list[slice]:
    """Where columns ``part`` of a backend are, whose columns are those of ``columns`` one after the other."""
    pieces, start = [], 0
    for place in columns:
        size = place.stop - place.start
        first, last = max(part.start, start), min(part.stop, start + size)
        if first < last:
            pieces.append(slice(place.start + first - start, place.start + last - start))
        start += size
    return pieces
