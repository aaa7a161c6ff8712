"""Run suites and store their results: ``python -m benchmarks.run [--suite NAME] [--threads T] [--device D]``.

Suites that read real data find them in the folder given by ``--data``, or by GPNTK_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu, peers, sharded
from benchmarks.measure import provenance, settle
from benchmarks.suites import SUITES
from benchmarks.transfer.classification import CLASSIFICATION
from benchmarks.transfer.regression import REGRESSION

RESULTS = Path(__file__).parent / "results"
SEED = 0
# Scripts of their own, which a suite's name stands for.
_MODULES = {"sharded": sharded, "gpu": gpu}


def main() -> None:
    """Run the suites asked for, write one JSON file each, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=sorted(SUITES), action="append", help="default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path, help="folder of the real data sets; default: GPNTK_DATA")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.data is not None:
        os.environ["GPNTK_DATA"] = str(options.data)
    torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), torch.float32
    options.out.mkdir(parents=True, exist_ok=True)
    settle(device)
    for name in options.suite or sorted(SUITES):
        torch.manual_seed(SEED)
        result = {"suite": name, **provenance(device, dtype, SEED), "rows": SUITES[name](device, dtype)}
        path = options.out / f"{name}-{device.type}-{options.threads}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name} ({result['hardware']}, {options.threads} thread(s)) -> {path}")
        _print_table(result["rows"])
    if options.out == RESULTS:
        write_readme()


def write_readme() -> None:
    """Rewrite ``benchmarks/README.md`` from the results there are."""
    parts = [
        "# Benchmarks\n",
        "Made by `make bench` from the files in `results/`; nothing here is typed by hand. Times are medians after a",
        "warm-up, in seconds; peers run beside ours, in the same process. `suites.py` says what each column is.\n",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
        doc = (_source(result["suite"]).__doc__ or "").strip()
        parts += [
            f"## {result['suite']}: {result['device']}, {result['threads']} thread(s)\n",
            f"{doc}\n",
            f"{result['hardware']}; {result['dtype']}; {versions}; commit {result['commit']}, {result['date']}.\n",
            *_tables(result),
        ]
    (RESULTS.parent / "README.md").write_text("\n".join(parts))


def _source(suite: str) -> object:
    """What describes a suite in its docstring."""
    # Figures of an earlier commit, kept beside those of today.
    suite = suite.removesuffix("-before")
    experiments = {**REGRESSION, **CLASSIFICATION}
    experiment = suite.removeprefix("transfer-")
    if experiment in experiments and suite != experiment:
        draw = experiments[experiment].draw
        return getattr(draw, "func", draw)
    return _MODULES.get(suite) or SUITES.get(suite, peers)


def _tables(result: dict[str, Any]) -> list[str]:
    """One for a suite; for a run in parts one for each, or why there is none."""
    if "parts" not in result:
        return [_markdown(result["rows"])]
    return [
        f"**{name}**: {part['outcome']} {part['message'].splitlines()[-1:] or ''}\n\n{_markdown(part['rows'])}"
        for name, part in result["parts"].items()
    ]


def _markdown(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [" | ".join(_cell(value) for value in row.values()) for row in rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def _print_table(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print("  " + "  ".join(f"{name}={_cell(value)}" for name, value in row.items()))


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
