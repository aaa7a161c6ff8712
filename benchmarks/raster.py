"""A quarter of a million labels for the default estimator: the malaria raster of Central Africa, in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import gpntk
from benchmarks.inference_suites import data_folder, mlp, standardised, trained
from benchmarks.peak import peak_bytes

KERNELS = ("auto", "ntk")
_ROWS, _POINTS, _STEPS = 236_579, 2000, 1500


def malaria_transfer(device: torch.device, _dtype: torch.dtype) -> list[dict[str, Any]]:
    """Malaria raster, 236,579 rows, MLP 2-64-64-64-1 after 1,500 steps of Adam: the estimator by default and by "ntk".

    Network and labels are in units of the labels' standard deviation; the network was trained on the same rows. Each
    row is of a process of its own: `fit_s` (`fit_cpu_s`: processor time of all threads), `mean_s` and `deviation_s` of
    2,000 other rows, one after another, and `peak_gib` of the whole process. `ratio`: `rmse` over the network's;
    `within`: share of labels within two standard deviations of y. Estimators work in float64.
    """
    rows = []
    for kernel in KERNELS:
        command = [sys.executable, "-m", "benchmarks.raster", kernel, str(_ROWS), str(device), str(_STEPS)]
        environment = {**os.environ, "GPNTK_THREADS": str(torch.get_num_threads())}
        root = Path(__file__).parent.parent
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env=environment)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


SUITES: dict[str, Callable[[torch.device, torch.dtype], list[dict[str, Any]]]] = {"malaria-transfer": malaria_transfer}


def raster(count: int, points: int = _POINTS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs `[N, 2]` and labels of ``count`` rows and of ``points`` others, standardised, in random order."""
    stored = np.load(data_folder() / "malaria" / "CentralAfrica_Pf_incidence.npz")
    known = ~np.isnan(stored["z"])
    inputs, labels = np.stack([stored["x"], stored["y"]], -1)[known], stored["z"][known]
    order = np.random.default_rng(0).permutation(len(labels))
    # The first 20,000 are what no suite trains on.
    parts = order[20_000 : 20_000 + count], order[:points]
    return standardised(inputs, labels, parts, torch.device("cpu"), torch.float64)


def measured(
    kernel: Any, module: nn.Module, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """Fit to inputs `[N, D]` and labels `[N]`, predict others, and compare with the network."""
    (x, y), (z, truth) = ([part.double().numpy() for part in parts] for parts in (train, test))
    start, processor = time.perf_counter(), time.process_time()
    model = gpntk.TransferRegressor(module, kernel=kernel).fit(x, y)
    fitted, processor = time.perf_counter(), time.process_time() - processor
    mean = model.predict(z)
    predicted = time.perf_counter()
    _, deviation = model.predict(z, return_std=True)
    done = time.perf_counter()
    weight = next(module.parameters())
    output = module(test[0].to(weight)).squeeze(-1).detach().double().cpu().numpy()
    network_rmse, rmse = (float(np.sqrt(np.mean((found - truth) ** 2))) for found in (output, mean))
    return {
        "asked": kernel,
        "kernel": model.kernel_,
        "rows": len(x),
        "fit_s": fitted - start,
        "fit_cpu_s": processor,
        "mean_s": predicted - fitted,
        "deviation_s": done - predicted,
        "peak_gib": peak_bytes("cpu") / 2**30,
        "network_rmse": network_rmse,
        "rmse": rmse,
        "ratio": rmse / network_rmse,
        "within": float(np.mean(np.abs(mean - truth) < 2 * deviation)),
    }


def main() -> None:
    """Print one JSON object: ``raster KERNEL ROWS DEVICE STEPS``; threads by GPNTK_THREADS."""
    kernel, rows, device, steps = sys.argv[1:]
    torch.set_num_threads(int(os.environ.get("GPNTK_THREADS", "1")))
    torch.manual_seed(0)
    x, y, z, truth = raster(int(rows))
    module = trained(mlp(2, 64, 64, 64, 1), x.float(), y.float(), int(steps)).eval().to(device)
    print(json.dumps(measured(kernel, module, (x, y), (z, truth))), flush=True)


if __name__ == "__main__":
    main()
