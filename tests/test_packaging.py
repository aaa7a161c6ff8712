"""What is shipped: a wheel that imports without the extras, a runnable demo, files that stay readable."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "gpntk").rglob("*.py"))

SMOKE = """
import importlib.util, torch, gpntk
assert not any(importlib.util.find_spec(name) for name in ("botorch", "matplotlib", "pytest")), "an extra is installed"
kernel = gpntk.NTKKernel(torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)))
print(gpntk.__version__, tuple(kernel(torch.randn(4, 2)).to_dense().shape))
"""


def run(*command: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    parts = [str(part) for part in command]
    result = subprocess.run(parts, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def needed(requirements: Iterable[str]) -> set[str]:
    """Names of the distributions that requirements ask for, and what these ask for in turn, without extras."""
    names: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and requirement.name not in names:
            names.add(requirement.name)
            installed = distribution(requirement.name)
            assert installed.version in requirement.specifier, f"{requirement}: {installed.version} is installed"
            waiting += [Requirement(text) for text in installed.requires or ()]
    return names


def test_the_wheel_imports_with_what_it_asks_for_and_nothing_else(tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", ROOT, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("gpntk-*.whl")
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    (metadata,) = distributions(name="gpntk", path=[str(site)])
    # Its requirements are linked beside it: they are installed already, and a second torch would take minutes.
    for name in needed(metadata.requires or ()):
        for file in distribution(name).files or ():
            link = site / file.parts[0]
            if file.parts[0] != ".." and not link.exists():
                link.symlink_to(distribution(name).locate_file(file.parts[0]))
    # Without the module site, the environment that runs the tests is out of sight.
    environment = {"PYTHONPATH": str(site)}
    output = run(sys.executable, "-S", "-W", "error::ImportWarning", "-c", SMOKE, cwd=tmp_path, env=environment)
    assert output.split(maxsplit=1)[1].strip() == "(4, 4)"
    assert (site / "gpntk" / "py.typed").exists()


# What makes the long tutorials short: the same code on fewer seeds, steps and networks. The docs build runs them whole.
SHORT = {
    "01_transfer_regression": {
        "SEEDS = range(5)": "SEEDS = range(2)",
        "SIZES = (10, 30, 100, 300)": "SIZES = (10, 100)",
        "steps: int = 3000": "steps: int = 300",
        "MOST_STEPS = 200": "MOST_STEPS = 10",
    },
    "02_jacobian_products_of_a_resnet": {
        "ROWS = 64": "ROWS = 16",
        "COLUMNS = (1, 2, 4, 8, 16, 32)": "COLUMNS = (1, 4)",
        "GRAM_ROWS = (8, 16, 32, 64)": "GRAM_ROWS = (4, 8)",
        "MEMORY_ROWS = (64, 256, 1024)": "MEMORY_ROWS = (16,)",
        "repeats: int = 5": "repeats: int = 1",
    },
    "03_exact_gp_on_a_quarter_of_a_million_points": {
        "else 20_000": "else 14_000",
        "UNITS = 32": "UNITS = 12",
        "steps: int = 1500": "steps: int = 300",
    },
    "04_nngp_and_ntk_of_your_own_module": {
        "TRAIN, TEST, CLASSES = 300, 600, 10": "TRAIN, TEST, CLASSES = 80, 80, 10",
        "WIDTHS = (8, 32, 128, 512)": "WIDTHS = (8, 32)",
        "NETWORKS = 20": "NETWORKS = 4",
        "range(30)": "range(3)",
        "torch.linspace(0.25, 4.75, 10)": "torch.linspace(0.25, 4.75, 3)",
        "torch.linspace(0, 1, 6)": "torch.linspace(0, 1, 2)",
    },
    "05_training_in_closed_form": {
        "NETWORKS = 100": "NETWORKS = 4",
        "{16: 32, 64: 32, 256: 16, 1024: 8}": "{16: 2, 64: 2}",
    },
    "06_adapt_a_classifier_with_100_labels": {
        "LABELS = 100": "LABELS = 60",
        "epochs = 30 if": "epochs = 5 if",
        "rate, 150, held_out": "rate, 10, held_out",
    },
    "07_regression_under_domain_shift": {
        "SIZES = (10, 30, 100, 300)": "SIZES = (10, 30)",
        "SEEDS = range(3)": "SEEDS = range(2)",
        "steps: int = 2000": "steps: int = 200",
    },
    "08_your_own_pretrained_network": {
        "SEEDS = range(3)": "SEEDS = range(1)",
        "steps: int = 3000": "steps: int = 200",
    },
}


@pytest.mark.parametrize("tutorial", sorted((ROOT / "tutorials").glob("*.py")), ids=lambda path: path.stem)
def test_tutorials_run(tutorial: Path, tmp_path: Path) -> None:
    text = tutorial.read_text()
    for whole, short in SHORT.get(tutorial.stem, {}).items():
        assert text.count(whole) == 1, f"{tutorial.name} no longer says {whole!r}: change SHORT"
        text = text.replace(whole, short)
    script = tmp_path / tutorial.name
    script.write_text(text)
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONWARNINGS": "default", "PYTHONPATH": str(ROOT)}
    run(sys.executable, script, cwd=tmp_path, env=environment)
    assert list(tmp_path.glob("*.png"))


def test_importing_gpntk_imports_no_extra() -> None:
    run(sys.executable, "-c", "import sys, gpntk; assert not {'botorch', 'matplotlib'} & set(sys.modules)", cwd=ROOT)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_are_short_and_say_what_they_are(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text))
