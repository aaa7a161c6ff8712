"""One file for tensors and facts: safetensors with a JSON header, a version and a checksum. Knows no models.

`save_tensors` and `load_tensors` write and read any file of ours; what was read is a `Contents`, which says by name
what is missing, has another shape, or does not belong there. A `Checkpoint` is such a file for work that may be
stopped: it remembers what the work was, and is taken up for no other.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gpntk._checks import check_kinds, check_tensors
from gpntk.errors import FileFormatError, GpntkError, InputError

try:
    import fcntl
except ImportError:  # pragma: no cover (Windows)
    fcntl = None

FORMAT_VERSION = 1

# Numbers that describe the same work differ by rounding between machines, TF32 included; other work by more than this.
_SAME = 1e-3
# What outputs of one network may differ by on another machine, relative to the largest: float32 with TF32.
_ROUNDING = 1e-2

Identity = Mapping[str, str | int | float]
"""What a piece of work is, by the name of each part: a text or integer to compare, or a float to compare to 1e-3."""


# --- files -----------------------------------------------------------------------------------------------------------


@final
class Contents:
    """The tensors and facts of a file, each asked for by its name and by what it must be.

    Whatever does not fit raises `FileFormatError` with its name: a file may be old, foreign or forged.

    Args:
        path: Where they come from.
        tensors: Tensors by name.
        facts: All else by name.

    Example:
        >>> import torch
        >>> contents = Contents("file", {"data.x": torch.ones(2, 3)}, {"rows": 2})
        >>> contents.fact("rows", int), contents.group("data.")["x"].shape
        (2, torch.Size([2, 3]))
        >>> contents.tensor("data.x", (3, 3))
        Traceback (most recent call last):
        gpntk.errors.FileFormatError: 'file' does not fit: its tensor 'data.x' has shape (2, 3), not (3, 3).
    """

    def __init__(self, path: str | os.PathLike[str], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.path, self._tensors, self._facts = os.fspath(path), tensors, facts
        self._asked: set[str] = set()

    def fact(self, name: str, kind: type | tuple[type, ...] = object) -> Any:
        """The fact of this name, of type ``kind``."""
        self._asked.add(f"fact {name!r}")
        if name not in self._facts:
            raise self._error(f"it has no fact {name!r}")
        value = self._facts[name]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        # To Python a truth value is an integer.
        if not isinstance(value, kinds) or (type(value) is bool and not {bool, object} & {*kinds}):
            raise self._error(f"its fact {name!r} is {value!r}, of type {type(value).__name__}")
        return value

    def listed(self, name: str, kind: type | tuple[type, ...]) -> list[Any]:
        """The fact of this name, a list of ``kind``."""
        items = Contents(self.path, {}, {f"{name}[{i}]": item for i, item in enumerate(self.fact(name, list))})
        return [items.fact(place, kind) for place in items._facts]

    def part(self, name: str) -> Contents:
        """The fact of this name, a mapping, as contents of its own, all of which must be asked for."""
        return Contents(self.path, {}, {f"{name}.{key}": value for key, value in self.fact(name, dict).items()})

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """The tensor of this name, of this shape if one is given."""
        self._asked.add(f"tensor {name!r}")
        if name not in self._tensors:
            raise self._error(f"it has no tensor {name!r}")
        tensor = self._tensors[name]
        if shape is not None and tensor.shape != shape:
            raise self._error(f"its tensor {name!r} has shape {tuple(tensor.shape)}, not {tuple(shape)}")
        return tensor

    def group(self, prefix: str, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Tensors by what follows ``prefix`` in their names: all that there are, or those of ``like`` in its shapes."""
        if like is None:
            found = {name: self.tensor(name) for name in self._tensors if name.startswith(prefix)}
            return _Group({name.removeprefix(prefix): tensor for name, tensor in found.items()}, self, prefix)
        return {name: self.tensor(prefix + name, tuple(tensor.shape)) for name, tensor in like.items()}

    def numbers(self, prefix: str) -> dict[str, Tensor]:
        """`group` of all that there are, which must be real numbers."""
        found = self.group(prefix)
        for name, tensor in found.items():
            if tensor.is_complex() or not bool(tensor.isfinite().all()):
                raise self._error(f"its tensor {prefix + name!r} holds NaN, infinite or complex numbers")
        return found

    def same_kinds(self, prefix: str, own: Mapping[str, Tensor]) -> None:
        """Refuse a file whose tensors of these names are not those of ``own``, of the same shapes and dtypes."""
        for name, tensor in self.group(prefix, own).items():
            if tensor.dtype != own[name].dtype:
                raise self._error(f"its tensor {prefix + name!r} holds {tensor.dtype}, not {own[name].dtype}")
        if extra := sorted(set(self.group(prefix)) - set(own)):
            raise self._error(f"its tensor {prefix + extra[0]!r} does not belong there")

    def same_values(self, name: str, values: Tensor) -> None:
        """Refuse a file whose tensor of this name is not ``values``, up to what machines differ by."""
        stored = self.numbers(name)[""].to(values) if self.tensor(name, tuple(values.shape)).numel() else values
        if not bool((stored - values).abs().max() <= _ROUNDING * stored.abs().max()):
            there, here = ([round(value, 4) for value in t.flatten()[:4].tolist()] for t in (stored, values))
            raise self._error(f"its tensor {name!r} is {there}, but here it is {here}")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within it, whatever fails is the file's fault; and at its end, so is what nobody has asked for."""
        try:
            yield
        except FileFormatError:
            raise
        except GpntkError as error:
            raise self._error(f"its contents do not go together ({error})") from error
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise self._error(f"its contents do not go together ({type(error).__name__}: {error})") from error
        self.finish()

    def finish(self) -> None:
        """Refuse what nobody has asked for."""
        names = {*(f"tensor {name!r}" for name in self._tensors), *(f"fact {name!r}" for name in self._facts)}
        if names - self._asked:
            raise self._error(f"its {min(names - self._asked)} does not belong there")

    def _error(self, problem: str) -> FileFormatError:
        return FileFormatError(f"{self.path!r} does not fit: {problem}.")


class _Group(dict[str, Tensor]):
    """Tensors by name, which say of a missing one that the file does not have it."""

    def __init__(self, tensors: Mapping[str, Tensor], contents: Contents, prefix: str) -> None:
        super().__init__(tensors)
        self._contents, self._prefix = contents, prefix

    def __missing__(self, name: str) -> Tensor:
        return self._contents.tensor(self._prefix + name)


def save_tensors(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write ``tensors`` and JSON-serialisable ``facts`` to ``path``, whole or not at all.

    The file is written under another name, ``path`` with ``.part`` at its end, and renamed. What a process that was
    killed has left of that is removed by the next one that saves there.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_tensors(f"{folder}/file", "Example", {"a": torch.ones(2)}, {"answer": 42})
        ...     contents = load_tensors(f"{folder}/file", "Example")
        >>> contents.tensor("a"), contents.fact("answer")
        (tensor([1., 1.]), 42)

    Args:
        path: File to write; an existing one is replaced only once the new one is complete.
        kind: What the file holds, e.g. ``"TransferRegressor"``; `load_tensors` refuses another kind.
        tensors: Tensors by name.
        facts: Everything else.
    """
    _check_place("path", path)
    check_tensors(**tensors)
    # Copies: safetensors refuses tensors that share memory.
    stored = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    text = json.dumps({"kind": kind, "version": FORMAT_VERSION, "facts": dict(facts)}, sort_keys=True)
    data = save(stored, metadata={"gpntk": text, "checksum": checksum(stored, text)})
    # A link stays one, to the new file.
    target = Path(os.path.realpath(path))
    _remove_leftovers(target)
    with _part_of(target) as (file, part):
        file.write(data)
        file.flush()
        # Else a machine that loses power may keep the new name and lose the contents.
        os.fsync(file.fileno())
        if fcntl is None:  # pragma: no cover (Windows renames no open file)
            file.close()
        part.replace(target)


def load_tensors(path: str | os.PathLike[str], kind: str) -> Contents:
    """What `save_tensors` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        FileFormatError: The file is damaged, was not written by gpntk, holds another kind, or is of a newer version.
    """
    check_kinds(str | os.PathLike, "the name of a file", path=path)
    name = os.fspath(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {name!r}.")
    try:
        with safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: what safetensors gives are views of a file that may be replaced.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"{name!r} is no readable safetensors file ({error}); it may be cut short.") from None
    if "gpntk" not in metadata:
        raise FileFormatError(f"{name!r} was not written by gpntk: it has no gpntk header.")
    if metadata.get("checksum") != checksum(tensors, metadata["gpntk"]):
        raise FileFormatError(f"{name!r} is damaged: its checksum does not match its contents.")
    try:
        header = json.loads(metadata["gpntk"])
        version, found, facts = int(header["version"]), str(header["kind"]), dict(header["facts"])
    except (KeyError, TypeError, ValueError, RecursionError):
        raise FileFormatError(f"{name!r} was not written by gpntk: its header has no kind, version, facts.") from None
    if version > FORMAT_VERSION:
        raise FileFormatError(f"{name!r} has format version {version}, newer than {FORMAT_VERSION}: update gpntk.")
    if found != kind:
        raise FileFormatError(f"{name!r} holds a {found}, not a {kind}.")
    return Contents(path, tensors, facts)


def checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 of ``text`` and of the names, dtypes, shapes and bytes of ``tensors``, all on the CPU."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def described(tensors: Tensor | Mapping[str, Tensor]) -> str:
    """Dtype, shape and checksum of a tensor, or one checksum of several, for an `Identity`.

    Example:
        >>> import torch
        >>> described(torch.zeros(2, 3))
        'float32 [2, 3], sha256 81f823a5443ab019'
    """
    if not isinstance(tensors, Tensor):
        return f"sha256 {checksum({name: tensor.detach().cpu() for name, tensor in tensors.items()}, '')[:16]}"
    dtype = str(tensors.dtype).removeprefix("torch.")
    return f"{dtype} {list(tensors.shape)}, {described({'': tensors})}"


# --- work that may be stopped ----------------------------------------------------------------------------------------


@final
class Checkpoint:
    """A file for work that may be stopped, in one piece or in several that follow one another, and what the work is.

    It is taken up only by the same work: the same data, model and settings, as far as ``identity`` tells them.

    Args:
        path: The file; it need not exist yet, its folder must.
        kind: ``"fit"``, ``"solve"``: what it is a checkpoint of.
        identity: What the work is, by the name of each part.

    Raises:
        InputError: ``path`` is a folder, or stands in one that does not exist.
        FileFormatError: The file is damaged, holds something else, or belongs to other work.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     first = Checkpoint(f"{folder}/file", "count", {"up to": 10})
        ...     _ = first.begin({"value": torch.zeros(1)}, {"steps": 0})
        ...     first.save({"value": torch.ones(1)}, {"steps": 3})
        ...     Checkpoint(f"{folder}/file", "count", {"up to": 10}).begin({"value": torch.zeros(1)}, {"steps": 0})
        ({'value': tensor([1.])}, {'steps': 3})
    """

    def __init__(self, path: str | os.PathLike[str], kind: str, identity: Identity) -> None:
        _check_place("checkpoint", path)
        self._path, self._kind, self._identity = Path(path), kind, dict(identity)
        self._tensors: dict[str, Tensor] = {}
        self._pieces: list[Any] = []
        self._number = -1
        if self._path.exists():
            contents = load_tensors(self._path, kind)
            self._check(contents.fact("identity", dict))
            self._tensors, self._pieces = contents.group(""), contents.fact("pieces", list)
            contents.finish()

    def begin(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Where the next piece of the work stands; ``tensors`` and ``facts``, which also say what it is, if not begun.

        Raises:
            FileFormatError: The file holds another piece.
        """
        self._number += 1
        if self._number >= len(self._pieces):
            return tensors, facts
        prefix, piece = f"{self._number}.", self._pieces[self._number]
        own = {name: tensor for name, tensor in self._tensors.items() if name.startswith(prefix)}
        contents = Contents(self._path, own, piece if isinstance(piece, dict) else {})
        found = contents.group(prefix, tensors)
        facts = {name: contents.fact(name, type(value)) for name, value in facts.items()}
        contents.finish()
        return {name: tensor.to(tensors[name]) for name, tensor in found.items()}, facts

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Replace what the file holds of the present piece, whole or not at all."""
        self._tensors |= {f"{self._number}.{name}": tensor for name, tensor in tensors.items()}
        self._pieces[self._number :] = [dict(facts)]
        save_tensors(self._path, self._kind, self._tensors, {"identity": self._identity, "pieces": self._pieces})

    def _check(self, there: Mapping[str, Any]) -> None:
        differing = [
            f"its {name}: {there.get(name)}, but here: {value}"
            for name, value in self._identity.items()
            if _differ(there.get(name), value)
        ]
        if differing:
            raise FileFormatError(
                f"{str(self._path)!r} is the checkpoint of another {self._kind}: {'; '.join(differing)}. Take what it "
                "was written for, or give another checkpoint, or delete this one to start afresh."
            )


# --- private ---------------------------------------------------------------------------------------------------------


def _check_place(argument: str, path: str | os.PathLike[str]) -> None:
    """Raise `InputError` unless a file can stand there."""
    check_kinds(str | os.PathLike, "the name of a file", **{argument: path})
    place = Path(path)
    if place.is_dir():
        raise InputError(f"{argument}={os.fspath(path)!r} is a folder: give the name of a file in it.")
    if not place.parent.is_dir():
        raise InputError(f"{argument}={os.fspath(path)!r}: there is no folder {str(place.parent)!r}: make it first.")


def _differ(one: Any, two: str | float) -> bool:
    if isinstance(one, float) and isinstance(two, float):
        return not math.isclose(one, two, rel_tol=_SAME)
    return type(one) is not type(two) or one != two


@contextmanager
def _part_of(target: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file beside ``target``, locked while it is written, so that nobody takes it for a leftover."""
    while True:
        part = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")
        file = part.open("xb")
        _lock(file, wait=True)
        # Else another process took it for a leftover before it was locked.
        if os.fstat(file.fileno()).st_nlink:
            break
        file.close()
    try:
        with file:
            yield file, part
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _remove_leftovers(target: Path) -> None:
    """Remove the parts of ``target`` whose writers are gone: the system has released their locks."""
    for part in target.parent.glob(f"{escape(target.name)}.????????.part"):
        # Another process was faster, or this one may not write here.
        with suppress(OSError), part.open("rb") as file:
            if _lock(file, wait=False):
                part.unlink()


def _lock(file: BinaryIO, wait: bool) -> bool:
    """Whether this process has the file for itself now, until it is closed."""
    if fcntl is None:  # pragma: no cover (Windows)
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # its writer has it, or the file system knows no locks
        return False
    return True
