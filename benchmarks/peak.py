"""Peak memory of one product in a process of its own: ``peak NETWORK WORK BUDGET DEVICE DTYPE THREADS``."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch
from torch import nn

import gpntk
from tests.architectures import ResNet, lenet

NETWORKS = {
    "mlp": (
        nn.Sequential(nn.Linear(784, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 1)),
        (784,),
        20000,
    ),
    "lenet": (lenet(28), (1, 28, 28), 2000),
    "resnet": (ResNet(width=16), (3, 32, 32), 100),
}


def main() -> None:
    """Run it and print one JSON object."""
    name, work, limit, device, dtype, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    module, shape, rows = NETWORKS[name]
    rows = min(rows, 500) if work == "gram" and name != "mlp" else min(rows, 3000) if work == "gram" else rows
    rows = 30 if work == "gram" and name == "resnet" else rows
    options = {"device": torch.device(device), "dtype": getattr(torch, dtype)}
    backend = gpntk.jacobians.StructuredBackend(
        gpntk.freeze(module.eval().to(**options), input_shape=shape), int(limit)
    )
    x = torch.randn(1, rows, torch.Size(shape).numel(), **options)
    backend.vjp(x[:, :4], torch.ones(1, 2, 4 * backend.num_outputs(x), **options))
    u = torch.randn(1, 4, rows * backend.num_outputs(x), **options)
    v = torch.randn(1, 4, backend.num_features, **options)
    run = {
        "vjp": lambda: backend.vjp(x, u),
        "jvp": lambda: backend.jvp(x, v),
        "gram": lambda: backend.gram(x, x),
        "diagonal": lambda: backend.diagonal(x),
    }[work]
    before = peak_bytes(device)
    result = run()
    own = result.numel() * result.element_size()
    used = peak_bytes(device) - before - own
    print(
        json.dumps(
            {
                "network": name,
                "work": work,
                "rows": rows,
                "budget_mb": int(limit) / 2**20,
                "used_mb": used / 2**20,
                "result_mb": own / 2**20,
                "within": used <= int(limit),
            }
        )
    )


def peak_bytes(device: str) -> int:
    """Bytes at the highest so far."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # of this program alone; ru_maxrss begins at what its parent held
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
