"""A record of every call of a torch function that a network makes: for a few rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from gpntk.network import FrozenNetwork


class Call(NamedTuple):
    """One call of a torch function.

    Attributes:
        leaves: Its arguments, flattened.
        outputs: The tensors it returned; values: copies of them as they were.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[Any]
    outputs: list[Tensor]
    values: list[Tensor]


@final
class Recorder(TorchFunctionMode):
    """Keeps every call and all tensors: for a few rows."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        leaves = tree_flatten((args, kwargs))[0]
        returned = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_flatten(returned)[0] if isinstance(leaf, Tensor)]
        if outputs:
            values = [output.detach().clone() for output in outputs]
            self.calls.append(Call(func, args, kwargs, leaves, outputs, values))
        return returned


def storages(calls: Iterable[Call]) -> list[int]:
    """Sizes of the distinct tensors that a run made; those it was given, such as weights, and their views left out."""
    given: set[int] = set()
    made: dict[int, int] = {}
    for call in calls:
        given |= {_place(leaf) for leaf in call.leaves if isinstance(leaf, Tensor)} - made.keys()
        outputs = {_place(out): math.prod(out.shape) for out in call.outputs if out.is_floating_point()}
        made |= {place: size for place, size in outputs.items() if place not in given}
    return list(made.values())


def _place(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        # A tensor within torch.func, or a sparse one, shows no memory.
        return id(tensor)


def row_values(network: FrozenNetwork, row: Tensor) -> int:
    """Values that the forward pass of one row `[1, D]` makes."""
    with Recorder() as recorder:
        network(row)
    return max(1, sum(storages(recorder.calls)))


def no_pattern(size: int, like: Tensor) -> Tensor:
    """Numbers `[size]` that show no pattern, to compare two ways of computing with; the same every time."""
    return torch.arange(1, size + 1, dtype=like.dtype, device=like.device).cos()
