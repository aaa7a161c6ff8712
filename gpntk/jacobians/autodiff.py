"""Jacobian products by automatic differentiation: any module, no assumption but that rows are independent."""

from __future__ import annotations

import linecache
import os
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import final

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from gpntk.cost import Cost
from gpntk.errors import NetworkError
from gpntk.jacobians.backend import AbstractTangentBackend, contracted_diagonal, contracted_gram, jacobian_by_rows
from gpntk.jacobians.backward import BackwardBackend
from gpntk.jacobians.record import no_pattern, row_values
from gpntk.memory import Lock, attached, chunks, frozen, is_out_of_memory, tracks_gradient, workspace
from gpntk.network import FrozenNetwork

# Forward mode has one level for all threads: a second thread that leaves it takes the tangents of the first away.
_FORWARD_MODE = Lock()
# Code that is not of the network: an error is told by the last line outside of it.
_NOT_THE_USERS = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))


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
        self._refusal: str | None = None

    def refusal(self, x: Tensor) -> str:
        """Why ``torch.func`` cannot differentiate the network, or does it wrongly; empty where it can.

        Found out once, on one row, against plain backward passes: products, and their derivative in x.
        """
        if self._refusal is None:
            self.num_outputs(x)
            if self.network.scripted:
                # TorchScript optimises a function after its first runs: what is right now may be wrong later on.
                called = ", ".join(sorted(self.network.scripted))
                self._refusal = (
                    f"torch.func gives wrong derivatives of TorchScript, of which the network calls {called}"
                )
            else:
                with torch.inference_mode(False):
                    self._refusal = self._find_refusal(frozen(x).flatten(0, 1)[None, :1])
        return self._refusal

    def jvp(self, x: Tensor, v: Tensor) -> Tensor:
        self._check(x)
        return self._jvp(x, v)

    def vjp(self, x: Tensor, u: Tensor) -> Tensor:
        self._check(x)
        return self._vjp(x, u)

    def jacobian(self, x: Tensor) -> Tensor:
        """By forward mode where an input has more outputs than there are parameters, and all operations have it."""
        self._check(x)
        if self.num_outputs(x) <= self.num_features:
            return self._rows(x)
        unit = torch.eye(self.num_features, dtype=x.dtype, device=x.device).expand(x.shape[0], -1, -1)

        def product(rows: Tensor, part: Tensor) -> Tensor:
            return self._columns(self._forward_columns, rows, part)

        try:
            return self._over_rows(x, product, unit, rowwise=False).mT
        except NotImplementedError:
            return self._rows(x)

    def gram(self, x1: Tensor, x2: Tensor, per_layer: bool = False) -> Tensor:
        return contracted_gram(self, x1, x2, per_layer)

    def diagonal(self, x: Tensor, per_layer: bool = False) -> Tensor:
        return contracted_diagonal(self, x, per_layer)

    def costs(self, x: Tensor, columns: int) -> tuple[Cost, ...]:  # noqa: ARG002
        return ()

    # --- private -----------------------------------------------------------------------------------------------

    def _rows(self, x: Tensor) -> Tensor:
        """J by reverse mode, in blocks of rows so small that their memory is used again and does not come anew."""
        outputs = self.num_outputs(x)
        result = x.new_empty(x.shape[0], x.shape[1] * outputs, self.num_features)
        row_bytes = x.shape[0] * outputs * self.num_features * x.element_size()
        for rows in chunks(x.shape[1], row_bytes, workspace(x.device, self.memory_budget)):
            result[:, rows.start * outputs : rows.stop * outputs] = jacobian_by_rows(self, x[:, rows])
        return result

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
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _find_refusal(self, row: Tensor) -> str:
        """Compare Jᵀ u, J v and the derivative of uᵀ J v in x with plain backward passes of one row `[1, 1, D]`."""
        u, v = no_pattern(self.num_outputs(row), row), no_pattern(self.num_features, row)
        plain, dtype = BackwardBackend(self.network, self.memory_budget), self.network.compute_dtype(row.dtype)
        gradient, slope = plain.gradient(row[0], u), None
        with suppress(NetworkError):  # torch.func cannot be expected to differentiate twice then
            slope = plain.slope(row[0], u, v)
        tracked = row.clone().requires_grad_()
        try:
            with torch.enable_grad():
                pulled, pushed = self._vjp(row, u[None, None])[0, 0], self._jvp(row, v[None, None])[0, 0]
                found = torch.zeros_like(row)[0, 0]
                if slope is not None:
                    along = self._vjp(tracked, u[None, None])[0, 0] @ v
                    found = torch.autograd.grad(along, tracked, allow_unused=True, materialize_grads=True)[0][0, 0]
        except Exception as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            return f"torch.func cannot differentiate this network ({_operation(error)})"
        if not (_close(pulled, gradient, dtype) and _close(u @ pushed, gradient @ v, dtype)):
            return "torch.func gives other derivatives of this network than plain backward passes"
        if slope is not None and not _close(found, slope, dtype):
            return "torch.func gives other second derivatives of this network than plain backward passes"
        return ""

    def _check(self, x: Tensor) -> None:
        if refusal := self.refusal(x):
            raise NetworkError(f"{refusal}: use BackwardBackend, or AutoBackend, which takes it by itself.")

    def _jvp(self, x: Tensor, v: Tensor) -> Tensor:
        return self._over_rows(x, lambda rows, part: self._columns(self._jvp_columns, rows, part), v, rowwise=False)

    def _vjp(self, x: Tensor, u: Tensor) -> Tensor:
        return self._over_rows(x, lambda rows, part: self._columns(self._vjp_columns, rows, part), u, rowwise=True)

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
        with _FORWARD_MODE:
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


def _close(found: Tensor, exact: Tensor, dtype: torch.dtype) -> bool:
    """Whether two ways of computing in ``dtype`` agree but for rounding."""
    root = torch.finfo(dtype).eps ** 0.5
    return bool((found - exact).abs().max() <= 10 * root * exact.abs().max() + torch.finfo(exact.dtype).tiny)


def _operation(error: Exception) -> str:
    """What torch says, and where in the user's code: the custom function, or the line of the forward pass."""
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        owner = frame.f_locals.get("cls")
        if file.endswith("autograd/function.py") and isinstance(owner, type):
            place = f"{owner.__name__}.apply, "
        elif not file.startswith(_NOT_THE_USERS) and (code := linecache.getline(file, line).strip()):
            place = f"`{code}`, "
    return f"{place}{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
