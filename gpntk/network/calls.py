"""How a network wants to be called with a batch: what its signature says, and where that leaves a choice, a try."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpntk._checks import as_tensor
from gpntk.errors import InputError
from gpntk.network.batches import Kind
from gpntk.network.freezing import Skeleton, check_module


def spreads(kind: Kind, named: Mapping[str, Tensor], forward: Any) -> bool:
    """Whether forward takes the tensors as several arguments."""
    if kind == "tensor":
        return False
    if kind == "tuple":
        return binds(forward, *named)
    if binds(forward, **named):
        return True
    parameters = inspect.signature(forward).parameters.values()
    known = [one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    if set(known) & set(named) or not binds(forward, dict(named)):
        unknown = [name for name in named if name not in known]
        needed = [one.name for one in parameters if one.name in known and one.default is one.empty]
        raise InputError(
            f"forward takes {', '.join(map(repr, known)) or 'nothing'}, and needs {needed}, but the batch has "
            f"{', '.join(map(repr, unknown or named))}: rename these entries, or leave them out."
        )
    return False


def binds(forward: Any, /, *args: Any, **kwargs: Any) -> bool:
    """Whether the signature of forward takes these arguments."""
    try:
        inspect.signature(forward).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


@torch.no_grad()
def runs(forward: Any, tensors: Iterable[Tensor]) -> bool:
    """Whether a network, or rather a copy that may be changed, runs on the first rows of some tensors."""
    device, dtype = torch.device("cpu"), torch.get_default_dtype()
    if isinstance(forward, nn.Module):
        forward = Skeleton(forward).filled(dict(chain(forward.named_parameters(), forward.named_buffers())))
        device, dtype = next((weight.device, weight.dtype) for weight in forward.parameters())
    first = [one[:2].to(device, dtype if one.is_floating_point() else one.dtype, copy=True) for one in tensors]
    try:
        forward(*first)
    except Exception:
        return False
    return True


def padding_of(forward: Any) -> int:
    """What the network's own configuration says pads ids; masked tokens count for nothing whatever it is."""
    number = getattr(getattr(forward, "config", None), "pad_token_id", None)
    return number if isinstance(number, int) else 0


def wants_integers(network: nn.Module, inputs: Any) -> bool:
    """Whether a network runs on an array of integers as they are, token ids say, but not as floating numbers."""
    if isinstance(inputs, Tensor):
        values = inputs
    else:
        array = np.asarray(inputs)
        values = torch.empty(0) if array.dtype.kind not in "iu" else as_tensor(array)
    if values.is_floating_point() or values.is_complex() or values.dim() < 2 or not len(values):
        return False
    check_module(network)
    return not runs(network, [values.to(torch.get_default_dtype())]) and runs(network, [values])
