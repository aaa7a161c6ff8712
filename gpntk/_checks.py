"""Checks of arguments, made once at a public entry; inside, code trusts them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gpntk.errors import InputError


def check_input(x: Tensor, device: torch.device, name: str = "x") -> None:
    """Raise `InputError` unless ``x`` is a real floating `[..., N, D]` tensor on ``device``."""
    if x.dim() < 2:
        raise InputError(f"{name} must be [..., N, D], got shape {tuple(x.shape)}: add the row dimension.")
    if not x.dtype.is_floating_point:
        raise InputError(
            f"{name} must be floating point, got {x.dtype}: pass {name}.float() or {name}.double(), and let a network "
            "that needs integers (token ids, say) cast its own input."
        )
    if forward_ad.unpack_dual(x).tangent is not None:
        raise InputError(f"{name} carries a forward-mode tangent; kernels are differentiable in reverse mode only.")
    if x.device != device:
        raise InputError(
            f"{name} is on {x.device} but the network's frozen weights are on {device}: move the kernel with "
            f"kernel.to({str(x.device)!r}), or move {name}."
        )
