"""Jacobian products use by use: one forward pass, C output-backwards, then matrix products.

The identity behind every method, for a layer with input a and output s, and g = df/ds:

    df_nc/dW = sum_t g_nct a_ntᵀ

so J v and Jᵀ u cost one GEMM per layer and column block, 2*N*P flops per column each way, without another forward or
backward pass; and a block of J Jᵀ is a product of small inner products (`gpntk.jacobians.rules`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import final

import torch
from torch import Tensor

from gpntk._checks import check_choice
from gpntk.cost import Cost, Machine, RowSizes, cheapest, count
from gpntk.errors import GpntkError, NetworkError, UnruledError
from gpntk.jacobians.autodiff import AutodiffBackend
from gpntk.jacobians.backend import AbstractTangentBackend, jacobian_by_rows
from gpntk.jacobians.backward import BackwardBackend
from gpntk.jacobians.capture import Capture, Parts, joined
from gpntk.jacobians.grams import Grams, num_rows
from gpntk.jacobians.precision import PRECISIONS, Precision, arithmetic, rounded
from gpntk.jacobians.record import no_pattern
from gpntk.jacobians.rules import AbstractLayerRule, Factors
from gpntk.jacobians.shared import operand_tangents, parameter_images
from gpntk.jacobians.uses import sample_rows
from gpntk.memory import attached, chunks, frozen, halving, is_out_of_memory, tracks_gradient, workspace
from gpntk.network import FrozenNetwork

# Rows, and sums of outputs, on which products are compared with autograd's.
_CHECKED_ROWS = 32
_SUMS = 2


@final
class StructuredBackend(AbstractTangentBackend):
    """Products from layer factors (a, g), for parameters that are used by functions with a rule.

    Use it wherever it applies: 4*N*P flops per kernel-vector product and column, a third to a half of automatic
    differentiation's, in x's own precision unless ``precision`` says otherwise. Memory for N rows: the factors,
    N * sum_l T*(I + C*O) values, kept while they fit a quarter of the budget, else recomputed by chunks of rows,
    shared by all columns. Where C is large and columns few, products take a pass per column instead, if counting says
    that 20 of them cost less.

    Args:
        network: The network, with the parameters to differentiate selected.
        memory_budget: Bytes that temporaries, and what is kept, stay within.
        precision: ``"exact"``, x's own; ``"tf32"`` or ``"bfloat16"`` for faster products with errors of about 1e-3 and
            1e-2 of the largest entry.

    Raises:
        UnruledError: Some selected parameters are used in ways without a rule; `AutoBackend` takes those by automatic
            differentiation, and only those.
        NetworkError: The network's path through its layers depends on the rows it is given.

    Example:
        >>> import torch, gpntk
        >>> network = torch.nn.Sequential(torch.nn.Linear(3, 50), torch.nn.Tanh(), torch.nn.Linear(50, 2))
        >>> backend = StructuredBackend(gpntk.freeze(network), memory_budget=2**20)
        >>> x = torch.randn(1, 10, 3)
        >>> backend.vjp(x, torch.ones(1, 4, 20)).shape, backend.gram(x, x, per_layer=True).shape
        (torch.Size([1, 4, 302]), torch.Size([1, 2, 20, 20]))
    """

    def __init__(
        self, network: FrozenNetwork, memory_budget: int | None = None, precision: Precision = "exact"
    ) -> None:
        super().__init__(network, memory_budget)
        check_choice(PRECISIONS, precision=precision)
        self.precision: Precision = precision
        self._autodiff = AutodiffBackend(network, self.memory_budget)
        self._passes = BackwardBackend(network, self.memory_budget)
        self._capture: Capture | None = None
        self._row: RowSizes | None = None

    def jvp(self, x: Tensor, v: Tensor) -> Tensor:
        capture = self._checked(x)
        if self._by_passes(x, v.shape[1]):
            return self._autodiff.jvp(x, v)
        tangents = self.network.unflatten(v)
        with arithmetic(self.precision):
            parts = [self._jvp_rows(capture, parts, tangents) for parts in self._blocks(x)]
        return attached(torch.cat(parts, dim=-1), x)

    def vjp(self, x: Tensor, u: Tensor) -> Tensor:
        capture = self._checked(x)
        if self._by_passes(x, u.shape[1]):
            return self._autodiff.vjp(x, u)
        result = u.new_zeros(*u.shape[:2], self.num_features)
        u = rounded(u, self.precision).unflatten(-1, (x.shape[1], -1))
        start = 0
        with arithmetic(self.precision):
            for parts in self._blocks(x):
                stop = start + num_rows(parts)
                self._add_vjp(capture, result, parts, u[:, :, start:stop])
                start = stop
        return attached(result, x)

    def gram(self, x1: Tensor, x2: Tensor, per_layer: bool = False) -> Tensor:
        grams = self._grams(x1, per_layer)
        rows, columns, outputs = x1.shape[1], x2.shape[1], self.num_outputs(x1)
        result = x1.new_zeros(x1.shape[0], grams.num_groups, rows, outputs, columns, outputs)
        start = 0
        with arithmetic(self.precision):
            for left in self._blocks(x1):
                stop, begin = start + num_rows(left), 0
                for right in self._blocks(x2) if x1 is not x2 or start else [left]:
                    if x1 is x2 and begin == start:
                        right = left  # noqa: PLW2901 (the same rows: what is mirrored needs no more columns)
                    end = begin + num_rows(right)
                    grams.add(result[:, :, start:stop, :, begin:end], left, right)
                    if x1 is x2 and begin == start:
                        break
                    if x1 is x2:
                        block = result[:, :, start:stop, :, begin:end]
                        result[:, :, begin:end, :, start:stop] = block.permute(0, 1, 4, 5, 2, 3)
                    begin = end
                start = stop
        return attached(attached(result.flatten(4, 5).flatten(2, 3), x1), x2)

    def diagonal(self, x: Tensor, per_layer: bool = False) -> Tensor:
        grams = self._grams(x, per_layer)
        parts = [grams.diagonal(parts).flatten(2).to(x.dtype) for parts in self._blocks(x)]
        return attached(torch.cat(parts, dim=-1), x)

    def jacobian(self, x: Tensor) -> Tensor:
        return jacobian_by_rows(self, x)

    def check(self, x: Tensor) -> None:
        """Once: find the uses of parameters, and compare a product with automatic differentiation on some rows.

        Rows are drawn from all over x and shuffled, so that a layer used otherwise on some inputs (a gate, a sort)
        is found out; what none of them shows cannot be seen here.
        """
        self._checked(x)

    def costs(self, x: Tensor, columns: int) -> tuple[Cost, ...]:
        self._checked(x)
        assert self._row is not None
        return count(
            self._row,
            rows=x.shape[:-1].numel(),
            outputs=self.num_outputs(x),
            parameters=self.num_features,
            columns=columns,
            itemsize=x.element_size(),
            budget=self.memory_budget,
            machine=Machine.of(x.device),
        )

    def parts(self, x: Tensor) -> tuple[Capture, Iterable[Parts]]:
        """The uses of parameters, and their factors on all rows of x, chunk by chunk."""
        return self._checked(x), self._blocks(x)

    # --- private -----------------------------------------------------------------------------------------------

    def _checked(self, x: Tensor) -> Capture:
        if self._capture is None:
            if hooked := self.network.hooked.intersection(self.network.names):
                raise UnruledError(dict.fromkeys(sorted(hooked), "its gradients go through a hook"))
            self.num_outputs(x)  # which also checks the network's behaviour
            try:
                with warnings.catch_warnings():
                    # A warning of checkpoints, which then lose derivatives.
                    warnings.filterwarnings("error", "None of the inputs have requires_grad")
                    self._capture = self._find(x)
            except GpntkError:
                raise
            except Exception as error:
                if isinstance(error, RuntimeError) and is_out_of_memory(error):
                    raise
                # The network has just run by itself.
                message = (str(error).strip() or "no message").splitlines()[0]
                raise NetworkError(f"its parameters cannot be followed: {type(error).__name__}: {message}") from error
        if tracks_gradient(x):
            self._passes.check_twice(x)
        return self._capture

    def _find(self, x: Tensor) -> Capture:
        x = x.to(self.network.compute_dtype(x.dtype))
        capture = Capture(self.network, frozen(x).flatten(0, 1))
        with torch.inference_mode(False), torch.no_grad():
            outputs = self.num_outputs(x)
            row_bytes = x.element_size() * capture.uses.activations * (2 + min(outputs, _SUMS))
            count = min(_CHECKED_ROWS, self.memory_budget // 2 // max(row_bytes, 1))
            rows = sample_rows(frozen(x).flatten(0, 1), count)
            # All outputs on one row; on all rows a few sums of them, to which each adds about as much.
            parts, sizes = self._compare(capture, rows if outputs <= _SUMS else rows[:1])
            if outputs > _SUMS:
                sizes = sizes.clamp_min(0.01 * sizes.max())
                self._compare(capture, rows, no_pattern(outputs * _SUMS, x).view(-1, _SUMS) / sizes.mT)
            self._row = self._row_sizes(capture, parts, outputs)
        return capture

    def _compare(self, capture: Capture, rows: Tensor, sums: Tensor | None = None) -> tuple[Parts, Tensor]:
        """The factors of rows whose products are those of autograd, and sizes of the rows of J `[N, C]`.

        Of f(x) ``sums`` instead of f(x) for sums `[C, R]`.
        """
        parts = capture.parts(rows.unsqueeze(0), sums)
        selected = self.network.selected(rows.dtype, rows.device)
        parameters = {name: tensor.detach().requires_grad_() for name, tensor in selected.items()}
        sizes = Grams(capture.shared, self.memory_budget).diagonal(parts)[0, 0].sqrt()
        floor = torch.finfo(rows.dtype).eps * sizes.max()
        sizes = sizes.clamp_min(floor if floor > 0 else 1.0)
        # Weights that are no pattern, and smaller for rows that move the weights more: none hides the others.
        u = no_pattern(sizes.numel(), rows).view_as(sizes) / sizes
        with torch.inference_mode(False), torch.enable_grad():
            outputs = self.network(rows, parameters)
            gradients = torch.autograd.grad(
                outputs if sums is None else outputs @ sums,
                tuple(parameters.values()),
                u,
                allow_unused=True,
                materialize_grads=True,
            )
        product = rows.new_zeros(1, 1, self.num_features)
        self._add_vjp(capture, product, parts, u[None, None])
        largest = max(gradient.abs().max() for gradient in gradients)
        wrong = []
        for gradient, (name, columns) in zip(gradients, self.network.slices.items(), strict=True):
            # Far above rounding, far below what a use overlooked leaves.
            root = torch.finfo(self.network.compute_dtype(rows.dtype)).eps ** 0.5
            bound = 10 * root * torch.maximum(gradient.abs().max(), root * largest)
            if not ((product[0, 0, columns] - gradient.flatten()).abs() <= bound).all():
                wrong.append(name)
        if wrong:
            reason = (
                "products by its rule disagree with automatic differentiation (used in a custom autograd function, "
                "or rows come in an order that could not be told)"
            )
            raise UnruledError(dict.fromkeys(wrong, reason))
        return parts, sizes

    def _row_sizes(self, capture: Capture, parts: Parts, outputs: int) -> RowSizes:
        each = [(uses.rule, parts[uses.key].factors) for uses in capture.shared]
        sizes = [rule.sizes(factors) for rule, factors in each]
        return RowSizes(
            product=sum(size.product for size in sizes),
            pair=sum(size.pair for size in sizes),
            kept=sum(factors.num_values for _, factors in each) // num_rows(parts) + 1,
            activations=capture.uses.activations,
            largest=outputs * capture.uses.largest,
            calls=capture.uses.tensors,
            uses=sum(len(uses.uses) for uses in capture.shared),
            backward=any(factors.g is not None for _, factors in each),
        )

    def _by_passes(self, x: Tensor, columns: int) -> bool:
        """Whether so few columns go by passes of their own, one each, rather than by factors, which take C passes."""
        assert self._row is not None
        # A vjp is seldom without its jvp: the columns count twice.
        if 2 * columns >= self.num_outputs(x) or not self._row.backward:
            return False
        costs = [cost for cost in self.costs(x, columns) if cost.strategy.startswith(("factors", "autodiff"))]
        return cheapest(tuple(costs), Machine.of(x.device)) == "autodiff" and not self._autodiff.refusal(x)

    def _blocks(self, x: Tensor) -> Iterable[Parts]:
        """The factors of the rows of x `[B, N, D]`: one block, kept, if a quarter of the budget holds it."""
        capture, row = self._checked(x), self._row
        assert row is not None
        kept, passing, largest = (
            x.shape[0] * values * x.element_size() for values in (row.kept, row.passing, row.largest)
        )
        share = self.memory_budget // 4  # for what is kept; as much for what the passes need, and for the products
        # Smaller chunks than memory asks for, so that what the passes leave on the way stays in the processor's cache.
        step_bytes = max(passing, largest * share // workspace(x.device, share))

        def block(rows: slice) -> Parts:
            steps = chunks(rows.stop - rows.start, step_bytes, share)
            shifted = (slice(rows.start + step.start, rows.start + step.stop) for step in steps)
            return joined(
                [p for step in shifted for p in halving(step, lambda part: self._rounded(capture, x[:, part]))]
            )

        if kept * x.shape[1] <= share:
            return [self.remember("factors", (x,), lambda: block(slice(0, x.shape[1])))]
        return (parts for rows in chunks(x.shape[1], 2 * kept, share) for parts in halving(rows, block))

    def _rounded(self, capture: Capture, x: Tensor) -> Parts:
        dtype = self.network.compute_dtype(x.dtype)
        parts = capture.parts(x.to(dtype))
        if dtype != x.dtype:
            parts = {key: part.map(lambda tensor: tensor.to(x.dtype)) for key, part in parts.items()}
        if self.precision != "bfloat16":
            return parts
        return {key: part.map(lambda tensor: rounded(tensor, self.precision)) for key, part in parts.items()}

    def _jvp_rows(self, capture: Capture, parts: Parts, tangents: dict[str, Tensor]) -> Tensor:
        total: Tensor | None = None
        for uses in capture.shared:
            operands = operand_tangents(uses, parts[uses.key], tangents)
            term = self._rule_jvp(uses.rule, parts[uses.key].factors, operands)
            total = term if total is None else total + term
        assert total is not None
        return total.flatten(2)

    def _rule_jvp(self, rule: AbstractLayerRule, factors: Factors, tangents: dict[str, Tensor]) -> Tensor:
        def product(columns: slice) -> Tensor:
            chosen = {own: rounded(tangent[:, columns], self.precision) for own, tangent in tangents.items()}
            return rule.jvp(factors, chosen).to(dtype)

        dtype = next(iter(tangents.values())).dtype
        columns = self._columns(rule, factors, next(iter(tangents.values())).shape[1])
        return torch.cat([done for chosen in columns for done in halving(chosen, product)], dim=1)

    def _add_vjp(self, capture: Capture, result: Tensor, parts: Parts, u: Tensor) -> None:
        """Add Jᵀ u to ``result`` `[B, K, P]` for u `[B, K, N, C]`."""
        for uses in capture.shared:
            part = parts[uses.key]
            for columns in self._columns(uses.rule, part.factors, u.shape[1]):
                images = uses.rule.vjp(part.factors, u[:, columns])
                for name, image in parameter_images(uses, part, images, lead=2):
                    result[:, columns, self.network.slices[name]] += image

    def _columns(self, rule: AbstractLayerRule, factors: Factors, columns: int) -> Iterator[slice]:
        """Chunks of columns whose temporaries fit the workspace."""
        example = next(tensor for tensor in factors if tensor is not None)
        column_bytes = rule.sizes(factors).column * example.element_size()
        return chunks(columns, column_bytes, workspace(example.device, self.memory_budget))

    def _grams(self, x: Tensor, per_layer: bool) -> Grams:
        groups = [name for name, _ in self.network.groups] if per_layer else []
        return Grams(self._checked(x).shared, self.memory_budget, groups, self.network.group_of)
