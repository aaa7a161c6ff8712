"""What a network makes of inputs, for prior means and for kernels of features: values that are computed once."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from gpntk.memory import TensorCache
from gpntk.network import FrozenNetwork

# Rows that a network runs on at once; bytes of its outputs that are remembered.
_ROWS, _REMEMBERED = 256, 2**28


@final
class Outputs:
    """f(x) `[N, C]` of a frozen network, computed in the network's own precision and returned in that of x.

    In double precision convolutions take six times as long, for digits that no label knows; half precision is computed
    in single. The values at the latest inputs are remembered.

    Args:
        network: The frozen network.
    """

    def __init__(self, network: FrozenNetwork) -> None:
        self._network, self._cache = network, TensorCache(_REMEMBERED)

    def __call__(self, x: Tensor) -> Tensor:
        return self._cache.get("outputs", (x,), lambda: self._compute(x))

    def _compute(self, x: Tensor) -> Tensor:
        rows = x.to(torch.promote_types(self._network.dtype, torch.float32)).split(_ROWS)
        with torch.no_grad():
            return torch.cat([self._network(some) for some in rows]).to(x.dtype)


@final
class Represented:
    """What a stationary kernel or a readout is given: inputs, or features of a network, in their own unit.

    Args:
        features: The features; None for the inputs themselves.
        unit: A number, or one for each column.
        bias: Whether a column of ones is added.
    """

    def __init__(self, features: Outputs | None, unit: Tensor, bias: bool = False) -> None:
        self._features, self._unit, self._bias = features, unit, bias

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        rows = flat if self._features is None else self._features(flat)
        if self._bias:
            rows = torch.cat([rows, torch.ones_like(rows[:, :1])], -1)
        return (rows / self._unit).unflatten(0, x.shape[:-1])
