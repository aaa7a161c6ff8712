"""Where data that do not fit into memory are read from: arrays on disk, datasets, loaders.

A source is read from its beginning, as often as there are passes over the data, and must give the same rows in the
same order each time.

    array         anything with a length and slices: a memory-mapped numpy array, an HDF5 data set    slices
    `Dataset`     map-style, items x or (x, y)                                                        item by item
    `DataLoader`  batches x or (x, y), not shuffled                                                   batch by batch
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, TensorDataset

from gpntk.errors import InputError

# Items of a dataset that are read at once where nothing else says how many.
_ITEMS = 4096


class AbstractSource(ABC):
    """Rows x, and targets y where there are any, in one order.

    Args:
        num_rows: How many there are.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    @abstractmethod
    def pieces(self, rows: int) -> Iterator[Tensor]:
        """All x in order, as pieces `[b, ...]` of about so many rows, in the source's own dtype, on the CPU."""

    @abstractmethod
    def take(self, chosen: Sequence[int]) -> Tensor:
        """The rows x `[M, ...]` at increasing places ``chosen``."""

    @abstractmethod
    def targets(self) -> Iterator[Tensor]:
        """All y in order, as pieces `[b, ...]`."""


def as_source(source: Any) -> AbstractSource:
    """The source that reads ``source``.

    Raises:
        InputError: It cannot be read twice in the same order, or has no length.
    """
    if isinstance(source, AbstractSource):
        return source
    if isinstance(source, DataLoader):
        return LoaderSource(source)
    if isinstance(source, TensorDataset):
        return ArraySource(*source.tensors[:2])
    if isinstance(source, IterableDataset):
        raise InputError(
            f"{type(source).__name__} is an IterableDataset: wrap it in a DataLoader with a batch_size (if it has a "
            "length), or give a map-style Dataset or an array."
        )
    if isinstance(source, Dataset):
        return DatasetSource(source)
    return ArraySource(source)


@final
class ArraySource(AbstractSource):
    """An array that can be sliced; numpy arrays and tensors are also read at single places."""

    def __init__(self, x: Any, y: Any = None) -> None:
        try:
            super().__init__(len(x))
            x[0:0]
        except (TypeError, KeyError):
            raise InputError(
                f"a {type(x).__name__} cannot be read as data: give an array that has a length and can be sliced, a "
                "map-style Dataset, or a DataLoader with shuffle=False."
            ) from None
        self._x, self._y = x, y

    def pieces(self, rows: int) -> Iterator[Tensor]:
        return _slices(self._x, rows)

    def take(self, chosen: Sequence[int]) -> Tensor:
        if isinstance(self._x, (np.ndarray, Tensor)):
            return _copy(self._x[list(chosen)])
        return torch.cat([_copy(self._x[place : place + 1]) for place in chosen] or [_copy(self._x[0:0])])

    def targets(self) -> Iterator[Tensor]:
        if self._y is None:
            raise InputError(
                "an array has no targets: read them from a Dataset or DataLoader, or from their own array."
            )
        return _slices(self._y, _ITEMS)


@final
class DatasetSource(AbstractSource):
    """A map-style dataset, read item by item; wrap it in a `DataLoader` to have several workers read it."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        try:
            super().__init__(len(dataset))  # pyright: ignore[reportArgumentType]
        except (TypeError, NotImplementedError):
            raise InputError(f"{type(dataset).__name__} has no length: give it __len__.") from None
        self._dataset = dataset

    def pieces(self, rows: int) -> Iterator[Tensor]:
        # Not as long as the memory budget allows: each item is an object of its own until they are joined.
        size = min(rows, _ITEMS)
        return (
            self._stack(range(start, min(start + size, self.num_rows)), 0) for start in range(0, self.num_rows, size)
        )

    def take(self, chosen: Sequence[int]) -> Tensor:
        return self._stack(chosen, 0)

    def targets(self) -> Iterator[Tensor]:
        for start in range(0, self.num_rows, _ITEMS):
            yield self._stack(range(start, min(start + _ITEMS, self.num_rows)), 1)

    def _stack(self, places: Iterable[int], part: int) -> Tensor:
        items: list[Tensor] = []
        for place in places:
            item = torch.as_tensor(_part(self._dataset[place], part))
            if items and item.shape != items[0].shape:
                raise InputError(f"row {place} has shape {tuple(item.shape)}, others have {tuple(items[0].shape)}.")
            items.append(item)
        return torch.stack(items) if items else torch.zeros(0)


@final
class LoaderSource(AbstractSource):
    """A loader that gives the same batches in each pass."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        _check_order(loader)
        self._loader, batches = loader, loader.batch_sampler
        # A length that batches or workers may change is not believed but counted.
        counted = (
            isinstance(loader.dataset, IterableDataset) or not isinstance(batches, BatchSampler) or batches.drop_last
        )
        super().__init__(sum(map(len, self._batches(0))) if counted else len(loader.dataset))  # pyright: ignore[reportArgumentType]

    def pieces(self, rows: int) -> Iterator[Tensor]:  # noqa: ARG002 (batches are as long as they are)
        return self._whole(0)

    def take(self, chosen: Sequence[int]) -> Tensor:
        places = torch.tensor(chosen, dtype=torch.long)
        found, start = [torch.zeros(0)], 0
        for batch in self._batches(0):
            inside = places[(places >= start) & (places < start + len(batch))]
            if inside.numel():
                found.append(batch[inside - start])
            start += len(batch)
            if not chosen or start > chosen[-1]:
                break
        return torch.cat(found[1:] or found)

    def targets(self) -> Iterator[Tensor]:
        return self._whole(1)

    def _whole(self, part: int) -> Iterator[Tensor]:
        """A pass of the length that was promised."""
        seen = 0
        for batch in self._batches(part):
            seen += len(batch)
            yield batch
        if seen != self.num_rows:
            raise InputError(f"the DataLoader gave {seen} rows in this pass, but {self.num_rows} were expected.")

    def _batches(self, part: int) -> Iterator[Tensor]:
        for batch in self._loader:
            values = torch.as_tensor(_part(batch, part))
            if values.dim() == 0:
                raise InputError("the DataLoader gives single numbers, not batches: give it a batch_size.")
            yield values


def _check_order(loader: DataLoader[Any]) -> None:
    """Refuse loaders that shuffle, or may."""
    if isinstance(loader.dataset, IterableDataset):
        try:
            len(loader.dataset)  # pyright: ignore[reportArgumentType]
        except (TypeError, NotImplementedError):
            raise InputError(
                f"the DataLoader reads {type(loader.dataset).__name__}, which has no length: give it __len__, or use "
                "a map-style Dataset."
            ) from None
        return
    batches = loader.batch_sampler
    sampler = loader.sampler if batches is None else batches.sampler if type(batches) is BatchSampler else batches
    if type(sampler) is not SequentialSampler:
        raise InputError(
            f"the DataLoader draws rows by {type(sampler).__name__}, which may change their order from pass to pass: "
            "make it with shuffle=False and no sampler; to choose rows, give it a torch.utils.data.Subset."
        )


def _part(item: Any, part: int) -> Any:
    """x (0) or y (1) of an item or batch, x or (x, y)."""
    if isinstance(item, (tuple, list)):
        if len(item) > part:
            return item[part]
    elif part == 0 and isinstance(item, (Tensor, np.ndarray, np.number, int, float)):
        return item
    raise InputError(
        f"items are {type(item).__name__}: give x, or (x, y) where targets are wanted; for others, use a collate_fn or "
        "a Dataset that picks them."
    )


def _slices(array: Any, rows: int) -> Iterator[Tensor]:
    return (_copy(array[start : start + rows]) for start in range(0, len(array), rows))


def _copy(piece: Any) -> Tensor:
    """A tensor with memory of its own: not that of a file, nor of whoever gave the array."""
    return piece.detach().cpu().clone() if isinstance(piece, Tensor) else torch.tensor(np.asarray(piece))
