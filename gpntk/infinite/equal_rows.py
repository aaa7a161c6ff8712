"""Which rows of two matrices are the same, without a copy of either."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

# Numbers of a matrix that are copied at a time.
_ENTRIES = 2**15


@final
class EqualRows:
    """The pairs of equal rows of x1 `[N, D]` and x2 `[M, D]`, block by block.

    Args:
        x1: Rows.
        x2: Rows; x1 itself for a symmetric matrix.
    """

    def __init__(self, x1: Tensor, x2: Tensor) -> None:
        numbers, count = _row_numbers(x1, x2)
        self._numbers = numbers[: len(x1)], numbers if x2 is x1 else numbers[len(x1) :]
        # Then the pairs are those on the diagonal.
        self._distinct = x2 is x1 and count == len(x1)

    def pairs(self, i: slice, j: slice) -> tuple[Tensor, Tensor] | bool:
        """Indices into rows ``i`` of x1 and ``j`` of x2, `[E]` each; False if there are none."""
        if not self._distinct:
            return _equal_pairs(self._numbers[0][i], self._numbers[1][j])
        low, high = max(i.start, j.start), min(i.stop, j.stop)
        if low >= high:
            return False
        both = torch.arange(low, high, device=self._numbers[0].device)
        return both - i.start, both - j.start


@torch.no_grad()
def _row_numbers(x1: Tensor, x2: Tensor) -> tuple[Tensor, int]:
    """A number for every row of x1 and, if it is another, of x2, the same for equal rows; and how many there are."""
    hashes = _hashes(x1) if x2 is x1 else torch.cat([_hashes(x1), _hashes(x2)])
    values, order = hashes.sort()
    differs = torch.ones_like(values, dtype=torch.bool)
    differs[1:] = values[1:] != values[:-1]
    # Equal hashes are no proof.
    for places in (~differs).nonzero().squeeze(1).split(_rows_at_once(x1)):
        if not len(places):
            break
        one, two = (_rows(x1, x2, order[at]) for at in (places - 1, places))
        differs[places] = (one != two).any(1)
    numbers = torch.empty_like(order)
    numbers[order] = counted = differs.cumsum(0)
    return numbers, int(counted[-1])


def _equal_pairs(numbers1: Tensor, numbers2: Tensor) -> tuple[Tensor, Tensor] | bool:
    """Indices of all pairs of equal numbers, `[E]` each; False if there are none."""
    values, order = numbers2.sort()
    start = torch.searchsorted(values, numbers1)
    counts = torch.searchsorted(values, numbers1, right=True).sub_(start)
    total = int(counts.sum())
    if not total:
        return False
    first = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=total)
    ends = counts.cumsum(0)
    place = torch.arange(total, device=counts.device) + (start - ends + counts)[first]
    return first, order[place]


def _hashes(x: Tensor) -> Tensor:
    """Of the bits of every row `[N]`, by arithmetic modulo 2**64, which does not round."""
    exact = torch.promote_types(x.dtype, torch.float32)
    words = x.shape[1] * exact.itemsize // 4
    generator = torch.Generator("cpu").manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, (words,), generator=generator, device="cpu").to(x.device)
    # A negative zero becomes a positive one.
    parts = [((part.to(exact) + 0.0).view(torch.int32) * factors).sum(1) for part in x.split(_rows_at_once(x))]
    return torch.cat(parts)


def _rows_at_once(x: Tensor) -> int:
    return max(1, _ENTRIES // max(1, x.shape[1]))


def _rows(x1: Tensor, x2: Tensor, index: Tensor) -> Tensor:
    """Of x1, and from its end on of x2."""
    rows, beyond = x1[index.clamp(max=len(x1) - 1)], index >= len(x1)
    rows[beyond] = x2[index[beyond] - len(x1)]
    return rows
