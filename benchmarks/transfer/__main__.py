"""Run experiments in transfer learning: ``python -m benchmarks.transfer NAME --data DIR [--seeds S] [--sizes N ...]``.

Prints a table, writes ``benchmarks/results/transfer-NAME.json`` and draws ``docs/images/transfer-NAME.png``.
"""

from __future__ import annotations

import argparse
import os
from fnmatch import fnmatch
from pathlib import Path

import torch

from benchmarks.transfer import report
from benchmarks.transfer.classification import CLASSIFICATION
from benchmarks.transfer.experiment import Experiment
from benchmarks.transfer.regression import REGRESSION

EXPERIMENTS: dict[str, Experiment] = {**REGRESSION, **CLASSIFICATION}
ROOT = Path(__file__).parents[2]


def main() -> None:
    """Run the experiments asked for: one by its name, or all whose names begin with it and a dash."""
    options = _options()
    torch.set_num_threads(options.threads)
    if options.cache is not None:
        os.environ["GPNTK_CACHE"] = str(options.cache)
    chosen = [name for name in EXPERIMENTS if name == options.name or name.startswith(f"{options.name}-")]
    if not chosen:
        raise SystemExit(f"no experiment {options.name!r}: choose from {', '.join(EXPERIMENTS)}")
    for name in chosen:
        experiment = EXPERIMENTS[name]
        methods = {key: method for key, method in experiment.methods.items() if fnmatch(key, options.methods)}
        experiment = experiment._replace(methods=methods)
        sizes, seeds = options.sizes or experiment.sizes, options.seeds or experiment.seeds
        records: list[report.Record] = []
        for records in report.run(experiment, options.data, sizes, seeds):
            report.store(options.out / "benchmarks" / "results" / f"transfer-{name}.json", name, records)
        print(f"{name}\n\n{report.table(records)}")
        report.draw(options.out / "docs" / "images" / f"transfer-{name}.png", name, records)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__)
    parser.add_argument("name", help=f"one of {', '.join(EXPERIMENTS)}, or what comes before a dash in several")
    parser.add_argument("--data", type=Path, default=os.environ.get("GPNTK_DATA"), help="folder of the data sets")
    parser.add_argument("--seeds", type=int, help="number of repetitions")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of labels")
    parser.add_argument("--methods", default="*", help="pattern of the methods to run")
    parser.add_argument("--cache", type=Path, help="folder of trained source networks")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT, help="folder that results and pictures are written under")
    return parser.parse_args()


if __name__ == "__main__":
    main()
