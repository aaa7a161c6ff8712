"""The choice of a backend, as an object that can be asked what it would pick and why."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, final

from torch import Tensor, nn

from gpntk.cost import Cost, Machine, table
from gpntk.errors import NetworkError, UnruledError
from gpntk.jacobians.autodiff import AutodiffBackend
from gpntk.jacobians.backend import AbstractDeferredBackend, AbstractJacobianBackend, AbstractTangentBackend
from gpntk.jacobians.dense import DenseBackend
from gpntk.jacobians.precision import Precision
from gpntk.jacobians.stacked import StackedBackend, split_parameters
from gpntk.jacobians.structured import StructuredBackend
from gpntk.network import FrozenNetwork

# Columns of a product, and products in all, for which the choice is made: a few solves by conjugate gradients.
_COLUMNS = 10
_PRODUCTS = 50
# How many times more rows than those it was made for a choice is good for.
_GROWTH = 8
# An explicit J, which is larger than all factors, must cost so much less.
_WORTH_ITS_MEMORY = 0.9


class Choice(NamedTuple):
    """A backend, the reason it was chosen, and what each strategy would have cost; ``print`` shows them."""

    backend: AbstractJacobianBackend
    reason: str
    costs: tuple[Cost, ...] = ()

    def __str__(self) -> str:
        head = f"{type(self.backend).__name__}: {self.reason}"
        return f"{head}\n{table(self.costs)}" if self.costs else head


@final
class AutoBackend(AbstractDeferredBackend, AbstractTangentBackend):
    """The backend that suits the network, chosen at the first x it sees.

    1. Parameters that are used by functions with a rule, all other parameters taken out: `StructuredBackend`, unless
       counting says that the explicit J `[N*C, P]` is cheaper and it fits the budget: then `DenseBackend` for all.
       (A network of few parameters: one GEMM beats a loop over layers.)
    2. The other parameters, if any, by automatic differentiation, and only those: `StackedBackend` of both. Their part
       of J is kept (`DenseBackend`) if it fits a quarter of the budget.
    3. `AutodiffBackend` for all where the network's path through its layers depends on the rows of x.
    4. Before all: where an input has more outputs than there are parameters, `DenseBackend`, whose J takes forward mode
       then, if J fits a quarter of the budget.

    Counted are 50 products with 10 columns each; see `gpntk.cost`.

    Example:
        >>> import torch
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(99, 400), torch.nn.Tanh(), torch.nn.Linear(400, 1))
        >>> choice = AutoBackend.select(FrozenNetwork(mlp), torch.randn(1, 500, 99))
        >>> type(choice.backend).__name__, choice.reason
        ('StructuredBackend', 'every selected parameter is used by functions with a structured rule')
    """

    def __init__(
        self, network: FrozenNetwork, memory_budget: int | None = None, precision: Precision = "exact"
    ) -> None:
        super().__init__(network, memory_budget)
        self.precision: Precision = precision
        self._choice: Choice | None = None
        self._rows = 0

    @staticmethod
    def select(
        network: nn.Module, x: Tensor, memory_budget: int | None = None, precision: Precision = "exact"
    ) -> Choice:
        """The backend for this network and x `[..., N, D]`, with the reason in words and its costs."""
        network = network if isinstance(network, FrozenNetwork) else FrozenNetwork(network)
        x = x.reshape(-1, *x.shape[-2:])
        dense = DenseBackend(network, memory_budget)
        outputs, params = network.num_outputs(x), network.num_params
        if outputs > params and 4 * x[..., 0].numel() * outputs * params * x.element_size() <= dense.memory_budget:
            return Choice(dense, f"an input has more outputs, {outputs}, than there are parameters, {params}")
        choice = by_rules(network, x, memory_budget, precision)
        machine = Machine.of(x.device)
        total = {
            cost.strategy: (cost.once + cost.product.times(_PRODUCTS)).seconds(machine)
            for cost in choice.costs
            if cost.fits
        }
        factors = min(total.get("factors, kept", float("inf")), total.get("factors, recomputed", float("inf")))
        if total.get("dense Jacobian", float("inf")) > _WORTH_ITS_MEMORY * factors:
            return choice
        reason = f"J is small, {x[..., 0].numel() * outputs} x {params}, and products with all of it cost less"
        return Choice(dense, reason, choice.costs)

    def choice(self, x: Tensor) -> Choice:
        """The choice in force, made now if x is the first input seen, or far larger than the one it was made for."""
        rows = x.shape[:-1].numel()
        if self._choice is None or rows > _GROWTH * self._rows:
            self._choice = self.select(self.network, x, self.memory_budget, self.precision)
            self._choice.backend.share_cache(self.cache)  # one budget for both
            self._rows = rows
        return self._choice

    def run(self, x: Tensor, product: Callable[[AbstractJacobianBackend], Any]) -> Any:
        """``product`` with the chosen backend; if that finds its rules broken by a later input, with autodiff.

        Another path through the network is found out on any input; a use of parameters that torch does not show only
        on the rows that were checked when the choice was made.
        """
        choice = self.choice(x)
        if not isinstance(choice.backend, (StructuredBackend, StackedBackend)):
            return product(choice.backend)
        try:
            return product(choice.backend)
        except NetworkError as error:
            self._choice = _by_autodiff(self.network, self.memory_budget, error)
            self._rows = sys.maxsize
            return product(self._choice.backend)


def by_rules(network: FrozenNetwork, x: Tensor, memory_budget: int | None, precision: Precision = "exact") -> Choice:
    """Structured rules for every parameter that has one, automatic differentiation for the others."""
    reasons: dict[str, str] = {}
    while True:
        names = [name for name in network.names if name not in reasons]
        if not names:
            return _by_autodiff(network, memory_budget, UnruledError(reasons))
        structured = StructuredBackend(network.restrict(names) if reasons else network, memory_budget, precision)
        try:
            structured.check(x)
        except UnruledError as error:
            reasons |= error.reasons
        except NetworkError as error:
            return _by_autodiff(network, memory_budget, error)
        else:
            break
    costs = structured.costs(x, _COLUMNS)
    if not reasons:
        return Choice(structured, "every selected parameter is used by functions with a structured rule", costs)
    rest = network.restrict(list(reasons))
    size = 2 * x.shape[:-1].numel() * network.num_outputs(x) * rest.num_params * x.element_size()
    plain = DenseBackend if size <= structured.memory_budget // 4 else AutodiffBackend
    listed = "; ".join(f"{name!r}, because {reason}" for name, reason in reasons.items())
    split = split_parameters(network, [structured, plain(rest, structured.memory_budget)], structured.memory_budget)
    return Choice(split, f"structured rules, and {plain.__name__} for {listed}", costs)


def _by_autodiff(network: FrozenNetwork, memory_budget: int | None, error: NetworkError) -> Choice:
    return Choice(AutodiffBackend(network, memory_budget), f"automatic differentiation, because {error}")
