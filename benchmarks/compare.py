"""An old commit and this tree in turns on one machine: ``python -m benchmarks.compare COMMIT --suite NAME``.

Machines drift by more than most changes are worth, so that stored figures of another day say little. Here each suite
runs some times in a checkout of the old commit and as often in this tree, old, new, new, old, ..., each in a process of
its own. A figure is *worse* if every new run is above every old one and the medians differ by more than a tenth;
*better* the other way round. Tables of experiments in transfer learning (``python -m benchmarks.transfer NAME --out
DIR``) are compared seed by seed with the stored ones: ``python -m benchmarks.compare --tables DIR``.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Columns of which less is better: times, memory and errors of ours. What peers took is not compared.
_COMPARED = re.compile(r"(seconds|_s|_mb|_gib|rmse|nll|error|iterations)$", re.IGNORECASE)
_PEERS = re.compile(
    r"torch_func|gpytorch|botorch|neural_tangents|plain|explicit|own_gemms|network_|eigh|epochs|floor|gemm_s"
)
_MARGIN = 1.1
# What another order of sums or another end of a search may move, relative to a metric.
_ROUNDING = 1e-3
Rows = list[dict[str, Any]]


class Difference(NamedTuple):
    """One figure, before and after: values of all turns."""

    where: str
    column: str
    old: list[float]
    new: list[float]

    @property
    def ratio(self) -> float:
        """Median of the new values over that of the old."""
        return statistics.median(self.new) / (statistics.median(self.old) or math.nan)

    @property
    def verdict(self) -> str:
        """``"worse"``, ``"better"``, or nothing where it is noise."""
        if min(self.new) > max(self.old) and self.ratio > _MARGIN:
            return "worse"
        return "better" if max(self.new) < min(self.old) and self.ratio < 1 / _MARGIN else ""


def differences(old: Sequence[Rows], new: Sequence[Rows]) -> list[Difference]:
    """Compare the rows of several runs, each row with that of the same place and each column that both have."""
    found = []
    for index in range(min(len(old[0]), len(new[0]))):
        one, other = old[0][index], new[0][index]
        where = ", ".join(str(value) for key, value in other.items() if not isinstance(value, float) and key in one)
        for column in one.keys() & other.keys():
            if not _COMPARED.search(column) or _PEERS.search(column) or not isinstance(one[column], float):
                continue
            values = ([run[index][column] for run in runs] for runs in (old, new))
            found.append(Difference(where, column, *values))
    return found


def paired(old: Rows, new: Rows, metrics: Sequence[str] = ("RMSE", "NLL", "accuracy", "ECE")) -> Rows:
    """Of records of the same experiment, size and method: how far the new are above the old, in standard errors.

    Seeds that both have are compared one by one, for most of the spread over seeds is common to both.
    """
    rows: Rows = []
    keys = {(record["size"], record["method"]) for record in new} & {(r["size"], r["method"]) for r in old}
    for size, method in sorted(keys):
        before, after = (
            {r["seed"]: r for r in side if (r["size"], r["method"]) == (size, method)} for side in (old, new)
        )
        for metric in metrics:
            gaps = [after[s][metric] - before[s][metric] for s in after.keys() & before.keys() if metric in after[s]]
            if len(gaps) < 2:
                continue
            mean, error = statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
            was = statistics.mean(record[metric] for record in before.values())
            row = {
                "size": size,
                "method": method,
                "metric": metric,
                "was": was,
                "difference": mean,
                "± difference": error,
            }
            better = mean > 0 if metric == "accuracy" else mean < 0
            noise = abs(mean) <= max(error, _ROUNDING * abs(was))
            rows.append({**row, "verdict": "" if noise else "better" if better else "worse"})
    return rows


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A work tree of the commit, removed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(tree), commit], cwd=ROOT, check=True, capture_output=True
        )
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


def rows_of(tree: Path, suite: str, threads: int) -> Rows:
    """Run one suite in a work tree and read its rows."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.run", "--suite", suite, "--threads", str(threads), "--out", folder]
        done = subprocess.run(command, cwd=tree, check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"suite {suite!r} failed in {tree}:\n{done.stderr[-2000:]}")
        return json.loads((Path(folder) / f"{suite}-cpu-{threads}.json").read_text())["rows"]


def compare(old: Path, new: Path, suite: str, turns: int, threads: int) -> list[Difference]:
    """Both trees in turns, the one that was second being first in the next turn."""
    runs: dict[Path, list[Rows]] = {old: [], new: []}
    for turn in range(turns):
        for tree in (old, new) if turn % 2 == 0 else (new, old):
            runs[tree].append(rows_of(tree, suite, threads))
    return differences(runs[old], runs[new])


def main() -> None:
    """Print what differs, the ratio of medians and the extremes of both."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("commit", nargs="?", help="the old commit")
    parser.add_argument("--suite", action="append", default=[], help="a suite that both trees have")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tables", type=Path, help="folder of new results of experiments in transfer learning")
    options = parser.parse_args()
    if options.tables is not None:
        for path in sorted(options.tables.glob("**/transfer-*.json")):
            print(path.stem)
            old, new = (json.loads(side.read_text())["records"] for side in (RESULTS / path.name, path))
            for row in paired(old, new):
                print("  " + "  ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    if options.commit is None:
        return
    with checkout(options.commit) as tree:
        for suite in options.suite:
            print(suite, flush=True)
            for item in compare(tree, ROOT, suite, options.turns, options.threads):
                old, new = (f"{min(side):.3g} to {max(side):.3g}" for side in (item.old, item.new))
                print(f"  {item.ratio:6.3f} {item.verdict:7}{item.column}: {old} -> {new}  ({item.where})", flush=True)


if __name__ == "__main__":
    main()
