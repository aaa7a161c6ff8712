"""Memory: the byte budget that every product stays within, and the cache of what is worth keeping."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar, TypeVar, final

import torch
from torch import Tensor

from gpntk._checks import check_memory_budget

_SHARE = 0.25
_ENTRIES = 16
# Fresh blocks above this size come from the system page by page, which costs more than smaller GEMMs lose.
_CPU_WORKSPACE = 2**24
# With its header and alignment just below 32 MiB.
_LARGEST_BLOCK = 2**25 - 2**16


def default_budget(device: torch.device) -> int:
    """A quarter of the bytes that ``device`` has (1 GiB where the system does not tell).

    Of all, not of those free at the moment: the same program makes the same choices every time.
    """
    if device.type == "cuda":
        return int(_SHARE * torch.cuda.get_device_properties(device).total_memory)
    try:
        return int(_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return 2**30


def budget_on(device: torch.device, memory_budget: int | None) -> int:
    """``memory_budget``, or the default of ``device``.

    Raises:
        InputError: It is no positive number.
    """
    check_memory_budget(memory_budget)
    return default_budget(device) if memory_budget is None else int(memory_budget)


def workspace(device: torch.device, budget: int) -> int:
    """Bytes that temporaries inside one product should stay within."""
    if device.type != "cpu":
        return budget
    _keep_freed_memory()
    return min(budget, _CPU_WORKSPACE)


@cache
def _keep_freed_memory() -> None:
    """Have the C library keep the memory of freed temporaries (about 64 MB) instead of giving it back each time.

    glibc gives back what is freed beyond twice the largest block that came from the system so far and was freed, 32 MiB
    at most: so one such block, once. Pages that come anew with every product took up to half of its time.
    """
    torch.empty(_LARGEST_BLOCK, dtype=torch.uint8, device="cpu")


def chunks(total: int, bytes_each: float, budget: int) -> Iterator[slice]:
    """Slices of ``range(total)`` in which ``bytes_each`` times the length stays within ``budget``.

    At least one item each; nothing at all is one empty slice.
    """
    size = max(1, int(budget // max(bytes_each, 1)))
    return (slice(start, min(start + size, total)) for start in range(0, max(total, 1), size))


Part = TypeVar("Part")


def halving(items: slice, compute: Callable[[slice], Part]) -> list[Part]:
    """``[compute(items)]``; where the device has no memory for that, of halves of the items, with one warning."""
    try:
        return [compute(items)]
    except RuntimeError as error:
        if not is_out_of_memory(error) or items.stop - items.start < 2:
            raise
    warnings.warn(
        f"out of memory on {items.stop - items.start} items at once: going on with half as many; a smaller "
        "memory_budget avoids this.",
        stacklevel=2,
    )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = (items.start + items.stop) // 2
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="out of memory on")
        return [*halving(slice(items.start, middle), compute), *halving(slice(middle, items.stop), compute)]


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the system, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def tracks_gradient(x: Tensor) -> bool:
    """Whether results must carry a graph back to x."""
    return torch.is_grad_enabled() and x.requires_grad


def attached(result: Tensor, x: Tensor) -> Tensor:
    """``result`` with a graph back to x where x's gradient is tracked: zero gradients if it does not depend on x."""
    return result + x.flatten()[:0].sum() if tracks_gradient(x) else result


def frozen(x: Tensor) -> Tensor:
    """x without its graph, as a normal tensor even inside ``torch.inference_mode``."""
    if not x.is_inference():
        return x.detach()
    with torch.inference_mode(False):
        return x.clone()


# Addresses of tensors that are passing through, one for each use of `passing`, which may be nested.
_passing: dict[object, int] = {}


@contextmanager
def passing(x: Tensor) -> Iterator[None]:
    """Within it, no cache keeps anything of x or of views of it, for they will not come again.

    Else the pieces of data larger than memory would push out of a cache what does come again, each for nothing.
    """
    key = object()
    _passing[key] = x.untyped_storage().data_ptr()
    try:
        yield
    finally:
        del _passing[key]


@final
class Lock:
    """A reentrant lock that a forked child finds free, whatever other threads of its parent held."""

    _all: ClassVar[weakref.WeakSet[Lock]] = weakref.WeakSet()

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._all.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_exception: object) -> None:
        self._lock.release()

    @classmethod
    def renew(cls) -> None:
        """Replace the locks of threads that did not survive the fork; those that this thread holds stay."""
        for lock in list(cls._all):
            if lock._lock.acquire(blocking=False):
                lock._lock.release()
            else:
                lock._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Lock.renew)


@final
class TensorCache:
    """Results of pure functions of tensors, found by the tensors' memory and confirmed by their values.

    Python ids change when autograd unpacks a tensor, the data pointer does not; but memory is reused, and ``x.data``
    can be changed without a trace. So each entry keeps a copy of its key tensors, and a hit costs one comparison, small
    beside any product. The least recently used go first. Deep copies share the cache; pickles leave it behind.
    """

    def __init__(self, budget: int, users: int = 1) -> None:
        self.budget, self._most = budget, _ENTRIES * users
        self._entries: OrderedDict[Hashable, tuple[tuple[Tensor, ...], Any, int]] = OrderedDict()
        self._lock = Lock()

    def get(self, kind: Hashable, tensors: tuple[Tensor, ...], compute: Callable[[], Any]) -> Any:
        """``compute()``, or what it returned the last time for the same tensors."""
        if any(tensor.is_inference() or tracks_gradient(tensor) for tensor in tensors):
            return compute()
        addresses = set(_passing.copy().values())
        if any(tensor.untyped_storage().data_ptr() in addresses for tensor in tensors):
            with torch.inference_mode(False), torch.no_grad():
                return compute()
        key = (kind, *(_fingerprint(tensor) for tensor in tensors))
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
        if entry is not None and all(map(torch.equal, entry[0], tensors)):
            return entry[1]
        # What is kept must serve later calls in any mode, so it is no inference tensor.
        with torch.inference_mode(False), torch.no_grad():
            result = compute()
            snapshots = tuple(tensor.detach().clone() for tensor in tensors)
        size = _bytes(result) + _bytes(tensors)
        with self._lock:
            if size <= self.budget:
                self._entries[key] = (snapshots, result, size)
            self._evict()
        return result

    def holds(self, kind: Hashable, tensors: tuple[Tensor, ...]) -> bool:
        """Whether `get` would compute nothing."""
        with self._lock:
            entry = self._entries.get((kind, *(_fingerprint(tensor) for tensor in tensors)))
        return entry is not None and all(map(torch.equal, entry[0], tensors))

    def _evict(self) -> None:
        while len(self._entries) > self._most or sum(size for *_, size in self._entries.values()) > self.budget:
            self._entries.popitem(last=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorCache:
        return self

    def __reduce__(self) -> tuple[type[TensorCache], tuple[int, int]]:
        return TensorCache, (self.budget, self._most // _ENTRIES)


def _fingerprint(x: Tensor) -> Hashable:
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x.device


def _bytes(result: Any) -> int:
    if isinstance(result, Tensor):
        return result.untyped_storage().nbytes()
    if isinstance(result, dict):
        return sum(_bytes(value) for value in result.values())
    if isinstance(result, (tuple, list)):
        return sum(_bytes(value) for value in result)
    return getattr(result, "nbytes", 0)
