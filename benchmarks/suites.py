"""The suites: what is run, and what it is compared with. Each returns rows of figures for one device and dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

import gpntk
from benchmarks.measure import gemm_rate, relative_error, seconds, seconds_on

Suite = Callable[[torch.device, torch.dtype], list[dict[str, Any]]]

ROWS = 2000
COLUMNS = (1, 10)
WIDTHS = (784, 512, 512, 1)


@dataclass(frozen=True)
class ProductRow:
    """One kernel-vector product K V with k columns.

    Attributes:
        columns: k.
        gpntk_s: ``NTKKernel(network)(x) @ V``, layer factors of x cached as within a CG solve.
        first_s: The same for an x not seen before: one forward and one backward pass more.
        torch_func_s: vjp then jvp by torch.func, columns by vmap (a plain call for one column, which is faster).
        gemm_fraction: 4 N P k / gpntk_s over the machine's GEMM rate.
        speedup: torch_func_s / gpntk_s.
        error: Relative error against the same product in float64.
    """

    columns: int
    gpntk_s: float
    first_s: float
    torch_func_s: float
    gemm_gflops: float
    gemm_fraction: float
    speedup: float
    error: float


def products(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """K V for an MLP 784-512-512-1 and N = 2000, k = 1 and 10, beside torch.func and the machine's GEMM rate."""
    module, x = _mlp(device, dtype)
    kernel = gpntk.NTKKernel(module, backend=gpntk.StructuredBackend)
    rate = gemm_rate(device, dtype, _layer_shapes())
    rows = []
    for columns in COLUMNS:
        v = torch.randn(ROWS, columns, device=device, dtype=dtype)
        gram = kernel(x).evaluate_kernel()
        exact = gpntk.NTKKernel(module.double())(x.double()).to_dense() @ v.double()
        module.to(dtype)
        cached = seconds(lambda v=v, gram=gram: gram @ v)
        row = ProductRow(
            columns=columns,
            gpntk_s=cached,
            first_s=seconds_on(lambda new, v=v: kernel(new).evaluate_kernel() @ v, lambda: torch.randn_like(x)),
            torch_func_s=seconds(lambda v=v: _torch_func_product(module, x, v)),
            gemm_gflops=rate / 1e9,
            gemm_fraction=4 * ROWS * kernel.num_features * columns / cached / rate,
            speedup=0.0,
            error=relative_error(gram @ v, exact),
        )
        rows.append(asdict(row) | {"speedup": row.torch_func_s / row.gpntk_s})
    return rows


def gram(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The dense Gram of the same network for new x, both passes included, beside the time of its own GEMMs.

    Its own GEMMs are A Aᵀ and G Gᵀ of every layer, in full; ours computes little more than half of each, by symmetry.
    """
    module, x = _mlp(device, dtype)
    kernel = gpntk.NTKKernel(module, backend=gpntk.StructuredBackend)
    kernel(x).to_dense()
    ours = seconds_on(lambda new: kernel(new).to_dense(), lambda: torch.randn_like(x))
    factors = [torch.randn(ROWS, width, device=device, dtype=dtype) for width in (*WIDTHS[:-1], *WIDTHS[1:])]
    own = seconds(lambda: [factor @ factor.T for factor in factors])
    exact = gpntk.NTKKernel(module.double())(x.double()).to_dense()
    error = relative_error(kernel(x).to_dense(), exact)
    return [{"rows": ROWS, "gpntk_s": ours, "own_gemms_s": own, "ratio": ours / own, "error": error}]


SUITES: dict[str, Suite] = {"products": products, "gram": gram}


def _mlp(device: torch.device, dtype: torch.dtype) -> tuple[nn.Sequential, Tensor]:
    layers = [nn.Linear(i, o) for i, o in pairwise(WIDTHS)]
    module = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2]).to(device, dtype)
    return module, torch.randn(ROWS, WIDTHS[0], device=device, dtype=dtype)


def _layer_shapes() -> list[tuple[int, int, int]]:
    """The products that the work itself consists of, and a square one."""
    return [(ROWS, WIDTHS[0], WIDTHS[1]), (ROWS, WIDTHS[1], WIDTHS[2]), (2048, 2048, 2048)]


def _torch_func_product(module: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(module, parameters, (x,)).squeeze(-1)

    _, pullback = vjp(outputs, parameters)

    def column(cotangent: Tensor) -> Tensor:
        return jvp(outputs, (parameters,), (pullback(cotangent)[0],))[1]

    return column(v[:, 0]).unsqueeze(-1) if v.shape[1] == 1 else vmap(column, in_dims=1, out_dims=1)(v)
