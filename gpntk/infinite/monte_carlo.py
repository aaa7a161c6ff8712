"""Kernels of wide random networks by sampling, for architectures whose limit has no formula here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gpntk._checks import check_count, check_functions, check_input, check_tensors
from gpntk.errors import InputError
from gpntk.jacobians import AbstractJacobianBackend, AutoBackend, AverageBackend, DenseBackend
from gpntk.network import FrozenNetwork


class SampledKernels(NamedTuple):
    """Estimates `[N, M]` and their standard errors.

    Attributes:
        nngp: Mean over networks and outputs of f(x) f(x').
        nngp_error: The standard error of ``nngp``, with ``num_samples - 1`` degrees of freedom.
        ntk: Mean over networks and outputs of J(x) J(x')ᵀ.
        ntk_error: The standard error of ``ntk``.
    """

    nngp: Tensor
    nngp_error: Tensor
    ntk: Tensor
    ntk_error: Tensor


def monte_carlo(
    network_factory: Callable[[], nn.Module], x1: Tensor, x2: Tensor | None = None, num_samples: int = 64
) -> SampledKernels:
    """NNGP and NTK of random networks, averaged over ``num_samples`` of them and over their outputs.

    They are those of the networks that the factory makes: of their widths, in the parametrization that they have. On
    average these deviate from the limit of infinite width by O(1/width); a single network does by O(1/√width). The
    standard errors are of the mean over networks, s/√S with s² the unbiased variance over the S networks: they say
    nothing of the deviation from the limit, which another width will show. For intervals with few networks take
    Student's t with S - 1 degrees of freedom.

    Cost: for every network a forward pass and, for every output, a Gram matrix. More outputs reduce the variance of
    the NNGP, whose single draws deviate by more than their mean; for the NTK more networks do more.

    Args:
        network_factory: Makes a network with fresh random weights, such as ``lambda: Net()``. It is put into eval mode.
        x1: Inputs `[N, ...]` as the network takes them.
        x2: Inputs `[M, ...]`; default x1.
        num_samples: S, at least 2.

    Raises:
        InputError: Fewer than 2 samples, inputs of two shapes, or a factory that returns the same weights again.
        NetworkError: A network cannot be differentiated as it is.

    Example:
        >>> import torch
        >>> from gpntk.infinite import monte_carlo
        >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(3, 50), torch.nn.Softmax(-1), torch.nn.Linear(50, 8))
        >>> monte_carlo(make, torch.randn(4, 3), num_samples=3).ntk.shape
        torch.Size([4, 4])

    References:
        Novak et al. (2019), Bayesian Deep Convolutional Networks with Many Channels are Gaussian Processes, section 4.
        Hanin and Nica (2020), Finite Depth and Width Corrections to the Neural Tangent Kernel,
        https://arxiv.org/abs/1909.05989, on how the NTK of one network varies.
    """
    check_functions(network_factory=network_factory)
    check_count(2, num_samples=num_samples)  # fewer have no standard error
    x2 = x1 if x2 is None else x2
    check_tensors(x1=x1)
    for name, x in (("x1", x1), ("x2", x2)):
        check_input(x, x1.device, name)
        if not x.numel():
            raise InputError(f"{name} has shape {tuple(x.shape)}: give at least one row.")
    if x1.shape[1:] != x2.shape[1:]:
        raise InputError(f"x1 has inputs of shape {tuple(x1.shape[1:])} and x2 of {tuple(x2.shape[1:])}.")
    one, two = (x.flatten(1) for x in (x1, x2))
    nngp, ntk = _Mean(), _Mean()
    backend: Callable[[FrozenNetwork], AbstractJacobianBackend] = AutoBackend
    for index, network in enumerate(_networks(network_factory, tuple(x1.shape[1:]), num_samples)):
        if not index and isinstance(AutoBackend.select(network.select_output(0), one).backend, DenseBackend):
            # Formed without the check of the layers' rules, which takes longer than the Jacobian itself.
            backend = DenseBackend
        with torch.no_grad():
            outputs, others = network(one), network(two)
            nngp.add(outputs @ others.mT / outputs.shape[1])
            ntk.add(AverageBackend(network, backend).gram(one.unsqueeze(0), two.unsqueeze(0))[0, 0])
    return SampledKernels(nngp.value, nngp.error, ntk.value, ntk.error)


class _Mean:
    """The mean of tensors that come one by one, and its standard error, without keeping them (Welford's recursion)."""

    def __init__(self) -> None:
        self.value = self._squares = torch.zeros((), device="cpu")
        self._count = 0

    def add(self, sample: Tensor) -> None:
        self._count += 1
        change = sample - self.value.to(sample)
        self.value = self.value.to(sample) + change / self._count
        self._squares = self._squares.to(sample) + change * (sample - self.value)

    @property
    def error(self) -> Tensor:
        return (self._squares / (self._count * (self._count - 1))).sqrt()


def _networks(factory: Callable[[], nn.Module], shape: tuple[int, ...], count: int) -> Iterator[FrozenNetwork]:
    """``count`` frozen networks, the second of which must differ from the first."""
    first: list[Tensor] = []
    for index in range(count):
        module = factory()
        if not isinstance(module, nn.Module):
            raise InputError(f"network_factory() is a {type(module).__name__}: make it return an nn.Module.")
        network = FrozenNetwork(module.eval(), input_shape=shape if len(shape) > 1 else None)
        if not index:
            first = list(network.buffers())
        elif index == 1 and all(map(torch.equal, first, network.buffers())):
            raise InputError("network_factory() returned the same weights twice: it must draw new ones at every call.")
        yield network
