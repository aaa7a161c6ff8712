"""What a network's forward takes, packed into one tensor x `[N, D]`, and unpacked again without loss.

GPyTorch, and every engine here, knows inputs as rows of numbers. Networks take images, token ids, dictionaries of ids
and masks, several tensors, or graphs. An `Adapter` stands between the two: a batch is a number of named tensors with
one row per input, and each has its place among the columns of x.

    batch  --pack-->  x [N, D]  --arguments-->  forward(*args, **kwargs)

Whole numbers stay exact: what one column of single precision cannot hold is written in digits of 22 bits.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gpntk._checks import as_shape, check_choice, check_count, check_flags, check_kinds
from gpntk.errors import InputError
from gpntk.network.batches import FLOATING, MASK, WHOLE, Arguments, Kind, Leaf, dtype_name, named_tensors, rows_of
from gpntk.network.calls import binds, padding_of, runs, spreads

_IDS = "input_ids"


@final
class Adapter:
    """Packs what a network's forward takes into x `[N, D]`, and unpacks it: ``unpack(pack(batch)) == batch``.

    A batch is a tensor `[N, ...]`; a dictionary of tensors (a tokenizer's ``BatchEncoding``), which forward gets as
    keyword arguments if it has their names, else as one dictionary; a tuple of tensors, which it gets as positional
    arguments if it takes so many, else as one tuple; or a list of objects, graphs say, whose rows in x are numbers of
    objects that the adapter keeps. Integers and booleans are whole in x, so derivatives by them are zero; floating
    tensors are differentiable in x.

    `gpntk.freeze` makes one from ``inputs`` and keeps it as ``network.adapter``.

    Args:
        kind: What a batch is.
        leaves: Its tensors, in the order of their columns.
        spread: Whether forward gets them as several arguments.
        padding: What pads the ids of shorter texts.

    Example:
        >>> import torch, gpntk
        >>> ids, mask = torch.tensor([[5, 7, 2], [5, 9, 0]]), torch.tensor([[True, True, True], [True, True, False]])
        >>> def forward(ids, mask): ...
        >>> adapter = gpntk.network.Adapter.of({"ids": ids, "mask": mask}, forward)
        >>> x = adapter.pack({"ids": ids, "mask": mask})
        >>> x.shape, adapter.unpack(x)["mask"].dtype, adapter
        (torch.Size([2, 6]), torch.bool, Adapter(ids int64 [3], mask bool [3]: 6 columns, as keywords))
    """

    def __init__(self, kind: Kind, leaves: Sequence[Leaf], spread: bool = False, padding: int = 0) -> None:
        self.kind: Kind = kind
        self.leaves, self.spread, self.padding = tuple(leaves), spread, padding
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}

    @staticmethod
    def of_shape(shape: Sequence[int] | None) -> Adapter:
        """The adapter of floating tensors whose rows have this shape; None for rows of any number of columns."""
        if isinstance(shape, int):
            raise InputError(f"input_shape={shape} must be a sequence: pass ({shape},).")
        return Adapter("tensor", [Leaf("x", None if shape is None else as_shape(shape), None)])

    @staticmethod
    def of(batch: Any, forward: Any) -> Adapter:
        """The adapter of batches like this one, for a network or function that takes them.

        Raises:
            InputError: The batch has texts, ragged lists, or tensors with other numbers of rows; or names that forward
                does not take.
        """
        if isinstance(batch, Adapter):
            return batch
        named = named_tensors(batch)
        if named is None:
            return Adapter("objects", [Leaf("row", (), torch.int64)])
        rows_of(named)
        kind: Kind = "mapping" if isinstance(batch, Mapping) else "tuple" if isinstance(batch, tuple) else "tensor"
        leaves = [Leaf.of(name, values) for name, values in named.items()]
        if not any(leaf.width for leaf in leaves):
            raise InputError("the batch has no columns: give tensors with numbers in their rows.")
        function = forward.forward if isinstance(forward, nn.Module) else forward
        adapter = Adapter(kind, leaves, spreads(kind, named, function), padding_of(forward))
        if kind == "tuple" and adapter.spread and binds(function, tuple(named)) and not runs(forward, named.values()):
            adapter.spread = False
        return adapter

    # --- batches and x -----------------------------------------------------------------------------------------

    def pack(self, batch: Any, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        """x `[N, D]` of a batch like the one that the adapter was made from.

        Texts of another padded length are padded, or cut where nothing but padding is lost.

        Args:
            batch: The batch.
            dtype: Of x; by default that of the floating tensors, at least single precision.
            device: Of x; by default that of the batch.

        Raises:
            InputError: The batch has other tensors, shapes or larger whole numbers than the adapter knows.
        """
        named = named_tensors(batch)
        if named is None or self.kind == "objects":
            return torch.tensor([[self._row(one)] for one in self._checked_objects(batch)], device=device).to(
                dtype or torch.get_default_dtype()
            )
        given = "mapping" if isinstance(batch, Mapping) else "tuple" if isinstance(batch, tuple) else "tensor"
        expected = [leaf.name for leaf in self.leaves]
        if given != self.kind or set(named) != set(expected):
            raise InputError(
                f"the batch is a {given} of {', '.join(map(repr, named))}, but the network was given a {self.kind} of "
                f"{', '.join(map(repr, expected))} when it was frozen or fitted: pass the same."
            )
        rows_of(named)
        named = self._of_one_length(named)
        for leaf in self.leaves:
            if leaf.shape is not None and named[leaf.name].shape[1:] != leaf.shape and self._bare is not leaf:
                raise InputError(
                    f"{leaf.name!r} has rows of shape {tuple(named[leaf.name].shape[1:])}, but the network was given "
                    f"rows of shape {leaf.shape} when it was frozen or fitted: pass the same."
                )
        columns = [leaf.pack(named[leaf.name]) for leaf in self.leaves]
        if dtype is None:
            dtype = torch.float32
            for leaf in self.leaves:
                dtype = dtype if leaf.whole else torch.promote_types(dtype, named[leaf.name].dtype)
        device = columns[0].device if device is None else device
        return torch.cat([column.to(device=device, dtype=dtype) for column in columns], 1)

    def unpack(self, x: Tensor) -> Any:
        """The batch of x `[N, D]`: a tensor, dictionary, tuple or list, each tensor in its own dtype."""
        return self._batch(self._leaves(x, own=True)) if self.kind != "objects" else self._chosen(x, None)

    def arguments(self, x: Tensor) -> Arguments:
        """What the network is called with for x `[N, D]`; floating tensors in the dtype of x, differentiable in it."""
        if self.kind == "objects":
            return Arguments((self._chosen(x, x.dtype),), {})
        # Copies: the first layer may work in place.
        leaves = [values.clone() for values in self._leaves(x, own=False)]
        batch = self._batch(leaves)
        if not self.spread:
            return Arguments((batch,), {})
        return Arguments((), batch) if self.kind == "mapping" else Arguments(tuple(batch), {})

    # --- what it is --------------------------------------------------------------------------------------------

    @property
    def width(self) -> int | None:
        """D; None if x may have any number of columns."""
        return None if self._any_width else sum(leaf.width for leaf in self.leaves)

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """Shape of one input, where inputs are floating tensors; else None."""
        return None if self._bare is None else self._bare.shape

    @property
    def continuous(self) -> bool:
        """Whether every column of x is a number that may change by little, not an id, a mask or an object."""
        return not any(leaf.whole for leaf in self.leaves)

    @property
    def is_array(self) -> bool:
        """Whether a batch is one floating array."""
        return self._bare is not None

    def facts(self) -> dict[str, Any]:
        """The layout as plain facts, for a file; see `from_facts`.

        Raises:
            InputError: The adapter keeps objects.
        """
        if self.kind == "objects":
            raise InputError("inputs that are a list of objects cannot be saved to this format: pickle instead.")
        rows = [
            [leaf.name, None if leaf.shape is None else list(leaf.shape), dtype_name(leaf.dtype), leaf.digits]
            for leaf in self.leaves
        ]
        return {"kind": self.kind, "leaves": rows, "spread": self.spread, "padding": self.padding}

    @staticmethod
    def from_facts(facts: Mapping[str, Any]) -> Adapter:
        """The adapter that `facts` describes.

        Raises:
            InputError: They describe none.
        """
        dtypes = {dtype_name(dtype): dtype for dtype in (None, *WHOLE, *FLOATING)}
        try:
            kind, spread, padding, rows = (facts[name] for name in ("kind", "spread", "padding", "leaves"))
            leaves = [
                Leaf(name, None if shape is None else tuple(shape), dtypes[dtype], digits)
                for name, shape, dtype, digits in rows
            ]
        except (KeyError, TypeError, ValueError):
            raise InputError(f"adapter={facts!r}: these are no facts of an adapter.") from None
        check_choice(("tensor", "mapping", "tuple"), **{"adapter's kind": kind})
        check_flags(**{"adapter's spread": spread})
        check_count(-(2**63), **{"adapter's padding": padding})
        for leaf in leaves:
            check_kinds(str, "text", **{"adapter's name": leaf.name})
            check_count(**{"adapter's digits": leaf.digits})
            for size in leaf.shape or ():
                check_count(0, **{"adapter's shape": size})
        if not leaves or (kind == "tensor" and len(leaves) > 1):
            raise InputError(f"adapter={facts!r}: a {kind} has other tensors.")
        return Adapter(kind, leaves, spread, padding)

    def __copy__(self) -> Adapter:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapter:
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._numbers = {id(one): number for number, one in enumerate(self._objects)}

    def __repr__(self) -> str:
        if self.kind == "objects":
            return f"Adapter({len(self._objects)} objects: 1 column)"
        listed = [
            f"{leaf.name} {dtype_name(leaf.dtype) or ''} {'' if leaf.shape is None else list(leaf.shape)}".strip()
            for leaf in self.leaves
        ]
        how = {"mapping": "as keywords", "tuple": "as arguments"}.get(self.kind, "") if self.spread else "as one"
        return f"Adapter({', '.join(listed)}: {self.width or 'any number of'} columns, {how})"

    # --- private -----------------------------------------------------------------------------------------------

    @property
    def _bare(self) -> Leaf | None:
        leaf = self.leaves[0]
        return leaf if self.kind == "tensor" and not leaf.whole else None

    @property
    def _any_width(self) -> bool:
        return self.leaves[0].shape is None

    def _leaves(self, x: Tensor, own: bool) -> list[Tensor]:
        width = x.shape[1:].numel()
        if self._any_width:
            return [self.leaves[0].unpack(x, own)]
        if width != self.width:
            if self._bare is not None:
                raise InputError(
                    f"x has {width} values per row, but input_shape={self._bare.shape} needs {self.width}: flatten "
                    "each input, or correct input_shape."
                )
            raise InputError(f"x has {width} columns, but {self} has others: pass network.adapter.pack(batch).")
        parts = x.reshape(-1, width).split([leaf.width for leaf in self.leaves], 1)
        return [leaf.unpack(part, own) for leaf, part in zip(self.leaves, parts, strict=True)]

    def _batch(self, leaves: Sequence[Tensor]) -> Any:
        if self.kind == "mapping":
            return {leaf.name: values for leaf, values in zip(self.leaves, leaves, strict=True)}
        return tuple(leaves) if self.kind == "tuple" else leaves[0]

    def _of_one_length(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """Texts padded or cut to the length that the adapter was made with, where a mask says which tokens count."""
        lengths = {leaf.name: leaf.shape for leaf in self.leaves}
        known = lengths.get(MASK)
        if not known or named[MASK].dim() != 2:
            return named
        mask, length = named[MASK], known[0]
        given = mask.shape[1]
        if given == length:
            return named
        kept = slice(0, length)
        if given > length and bool(mask[:, length:].any()):
            kept = slice(given - length, given)
            if bool(mask[:, : given - length].any()):
                raise InputError(
                    f"texts are {given} tokens long, but the network was given {length} when it was frozen or fitted: "
                    f"tokenise both with padding='max_length', max_length={given}, or with truncation=True."
                )
        result = dict(named)
        for name, values in named.items():
            shape = lengths[name]
            if not shape or shape[0] != length or values.shape[1:] != (given, *shape[1:]):
                continue
            if given > length:
                result[name] = values[:, kept]
            else:
                missing = (len(values), length - given, *shape[1:])
                filled = values.new_full(missing, self.padding if name == _IDS else 0)
                result[name] = torch.cat([values, filled], 1)
        return result

    def _checked_objects(self, batch: Any) -> list[Any]:
        if self.kind != "objects" or not isinstance(batch, list):
            what, expected = type(batch).__name__, "a list of objects" if self.kind == "objects" else f"a {self.kind}"
            raise InputError(f"the batch is a {what}, but the network was given {expected} when it was frozen.")
        return batch

    def _row(self, one: Any) -> int:
        """The number of an object, which is kept from now on; the same object has the same number."""
        if id(one) not in self._numbers:
            self._numbers[id(one)] = len(self._objects)
            self._objects.append(one)
        return self._numbers[id(one)]

    def _chosen(self, x: Tensor, dtype: torch.dtype | None) -> list[Any]:
        numbers = x.detach().reshape(len(x), -1)[:, 0].round().to(torch.int64).tolist()
        if numbers and not 0 <= min(numbers) <= max(numbers) < len(self._objects):
            raise InputError(
                f"x names objects {min(numbers)} to {max(numbers)}, but the adapter keeps {len(self._objects)}: make x "
                "by network.adapter.pack(objects)."
            )
        chosen = [self._objects[number] for number in numbers]
        return chosen if dtype is None else [_cast(one, dtype, x.device) for one in chosen]


@final
class Adapted(nn.Module):
    """A network of x `[N, D]`, from one that takes what an adapter unpacks.

    Args:
        network: The network.
        adapter: The adapter.
    """

    def __init__(self, network: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.network, self.adapter = network, adapter

    def forward(self, x: Tensor) -> Any:
        """What the network returns for the inputs that x stands for."""
        arguments = self.adapter.arguments(x)
        return self.network(*arguments.args, **arguments.kwargs)


# --- private ---------------------------------------------------------------------------------------------------------


def _cast(one: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """An object with its floating tensors in another dtype, where it is a container of tensors or a dataclass."""

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else value.dtype)

    if is_dataclass(one) and not isinstance(one, type):
        result = copy.copy(one)
        for field in fields(one):
            object.__setattr__(result, field.name, tree_map(moved, getattr(one, field.name)))
        return result
    return tree_map(moved, one)
