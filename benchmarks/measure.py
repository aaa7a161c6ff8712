"""How everything is measured: medians after warm-up, synchronised; the machine's GEMM rate in the same run."""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def seconds(function: Callable[[], object], repeats: int = 7) -> float:
    """Median wall time of ``function`` after one warm-up call, the device synchronised before each reading."""
    return seconds_on(lambda _: function(), lambda: None, repeats)


def seconds_on(function: Callable[[Any], object], prepare: Callable[[], Any], repeats: int = 7) -> float:
    """The same for ``function(prepare())``, without the time of ``prepare``: new data each time defeats every cache."""
    times = []
    for _ in range(repeats + 1):
        prepared = prepare()
        _synchronize()
        start = time.perf_counter()
        function(prepared)
        _synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def settle(device: torch.device) -> None:
    """A few seconds of work, until threads have found cores of their own and the clock is up."""
    a = torch.randn(1500, 1500, device=device)
    start = time.perf_counter()
    while time.perf_counter() - start < 5:
        a @ a


def gemm_rate(device: torch.device, dtype: torch.dtype, shapes: list[tuple[int, int, int]]) -> float:
    """Best flops per second over plain matrix products of the given (m, k, n): the machine's own limit for the work."""
    rates = []
    for m, k, n in shapes:
        a, b = (torch.randn(shape, device=device, dtype=dtype) for shape in ((m, k), (k, n)))
        rates.append(2 * m * k * n / seconds(lambda a=a, b=b: a @ b))
    return max(rates)


def provenance(device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """Commit, versions, hardware, threads, dtype and seed of a result."""
    packages = ("gpntk", "torch", "gpytorch", "linear_operator")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain", "gpntk") else ""),
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "seed": seed,
    }


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute reference value."""
    return ((value.double() - reference).abs().max() / reference.abs().max()).item()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _git(*arguments: str) -> str:
    root = Path(__file__).parent.parent
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False).stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
