"""What people call a batch: named tensors with a row per input, and how their numbers become columns of x."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from numbers import Number
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpntk._checks import as_tensor, check_values
from gpntk.errors import InputError

# Single precision holds every whole number up to here, whatever precision x is cast to on its way.
_EXACT = 2**24
# Digits of larger numbers: two columns hold 46 bits, three all of 64.
_BITS = 22
WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_TEXTS = (
    "{name} is text: tokenise it, by tokenizer(texts, padding=True, return_tensors='pt') say, and pass what that gives."
)
Kind = Literal["tensor", "mapping", "tuple", "objects"]
"""What a batch is."""

MASK = "attention_mask"
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Arguments(NamedTuple):
    """What a network is called with: ``network(*args, **kwargs)``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def mask(self) -> Tensor | None:
        """Which tokens count `[N, T]`, if the arguments say so by ``attention_mask``."""
        own = self.args[0] if len(self.args) == 1 and isinstance(self.args[0], Mapping) else self.kwargs
        return own.get(MASK)


@dataclass(frozen=True)
class Leaf:
    """One tensor of a batch, and how its numbers become columns.

    Attributes:
        name: How messages call it; in a dictionary its key.
        shape: Of one row; None for as many columns as x has.
        dtype: Its own; None for that of x.
        digits: Columns per number.
    """

    name: str
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    digits: int = 1

    @staticmethod
    def of(name: str, values: Tensor) -> Leaf:
        """The leaf of a tensor `[N, *shape]` as it is."""
        if values.dtype not in (*WHOLE, *FLOATING):
            raise InputError(f"{name!r} has dtype {values.dtype}: give real floating numbers, integers or booleans.")
        if values.dim() == 0:
            raise InputError(f"{name!r} is a single number: give a tensor with a row per input, or leave it out.")
        digits = 1
        if values.dtype in (torch.int32, torch.int64) and values.numel():
            most = max(abs(int(values.max())), abs(int(values.min())))
            digits = 1 if most <= _EXACT else 2 if most < 2 ** (2 * _BITS + 1) else 3
        return Leaf(name, tuple(values.shape[1:]), values.dtype, digits)

    @property
    def whole(self) -> bool:
        """Whether its numbers are integers or booleans."""
        return self.dtype in WHOLE

    @property
    def width(self) -> int:
        """How many columns of x it takes."""
        return prod(self.shape or ()) * self.digits

    def pack(self, values: Tensor) -> Tensor:
        """Columns `[N, width]` of a tensor `[N, *shape]`; of whole numbers in double precision."""
        flat = values.flatten(1) if values.dim() > 1 else values.unsqueeze(1)
        if not self.whole:
            return flat
        exact = flat.to(torch.int64)
        if not (torch.equal(exact.to(flat.dtype), flat) and torch.equal(exact.to(self.dtype).to(torch.int64), exact)):
            raise InputError(f"{self.name!r} has values that {self.dtype} cannot hold: give whole numbers within it.")
        limit = {1: _EXACT, 2: 2 ** (2 * _BITS + 1)}.get(self.digits)
        if limit is not None and exact.numel() and not (-limit <= int(exact.min()) and int(exact.max()) <= limit):
            raise InputError(
                f"{self.name!r} has whole numbers beyond ±{limit}, which the columns of x cannot hold: the adapter was "
                "made from a batch of smaller ones. Make it from one that has such numbers."
            )
        if self.digits == 1:
            return exact.double()
        low = [(exact >> (_BITS * place)) & (2**_BITS - 1) for place in range(self.digits - 1)]
        return torch.stack([*low, exact >> (_BITS * (self.digits - 1))], -1).flatten(1).double()

    def unpack(self, columns: Tensor, own: bool) -> Tensor:
        """The tensor `[N, *shape]` of its columns; floating ones in their ``own`` dtype or else in that of x."""
        rows = columns.shape[0]
        if not self.whole:
            dtype = self.dtype if own and self.dtype is not None else columns.dtype
            return columns.reshape(rows, *(columns.shape[1:] if self.shape is None else self.shape)).to(dtype)
        if torch.finfo(columns.dtype).eps > 1 / _EXACT * 2:
            raise InputError(f"x is {columns.dtype}, which cannot hold the ids of {self.name!r}: pass x.float().")
        places = columns.detach().round().to(torch.int64).reshape(rows, -1, self.digits)
        values = sum(places[..., place] * 2 ** (_BITS * place) for place in range(self.digits))
        assert isinstance(values, Tensor)
        assert self.shape is not None
        assert self.dtype is not None
        return values.reshape(rows, *self.shape).to(self.dtype)


def is_batch(inputs: Any) -> bool:
    """Whether inputs are a dictionary, several tensors or a list of objects, not one array of rows.

    Raises:
        InputError: They are texts.
    """
    first = inputs.flat[0] if isinstance(inputs, np.ndarray) and inputs.size else inputs
    first = inputs[0] if isinstance(inputs, (list, tuple)) and len(inputs) else first
    if isinstance(first, (str, bytes)):
        raise InputError(_TEXTS.format(name="X"))
    if isinstance(inputs, tuple):
        arrays = bool(inputs) and all(isinstance(one, (Tensor, np.ndarray)) for one in inputs)
        # A tuple of NumPy's vectors is a sequence of rows, as scikit-learn has it.
        return arrays and any(isinstance(one, Tensor) or one.ndim > 1 for one in inputs)
    # A sparse matrix of SciPy's may be a dictionary, too, of pairs of numbers.
    named = isinstance(inputs, Mapping) and all(isinstance(name, str) for name in inputs)
    return named or (isinstance(inputs, list) and _objects(inputs))


def num_rows(batch: Any) -> int:
    """How many inputs a batch has."""
    named = named_tensors(batch)
    return len(batch) if named is None else rows_of(named)


def head(batch: Any, rows: int = 2) -> Any:
    """The first rows of a batch."""
    if isinstance(batch, Mapping):
        return {name: values[:rows] for name, values in batch.items()}
    return tuple(values[:rows] for values in batch) if isinstance(batch, tuple) else batch[:rows]


def named_tensors(batch: Any) -> dict[str, Tensor] | None:
    """The tensors of a batch by name; None if it is a list of objects."""
    if isinstance(batch, Mapping):
        if not batch:
            raise InputError("the batch is an empty dictionary: give tensors by the names that the network takes.")
        return {str(name): _tensor(str(name), values) for name, values in batch.items()}
    if isinstance(batch, tuple) and all(isinstance(one, (Tensor, np.ndarray)) for one in batch):
        return {str(place): _tensor(str(place), values) for place, values in enumerate(batch)}
    if isinstance(batch, list) and _objects(batch):
        return None
    return {"x": _tensor("x", batch)}


def _objects(batch: list[Any]) -> bool:
    """Whether the elements of a list are objects, not numbers, rows of numbers, or tensors of one shape."""
    if batch and all(isinstance(one, Tensor) for one in batch):
        return len({one.shape for one in batch}) > 1
    plain = (Number, np.generic, np.ndarray, str, bytes, list, Tensor, type(None))
    return bool(batch) and not any(isinstance(one, plain) or type(one) is tuple for one in batch)


def _tensor(name: str, values: Any) -> Tensor:
    if isinstance(values, Tensor):
        check_values(values.device, **{name: values})
        return values
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.array(None)
    if array.dtype.kind in "US" or (array.dtype.kind == "O" and array.size and isinstance(array.flat[0], str)):
        raise InputError(_TEXTS.format(name=repr(name)))
    if array.dtype.kind == "O":
        raise InputError(
            f"{name!r} is {type(values).__name__}, which is no tensor: give one row per input, all of one length (a "
            "tokenizer's padding=True, return_tensors='pt'), or leave the entry out."
        )
    return as_tensor(array, name)


def rows_of(named: Mapping[str, Tensor]) -> int:
    """How many rows each of the tensors has."""
    rows = {name: len(values) if values.dim() else 0 for name, values in named.items()}
    if len(set(rows.values())) > 1:
        listed = ", ".join(f"{name!r} has {count}" for name, count in rows.items())
        raise InputError(f"the tensors of a batch have different numbers of rows ({listed}): give one row per input.")
    return next(iter(rows.values()))


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """The name of a dtype, ``"int64"``; None for none."""
    return None if dtype is None else str(dtype).removeprefix("torch.")
