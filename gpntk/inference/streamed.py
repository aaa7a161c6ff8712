"""Features of data that are read anew in each pass, piece by piece.

A source is read from its beginning, as often as there are passes over the data, and must give the same rows in the
same order each time; checksums of its pieces see to that.

    array         anything with a length and slices: a memory-mapped numpy array, an HDF5 data set    slices
    `Dataset`     map-style, items x or (x, y)                                                        item by item
    `DataLoader`  batches x or (x, y), not shuffled                                                   batch by batch
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import count
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, TensorDataset
from tqdm import tqdm

from gpntk._checks import as_tensor, check_count, check_device, check_dtype, check_flags, check_kinds
from gpntk.errors import InputError
from gpntk.inference.features import AbstractFeatures
from gpntk.jacobians import AbstractJacobianBackend
from gpntk.memory import chunks, passing

# Share of the memory budget that a piece of x may take, with the copy in the source's own dtype.
_SHARE = 8
# Bytes of a value of a source, at most.
_ITEMSIZE = 8
# On a CPU, what larger pieces leave behind between the two halves of a product no longer fits its cache.
_CPU_ROWS = 2**14
# Items of a dataset that are read at once, at most: each is an object of its own until they are joined.
_ITEMS = 4096


@final
class StreamedFeatures(AbstractFeatures):
    """The features of inputs that are too many for memory.

    Each product is one pass over the source, in which every piece is read, checked, cast, moved to the device, used
    and dropped: factors are made anew for each, so a pass costs up to 4 times a product of `Features` that keeps them.
    Take it when x does not fit; where only the factors do not, `Features` makes them anew by pieces too. Where reading
    is slow, a `DataLoader` with workers reads ahead.

    Args:
        backend: How Jacobian products are computed.
        source: A memory-mapped numpy array or anything else `[N, ...]` with a length and slices; a map-style `Dataset`
            of x or (x, y); or a `DataLoader` of such batches that does not shuffle. Each input is made flat, `[D]`.
        dtype: Of products; default: that of the network.
        device: Of products; default: that of the network.
        chunk_rows: Inputs read at once; default: as many as an eighth of the backend's memory budget holds, on
            a CPU at most 16,384.
        progress: Whether a pass that takes more than two seconds shows a bar.

    Raises:
        InputError: The source shuffles, has no length, or cannot be sliced; while it is read: NaN or infinite values,
            rows of different widths, passes that differ or end early.

    Example:
        >>> import numpy, tempfile, torch, gpntk
        >>> from gpntk.inference import StreamedFeatures
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     x = numpy.memmap(file, dtype="float32", shape=(1000, 3), mode="w+")
        ...     features = StreamedFeatures(gpntk.AutoBackend(gpntk.freeze(torch.nn.Linear(3, 2))), x, chunk_rows=300)
        ...     features.num_rows, features.second_moment()[-2:, -2:].tolist()
        (2000, [[1000.0, 0.0], [0.0, 1000.0]])
    """

    def __init__(
        self,
        backend: AbstractJacobianBackend,
        source: Any,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        chunk_rows: int | None = None,
        progress: bool = True,
    ) -> None:
        if chunk_rows is not None:
            check_count(chunk_rows=chunk_rows)
        self._source, self._progress = source, progress
        # What is kept of the data is found by this name, in all precisions.
        self._name = object()
        # Where the pieces of the first pass end, with their checksums, and the next pass, in all precisions.
        self._checksums: list[tuple[int, int]] = []
        self._passes = count(1)
        check_kinds(AbstractJacobianBackend, "a backend, gpntk.AutoBackend(frozen) say", backend=backend)
        check_flags(progress=progress)
        dtype, device = backend.dtype if dtype is None else dtype, check_device(device or backend.device)
        check_dtype(dtype)
        samples, outputs = _length(source), 1
        self._first_row = torch.zeros(1, 0)
        if samples:
            self._first_row = _rows(source, 0, [0]).reshape(1, -1)
            first = self._first_row.to(device=device, dtype=dtype)
            self._check(first, 0)
            outputs = backend.num_outputs(first)
        super().__init__(backend, dtype, device, samples, outputs)
        width = max(1, self._first_row.shape[1])
        rows = next(chunks(samples, 2 * _ITEMSIZE * width, backend.memory_budget // _SHARE)).stop
        rows = min(rows, _CPU_ROWS) if device.type == "cpu" else rows
        self._chunk_rows = max(1, rows) if chunk_rows is None else chunk_rows

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        start, number_of_pass = 0, next(self._passes)
        with tqdm(
            total=self.num_samples, desc="rows", delay=2, leave=False, disable=not self._progress, unit_scale=True
        ) as bar:
            pieces = self._pieces()
            for number, raw in enumerate(pieces):
                stop = start + raw.shape[0]
                if number < len(self._checksums) and stop < self._checksums[number][0]:
                    # Shorter than before: it has ended, unless the rest makes up for it.
                    rows = stop + sum(map(len, pieces))
                    if rows < self.num_samples:
                        raise _ended(rows, self.num_samples, f"in pass {number_of_pass}")
                x = self._shaped(raw, start)
                self._check(x, start)
                self._compare(number, raw, start)
                with passing(x):
                    yield slice(start * self.num_outputs, stop * self.num_outputs), x
                bar.update(stop - start)
                start = stop
        if start < self.num_samples:
            raise _ended(start, self.num_samples, f"in pass {number_of_pass}")

    def take(self, chosen: Tensor) -> Tensor:
        if not chosen.numel():
            return torch.zeros(0, self._first_row.shape[1], dtype=self.dtype, device=self.device)
        x = self._shaped(_rows(self._source, 0, chosen.tolist()), 0)
        self._check(x, chosen)
        return x

    def to(self, dtype: torch.dtype) -> StreamedFeatures:
        if dtype == self.dtype:
            return self
        other = copy.copy(self)
        other.dtype = dtype
        return other

    def remember(self, kind: Hashable, compute: Callable[[], Any]) -> Any:
        # With what is kept for inputs in memory, within the one budget.
        return self.backend.remember((kind, self._name), (), compute)

    def holds(self, kind: Hashable) -> bool:
        return self.backend.holds((kind, self._name), ())

    def _pieces(self) -> Iterator[Tensor]:
        """The source's batches, joined or cut to ``chunk_rows``."""
        waiting: list[Tensor] = []
        held = 0
        for batch in _batches(self._source, 0, self._chunk_rows):
            for piece in batch.split(self._chunk_rows):
                if waiting and (held + len(piece) > self._chunk_rows or piece.shape[1:] != waiting[0].shape[1:]):
                    yield torch.cat(waiting)
                    waiting, held = [], 0
                waiting.append(piece)
                held += len(piece)
        if held:
            yield torch.cat(waiting)

    def _compare(self, number: int, raw: Tensor, start: int) -> None:
        """Refuse a piece that is not what it was in an earlier pass, or what the first row was at the start."""
        stop = start + raw.shape[0]
        checksum = stop, zlib.crc32(raw.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if number == len(self._checksums):
            self._checksums.append(checksum)
        same = checksum == self._checksums[number] and stop <= self.num_samples
        if not same or (start == 0 and not torch.equal(raw[:1].reshape(1, -1), self._first_row)):
            raise InputError(
                f"rows {start} to {stop - 1} of the source are not what they were before: it shuffles, augments its "
                "inputs, or has been changed."
            )

    def _shaped(self, raw: Tensor, start: int) -> Tensor:
        width = self._first_row.shape[1]
        x = raw.reshape(raw.shape[0], -1)
        if x.shape[1] != width:
            raise InputError(
                f"rows {start} to {start + x.shape[0] - 1} have {x.shape[1]} values each, but row 0 has {width}."
            )
        return x.to(device=self.device, dtype=self.dtype)

    @staticmethod
    def _check(x: Tensor, places: int | Tensor) -> None:
        """Refuse NaN and infinite values, naming the first row at fault; ``places`` of the rows or of the first."""
        if bool(x.isfinite().all()):
            return
        row, column = (~x.isfinite()).nonzero()[0].tolist()
        place = places + row if isinstance(places, int) else int(places[row])
        raise InputError(f"row {place} of the source has {x[row, column].item()} in column {column}.")


def targets(source: Any, outputs: int = 1) -> Tensor:
    """All y of a `Dataset` or `DataLoader` of items (x, y), read in one pass: `[n]` in float64, row n*C + c.

    NaN stays: it is a row that was not observed, and wants infinite noise.

    Args:
        source: What `StreamedFeatures` reads x from.
        outputs: C, the values of y for each x.

    Raises:
        InputError: There are no targets, or not C for each x.

    Example:
        >>> import torch
        >>> from gpntk.inference import targets
        >>> data = torch.utils.data.TensorDataset(torch.zeros(3, 5), torch.arange(6).reshape(3, 2))
        >>> targets(torch.utils.data.DataLoader(data, batch_size=2), outputs=2)
        tensor([0., 1., 2., 3., 4., 5.], dtype=torch.float64)
    """
    check_count(outputs=outputs)
    pieces = [torch.zeros(0, dtype=torch.float64)]
    start, rows = 0, _length(source)
    for piece in _batches(source, 1, _ITEMS):
        if piece.numel() != piece.shape[0] * outputs:
            each = piece.numel() / max(1, piece.shape[0])
            raise InputError(f"targets from row {start} on have {each:g} values each, but {outputs} are wanted.")
        pieces.append(piece.to(device="cpu", dtype=torch.float64).flatten())
        start += piece.shape[0]
    if start < rows:
        raise _ended(start, rows, "while y was read")
    return torch.cat(pieces)


# --- sources ---------------------------------------------------------------------------------------------------------


def _length(source: Any) -> int:
    """N, the rows of an array, a dataset or a loader that can be read again in the same order."""
    kind = type(source).__name__
    if isinstance(source, DataLoader):
        return _length_of_loader(source)
    if isinstance(source, IterableDataset):
        raise InputError(
            f"{kind} is an IterableDataset: wrap it in a DataLoader with a batch_size (if it has a length), or give a "
            "map-style Dataset or an array."
        )
    try:
        if not isinstance(source, Dataset):
            source[0:0]
        return len(source)  # pyright: ignore[reportArgumentType]
    except (TypeError, KeyError, IndexError, NotImplementedError, RuntimeError):
        raise InputError(
            f"source is a {kind}, which cannot be read as data: give an array that has a length and can be sliced, a "
            "map-style Dataset "
            "with __len__, or a DataLoader with shuffle=False."
        ) from None


def _length_of_loader(loader: DataLoader[Any]) -> int:
    dataset: Any = loader.dataset
    batches = loader.batch_sampler
    if isinstance(dataset, IterableDataset):
        try:
            len(dataset)  # pyright: ignore[reportArgumentType]
        except (TypeError, NotImplementedError):
            raise InputError(
                f"the DataLoader reads {type(dataset).__name__}, which has no length: give it __len__, or use a "
                "map-style Dataset."
            ) from None
    else:
        sampler = loader.sampler if batches is None else batches.sampler if type(batches) is BatchSampler else batches
        if type(sampler) is not SequentialSampler:
            raise InputError(
                f"the DataLoader draws rows by {type(sampler).__name__}, which may change their order from pass to "
                "pass: make it with shuffle=False and no sampler; to choose rows, give it a torch.utils.data.Subset."
            )
    # A length that batches or workers may change is not believed but counted.
    if isinstance(dataset, IterableDataset) or not isinstance(batches, BatchSampler) or batches.drop_last:
        rows, promised = sum(map(len, _batches(loader, 0, 1))), len(dataset)  # pyright: ignore[reportArgumentType]
        if rows < promised and not loader.drop_last:
            raise _ended(rows, promised, "while its rows were counted")
        return rows
    return len(dataset)


def _ended(row: int, rows: int, when: str) -> InputError:
    return InputError(
        f"the source ended at row {row} of {rows} {when}: each pass must give all rows again, so let __iter__ begin "
        "anew, and give a file that is complete."
    )


def _batches(source: Any, part: int, rows: int) -> Iterator[Tensor]:
    """x (``part`` 0) or y (1) of all rows, as pieces `[b, ...]` of about so many, in the source's dtype, on the CPU."""
    if isinstance(source, DataLoader):
        for batch in source:
            values = as_tensor(_part(batch, part), "the source")
            if values.dim() == 0:
                raise InputError("the DataLoader gives single numbers, not batches: give it a batch_size.")
            yield values
        return
    total, size = len(source), min(rows, _ITEMS) if isinstance(source, Dataset) else rows
    for start in range(0, total, size):
        yield _rows(source, part, range(start, min(start + size, total)))


def _rows(source: Any, part: int, places: Sequence[int]) -> Tensor:
    """x or y of the rows at increasing ``places`` `[M, ...]`."""
    if isinstance(source, DataLoader):
        return _rows_of_loader(source, part, torch.tensor(places))
    if isinstance(source, TensorDataset) and len(source.tensors) > part:
        return _rows(source.tensors[part], 0, places)
    if isinstance(source, Dataset):
        items = [as_tensor(_part(source[place], part), "the source") for place in places]
        for place, item in zip(places, items, strict=True):
            if item.shape != items[0].shape:
                raise InputError(f"row {place} has shape {tuple(item.shape)}, others have {tuple(items[0].shape)}.")
        return torch.stack(items)
    if part:
        raise InputError(
            "the source is an array, which has no targets: read them from a Dataset or DataLoader, or their own array."
        )
    first, stop = places[0], places[-1] + 1
    if stop - first == len(places):
        return as_tensor(source[first:stop], "the source")
    if isinstance(source, (np.ndarray, Tensor)):
        return as_tensor(source[list(places)], "the source")
    return torch.cat([as_tensor(source[place : place + 1], "the source") for place in places])


def _rows_of_loader(loader: DataLoader[Any], part: int, places: Tensor) -> Tensor:
    found, start = [], 0
    for batch in _batches(loader, part, 1):
        inside = places[(places >= start) & (places < start + len(batch))]
        if inside.numel():
            found.append(batch[inside - start])
        start += len(batch)
        if start > places[-1]:
            return torch.cat(found)
    raise _ended(start, int(places[-1]) + 1, "while chosen rows were read")


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
