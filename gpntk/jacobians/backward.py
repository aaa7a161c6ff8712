"""Jacobian products by plain backward passes: whatever autograd can differentiate."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, final

import torch
from torch import Tensor

from gpntk.cost import Cost
from gpntk.errors import NetworkError
from gpntk.jacobians.backend import (
    AbstractTangentBackend,
    contracted_diagonal,
    contracted_gram,
    contracted_jvp,
    contracted_vjp,
)
from gpntk.jacobians.record import no_pattern, row_values
from gpntk.memory import attached, chunks, frozen, is_out_of_memory, tracks_gradient
from gpntk.network import FrozenNetwork

# A warning of torch.utils.checkpoint's that means wrong derivatives.
_LOST = "None of the inputs have requires_grad=True"


class _Found(NamedTuple):
    """What a first pass has shown.

    Attributes:
        batched: Whether several backward passes may go at once, by vmap.
        pushes: Whether J v may go by two backward passes, of which the second differentiates the first.
    """

    batched: bool
    pushes: bool


@final
class BackwardBackend(AbstractTangentBackend):
    """Products by plain backward passes of the module itself, for networks that ``torch.func`` cannot differentiate.

    Custom autograd functions, hooks, derivatives within forward, ``torch.utils.checkpoint``, scripted functions: what
    ``torch.autograd.grad`` can do, this can. Jᵀ u is one backward pass per column. J v is the derivative of Jᵀ u in u,
    two passes, where the backward pass can be differentiated, and else a product with rows of J. A row of J is one
    backward pass of one input.

    Of a network that casts its weights to bfloat16 in forward, torch rounds each gradient to bfloat16 once, after it is
    summed over the rows: Jᵀ u of many rows is off from the sum of that of each by up to 2⁻⁸, as in plain torch.

    Args:
        network: The network, with the parameters to differentiate selected.
        memory_budget: Bytes that temporaries stay within.

    Raises:
        NetworkError: A derivative in x is asked for, and the network has no second derivatives.

    Example:
        >>> import torch, gpntk
        >>> class Sign(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         return x.sign()
        ...
        ...     @staticmethod
        ...     def backward(ctx, g):
        ...         return g
        >>> class Binary(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return Sign.apply(super().forward(x))
        >>> backend = BackwardBackend(gpntk.freeze(Binary(3, 2)))
        >>> backend.jvp(torch.randn(1, 7, 3), torch.randn(1, 5, 8)).shape
        torch.Size([1, 5, 14])

    References:
        J v by two backward passes: Townsend (2017), A new trick for calculating Jacobian vector products.
    """

    def __init__(self, network: FrozenNetwork, memory_budget: int | None = None) -> None:
        super().__init__(network, memory_budget)
        self._found: _Found | None = None
        self._row_values = 0
        self._all_weights = False
        self._twice = False

    def jvp(self, x: Tensor, v: Tensor) -> Tensor:
        if tracks_gradient(x) or tracks_gradient(v) or not self._find(x).pushes:
            return contracted_jvp(self, x, v)
        chunked = list(self._chunks(x, v.shape[1]))
        with self._running():
            batches = [
                torch.cat([self._pushed(x[batch, rows], v[batch]) for rows in chunked], dim=-1)
                for batch in range(x.shape[0])
            ]
        return torch.stack(batches)

    def vjp(self, x: Tensor, u: Tensor) -> Tensor:
        if tracks_gradient(x) or tracks_gradient(u):
            return contracted_vjp(self, x, u)
        u, chunked = u.unflatten(-1, (x.shape[1], -1)), list(self._chunks(x, u.shape[1]))
        with self._running():
            batches = [
                sum(self._pulled(x[batch, rows], u[batch, :, rows]) for rows in chunked) for batch in range(x.shape[0])
            ]
        return torch.stack(batches)  # pyright: ignore[reportArgumentType]

    def gram(self, x1: Tensor, x2: Tensor, per_layer: bool = False) -> Tensor:
        return contracted_gram(self, x1, x2, per_layer)

    def diagonal(self, x: Tensor, per_layer: bool = False) -> Tensor:
        return contracted_diagonal(self, x, per_layer)

    def jacobian(self, x: Tensor) -> Tensor:
        outputs = self.num_outputs(x)
        unit = torch.eye(outputs, dtype=x.dtype, device=x.device).unsqueeze(1)
        if tracks_gradient(x):
            self.check_twice(x)
        with self._running():
            rows = [self._pulled(row, unit) for row in x.reshape(-1, 1, x.shape[-1])]
        return attached(torch.cat(rows).unflatten(0, (x.shape[0], -1)), x)

    def costs(self, x: Tensor, columns: int) -> tuple[Cost, ...]:  # noqa: ARG002
        return ()

    def gradient(self, row: Tensor, u: Tensor) -> Tensor:
        """Jᵀ u `[P]` for one row `[1, D]` and u `[C]`."""
        with self._running():
            return self._pulled(frozen(row), frozen(u)[None, None])[0]

    def slope(self, row: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """The derivative of uᵀ J v in x `[D]`, for one row `[1, D]`.

        Raises:
            NetworkError: The network cannot be differentiated twice.
        """
        reason = "its backward passes hide from autograd how they depend on their input"
        if self._find(row[None]).pushes:
            with self._running():
                row = frozen(row).requires_grad_()
                try:
                    along = self._pulled(row, frozen(u)[None, None])[0] @ v
                    if not along.requires_grad:
                        return torch.zeros_like(row)[0]
                    return torch.autograd.grad(along, row, allow_unused=True, materialize_grads=True)[0][0]
                except RuntimeError as error:
                    if is_out_of_memory(error):
                        raise
                    reason = str(error).strip().splitlines()[0]
        raise NetworkError(
            f"the kernel has no derivative in x, because the network cannot be differentiated twice ({reason}): give x "
            "without requires_grad, or write the backward passes of the network's autograd functions in operations of "
            "torch, without @once_differentiable or detach, and its checkpoints with use_reentrant=False."
        )

    def check_twice(self, x: Tensor) -> None:
        """Raise `NetworkError` if the network cannot be differentiated twice, so that K has no derivative in x."""
        if not self._twice:
            row = frozen(x).flatten(0, 1)[:1]
            self.slope(row, no_pattern(self.num_outputs(x), row), no_pattern(self.num_features, row))
            self._twice = True

    # --- private -----------------------------------------------------------------------------------------------

    @contextmanager
    def _running(self) -> Iterator[None]:
        with self.network.lock, torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")
            warnings.filterwarnings("error", _LOST)
            yield

    def _run(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """f(x) `[N, C]` and the weights of the module, with a graph from one to the other."""
        if self._all_weights:
            return self.network.differentiated(x if x.requires_grad else x.requires_grad_(), all_weights=True)
        try:
            return self.network.differentiated(x)
        except (UserWarning, RuntimeError) as error:
            if _LOST not in str(error) and (isinstance(error, UserWarning) or is_out_of_memory(error)):
                raise
            # A reentrant checkpoint or a hook, which need an input that requires grad: ask all weights, and x, to.
            self._all_weights = True
            try:
                return self._run(x)
            except UserWarning as warning:
                raise NetworkError(f"a checkpoint loses gradients ({warning}): pass it use_reentrant=False.") from error
            except RuntimeError:
                self._all_weights = False
                raise error from None

    def _pulled(self, x: Tensor, u: Tensor) -> Tensor:
        """Jᵀ u `[K, P]` for x `[N, D]` and u `[K, N, C]`, with a graph back to x if x has one."""
        graph = x.requires_grad
        outputs, parameters = self._run(x if graph else frozen(x))
        batched = self._found is not None and self._found.batched and not graph
        leaves = list(parameters.values())
        gradients = _gradients(
            [outputs], leaves, [frozen(u)], batched=batched, graph=graph, accumulate=self._all_weights
        )
        return torch.cat([gradient.reshape(len(u), -1).to(x.dtype) for gradient in gradients], dim=-1)

    def _pushed(self, x: Tensor, v: Tensor) -> Tensor:
        """J v `[K, N*C]` for x `[N, D]` and v `[K, P]`: the derivative in u of Jᵀ u, which is linear in u."""
        outputs, parameters = self._run(frozen(x))
        u = torch.zeros_like(outputs, requires_grad=True)
        tangents = self.network.unflatten(frozen(v))
        if not outputs.requires_grad:
            return v.new_zeros(v.shape[0], outputs.numel())
        pulled = torch.autograd.grad(outputs, tuple(parameters.values()), u, create_graph=True, allow_unused=True)
        used = [(g, tangents[name].to(g.dtype)) for name, g in zip(parameters, pulled, strict=True) if _has_graph(g)]
        if not used:
            return v.new_zeros(v.shape[0], outputs.numel())
        batched = self._found is not None and self._found.batched
        return _gradients([g for g, _ in used], [u], [t for _, t in used], batched=batched)[0].flatten(1).to(v.dtype)

    def _chunks(self, x: Tensor, columns: int) -> Iterator[slice]:
        """Rows whose activations, and those of every column's pass, fit the budget."""
        if not self._row_values:
            with torch.no_grad():
                self._row_values = row_values(self.network, frozen(x).flatten(0, 1)[:1])
        return chunks(x.shape[1], 3 * (1 + columns) * self._row_values * x.element_size(), self.memory_budget)

    def _find(self, x: Tensor) -> _Found:
        """What goes, tried once on a row against two backward passes."""
        if self._found is None:
            row, dtype = frozen(x).flatten(0, 1)[:1], self.network.compute_dtype(x.dtype)
            u = no_pattern(2 * self.num_outputs(x), x).view(2, 1, -1)
            v = no_pattern(self.num_features, x).unsqueeze(0)
            with self._running():
                exact = self._pulled(row, u)
                # TorchScript, once it has optimised a function, may differentiate it one column at a time only.
                batched = not self.network.scripted
                self._found = _Found(batched, pushes=False)
                batched = batched and _agrees(lambda: self._pulled(row, u), exact, dtype)
                self._found = _Found(batched, pushes=False)
                pushes = _agrees(lambda: self._pushed(row, v) @ u[:, 0].mT, v @ exact.mT, dtype)
                self._found = _Found(batched, pushes)
        return self._found


def _gradients(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    batched: bool = False,
    graph: bool = False,
    accumulate: bool = False,
) -> list[Tensor]:
    """Σ uᵀ d(outputs)/d(input) `[K, *shape]` for every input, for K cotangents `[K, *shape]` of every output.

    Zero where an input is not used. With ``accumulate`` by ``backward``, which adds to leaves.
    """
    columns = cotangents[0].shape[0]
    if not any(output.requires_grad for output in outputs):
        return [i.new_zeros(columns, *i.shape) for i in inputs]
    if batched:
        found = torch.autograd.grad(
            outputs, inputs, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        return [
            i.new_zeros(columns, *i.shape) if g is None else _strided(g) for i, g in zip(inputs, found, strict=True)
        ]
    rows = [_pass(outputs, inputs, [u[column] for u in cotangents], graph, accumulate) for column in range(columns)]
    return [
        torch.stack([torch.zeros_like(i) if g is None else _strided(g) for g in column])
        for i, column in zip(inputs, zip(*rows, strict=True), strict=True)
    ]


def _pass(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], graph: bool, accumulate: bool
) -> Sequence[Tensor | None]:
    """One backward pass."""
    if not accumulate:
        try:
            return torch.autograd.grad(
                outputs, inputs, cotangents, retain_graph=True, create_graph=graph, allow_unused=True
            )
        except RuntimeError as error:
            if "use_reentrant=True" not in str(error) or graph:
                raise
    # Reentrant checkpoints know ``backward`` alone, which adds to every leaf.
    for leaf in inputs:
        leaf.grad = None
    torch.autograd.backward(outputs, cotangents, retain_graph=True)
    gradients = [leaf.grad for leaf in inputs]
    for leaf in inputs:
        leaf.grad = None
    return gradients


def _agrees(product: Callable[[], Tensor], exact: Tensor, dtype: torch.dtype) -> bool:
    """Whether a product, computed in ``dtype``, runs and gives what it should."""
    try:
        found = product()
    except Exception as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        return False
    tolerance = 10 * math.sqrt(torch.finfo(dtype).eps)
    return bool((found - exact).abs().max() <= tolerance * exact.abs().max().clamp_min(torch.finfo(exact.dtype).tiny))


def _has_graph(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def _strided(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout == torch.strided else tensor.to_dense()
