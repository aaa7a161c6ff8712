"""Features of data that are read anew in each pass, piece by piece."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator
from typing import Any, final

import torch
from torch import Tensor
from tqdm import tqdm

from gpntk.errors import InputError
from gpntk.inference.features import AbstractFeatures
from gpntk.inference.sources import AbstractSource, as_source
from gpntk.jacobians import AbstractJacobianBackend
from gpntk.memory import chunks, passing

# Share of the memory budget that a piece of x may take, with the copy in the source's own dtype.
_SHARE = 8
# Bytes of a value of a source, at most.
_ITEMSIZE = 8
# On a CPU, what larger pieces leave behind between the two halves of a product no longer fits its cache.
_CPU_ROWS = 2**14


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
            rows of different widths, passes that differ.

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
        if chunk_rows is not None and chunk_rows < 1:
            raise InputError(f"chunk_rows={chunk_rows}: at least one row must be read at once.")
        self._source: AbstractSource = as_source(source)
        self._progress = progress
        # What is kept of the data is found by this name, in all precisions.
        self._name = object()
        dtype, device = dtype or backend.dtype, torch.device(device or backend.device)
        self._first_row = torch.zeros(1, 0)
        outputs = 1
        if self._source.num_rows:
            self._first_row = self._source.take([0]).reshape(1, -1)
            first = self._first_row.to(device=device, dtype=dtype)
            self._check(first, 0)
            outputs = backend.num_outputs(first)
        super().__init__(backend, dtype, device, self._source.num_rows, outputs)
        width = max(1, self._first_row.shape[1])
        rows = next(chunks(self.num_samples, 2 * _ITEMSIZE * width, backend.memory_budget // _SHARE)).stop
        rows = min(rows, _CPU_ROWS) if device.type == "cpu" else rows
        self._chunk_rows = max(1, rows) if chunk_rows is None else chunk_rows

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        start = 0
        with tqdm(
            total=self.num_samples, desc="rows", delay=2, leave=False, disable=not self._progress, unit_scale=True
        ) as bar:
            for raw in self._chunks():
                x = self._ready(raw, start)
                stop = start + x.shape[0]
                with passing(x):
                    yield slice(start * self.num_outputs, stop * self.num_outputs), x
                bar.update(x.shape[0])
                start = stop

    def take(self, chosen: Tensor) -> Tensor:
        x = self._source.take(chosen.tolist())
        if not chosen.numel():
            return torch.zeros(0, self._first_row.shape[1], dtype=self.dtype, device=self.device)
        x = self._shaped(x, 0)
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

    # --- private -----------------------------------------------------------------------------------------------

    def _chunks(self) -> Iterator[Tensor]:
        """The source's pieces, joined or cut to ``chunk_rows``."""
        waiting: list[Tensor] = []
        held = 0
        for piece in self._source.pieces(self._chunk_rows):
            for part in piece.split(self._chunk_rows):
                if waiting and (held + len(part) > self._chunk_rows or part.shape[1:] != waiting[0].shape[1:]):
                    yield _joined(waiting)
                    waiting, held = [], 0
                waiting.append(part)
                held += len(part)
        if waiting:
            yield _joined(waiting)

    def _ready(self, raw: Tensor, start: int) -> Tensor:
        """A piece, checked, as it goes into products."""
        if start == 0 and not torch.equal(raw[:1].reshape(1, -1), self._first_row):
            raise InputError("row 0 is not what it was: the source shuffles, augments its inputs, or has been changed.")
        x = self._shaped(raw, start)
        self._check(x, start)
        return x

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


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


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
    pieces = [torch.zeros(0, dtype=torch.float64)]
    start = 0
    for piece in as_source(source).targets():
        if piece.numel() != piece.shape[0] * outputs:
            each = piece.numel() / max(1, piece.shape[0])
            raise InputError(f"targets from row {start} on have {each:g} values each, but {outputs} are wanted.")
        pieces.append(piece.to(device="cpu", dtype=torch.float64).flatten())
        start += piece.shape[0]
    return torch.cat(pieces)
