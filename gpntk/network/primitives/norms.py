"""Normalisation layers as a standardisation, one product and one sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def _standardized(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centered = x - x.mean(dims, keepdim=True)
    return centered * (centered.square().mean(dims, keepdim=True) + eps).rsqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _per_channel(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """A vector over channels `[C]` as it broadcasts against x `[N, C, ...]`."""
    return parameter if parameter is None else parameter.view(-1, *[1] * (x.dim() - 2))


def _layer_norm(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,  # noqa: ARG001 (only torch.layer_norm has it)
) -> Tensor:
    return _affine(_standardized(input, tuple(range(-len(normalized_shape), 0)), eps), weight, bias)


def _rms_norm(
    input: Tensor, normalized_shape: tuple[int, ...], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _affine(input * (input.square().mean(dims, keepdim=True) + eps).rsqrt(), weight, None)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,  # noqa: ARG001 (only torch.group_norm has it)
) -> Tensor:
    grouped = input.unflatten(1, (num_groups, -1))
    scaled = _standardized(grouped, tuple(range(2, grouped.dim())), eps).flatten(1, 2)
    return _affine(scaled, _per_channel(weight, input), _per_channel(bias, input))


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    scaled = _standardized(input, tuple(range(2, input.dim())), eps)
    return _affine(scaled, _per_channel(weight, input), _per_channel(bias, input))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None:
        # Mixes rows: left as it is, for the check of independent rows to find.
        return functional.batch_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)
    mean, scale = _per_channel(running_mean, input), _per_channel((running_var + eps).rsqrt(), input)
    assert mean is not None
    assert scale is not None
    return _affine((input - mean) * scale, _per_channel(weight, input), _per_channel(bias, input))


PRIMITIVES: dict[Callable[..., Any], Callable[..., Tensor]] = {
    functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    functional.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    functional.group_norm: _group_norm,
    functional.instance_norm: _instance_norm,
    functional.batch_norm: _batch_norm,
}
