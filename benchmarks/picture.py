"""Draw ``docs/images/growth.png``, time of inference against N and against P, from results of the suite ``growth``."""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Draw the picture and print the slopes of the last two decades or so of each curve."""
    result = json.loads((ROOT / "benchmarks" / "results" / "growth-cpu-2.json").read_text())
    rows = result["rows"]
    split = next(index for index in range(1, len(rows)) if rows[index]["rows"] < rows[index - 1]["rows"])
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, part, size, label in (
        (panels[0], rows[:split], "rows", f"N, with P = {rows[0]['features']:,}"),
        (panels[1], rows[split:], "features", f"P, with N = {rows[-1]['rows']:,}"),
    ):
        sizes, times = [row[size] for row in part], [row["seconds"] for row in part]
        slope = math.log(times[-1] / times[-3]) / math.log(sizes[-1] / sizes[-3])
        axes.loglog(sizes, times, color="gray", linewidth=0.8)
        for solver in dict.fromkeys(row["solver"] for row in part):
            own = [row for row in part if row["solver"] == solver]
            axes.loglog([row[size] for row in own], [row["seconds"] for row in own], "o", label=solver)
        axes.set_xlabel(label)
        axes.set_ylabel("seconds, mean and 100 variances")
        axes.set_title(f"slope at the end: {slope:.2f}")
        axes.legend(fontsize="small")
        print(f"{label}: slope {slope:.2f} over the last three points")
    figure.savefig(ROOT / "docs" / "images" / "growth.png", dpi=120)


if __name__ == "__main__":
    main()
