"""J Jᵀ and its diagonal from the factors of every bundle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from gpntk.jacobians.backend import inner_products
from gpntk.jacobians.bundles import Bundle, parameter_images
from gpntk.jacobians.passes import Parts
from gpntk.jacobians.rules import AbstractLayerRule, Factors, sketched
from gpntk.memory import chunks, workspace
from gpntk.network.selection import layer_name

# Blocks of rows in a symmetric Gram: k of them save (k - 1) / 2k of the operations, where N is large enough.
_SYMMETRIC_BLOCKS = 8
_SYMMETRIC_ROWS = 256
_SKETCH_BYTES = 2**26
# Values in the patches of a convolution, or its gradients, for each of its factors: a generous estimate.
_PATCHES = 32


@final
class Grams:
    """Sums of the bundles' terms into groups of parameters.

    Args:
        bundles: The bundles.
        layers: Names of the network's layers, each a group of its own; empty for one group of all.
        memory_budget: Bytes that temporaries stay within.
    """

    def __init__(self, bundles: Sequence[Bundle], layers: Sequence[str], memory_budget: int) -> None:
        self._joined = [bundle for bundle in bundles if not bundle.entangled]
        self._entangled = [bundle for bundle in bundles if bundle.entangled]
        self._layers = {name: index for index, name in enumerate(layers)}
        self._memory_budget = memory_budget

    @property
    def num_groups(self) -> int:
        """G."""
        return max(1, len(self._layers))

    def add(self, result: Tensor, left: Parts, right: Parts) -> None:
        """Add J J'ᵀ to ``result`` `[B, G, N, C, M, C]`, a block that is zero so far."""
        flat = [bundle for bundle in self._joined if _is_flat(bundle, left)]
        if flat:
            self._add_flat(result, left, right, flat)
        for bundle in self._joined:
            if bundle not in flat:
                one, two = _only(left, bundle), _only(right, bundle)
                out = result[:, self._group(bundle.layer)]
                bundle.rule.add_gram(out, one, one if left is right else two, self._limit)
        if self._entangled:
            self._add_entangled(result, left, right)

    def diagonal(self, parts: Parts) -> Tensor:
        """`[B, G, N, C]`."""
        terms = [(bundle.layer, self._diagonal(bundle.rule, _only(parts, bundle))) for bundle in self._joined]
        if self._entangled:
            rows = num_rows(parts)
            blocks = [self._gradients(parts, chosen) for chosen in chunks(rows, self._row_bytes(parts), self._limit)]
            for name in blocks[0]:
                squares = [block[name].square().sum(-1) for block in blocks]
                terms.append((layer_name(name), torch.cat(squares, 1)))
        like = terms[0][1]
        total = like.new_zeros(like.shape[0], self.num_groups, *like.shape[1:])
        for layer, term in terms:
            total[:, self._group(layer)] += term
        return total

    def sketch(self, parts: Parts, features: int, seed: int) -> Tensor:
        """Random features `[B, N, C, F]`; see `gpntk.jacobians.sketch`."""
        positions = max((b.rule.num_positions(_only(parts, b)) for b in self._joined), default=1)
        factors = next(iter(parts.values())).factors[0]
        example = factors.a if factors.g is None else factors.g
        assert example is not None
        batch, rows, outputs = *example.shape[:2], 1 if factors.g is None else factors.g.shape[2]
        row_bytes = example.element_size() * batch * features * positions * (1 + 2 * outputs)
        done = []
        for chosen in chunks(rows, row_bytes, min(self._limit, _SKETCH_BYTES)):
            terms = []
            for bundle in self._joined:
                generator = torch.Generator("cpu").manual_seed(seed + 1000 * bundle.key)
                terms.append(bundle.rule.sketch(_only(parts, bundle).rows(chosen), features, generator))
            if self._entangled:
                generator = torch.Generator("cpu").manual_seed(seed + 1000 * len(parts))
                gradients = self._gradients(parts, chosen)
                terms += [sketched(gradients[name], features, generator) for name in sorted(gradients)]
            done.append(torch.stack(terms).sum(0))
        return torch.cat(done, 1)

    # --- private -----------------------------------------------------------------------------------------------

    @property
    def _limit(self) -> int:
        return self._memory_budget // 4

    def _diagonal(self, rule: AbstractLayerRule, factors: Factors) -> Tensor:
        if rule.flat(factors):
            return rule.diagonal(factors)
        row_bytes = _PATCHES * factors.num_values // max(factors.num_rows, 1) * 4
        rows = chunks(factors.num_rows, row_bytes, self._limit)
        return torch.cat([rule.diagonal(factors.rows(chosen)) for chosen in rows], 1)

    def _group(self, layer: str) -> int:
        return self._layers.get(layer, 0)

    def _add_flat(self, result: Tensor, left: Parts, right: Parts, flat: list[Bundle]) -> None:
        """What costs no more in pieces, in pieces that stay in the processor's cache, summed over the layers first."""
        rows, outputs, columns = result.shape[2:5]
        symmetric = left is right and rows >= _SYMMETRIC_ROWS
        row_bytes = 2 * result.element_size() * result.shape[0] * max(columns, 1) * outputs**2
        limit = workspace(result.device, self._memory_budget)
        limit = min(limit, row_bytes * rows // _SYMMETRIC_BLOCKS) if symmetric else limit
        for chosen in chunks(rows, row_bytes, limit):
            others = slice(0, chosen.stop if symmetric else columns)
            totals: dict[int, Tensor] = {}
            for bundle in flat:
                term = bundle.rule.gram(_only(left, bundle).rows(chosen), _only(right, bundle).rows(others))
                term = term.to(result.dtype)
                group = self._group(bundle.layer)
                if group not in totals:
                    totals[group] = term
                else:
                    totals[group] = totals[group] + term if term.requires_grad else totals[group].add_(term)
            for group, total in totals.items():
                result[:, group, chosen, :, others] = total
                if symmetric:
                    mirrored = total[:, :, :, : chosen.start].permute(0, 3, 4, 1, 2)
                    result[:, group, : chosen.start, :, chosen] = mirrored

    def _add_entangled(self, result: Tensor, left: Parts, right: Parts) -> None:
        for rows in chunks(result.shape[2], self._row_bytes(left), self._limit):
            one = self._gradients(left, rows)
            for columns in chunks(result.shape[4], self._row_bytes(right), self._limit):
                two = one if left is right and rows == columns else self._gradients(right, columns)
                for name, gradient in one.items():
                    term = inner_products(gradient.flatten(1, 2), two[name].flatten(1, 2))
                    term = term.unflatten(1, gradient.shape[1:3]).unflatten(3, two[name].shape[1:3])
                    result[:, self._group(layer_name(name)), rows, :, columns] += term

    def _gradients(self, parts: Parts, rows: slice) -> dict[str, Tensor]:
        """Per-sample gradients of every entangled parameter, `[B, N, C, P]`, summed over its uses."""
        total: dict[str, Tensor] = {}
        for bundle in self._entangled:
            part = parts[bundle.key].rows(rows)
            for factors in part.factors:
                for name, image in parameter_images(bundle, part, bundle.rule.gradients(factors), lead=3):
                    total[name] = total[name] + image if name in total else image
        return total

    def _row_bytes(self, parts: Parts) -> int:
        """Bytes of one row's gradients, and as much again for their making."""
        size = 0
        for bundle in self._entangled:
            derived = parts[bundle.key].derived
            for own, operand in bundle.operands.items():
                size += operand.form.numel()
                size += sum(p.numel() for p in derived[own].parameters.values()) if own in derived else 0
        g = _cotangents(parts)
        return 3 * size * g.shape[2] * g.element_size() * g.shape[0]


def num_rows(parts: Parts) -> int:
    """N."""
    return next(part.factors[0].num_rows for part in parts.values())


def _cotangents(parts: Parts) -> Tensor:
    """Those of some use, `[B, N, C, ...]`."""
    cotangents = (factors.g for part in parts.values() for factors in part.factors)
    return next(g for g in cotangents if g is not None)


def _only(parts: Parts, bundle: Bundle) -> Factors:
    (factors,) = parts[bundle.key].factors
    return factors


def _is_flat(bundle: Bundle, parts: Parts) -> bool:
    return bundle.rule.flat(_only(parts, bundle))
