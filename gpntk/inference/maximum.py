"""The one search for a maximum that every fit uses: L-BFGS within bounds, from several starts, which may be stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from tqdm import tqdm

from gpntk._checks import check_count, check_functions, check_kinds, check_positive
from gpntk.errors import InputError, SolveError
from gpntk.io import Checkpoint

Point = NDArray[np.float64]


class Maximum(NamedTuple):
    """The best point of a search `[H]`, the log density there in nats, and the steps of L-BFGS taken in all."""

    point: Point
    value: float
    steps: int


def maximize(
    evaluate: Callable[[Point], tuple[float, Point]],
    starts: Sequence[Point],
    bounds: NDArray[np.float64] | None = None,
    *,
    max_steps: int = 1000,
    tolerance: float | None = None,
    rounding: float = 1e-13,
    checkpoint: Checkpoint | None = None,
    callback: Callable[[int, float], None] | None = None,
    label: str = "hyperparameters",
) -> Maximum:
    """The largest value of a log density near any of ``starts``, by L-BFGS within bounds.

    With a ``checkpoint``, the best point is written after each step. A search that finds the file goes on from there,
    and returns at once if it had ended.

    Args:
        evaluate: The log density at a point `[H]` and its gradient; -inf where it cannot be computed.
        starts: Points to start from.
        bounds: Smallest and largest values `[H, 2]`; equal ones where a coordinate is known.
        max_steps: Most steps, those before a resumption included.
        tolerance: Nats that a step must gain for the search to go on; default: SciPy's own.
        rounding: Relative rounding of the values: where they rise by no more, the search has ended.
        checkpoint: File of the search.
        callback: Is given the number of each step, from 0, and the best value so far.
        label: What the progress bar calls it.

    Raises:
        InputError: ``max_steps`` or ``tolerance`` is negative.
        SolveError: The density is finite at none of the starts.

    Example:
        >>> import numpy as np
        >>> found = maximize(lambda x: (float(-(x - 1) @ (x - 1)), -2 * (x - 1)), [np.zeros(2)])
        >>> found.point.round(6).tolist()
        [1.0, 1.0]
    """
    check_functions(evaluate=evaluate)
    if not (isinstance(starts, Sequence) and starts and all(isinstance(start, np.ndarray) for start in starts)):
        raise InputError("starts must be a list of arrays [H], at least one.")
    if bounds is not None and (np.shape(bounds) != (len(starts[0]), 2) or not (bounds[:, 0] <= bounds[:, 1]).all()):
        raise InputError(f"bounds must be [H, 2], here ({len(starts[0])}, 2), the smaller value first.")
    check_count(0, max_steps=max_steps)
    if tolerance is not None:
        check_positive(tolerance=tolerance)
    if checkpoint is not None:
        check_kinds(Checkpoint, "a gpntk.io.Checkpoint", checkpoint=checkpoint)
    tensors, facts = (
        {"point": torch.tensor(starts[0], device="cpu")},
        {"value": -math.inf, "steps": 0, "finished": False},
    )
    if checkpoint is not None:
        tensors, facts = checkpoint.begin(tensors, facts)
    best = Maximum(tensors["point"].numpy(), facts["value"], facts["steps"])
    if facts["finished"]:
        return best
    with tqdm(desc=label, delay=2, leave=False) as bar:
        search = _Search(evaluate, best, bar, checkpoint, callback)
        points = [best.point] if math.isfinite(best.value) else starts
        ended = [search.run(point, bounds, max_steps, tolerance, rounding) for point in points]
    if not math.isfinite(search.best.value):
        raise SolveError("the covariance of the labels cannot be factorised: check X for NaN and rows of huge values.")
    search.keep(finished=all(ended))
    return search.best


@final
class _Search:
    """The best point so far, here and in a file, of searches for the maximum of a log density.

    Each search works in units of its first gradient, so that the first step is no longer than one power of e: else
    thousands of labels send it to the corner of the bounds. Where the density cannot be computed, its value falls with
    the distance from the best point of this search, and line searches come back.
    """

    def __init__(
        self,
        evaluate: Callable[[Point], tuple[float, Point]],
        best: Maximum,
        bar: Any,
        checkpoint: Checkpoint | None,
        callback: Callable[[int, float], None] | None,
    ) -> None:
        self._evaluate, self.best = evaluate, best
        self._bar, self._checkpoint, self._callback = bar, checkpoint, callback
        self._unit, self._here, self._highest = 1.0, best.point, -math.inf

    def run(self, start: Point, bounds: Point | None, max_steps: int, tolerance: float | None, rounding: float) -> bool:
        """Search from one start; whether that has ended by itself."""
        self._highest = -math.inf
        value, gradient = self._at(start)
        left = max_steps - self.best.steps
        if not math.isfinite(value) or left <= 0:
            return left > 0
        self._unit = max(1.0, float(np.linalg.norm(gradient)))
        # SciPy's own, in nats; that of values is relative to the largest of them, or to the unit.
        gtol, ftol = 1e-5, 2.2e-9 / self._unit
        if tolerance is not None:
            gtol, ftol = 1e-3 * tolerance, tolerance / max(self._unit, abs(value))
        options = {"maxiter": left, "gtol": gtol / self._unit, "ftol": max(ftol, rounding)}
        found = minimize(self, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options, callback=self._step)
        return found.nit < left

    def __call__(self, point: Point) -> tuple[float, Point]:
        """What is minimised, with its gradient."""
        value, gradient = self._at(point)
        if math.isfinite(value):
            return -value / self._unit, -gradient / self._unit
        away = point - self._here
        return 1 - self._highest / self._unit + float(away @ away), 2 * away

    def keep(self, finished: bool) -> None:
        """Write the best point to the file."""
        if self._checkpoint is not None:
            facts = {"value": self.best.value, "steps": self.best.steps, "finished": finished}
            self._checkpoint.save({"point": torch.tensor(self.best.point, device="cpu")}, facts)

    def _at(self, point: Point) -> tuple[float, Point]:
        self._bar.update()
        value, gradient = self._evaluate(point)
        if math.isfinite(value) and value > self._highest:
            self._here, self._highest = point.copy(), value
            if value > self.best.value:
                self.best = self.best._replace(point=self._here, value=value)
        return value, gradient

    def _step(self, _: Point) -> None:
        self.best = self.best._replace(steps=self.best.steps + 1)
        self.keep(finished=False)
        if self._callback is not None:
            self._callback(self.best.steps - 1, self.best.value)
