"""Jacobian products layer by layer: one forward pass, C output-backwards, then matrix products.

The identity behind every method, for a layer with input a and output s, and g = df/ds:

    df_nc/dW = sum_t g_nct a_ntᵀ

so J v and Jᵀ u cost one GEMM per layer and column block, 2*N*P flops per column each way, without another forward or
backward pass; and a block of J Jᵀ is a product of small inner products (`gpntk.jacobians.layers`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from gpntk.errors import InputError, NetworkError
from gpntk.jacobians.autodiff import AutodiffBackend
from gpntk.jacobians.backend import AbstractJacobianBackend
from gpntk.jacobians.layers import AbstractLayerRule, Factors, rule_for
from gpntk.jacobians.memory import chunks, frozen, tracks_gradient, workspace
from gpntk.network import FrozenNetwork, LayerCall
from gpntk.selection import layer_name

LayerFactors = dict[str, Factors]

_CHECKED_ROWS = 32

# Blocks of rows in a symmetric Gram: k of them save (k - 1) / 2k of the operations, where N is large enough.
_SYMMETRIC_BLOCKS = 8
_SYMMETRIC_ROWS = 256


@final
class StructuredBackend(AbstractJacobianBackend):
    """Products from cached layer factors (a, g); `nn.Linear` has a rule, other layers need no parameters selected.

    Use it wherever it applies: 4*N*P flops per kernel-vector product and column, a third to a half of automatic
    differentiation's. Memory for N rows: the factors, N * sum_l T*(I + C*O) values, kept while they fit the budget and
    recomputed by chunks of rows, shared by all columns, when they do not.

    Raises:
        NetworkError: A selected parameter belongs to a layer without a rule, is tied, or its layer runs more than once
            or not by its own forward; the message names it. `AutoBackend` falls back then.

    Example:
        >>> import torch, gpntk
        >>> network = torch.nn.Sequential(torch.nn.Linear(3, 50), torch.nn.Tanh(), torch.nn.Linear(50, 2))
        >>> backend = StructuredBackend(gpntk.freeze(network), memory_budget=2**20)
        >>> x = torch.randn(1, 10, 3)
        >>> backend.vjp(x, torch.ones(1, 4, 20)).shape, backend.gram(x, x, per_layer=True).shape
        (torch.Size([1, 4, 302]), torch.Size([1, 2, 20, 20]))
    """

    def __init__(self, network: FrozenNetwork, memory_budget: int | None = None) -> None:
        super().__init__(network, memory_budget)
        self._rules = _rules(network)
        self._row_values = 0

    def jvp(self, x: Tensor, v: Tensor) -> Tensor:
        tangents = self.network.unflatten(v)
        return torch.cat([self._jvp_rows(factors, tangents) for factors in self._blocks(x)], dim=-1)

    def vjp(self, x: Tensor, u: Tensor) -> Tensor:
        u = u.unflatten(-1, (x.shape[1], -1))
        total, start = None, 0
        for factors in self._blocks(x):
            stop = start + _num_rows(factors)
            part = self._vjp_rows(factors, u[:, :, start:stop])
            total, start = part if total is None else total + part, stop
        assert total is not None
        return total

    def gram(self, x1: Tensor, x2: Tensor, per_layer: bool = False) -> Tensor:
        blocks = []
        for left in self._blocks(x1):
            whole = x1 is x2 and _num_rows(left) == x1.shape[1]
            if whole and not tracks_gradient(x1) and _worth_mirroring(left):
                return self._symmetric_gram(left, per_layer)
            rights = (left,) if whole else self._blocks(x2)
            blocks.append(torch.cat([self._gram_rows(left, right, per_layer) for right in rights], dim=-1))
        return torch.cat(blocks, dim=-2)

    def diagonal(self, x: Tensor, per_layer: bool = False) -> Tensor:
        parts = []
        for factors in self._blocks(x):
            terms = {name: self._rules[name].diagonal(factors[name]) for name in factors}
            parts.append(self._grouped(terms, per_layer).flatten(2))
        return torch.cat(parts, dim=-1)

    # --- factors -----------------------------------------------------------------------------------------------

    def _blocks(self, x: Tensor) -> Iterator[LayerFactors]:
        """Factors of consecutive chunks of the rows of x `[B, N, D]`, all rows at once if the budget allows."""
        self.check(x)
        row_bytes = x.shape[0] * self._row_values * x.element_size()
        for rows in chunks(x.shape[1], row_bytes, self.memory_budget):
            if rows == slice(0, x.shape[1]):
                yield self.remember("factors", (x,), lambda: self._factors(x))
            else:
                yield self._factors(x[:, rows])

    def _factors(self, x: Tensor) -> LayerFactors:
        batch, rows, _ = x.shape
        graph = tracks_gradient(x)
        with torch.inference_mode(False):
            inputs = x if graph else frozen(x)
            outputs, calls = self.network.trace(inputs.flatten(0, 1), tuple(self._rules))
            reached = {name: _only_call(name, made, batch * rows) for name, made in calls.items() if made}
            cotangents = _output_backwards(outputs, [call.output for call in reached.values()], graph)
        factors = {}
        for (name, call), g in zip(reached.items(), cotangents, strict=True):
            a = call.input if graph else call.input.detach()
            flat = self._rules[name].factors(a, g)
            factors[name] = Factors(*(tensor.view(batch, rows, *tensor.shape[2:]) for tensor in flat))
        return factors

    def check(self, x: Tensor) -> None:
        """Once: compare a product with automatic differentiation on some rows, and count the values a row needs.

        Rows are drawn from all over x and shuffled, so that a layer used otherwise on some inputs (a gate, a sort)
        is found out; what none of them shows cannot be seen here.
        """
        if self._row_values:
            return
        with torch.no_grad():
            sample = _sample_rows(frozen(x).flatten(0, 1)).unsqueeze(0)
            factors = self._factors(sample)
            if not factors:
                raise NetworkError("no selected layer runs by its own forward; use AutodiffBackend.")
            outputs = self.num_outputs(x)
            size = sample.shape[1] * outputs
            u = torch.arange(1, size + 1, dtype=x.dtype, device=x.device).cos().view(1, 1, -1)
            product = self._vjp_rows(factors, u.unflatten(-1, (-1, outputs)))
            reference = AutodiffBackend(self.network, self.memory_budget).vjp(sample, u)
        error = (product - reference).abs().squeeze()
        bound = torch.finfo(x.dtype).eps ** 0.5 * reference.abs().max()
        for name, columns in self.network.slices.items():
            if not (error.view(-1)[columns] <= bound).all():
                raise NetworkError(
                    f"the structured product for parameter {name!r} disagrees with automatic differentiation: it acts "
                    "outside its layer's own forward (used directly, or through a hook); use AutodiffBackend."
                )
        values = sum(tensor.numel() for layer in factors.values() for tensor in layer)
        # Factors, and as much again for the activations that the backward pass needs on the way.
        self._row_values = max(1, 2 * values // sample.shape[1])

    # --- products on one block of rows -------------------------------------------------------------------------

    def _jvp_rows(self, factors: LayerFactors, tangents: dict[str, Tensor]) -> Tensor:
        columns_in = next(iter(tangents.values())).shape[1]
        parts = []
        for columns in self._columns(factors, columns_in):
            terms = [
                self._rules[name].jvp(layer, {own: tangents[full][:, columns] for own, full in self._owned(name)})
                for name, layer in factors.items()
            ]
            parts.append(torch.stack(terms).sum(0) if len(terms) > 1 else terms[0])
        return torch.cat(parts, dim=1).flatten(2)

    def _vjp_rows(self, factors: LayerFactors, u: Tensor) -> Tensor:
        parts = []
        for columns in self._columns(factors, u.shape[1]):
            block = u[:, columns]
            images: dict[str, Tensor] = {}
            for name, layer in factors.items():
                owned = self._rules[name].vjp(layer, block)
                images |= {full: owned[own] for own, full in self._owned(name)}
            for name in self.network.names:
                # A layer that never ran, or does not reach the output, moves nothing.
                images.setdefault(name, u.new_zeros(*block.shape[:2], *self.network.shapes[name]))
            parts.append(self.network.flatten(images, batch_dims=2))
        return torch.cat(parts, dim=1)

    def _gram_rows(self, left: LayerFactors, right: LayerFactors, per_layer: bool) -> Tensor:
        rows = chunks(_num_rows(left), _gram_row_bytes(left, _num_rows(right)), self._gram_limit(left))
        return torch.cat([self._gram_block(_rows(left, part), right, per_layer) for part in rows], dim=-2)

    def _symmetric_gram(self, factors: LayerFactors, per_layer: bool) -> Tensor:
        """The Gram of one set of rows: blocks on and below the diagonal, mirrored."""
        total, result = _num_rows(factors), None
        limit = min(self._gram_limit(factors), _gram_row_bytes(factors, total) * total // _SYMMETRIC_BLOCKS)
        for part in chunks(total, _gram_row_bytes(factors, total), limit):
            block = self._gram_block(_rows(factors, part), _rows(factors, slice(0, part.stop)), per_layer)
            outputs = block.shape[-1] // max(part.stop, 1)
            if result is None:
                result = block.new_empty(*block.shape[:2], total * outputs, total * outputs)
            start, stop = part.start * outputs, part.stop * outputs
            result[..., start:stop, :stop] = block
            result[..., :start, start:stop] = block[..., :start].mT
        assert result is not None
        return result

    def _gram_limit(self, factors: LayerFactors) -> int:
        """Bytes for a block of the Gram: little, unless a block costs per-sample gradients of its columns anew."""
        if any(layer.a.shape[2] > 1 for layer in factors.values()):
            return self.memory_budget
        return workspace(next(iter(factors.values())).a.device, self.memory_budget)

    def _gram_block(self, left: LayerFactors, right: LayerFactors, per_layer: bool) -> Tensor:
        terms = {name: self._rules[name].gram(left[name], right[name]) for name in left}
        return self._grouped(terms, per_layer).flatten(4, 5).flatten(2, 3)

    def _grouped(self, terms: dict[str, Tensor], per_layer: bool) -> Tensor:
        """Sum the layers' terms `[B, ...]` into groups `[B, G, ...]`."""
        like = next(iter(terms.values()))
        if per_layer:
            return torch.stack([terms.get(name, torch.zeros_like(like)) for name, _ in self.network.layers], dim=1)
        total = like
        for term in list(terms.values())[1:]:
            total = total + term if term.requires_grad else total.add_(term)
        return total.unsqueeze(1)

    def _columns(self, factors: LayerFactors, columns: int) -> Iterator[slice]:
        """Chunks of columns whose largest temporary, `[B, N, T, O]` per column, fits the workspace."""
        sizes = [layer.g[:, :, 0].numel() * layer.g.element_size() for layer in factors.values()]
        device = next(iter(factors.values())).g.device
        return chunks(columns, max(sizes), workspace(device, self.memory_budget))

    def _owned(self, layer: str) -> list[tuple[str, str]]:
        return list(self._rules[layer].names.items())


def _rules(network: FrozenNetwork) -> dict[str, AbstractLayerRule]:
    owners: dict[str, dict[str, str]] = {}
    for name in network.names:
        owners.setdefault(layer_name(name), {})[name.rpartition(".")[2]] = name
    tied = network.tied_names() & set(network.names)
    if tied:
        raise NetworkError(f"parameter {min(tied)!r} is tied to another layer; the structured rules need it untied.")
    rules = {}
    for layer, names in owners.items():
        module = network.submodule(layer)
        rule = rule_for(module, names)
        if rule is None:
            raise NetworkError(f"layer {layer or 'network'!r} ({type(module).__name__}) has no structured rule.")
        rules[layer] = rule
    return rules


def _only_call(name: str, calls: list[LayerCall], rows: int) -> LayerCall:
    if len(calls) > 1:
        raise NetworkError(
            f"layer {name!r} runs {len(calls)} times in one forward pass; its structured rule needs one."
        )
    (call,) = calls
    if call.input.shape[0] != rows or call.output.shape[0] != rows:
        raise NetworkError(
            f"layer {name!r} sees {call.input.shape[0]} rows where the network sees {rows}; its structured rule needs "
            "the rows of x in its leading dimension."
        )
    return call


def _output_backwards(outputs: Tensor, points: list[Tensor], graph: bool) -> list[Tensor]:
    """df_c/ds at every recorded point s `[N, ...]`, for every output c: `[N, C, ...]`."""
    if not points:
        return []
    if outputs.shape[1] == 1:
        grads = torch.autograd.grad(
            outputs.sum(), points, create_graph=graph, allow_unused=True, materialize_grads=True
        )
        return [grad.unsqueeze(1) for grad in grads]
    rows, count = outputs.shape
    unit = torch.eye(count, dtype=outputs.dtype, device=outputs.device).unsqueeze(1).expand(count, rows, count)
    grads = torch.autograd.grad(
        outputs, points, unit, is_grads_batched=True, create_graph=graph, allow_unused=True, materialize_grads=True
    )
    return [grad.movedim(0, 1) for grad in grads]


def _num_rows(factors: LayerFactors) -> int:
    return next((layer.a.shape[1] for layer in factors.values()), 0)


def _rows(factors: LayerFactors, rows: slice) -> LayerFactors:
    return {name: layer.rows(rows) for name, layer in factors.items()}


def _worth_mirroring(factors: LayerFactors) -> bool:
    return _num_rows(factors) >= _SYMMETRIC_ROWS and all(layer.a.shape[2] == 1 for layer in factors.values())


def _gram_row_bytes(left: LayerFactors, others: int) -> int:
    """Bytes of one row's block of the Gram with ``others`` rows, and of a temporary of its size."""
    example = next(iter(left.values()))
    batch, _, outputs = example.g.shape[:3]
    positions = max(layer.a.shape[2] for layer in left.values())
    return 2 * example.a.element_size() * batch * max(others, 1) * outputs**2 * positions


def _sample_rows(x: Tensor) -> Tensor:
    """Up to 32 finite rows of x `[N, D]` from all over it, in shuffled order; a single row with a perturbed one."""
    x = x[x.isfinite().all(-1)]
    if not len(x):
        raise InputError("x has no row without NaN or infinite values.")
    generator = torch.Generator("cpu").manual_seed(0)
    chosen = x[torch.randperm(x.shape[0], generator=generator, device="cpu")[:_CHECKED_ROWS].to(x.device)]
    return torch.cat([chosen, x[:1] * 0.9 + 0.1]) if x.shape[0] == 1 else chosen
