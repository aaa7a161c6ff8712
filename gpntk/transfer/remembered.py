"""Functions of the inputs that are asked for over and over at the same ones: those of `fit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from gpntk.network import FrozenNetwork

# Rows that a network runs on at once.
_ROWS = 256


@final
class Remembered:
    """A function of x `[N, D]` that keeps its values at the latest few inputs.

    Args:
        function: What to compute, without a graph.
        count: How many inputs to remember.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], count: int) -> None:
        self._function, self._count = function, count
        self._latest: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor) -> Tensor:
        found = next((pair for pair in self._latest if torch.equal(pair[0], x)), None)
        if found is None:
            with torch.no_grad():
                # A copy: whoever changes x in place asks for other values afterwards.
                found = x.clone(), self._function(x)
        others = [pair for pair in self._latest if pair[0] is not found[0]]
        self._latest = [found, *others][: self._count]
        return found[1]

    def __getstate__(self) -> dict[str, Any]:
        # Of those who pickle a model, none expects the inputs that it last predicted at.
        return {**self.__dict__, "_latest": []}


@final
class Outputs:
    """f(x) `[N, C]` of a frozen network, computed in the network's own precision and returned in that of x.

    In double precision convolutions take six times as long, for digits that no label knows; half precision is computed
    in single. The values at the training inputs and at the latest new ones are remembered.

    Args:
        network: The frozen network.
    """

    def __init__(self, network: FrozenNetwork) -> None:
        self._network = network
        self._values = Remembered(self._compute, 2)

    def __call__(self, x: Tensor) -> Tensor:
        return self._values(x)

    def _compute(self, x: Tensor) -> Tensor:
        rows = x.to(torch.promote_types(self._network.dtype, torch.float32)).split(_ROWS)
        return torch.cat([self._network(some) for some in rows]).to(x.dtype)
