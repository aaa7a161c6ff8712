"""README and docs say what is true: their code runs, prints what they print, and is narrow enough to read.

A page is one program: its Python blocks run in order in one namespace. A ``text`` block is what the block before it
prints, but for a tenth of its numbers. Code in the last column of a table, and code in a sentence that calls something
of ours, runs after the blocks of its page.
"""

import ast
import contextlib
import io
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib as mpl
import pytest
import torch

import gpntk

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
COLUMNS = 88
# Needs several processes: tests/test_sharded.py runs it.
ELSEWHERE = "scaling.md"
SETUP = """
import torch, gpntk
network = torch.nn.Sequential(torch.nn.Linear(4, 20), torch.nn.ReLU(), torch.nn.Linear(20, 3))
x = torch.rand(30, 4)
y = torch.rand(30, 3)
labels = torch.arange(30) % 3
"""


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall(page.read_text()) if kind == language]


def ours() -> dict[str, ModuleType | Any]:
    """Every public class and function by its own name, as sentences write them."""
    rooms = [gpntk.inference, gpntk.jacobians, gpntk.infinite, gpntk.models, gpntk.likelihoods, gpntk.operators, gpntk]
    return {name: getattr(room, name) for room in rooms for name in room.__all__}


def numbers(text: str) -> tuple[list[float], str]:
    found = re.findall(r"\d+(?:\.\d+)?", text)
    return [float(number) for number in found], re.sub(r"\d+(?:\.\d+)?", "#", text)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")


@cache
def run_blocks(page: Path) -> dict[str, Any]:
    """The namespace after all blocks of the page, each ``text`` block compared with what was printed before it."""
    namespace: dict[str, Any] = {}
    printed = ""
    if not blocks(page, "python"):
        exec(SETUP, namespace)  # for lines in sentences
    for language, code in BLOCK.findall(page.read_text()):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, name(page), "exec"), namespace)
            printed = out.getvalue()
        elif language == "text":
            (said, words), (true, true_words) = numbers(code), numbers(printed)
            assert words == true_words, printed
            assert said == pytest.approx(true, rel=0.1, abs=0.02), printed
    return namespace


def code_in_tables(text: str) -> list[str]:
    rows = [line for line in text.splitlines() if line.startswith("|") and not set(line) <= set("|- ")]
    return [span for row in rows for span in SPAN.findall(row.strip("|").rpartition("|")[2])]


def calls_in_text(text: str) -> list[str]:
    """Spans that call something of ours by name, as ``gpntk.NTKKernel(network)`` or ``NTKKernel(network)``."""
    call = re.compile(rf"gpntk\.[\w.]+\(|(?<![\w.])({'|'.join(ours())})\(")
    return [span for span in SPAN.findall(BLOCK.sub("", text)) if call.search(span)]


def run_line(line: str, namespace: dict[str, Any]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        if isinstance(ast.parse(line).body[0], ast.Expr):
            eval(line, namespace)
        else:
            exec(line, namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != ELSEWHERE], ids=name)
def test_the_code_of_a_page_runs(page: Path) -> None:
    namespace = run_blocks(page)
    if name(page) == "docs/features.md":
        lines = code_in_tables(page.read_text())
        assert len(lines) >= 40
    else:
        lines = calls_in_text(page.read_text())
        namespace = {**ours(), **namespace}
    for line in lines:
        try:
            run_line(line, namespace)
        except Exception as error:
            raise AssertionError(f"{name(page)}: `{line}` does not run") from error


def test_the_gpytorch_model_of_the_readme_predicts() -> None:
    namespace = run_blocks(ROOT / "README.md")
    errors = namespace["prediction"].mean - namespace["truth"]
    assert errors.square().mean().sqrt() < 0.5 * torch.as_tensor(namespace["before"]).square().mean().sqrt()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lines_of_code_are_narrow(page: Path) -> None:
    # Tutorials have the same limit in tutorials/ruff.toml.
    code = "".join(body for _, body in BLOCK.findall(page.read_text()))
    assert not [line for line in code.splitlines() if len(line) > COLUMNS]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 100


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*/*.md"))], ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", BLOCK.sub("", page.read_text()))
    assert not [target for target in targets if "://" not in target and not (page.parent / target).exists()]
