"""What a network must do on two rows before it defines a kernel: the same twice, row by row, its readout last."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gpntk.errors import GpntkError, InputError, NetworkError, SelectionError
from gpntk.memory import Lock
from gpntk.network.adapters import Adapter
from gpntk.network.selection import layer_name

# The types whose calls run TorchScript, with the name of what is called; and the lock under which they are watched,
# because they are those of all threads.
_SCRIPTED: dict[type, Callable[[Any], str]] = {
    torch.jit.ScriptFunction: lambda function: function.name,
    torch._C.ScriptMethod: lambda method: method.owner._type().name(),
}
_WATCHING = Lock()


def two_rows(rows: Tensor) -> Tensor:
    """Two different rows `[2, D]`, the first of ``rows`` among them."""
    pair = torch.stack([rows[0], rows[-1]])
    if torch.equal(pair[0], pair[1]):
        pair[1] = pair[0] * 0.9 + 0.1
    return pair


@torch.no_grad()
def first_run(network: Callable[[Tensor], Tensor], rows: Tensor, adapter: Adapter) -> Tensor:
    """What the network returns for a few rows of x, `[N, C]`; an error that says what it was given if it does not run.

    Raises:
        InputError: The network does not run; the message says which rows it was given.
    """
    try:
        return network(rows)
    except GpntkError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        own = adapter.input_shape
        if isinstance(error, (TypeError, AttributeError)) and (adapter.spread or adapter.kind == "tensor"):
            raise  # no matter of x: only a container may be of the wrong kind
        shape = tuple(rows.shape) if own is None else (rows.shape[0], *own)
        advice = (
            f"Check that it takes the batch as it is packed, {adapter}."
            if own is None and adapter.width is not None
            else "Check that x has the columns that the network takes. A network of images, say, needs "
            "input_shape=(channels, height, width), and x flat: x.flatten(1). One of token ids, masks or several "
            "tensors needs inputs=, a batch as it takes it."
        )
        raise InputError(
            f"the network does not run on {rows.shape[0]} rows of x, shape {shape}. It says: "
            f"{type(error).__name__}: {error} -- {advice}"
        ) from error


@torch.no_grad()
def check_rows(network: Callable[[Tensor], Tensor], both: Tensor, pair: Tensor, dtype: torch.dtype) -> int:
    """C, the number of outputs, if ``both`` = f(pair), computed in ``dtype``, is what every run gives, row by row.

    Raises:
        InputError: NaN or infinite outputs.
        NetworkError: The output is stochastic, or depends on the other rows of the batch.
    """
    again, alone = network(pair), network(pair[:1])
    if not torch.isfinite(both).all():
        raise InputError(
            "the network returns NaN or infinite values on the first or last row of x: check x for NaN, and its "
            "scale against what the network was trained on."
        )
    tolerance = math.sqrt(torch.finfo(dtype).eps)
    if not torch.allclose(both, again, rtol=tolerance, atol=tolerance):
        raise NetworkError(
            "two runs of the network on the same rows differ: it is stochastic (dropout in train mode?) or "
            "changes its own buffers. Call module.eval() before freezing."
        )
    if not torch.allclose(both[:1], alone, rtol=tolerance, atol=tolerance):
        raise NetworkError(
            "the network's output for a row depends on the other rows of the batch (batch statistics, or an "
            "operation across the batch dimension), so it defines no kernel. Use running statistics (eval mode) "
            "or a normalisation within the row."
        )
    return both.shape[-1]


@contextmanager
def scripted_calls(names: set[str]) -> Iterator[None]:
    """Add to ``names`` what this thread calls of TorchScript meanwhile, which no mode of torch's shows."""
    thread = threading.get_ident()

    def watched(call: Callable[..., Any], name: Callable[[Any], str]) -> Callable[..., Any]:
        def wrapped(scripted: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                names.add(name(scripted))
            return call(scripted, *args, **kwargs)

        return wrapped

    with _WATCHING, ExitStack() as stack:
        for kind, name in _SCRIPTED.items():
            stack.callback(setattr, kind, "__call__", kind.__call__)
            kind.__call__ = watched(kind.__call__, name)
        yield


@torch.no_grad()
def check_readout(network: Callable[[Tensor], Tensor], module: nn.Module, readout: str, rows: Tensor) -> None:
    """Raise `SelectionError` unless ``readout`` is the last layer with parameters to start running in ``module``."""
    started: list[str] = []
    modules = dict(module.named_modules())
    layers = {layer_name(name) for name, _ in module.named_parameters()}
    hooks = {name: lambda *_, n=name: started.append(n) for name in layers}
    with _removing([modules[name].register_forward_pre_hook(hook) for name, hook in hooks.items()]):
        network(rows)
    if started and started[-1] != readout:
        raise SelectionError(
            f"parameters='readout' took the last registered layer, {readout!r}, but the network runs "
            f"{started[-1]!r} last: pass parameters={started[-1] + '.*'!r} to choose the readout by name."
        )


@contextmanager
def _removing(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
