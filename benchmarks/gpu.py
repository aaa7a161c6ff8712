"""Everything that one accelerator has to show, in eight minutes: ``make bench-gpu``, or ``python -m benchmarks.gpu``.

Runs the tests that need a device, and measures products, Grams, the posterior of two million rows, the Gram of a
ResNet-18 and infinite-width kernels. Each part has a process and a time limit of its own, so that its failure stops no
other; what there is by then is written after each, to ``benchmarks/results/gpu-DEVICE.json``, with what failed and why.
``--device cpu --toy`` runs all of it at toy sizes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
import torch

import gpntk
from benchmarks.inference_suites import millions
from benchmarks.infinite_suites import KERNELS, Case, timed
from benchmarks.measure import provenance, relative_error, seconds_on
from benchmarks.peak import peak_bytes
from benchmarks.suites import gram, products
from tests.architectures import ResNet

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SEED = 0
LIMIT = 480.0
"""Seconds for all parts together."""
# Characters kept of what a failed part printed last.
_KEPT = 2000

Rows = list[dict[str, Any]]


class Part(NamedTuple):
    """One measurement: from device, dtype and whether at toy sizes to rows of figures, within a number of seconds."""

    run: Callable[[torch.device, torch.dtype, bool], Rows]
    limit: float


class Outcome(NamedTuple):
    """What became of a part: ``"done"``, ``"failed"``, ``"out of time"`` or ``"not begun"``."""

    outcome: str
    seconds: float
    rows: Sequence[dict[str, Any]] = ()
    peak_gib: float = 0.0
    """Largest memory of the device, or of the process on a CPU."""
    message: str = ""


def gpu_tests(_device: torch.device, _dtype: torch.dtype, toy: bool) -> Rows:
    """``pytest -m gpu``: how many passed, and which failed. Without a device they are all skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        where = "tests/test_gpu.py" if toy else "tests"
        options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", f"--rootdir={ROOT}"]
        code = pytest.main([*options, str(ROOT / where)])
        cases = list(ElementTree.parse(report).iter("testcase"))
    tags = [{child.tag for child in case} for case in cases]
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case, tag in zip(cases, tags, strict=True)
        if tag & {"failure", "error"}
    ]
    skipped = sum("skipped" in tag for tag in tags)
    passed = len(cases) - skipped - len(failed)
    return [{"exit_code": int(code), "passed": passed, "skipped": skipped, "failed": failed}]


def all_products(device: torch.device, dtype: torch.dtype, toy: bool) -> Rows:
    """K V for an MLP 784-512-512-1, at the CPU's size and at ten times as many rows (`benchmarks.suites.products`)."""
    if toy:
        return products(device, dtype, 20, (1,))
    return [row for count in (2000, 20_000) for row in products(device, dtype, count)]


def dense_grams(device: torch.device, dtype: torch.dtype, toy: bool) -> Rows:
    """The dense Gram of the same network beside its own GEMMs (`benchmarks.suites.gram`)."""
    return [row for count in ((20,) if toy else (2000, 20_000)) for row in gram(device, dtype, count)]


def posterior(device: torch.device, dtype: torch.dtype, toy: bool) -> Rows:
    """Scale, noise, 1,000 means and variances of two million rows (`benchmarks.inference_suites.millions`)."""
    return millions(device, dtype, 6000 if toy else 2_000_000)


def resnet_gram(device: torch.device, dtype: torch.dtype, toy: bool) -> Rows:
    """The dense Gram of a ResNet-18 with 10 outputs for images 3 x 32 x 32, its error on two images against float64."""
    count = 3 if toy else 500
    module = (ResNet((1, 1), width=4) if toy else ResNet()).eval().to(device, dtype)
    x = torch.randn(count, 3 * 32**2, device=device, dtype=dtype)
    kernel = gpntk.NTKKernel(module, input_shape=(3, 32, 32))
    elapsed = seconds_on(lambda new: kernel(new).to_dense(), lambda: torch.randn_like(x), 1)
    found = kernel(x[:2]).to_dense()
    exact = gpntk.NTKKernel(module.double(), input_shape=(3, 32, 32))(x[:2].double()).to_dense()
    parameters = sum(parameter.numel() for parameter in module.parameters())
    size = {"images": count, "rows": 10 * count, "parameters": parameters}
    return [{**size, "seconds": elapsed, "error": relative_error(found, exact)}]


def infinite_kernels(device: torch.device, dtype: torch.dtype, toy: bool) -> Rows:
    """Dense NNGP and NTK of three hidden ReLU layers: fully connected, convolutions flattened, convolutions pooled."""
    sizes = {"fc": 20, "flatten": 2} if toy else {"fc": 20_000, "flatten": 500, "pool": 16}
    rows = []
    for network, count in sizes.items():
        case = Case(network, count, None)
        x = torch.randn(count, torch.Size(case.input_shape).numel(), device=device, dtype=dtype)
        for kind in KERNELS:
            wall, _ = timed(case.kernel(kind), x, repeats=1 if toy else 3)
            rows.append({"case": network, "kernel": kind, "N": count, "seconds": wall})
    return rows


PARTS: dict[str, Part] = {
    "tests": Part(gpu_tests, 150),
    "products": Part(all_products, 60),
    "gram": Part(dense_grams, 60),
    "posterior": Part(posterior, 90),
    "resnet-gram": Part(resnet_gram, 90),
    "infinite": Part(infinite_kernels, 90),
}


def within(command: list[str], limit: float) -> Outcome:
    """Run a command that prints rows and peak memory as JSON in its last line, for at most so many seconds."""
    start = time.perf_counter()
    if limit <= 0:
        return Outcome("not begun", 0.0, message="no time was left")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit, cwd=ROOT)
    except subprocess.TimeoutExpired as error:
        said = (error.stderr or b"").decode(errors="replace")[-_KEPT:]
        said = f"stopped after {limit:.0f} s. {said}".strip()
        return Outcome("out of time", time.perf_counter() - start, message=said)
    elapsed = time.perf_counter() - start
    if done.returncode:
        return Outcome("failed", elapsed, message=(done.stdout + done.stderr)[-_KEPT:].strip())
    return Outcome("done", elapsed, **json.loads(done.stdout.splitlines()[-1]))


def run(commands: Mapping[str, tuple[list[str], float]], about: dict[str, Any], path: Path) -> dict[str, Any]:
    """Run every command within its own limit and that of all; write what there is after each."""
    start = time.perf_counter()
    parts: dict[str, Any] = {}
    result = {"suite": "gpu", **about, "seconds": 0.0, "parts": parts}
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, (command, limit) in commands.items():
        outcome = within(command, min(limit, LIMIT - (time.perf_counter() - start)))
        parts[name] = outcome._asdict()
        result["seconds"] = time.perf_counter() - start
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {outcome.outcome}, {outcome.seconds:.0f} s  {outcome.message}", flush=True)
        for row in outcome.rows:
            print("   ", row, flush=True)
    return result


def main() -> None:
    """Run all parts, or one of them in this process, which prints its rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--toy", action="store_true", help="toy sizes, to try the script itself")
    parser.add_argument("--only", choices=sorted(PARTS), action="append", help="default: all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device, dtype = torch.device(options.device), torch.float32
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device here: give --device cpu --toy to try the script.")
    names = options.only or list(PARTS)
    if options.here:
        torch.manual_seed(SEED)
        rows = [row for name in names for row in PARTS[name].run(device, dtype, options.toy)]
        print(json.dumps({"rows": rows, "peak_gib": peak_bytes(options.device) / 2**30}), flush=True)
        return
    arguments = ["--here", "--device", options.device, *(["--toy"] if options.toy else [])]
    commands = {
        name: ([sys.executable, "-m", "benchmarks.gpu", *arguments, "--only", name], PARTS[name].limit)
        for name in names
    }
    about = {**provenance(device, dtype, SEED), "toy": options.toy}
    result = run(commands, about, options.out / f"gpu-{device.type}.json")
    bad = [name for name, part in result["parts"].items() if part["outcome"] != "done"]
    print(f"{result['seconds']:.0f} s; " + (f"not done: {', '.join(bad)}" if bad else "all parts done"))


if __name__ == "__main__":
    main()
