"""The suite of infinite-width kernels: fully connected, convolutions with flattening, and with global pooling."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

import gpntk
from benchmarks.measure import gemm_rate, seconds
from benchmarks.peak import peak_bytes

KERNELS = {"nngp": gpntk.InfiniteNNGPKernel, "ntk": gpntk.InfiniteNTKKernel}
LAYERS = 3


@final
@dataclass(frozen=True)
class Case:
    """A network with three hidden layers, and data.

    Attributes:
        network: ``fc``, or ``flatten`` or ``pool`` after convolutions of images 3 x 32 x 32.
        rows: N.
        neural_tangents: CPU seconds for NNGP and NTK together, as recorded on another machine; None where not run.
    """

    network: str
    rows: int
    neural_tangents: float | None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one input."""
        return (784,) if self.network == "fc" else (3, 32, 32)

    @property
    def entries(self) -> float:
        """Pairs of inputs, and of positions where they count, that a symmetric kernel needs."""
        positions = {"fc": 1, "flatten": 32**2, "pool": 32**4}[self.network]
        return self.rows * (self.rows + 1) / 2 * positions

    def kernel(self, kind: str) -> Callable[[Tensor], Tensor]:
        """The dense kernel of x with itself, σ's fixed; ``"both"`` computes both in one pass, and gives the NTK."""
        if kind == "both":
            both = gpntk.infinite.kernels(_network(self.network), input_shape=self.input_shape)
            return lambda x: both(x).ntk
        kernel = KERNELS[kind](_network(self.network), input_shape=self.input_shape, learn=False)
        return lambda x: kernel(x).to_dense()


CASES = {
    "fc-2000": Case("fc", 2000, 0.36),
    "fc-10000": Case("fc", 10_000, None),
    "flatten-50": Case("flatten", 50, 0.37),
    "pool-4": Case("pool", 4, 13.5),
}


def infinite(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Dense NNGP and NTK of ReLU networks with three hidden layers: x random, N rows, 784 or 3 x 32 x 32 numbers each.

    `seconds` and `cpu_seconds`: wall and processor time, medians. `floor_s`: what no implementation avoids at the rates
    of this run, the sum of three parts: the inputs' products at the rate of `gemm_rate` (`gemm_s`), a square root and
    an arctangent in float64 for each entry and activation, in cache (`elementary_s`), and writing the result once at
    the rate at which memory is filled (`traffic_s`). `ratio`: cpu_seconds / floor_s. `peak_mb`: memory beyond the data
    in a fresh process, result included, median of five; `over_result`: that by the result's own. `neural_tangents_s`:
    CPU seconds for both kernels together (neural-tangents 0.6.6, JAX 0.4.38, one core), recorded on another machine.
    ``both``: the two kernels by one call of `gpntk.infinite.kernels`; `two_over_one`: the CPU seconds of two calls, one
    for each kernel, over those of one.
    """
    rate = gemm_rate(device, dtype, [(256, 784, 256), (1024, 784, 1024), (2048, 2048, 2048)])
    elementary, bandwidth = _elementary(device), _bandwidth(device, dtype)
    rows = []
    for name, case in CASES.items():
        size = dtype.itemsize * case.rows**2
        products = 2 * case.entries * (784 if case.network == "fc" else 3)
        floor = {
            "gemm_s": products / rate,
            "elementary_s": LAYERS * case.entries * elementary,
            "traffic_s": size / bandwidth,
        }
        x = torch.randn(case.rows, torch.Size(case.input_shape).numel(), device=device, dtype=dtype)
        spent: dict[str, float] = {}
        for kind in (*KERNELS, "both"):
            wall, processor = timed(case.kernel(kind), x)
            spent[kind] = processor
            used = statistics.median(_peak_of(name, kind, device, dtype) for _ in range(5))
            total = sum(floor.values())
            rows.append(
                {
                    "case": case.network,
                    "kernel": kind,
                    "N": case.rows,
                    "seconds": wall,
                    "cpu_seconds": processor,
                    "per_entry_s": processor / case.rows**2,
                    **floor,
                    "floor_s": total,
                    "ratio": processor / total,
                    "peak_mb": used / 2**20,
                    "over_result": used / (2 * size if kind == "both" else size),
                    "two_over_one": (spent["nngp"] + spent["ntk"]) / processor if kind == "both" else "",
                    "neural_tangents_s": case.neural_tangents or "",
                }
            )
    return rows


SUITES: dict[str, Callable[[torch.device, torch.dtype], list[dict[str, Any]]]] = {"infinite": infinite}


def _network(name: str) -> nn.Sequential:
    if name == "fc":
        return nn.Sequential(
            *(layer for i in (784, 512, 512) for layer in (nn.Linear(i, 512), nn.ReLU())), nn.Linear(512, 1)
        )
    convolutions = [layer for i in (3, 8, 8) for layer in (nn.Conv2d(i, 8, 3, padding="same"), nn.ReLU())]
    end = [nn.AdaptiveAvgPool2d(1)] if name == "pool" else []
    return nn.Sequential(*convolutions, *end, nn.Flatten(), nn.Linear(8 if end else 8 * 32**2, 1))


def timed(function: Callable[[Tensor], Tensor], x: Tensor, repeats: int = 5) -> tuple[float, float]:
    """Median wall and processor seconds after one warm-up call."""
    function(x)
    walls, processors = [], []
    for _ in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        function(x).sum().item()  # waits for a device
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    return statistics.median(walls), statistics.median(processors)


def _elementary(device: torch.device) -> float:
    """Seconds of a square root and an arctangent."""
    a, b = (torch.rand(2**14, dtype=torch.float64, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return seconds(lambda: [torch.atan2(a, torch.sqrt(b, out=out), out=out) for _ in range(64)]) / (64 * len(a))


def _bandwidth(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes written per second by filling memory that no cache holds."""
    a = torch.empty(2**26, device=device, dtype=dtype)
    return a.numel() * a.element_size() / seconds(lambda: a.fill_(1.0))


def _peak_of(name: str, kind: str, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes, measured in a fresh process."""
    arguments = [name, kind, str(device), str(dtype).removeprefix("torch."), str(torch.get_num_threads())]
    command = [sys.executable, "-m", "benchmarks.infinite_suites", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    return json.loads(done.stdout)


def main() -> None:
    """Print the bytes that one kernel needs beyond its data: ``infinite_suites CASE KERNEL DEVICE DTYPE THREADS``."""
    name, kind, device, dtype, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    case, options = CASES[name], {"device": torch.device(device), "dtype": getattr(torch, dtype)}
    kernel = case.kernel(kind)
    x = torch.randn(case.rows, torch.Size(case.input_shape).numel(), **options)
    # Libraries are loaded by other work of the kind, with hardly any data.
    Case("fc", 2, None).kernel(kind)(torch.randn(2, 784, **options))
    before = peak_bytes(device)
    result = kernel(x)
    used = peak_bytes(device) - before
    print(json.dumps(used if result.isfinite().all() else None))


if __name__ == "__main__":
    main()
