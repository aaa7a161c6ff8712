"""Is the default ever worse than the best simple method? ``python -m benchmarks.transfer.verdict [--results DIR]``.

Reads the results of all experiments. A cell is an experiment at one number of labels; in it the default is compared
with the simple method of best mean: best or worse where the mean of the paired differences is beyond one standard
error, else tied.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.transfer.report import values

OURS = "gpntk (default)"
SIMPLE = (
    *("unadapted", "temperature", "readout", "fine-tuning", "LP-FT", "RBF GP"),
    *("unadapted network", "readout refitted", "fine-tuned", "RBF GP, ARD"),
)
"""What people would try first. Ensembles of several sources, and baselines with a posterior, are no simple methods."""
METRICS = {"accuracy": 1.0, "RMSE": -1.0, "NLL": -1.0}
"""What is compared, and whether more is better."""
RESULTS = Path(__file__).parents[1] / "results"


class Verdict(NamedTuple):
    """One cell: by how much the default is better than the best simple method, with the error of that."""

    experiment: str
    size: int
    metric: str
    rival: str
    gain: float
    error: float

    @property
    def word(self) -> str:
        """``"best"``, ``"tied"`` or ``"worse"``."""
        return "tied" if abs(self.gain) <= self.error else "best" if self.gain > 0 else "worse"


def verdicts(experiment: str, records: list[dict[str, Any]]) -> list[Verdict]:
    """All cells of an experiment; none where the default or all simple methods are missing."""
    sizes = list(dict.fromkeys(record["size"] for record in records))
    found: list[Verdict] = []
    for metric, sign in METRICS.items():
        if metric not in records[0]:
            continue
        measured = values(records, metric)
        rivals = [name for name in SIMPLE if name in measured]
        if OURS not in measured or not rivals:
            continue
        for column, size in enumerate(sizes):
            rival = max(rivals, key=lambda name: sign * measured[name][:, column].mean())
            gains = sign * (measured[OURS] - measured[rival])[:, column]
            error = gains.std(ddof=1) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
            found.append(Verdict(experiment, size, metric, rival, float(np.mean(gains)), float(error)))
    return found


def main() -> None:
    """Print a line for each cell, and one that counts them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer.verdict", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of transfer-NAME.json")
    found: list[Verdict] = []
    for path in sorted(parser.parse_args().results.glob("transfer-*.json")):
        stored = json.loads(path.read_text())
        if "records" in stored:
            found += verdicts(path.stem.removeprefix("transfer-"), stored["records"])
    for each in found:
        print(
            f"{each.experiment:<22}{each.size:>5}  {each.metric:<9}{each.gain:>+9.4f} ± {each.error:<8.2g}"
            f"{each.word:<6} best simple: {each.rival}"
        )
    for name, metrics in {"accuracy, RMSE": ("accuracy", "RMSE"), "NLL": ("NLL",)}.items():
        cells = [each for each in found if each.metric in metrics]
        counts = Counter(each.word for each in cells)
        shares = ", ".join(f"{word} in {counts[word] / len(cells):.0%}" for word in ("best", "tied", "worse") if cells)
        print(f"{name}: of {len(cells)} cells the default is {shares}")


if __name__ == "__main__":
    main()
