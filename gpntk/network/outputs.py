"""Which of the things that a network returns is its output, for the usual classes of outputs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, final

import torch
from torch import Tensor

from gpntk._types import Extract, OutputSelection
from gpntk.errors import NetworkError, SelectionError
from gpntk.network.batches import Arguments

logger = logging.getLogger("gpntk.network")

POOLINGS = ("mean", "cls", "last")


@final
class Entry:
    """Which entry of what a network returns is its output: said in the log once it is known, and kept for reports.

    Attributes:
        name: In words; "" where the network returns nothing else, or has not run yet.
    """

    def __init__(self) -> None:
        self.name = ""

    def say(self, name: str) -> None:
        """Take the name, the first time that there is one."""
        if name and not self.name:
            self.name = name
            logger.info("of what the network returns, its output is %s.", name)


def extracted(returned: Any, extract: Extract | str | None, arguments: Arguments) -> tuple[Any, str]:
    """The output tensor among what a network returned, and in words where it was; "" where it is all that there is.

    Args:
        returned: What the network returned: a tensor, dictionary, tuple, or object with tensors as attributes.
        extract: A function of it; the name of an entry; how a vector per token becomes one per input, by the ``"mean"``
            over the tokens of ``attention_mask``, the first (``"cls"``) or the ``"last"`` of them; or None, which
            takes a tensor, ``logits``, the only entry, or the first of a tuple.
        arguments: What the network was called with.

    Raises:
        NetworkError: It is not known which entry is meant; the message lists them.
    """
    if callable(extract):
        return extract(returned), ""
    entry, name = _entry(returned, None if extract in POOLINGS else extract)
    if extract in POOLINGS:
        return _pooled(entry, extract, arguments.mask), f"{extract} over the tokens of {name or 'the output'}"
    if isinstance(entry, Tensor) and entry.dim() > 2 and name:
        others = [f"extract={other!r}" for other, size in _shapes(returned).items() if len(size) == 2]
        if entry.dim() == 3:
            others = [*(f"extract={pooling!r}" for pooling in POOLINGS), *others]
        choices = ", ".join([*others, "or a function of what the network returns"])
        raise NetworkError(
            f"the network returned {type(returned).__name__}, whose {name} has shape {tuple(entry.shape)}; gpntk needs "
            f"[N] or [N, C]: choose {choices}."
        )
    return entry, name


def selected(outputs: Any, output: OutputSelection, num_rows: int) -> Tensor:
    """The outputs `[N, C]` of so many rows, one of them, or their sum over sqrt(C), `[N, 1]`.

    Raises:
        NetworkError: They are no tensor `[N]` or `[N, C]`.
        SelectionError: There is no such output.
    """
    if not isinstance(outputs, Tensor):
        raise NetworkError(f"extract= gave {type(outputs).__name__}, not a tensor: return the output tensor.")
    if outputs.dim() not in (1, 2) or outputs.shape[0] != num_rows:
        raise NetworkError(
            f"the network returned shape {tuple(outputs.shape)} for {num_rows} rows; gpntk needs [N] or [N, C]: "
            "flatten or select the outputs with extract=, and check input_shape."
        )
    outputs = outputs.unsqueeze(-1) if outputs.dim() == 1 else outputs
    if output == "sum":
        return outputs.sum(-1, keepdim=True) / math.sqrt(outputs.shape[-1])
    if isinstance(output, int):
        if not 0 <= output < outputs.shape[-1]:
            raise SelectionError(f"output={output}, but the network has outputs 0 to {outputs.shape[-1] - 1}.")
        return outputs[:, output : output + 1]
    return outputs


def _entry(returned: Any, name: str | None) -> tuple[Any, str]:
    entries = _entries(returned)
    if name is not None:
        if entries is None or not isinstance(entries.get(name), Tensor):
            raise NetworkError(
                f"extract={name!r}, but the network returned {type(returned).__name__} with {_listed(returned)}: name "
                f"one of these, or choose one of {', '.join(map(repr, POOLINGS))} for a vector per token."
            )
        return entries[name], f"{name!r}"
    if isinstance(returned, Tensor):
        return returned, ""
    if entries is not None:
        tensors = [key for key, value in entries.items() if isinstance(value, Tensor)]
        for key in ("logits", "last_hidden_state", *(tensors if len(tensors) == 1 else ())):
            if key in tensors:
                return entries[key], f"{key!r}"
    elif isinstance(returned, (tuple, list)) and returned and isinstance(returned[0], Tensor):
        return returned[0], f"the first of {len(returned)} outputs"
    raise NetworkError(
        f"the network returned {type(returned).__name__}, not a tensor: pass extract=, the name of one of its entries "
        f"({_listed(returned)}), or a function that takes what the network returns and gives the output tensor, e.g. "
        "extract=lambda out: out['logits']."
    )


def _entries(returned: Any) -> dict[str, Any] | None:
    """What is returned under names; None for a tensor and for what has no names."""
    if isinstance(returned, Mapping):
        return {str(key): value for key, value in returned.items()}
    if isinstance(returned, tuple) and type(returned) is not tuple:
        return dict(zip(getattr(returned, "_fields", ()), returned, strict=False)) or None
    if is_dataclass(returned):
        return {field.name: getattr(returned, field.name) for field in fields(returned)}
    if isinstance(returned, (Tensor, tuple, list)):
        return None
    return dict(getattr(returned, "__dict__", {}))


def _shapes(returned: Any) -> dict[str, tuple[int, ...]]:
    entries = _entries(returned) or {}
    return {name: tuple(value.shape) for name, value in entries.items() if isinstance(value, Tensor)}


def _listed(returned: Any) -> str:
    return ", ".join(f"{name!r} {list(shape)}" for name, shape in _shapes(returned).items()) or "no tensors"


def _pooled(tokens: Any, pooling: str | None, mask: Tensor | None) -> Tensor:
    """One vector per input `[N, H]` from one per token `[N, T, H]`."""
    if not isinstance(tokens, Tensor) or tokens.dim() != 3:
        shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise NetworkError(
            f"extract={pooling!r} needs a vector per token, [N, T, H], but the network returned {shape}."
        )
    if pooling == "cls":
        return tokens[:, 0]
    if mask is None:
        return tokens.mean(1) if pooling == "mean" else tokens[:, -1]
    if mask.shape != tokens.shape[:2]:
        raise NetworkError(
            f"extract={pooling!r} needs a token per entry of attention_mask {tuple(mask.shape)}, but the network "
            f"returned {tuple(tokens.shape)}: give extract=, a function of what it returns."
        )
    counted = mask.to(tokens.dtype)
    if pooling == "last":
        places = torch.arange(mask.shape[1], device=mask.device)
        latest = (places * (mask != 0)).argmax(1, keepdim=True)
        counted = (places == latest).to(tokens.dtype)
    weights = counted / counted.sum(1, keepdim=True).clamp_min(1)
    return (weights.unsqueeze(-1) * tokens).sum(1)
