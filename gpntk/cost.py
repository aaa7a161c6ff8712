"""What a kernel-vector product costs by each strategy, counted before it is run.

Counts are of operations, bytes and calls for K V `[N*C, K]`, one vjp and one jvp; `Work.seconds` weighs them by the
speed of a machine, of which only the ratios matter for a choice. With q multiplications of a row, column and direction
(q = P for layers that are called once at one position) and r = N rows:

    strategy              once                     per product                        kept
    factors, kept         r q (2 + 2 C)            4 r q K                            factors
    factors, recomputed   -                        2 r q (2 + 2 C) + 4 r q K          -
    Gram                  factors + its own        2 (N C)² K                         (N C)²
    dense Jacobian        r C q 4                  4 r C P K                          r C P
    autodiff              -                        4 r q + 8 r q K                    -
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Machine:
    """Speeds of a device: flops (float32) and bytes in a second, and calls of a torch function.

    The default is a CPU of a few cores. Only ratios matter for a choice, and only their order of magnitude.
    """

    flops: float = 1e11
    bandwidth: float = 1e10
    calls: float = 1e5

    @property
    def attained(self) -> float:
        """Operations in a second that factorisations and passes through a network reach: a quarter of the flops."""
        return 0.25 * self.flops

    @classmethod
    def of(cls, device: torch.device | str) -> Machine:
        """The machine that ``device`` is: a GPU by its name, or else by its number of multiprocessors.

        Example:
            >>> Machine.of("cpu") == Machine()
            True
        """
        device = torch.device(device)
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            return gpu(properties.name, properties.multi_processor_count)
        return _OTHERS.get(device.type, cls())


# Flop/s in float32 and bytes/s by the data sheets; half of that, and less, is reached.
_GPUS = {
    "B200": (7.5e13, 8e12),
    "GH200": (6.7e13, 4.9e12),
    "H200": (6.7e13, 4.8e12),
    "H100": (6.7e13, 3.35e12),
    "A100": (1.95e13, 1.9e12),
    "L40": (9e13, 8.6e11),
    "L40S": (9e13, 8.6e11),
    "L4": (3e13, 3e11),
    "A10": (3.1e13, 6e11),
    "A10G": (3.1e13, 6e11),
    "V100": (1.57e13, 9e11),
    "T4": (8.1e12, 3.2e11),
    "4090": (8.3e13, 1e12),
    "3090": (3.6e13, 9.4e11),
}
# 128 multiply-adds a cycle at 1.5 GHz.
_MULTIPROCESSOR = 4e11
_OTHERS = {"mps": Machine(5e12, 2e11, 5e4)}


def gpu(name: str, multiprocessors: int) -> Machine:
    """The machine that a CUDA device of this name is; launching a kernel takes about 10 µs on all of them."""
    words = re.split(r"\W+", name)
    speeds = next(
        (speeds for known, speeds in _GPUS.items() if known in words), (_MULTIPROCESSOR * multiprocessors, 5e11)
    )
    return Machine(*speeds)


class Work(NamedTuple):
    """An amount of work; ``a + b`` is both, one after the other."""

    flops: float = 0.0
    moved: float = 0.0
    calls: float = 0.0

    def __add__(self, other: object) -> Work:
        if not isinstance(other, Work):
            return NotImplemented
        return Work(*(one + two for one, two in zip(self, other, strict=True)))

    def times(self, factor: float) -> Work:
        """The work done so many times."""
        return Work(*(factor * part for part in self))

    def seconds(self, machine: Machine) -> float:
        """Time on a machine that does one after the other."""
        return self.flops / machine.flops + self.moved / machine.bandwidth + self.calls / machine.calls


class Cost(NamedTuple):
    """The cost of one strategy.

    Attributes:
        strategy: Its name.
        once: Work before the first product.
        product: Work of each product with the given number of columns.
        kept: Bytes kept between products.
        fits: Whether those fit the memory budget.
    """

    strategy: str
    once: Work
    product: Work
    kept: float
    fits: bool

    def seconds(self, machine: Machine) -> float:
        """Time of 20 products with the same x."""
        return (self.once + self.product.times(PRODUCTS)).seconds(machine)


class RowSizes(NamedTuple):
    """What one row of x takes: costs are counted, and memory is shared out, by this record alone.

    Attributes:
        product: q, multiplications in a product with one column, one way; pair: of two rows in the Gram.
        kept: Values of its factors; activations: of its forward pass; largest: of its largest temporary.
        calls: Calls that make a tensor in a forward pass; uses: of parameters by functions with a rule.
        backward: Whether its factors take backward passes.
    """

    product: float
    pair: float
    kept: int
    activations: int
    largest: int
    calls: int
    uses: int
    backward: bool

    @property
    def passing(self) -> int:
        """Values in all while the passes run."""
        return self.kept + self.activations + 4 * self.largest


# Products with one x for which strategies are compared: between one, and the hundreds of a long solve.
PRODUCTS = 20
# Calls of torch functions that a use takes in a product, one way; that passes take for one of a plain forward pass.
_CALLS_PER_USE = 12
_CALLS_PER_PASS = 4


@lru_cache(maxsize=256)
def count(
    row: RowSizes,
    *,
    rows: int,
    outputs: int,
    parameters: int,
    columns: int,
    itemsize: int,
    budget: int,
    machine: Machine,
) -> tuple[Cost, ...]:
    """The cost of every strategy: the cheapest for many products first, those beyond the budget last."""
    n, c, p, k, item = rows, outputs, parameters, columns, itemsize
    q, kept, activations, calls, uses = row.product, row.kept, row.activations, row.calls, row.uses
    runs = 1 + c if row.backward else 1
    passes = Work(2 * n * q * runs, item * n * (2 * runs * activations + 2 * kept), _CALLS_PER_PASS * calls)
    lazy = Work(4 * n * q * k, 2 * item * (n * kept * min(k, 2) + p * k), 2 * _CALLS_PER_USE * uses)
    gram = Work(2 * n**2 * row.pair, 4 * item * (n * c) ** 2, _CALLS_PER_USE * uses)
    jacobian = item * n * c * p
    chunk = item * (kept + activations)
    counted = (
        Cost("factors, kept", passes, lazy, item * n * kept, fits=4 * item * n * kept <= budget),
        Cost("factors, recomputed", Work(), passes.times(2) + lazy, chunk, fits=chunk <= budget),
        Cost(
            "Gram",
            passes + gram,
            Work(2 * (n * c) ** 2 * k, item * (n * c) ** 2, 1),
            item * (n * c) ** 2,
            fits=2 * item * (n * c) ** 2 <= budget,
        ),
        Cost(
            "dense Jacobian",
            Work(4 * n * c * q, 4 * jacobian, 2 * _CALLS_PER_PASS * calls),
            Work(4 * n * c * p * k, 2 * jacobian, 4),
            jacobian,
            fits=2 * jacobian <= budget,
        ),
        Cost(
            "autodiff",
            Work(),
            Work(4 * n * q + 8 * n * q * k, 8 * item * n * activations * (1 + k), 4 * _CALLS_PER_PASS * calls),
            0.0,
            fits=True,
        ),
    )
    return tuple(sorted(counted, key=lambda cost: (not cost.fits, cost.product.seconds(machine))))


def cheapest(costs: tuple[Cost, ...], machine: Machine, among: str = "") -> str:
    """The strategy whose name starts with ``among`` that takes least for 20 products, of those that fit if any does.

    A function of the counts alone, which are functions of the sizes: nothing that happened before can change it.
    """
    chosen = [cost for cost in costs if cost.strategy.startswith(among)]
    fitting = [cost for cost in chosen if cost.fits] or chosen
    return min(fitting, key=lambda cost: cost.seconds(machine)).strategy


def table(costs: tuple[Cost, ...]) -> str:
    """The costs as text, one line each."""
    width = max(len(cost.strategy) for cost in costs) + 2
    lines = [f"{'strategy':{width}s}{'once, Gflop':>14s}{'product, Gflop':>16s}{'kept, MB':>12s}  fits"]
    lines += [
        f"{cost.strategy:{width}s}{cost.once.flops / 1e9:14.3g}{cost.product.flops / 1e9:16.3g}{cost.kept / 1e6:12.3g}"
        f"  {'yes' if cost.fits else 'no'}"
        for cost in costs
    ]
    return "\n".join(lines)
