"""Noise that differs between inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpntk.errors import InputError


def relative_noise(network: nn.Module, x: Tensor, num_outputs: int) -> Tensor:
    """Noise variances `[N, C]`, up to a common factor, at x `[N, D]`, from a network that returns their logarithms.

    Raises:
        InputError: The network returns values of the wrong shape, or such as are not finite.
    """
    weights = next(network.parameters(), x)
    with torch.no_grad():
        logs = network(x.to(weights))
    shapes = ((len(x),), (len(x), 1), (len(x), num_outputs))
    if logs.shape not in shapes or not torch.isfinite(logs).all():
        raise InputError(
            f"noise_network returned shape {tuple(logs.shape)}, or values that are not finite: it must map inputs to "
            f"the logarithm of the noise variance, [{len(x)}] or [{len(x)}, {num_outputs}]."
        )
    return logs.to(x).reshape(len(x), -1).exp().expand(-1, num_outputs)
