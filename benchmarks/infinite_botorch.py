"""The kernel of an infinitely wide ReLU network beside BoTorch's: ``python -m benchmarks.infinite_botorch cpu 1``."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gpytorch.kernels import Kernel
from torch import Tensor, nn

import gpntk
from benchmarks.measure import seconds, settle

DEPTH = 3
WEIGHT_VARIANCE, BIAS_VARIANCE = 2.0, 0.1
# The load of a machine changes in the course of a comparison.
ROUNDS = 7


def botorch_infinite(device: torch.device, _dtype: torch.dtype) -> list[dict[str, Any]]:
    """Kernel matrix of N inputs with D dimensions, 3 hidden ReLU layers, beside botorch's InfiniteWidthBNNKernel.

    `forward`: the matrix, without gradients. `gradient`: the matrix and the gradient of the sum of its squares in x and
    in all hyperparameters (ours has a σ_w and a σ_b for each layer, botorch one of each for all). Medians of seven
    calls, in turns, and of those over the turns. `speedup`: botorch's time over ours. `error`: the largest relative
    error of k(x, x), where botorch keeps arccos away from its end.
    """
    # Importing botorch changes the hosts' settings for the whole process, so this has one of its own.
    command = [sys.executable, "-m", "benchmarks.infinite_botorch", str(device), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    return json.loads(done.stdout)


SUITES = {"botorch-infinite": botorch_infinite}


def main() -> None:
    """Measure and print rows as JSON."""
    device, threads = torch.device(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    settle(device)
    cases = product((torch.float64, torch.float32), (500, 2000), (6, 64))
    print(json.dumps([_row(torch.randn(n, d, device=device, dtype=dtype)) for dtype, n, d in cases]))


def _row(x: Tensor) -> dict[str, Any]:
    kernels = {"gpntk": _ours(x), "botorch": _theirs(x)}
    row: dict[str, Any] = {"dtype": str(x.dtype).removeprefix("torch."), "rows": x.shape[0], "inputs": x.shape[1]}
    for name, work in {"forward": _forward, "gradient": _gradient}.items():
        times: dict[str, list[float]] = {library: [] for library in kernels}
        for _ in range(ROUNDS):
            for library, kernel in kernels.items():
                times[library].append(seconds(lambda kernel=kernel, work=work: work(kernel, x)))
        row |= {f"{library}_{name}_s": statistics.median(found) for library, found in times.items()}
        row[f"{name}_speedup"] = row[f"botorch_{name}_s"] / row[f"gpntk_{name}_s"]
    exact = WEIGHT_VARIANCE * x.double().square().mean(-1) + BIAS_VARIANCE
    for _ in range(DEPTH):
        exact = WEIGHT_VARIANCE * exact / 2 + BIAS_VARIANCE
    for library, kernel in kernels.items():
        own = _forward(kernel, x).diagonal().double()
        row[f"{library}_error"] = ((own - exact) / exact).abs().max().item()
    return row


def _forward(kernel: Kernel, x: Tensor) -> Tensor:
    with torch.no_grad():
        return kernel(x).to_dense()


def _gradient(kernel: Kernel, x: Tensor) -> None:
    kernel.zero_grad()
    kernel(x.clone().requires_grad_()).to_dense().square().sum().backward()


def _ours(x: Tensor) -> Kernel:
    layers = [layer for i in range(DEPTH) for layer in (nn.Linear(8 if i else x.shape[1], 8), nn.ReLU())]
    network = nn.Sequential(*layers, nn.Linear(8, 1))
    kernel = gpntk.InfiniteNNGPKernel(network, bias_std=1.0).to(x)
    kernel.weight_std, kernel.bias_std = (
        torch.tensor(value, dtype=torch.float64).sqrt() for value in (WEIGHT_VARIANCE, BIAS_VARIANCE)
    )
    return kernel


def _theirs(x: Tensor) -> Kernel:
    make: Callable[..., Any] = import_module("botorch.models.kernels.infinite_width_bnn").InfiniteWidthBNNKernel
    kernel = make(depth=DEPTH).to(x)
    kernel.weight_var, kernel.bias_var = WEIGHT_VARIANCE, BIAS_VARIANCE
    return kernel


if __name__ == "__main__":
    main()
