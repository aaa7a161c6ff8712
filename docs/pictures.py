"""Draw the picture of the README by running its code: ``python docs/pictures.py``."""

import re
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent


def adapted(path: Path) -> None:
    """Draw the network before, the labels, and the Gaussian process after."""
    first_block = re.search(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL
    )
    assert first_block is not None
    made: dict[str, Any] = {}
    exec(first_block.group(1), made)
    x, mean, std = made["x"].ravel().numpy(), made["mean"], made["std"]
    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    axes.fill_between(
        x, mean - 2 * std, mean + 2 * std, color="C0", alpha=0.2, linewidth=0
    )
    axes.plot(x, mean, color="C0", label="adapted, ± 2 standard deviations")
    axes.plot(
        x, made["network"](made["x"]).detach().ravel(), color="C1", label="network"
    )
    axes.plot(
        x,
        made["truth"],
        color="black",
        linestyle=":",
        label="truth of the related task",
    )
    axes.plot(
        x[made["rows"]], made["labels"], "k.", markersize=9, label="twelve labels"
    )
    axes.set(xlabel="x", xlim=(x[0], x[-1]))
    axes.legend(fontsize="small", ncols=2, loc="lower right")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    adapted(ROOT / "docs" / "images" / "adapted.png")
