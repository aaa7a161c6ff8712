"""Rows spread over processes: seconds of one product and one solve by one process and by two, one thread each.

``python -m benchmarks.sharded [--rows N] [--ranks R ...]``. Every rank holds its share of N rows in memory. Speedup is
over one process; ``all_reduce`` is the time of the sums alone, with their check of shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

import gpntk
from benchmarks.measure import provenance, seconds, settle
from gpntk.inference import FeatureCovariance, Features, Posterior, ShardedFeatures, WeightSpace, WhitenedSystem

RESULTS = Path(__file__).parent / "results"
SEED, WIDTH, HIDDEN = 0, 11, 48
COLUMNS = (1, 10)


def main() -> None:
    """Measure each number of ranks in processes of their own; write one JSON file and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--as-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meet-at", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.as_rank is not None:
        _measure(options)
        return
    rows: list[dict[str, Any]] = []
    for ranks in options.ranks:
        rows += _launch(ranks, options)
    single = {row["work"]: row["seconds"] for row in rows if row["ranks"] == 1}
    for row in rows:
        row["speedup"] = single.get(row["work"], float("nan")) / row["seconds"]
        print(
            "  ".join(
                f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in row.items()
            )
        )
    device = torch.device("cpu")
    result = {"suite": "sharded", **provenance(device, torch.float32, SEED), "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "sharded-cpu-1.json").write_text(json.dumps(result, indent=1) + "\n")


def _launch(ranks: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What rank 0 prints."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.sharded", "--rows", str(options.rows), "--ranks", str(ranks)]
        command += ["--repeats", str(options.repeats), "--meet-at", f"file://{folder}/ranks"]
        processes = [
            subprocess.Popen(
                [*command, "--as-rank", str(rank)], stdout=subprocess.PIPE if rank == 0 else None, text=True
            )
            for rank in range(ranks)
        ]
        said, _ = processes[0].communicate()
        if any(process.wait() for process in processes):
            raise RuntimeError("a rank has failed; see its message above.")
    return [json.loads(line) for line in said.splitlines()]


def _measure(options: argparse.Namespace) -> None:
    """One rank."""
    (ranks,), rank = options.ranks, options.as_rank
    distributed.init_process_group("gloo", init_method=options.meet_at, rank=rank, world_size=ranks)
    settle(torch.device("cpu"))
    torch.manual_seed(SEED)
    tanh = nn.Tanh()
    module = nn.Sequential(nn.Linear(WIDTH, HIDDEN), tanh, nn.Linear(HIDDEN, HIDDEN), tanh, nn.Linear(HIDDEN, 1))
    x = torch.randn(options.rows, WIDTH).tensor_split(ranks)[rank]
    features = ShardedFeatures(Features(gpntk.AutoBackend(gpntk.freeze(module), memory_budget=2**31), x))
    system = WhitenedSystem(FeatureCovariance(features, torch.ones(1)), torch.tensor([0.1]))
    f = features.num_features

    def report(work: str, function: Any, sums: tuple[torch.Tensor, ...]) -> None:
        row = {
            "work": work,
            "rows": options.rows,
            "features": f,
            "ranks": ranks,
            "seconds": seconds(function, options.repeats),
            "all_reduce": seconds(lambda: [features.total(part) for part in sums], options.repeats),
        }
        if rank == 0:
            print(json.dumps(row), flush=True)

    for columns in COLUMNS:
        v = torch.randn(columns, f)
        report(f"product, {columns} column(s)", lambda v=v: features.vjp(features.jvp(v)), (v,))
    y = x.sin().sum(-1)

    # New features each time: the second moment is kept, and is to be measured.
    def fresh() -> WhitenedSystem:
        return WhitenedSystem(
            FeatureCovariance(ShardedFeatures(Features(features.backend, x)), system.variances), system.noise
        )

    report(
        "WeightSpace posterior",
        lambda: Posterior(fresh(), y, WeightSpace()).weights,
        (torch.zeros(f, f, dtype=torch.float64), torch.zeros(1, f, dtype=torch.float64)),
    )
    sys.stdout.flush()
    distributed.barrier()
    # Without taking the group apart, whose threads may still wait for each other.
    os._exit(0)


if __name__ == "__main__":
    main()
