"""What freezing a module takes: refusing what has no well-defined Jacobian, its skeleton, and weights put back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from gpntk.errors import NetworkError
from gpntk.memory import Lock


def with_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``module`` whose parameters and buffers are ``tensors``, by name; one on meta comes to the CPU.

    Raises:
        NetworkError: Names or shapes differ.
    """
    own = dict(chain(module.named_parameters(), module.named_buffers()))
    if set(own) != set(tensors):
        raise NetworkError(f"tensors {sorted(set(own) ^ set(tensors))[:4]} are on one side only.")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise NetworkError(f"{name!r} has shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}.")
    devices = {name: "cpu" if tensor.is_meta else tensor.device for name, tensor in own.items()}
    return Skeleton(module).filled({name: tensors[name].to(devices[name], own[name].dtype) for name in own})


@final
class Skeleton:
    """A copy of a module with empty tensors on the meta device, and the lock under which it runs.

    ``functional_call`` and hooks change a module while it runs, so only one thread may. Ties between parameters are
    kept. Copies are the same object; pickles carry the module without the lock.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = _emptied(module)
        self.lock = Lock()

    def filled(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A copy of the module with copies of ``tensors``, by name, in place of the empty ones; ties are kept."""
        memo: dict[int, Any] = {}
        for name, parameter in self.module.named_parameters():
            memo[id(parameter)] = nn.Parameter(tensors[name].detach().clone(), parameter.requires_grad)
        for name, buffer in self.module.named_buffers():
            memo[id(buffer)] = tensors[name].detach().clone()
        return copy.deepcopy(self.module, memo)

    def __copy__(self) -> Skeleton:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Skeleton:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.module = state["module"]
        self.lock = Lock()


def _emptied(module: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise NetworkError(
            f"the module cannot be copied ({error}). Tensors computed from parameters and kept as attributes are the "
            "usual cause; torch.nn.utils.parametrizations.weight_norm instead of torch.nn.utils.weight_norm helps."
        ) from error


def check_module(module: nn.Module) -> None:
    """Raise `NetworkError` for anything that would make J(x) wrong or undefined."""
    if not isinstance(module, nn.Module):
        raise NetworkError(f"network must be a torch.nn.Module, got {type(module).__name__}.")
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise NetworkError(f"network is wrapped in {type(module).__name__}: pass module.module.")
    if isinstance(module, torch.jit.ScriptModule):
        raise NetworkError("network is a TorchScript module, whose weights cannot be replaced: pass the nn.Module.")
    parameters = dict(module.named_parameters())
    if not parameters:
        raise NetworkError("network has no parameters, so it has no Jacobian: pass a network with weights.")
    _check_parameters(parameters)
    devices = {str(tensor.device) for tensor in chain(parameters.values(), module.buffers())}
    for kind, values in (("dtypes", {str(parameter.dtype) for parameter in parameters.values()}), ("devices", devices)):
        if len(values) > 1:
            raise NetworkError(
                f"the network's tensors have several {kind}, {sorted(values)}: use one, e.g. module.to(...)."
            )
    for name, parameter in parameters.items():
        if not torch.isfinite(parameter).all():
            raise NetworkError(
                f"parameter {name!r} contains NaN or infinite values: check how the network was trained."
            )
    for name, child in module.named_modules():
        _check_mode(name or "network", child)


def _check_parameters(parameters: Mapping[str, nn.Parameter]) -> None:
    if all(parameter.is_meta for parameter in parameters.values()):
        raise NetworkError(
            "network has weights on the meta device, which hold no values: give it some first, by "
            "module.to_empty(device='cpu') and module.load_state_dict, say."
        )
    for name, parameter in parameters.items():
        if is_lazy(parameter):
            raise NetworkError(f"parameter {name!r} is not initialised yet: run the network once on an input first.")
        if not parameter.is_floating_point():
            raise NetworkError(f"parameter {name!r} has dtype {parameter.dtype}; only real floating weights have a J.")


def _check_mode(name: str, module: nn.Module) -> None:
    kind = type(module).__name__
    if isinstance(module, _DropoutNd) and module.training and module.p > 0:
        raise NetworkError(f"{name!r} ({kind}) is in train mode, so outputs are random: call module.eval() first.")
    if isinstance(module, _BatchNorm):
        if module.running_mean is None:
            raise NetworkError(
                f"{name!r} ({kind}) keeps no running statistics, so a row's output depends on its batch: train with "
                "track_running_stats=True, or use GroupNorm or LayerNorm."
            )
        if module.training:
            raise NetworkError(
                f"{name!r} ({kind}) is in train mode, so a row's output depends on its batch: call module.eval() first."
            )
