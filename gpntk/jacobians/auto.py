"""The choice of a backend, as an object that can be asked what it would pick and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, final

from torch import Tensor, nn

from gpntk.errors import NetworkError
from gpntk.jacobians.autodiff import AutodiffBackend
from gpntk.jacobians.backend import AbstractJacobianBackend
from gpntk.jacobians.dense import DenseBackend
from gpntk.jacobians.structured import StructuredBackend
from gpntk.network import FrozenNetwork

_DENSE_MAX_PARAMS = 512


class Choice(NamedTuple):
    """A backend and the reason it was chosen."""

    backend: AbstractJacobianBackend
    reason: str


@final
class AutoBackend(AbstractJacobianBackend):
    """The backend that suits the network, chosen at the first x it sees.

    The first that holds:

    1. P <= 512, and J `[N*C, P]` fits the budget: `DenseBackend`, because one GEMM beats a loop over layers.
    2. Every selected parameter's layer has a rule, and a sample of rows agrees with autodiff: `StructuredBackend`.
    3. Else `AutodiffBackend`, with the reason.

    Example:
        >>> import torch
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(30, 99), torch.nn.Tanh(), torch.nn.Linear(99, 1))
        >>> choice = AutoBackend.select(FrozenNetwork(mlp), torch.randn(1, 20, 30))
        >>> type(choice.backend).__name__, choice.reason
        ('StructuredBackend', 'every selected parameter belongs to a layer with a structured rule')
    """

    def __init__(self, network: FrozenNetwork, memory_budget: int | None = None) -> None:
        super().__init__(network, memory_budget)
        self._choice: Choice | None = None

    @staticmethod
    def select(network: nn.Module, x: Tensor, memory_budget: int | None = None) -> Choice:
        """The backend for this network and x `[..., N, D]`, with the reason in words."""
        network = network if isinstance(network, FrozenNetwork) else FrozenNetwork(network)
        x = x.reshape(-1, *x.shape[-2:])
        dense = DenseBackend(network, memory_budget)
        entries = x.shape[:-1].numel() * network.num_outputs(x) * network.num_params
        if network.num_params <= _DENSE_MAX_PARAMS and 2 * entries * x.element_size() <= dense.memory_budget:
            return Choice(dense, f"P = {network.num_params} is small and the whole Jacobian fits the memory budget")
        try:
            structured = StructuredBackend(network, memory_budget)
            structured.check(x)
        except NetworkError as error:
            return _by_autodiff(network, memory_budget, error)
        return Choice(structured, "every selected parameter belongs to a layer with a structured rule")

    def choice(self, x: Tensor) -> Choice:
        """The choice in force, made now if x is the first input seen."""
        if self._choice is None:
            self._choice = self.select(self.network, x, self.memory_budget)
            self._choice.backend.cache = self.cache  # one budget for both
        return self._choice

    def jvp(self, x: Tensor, v: Tensor) -> Tensor:
        return self._run(x, lambda backend: backend.jvp(x, v))

    def vjp(self, x: Tensor, u: Tensor) -> Tensor:
        return self._run(x, lambda backend: backend.vjp(x, u))

    def gram(self, x1: Tensor, x2: Tensor, per_layer: bool = False) -> Tensor:
        return self._run(x1, lambda backend: backend.gram(x1, x2, per_layer))

    def diagonal(self, x: Tensor, per_layer: bool = False) -> Tensor:
        return self._run(x, lambda backend: backend.diagonal(x, per_layer))

    def jacobian(self, x: Tensor) -> Tensor:
        return self._run(x, lambda backend: backend.jacobian(x))

    def _run(self, x: Tensor, product: Callable[[AbstractJacobianBackend], Tensor]) -> Tensor:
        """``product`` with the chosen backend; if that finds its rules broken by a later input, with autodiff.

        A layer that runs again, or on other rows, is found out on any input; other misuse only on the rows that were
        checked when the choice was made.
        """
        choice = self.choice(x)
        if not isinstance(choice.backend, StructuredBackend):
            return product(choice.backend)
        try:
            return product(choice.backend)
        except NetworkError as error:
            self._choice = _by_autodiff(self.network, self.memory_budget, error)
            return product(self._choice.backend)


def _by_autodiff(network: FrozenNetwork, memory_budget: int | None, error: NetworkError) -> Choice:
    return Choice(AutodiffBackend(network, memory_budget), f"automatic differentiation, because {error}")
