"""J Jᵀ and its diagonal from the activations and output gradients of every use of parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from gpntk.jacobians.capture import Parts
from gpntk.jacobians.rules import AbstractLayerRule, Factors, inner_products
from gpntk.jacobians.shared import SharedUses, parameter_images
from gpntk.memory import chunks, workspace

# Blocks of rows in a symmetric Gram: k of them save (k - 1) / 2k of the operations, where N is large enough.
_SYMMETRIC_BLOCKS = 8
_SYMMETRIC_ROWS = 256
# Tiles that need more temporaries than this are no faster.
_TILE_BYTES = 2**27
# Values in the patches of a convolution, or its gradients, for each of its factors: a generous estimate.
_PATCHES = 32


@final
class Grams:
    """Sums of all uses' terms into groups of parameters.

    Args:
        shared: The uses that share parameters.
        memory_budget: Bytes that temporaries stay within.
        groups: Names of the groups; empty for one group of all.
        group_of: The group of a parameter.
    """

    def __init__(
        self,
        shared: Sequence[SharedUses],
        memory_budget: int,
        groups: Sequence[str] = (),
        group_of: Callable[[str], str] = str,
    ) -> None:
        self._simple = [uses for uses in shared if not uses.needs_gradients]
        self._others = [uses for uses in shared if uses.needs_gradients]
        self._groups = {name: index for index, name in enumerate(groups)}
        self._group_of = group_of
        self._memory_budget = memory_budget

    @property
    def num_groups(self) -> int:
        """The number of groups G."""
        return max(1, len(self._groups))

    def add(self, result: Tensor, left: Parts, right: Parts) -> None:
        """Add J J'ᵀ to ``result`` `[B, G, N, C, M, C]`, a block that is zero so far."""
        whole = [uses for uses in self._simple if not uses.rule.sizes(left[uses.key].factors).tile]
        if whole:
            self._add_whole(result, left, right, whole)
        for uses in self._simple:
            if uses not in whole:
                one = left[uses.key].factors
                two = one if left is right else right[uses.key].factors
                self._add_tiles(result[:, self._group(uses.group)], uses.rule, one, two)
        if self._others:
            self._add_by_gradients(result, left, right)

    def diagonal(self, parts: Parts) -> Tensor:
        """Squared norms of the rows of J, `[B, G, N, C]`."""
        terms = [(uses.group, self._diagonal(uses.rule, parts[uses.key].factors)) for uses in self._simple]
        if self._others:
            rows = num_rows(parts)
            blocks = [self.gradients(parts, chosen) for chosen in chunks(rows, self._row_bytes(parts), self._limit)]
            for name in blocks[0]:
                squares = [block[name].square().sum(-1) for block in blocks]
                terms.append((self._group_of(name), torch.cat(squares, 1)))
        like = terms[0][1]
        total = like.new_zeros(like.shape[0], self.num_groups, *like.shape[1:])
        for group, term in terms:
            total[:, self._group(group)] += term
        return total

    def gradients(self, parts: Parts, rows: slice) -> dict[str, Tensor]:
        """Per-sample gradients `[B, N, C, P]` of every parameter that needs them, summed over its uses."""
        total: dict[str, Tensor] = {}
        for uses in self._others:
            part = parts[uses.key].rows(rows)
            for name, image in parameter_images(uses, part, uses.rule.gradients(part.factors), lead=3):
                total[name] = total[name] + image if name in total else image
        return total

    # --- private -----------------------------------------------------------------------------------------------

    @property
    def _limit(self) -> int:
        return self._memory_budget // 4

    def _diagonal(self, rule: AbstractLayerRule, factors: Factors) -> Tensor:
        if not rule.sizes(factors).tile:
            return rule.diagonal(factors)
        row_bytes = _PATCHES * factors.num_values // max(factors.num_rows, 1) * 4
        rows = chunks(factors.num_rows, row_bytes, self._limit)
        return torch.cat([rule.diagonal(factors.rows(chosen)) for chosen in rows], 1)

    def _group(self, group: str) -> int:
        return self._groups.get(group, 0)

    def _add_whole(self, result: Tensor, left: Parts, right: Parts, whole: list[SharedUses]) -> None:
        """What costs no more in pieces, in pieces that stay in the processor's cache, summed over the layers first."""
        rows, outputs, columns = result.shape[2:5]
        symmetric = left is right and rows >= _SYMMETRIC_ROWS
        row_bytes = 2 * result.element_size() * result.shape[0] * max(columns, 1) * outputs**2
        limit = workspace(result.device, self._memory_budget)
        limit = min(limit, row_bytes * rows // _SYMMETRIC_BLOCKS) if symmetric else limit
        for chosen in chunks(rows, row_bytes, limit):
            others = slice(0, chosen.stop if symmetric else columns)
            totals: dict[int, Tensor] = {}
            for uses in whole:
                term = uses.rule.gram(left[uses.key].factors.rows(chosen), right[uses.key].factors.rows(others))
                term = term.to(result.dtype)
                group = self._group(uses.group)
                if group not in totals:
                    totals[group] = term
                else:
                    totals[group] = totals[group] + term if term.requires_grad else totals[group].add_(term)
            for group, total in totals.items():
                result[:, group, chosen, :, others] = total
                if symmetric:
                    mirrored = total[:, :, :, : chosen.start].permute(0, 3, 4, 1, 2)
                    result[:, group, : chosen.start, :, chosen] = mirrored

    def _add_tiles(self, result: Tensor, rule: AbstractLayerRule, left: Factors, right: Factors) -> None:
        """Add tiles of J J'ᵀ to ``result`` `[B, N, C, M, C]`; where it is symmetric, the lower ones mirrored."""
        symmetric = left is right
        row_bytes = 2 * rule.sizes(left).tile * left.cotangents.element_size() * result.shape[0]
        limit = min(self._limit, _TILE_BYTES)
        for rows in chunks(result.shape[1], row_bytes, limit):
            one = left.rows(rows)
            for columns in chunks(result.shape[3], row_bytes, limit):
                if symmetric and columns.start > rows.start:
                    break
                tile = rule.gram(one, one if symmetric and rows == columns else right.rows(columns))
                result[:, rows, :, columns].add_(tile)
                if symmetric and columns.start < rows.start:
                    result[:, columns, :, rows].add_(tile.permute(0, 3, 4, 1, 2))

    def _add_by_gradients(self, result: Tensor, left: Parts, right: Parts) -> None:
        for rows in chunks(result.shape[2], self._row_bytes(left), self._limit):
            one = self.gradients(left, rows)
            for columns in chunks(result.shape[4], self._row_bytes(right), self._limit):
                two = one if left is right and rows == columns else self.gradients(right, columns)
                for name, gradient in one.items():
                    term = inner_products(gradient.flatten(1, 2), two[name].flatten(1, 2))
                    term = term.unflatten(1, gradient.shape[1:3]).unflatten(3, two[name].shape[1:3])
                    result[:, self._group(self._group_of(name)), rows, :, columns] += term

    def _row_bytes(self, parts: Parts) -> int:
        """Bytes of one row's gradients, and as much again for their making."""
        size = 0
        for uses in self._others:
            derived = parts[uses.key].derived
            for own, operand in uses.operands.items():
                size += operand.form.numel()
                size += sum(p.numel() for p in derived[own].parameters.values()) if own in derived else 0
        g = parts[self._others[0].key].factors.cotangents
        return 3 * size * g.shape[2] * g.element_size() * g.shape[0]


def num_rows(parts: Parts) -> int:
    """The number of rows N."""
    return next(part.factors.num_rows for part in parts.values())
