"""Kernels of wide random networks by sampling, for architectures whose limit has no formula here."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gpntk.errors import InputError
from gpntk.jacobians import AutoBackend, AverageBackend
from gpntk.network import FrozenNetwork


class SampledKernels(NamedTuple):
    """Estimates `[N, M]` and their standard errors.

    Attributes:
        nngp: Mean over networks and outputs of f(x) f(x'); nngp_error: of that.
        ntk: Mean over networks and outputs of J(x) J(x')ᵀ; ntk_error: of that.
    """

    nngp: Tensor
    nngp_error: Tensor
    ntk: Tensor
    ntk_error: Tensor


def monte_carlo(
    network_factory: Callable[[], nn.Module], x1: Tensor, x2: Tensor | None = None, num_samples: int = 64
) -> SampledKernels:
    """NNGP and NTK of random networks, averaged over ``num_samples`` of them and over their outputs.

    The kernels of a network of finite width, in the parametrization that the module has, deviate from the limit by
    O(1/width) on average. Standard errors are of the mean over networks: they say nothing of that deviation.

    Args:
        network_factory: Makes a network with fresh random weights, such as ``lambda: Net()``; many outputs reduce the
            variance of the NNGP.
        x1: Inputs `[N, ...]` as the network takes them.
        x2: Inputs `[M, ...]`; default x1.
        num_samples: Networks, at least 2.

    Raises:
        InputError: Fewer than 2 samples.

    Example:
        >>> import torch
        >>> from gpntk.infinite import monte_carlo
        >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(3, 50), torch.nn.Softmax(-1), torch.nn.Linear(50, 8))
        >>> monte_carlo(make, torch.randn(4, 3), num_samples=3).ntk.shape
        torch.Size([4, 4])

    References:
        Novak et al. (2019), Bayesian Deep Convolutional Networks with Many Channels are Gaussian Processes, section 4.
    """
    if num_samples < 2:
        raise InputError(f"num_samples={num_samples}: a standard error takes at least 2 networks.")
    x2 = x1 if x2 is None else x2
    one, two = (x.flatten(1) for x in (x1, x2))
    shape = tuple(x1.shape[1:])
    nngps, ntks = [], []
    for _ in range(num_samples):
        network = FrozenNetwork(network_factory().eval(), input_shape=shape if len(shape) > 1 else None)
        with torch.no_grad():
            outputs, others = network(one), network(two)
            nngps.append(outputs @ others.mT / outputs.shape[1])
            backend = AverageBackend(network, AutoBackend)
            ntks.append(backend.gram(one.unsqueeze(0), two.unsqueeze(0))[0, 0])
    return SampledKernels(*_mean_and_error(nngps), *_mean_and_error(ntks))


def _mean_and_error(samples: list[Tensor]) -> tuple[Tensor, Tensor]:
    stacked = torch.stack(samples)
    return stacked.mean(0), stacked.std(0) / len(samples) ** 0.5
