"""The choice of a backend, as an object that can be asked what it would pick and why."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, final

from torch import Tensor, nn

from gpntk._checks import check_choice, check_input
from gpntk.cost import Cost, Machine, table
from gpntk.errors import NetworkError, UnruledError
from gpntk.jacobians.autodiff import AutodiffBackend
from gpntk.jacobians.backend import AbstractDeferredBackend, AbstractJacobianBackend, AbstractTangentBackend
from gpntk.jacobians.backward import BackwardBackend
from gpntk.jacobians.dense import DenseBackend
from gpntk.jacobians.precision import PRECISIONS, Precision
from gpntk.jacobians.stacked import split_parameters
from gpntk.jacobians.structured import StructuredBackend
from gpntk.memory import TensorCache
from gpntk.network import FrozenNetwork

# Columns of the products for which backends are compared.
_COLUMNS = 10
# An explicit J, which is larger than all factors, must cost so much less.
_WORTH_ITS_MEMORY = 0.9
_CHOICES = 64


class Choice(NamedTuple):
    """A backend, the reason it was chosen, and what each strategy would have cost; ``print`` shows them."""

    backend: AbstractJacobianBackend
    reason: str
    costs: tuple[Cost, ...] = ()

    def __str__(self) -> str:
        head = f"{type(self.backend).__name__}: {self.reason}"
        return f"{head}\n{table(self.costs)}" if self.costs else head


class _Uses(NamedTuple):
    """What the first x shows: the backend for parameters with a rule, why others have none, or why none has."""

    structured: StructuredBackend | None
    reasons: dict[str, str]
    error: NetworkError | None


@final
class AutoBackend(AbstractDeferredBackend, AbstractTangentBackend):
    """The backend that suits the network and x, by counting.

    1. Parameters that are used by functions with a rule, all other parameters taken out: `StructuredBackend`, unless
       counting says that the explicit J `[N*C, P]` is cheaper, it fits the budget, and torch.func can make it: then
       `DenseBackend` for all. (A network of few parameters: one GEMM beats a loop over layers.)
    2. The other parameters, if any, by `AutodiffBackend`, or by `BackwardBackend` where torch.func cannot run the
       network or is wrong for it, found out on one row; and only those: `StackedBackend` of both. Their part
       of J is kept (`DenseBackend`) if it fits a quarter of the budget.
    3. For all of them where the network's path through its layers depends on the rows of x, or cannot be followed.
    4. Before all: where an input has more outputs than there are parameters, `DenseBackend`, whose J takes forward mode
       then, if J fits a quarter of the budget.

    Counted are 20 products with 10 columns each; see `gpntk.cost`. The choice depends on the shape of x alone, so that
    the same product gives the same bits whatever was asked before. (How the network uses its parameters is found on the
    first x.)

    Args:
        network: The network, with the parameters to differentiate selected.
        memory_budget: Bytes that temporaries, and what is kept, stay within.
        precision: As in `gpntk.jacobians.StructuredBackend`.

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
        check_choice(PRECISIONS, precision=precision)
        self.precision: Precision = precision
        self._uses: _Uses | None = None
        self._made: dict[str, AbstractJacobianBackend] = {}
        # Counted once for every shape: what is kept here could be counted again with the same result.
        self._choices: dict[Hashable, Choice] = {}

    @staticmethod
    def select(
        network: nn.Module, x: Tensor, memory_budget: int | None = None, precision: Precision = "exact"
    ) -> Choice:
        """The backend for this network and x `[..., N, D]`, with the reason in words and its costs."""
        network = network if isinstance(network, FrozenNetwork) else FrozenNetwork(network)
        check_input(x, network.device)
        return AutoBackend(network, memory_budget, precision).choice(x.reshape(-1, *x.shape[-2:]))

    def choice(self, x: Tensor) -> Choice:
        """Which backend products at x `[B, N, D]` go by, why, and what each would cost."""
        key = (x.shape, x.dtype, x.device)
        if key not in self._choices:
            if len(self._choices) >= _CHOICES:
                self._choices.clear()
            self._choices[key] = self._choose(x)
        return self._choices[key]

    def _choose(self, x: Tensor) -> Choice:
        rows, outputs, parameters = x[..., 0].numel(), self.num_outputs(x), self.num_features
        if outputs > parameters and 4 * rows * outputs * parameters * x.element_size() <= self.memory_budget:
            reason = f"an input has more outputs, {outputs}, than there are parameters, {parameters}"
            return Choice(self._dense(), reason)
        choice = self.by_rules(x)
        if not choice.costs:  # without rules nothing is counted
            return choice
        machine = Machine.of(x.device)
        total = {cost.strategy: cost.seconds(machine) for cost in choice.costs if cost.fits}
        factors = min(total.get("factors, kept", float("inf")), total.get("factors, recomputed", float("inf")))
        if total.get("dense Jacobian", float("inf")) > _WORTH_ITS_MEMORY * factors or self._dense().refusal(x):
            return choice
        reason = f"J is small, {rows * outputs} x {parameters}, and products with all of it cost less"
        return Choice(self._dense(), reason, choice.costs)

    def run(self, x: Tensor, product: Callable[[AbstractJacobianBackend], Any]) -> Any:
        """``product`` with the chosen backend; where x breaks its rules, without rules.

        Another path through the network is found out on any input; a use of parameters that torch does not show only
        on the rows that were checked when the uses were found.
        """
        choice = self.choice(x)
        try:
            return product(choice.backend)
        except NetworkError:
            if choice.backend is self._made.get("no rules"):
                raise
            return product(self._make("no rules", lambda: self._without_rules(self.network, x)[0]))

    def by_rules(self, x: Tensor) -> Choice:
        """The choice for x `[B, N, D]` if an explicit J of all parameters is left out of account."""
        if self._uses is None:
            self._uses = _find(self.network, x, self.memory_budget, self.precision)
            if self._uses.structured is not None:
                self._uses.structured.share_cache(self.cache)
        structured, reasons, error = self._uses
        if structured is None:
            plain, how = self._without_rules(self.network, x)
            if self._small(self.network, x):
                return Choice(self._dense(), f"J is small, and is made by {how}, because {error}")
            return Choice(self._make("no rules", lambda: plain), f"{how}, because {error}")
        costs = structured.costs(x, _COLUMNS)
        if not reasons:
            return Choice(structured, "every selected parameter is used by functions with a structured rule", costs)
        rest = self.network.restrict(list(reasons))
        plain, how = self._without_rules(rest, x)
        if self._small(rest, x):
            plain = DenseBackend(rest, self.memory_budget)
        name = type(plain).__name__
        listed = "; ".join(f"{name!r}, because {reason}" for name, reason in reasons.items())
        backend = self._make(
            f"rules and {name}", lambda: split_parameters(self.network, [structured, plain], self.memory_budget)
        )
        return Choice(backend, f"structured rules, and {name} for {listed}; {how}", costs)

    def share_cache(self, cache: TensorCache) -> None:
        super().share_cache(cache)
        structured = () if self._uses is None or self._uses.structured is None else (self._uses.structured,)
        for backend in (*structured, *self._made.values()):
            backend.share_cache(cache)

    def _small(self, network: FrozenNetwork, x: Tensor) -> bool:
        """Whether J of these parameters, twice, fits a quarter of the budget."""
        values = x[..., 0].numel() * self.num_outputs(x) * network.num_params
        return 2 * values * x.element_size() <= self.memory_budget // 4

    def _dense(self) -> DenseBackend:
        dense = self._make("dense", lambda: DenseBackend(self.network, self.memory_budget))
        assert isinstance(dense, DenseBackend)
        return dense

    def _without_rules(self, network: FrozenNetwork, x: Tensor) -> tuple[AbstractTangentBackend, str]:
        """The backend that needs no rules, and how it goes: by torch.func where that is right."""
        autodiff = AutodiffBackend(network, self.memory_budget)
        if not (refusal := autodiff.refusal(x)):
            return autodiff, "automatic differentiation"
        return BackwardBackend(network, self.memory_budget), f"plain backward passes ({refusal})"

    def _make(self, name: str, make: Callable[[], AbstractJacobianBackend]) -> AbstractJacobianBackend:
        """The backend of this name, made when it is first asked for; one cache, and one budget, for all of them."""
        if name not in self._made:
            self._made[name] = make()
            self._made[name].share_cache(self.cache)
        return self._made[name]


def _find(network: FrozenNetwork, x: Tensor, memory_budget: int, precision: Precision) -> _Uses:
    """Structured rules for every parameter that has one."""
    reasons: dict[str, str] = {}
    while len(reasons) < len(network.names):
        names = [name for name in network.names if name not in reasons]
        structured = StructuredBackend(network.restrict(names) if reasons else network, memory_budget, precision)
        try:
            structured.check(x)
        except UnruledError as error:
            reasons |= error.reasons
        except NetworkError as error:
            return _Uses(None, {}, error)
        else:
            return _Uses(structured, reasons, None)
    return _Uses(None, {}, UnruledError(reasons))
