"""Files: whole or not at all, and what is missing, forged or foreign is called by its name."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gpntk.errors import FileFormatError, InputError
from gpntk.io import Checkpoint, Contents, checksum, load_tensors, save_tensors

ROOT = Path(__file__).parent.parent
TENSORS = {"data.x": torch.ones(2, 3), "data.y": torch.zeros(2), "bound": torch.tensor(1.0)}
FACTS = {"rows": 2, "name": "it", "share": 0.5, "list": [1, None]}


def read(contents: Contents) -> None:
    """Everything that a reader expects of a file."""
    contents.group("data.", {"x": torch.empty(2, 3), "y": torch.empty(2)})
    contents.tensor("bound", ())
    for name, kind in (("rows", int), ("name", str), ("share", float), ("list", list)):
        contents.fact(name, kind)
    contents.finish()


def test_every_bit_survives(tmp_path: Path) -> None:
    strange = torch.tensor([1e-320, math.nan, -math.inf, -0.0, 0.1 + 0.2], dtype=torch.float64)
    tensors = {"strange": strange, "transposed": torch.arange(6.0).reshape(2, 3).mT, "none": torch.zeros(0, 4)}
    facts = {"number": 0.1 + 0.2, "tiny": -math.pi * 1e-300, "infinite": -math.inf, "nothing": None, "many": [1, "a"]}
    save_tensors(tmp_path / "file", "Thing", tensors, facts)
    contents = load_tensors(tmp_path / "file", "Thing")
    for name, tensor in tensors.items():
        assert torch.equal(contents.tensor(name).nan_to_num(7.0), tensor.nan_to_num(7.0))
        assert torch.equal(contents.tensor(name).signbit(), tensor.signbit())
    assert {name: contents.fact(name) for name in facts} == facts
    # What was read is no view of the file, which may be replaced.
    contents.tensor("strange").zero_()
    assert not load_tensors(tmp_path / "file", "Thing").tensor("strange").isfinite().all()


# --- files that were made by others ----------------------------------------------------------------------------------


def without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


FORGED: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    **{f"no {name}": (without(TENSORS, name), FACTS, f"it has no tensor '{name}'") for name in TENSORS},
    **{f"no {name}": (TENSORS, without(FACTS, name), f"it has no fact '{name}'") for name in FACTS},
    **{
        f"shape of {name}": ({**TENSORS, name: torch.zeros(7)}, FACTS, rf"its tensor '{name}' has shape \(7,\), not")
        for name in TENSORS
    },
    **{f"type of {name}": (TENSORS, {**FACTS, name: {}}, f"its fact '{name}' is {{}}, of type dict") for name in FACTS},
    "truth value": (TENSORS, {**FACTS, "rows": True}, "its fact 'rows' is True, of type bool"),
    "extra in a group": ({**TENSORS, "data.z": torch.zeros(1)}, FACTS, "its tensor 'data.z' does not belong there"),
    "extra tensor": ({**TENSORS, "z": torch.zeros(1)}, FACTS, "its tensor 'z' does not belong there"),
    "extra fact": (TENSORS, {**FACTS, "z": 1}, "its fact 'z' does not belong there"),
}


@pytest.mark.parametrize("name", FORGED)
def test_what_does_not_fit_is_named(name: str, tmp_path: Path) -> None:
    tensors, facts, message = FORGED[name]
    save_tensors(tmp_path / "file", "Thing", TENSORS, FACTS)
    read(load_tensors(tmp_path / "file", "Thing"))
    save_tensors(tmp_path / "file", "Thing", tensors, facts)
    with pytest.raises(FileFormatError, match=f"file' does not fit: {message}"):
        read(load_tensors(tmp_path / "file", "Thing"))


HEADERS = {
    "no JSON": "{",
    "a list": "[]",
    "no facts": json.dumps({"kind": "Thing", "version": 1}),
    "no kind": json.dumps({"facts": {}, "version": 1}),
    "facts are a number": json.dumps({"kind": "Thing", "version": 1, "facts": 3}),
    "version is no number": json.dumps({"kind": "Thing", "version": "new", "facts": {}}),
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_others(name: str, tmp_path: Path) -> None:
    header = HEADERS[name]
    save_file(TENSORS, tmp_path / "file", metadata={"gpntk": header, "checksum": checksum(TENSORS, header)})
    with pytest.raises(FileFormatError, match="its header has no kind, version, facts"):
        load_tensors(tmp_path / "file", "Thing")


def test_values_are_compared_up_to_rounding() -> None:
    contents = Contents("file", {"outputs": torch.tensor([1.0, 2.0])}, {})
    contents.same_values("outputs", torch.tensor([1.0, 2.001]))
    with pytest.raises(FileFormatError, match=r"its tensor 'outputs' is \[1.0, 2.0\], but here it is \[1.0, 2.1\]"):
        contents.same_values("outputs", torch.tensor([1.0, 2.1]))


# --- leftovers -------------------------------------------------------------------------------------------------------

KILLED = """
import os, sys, torch, gpntk.io
gpntk.io.os.fsync = lambda _: os._exit(9)
gpntk.io.save_tensors(sys.argv[1], "Thing", {"a": torch.zeros(3)}, {})
"""


def test_a_save_that_was_killed_leaves_nothing_for_good(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_tensors(path, "Thing", TENSORS, FACTS)
    (tmp_path / "file2.12345678.part").touch()
    (tmp_path / "file.part").touch()
    others = set(tmp_path.iterdir())
    dead = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, check=False)
    assert dead.returncode == 9
    assert len(set(tmp_path.iterdir()) - others) == 1
    read(load_tensors(path, "Thing"))
    save_tensors(path, "Thing", TENSORS, FACTS)
    assert set(tmp_path.iterdir()) == others


def test_a_save_leaves_alone_what_another_is_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, fsync, parts = tmp_path / "file", os.fsync, []

    def interrupted(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        save_tensors(path, "Thing", {}, {"writer": 2})
        parts.extend(tmp_path.glob("*.part"))

    monkeypatch.setattr(os, "fsync", interrupted)
    save_tensors(path, "Thing", {}, {"writer": 1})
    assert len(parts) == 1
    assert load_tensors(path, "Thing").fact("writer") == 1
    assert list(tmp_path.iterdir()) == [path]


def test_links_and_permissions_are_those_of_any_file(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link, plain = tmp_path / "link", tmp_path / "plain"
    link.symlink_to(tmp_path / "far" / "file")
    save_tensors(link, "Thing", {}, {"a": 1})
    assert link.is_symlink()
    assert load_tensors(tmp_path / "far" / "file", "Thing").fact("a") == 1
    plain.touch()
    assert (tmp_path / "far" / "file").stat().st_mode == plain.stat().st_mode


# --- checkpoints -----------------------------------------------------------------------------------------------------

START: tuple[dict[str, Tensor], dict[str, Any]] = (
    {"value": torch.zeros(2, dtype=torch.float64)},
    {"steps": 0, "best": -math.inf},
)


def test_a_checkpoint_holds_what_was_saved(tmp_path: Path) -> None:
    first = Checkpoint(tmp_path / "file", "count", {"data": "these", "rows": 3, "level": 1.0})
    assert first.begin(*START) == START
    value, facts = torch.tensor([1 / 3, math.pi], dtype=torch.float64), {"steps": 7, "best": 0.1 + 0.2}
    first.save({"value": value}, facts)
    loaded = Checkpoint(tmp_path / "file", "count", {"data": "these", "rows": 3, "level": 1.0005}).begin(*START)
    assert torch.equal(loaded[0]["value"], value)
    assert loaded[1] == facts


def test_pieces_follow_one_another(tmp_path: Path) -> None:
    """Each piece of the work finds what is its own, as far as it had come; those after it begin afresh."""

    def work(stops: int) -> list[int]:
        checkpoint, found = Checkpoint(tmp_path / "file", "count", {}), []
        for size in (1, 3, 2):
            _, facts = checkpoint.begin({"value": torch.zeros(size)}, {"steps": 0})
            found.append(facts["steps"])
            for step in range(facts["steps"] + 1, 4):
                stops -= 1
                if stops < 0:
                    return found
                checkpoint.save({"value": torch.full((size,), float(step))}, {"steps": step})
        return found

    assert work(5) == [0, 0]
    assert work(2) == [3, 2, 0]
    assert work(9) == [3, 3, 1]
    assert work(0) == [3, 3, 3]
    contents = load_tensors(tmp_path / "file", "count")
    assert torch.equal(contents.tensor("1.value"), torch.full((3,), 3.0))


IDENTITY = {"data": "these", "rows": 3}
OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "text": ("count", {"data": "those", "rows": 3}, "another count: its data: these, but here: those"),
    "integer": ("count", {"data": "these", "rows": 4}, "another count: its rows: 3, but here: 4"),
    "new part": ("count", {"colour": "red"}, "another count: its colour: None, but here: red"),
    "kind": ("solve", IDENTITY, "holds a count, not a solve"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_checkpoints_of_other_work_are_refused(name: str, tmp_path: Path) -> None:
    kind, identity, message = OTHERS[name]
    own = Checkpoint(tmp_path / "file", "count", IDENTITY)
    own.begin(*START)
    own.save(*START)
    with pytest.raises(FileFormatError, match=message):
        Checkpoint(tmp_path / "file", kind, identity)


def test_checkpoints_that_were_forged_are_refused(tmp_path: Path) -> None:
    path, value, piece = tmp_path / "file", START[0]["value"], START[1]
    forged: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
        "no fact 'identity'": ({"0.value": value}, {"pieces": [piece]}),
        "fact 'identity' is 3": ({"0.value": value}, {"pieces": [piece], "identity": 3}),
        "no fact 'pieces'": ({"0.value": value}, {"identity": IDENTITY}),
        "fact 'z' does not belong": ({"0.value": value}, {"pieces": [piece], "identity": IDENTITY, "z": 1}),
        "no fact 'steps'": ({"0.value": value}, {"pieces": [without(piece, "steps")], "identity": IDENTITY}),
        "no fact 'best'": ({"0.value": value}, {"pieces": [{"steps": 3}], "identity": IDENTITY}),
        "no fact": ({"0.value": value}, {"pieces": [3], "identity": IDENTITY}),
        "fact 'best' is 'x'": ({"0.value": value}, {"pieces": [{**piece, "best": "x"}], "identity": IDENTITY}),
        "fact 'y' does not belong": ({"0.value": value}, {"pieces": [{**piece, "y": 1}], "identity": IDENTITY}),
        "no tensor '0.value'": ({}, {"pieces": [piece], "identity": IDENTITY}),
        r"tensor '0.value' has shape \(3,\)": (
            {"0.value": torch.zeros(3)},
            {"pieces": [piece], "identity": IDENTITY},
        ),
        "tensor '0.z' does not belong": (
            {"0.value": value, "0.z": value},
            {"pieces": [piece], "identity": IDENTITY},
        ),
    }
    for message, (tensors, stored) in forged.items():
        save_tensors(path, "count", tensors, stored)
        with pytest.raises(FileFormatError, match=message):
            Checkpoint(path, "count", IDENTITY).begin(*START)


def test_places_that_cannot_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder: give the name of a file"):
        Checkpoint(tmp_path, "count", {})
    with pytest.raises(InputError, match=r"there is no folder .*nowhere'"):
        Checkpoint(tmp_path / "nowhere" / "file", "count", {})
