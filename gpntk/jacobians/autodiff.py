"""Jacobian products by automatic differentiation: any module, no assumption but that rows are independent."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from gpntk.cost import Cost
from gpntk.jacobians.backend import (
    AbstractTangentBackend,
    contracted_diagonal,
    contracted_gram,
    jacobian_by_rows,
)
from gpntk.jacobians.record import row_values
from gpntk.memory import attached, chunks, frozen, is_out_of_memory, tracks_gradient
from gpntk.network import FrozenNetwork


@final
class AutodiffBackend(AbstractTangentBackend):
    """torch.func products, chunked over rows and columns; the fallback, and the referee of every other backend.

    Use it when a module has no structured rule. Cost per column: about one forward and one backward pass in each
    direction, 2 to 3 times the structured backend. The Gram contracts per-sample Jacobians block by block.

    Args:
        network: The network, with the parameters to differentiate selected.
        memory_budget: Bytes that temporaries stay within.

    Example:
        >>> import torch, gpntk
        >>> network = torch.nn.Sequential(torch.nn.Conv1d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(32, 1))
        >>> backend = AutodiffBackend(gpntk.freeze(network, input_shape=(1, 10)))
        >>> backend.jvp(torch.randn(1, 7, 10), torch.randn(1, 2, 49)).shape
        torch.Size([1, 2, 7])
    """

    def __init__(self, network: FrozenNetwork, memory_budget: int | None = None) -> None:
        super().__init__(network, memory_budget)
        self._row_values = 0

    def jvp(self, x: Tensor, v: Tensor) -> Tensor:
        return self._over_rows(x, lambda rows, part: self._columns(self._jvp_columns, rows, part), v, rowwise=False)

    def vjp(self, x: Tensor, u: Tensor) -> Tensor:
        return self._over_rows(x, lambda rows, part: self._columns(self._vjp_columns, rows, part), u, rowwise=True)

    def jacobian(self, x: Tensor) -> Tensor:
        """By forward mode where an input has more outputs than there are parameters, and all operations have it."""
        if self.num_outputs(x) <= self.num_features:
            return jacobian_by_rows(self, x)
        unit = torch.eye(self.num_features, dtype=x.dtype, device=x.device).expand(x.shape[0], -1, -1)

        def product(rows: Tensor, part: Tensor) -> Tensor:
            return self._columns(self._forward_columns, rows, part)

        try:
            return self._over_rows(x, product, unit, rowwise=False).mT
        except NotImplementedError:
            return jacobian_by_rows(self, x)

    def gram(self, x1: Tensor, x2: Tensor, per_layer: bool = False) -> Tensor:
        return contracted_gram(self, x1, x2, per_layer)

    def diagonal(self, x: Tensor, per_layer: bool = False) -> Tensor:
        return contracted_diagonal(self, x, per_layer)

    def costs(self, x: Tensor, columns: int) -> tuple[Cost, ...]:  # noqa: ARG002
        return ()

    # --- private -----------------------------------------------------------------------------------------------

    def _over_rows(self, x: Tensor, product: Callable[[Tensor, Tensor], Tensor], w: Tensor, rowwise: bool) -> Tensor:
        """``product`` by chunks of rows: cotangents are split and results summed, tangents shared, results joined."""
        outputs = self.num_outputs(x)
        # Cast the weights now: a tensor first made inside a torch.func transform must not outlive it.
        self.network.tensors(x.dtype, x.device)
        x = x if tracks_gradient(x) else frozen(x)
        # Activations, and for every column a tangent or cotangent of each.
        row_bytes = 2 * x.shape[0] * self._activations(x) * x.element_size() * (1 + w.shape[1])
        total: list[Tensor] = []
        for rows in chunks(x.shape[1], row_bytes, self.memory_budget):
            part = w[..., rows.start * outputs : rows.stop * outputs] if rowwise else w
            result = product(x[:, rows], part)
            total = [total[0] + result] if rowwise and total else [*total, result]
        return attached(total[0] if rowwise else torch.cat(total, dim=-1), x)

    def _columns(self, product: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor) -> Tensor:
        """``product`` over B batches, by chunks of columns."""
        column_bytes = 2 * x.shape[0] * x.shape[1] * self._activations(x) * x.element_size()
        parts = [_vmap(product, x, w[:, columns]) for columns in chunks(w.shape[1], column_bytes, self.memory_budget)]
        return torch.cat(parts, dim=1)

    def _activations(self, x: Tensor) -> int:
        """Values that one row's forward pass makes, counted once."""
        if not self._row_values:
            with torch.no_grad():
                self._row_values = row_values(self.network, frozen(x).flatten(0, 1)[:1])
        return self._row_values

    def _function(self, x: Tensor) -> tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor]]:
        return lambda parameters: self.network(x, parameters), self.network.selected(x.dtype, x.device)

    def _forward_columns(self, x: Tensor, v: Tensor) -> Tensor:
        function, at = self._function(x)
        return _vmap(lambda t: jvp(function, (at,), (self.network.unflatten(t),))[1].flatten(), v)

    def _jvp_columns(self, x: Tensor, v: Tensor) -> Tensor:
        try:
            return self._forward_columns(x, v)
        except NotImplementedError:
            # An operation without a forward-mode formula: the adjoint of the adjoint.
            function, at = self._function(x)
            value, pullback, *_ = vjp(function, at)
            _, pushforward, *_ = vjp(lambda u: pullback(u)[0], torch.zeros_like(value))
            return _vmap(lambda t: pushforward(self.network.unflatten(t))[0].flatten(), v)

    def _vjp_columns(self, x: Tensor, u: Tensor) -> Tensor:
        function, at = self._function(x)
        value, pullback, *_ = vjp(function, at)
        return _vmap(lambda t: self.network.flatten(pullback(t.view_as(value))[0]), u)


def _vmap(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """``function`` over the leading dimension of every argument: at once where vmap can, else one by one."""
    if args[0].shape[0] == 1:
        return function(*(arg[0] for arg in args)).unsqueeze(0)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")
            return vmap(function, randomness="error")(*args)
    except NotImplementedError:
        raise
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        # Recurrent layers, data-dependent control flow, operators without a batching rule: the loop runs what vmap
        # cannot, and raises again what is really wrong.
        return torch.stack([function(*items) for items in zip(*args, strict=True)])
