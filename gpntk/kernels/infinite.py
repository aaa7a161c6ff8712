"""The kernels of a network whose layers become infinitely wide."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from gpytorch.constraints import GreaterThan
from torch import Tensor, nn

from gpntk._checks import check_columns, check_flags, check_input, check_keywords, check_pair
from gpntk._types import Extract
from gpntk.errors import InputError
from gpntk.infinite.infinite_kernels import InfiniteKernels, Kind, Std, by_layer, equal_inputs, kernels
from gpntk.infinite.layers import Parametrization
from gpntk.kernels.feature_kernel import log_scale_constraint
from gpntk.kernels.prediction_strategy import AbstractNetworkKernel
from gpntk.operators.batching import collapse


class _InfiniteKernel(AbstractNetworkKernel):
    """NNGP or NTK of the infinite-width limit of a module, σ_w and σ_b of every layer learnable."""

    has_lengthscale = False
    _has_bias_std: Tensor
    raw_weight_std: nn.Parameter
    raw_bias_std: nn.Parameter
    raw_weight_std_constraint: GreaterThan
    raw_bias_std_constraint: GreaterThan
    _kind: Kind

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
        check_flags(learn=learn)
        check_columns(kwargs.get("active_dims"))
        super().__init__(**kwargs)
        given = kernels(
            network,
            weight_std,
            bias_std,
            parametrization,
            input_shape=input_shape,
            extract=extract,
            memory_budget=memory_budget,
        )
        self.program, self._memory_budget = given.program, memory_budget
        self.parametrization: Parametrization = given.parametrization
        layers = self.program.layers
        self.register_buffer("_has_bias_std", torch.ones(len(layers), dtype=torch.bool))
        self._given: dict[str, Tensor] = {}
        for name in ("raw_weight_std", "raw_bias_std"):
            self.register_parameter(name, nn.Parameter(torch.zeros(len(layers)), requires_grad=learn))
            self.register_constraint(name, log_scale_constraint())
        self.weight_std, self.bias_std = given.weight_std, given.bias_std

    @property
    def weight_std(self) -> Tensor:
        """σ_w of every layer with weights `[L]`, in the order of ``program.layers``."""
        return self.raw_weight_std_constraint.transform(self.raw_weight_std)

    @weight_std.setter
    def weight_std(self, value: Std) -> None:
        self._set("raw_weight_std", by_layer(value, self.program.layers, "weight_std").double())

    @property
    def bias_std(self) -> Tensor:
        """σ_b of every layer `[L]`; one that is zero is not learned."""
        return self.raw_bias_std_constraint.transform(self.raw_bias_std) * self._has_bias_std

    @bias_std.setter
    def bias_std(self, value: Std) -> None:
        values = by_layer(value, self.program.layers, "bias_std").double()
        # Zero is no logarithm of anything.
        self._has_bias_std.copy_(values > 0)
        self._set("raw_bias_std", torch.where(values > 0, values, 1.0))

    @property
    def both(self) -> InfiniteKernels:
        """NNGP and NTK with these σ's in one pass; `GradientFlow` takes them for an ensemble."""
        return InfiniteKernels(self.program, self.weight_std, self.bias_std, self.parametrization, self._memory_budget)

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
        check_pair(x1, x2, self._buffers["active_dims"])
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
        compute = self.both
        if diag:
            shape = torch.broadcast_shapes(x1.shape, x2.shape)
            one, two = (x.expand(shape).reshape(-1, shape[-1]) for x in (x1, x2))
            return compute.diagonals(one, one if x1 is x2 else two, (self._kind,))[0].reshape(shape[:-1])
        batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
        two = collapse(x2)
        if two.shape[:-2].numel() == 1 and (x1 is not x2 or not batch):
            # One set of columns for all: the batches of x1 are so many more rows.
            same = x1 is x2 or (not batch and equal_inputs(x1, x2))
            flat = x1.reshape(-1, x1.shape[-1]), two.reshape(two.shape[-2:])
            rows = compute.matrices(*flat, same, (self._kind,))[0]
            return rows.reshape(*x1.shape[:-1], x2.shape[-2]).expand(*batch, x1.shape[-2], x2.shape[-2])
        ones, twos = (x.expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (x1, x2))
        blocks = [
            compute.matrices(one, two, x1 is x2 or equal_inputs(one, two), (self._kind,))[0]
            for one, two in zip(ones, twos, strict=True)
        ]
        return torch.stack(blocks).reshape(*batch, x1.shape[-2], x2.shape[-2])

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:  # noqa: ARG002
        """One: all outputs are independent, with this kernel."""
        return 1


def _range(values: Sequence[float]) -> str:
    low, high = min(values, default=1.0), max(values, default=1.0)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


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
            blocks are computed again for it; default a quarter of the memory.
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

    _kind = "nngp"


@final
class InfiniteNTKKernel(_InfiniteKernel):
    r"""The tangent kernel of an infinitely wide network, constant during training.

    Args:
        network: As in `InfiniteNNGPKernel`, which also says what is raised.
        weight_std: σ_w: one for all layers, or by globs over their names.
        bias_std: σ_b likewise.
        parametrization: ``"ntk"`` or ``"standard"``, where the finite fan-ins matter.
        input_shape: Shape of one input.
        extract: Turns what the network returns into the output that is meant.
        learn: Whether the σ's require gradients.
        memory_budget: Bytes for a block of the recursion.
        **kwargs: ``active_dims``.

    Example:
        >>> import torch, gpntk
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        >>> gpntk.InfiniteNTKKernel(network, weight_std=1.5, bias_std=0.1)(torch.randn(5, 2)).shape
        torch.Size([5, 5])

    References:
        Jacot, Gabriel and Hongler (2018), Neural Tangent Kernel, https://arxiv.org/abs/1806.07572.
    """

    _kind = "ntk"
