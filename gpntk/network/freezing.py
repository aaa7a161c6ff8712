"""What freezing a module takes: refusing what has no well-defined Jacobian, its skeleton, and weights put back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from gpntk.errors import NetworkError
from gpntk.memory import Lock
from gpntk.network.batches import Arguments


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
        if cast(tensors[name].dtype, tensor.dtype) != tensor.dtype:
            raise NetworkError(f"{name!r} holds {tensors[name].dtype}, not {tensor.dtype}.")
    dtypes = [{one.dtype for one in side.values() if one.is_floating_point()} for side in (tensors, own)]
    if len(dtypes[0]) > max(1, len(dtypes[1])):
        raise NetworkError(f"tensors have several dtypes, {sorted(map(str, dtypes[0]))}.")
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
        # Of parameters, which copies of parameters do not have.
        hooks = {name: parameter._backward_hooks for name, parameter in module.named_parameters()}
        self.hooks = {name: tuple(found.values()) for name, found in hooks.items() if found}
        self.lock = Lock()

    def filled(self, tensors: Mapping[str, Tensor], shared: bool = False) -> nn.Module:
        """A copy of the module with copies of ``tensors``, by name, in place of the empty ones; ties are kept.

        With ``shared`` its parameters are views of ``tensors``, not copies, with the hooks that the frozen ones had.
        (Buffers, which a pass may change, are copies.)
        """
        memo: dict[int, Any] = {}
        for name, parameter in self.module.named_parameters():
            tensor = tensors[name].detach()
            memo[id(parameter)] = nn.Parameter(tensor if shared else tensor.clone(), parameter.requires_grad)
        for name, buffer in self.module.named_buffers():
            memo[id(buffer)] = tensors[name].detach().clone()
        filled = copied(self.module, memo)
        places = dict(self.module.named_modules())
        for place, child in filled.named_modules():
            if isinstance(child, torch.jit.ScriptModule):  # whose copies know no memo
                own = places[place]
                for name, tensor in chain(own.named_parameters(recurse=False), own.named_buffers(recurse=False)):
                    setattr(child, name, memo[id(tensor)])
        if shared:
            for name, parameter in filled.named_parameters():
                for hook in self.hooks.get(name, ()):
                    parameter.requires_grad_().register_hook(hook)
        return filled

    def run(self, tensors: Mapping[str, Tensor], arguments: Arguments) -> Any:
        """What the module returns with ``tensors``, by name, in place of the empty ones."""
        if not isinstance(self.module, torch.jit.ScriptModule):
            return functional_call(self.module, dict(tensors), *arguments)
        # Takes other weights only as a part of a module.
        return functional_call(_Whole(self.module), {f"part.{name}": tensors[name] for name in tensors}, *arguments)

    def __copy__(self) -> Skeleton:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Skeleton:
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Tensors of weights and of empty ones alike are kept; what a run has left on the module is not.
        kept = {id(tensor): tensor for tensor in chain(self.module.parameters(), self.module.buffers())}
        return {"module": copied(self.module, kept), "hooks": self.hooks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.module, self.hooks = state["module"], state["hooks"]
        self.lock = Lock()


class Needs(NamedTuple):
    """What a network needs to run, beyond weights and x.

    Attributes:
        dtype: The only dtype in which it runs, if it makes tensors of that dtype in forward.
        gradients: Whether it differentiates in forward, and so needs gradients switched on.
    """

    dtype: torch.dtype | None = None
    gradients: bool = False

    @contextmanager
    def mode(self) -> Iterator[None]:
        """Gradients switched on, also within ``torch.inference_mode``, if they are needed."""
        with ExitStack() as stack:
            if self.gradients:
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.enable_grad())
            yield


def find_needs(run: Callable[[Needs], object], dtype: torch.dtype, own: torch.dtype) -> Needs | None:
    """What else a network of dtype ``own`` needs to ``run`` in ``dtype``; None if nothing helps."""
    other = None if dtype == own else own
    for needs in dict.fromkeys([Needs(None, True), Needs(other, False), Needs(other, True)]):
        try:
            run(needs)
        except Exception:
            continue
        if needs.dtype is not None:
            warnings.warn(
                f"the network does not run in {dtype}, because its forward makes tensors of {own}: it is run, and "
                f"differentiated, in {own}.",
                stacklevel=5,
            )
        return needs
    return None


def cast(own: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a tensor of dtype ``own`` in a network that is cast to ``dtype``."""
    if own.is_complex:
        return dtype.to_complex()
    return dtype if own.is_floating_point else own


def with_gradient(tensor: Tensor) -> Tensor:
    """The tensor as a leaf that requires grad, if it is real."""
    return tensor.detach().requires_grad_() if tensor.is_floating_point() and tensor.layout == torch.strided else tensor


class _Whole(nn.Module):
    """A module that is another one."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.part(*args, **kwargs)


def _emptied(module: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copied(module, memo)


def copied(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy. Tensors computed from weights become `Stale`; what cannot be copied (locks, files) is shared."""
    memo = {} if memo is None else memo
    attributes = [
        (f"{name}.{attribute}".lstrip("."), value)
        for name, child in module.named_modules()
        for attribute, value in vars(child).items()
        if attribute not in ("_parameters", "_buffers", "_modules")
    ]
    for place, value in attributes:
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor) and not isinstance(tensor, Stale) and _has_history(tensor):
                memo[id(tensor)] = Stale.of(place)
    try:
        return copy.deepcopy(module, dict(memo))
    except Exception:
        memo |= {id(value): value for _, value in attributes if not _can_be_copied(value, memo)}
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise NetworkError(
            f"the module cannot be copied ({type(error).__name__}: {error}): give the class of the module, or of the "
            "attribute that it names, a __deepcopy__ that can."
        ) from error


def _has_history(tensor: Tensor) -> bool:
    return tensor.grad_fn is not None or is_functorch_wrapped_tensor(tensor)


def _can_be_copied(value: Any, memo: dict[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:
        return False
    return True


@final
class Stale(Tensor):
    """Stands for a tensor that the user's module has computed from weights and keeps as an attribute.

    Hooks and forward passes that compute it anew replace it (pruning, ``torch.nn.utils.weight_norm``, cached features).
    A pass that reads it would see the weights as they were then, so it raises.
    """

    place: str

    @staticmethod
    def of(place: str) -> Stale:
        """The stand-in for the attribute at ``place``."""
        stale = torch.empty(0, device="meta").as_subclass(Stale)
        stale.place = place
        return stale

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del func, types
        place = next(leaf.place for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Stale))
        raise NetworkError(
            f"the network reads its attribute {place!r}, a tensor that was computed from its weights once and for all, "
            "so that derivatives would miss it: compute it in forward, or detach it, by "
            f"network.{place} = network.{place}.detach(), where it should stay as it is."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Stale:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Stale.of, (self.place,)


def check_module(module: nn.Module) -> None:
    """Raise `NetworkError` for anything that would make J(x) wrong or undefined."""
    if not isinstance(module, nn.Module):
        raise NetworkError(f"network must be a torch.nn.Module, got {type(module).__name__}.")
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise NetworkError(f"network is wrapped in {type(module).__name__}: pass module.module.")
    parameters = dict(module.named_parameters())
    if not parameters:
        raise NetworkError("network has no parameters, so it has no Jacobian: pass a network with weights.")
    _check_parameters(parameters)
    real = {name: parameter for name, parameter in parameters.items() if not parameter.is_complex()}
    devices = {str(tensor.device) for tensor in chain(parameters.values(), module.buffers())}
    for kind, values in (("dtypes", {str(parameter.dtype) for parameter in real.values()}), ("devices", devices)):
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


def check_real(selected: Mapping[str, nn.Parameter]) -> None:
    """Raise `NetworkError` for complex parameters, which have no real J."""
    for name, parameter in selected.items():
        if parameter.is_complex():
            raise NetworkError(
                f"parameter {name!r} has dtype {parameter.dtype}; only real floating weights have a J: select others, "
                "by parameters=lambda name, parameter: not parameter.is_complex(), say."
            )


def _check_parameters(parameters: Mapping[str, nn.Parameter]) -> None:
    if all(parameter.is_meta for parameter in parameters.values()):
        raise NetworkError(
            "network has weights on the meta device, which hold no values: give it some first, by "
            "module.to_empty(device='cpu') and module.load_state_dict, say."
        )
    for name, parameter in parameters.items():
        if is_lazy(parameter):
            raise NetworkError(f"parameter {name!r} is not initialised yet: run the network once on an input first.")
        if not parameter.is_floating_point() and not parameter.is_complex():
            raise NetworkError(f"parameter {name!r} has dtype {parameter.dtype}; only real floating weights have a J.")
    if all(parameter.is_complex() for parameter in parameters.values()):
        raise NetworkError("all parameters of the network are complex; only real floating weights have a J.")


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
