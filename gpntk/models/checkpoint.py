"""A fit on disk: where L-BFGS stands after a step, so that a fit that was stopped goes on as if it never had been.

A file holds a `FitState`, its tensors under ``model.*``, ``best.*`` and ``optimizer.*``, all else as JSON, which keeps
every bit of a float. With it goes a description of what is fitted (see `identify`): a state belongs to one objective,
and means nothing for another.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpntk.errors import FileFormatError, InputError
from gpntk.io import checksum, load_tensors, save_tensors
from gpntk.kernels import AbstractFeatureKernel

# Between machines the mean prior variance differs by rounding, TF32 included; between networks by more than this.
_SAME_VARIANCE = 1e-3

Identity = Mapping[str, str | float]
"""What is fitted, by the name of each part: a description to compare and to print, or a number to compare."""


class FitState(NamedTuple):
    """Where a fit stands after ``steps`` steps."""

    steps: int
    stalled: int
    """Steps in a row without progress."""
    finished: bool
    """Whether another step would be in vain."""
    value: float
    """Largest marginal likelihood so far, in nats."""
    best: dict[str, Tensor]
    """The model's state there."""
    model: dict[str, Tensor]
    """The model's state now."""
    optimizer: dict[str, Any]
    """What ``torch.optim.LBFGS`` remembers, by name: numbers, tensors and lists of both."""


def save_fit(path: str | os.PathLike[str], identity: Identity, fit: FitState) -> None:
    """Write ``fit`` to ``path``, whole or not at all."""
    tensors = {f"{group}.{name}": t for group in ("model", "best") for name, t in getattr(fit, group).items()}
    facts = {
        "identity": dict(identity),
        "steps": fit.steps,
        "stalled": fit.stalled,
        "finished": fit.finished,
        "value": fit.value,
        "optimizer": {key: _take_tensors(value, f"optimizer.{key}", tensors) for key, value in fit.optimizer.items()},
    }
    save_tensors(path, "fit", tensors, facts)


def load_fit(path: str | os.PathLike[str], identity: Identity) -> FitState | None:
    """The fit that `save_fit` wrote to ``path``, or None if there is no such file yet.

    Raises:
        InputError: ``path`` cannot be written: it is a folder, or stands in one that does not exist.
        FileFormatError: The file is damaged, holds something else, or belongs to another model or other data.
    """
    name = os.fspath(path)
    if Path(path).is_dir():
        raise InputError(f"checkpoint={name!r} is a folder: give the name of a file in it.")
    if not Path(path).parent.is_dir():
        raise InputError(f"checkpoint={name!r}: there is no folder {str(Path(path).parent)!r}: make it first.")
    if not Path(path).exists():
        return None
    tensors, facts = load_tensors(path, "fit")
    differing = _differences(facts["identity"], identity)
    if differing:
        raise FileFormatError(
            f"{name!r} is the checkpoint of another fit: {'; '.join(differing)}. Fit the model and data it was written "
            "for, or give another checkpoint, or delete this one to start afresh."
        )
    # What was read is a view of the file, which is to be replaced after the next step.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return FitState(
        steps=facts["steps"],
        stalled=facts["stalled"],
        finished=facts["finished"],
        value=facts["value"],
        best=_group(tensors, "best."),
        model=_group(tensors, "model."),
        optimizer={key: _put_tensors(value, tensors) for key, value in facts["optimizer"].items()},
    )


def optimizer_state(optimizer: torch.optim.LBFGS) -> dict[str, Any]:
    """What the optimizer remembers between steps, by name; empty before the first."""
    return optimizer.state_dict()["state"].get(0, {})  # it keeps everything with its first parameter


def restore_optimizer(optimizer: torch.optim.LBFGS, state: dict[str, Any]) -> None:
    """Make the optimizer remember ``state``, on the device of its parameters; its options stay as they are."""
    optimizer.load_state_dict({"state": {0: state}, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def identify(x: Tensor, y: Tensor, kernel: AbstractFeatureKernel, model: nn.Module) -> Identity:
    """What distinguishes this fit from others: data x `[N, D]` and y, the kernel, and the model's hyperparameters.

    Weights do not tell a tanh from a ReLU, nor one sketch from another; the mean of the prior variances k(x, x), for
    unit variances of the weights, does. It is taken over all rows, as the fit itself does it: `gpntk.AutoBackend`
    makes its choice at the first x it sees.
    """
    network = kernel.network
    active_dims = kernel.active_dims
    columns = x.index_select(-1, active_dims) if isinstance(active_dims, Tensor) else x
    variances = kernel.backend.diagonal(columns.unsqueeze(0), False)
    described = (f"{name} {list(p.shape)}{'' if p.requires_grad else ' fixed'}" for name, p in model.named_parameters())
    return {
        "inputs x": _describe(x),
        "targets y": _describe(y),
        "network's weights": _digest(network.tensors(x.dtype, x.device), ""),
        "differentiated parameters": f"{len(network.names)}, {_digest({}, ' '.join(network.names))}",
        "kernel": f"output={kernel.output!r}, {kernel.num_features} features",
        "hyperparameters": ", ".join(described),
        "mean prior variance": variances.double().mean().item(),
    }


# --- private ---------------------------------------------------------------------------------------------------------


def _differences(there: Identity, here: Identity) -> list[str]:
    """Each part that is not the same, in words."""

    def differ(one: str | float | None, two: str | float) -> bool:
        if isinstance(one, float) and isinstance(two, float):
            return not math.isclose(one, two, rel_tol=_SAME_VARIANCE)
        return one != two

    return [
        f"its {name}: {there.get(name)}, but here: {value}"
        for name, value in here.items()
        if differ(there.get(name), value)
    ]


def _take_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` with its tensors moved to ``tensors``, and ``{"tensor": its name there}`` in place of each."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, list):
        return [_take_tensors(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    return value


def _put_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_take_tensors`."""
    if isinstance(value, dict):
        return tensors[value["tensor"]]
    if isinstance(value, list):
        return [_put_tensors(item, tensors) for item in value]
    return value


def _group(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _describe(tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {list(tensor.shape)}, {_digest({'': tensor}, '')}"


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    stored = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    return f"sha256 {checksum(stored, text)[:16]}"
