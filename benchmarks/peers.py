"""Peers, each in its own environment: ``python -m benchmarks.peers --library NAME [--threads T] [--case NAME]``.

The suites in `suites.py` compare inside one process. Here every figure comes from a fresh process of this interpreter,
so that memory can be compared too and libraries that exclude each other need not meet. This file holds the cases and
the protocol, without torch: one ``peers_*.py`` per library says how that library does the work.

Protocol: data and weights come from NumPy seeds; the process is held to T cores and T threads; one warm-up call, then
the median of seven (at least three, if a minute is over), each blocking on its result. Same inputs means that what
depends on x is made once, untimed, as in conjugate gradients; new inputs means random x for every call, and everything
that depends on x inside the timed call, since a cache may know values again. A case waits up to three minutes for
T idle cores; if other processes take them meanwhile it runs again, up to three times, and the least disturbed run
counts. Its row says how disturbed it still was.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

SEED = 0
WIDTHS = (784, 512, 512, 1)
INPUT_SHAPES = {"mlp": (784,), "lenet": (1, 28, 28), "resnet18": (3, 32, 32)}
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
REPEATS, FEWEST_REPEATS, MINUTE = 7, 3, 60.0
ATTEMPTS, TOLERATED_CORES, PATIENCE = 3, 0.15, 180.0


@dataclass(frozen=True)
class Case:
    """One piece of work: K V for k columns, or the dense K for k = 0.

    Attributes:
        network: ``mlp`` (784-512-512-1, tanh), ``lenet`` (28 x 28, C = 10) or ``resnet18`` (32 x 32, C = 10).
        rows: N; K is `[N*C, N*C]`.
        columns: k.
        inputs: Whether x is the same in every call, or new.
    """

    network: str
    rows: int
    columns: int
    inputs: Literal["same", "new"]

    @property
    def name(self) -> str:
        """For the command line."""
        return f"{self.network}-product-{self.columns}-{self.inputs}" if self.columns else f"{self.network}-gram"


@dataclass(frozen=True)
class Library:
    """A peer: the module that does its work, the packages whose versions count, and what it can do."""

    module: str
    packages: tuple[str, ...]
    products: bool = True
    gram: bool = False
    convolutions: bool = True

    def runs(self, case: Case) -> bool:
        """Whether this library takes part in ``case``."""
        return (self.products if case.columns else self.gram) and (self.convolutions or case.network == "mlp")


CASES = (
    *(Case("mlp", 2000, columns, inputs) for columns in (1, 10, 32) for inputs in ("same", "new")),
    Case("mlp", 1000, 0, "new"),
    *(
        Case(network, rows, 8, inputs)
        for network, rows in (("lenet", 1000), ("resnet18", 64))
        for inputs in ("same", "new")
    ),
)

LIBRARIES = {
    "gpntk": Library("peers_gpntk", ("gpntk", "torch", "gpytorch", "linear_operator"), gram=True),
    "torch.func": Library("peers_torch_func", ("torch",)),
    "curvlinops": Library("peers_curvlinops", ("curvlinops-for-pytorch", "torch")),
    "laplace": Library(
        "peers_laplace",
        ("laplace-torch", "backpack-for-pytorch", "torch"),
        products=False,
        gram=True,
        convolutions=False,
    ),
    "neural-tangents": Library(
        "peers_neural_tangents", ("neural-tangents", "jax", "jaxlib"), gram=True, convolutions=False
    ),
}


# --- data and the exact answer ---------------------------------------------------------------------------------------


def normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Standard normal float32 numbers from NumPy's legacy generator, whose stream never changes."""
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def inputs(case: Case, seed: int) -> np.ndarray:
    """Inputs x, flat, `[N, D]`."""
    return normal((case.rows, int(np.prod(INPUT_SHAPES[case.network]))), seed)


def mlp_weights() -> list[tuple[np.ndarray, np.ndarray]]:
    """Weight `[out, in]` and bias `[out]` of each layer, uniform in ±1/√in as torch draws them."""
    random = np.random.RandomState(SEED)

    def uniform(*shape: int) -> np.ndarray:
        return random.uniform(-1, 1, shape).astype(np.float32)

    return [(uniform(o, i) / np.float32(i**0.5), uniform(o) / np.float32(i**0.5)) for i, o in pairwise(WIDTHS)]


def mlp_gram(x: np.ndarray) -> np.ndarray:
    """K = Σ_l (A_l A_lᵀ + 1) ∘ (G_l G_lᵀ) `[N, N]` in float64, from the formula: the reference for every library.

    A_l are the inputs of layer l, G_l the derivatives of f with respect to its outputs.
    """
    weights = [(w.astype(np.float64), b.astype(np.float64)) for w, b in mlp_weights()]
    activations = [x.astype(np.float64)]
    for w, b in weights[:-1]:
        activations.append(np.tanh(activations[-1] @ w.T + b))
    gradient = np.ones((len(x), 1))
    gram = np.zeros((len(x), len(x)))
    for (w, _), activation in zip(reversed(weights), reversed(activations), strict=True):
        gram += (activation @ activation.T + 1) * (gradient @ gradient.T)
        gradient = gradient @ w * (1 - activation**2)
    return gram


# --- inside the fresh process ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """What one case cost.

    Attributes:
        wall_s: Median wall time of a call.
        least_s: Least wall time of a call, the better figure where others disturbed.
        cpu_s: Median processor time of a call, all threads together.
        first_s: Wall time of the warm-up call, compilation included.
        repeats: Timed calls.
        others: Cores that the rest of the machine kept busy meanwhile, on average.
        peak_mb: Largest resident memory of the process.
        increase_mb: The same above what was resident after imports and data creation.
    """

    wall_s: float
    least_s: float
    cpu_s: float
    first_s: float
    repeats: int
    others: float
    peak_mb: float
    increase_mb: float


def case_of_this_process() -> tuple[Case, int]:
    """The case that this process is to run, and the number of threads."""
    return CASES[int(sys.argv[1])], int(sys.argv[2])


def measure(call: Callable[[Any], object], prepare: Callable[[int], Any]) -> Figures:
    """Figures of ``call(prepare(seed))``, preparation untimed; ``call`` blocks until its result is there."""
    base = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    walls: list[float] = []
    cpus: list[float] = []
    began, others = time.perf_counter(), _seconds_of_others()
    while len(walls) <= FEWEST_REPEATS or (len(walls) <= REPEATS and time.perf_counter() - began < MINUTE):
        prepared = prepare(SEED + 2 + len(walls))
        wall, cpu = time.perf_counter(), time.process_time()
        call(prepared)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
        del prepared
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
    return Figures(
        wall_s=statistics.median(walls[1:]),
        least_s=min(walls[1:]),
        cpu_s=statistics.median(cpus[1:]),
        first_s=walls[0],
        repeats=len(walls) - 1,
        others=max(0.0, _seconds_of_others() - others) / (time.perf_counter() - began),
        peak_mb=peak / 1e6,
        increase_mb=(peak - base) / 1e6,
    )


def _seconds_of_others() -> float:
    """Processor time of everything but this process since the machine started, stolen time included."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()


def report(case: Case, figures: Figures, value: np.ndarray, reference: np.ndarray) -> None:
    """Print the row for the parent process; the error is the largest difference over the largest reference value."""
    if value.shape != reference.shape:
        raise ValueError(f"{case.name}: values of shape {value.shape}, reference of shape {reference.shape}.")
    error = float(np.abs(value.astype(np.float64) - reference).max() / np.abs(reference).max())
    row = {"case": case.name, "rows": case.rows, "columns": case.columns, **asdict(figures), "error": error}
    print(json.dumps(row))


# --- the parent process ----------------------------------------------------------------------------------------------


def least_disturbed(library: Library, case: Case, threads: int) -> dict[str, Any]:
    """The row of one case, from the run that other processes disturbed least."""
    tolerated = len(os.sched_getaffinity(0)) - threads + TOLERATED_CORES
    rows = []
    for _ in range(ATTEMPTS):
        _wait_for_quiet(tolerated)
        rows.append(run(library, case, threads))
        if rows[-1]["others"] < tolerated:
            break
    return min(rows, key=lambda row: row["others"])


def _wait_for_quiet(tolerated: float, interval: float = 3.0) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        before = _seconds_of_others()
        time.sleep(interval)
        if _seconds_of_others() - before < tolerated * interval:
            return


def run(library: Library, case: Case, threads: int) -> dict[str, Any]:
    """The row of one case, from a fresh process."""
    settings = {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "MKL", "OPENBLAS")}
    settings["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()}"
    cores = sorted(os.sched_getaffinity(0))[-threads:]
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{library.module}", str(CASES.index(case)), str(threads)],
        cwd=ROOT,
        env=os.environ | settings,
        # XLA starts as many threads as there are cores that it may use.
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def provenance(library: Library, threads: int) -> dict[str, Any]:
    """What `measure.provenance` says, without torch, and with the versions that matter here."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "gpntk") else ""),
        "versions": {name: version(name) for name in library.packages} | {"python": platform.python_version()},
        "hardware": names[0].partition(":")[2].strip() if names else platform.machine(),
        "device": "cpu",
        "threads": threads,
        "dtype": "float32",
        "seed": SEED,
    }


def main() -> None:
    """Run the cases asked for and print their rows; store them if they are all there, or where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", choices=LIBRARIES, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", choices=[case.name for case in CASES], action="append", help="default: all")
    parser.add_argument("--out", type=Path, help="default: results/ for all cases, else nowhere")
    options = parser.parse_args()
    library = LIBRARIES[options.library]
    cases = [case for case in CASES if library.runs(case) and case.name in (options.case or [case.name])]
    result: dict[str, Any] = {"suite": f"peers-{options.library}", **provenance(library, options.threads), "rows": []}
    for case in cases:
        try:
            row = least_disturbed(library, case, options.threads)
        except subprocess.CalledProcessError as error:
            print(f"{case.name} failed with status {error.returncode}", file=sys.stderr)
            continue
        result["rows"].append(row)
        cells = (f"{name}={cell:.3g}" if isinstance(cell, float) else f"{name}={cell}" for name, cell in row.items())
        print("  ".join(cells), flush=True)
    out = options.out or (None if options.case else RESULTS)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{result['suite']}-cpu-{options.threads}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"-> {path}")


if __name__ == "__main__":
    main()
