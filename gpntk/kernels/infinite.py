"""The kernels of a network whose layers become infinitely wide."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, ParamSpec, TypeVar, cast, final

import torch
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import Kernel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpntk._checks import check_input, check_keywords, check_memory_budget, check_tensors
from gpntk._types import Extract
from gpntk.errors import InputError, SelectionError
from gpntk.infinite import Parametrization, Program, Weights, trace
from gpntk.infinite.equal_rows import EqualRows
from gpntk.infinite.gaussian import tracked
from gpntk.infinite.moments import Block
from gpntk.infinite.recursion import Variances, moments, variances
from gpntk.kernels.feature_kernel import log_scale_constraint
from gpntk.memory import default_budget, tracks_gradient, workspace
from gpntk.operators.batching import collapse

Std = float | Mapping[str, float]
_P = ParamSpec("_P")
_T = TypeVar("_T")

# Tensors of the size of a block that live at once while the recursion runs.
_LIVE = 8
# Of a number: moments of activations are computed in double precision.
_BYTES = 8


class _InfiniteKernel(Kernel):
    """NNGP or NTK of the infinite-width limit of a module, σ_w and σ_b of every layer learnable."""

    has_lengthscale = False
    _has_bias_std: Tensor
    raw_weight_std: nn.Parameter
    raw_bias_std: nn.Parameter
    raw_weight_std_constraint: GreaterThan
    raw_bias_std_constraint: GreaterThan
    _ntk: bool
    _cpu_block: int
    """Numbers in a block on a CPU: as many as stay in its caches."""

    def __init__(
        self,
        network: nn.Module,
        weight_std: Std = 2**0.5,
        bias_std: Std = 0.1,
        parametrization: Parametrization = "ntk",
        *,
        input_shape: Sequence[int] | int | None = None,
        extract: Extract | None = None,
        learn: bool = True,
        memory_budget: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_keywords(type(self), kwargs, ("active_dims",))
        check_memory_budget(memory_budget)
        super().__init__(**kwargs)
        if parametrization not in ("ntk", "standard"):
            raise SelectionError(f"parametrization={parametrization!r}: choose 'ntk' or 'standard'.")
        self.program: Program = trace(network, _input_shape(network, input_shape), extract)
        self.parametrization: Parametrization = parametrization
        self._memory_budget = memory_budget
        layers = self.program.layers
        self.register_buffer("_has_bias_std", torch.ones(len(layers), dtype=torch.bool))
        self._given: dict[str, Tensor] = {}
        for name in ("raw_weight_std", "raw_bias_std"):
            self.register_parameter(name, nn.Parameter(torch.zeros(len(layers)), requires_grad=learn))
            self.register_constraint(name, log_scale_constraint())
        self.weight_std = _by_layer(weight_std, layers, "weight_std")
        self.bias_std = _by_layer(bias_std, layers, "bias_std")

    @property
    def weight_std(self) -> Tensor:
        """σ_w of every layer with weights `[L]`, in the order of ``program.layers``."""
        return self.raw_weight_std_constraint.transform(self.raw_weight_std)

    @weight_std.setter
    def weight_std(self, value: Tensor | float) -> None:
        values = torch.as_tensor(value, dtype=torch.float64)
        if not bool(((values > 0) & values.isfinite()).all()):
            raise InputError(f"weight_std={values.tolist()}: must be positive and finite.")
        self._set("raw_weight_std", values)

    @property
    def bias_std(self) -> Tensor:
        """σ_b of every layer `[L]`; one that is zero is not learned."""
        return self.raw_bias_std_constraint.transform(self.raw_bias_std) * self._has_bias_std

    @bias_std.setter
    def bias_std(self, value: Tensor | float) -> None:
        values = torch.as_tensor(value, dtype=torch.float64)
        if not bool(((values >= 0) & values.isfinite()).all()):
            raise InputError(f"bias_std={values.tolist()}: must be finite, and positive or zero.")
        # Zero is no logarithm of anything.
        self._has_bias_std.copy_(values > 0)
        self._set("raw_bias_std", torch.where(values > 0, values, 1.0))

    def _set(self, name: str, values: Tensor) -> None:
        raw = getattr(self, name)
        given = getattr(self, f"{name}_constraint").inverse_transform(values.detach()).expand(raw.shape).cpu()
        self.initialize(**{name: given.to(raw)})
        self._given[name] = given.clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _InfiniteKernel:
        """Moves and casts; what was given in double precision, and not learned since, is rounded anew from there."""
        raws = {name: getattr(self, name).detach().cpu() for name in self._given}
        kept = [name for name, raw in raws.items() if torch.equal(raw, self._given[name].to(raw))]
        super()._apply(fn, recurse)
        with torch.no_grad():
            for name in kept:
                getattr(self, name).copy_(self._given[name])
        return self

    def __call__(self, x1: Tensor, x2: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        check_tensors(x1=x1, x2=x2)
        return super().__call__(x1, x2, *args, **kwargs)

    def __repr__(self) -> str:
        stds = (f"{name}={_range(getattr(self, name).tolist())}" for name in ("weight_std", "bias_std"))
        return (
            f"{type(self).__name__}({len(self.program.layers)} layers of inputs {self.program.input_shape}, "
            f'{", ".join(stds)}, "{self.parametrization}" parametrization)'
        )

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **_params: Any
    ) -> Tensor:
        """k(x1, x2) `[..., N, M]`; with ``diag=True`` its diagonal `[..., N]`."""
        if last_dim_is_batch:
            raise NotImplementedError("last_dim_is_batch is not defined for a kernel of whole inputs to a network.")
        device = self.raw_weight_std.device
        for name, x in (("x1", x1), ("x2", x2)):
            check_input(x, device, name)
            if x.shape[-1] != math.prod(self.program.input_shape):
                raise InputError(
                    f"{name} has {x.shape[-1]} features, but one input of shape {self.program.input_shape} has "
                    f"{math.prod(self.program.input_shape)}."
                )
        if diag:
            return self._diagonal(x1, x2)
        batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
        two = collapse(x2)
        if two.shape[:-2].numel() == 1 and (x1 is not x2 or not batch):
            # One set of columns for all: the batches of x1 are so many more rows.
            same = x1 is x2 or (not batch and _equal(x1, x2))
            rows = self._matrix(x1.reshape(-1, x1.shape[-1]), two.reshape(two.shape[-2:]), same)
            return rows.reshape(*x1.shape[:-1], x2.shape[-2]).expand(*batch, x1.shape[-2], x2.shape[-2])
        ones, twos = (x.expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (x1, x2))
        blocks = [self._matrix(one, two, x1 is x2 or _equal(one, two)) for one, two in zip(ones, twos, strict=True)]
        return torch.stack(blocks).reshape(*batch, x1.shape[-2], x2.shape[-2])

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:  # noqa: ARG002
        """One: all outputs are independent, with this kernel."""
        return 1

    # --- private -----------------------------------------------------------------------------------------------

    def _matrix(self, x1: Tensor, x2: Tensor, same: bool) -> Tensor:
        """k(x1, x2) `[N, M]`, block by block; of a symmetric matrix, those from the diagonal on."""
        rows, columns = x1.shape[0], x2.shape[0]
        if not rows or not columns:
            return x1.new_zeros(rows, columns)
        weights = self._weights(x1)
        one = self._variances(x1, weights)
        two = one if same else self._variances(x2, weights)
        equal_rows = EqualRows(x1, x1 if same else x2)
        entries = self._entries(x1)
        height = min(rows, max(1, math.isqrt(entries)))
        width = height if same else max(1, entries // height)

        def block(i: slice, j: slice) -> Tensor:
            x, known = (x1[i], x2[j]), (tuple(v[i] for v in one), tuple(v[j] for v in two))
            found = moments(self.program, x, known, weights, equal=equal_rows.pairs(i, j), tangent=self._ntk)
            return self._of(found)

        across, down = _slices(columns, width), _slices(rows, height)
        if self._tracked(x1, x2):
            blocks, compute = {}, self._within_budget(block, rows * columns, x1)
            for (a, i), (b, j) in product(enumerate(down), enumerate(across)):
                blocks[a, b] = blocks[b, a].mT if same and b < a else compute(i, j)
            return torch.cat([torch.cat([blocks[a, b] for b in range(len(across))], 1) for a in range(len(down))])
        result = x1.new_empty(rows, columns)
        for i, j in product(down, across):
            if same and j.start < i.start:
                continue
            result[i, j] = found = block(i, j)
            if same and i != j:
                result[j, i] = found.mT
        return result

    def _diagonal(self, x1: Tensor, x2: Tensor) -> Tensor:
        """k(x1_n, x2_n) `[..., N]`."""
        shape = torch.broadcast_shapes(x1.shape, x2.shape)
        one, two = (x.expand(shape).reshape(-1, shape[-1]) for x in (x1, x2))
        same = x1 is x2 or _equal(one, two)
        weights = self._weights(one)

        def part(i: slice) -> Tensor:
            first = variances(self.program, one[i], weights)
            second = first if same else variances(self.program, two[i], weights)
            equal = True if same else (one[i] == two[i]).all(-1).nonzero(as_tuple=True)
            known, x = (first, second), (one[i], two[i])
            return self._of(moments(self.program, x, known, weights, equal=equal, tangent=self._ntk, by_row=True))

        compute = self._within_budget(part, one.shape[0], one) if self._tracked(one, two) else part
        parts = [compute(i) for i in _slices(one.shape[0], self._entries(one))]
        return torch.cat(parts).reshape(shape[:-1]) if parts else one.new_zeros(shape[:-1])

    def _tracked(self, x1: Tensor, x2: Tensor) -> bool:
        return tracked(x1, x2, self.raw_weight_std, self.raw_bias_std)

    def _within_budget(self, part: Callable[_P, _T], entries: int, x: Tensor) -> Callable[_P, _T]:
        """``part``, or where the backward pass needs too much of all ``entries``, what computes it again for that."""
        kept = _LIVE * _BYTES * len(self.program.steps) * self.program.positions * entries
        if kept <= self._budget(x.device):
            return part
        # Whose annotations say nothing of what it returns.
        return cast("Callable[_P, _T]", partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False))

    def _budget(self, device: torch.device) -> int:
        return default_budget(device) if self._memory_budget is None else self._memory_budget

    def _entries(self, x: Tensor) -> int:
        """Pairs of inputs in a block."""
        numbers = workspace(x.device, self._budget(x.device)) // (_LIVE * _BYTES)
        if x.device.type == "cpu":
            numbers = min(numbers, self._cpu_block * torch.get_num_threads())
        return max(1, numbers // self.program.positions)

    def _variances(self, x: Tensor, weights: Sequence[Weights]) -> Variances:

        def part(i: slice) -> Variances:
            return variances(self.program, x[i], weights)

        compute = self._within_budget(part, x.shape[0], x) if self._tracked(x, x) else part
        parts = [compute(i) for i in _slices(x.shape[0], self._entries(x))]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(values) for values in zip(*parts, strict=True))

    def _of(self, block: Block) -> Tensor:
        if not self._ntk:
            return block.nngp
        return torch.zeros_like(block.nngp) if block.ntk is None else block.ntk

    def _weights(self, x: Tensor) -> list[Weights]:
        program = self.program
        variances = zip(self.weight_std.to(x).square(), self.bias_std.to(x).square(), strict=True)
        return [
            Weights(weight, bias if program.biases[index] else None, program.fan_ins[index], self.parametrization)
            for index, (weight, bias) in enumerate(variances)
        ]


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _range(values: Sequence[float]) -> str:
    low, high = min(values, default=1.0), max(values, default=1.0)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def _equal(x1: Tensor, x2: Tensor) -> bool:
    return x1.shape == x2.shape and not tracks_gradient(x1) and not tracks_gradient(x2) and torch.equal(x1, x2)


def _input_shape(network: nn.Module, given: Sequence[int] | int | None) -> tuple[int, ...]:
    if given is not None:
        return (given,) if isinstance(given, int) else tuple(int(size) for size in given)
    first = next((module for module in network.modules() if list(module.parameters(recurse=False))), None)
    if isinstance(first, nn.Linear):
        return (first.in_features,)
    raise InputError("input_shape is needed: the shape of one input, such as (3, 32, 32).")


def _by_layer(value: Std, layers: Sequence[str], argument: str) -> Tensor:
    """A value for every layer, from one for all or from globs over names."""
    if not isinstance(value, Mapping):
        return torch.full((len(layers),), float(value), dtype=torch.float64)
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
    return torch.tensor(chosen, dtype=torch.float64)


@final
class InfiniteNNGPKernel(_InfiniteKernel):
    r"""The covariance of an infinitely wide network's outputs over random weights: its NNGP.

    The module says the architecture only: its weights are not read, and its widths matter where fan-in does. Every
    layer with weights has a σ_w and, with a bias, a σ_b, all learnable by marginal likelihood.

    Args:
        network: Any module that ``torch.fx`` can trace and whose layers have a limit; see `gpntk.infinite`.
        weight_std: σ_w: one for all layers, or by globs over their names.
        bias_std: σ_b likewise; zero stays zero until it is set.
        parametrization: ``"ntk"``, z = (σ_w/√n) W a + σ_b b, or ``"standard"``, z = W a + b. The NNGP is the same.
        input_shape: Shape of one input; x arrives flat, `[..., N, D]`. Not needed where the first layer is ``Linear``.
        extract: Turns what the network returns (a dict, say) into the output that is meant.
        learn: Whether the σ's require gradients.
        memory_budget: Bytes for a block of the recursion, and for what the backward pass needs of all, beyond which
            blocks are computed again for it; default a quarter of what is free.
        **kwargs: ``active_dims``: see ``gpytorch.kernels.Kernel``.

    Raises:
        UnsupportedLayerError: A layer has no known limit; the message names it.
        InputError: A σ is out of range, the network does not run on inputs of this shape, or a keyword is unknown.
        SelectionError: A layer has no glob or several, or a glob no layer.

    Example:
        >>> import torch, gpntk
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        >>> gpntk.InfiniteNNGPKernel(network, weight_std=1.5, bias_std=0.1)(torch.randn(5, 2)).shape
        torch.Size([5, 5])

    References:
        Lee et al. (2018), Deep Neural Networks as Gaussian Processes, https://arxiv.org/abs/1711.00165.
    """

    _ntk = False
    _cpu_block = 256**2


@final
class InfiniteNTKKernel(_InfiniteKernel):
    r"""The tangent kernel of an infinitely wide network, constant during training.

    Arguments and errors as in `InfiniteNNGPKernel`; in the standard parametrization the finite fan-ins matter.

    Example:
        >>> import torch, gpntk
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        >>> gpntk.InfiniteNTKKernel(network, weight_std=1.5, bias_std=0.1)(torch.randn(5, 2)).shape
        torch.Size([5, 5])

    References:
        Jacot, Gabriel and Hongler (2018), Neural Tangent Kernel, https://arxiv.org/abs/1806.07572.
    """

    _ntk = True
    _cpu_block = 224**2
