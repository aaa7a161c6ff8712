"""Activations with parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def _prelu(input: Tensor, weight: Tensor) -> Tensor:
    # Under two nested vmaps of one size, torch 2.13 gets the derivative of the fused function wrong without a word.
    slope = weight if weight.numel() == 1 else weight.view(-1, *[1] * (input.dim() - 2))
    return torch.where(input > 0, input, input * slope)


PRIMITIVES: dict[Callable[..., Any], Callable[..., Tensor]] = {functional.prelu: _prelu, torch.prelu: _prelu}
