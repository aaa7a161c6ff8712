"""Public names: every name that the docs print is there after ``import gpntk`` alone, and few stand at the top."""

import inspect
import re
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest

import gpntk
from gpntk.estimators.base import TransferEstimator

ROOT = Path(__file__).parent.parent
# The changelog also names what is gone.
PAGES = [
    *(ROOT / "docs").rglob("*.md"),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(ROOT / "tutorials").glob("*.py"),
]
# A name of the house in text or code; what follows a call is not looked up.
NAME = re.compile(r"(?<![\w./-])gpntk(?:\.[A-Za-z_]\w*)+")


def documented() -> set[str]:
    names = {name for page in PAGES for name in NAME.findall(page.read_text())}
    listed = re.findall(r"^   ([A-Za-z][\w.]+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    sources = {name for path in (ROOT / "gpntk").rglob("*.py") for name in NAME.findall(path.read_text())}
    return {
        name
        for name in names | sources | {f"gpntk.{name}" for name in listed}
        if not re.search(r"\.(py|git|readthedocs)$", name)
    }


def look_up(name: str) -> None:
    found: object = gpntk
    for part in name.split(".")[1:]:
        found = getattr(found, part)


def test_every_documented_name_is_there_after_one_import() -> None:
    # One interpreter that has imported nothing but the package.
    script = (
        "import functools, sys, gpntk\n"
        "for name in sys.argv[1:]:\n"
        "    try: functools.reduce(getattr, name.split('.')[1:], gpntk)\n"
        "    except AttributeError as error: print(name, error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *sorted(documented())], capture_output=True, text=True, check=True, cwd=ROOT
    )
    missing = result.stdout
    assert len(documented()) > 50
    assert not missing, missing


def test_about_twenty_names_stand_at_the_top() -> None:
    names = [name for name in dir(gpntk) if not name.startswith("_")]
    assert len(gpntk.__all__) <= 20
    assert len(names) <= 30
    assert set(gpntk.__all__) <= set(names)
    for name in names:
        getattr(gpntk, name)


def test_a_name_of_a_room_is_pointed_to() -> None:
    with pytest.raises(AttributeError, match=r"gpntk\.jacobians\.AverageBackend exists"):
        _ = gpntk.AverageBackend
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'$"):
        _ = gpntk.nothing


def public_classes() -> dict[str, type]:
    """Classes that users construct, by name; results and enumerations are made for them."""
    rooms = [gpntk, *(getattr(gpntk, room) for room in ("jacobians", "inference", "infinite", "likelihoods", "models"))]
    found = {name: getattr(room, name) for room in rooms for name in room.__all__}
    classes = {name: value for name, value in found.items() if isinstance(value, type)}
    return {name: value for name, value in classes.items() if not issubclass(value, (tuple, Enum))}


@pytest.mark.parametrize(("name", "kind"), public_classes().items(), ids=public_classes())
def test_constructors_say_what_they_take(name: str, kind: type) -> None:
    documentation = kind.__doc__ or ""
    if issubclass(kind, (TransferEstimator, gpntk.TransferGP)):  # whose shared options are documented there, once
        documentation += TransferEstimator.__doc__ or ""
    kinds = inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL
    taken = [parameter.name for parameter in inspect.signature(kind).parameters.values() if parameter.kind not in kinds]
    assert not [argument for argument in taken if f"{argument}:" not in documentation], name
