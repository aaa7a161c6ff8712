"""Data read piece by piece give what data in memory give; sources that cannot be trusted are refused."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from tqdm import tqdm

import gpntk
from gpntk._checks import as_tensor
from gpntk.errors import InputError
from gpntk.inference import (
    ConjugateGradients,
    FeatureCovariance,
    Features,
    Nystrom,
    Posterior,
    SampledGram,
    StreamedFeatures,
    WeightSpace,
    WhitenedSystem,
    log_evidence,
    targets,
)
from gpntk.inference.features import draw
from gpntk.memory import TensorCache, passing

ROWS, WIDTH, OUTPUTS = 50, 3, 2


class Rows(Dataset[Any]):
    """Map-style rows, with or without targets."""

    def __init__(self, x: Tensor, y: Tensor | None = None) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index] if self.y is None else (self.x[index], self.y[index])


class Stream(IterableDataset[Any]):
    """Rows in a row, with or without a length, which may shrink."""

    def __init__(self, x: Tensor, shrinks: bool = False) -> None:
        self.x, self.shrinks, self.passes = x, shrinks, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        return iter(self.x[: len(self.x) - self.passes if self.shrinks else None])


class SizedStream(Stream):
    def __len__(self) -> int:
        return len(self.x)


class Sliced:
    """An array that only knows slices, like those on disk, and remembers the longest it was asked for."""

    def __init__(self, x: np.ndarray[Any, Any]) -> None:
        self.x, self.longest = x, 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: slice) -> np.ndarray[Any, Any]:
        if not isinstance(index, slice):
            raise TypeError("slices only")
        self.longest = max(self.longest, len(self.x[index]))
        return self.x[index]


def x64() -> Tensor:
    return torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def y64() -> Tensor:
    return torch.randn(ROWS, OUTPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def backend(kind: type = gpntk.AutoBackend, **options: Any) -> Any:
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, OUTPUTS)).double()
    return kind(gpntk.freeze(module), **options)


def memory_map(folder: Path) -> np.ndarray[Any, Any]:
    np.save(folder / "x.npy", x64().numpy())
    return np.load(folder / "x.npy", mmap_mode="r")


SOURCES: dict[str, Callable[[Path], Any]] = {
    "memory map": memory_map,
    "slices": lambda _: Sliced(x64().numpy()),
    "tensor": lambda _: x64(),
    "images": lambda _: x64().reshape(ROWS, 1, WIDTH, 1),
    "dataset": lambda _: Rows(x64()),
    "dataset of pairs": lambda _: Rows(x64(), y64()),
    "tensor dataset": lambda _: TensorDataset(x64(), y64()),
    "loader": lambda _: DataLoader(Rows(x64(), y64()), batch_size=8),
    "loader of batches": lambda _: DataLoader(x64().split(9), batch_size=None),  # pyright: ignore[reportArgumentType]
    "loader of a subset": lambda _: DataLoader(Subset(Rows(torch.cat([x64(), x64()])), range(ROWS)), batch_size=64),
    "loader that drops": lambda _: DataLoader(Rows(torch.cat([x64(), x64()[:3]])), batch_size=25, drop_last=True),
    "loader of a stream": lambda _: DataLoader(SizedStream(x64()), batch_size=8),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("chunk_rows", [None, 7])
def test_every_source_gives_what_memory_gives(name: str, chunk_rows: int | None, tmp_path: Path) -> None:
    whole = Features(backend(), x64())
    features = StreamedFeatures(backend(), SOURCES[name](tmp_path), chunk_rows=chunk_rows)
    assert (features.num_rows, features.num_features) == (whole.num_rows, whole.num_features)
    v, u = torch.randn(2, whole.num_features).double(), torch.randn(2, whole.num_rows).double()
    chosen = whole.sample(9, seed=4)

    def weighted(rows: slice, block: Tensor) -> Tensor:
        return block * u[0, rows].abs().unsqueeze(-1)

    pairs = (
        (features.jvp(v), whole.jvp(v)),
        (features.vjp(u), whole.vjp(u)),
        (features.second_moment(weighted), whole.second_moment(weighted)),
        (features.diagonal(per_layer=True), whole.diagonal(per_layer=True)),
        *zip(features.sample(9, seed=4), chosen, strict=True),
    )
    for streamed, expected in pairs:
        assert torch.allclose(streamed, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "solver",
    [
        WeightSpace(),
        ConjugateGradients(Nystrom(), tolerance=1e-13),
        ConjugateGradients(SampledGram(oversampling=2.0), tolerance=1e-13),
    ],
    ids=["direct", "function space", "weight space"],
)
def test_solvers_see_no_difference(solver: Any) -> None:
    results = []
    for features in (Features(backend(), x64()), StreamedFeatures(backend(), Rows(x64()), chunk_rows=13)):
        variances, noise = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (0.7, 0.1))
        value = log_evidence(FeatureCovariance(features, variances), noise, y64().flatten(), solver)
        value.backward()
        posterior = Posterior(WhitenedSystem(FeatureCovariance(features, variances), noise), y64().flatten(), solver)
        results.append(
            torch.stack([value.detach(), variances.grad.sum(), noise.grad.sum(), *posterior.mean(x64()[:3])])
        )
    assert torch.allclose(*results, rtol=1e-9)


def test_precisions_share_the_source_and_not_what_is_kept() -> None:
    source = Sliced(x64().numpy())
    features = StreamedFeatures(backend(), source, dtype=torch.float32)
    assert features.second_moment().dtype == torch.float32
    double = features.to(torch.float64)
    assert features.to(torch.float32) is features
    expected = Features(backend(), x64()).second_moment()
    assert torch.allclose(double.second_moment(), expected, rtol=1e-12)
    # What is kept does not depend on hyperparameters, and no two sources share it.
    made = [double.remember("thing", object), double.remember("thing", object), features.remember("thing", object)]
    assert made[0] is made[1] is made[2]
    other = StreamedFeatures(double.backend, source)
    assert other.remember("thing", object) is not made[0]


def test_no_more_is_asked_for_than_the_budget_holds() -> None:
    x = torch.randn(4000, WIDTH, dtype=torch.float64)
    source = Sliced(x.numpy())
    small = backend(memory_budget=2**16)
    features = StreamedFeatures(small, source)
    expected = Features(backend(), x).second_moment()
    assert torch.allclose(features.second_moment(), expected, rtol=1e-12)
    features.vjp(features.jvp(torch.ones(1, features.num_features, dtype=torch.float64)))
    assert source.longest * WIDTH * 8 <= 2**16 // 8
    source.longest = 0
    StreamedFeatures(small, source, chunk_rows=5).second_moment()
    assert source.longest == 5


@pytest.mark.parametrize("kind", [gpntk.AutoBackend, gpntk.jacobians.StructuredBackend, gpntk.jacobians.DenseBackend])
def test_what_passes_through_leaves_nothing_in_the_cache(kind: type) -> None:
    used = backend(kind)
    kept = Features(used, x64()[:20])
    v = torch.ones(3, kept.num_features, dtype=torch.float64)
    kept.jvp(v)
    before = dict(used.cache._entries)
    assert before
    features = StreamedFeatures(used, x64(), chunk_rows=5)
    features.vjp(features.jvp(v))
    features.second_moment()
    # Neither new entries, nor the loss of those that will be used again.
    assert dict(used.cache._entries) == before


def test_passing_tensors_are_known_by_their_memory() -> None:
    cache, x = TensorCache(2**20), torch.ones(4, 3)
    with passing(x):
        assert cache.get("sum", (x[1:],), lambda: [1]) == [1]
        assert cache.get("sum", (x[1:],), lambda: [2]) == [2]
        other = torch.ones(4, 3)
        assert cache.get("sum", (other,), lambda: [3]) == cache.get("sum", (other,), lambda: [4]) == [3]
    assert cache.get("sum", (x,), lambda: [5]) == cache.get("sum", (x,), lambda: [6]) == [5]


def test_targets_come_in_the_order_of_rows() -> None:
    for source in (Rows(x64(), y64()), TensorDataset(x64(), y64()), DataLoader(Rows(x64(), y64()), batch_size=7)):
        assert torch.equal(targets(source, OUTPUTS), y64().flatten())
    labels = targets(TensorDataset(x64(), torch.arange(ROWS)))
    assert labels.dtype == torch.float64
    with pytest.raises(InputError, match="2 values each, but 3 are wanted"):
        targets(Rows(x64(), y64()), 3)
    with pytest.raises(InputError, match="no targets"):
        targets(x64())
    with pytest.raises(InputError, match=r"give x, or \(x, y\)"):
        targets(Rows(x64()))


def with_value(value: float, row: int) -> Tensor:
    x = x64()
    x[row, 1] = value
    return x


class Ragged(Rows):
    def __getitem__(self, index: int) -> Any:
        return self.x[index][: 2 if index == 33 else 3]


class Augmented(Rows):
    def __getitem__(self, index: int) -> Any:
        return self.x[index] + torch.randn(())


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "shuffles": (lambda: DataLoader(Rows(x64()), shuffle=True), "draws rows by RandomSampler"),
    "own batches": (
        lambda: DataLoader(Rows(x64()), batch_sampler=[[0, 1], [2, 3]]),
        "draws rows by list, which may change",
    ),
    "no length": (lambda: DataLoader(Stream(x64())), "Stream, which has no length"),
    "bare stream": (lambda: Stream(x64()), "wrap it in a DataLoader"),
    "shrinks": (
        lambda: DataLoader(SizedStream(x64(), shrinks=True), batch_size=8),
        "ended at row 49 of 50 while its rows were counted",
    ),
    "single numbers": (lambda: DataLoader(list(range(5)), batch_size=None), "not batches"),  # pyright: ignore[reportArgumentType]
    "a number": (lambda: 3, "source is a int, which cannot be read as data"),
    "a dict": (lambda: {"x": 1}, "source is a dict, which cannot be read as data"),
    "dicts": (lambda: Rows([{"x": 1}] * 5), "items are dict"),  # pyright: ignore[reportArgumentType]
    "NaN": (lambda: with_value(float("nan"), 17).numpy(), "row 17 of the source has nan in column 1"),
    "infinite": (lambda: with_value(float("inf"), 0), "row 0 of the source has inf in column 1"),
    "ragged": (lambda: Ragged(x64()), "row 33 has shape"),
    "other widths": (lambda: DataLoader([x64(), x64()[:, :2]], batch_size=None), "rows 50 to 69 have 2 values each"),  # pyright: ignore[reportArgumentType]
    "augments": (lambda: Augmented(x64()), "rows 0 to 19 of the source are not what they were"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sources_are_refused(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(InputError, match=message):
        StreamedFeatures(backend(), make(), chunk_rows=20).second_moment()


def test_changes_between_passes_are_noticed_wherever_they_are() -> None:
    x = x64().numpy().copy()
    features = StreamedFeatures(backend(), x, chunk_rows=20)
    v = torch.ones(1, features.num_features, dtype=torch.float64)
    features.jvp(v)
    x[33, 1] += 1e-9
    for other in (features, features.to(torch.float32)):
        with pytest.raises(InputError, match="rows 20 to 39 of the source are not what they were before"):
            other.jvp(v.to(other.dtype))
    x[33, 1] -= 1e-9
    # Where a pass was left, or other features were made, nothing is known of what comes later.
    partly = StreamedFeatures(backend(), x, chunk_rows=20)
    next(partly.parts())
    x[33] = x[34]
    assert partly.jvp(v).shape == (1, ROWS * OUTPUTS)


class Reordered(Rows):
    """Rows whose order is another in each pass, but for the first."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(x)
        self.passes = 0

    def __getitem__(self, index: int) -> Any:
        self.passes += index == 1
        return self.x[index] if index == 0 else self.x[1 + (index + 7 * self.passes) % (ROWS - 1)]


class OnceStream(SizedStream):
    """Rows that come once, from an iterator."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(x)
        self.rows = iter(x)

    def __iter__(self) -> Iterator[Tensor]:
        return self.rows


class Shrinking(Sliced):
    """An array that loses its last ten rows after the first pass."""

    def __getitem__(self, index: slice) -> np.ndarray[Any, Any]:
        piece = super().__getitem__(index)
        if index.stop >= ROWS:
            self.x = self.x[: ROWS - 10]
        return piece


def test_passes_that_differ_say_how() -> None:
    v = torch.ones(1, backend().num_features, dtype=torch.float64)
    reordered = StreamedFeatures(backend(), Reordered(x64()), chunk_rows=20)
    reordered.jvp(v)
    with pytest.raises(InputError, match="rows 0 to 19 of the source are not what they were before"):
        reordered.jvp(v)
    shrinking = StreamedFeatures(backend(), Shrinking(x64().numpy()), chunk_rows=10)
    shrinking.jvp(v)
    with pytest.raises(InputError, match="ended at row 40 of 50 in pass 2"):
        Posterior(WhitenedSystem(FeatureCovariance(shrinking, torch.ones(1)), torch.ones(1)), y64().flatten())
    with pytest.raises(InputError, match="ended at row 0 of 1 while chosen rows were read"):
        StreamedFeatures(backend(), DataLoader(OnceStream(x64()), batch_size=8))


class EndingStream(SizedStream):
    """Rows of which the last five are missing from pass ``last`` on; the first counts them, the second reads one."""

    def __init__(self, x: Tensor, last: int) -> None:
        super().__init__(x)
        self.last = last

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        return iter(self.x[: len(self.x) - 5 if self.passes >= self.last else None])


@pytest.mark.parametrize("solver", [WeightSpace(), ConjugateGradients(Nystrom(5))])
@pytest.mark.parametrize("good", [1, 2, 3])
def test_a_stream_that_ends_says_so_and_blames_nothing_else(good: int, solver: Any) -> None:
    stream = StreamedFeatures(backend(), DataLoader(EndingStream(x64(), good + 3), batch_size=8), chunk_rows=16)
    system = WhitenedSystem(FeatureCovariance(stream, torch.ones(1)), torch.ones(1))
    for _ in range(good):
        stream.jvp(torch.ones(1, stream.num_features, dtype=torch.float64))
    with pytest.raises(InputError, match=rf"ended at row 45 of 50 in pass {good + 1}: each pass must give all rows"):
        Posterior(system, y64().flatten(), solver)


def test_a_stream_that_is_short_from_the_start_says_so() -> None:
    with pytest.raises(InputError, match="ended at row 45 of 50 while its rows were counted"):
        StreamedFeatures(backend(), DataLoader(EndingStream(x64(), 1), batch_size=8))
    pairs = TensorDataset(x64(), y64())

    class Pairs(EndingStream):
        def __iter__(self) -> Iterator[Any]:
            rows = super().__iter__()
            return ((x, y64()[i]) for i, x in enumerate(rows))

    assert torch.equal(targets(DataLoader(Pairs(x64(), 3), batch_size=8), OUTPUTS), targets(pairs, OUTPUTS))
    with pytest.raises(InputError, match="ended at row 45 of 50 while y was read"):
        targets(DataLoader(Pairs(x64(), 2), batch_size=8), OUTPUTS)


class EditedStream(SizedStream):
    """Rows that an edit changes from the second pass of products on."""

    def __init__(self, x: Tensor, edit: Callable[[Tensor], Any]) -> None:
        super().__init__(x)
        self.edit = edit

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(self.x if self.passes < 4 else self.edit(self.x))


EDITS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "one value": (lambda x: torch.cat([x[:33], x[33:34] + 1e-9, x[34:]]), "rows 32 to 47 of the source are not"),
    "two rows swapped": (lambda x: torch.cat([x[:20], x[21:22], x[20:21], x[22:]]), "rows 16 to 31 of the source"),
    "the last row": (lambda x: torch.cat([x[:-1], x[:1]]), "rows 48 to 49 of the source"),
    "chunks swapped": (lambda x: torch.cat([x[:16], x[32:48], x[16:32], x[48:]]), "rows 16 to 31 of the source"),
    "another dtype": (lambda x: x.float(), "rows 0 to 15 of the source"),
    "a row too many": (lambda x: torch.cat([x, x[:1]]), "rows 48 to 50 of the source"),
    "a row too few": (lambda x: x[:-1], "ended at row 49 of 50 in pass 2"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_stream_is_noticed(name: str) -> None:
    edit, message = EDITS[name]
    loader = DataLoader(EditedStream(x64(), edit), batch_size=8)
    stream = StreamedFeatures(backend(), loader, chunk_rows=16)
    v = torch.ones(1, stream.num_features, dtype=torch.float64)
    assert stream.jvp(v).shape == (1, ROWS * OUTPUTS)
    with pytest.raises(InputError, match=message):
        stream.jvp(v)


ARRAYS: dict[str, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {
    "backwards": lambda x: x[::-1].copy()[::-1],
    "big-endian": lambda x: x.astype(">f8"),
    "longdouble": lambda x: x.astype(np.longdouble),
    "by columns": np.asfortranarray,
    "read-only": lambda x: np.frombuffer(x.tobytes()).reshape(x.shape),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_any_memory(name: str) -> None:
    array = ARRAYS[name](x64().numpy())
    assert torch.equal(as_tensor(array), x64())
    features = StreamedFeatures(backend(), array, chunk_rows=20)
    assert torch.equal(features.sample(9, seed=4)[0], Features(backend(), x64()).sample(9, seed=4)[0])
    assert torch.equal(torch.cat([x for _, x in features.parts()]), x64())


def test_what_holds_no_numbers_is_no_array() -> None:
    with pytest.raises(InputError, match="x is an array of <U3: give numbers"):
        as_tensor(np.array(["one", "two"]))
    with pytest.raises(InputError, match="the source is an array of object: give numbers"):
        StreamedFeatures(backend(), np.array([[None], ["a"]]))
    own = np.zeros(3)
    as_tensor(own).add_(1)
    assert not own.any()


def test_bad_rows_are_found_among_those_sampled_too() -> None:
    features = StreamedFeatures(backend(), with_value(float("nan"), 17))
    with pytest.raises(InputError, match="row 17 of the source"):
        features.sample(ROWS, seed=0)


def test_a_pass_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    class Bar(tqdm):  # pyright: ignore[reportMissingTypeArgument]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            bars.append((options, self))

    monkeypatch.setattr("gpntk.inference.streamed.tqdm", Bar)
    features = StreamedFeatures(backend(), x64(), chunk_rows=20)
    features.second_moment()
    ((options, bar),) = bars
    assert (bar.n, options["total"], options["delay"], options["leave"]) == (ROWS, ROWS, 2, False)


def test_chunk_rows_must_be_positive() -> None:
    for rows in (0, -1, 2.5, True):
        with pytest.raises(InputError, match=f"chunk_rows={rows}: give a whole number, at least 1"):
            StreamedFeatures(backend(), x64(), chunk_rows=rows)  # pyright: ignore[reportArgumentType]


def test_no_rows_are_no_rows() -> None:
    features = StreamedFeatures(backend(), x64()[:0])
    assert features.num_rows == 0
    assert features.jvp(torch.ones(2, features.num_features).double()).shape == (2, 0)
    assert not features.second_moment().any()


def test_draws_from_many_are_distinct_and_need_little_memory() -> None:
    # A billion numbers would take 8 GB to shuffle.
    numbers = draw(10**9, 20_000, seed=0)
    assert numbers.unique().numel() == 20_000
    assert torch.equal(numbers, draw(10**9, 20_000, seed=0))
    assert not torch.equal(numbers, draw(10**9, 20_000, seed=1))
    # Uniform: the mean of 20,000 has a standard deviation of 0.002 of the range.
    assert abs(float(numbers.double().mean()) / 10**9 - 0.5) < 0.01
    assert torch.equal(numbers, numbers.sort().values)
    assert torch.equal(draw(5, 9, seed=0), torch.arange(5))
