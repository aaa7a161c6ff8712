"""One file for tensors and facts: safetensors with a JSON header, a version and a checksum. Knows no models."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gpntk.errors import FileFormatError

FORMAT_VERSION = 1


def save_tensors(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write ``tensors`` and JSON-serialisable ``facts`` to ``path``, whole or not at all.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_tensors(f"{folder}/file", "Example", {"a": torch.ones(2)}, {"answer": 42})
        ...     load_tensors(f"{folder}/file", "Example")
        ({'a': tensor([1., 1.])}, {'answer': 42})

    Args:
        path: File to write; an existing one is replaced only once the new one is complete.
        kind: What the file holds, e.g. ``"TransferRegressor"``; `load_tensors` refuses another kind.
        tensors: Tensors by name.
        facts: Everything else.
    """
    # Copies: safetensors refuses tensors that share memory.
    stored = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    header = {"kind": kind, "version": FORMAT_VERSION, "facts": dict(facts)}
    text = json.dumps(header, sort_keys=True)
    data = save(stored, metadata={"gpntk": text, "checksum": checksum(stored, text)})
    target = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            # Else a machine that loses power may keep the new name and lose the contents.
            os.fsync(file.fileno())
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: tensors by name, and facts.

    Raises:
        FileNotFoundError: There is no such file.
        FileFormatError: The file is damaged, was not written by gpntk, holds another kind, or is of a newer version.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {os.fspath(path)!r}.")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise FileFormatError(
            f"{os.fspath(path)!r} is no readable safetensors file ({error}); it may be cut short."
        ) from None
    if "gpntk" not in metadata:
        raise FileFormatError(f"{os.fspath(path)!r} was not written by gpntk: it has no gpntk header.")
    if metadata.get("checksum") != checksum(tensors, metadata["gpntk"]):
        raise FileFormatError(f"{os.fspath(path)!r} is damaged: its checksum does not match its contents.")
    header = json.loads(metadata["gpntk"])
    if header["version"] > FORMAT_VERSION:
        raise FileFormatError(
            f"{os.fspath(path)!r} has format version {header['version']}, newer than {FORMAT_VERSION}: update gpntk."
        )
    if header["kind"] != kind:
        raise FileFormatError(f"{os.fspath(path)!r} holds a {header['kind']}, not a {kind}.")
    return tensors, header["facts"]


def checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 of ``text`` and of the names, dtypes, shapes and bytes of ``tensors``, all on the CPU."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
