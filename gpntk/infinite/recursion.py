"""Running a program: the variances at each input once, then the moments of pairs of inputs, which need them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gpntk.infinite.layers import Weights
from gpntk.infinite.moments import Block, LayerMoments, products
from gpntk.infinite.program import Program, Step, paired

Variances = tuple[Tensor, ...]
"""Variances of a unit, `[N, *S]` at every value of a program that some step may ask about."""

Settle = Callable[[int, LayerMoments], LayerMoments]

# Columns that tell most rows apart.
_KEY_COLUMNS = 8


def variances(program: Program, x: Tensor, weights: Sequence[Weights]) -> Variances:
    """The variances at inputs x `[N, D]`; where a later step attends to positions, their covariances `[N, S, S]`."""
    asked, attended = program.asked, program.attended
    steps = program.steps[: max(asked, default=0)]
    found: list[Tensor] = []

    def record(number: int, state: LayerMoments) -> LayerMoments:
        if number not in asked:
            return state
        # A copy: the diagonal of pairs would keep all of them.
        variance = state.equal_positions().block.nngp.contiguous()
        found.append(state.block.nngp if number in attended else variance)
        return state._replace(first=variance, second=variance, own=(found[-1], found[-1]))

    pairs = paired(steps, attended)
    nngp = _products(program, (x, x), True, pairs[0])
    _run(steps, pairs, weights, _start(nngp, program, pairs[0], equal=True, tangent=False), record)
    return tuple(found)


def moments(
    program: Program,
    x: tuple[Tensor, Tensor],
    known: tuple[Variances, Variances],
    weights: Sequence[Weights],
    *,
    equal: tuple[Tensor, ...] | bool,
    tangent: bool,
    by_row: bool = False,
) -> Block:
    """The moments of the output.

    Args:
        program: The network's recursion.
        x: Inputs x1 `[N, D]` and x2 `[M, D]`.
        known: Variances at both.
        weights: Priors of every layer's parameters.
        equal: The pairs that are the same input: their rows in x1 and in x2 or, ``by_row``, in both; or a bool for all.
        tangent: Whether the tangent kernel is asked for.
        by_row: Whether to take x1 with x2 row by row: blocks `[N]`, not `[N, M]`.
    """

    def fill(number: int, state: LayerMoments) -> LayerMoments:
        if number not in program.asked:
            return state
        first, second = (side[program.asked[number]] for side in known)
        if not by_row:
            first, second = first.unsqueeze(1), second.unsqueeze(0)
        if number not in program.attended:
            return state._replace(first=first, second=second, own=None)
        one, two = (tensor.diagonal(dim1=-2, dim2=-1) for tensor in (first, second))
        return state._replace(first=one, second=two, own=(first, second))

    nngp = _products(program, x, by_row, program.pairs[0])
    start = _start(nngp, program, program.pairs[0], equal=equal, tangent=tangent)
    return _run(program.steps, program.pairs, weights, start, fill).block


def _run(
    steps: Sequence[Step], pairs: Sequence[bool], weights: Sequence[Weights], start: LayerMoments, settle: Settle
) -> LayerMoments:
    """The result of the last step; ``settle`` completes value 0, the start, and value i + 1, the result of step i."""
    values: dict[int, LayerMoments] = {0: settle(0, start)}
    last_use = {index: number for number, step in enumerate(steps) for index in step.inputs}
    for number, step in enumerate(steps):
        states = [values[index] for index in step.inputs]
        state = step.rule.apply(*states, *([] if step.layer is None else [weights[step.layer]]))
        state = state.all_pairs() if pairs[number + 1] else state.equal_positions()
        for index in set(step.inputs):
            if last_use[index] == number:
                del values[index]
        values[number + 1] = settle(number + 1, state)
    return values[len(steps)]


def _products(program: Program, x: tuple[Tensor, Tensor], by_row: bool, pairs: bool) -> Tensor:
    """The mean products of the inputs' channels, the moments of value 0."""
    one, two = (tensor.reshape(tensor.shape[0], *program.input_shape) for tensor in x)
    if program.channels_last and one.dim() > 2:
        one, two = one.movedim(-1, 1), two.movedim(-1, 1)
    return products(one, two, by_row, pairs)


def _start(
    nngp: Tensor, program: Program, pairs: bool, *, equal: tuple[Tensor, ...] | bool, tangent: bool
) -> LayerMoments:
    """Value 0, with variances that are to be settled."""
    axes = len(program.input_shape) - 1
    return LayerMoments(Block(nngp, None), nngp, nngp, equal, axes, pairs and axes > 0, tangent)


# --- which pairs are one input with itself ---------------------------------------------------------------------------


@torch.no_grad()
def row_numbers(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the rows of x1 `[N]` and x2 `[M]`, the same for equal rows."""
    rows = x1 if x2 is x1 else torch.cat([x1, x2])
    keys = _keys(rows)
    if len(keys.unique()) == len(rows):
        numbers = torch.arange(len(rows), device=rows.device)
    else:
        numbers = torch.unique(rows, dim=0, return_inverse=True)[1]
    return numbers[: len(x1)], numbers[-len(x2) :]


def _keys(rows: Tensor) -> Tensor:
    """A number for every row `[N]`, the same for equal rows: some columns, added one by one so that all round alike.

    Sorting these costs a fraction of sorting rows, and nearly always tells that all differ.
    """
    columns = rows[:, :: max(1, rows.shape[1] // _KEY_COLUMNS)].to(torch.float64)
    total = columns.new_zeros(len(rows))
    for column in columns.unbind(1):
        total = total * math.pi + column
    return total


def equal_pairs(numbers1: Tensor, numbers2: Tensor) -> tuple[Tensor, ...] | bool:
    """Indices of all pairs of equal numbers, `[E]` each; False if there are none."""
    pairs = (numbers1.unsqueeze(1) == numbers2).nonzero(as_tuple=True)
    return pairs if len(pairs[0]) else False
