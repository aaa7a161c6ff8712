"""Both kernels of an infinitely wide network at data, block by block within a memory budget."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal, NamedTuple, ParamSpec, TypeVar, cast, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpntk._checks import check_input, check_memory_budget, check_tensors, is_number
from gpntk._types import Extract
from gpntk.errors import InputError, NetworkError, SelectionError
from gpntk.infinite.gaussian import tracked
from gpntk.infinite.layers import Parametrization, Weights
from gpntk.infinite.moments import Block
from gpntk.infinite.program import Program
from gpntk.infinite.recursion import Variances, equal_pairs, moments, row_numbers, variances
from gpntk.infinite.trace import trace
from gpntk.memory import budget_on, workspace

Kind = Literal["nngp", "ntk"]
Std = float | Mapping[str, float] | Tensor
_P = ParamSpec("_P")
_T = TypeVar("_T")

# Tensors of the size of a block that live at once while the recursion runs.
_LIVE = 8
# Bytes of a number: moments of activations are computed in double precision.
_BYTES = 8
# Pairs in a block on a core: as many as stay in its caches, without tangent kernels and with them.
_IN_CACHE = {False: 256**2, True: 224**2}


class Kernels(NamedTuple):
    """Both kernels of an infinitely wide network.

    Attributes:
        nngp: Covariance of an output over random weights `[N, M]`.
        ntk: Tangent kernel `[N, M]`.
    """

    nngp: Tensor
    ntk: Tensor


@final
@dataclass(frozen=True)
class InfiniteKernels:
    """NNGP and NTK of an infinitely wide network as functions of x; `kernels` makes one from a module.

    Args:
        program: The network's recursion.
        weight_std: σ_w of every layer with weights `[L]`.
        bias_std: σ_b of every layer with weights `[L]`.
        parametrization: ``"ntk"`` or ``"standard"``.
        memory_budget: Bytes for a block of the recursion, and for what the backward pass needs of all, beyond which
            blocks are computed again for it; default a quarter of the memory.
    """

    program: Program
    weight_std: Tensor
    bias_std: Tensor
    parametrization: Parametrization = "ntk"
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        check_memory_budget(self.memory_budget)
        if self.parametrization not in ("ntk", "standard"):
            raise SelectionError(f"parametrization={self.parametrization!r}: choose 'ntk' or 'standard'.")

    def __call__(self, x1: Tensor, x2: Tensor | None = None) -> Kernels:
        """Both kernels of x1 `[N, ...]` with x2 `[M, ...]`, default x1; inputs flat or shaped as the network's."""
        one, two, same = self._pair(x1, x2)
        return Kernels(*self.matrices(one, two, same, ("nngp", "ntk")))

    def diagonal(self, x1: Tensor, x2: Tensor | None = None) -> Kernels:
        """Both kernels of x1 with x2 row by row, each `[N]`."""
        one, two, _ = self._pair(x1, x2)
        if one.shape != two.shape:
            raise InputError(f"x1 has {len(one)} rows and x2 {len(two)}: a diagonal takes as many of both.")
        return Kernels(*self.diagonals(one, two, ("nngp", "ntk")))

    def matrices(self, x1: Tensor, x2: Tensor, same: bool, kinds: Sequence[Kind]) -> list[Tensor]:
        """The ``kinds`` of kernels of flat x1 with x2 `[N, M]`; of a symmetric matrix, blocks from the diagonal on."""
        rows, columns, tangent = len(x1), len(x2), "ntk" in kinds
        if not rows or not columns:
            return [x1.new_zeros(rows, columns) for _ in kinds]
        weights = self._weights(x1)
        one = self._variances(x1, weights)
        two = one if same else self._variances(x2, weights)
        numbers = row_numbers(x1, x1 if same else x2)
        entries = self._entries(x1, tangent)
        height = min(rows, max(1, math.isqrt(entries)))
        width = height if same else max(1, entries // height)

        def block(i: slice, j: slice) -> list[Tensor]:
            known = tuple(v[i] for v in one), tuple(v[j] for v in two)
            equal = equal_pairs(numbers[0][i], numbers[1][j])
            found = moments(self.program, (x1[i], x2[j]), known, weights, equal=equal, tangent=tangent)
            return _chosen(found, kinds)

        cuts = [
            (i, j) for i, j in product(_slices(rows, height), _slices(columns, width)) if not same or i.start <= j.start
        ]
        if self._tracked(x1, x2):
            compute = self._within_budget(block, rows * columns, x1)
            blocks = {(i.start, j.start): compute(i, j) for i, j in cuts}

            def whole(kind: int) -> Tensor:
                def at(i: int, j: int) -> Tensor:
                    return blocks[i, j][kind] if (i, j) in blocks else blocks[j, i][kind].mT

                down, across = range(0, rows, height), range(0, columns, width)
                return torch.cat([torch.cat([at(i, j) for j in across], 1) for i in down])

            return [whole(kind) for kind in range(len(kinds))]
        results = [x1.new_empty(rows, columns) for _ in kinds]
        for i, j in cuts:
            for result, found in zip(results, block(i, j), strict=True):
                result[i, j] = found
                if same and i != j:
                    result[j, i] = found.mT
        return results

    def diagonals(self, x1: Tensor, x2: Tensor, kinds: Sequence[Kind]) -> list[Tensor]:
        """The ``kinds`` of kernels of flat x1 `[N, D]` with x2 row by row, each `[N]`."""
        same, weights, tangent = x1 is x2 or equal_inputs(x1, x2), self._weights(x1), "ntk" in kinds

        def part(i: slice) -> list[Tensor]:
            first = variances(self.program, x1[i], weights)
            second = first if same else variances(self.program, x2[i], weights)
            equal = True if same else (x1[i] == x2[i]).all(-1).nonzero(as_tuple=True)
            known, x = (first, second), (x1[i], x2[i])
            return _chosen(moments(self.program, x, known, weights, equal=equal, tangent=tangent, by_row=True), kinds)

        if not len(x1):
            return [x1.new_zeros(0) for _ in kinds]
        compute = self._within_budget(part, len(x1), x1) if self._tracked(x1, x2) else part
        parts = [compute(i) for i in _slices(len(x1), self._entries(x1, tangent))]
        return [torch.cat(values) for values in zip(*parts, strict=True)]

    def _pair(self, x1: Tensor, x2: Tensor | None) -> tuple[Tensor, Tensor, bool]:
        """Both inputs as rows, and whether they are the same."""
        check_tensors(x1=x1, x2=x1 if x2 is None else x2)
        one = self._rows(x1, "x1")
        two = one if x2 is None or x2 is x1 else self._rows(x2, "x2")
        return one, two, one is two or equal_inputs(one, two)

    def _rows(self, x: Tensor, name: str) -> Tensor:
        check_input(x, x.device, name)
        shape = self.program.input_shape
        if math.prod(x.shape[1:]) != math.prod(shape):
            expected = f"[N, {math.prod(shape)}] or [N, {', '.join(map(str, shape))}]"
            raise InputError(f"{name} must have shape {expected}, got {tuple(x.shape)}.")
        return x.flatten(1)

    def _tracked(self, x1: Tensor, x2: Tensor) -> bool:
        return tracked(x1, x2, self.weight_std, self.bias_std)

    def _within_budget(self, part: Callable[_P, _T], entries: int, x: Tensor) -> Callable[_P, _T]:
        """``part``, or where the backward pass needs too much of all ``entries``, what computes it again for that."""
        kept = _LIVE * _BYTES * len(self.program.steps) * self.program.positions * entries
        if kept <= budget_on(x.device, self.memory_budget):
            return part
        # Whose annotations say nothing of what it returns.
        return cast("Callable[_P, _T]", partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False))

    def _entries(self, x: Tensor, tangent: bool) -> int:
        """Pairs of inputs in a block."""
        numbers = workspace(x.device, budget_on(x.device, self.memory_budget)) // (_LIVE * _BYTES)
        if x.device.type == "cpu":
            numbers = min(numbers, _IN_CACHE[tangent] * torch.get_num_threads())
        return max(1, numbers // self.program.positions)

    def _variances(self, x: Tensor, weights: Sequence[Weights]) -> Variances:

        def part(i: slice) -> Variances:
            return variances(self.program, x[i], weights)

        compute = self._within_budget(part, len(x), x) if self._tracked(x, x) else part
        parts = [compute(i) for i in _slices(len(x), self._entries(x, tangent=False))]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(values) for values in zip(*parts, strict=True))

    def _weights(self, x: Tensor) -> list[Weights]:
        """The priors of all layers, for inputs like x."""
        program = self.program
        stds = zip(self.weight_std.to(x).square(), self.bias_std.to(x).square(), strict=True)
        return [
            Weights(weight, bias if program.biases[index] else None, program.fan_ins[index], self.parametrization)
            for index, (weight, bias) in enumerate(stds)
        ]


def kernels(
    network: nn.Module,
    weight_std: Std = 2**0.5,
    bias_std: Std = 0.1,
    parametrization: Parametrization = "ntk",
    *,
    input_shape: Sequence[int] | int | None = None,
    extract: Extract | None = None,
    memory_budget: int | None = None,
) -> InfiniteKernels:
    """NNGP and NTK of a network's infinite-width limit, both in one pass.

    The tangent kernel needs the NNGP of every layer, so that both cost little more than the NTK alone. In GPyTorch take
    `gpntk.InfiniteNNGPKernel` and `gpntk.InfiniteNTKKernel`, which learn the σ's.

    Args:
        network: Any module that ``torch.fx`` can trace and whose layers have a limit.
        weight_std: σ_w: one for all layers, by globs over their names, or a tensor `[L]`, which may require gradients.
        bias_std: σ_b likewise.
        parametrization: ``"ntk"``, z = (σ_w/√n) W a + σ_b b, or ``"standard"``, z = W a + b. The NNGP is the same.
        input_shape: Shape of one input. Not needed where the first layer is ``Linear``.
        extract: Turns what the network returns (a dict, say) into the output that is meant.
        memory_budget: Bytes for a block of the recursion; see `InfiniteKernels`.

    Raises:
        UnsupportedLayerError: A layer has no known limit; the message names it.
        InputError: A σ is out of range, or the network does not run on inputs of this shape.
        SelectionError: A layer has no glob or several, or a glob no layer.

    Example:
        >>> import torch, gpntk
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        >>> nngp, ntk = gpntk.infinite.kernels(network, weight_std=1.5)(torch.randn(5, 2))
        >>> nngp.shape, bool((ntk.diagonal() > nngp.diagonal()).all())
        (torch.Size([5, 5]), True)

    References:
        Jacot, Gabriel and Hongler (2018), Neural Tangent Kernel, https://arxiv.org/abs/1806.07572.
    """
    if not isinstance(network, nn.Module):
        raise NetworkError(f"network must be a torch.nn.Module, got {type(network).__name__}.")
    if not (extract is None or callable(extract)):
        raise InputError(f"extract={extract!r}: give a function of what the network returns.")
    program = trace(network, input_shape, extract)
    stds = by_layer(weight_std, program.layers, "weight_std"), by_layer(bias_std, program.layers, "bias_std")
    return InfiniteKernels(program, *stds, parametrization, memory_budget)


def by_layer(value: Std, layers: Sequence[str], argument: str) -> Tensor:
    """A number for every layer `[L]` in float64, from one for all or from globs over names; a tensor `[L]` as it is.

    Raises:
        SelectionError: A layer has no glob or several, or a glob no layer.
        InputError: A number is negative, zero (for σ_w) or not finite, or the tensor has another length.
    """
    given = [*value.values()] if isinstance(value, Mapping) else [] if isinstance(value, Tensor) else [value]
    if not all(map(is_number, given)) or (isinstance(value, Tensor) and not value.is_floating_point()):
        kind = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else repr(value)
        raise InputError(
            f"{argument} is {kind}: give a number, numbers by globs over names of layers, or a floating tensor with "
            f"one for each of {layers}."
        )
    if isinstance(value, Mapping):
        value = torch.tensor(_by_glob(value, layers, argument), dtype=torch.float64, device="cpu")
    values = value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64, device="cpu")
    if values.dim() > 1 or (values.dim() and len(values) not in (1, len(layers))):
        raise InputError(f"{argument} has shape {tuple(values.shape)}: give one number for each of {layers}.")
    in_range, must = (values > 0, "be positive and finite")
    if argument == "bias_std":
        in_range, must = (values >= 0, "be finite, and positive or zero")
    if not bool((in_range & values.isfinite()).all()):
        raise InputError(f"{argument}={values.tolist()}: must {must}.")
    return values.expand(len(layers))


def _by_glob(value: Mapping[str, float], layers: Sequence[str], argument: str) -> list[float]:
    for pattern in value:
        if not fnmatch.filter(layers, pattern):
            raise SelectionError(f"{argument}: the pattern {pattern!r} matches none of the layers {layers}.")
    chosen = []
    for layer in layers:
        found = [number for pattern, number in value.items() if fnmatch.fnmatchcase(layer, pattern)]
        if len(found) != 1:
            raise SelectionError(
                f"{argument}: {len(found)} patterns match layer {layer!r}; give one for each of {layers}."
            )
        chosen.append(float(found[0]))
    return chosen


def equal_inputs(x1: Tensor, x2: Tensor) -> bool:
    """Whether both have the same values, and no derivatives that would tell them apart."""
    return x1.shape == x2.shape and not tracked(x1, x2) and torch.equal(x1, x2)


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _chosen(block: Block, kinds: Sequence[Kind]) -> list[Tensor]:
    ntk = torch.zeros_like(block.nngp) if block.ntk is None else block.ntk
    return [{"nngp": block.nngp, "ntk": ntk}[kind] for kind in kinds]
