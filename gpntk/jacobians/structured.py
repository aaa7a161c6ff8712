"""Jacobian products use by use: one forward pass, C output-backwards, then matrix products.

The identity behind every method, for a layer with input a and output s, and g = df/ds:

    df_nc/dW = sum_t g_nct a_ntᵀ

so J v and Jᵀ u cost one GEMM per layer and column block, 2*N*P flops per column each way, without another forward or
backward pass; and a block of J Jᵀ is a product of small inner products (`gpntk.jacobians.rules`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple, final

import torch
from torch import Tensor

from gpntk.cost import Cost, Machine, Sizes, count
from gpntk.errors import InputError, UnruledError
from gpntk.jacobians.autodiff import AutodiffBackend
from gpntk.jacobians.backend import AbstractTangentBackend, jacobian_by_rows
from gpntk.jacobians.bundles import operand_tangents, parameter_images
from gpntk.jacobians.grams import Grams, num_rows
from gpntk.jacobians.passes import FactorPasses, Parts, joined
from gpntk.jacobians.plan import sample_rows
from gpntk.jacobians.precision import PRECISIONS, Precision, arithmetic, rounded
from gpntk.jacobians.rules import AbstractLayerRule, Factors, Operations
from gpntk.memory import chunks, frozen, halving, workspace
from gpntk.network import FrozenNetwork

_CHECKED_ROWS = 32


class RowCounts(NamedTuple):
    """What a row of x takes.

    Attributes:
        kept: Values of its factors; passing: in all while the passes run; largest: in the largest temporary.
        operations: Multiplications in products and Grams.
        backward: Whether its factors take backward passes.
    """

    kept: int
    passing: int
    largest: int
    operations: Operations
    backward: bool


@final
class StructuredBackend(AbstractTangentBackend):
    """Products from layer factors (a, g), for parameters that are used by functions with a rule.

    Use it wherever it applies: 4*N*P flops per kernel-vector product and column, a third to a half of automatic
    differentiation's, in x's own precision unless ``precision`` says otherwise. Memory for N rows: the factors,
    N * sum_l T*(I + C*O) values, kept while they fit a quarter of the budget, else recomputed by chunks of rows,
    shared by all columns. Where C is large and columns few, products take a pass per column instead.

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
        if precision not in PRECISIONS:
            raise InputError(f"precision={precision!r}: choose one of {', '.join(map(repr, PRECISIONS))}.")
        self.precision: Precision = precision
        self._autodiff = AutodiffBackend(network, self.memory_budget)
        self._passes: FactorPasses | None = None
        self._counts: RowCounts | None = None

    def jvp(self, x: Tensor, v: Tensor) -> Tensor:
        passes = self._checked(x)
        if self._few(x, v.shape[1]):
            with suppress(RuntimeError):  # what torch.func cannot run goes by factors
                return self._autodiff.jvp(x, v)
        tangents = self.network.unflatten(v)
        with arithmetic(self.precision):
            return torch.cat([self._jvp_rows(passes, parts, tangents) for parts in self._blocks(x)], dim=-1)

    def vjp(self, x: Tensor, u: Tensor) -> Tensor:
        passes = self._checked(x)
        if self._few(x, u.shape[1]):
            with suppress(RuntimeError):
                return self._autodiff.vjp(x, u)
        result = u.new_zeros(*u.shape[:2], self.num_features)
        u = rounded(u, self.precision).unflatten(-1, (x.shape[1], -1))
        start = 0
        with arithmetic(self.precision):
            for parts in self._blocks(x):
                stop = start + num_rows(parts)
                self._add_vjp(passes, result, parts, u[:, :, start:stop])
                start = stop
        return result

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
        return result.flatten(4, 5).flatten(2, 3)

    def diagonal(self, x: Tensor, per_layer: bool = False) -> Tensor:
        grams = self._grams(x, per_layer)
        return torch.cat([grams.diagonal(parts).flatten(2).to(x.dtype) for parts in self._blocks(x)], dim=-1)

    def sketch(self, x: Tensor, features: int, seed: int) -> Tensor:
        grams = self._grams(x, per_layer=False)
        return torch.cat(
            [grams.sketch(parts, features, seed).flatten(1, 2).to(x.dtype) for parts in self._blocks(x)], dim=1
        )

    def jacobian(self, x: Tensor) -> Tensor:
        return jacobian_by_rows(self, x)

    def check(self, x: Tensor) -> None:
        """Once: find the uses of parameters, and compare a product with automatic differentiation on some rows.

        Rows are drawn from all over x and shuffled, so that a layer used otherwise on some inputs (a gate, a sort)
        is found out; what none of them shows cannot be seen here.
        """
        self._checked(x)

    def costs(self, x: Tensor, columns: int) -> tuple[Cost, ...]:
        """The cost of products with so many columns by each strategy, the cheapest first."""
        passes = self._checked(x)
        assert self._counts is not None
        sizes = Sizes(
            rows=x.shape[:-1].numel(),
            outputs=self.num_outputs(x),
            parameters=self.num_features,
            columns=columns,
            itemsize=x.element_size(),
            multiplications=self._counts.operations.row,
            pair=self._counts.operations.pair,
            kept=self._counts.kept,
            activations=passes.plan.activations,
            calls=len(passes.plan.functions),
            uses=sum(len(bundle.uses) for bundle in passes.bundles),
        )
        return count(sizes, self.memory_budget, Machine.of(x.device))

    # --- private -----------------------------------------------------------------------------------------------

    def _checked(self, x: Tensor) -> FactorPasses:
        if self._passes is None:
            self.num_outputs(x)  # which also checks the network's behaviour
            passes = FactorPasses(self.network, frozen(x).flatten(0, 1))
            with torch.inference_mode(False), torch.no_grad():
                row_bytes = x.element_size() * passes.plan.activations * (2 + self.num_outputs(x))
                count = min(_CHECKED_ROWS, self.memory_budget // 2 // max(row_bytes, 1))
                self._counts = self._compare(passes, sample_rows(frozen(x).flatten(0, 1), count))
            self._passes = passes
        return self._passes

    def _compare(self, passes: FactorPasses, rows: Tensor) -> RowCounts:
        """What a row takes, after the comparison."""
        parts = passes.parts(rows.unsqueeze(0))
        selected = self.network.selected(rows.dtype, rows.device)
        parameters = {name: tensor.detach().requires_grad_() for name, tensor in selected.items()}
        with torch.inference_mode(False), torch.enable_grad():
            outputs = self.network(rows, parameters)
            # Weights that are no pattern, and smaller for rows that move the weights more: none hides the others.
            u = torch.arange(1, outputs.numel() + 1, dtype=rows.dtype, device=rows.device).cos().view_as(outputs)
            sizes = Grams(passes.bundles, (), self.memory_budget).diagonal(parts)[0, 0].sqrt()
            u = u / sizes.clamp_min(torch.finfo(rows.dtype).eps * sizes.max())
            gradients = torch.autograd.grad(
                outputs, tuple(parameters.values()), u, allow_unused=True, materialize_grads=True
            )
        product = rows.new_zeros(1, 1, self.num_features)
        self._add_vjp(passes, product, parts, u[None, None])
        largest = max(gradient.abs().max() for gradient in gradients)
        wrong = []
        for gradient, (name, columns) in zip(gradients, self.network.slices.items(), strict=True):
            # Far above rounding, far below what a use overlooked leaves.
            root = torch.finfo(rows.dtype).eps ** 0.5
            bound = 10 * root * torch.maximum(gradient.abs().max(), root * largest)
            if not ((product[0, 0, columns] - gradient.flatten()).abs() <= bound).all():
                wrong.append(name)
        if wrong:
            reason = (
                "products by its rule disagree with automatic differentiation (used in a custom autograd function, "
                "or rows come in an order that could not be told)"
            )
            raise UnruledError(dict.fromkeys(wrong, reason))
        each = [(bundle.rule, factors) for bundle in passes.bundles for factors in parts[bundle.key].factors]
        kept = sum(factors.num_values for _, factors in each) // len(rows) + 1
        largest = outputs.shape[1] * passes.plan.largest
        operations = [rule.operations(factors) for rule, factors in each]
        return RowCounts(
            kept,
            kept + passes.plan.activations + 4 * largest,
            largest,
            Operations(sum(each.row for each in operations), sum(each.pair for each in operations)),
            backward=any(factors.g is not None for _, factors in each),
        )

    def _few(self, x: Tensor, columns: int) -> bool:
        """Whether so few columns go by passes of their own, one each, rather than by factors, which take C passes.

        Where factors can be kept, they are made once the columns seen for x have cost as much as they would.
        """
        assert self._counts is not None
        outputs = self.num_outputs(x)
        # A vjp is seldom without its jvp: the columns count twice.
        if 2 * columns >= outputs or not self._counts.backward:
            return False
        if self._counts.kept * x.numel() // x.shape[-1] * x.element_size() > self.memory_budget // 4:
            return True
        if self.cache.holds(("factors", self.network.version), (x,)):
            return False
        paid = self.remember("columns", (x,), lambda: [0])
        paid[0] += columns
        return paid[0] < outputs

    def _blocks(self, x: Tensor) -> Iterable[Parts]:
        """The factors of the rows of x `[B, N, D]`: one block, kept, if a quarter of the budget holds it."""
        passes = self._checked(x)
        assert self._counts is not None
        kept, passing, largest = (x.shape[0] * values * x.element_size() for values in self._counts[:3])
        share = self.memory_budget // 4  # for what is kept; as much for what the passes need, and for the products
        # Smaller chunks than memory asks for, so that what the passes leave on the way stays in the processor's cache.
        step_bytes = max(passing, largest * share // workspace(x.device, share))

        def block(rows: slice) -> Parts:
            steps = chunks(rows.stop - rows.start, step_bytes, share)
            shifted = (slice(rows.start + step.start, rows.start + step.stop) for step in steps)
            return joined(
                [p for step in shifted for p in halving(step, lambda part: self._rounded(passes, x[:, part]))]
            )

        if kept * x.shape[1] <= share:
            return [self.remember("factors", (x,), lambda: block(slice(0, x.shape[1])))]
        return (parts for rows in chunks(x.shape[1], 2 * kept, share) for parts in halving(rows, block))

    def _rounded(self, passes: FactorPasses, x: Tensor) -> Parts:
        parts = passes.parts(x)
        if self.precision != "bfloat16":
            return parts
        return {key: part.map(lambda tensor: rounded(tensor, self.precision)) for key, part in parts.items()}

    def _jvp_rows(self, passes: FactorPasses, parts: Parts, tangents: dict[str, Tensor]) -> Tensor:
        total: Tensor | None = None
        for bundle in passes.bundles:
            operands = operand_tangents(bundle, parts[bundle.key], tangents)
            for factors in parts[bundle.key].factors:
                term = self._bundle_jvp(bundle.rule, factors, operands)
                total = term if total is None else total + term
        assert total is not None
        return total.flatten(2)

    def _bundle_jvp(self, rule: AbstractLayerRule, factors: Factors, tangents: dict[str, Tensor]) -> Tensor:
        def product(columns: slice) -> Tensor:
            chosen = {own: rounded(tangent[:, columns], self.precision) for own, tangent in tangents.items()}
            return rule.jvp(factors, chosen).to(dtype)

        dtype = next(iter(tangents.values())).dtype
        columns = self._columns(rule, factors, next(iter(tangents.values())).shape[1])
        return torch.cat([done for chosen in columns for done in halving(chosen, product)], dim=1)

    def _add_vjp(self, passes: FactorPasses, result: Tensor, parts: Parts, u: Tensor) -> None:
        """Add Jᵀ u to ``result`` `[B, K, P]` for u `[B, K, N, C]`."""
        for bundle in passes.bundles:
            part = parts[bundle.key]
            for factors in part.factors:
                for columns in self._columns(bundle.rule, factors, u.shape[1]):
                    images = bundle.rule.vjp(factors, u[:, columns])
                    for name, image in parameter_images(bundle, part, images, lead=2):
                        result[:, columns, self.network.slices[name]] += image

    def _columns(self, rule: AbstractLayerRule, factors: Factors, columns: int) -> Iterator[slice]:
        """Chunks of columns whose temporaries fit the workspace."""
        example = next(tensor for tensor in factors if tensor is not None)
        return chunks(columns, rule.column_bytes(factors), workspace(example.device, self.memory_budget))

    def _grams(self, x: Tensor, per_layer: bool) -> Grams:
        layers = [name for name, _ in self.network.layers] if per_layer else []
        return Grams(self._checked(x).bundles, layers, self.memory_budget)
