"""The suites: what is run, and what it is compared with. Each returns rows of figures for one device and dtype."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

import gpntk
from benchmarks import (
    inference_suites,
    infinite_botorch,
    infinite_classification,
    infinite_suites,
    laplace_suites,
    networks,
    no_cliff,
    raster,
    transfer_speed,
)
from benchmarks.measure import gemm_rate, relative_error, seconds, seconds_on
from gpntk.cost import Machine
from gpntk.jacobians import AbstractJacobianBackend
from tests.architectures import GPT, Recurrent, ResNet, lenet

Suite = Callable[[torch.device, torch.dtype], list[dict[str, Any]]]

ROWS = 2000
COLUMNS = (1, 10, 32)
WIDTHS = (784, 512, 512, 1)


@dataclass(frozen=True)
class ProductRow:
    """One kernel-vector product K V with k columns.

    Attributes:
        rows: N.
        columns: k.
        gpntk_s: J (Jᵀ V) by `StructuredBackend`, layer factors of x kept as within a CG solve.
        new_s: The same for an x not seen before: one forward and one backward pass more.
        gram_s: ``NTKKernel(network)(x) @ V`` once enough products were made, so that it goes by the dense Gram.
        torch_func_s: vjp then jvp by torch.func, columns by vmap (a plain call for one column, which is faster).
        gemm_fraction: 4 N P k / gpntk_s over the machine's GEMM rate.
        speedup: torch_func_s / gpntk_s.
        error: Relative error against the same product in float64.
    """

    rows: int
    columns: int
    gpntk_s: float
    new_s: float
    gram_s: float
    torch_func_s: float
    gemm_gflops: float
    gemm_fraction: float
    speedup: float
    error: float


def products(
    device: torch.device, dtype: torch.dtype, count: int = ROWS, columns: Sequence[int] = COLUMNS
) -> list[dict[str, Any]]:
    """K V for an MLP 784-512-512-1 and N = 2000, beside torch.func and the machine's GEMM rate."""
    module, x = _mlp(device, dtype, count)
    network = gpntk.freeze(module)
    backend = gpntk.jacobians.StructuredBackend(network)
    gram = gpntk.NTKKernel(module)(x).evaluate_kernel()  # pyright: ignore[reportAttributeAccessIssue]
    seconds(lambda: gram @ torch.ones(count, 32, device=device, dtype=dtype))
    rate = gemm_rate(device, dtype, _layer_shapes(count))
    rows = []
    for k in columns:
        v = torch.randn(count, k, device=device, dtype=dtype)
        exact = gpntk.NTKKernel(module.double())(x.double()).to_dense() @ v.double()
        module.to(dtype)
        kept = seconds(lambda v=v: _product(backend, x, v))
        row = ProductRow(
            rows=count,
            columns=k,
            gpntk_s=kept,
            new_s=seconds_on(lambda new, v=v: _product(backend, new, v), lambda: torch.randn_like(x)),
            gram_s=seconds(lambda v=v: gram @ v),
            torch_func_s=seconds(lambda v=v: torch_func_product(module, x, v)),
            gemm_gflops=rate / 1e9,
            gemm_fraction=4 * count * network.num_params * k / kept / rate,
            speedup=0.0,
            error=relative_error(_product(backend, x, v), exact),
        )
        rows.append(asdict(row) | {"speedup": row.torch_func_s / row.gpntk_s})
    return rows


def convolutions(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """K V with k = 8 for LeNet (28 x 28) and ResNet-18 (32 x 32), C = 10, beside torch.func on all rows and by chunks.

    `kept`: factors of x at hand. `new`: an x not seen before. `recomputed`: under a budget too small to keep them.
    torch.func runs all rows at once, and in chunks of the size that suited it best of 4 and 16.
    """
    rows = []
    for name, made, shape, count in (
        ("lenet", lenet(28), (1, 28, 28), 1000),
        ("resnet-18", ResNet(), (3, 32, 32), 64),
    ):
        module = made.eval().to(device, dtype)
        x, v = (
            torch.randn(count, *shape, device=device, dtype=dtype),
            torch.randn(10 * count, 8, device=device, dtype=dtype),
        )
        network = gpntk.freeze(module, input_shape=shape)
        # A budget that holds the factors of all rows, 1.6 GB for the ResNet, in its quarter.
        backend, flat = gpntk.jacobians.StructuredBackend(network, memory_budget=2**33), x.flatten(1)
        kept = seconds(lambda b=backend, x=flat, v=v: _product(b, x, v), 2)
        cost = next(cost for cost in backend.costs(flat[None], 8) if cost.strategy == "factors, kept")
        tight = gpntk.jacobians.StructuredBackend(network, memory_budget=int(cost.kept))
        whole = seconds(lambda m=module, x=x, v=v: torch_func_product(m, x, v), 1)
        chunked = min(
            seconds(lambda m=module, x=x, v=v, n=size: torch_func_by_chunks(m, x, v, n), 1) for size in (4, 16)
        )
        row = {
            "network": name,
            "rows": count,
            "kept_s": kept,
            "new_s": seconds_on(
                lambda new, b=backend, v=v: _product(b, new, v), lambda x=flat: torch.randn_like(x), repeats=1
            ),
            "recomputed_s": seconds(lambda b=tight, x=flat, v=v: _product(b, x, v), 1),
            "torch_func_s": whole,
            "torch_func_chunks_s": chunked,
            "speedup_kept": min(whole, chunked) / kept,
            "error": relative_error(_product(backend, flat, v), torch_func_product(module, x, v).double()),
        }
        rows.append(row | {"speedup_new": min(whole, chunked) / row["new_s"]})
    return rows


def small(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """K V for an MLP 1-30-1, N = 2000, k = 10: what `AutoBackend` chooses, beside a plain explicit Jacobian."""
    module = nn.Sequential(nn.Linear(1, 30), nn.Tanh(), nn.Linear(30, 1)).to(device, dtype)
    x, v = torch.randn(ROWS, 1, device=device, dtype=dtype), torch.randn(ROWS, 10, device=device, dtype=dtype)
    backend = gpntk.AutoBackend(gpntk.freeze(module))
    explicit = backend.jacobian(x[None])[0].clone()
    ours = seconds(lambda: _product(backend, x, v), 51)
    plain = seconds(lambda: explicit @ (explicit.mT @ v), 51)
    chosen = type(backend.choice(x[None]).backend).__name__
    return [
        {"rows": ROWS, "columns": 10, "chosen": chosen, "gpntk_s": ours, "explicit_s": plain, "ratio": ours / plain}
    ]


def gram(device: torch.device, dtype: torch.dtype, count: int = ROWS) -> list[dict[str, Any]]:
    """The dense Gram of the same network for new x, both passes included, beside the time of its own GEMMs.

    Its own GEMMs are A Aᵀ and G Gᵀ of every layer, in full; ours computes little more than half of each, by symmetry.
    """
    module, x = _mlp(device, dtype, count)
    kernel = gpntk.NTKKernel(module, backend=gpntk.jacobians.StructuredBackend)
    kernel(x).to_dense()
    ours = seconds_on(lambda new: kernel(new).to_dense(), lambda: torch.randn_like(x))
    factors = [torch.randn(count, width, device=device, dtype=dtype) for width in (*WIDTHS[:-1], *WIDTHS[1:])]
    own = seconds(lambda: [factor @ factor.T for factor in factors])
    exact = gpntk.NTKKernel(module.double())(x.double()).to_dense()
    error = relative_error(kernel(x).to_dense(), exact)
    return [{"rows": count, "gpntk_s": ours, "own_gemms_s": own, "ratio": ours / own, "error": error}]


def strategies(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Whether the counted costs of a product (k = 8) rank the strategies as the clock does, for seven networks.

    `measured` and `counted` are milliseconds, in the order: factors kept, recomputed, Gram, dense Jacobian, autodiff.
    `agreement` is the share of pairs of strategies in the same order, pairs within 20 % on the clock left out.
    """
    rows = []
    for name, made, shape, count in _architectures():
        module = made.eval().to(device, dtype)
        network = gpntk.freeze(module, input_shape=shape)
        x = torch.randn(count, *shape, device=device, dtype=dtype).flatten(1)
        backend = gpntk.jacobians.StructuredBackend(network)
        v = torch.randn(count * backend.num_outputs(x), 8, device=device, dtype=dtype)
        costs = {cost.strategy: cost for cost in backend.costs(x[None], 8)}
        tight = gpntk.jacobians.StructuredBackend(network, memory_budget=int(costs["factors, kept"].kept))
        dense, passes = gpntk.jacobians.DenseBackend(network, 2**33), gpntk.jacobians.AutodiffBackend(network)
        gram = backend.gram(x[None], x[None])[0, 0]
        ways = {
            "factors, kept": lambda b=backend, x=x, v=v: _product(b, x, v),
            "factors, recomputed": lambda b=tight, x=x, v=v: _product(b, x, v),
            "Gram": lambda g=gram, v=v: g @ v,
            "dense Jacobian": lambda b=dense, x=x, v=v: _product(b, x, v),
            "autodiff": lambda b=passes, x=x, v=v: _product(b, x, v),
        }
        measured = {way: seconds(run, 3) for way, run in ways.items()}
        counted = {way: costs[way].product.seconds(Machine()) for way in ways}
        pairs = [(a, b) for a, b in combinations(ways, 2) if not 0.8 < measured[a] / measured[b] < 1.25]
        same = [(measured[a] < measured[b]) == (counted[a] < counted[b]) for a, b in pairs]
        rows.append(
            {
                "network": name,
                "rows": count,
                "measured_ms": " / ".join(f"{1e3 * value:.3g}" for value in measured.values()),
                "counted_ms": " / ".join(f"{1e3 * value:.3g}" for value in counted.values()),
                "fastest": min(measured, key=measured.__getitem__),
                "cheapest": min(counted, key=counted.__getitem__),
                "agreement": sum(same) / max(1, len(same)),
            }
        )
    return rows


def budget(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Memory beyond data and results, each product in a fresh process, against the budget that it was given."""
    rows = []
    for name, limit in product(("mlp", "lenet", "resnet"), (2**26, 2**28)):
        for work in ("vjp", "jvp", "gram", "diagonal"):
            arguments = [name, work, str(limit), str(device), str(dtype).removeprefix("torch.")]
            command = [sys.executable, "-m", "benchmarks.peak", *arguments, str(torch.get_num_threads())]
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
            rows.append(json.loads(done.stdout))
    return rows


SUITES: dict[str, Suite] = {
    "products": products,
    "gram": gram,
    "convolutions": convolutions,
    "small": small,
    "strategies": strategies,
    "budget": budget,
    **inference_suites.SUITES,
    **infinite_suites.SUITES,
    **infinite_classification.SUITES,
    **infinite_botorch.SUITES,
    **transfer_speed.SUITES,
    **no_cliff.SUITES,
    **raster.SUITES,
    **laplace_suites.SUITES,
    **networks.SUITES,
}


def _architectures() -> list[tuple[str, nn.Module, tuple[int, ...], int]]:
    small_resnet = ResNet(depths=(1, 1), width=16)
    return [
        ("mlp 784-512-512-1", _mlp(torch.device("cpu"), torch.float32)[0], (784,), 500),
        ("mlp 1-30-1", nn.Sequential(nn.Linear(1, 30), nn.Tanh(), nn.Linear(30, 1)), (1,), 1000),
        (
            "mlp 9-64-64-1",
            nn.Sequential(nn.Linear(9, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)),
            (9,),
            1000,
        ),
        ("lenet", lenet(28), (1, 28, 28), 100),
        ("resnet, 2 blocks", small_resnet, (3, 16, 16), 32),
        ("lstm", Recurrent(nn.LSTM, 8, 32), (20, 8), 200),
        ("gpt", GPT(vocab=50, context=16, dim=32, depth=2, heads=2), (16,), 100),
    ]


def _product(backend: AbstractJacobianBackend, x: Tensor, v: Tensor) -> Tensor:
    """J Jᵀ v `[N*C, K]`."""
    return backend.jvp(x[None], backend.vjp(x[None], v.mT[None]))[0].mT


def _mlp(device: torch.device, dtype: torch.dtype, count: int = ROWS) -> tuple[nn.Sequential, Tensor]:
    layers = [nn.Linear(i, o) for i, o in pairwise(WIDTHS)]
    module = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2]).to(device, dtype)
    return module, torch.randn(count, WIDTHS[0], device=device, dtype=dtype)


def _layer_shapes(count: int) -> list[tuple[int, int, int]]:
    """The products that the work itself consists of, and a square one."""
    return [(count, WIDTHS[0], WIDTHS[1]), (count, WIDTHS[1], WIDTHS[2]), (2048, 2048, 2048)]


def torch_func_product(module: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    """K v `[N*C, K]` by torch.func."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(module, parameters, (x,)).flatten()

    _, pullback, *_ = vjp(outputs, parameters)

    def column(cotangent: Tensor) -> Tensor:
        return jvp(outputs, (parameters,), (pullback(cotangent)[0],))[1]

    return column(v[:, 0]).unsqueeze(-1) if v.shape[1] == 1 else vmap(column, in_dims=1, out_dims=1)(v)


def torch_func_by_chunks(module: nn.Module, x: Tensor, v: Tensor, size: int) -> Tensor:
    """K v by torch.func on chunks of rows, as a careful user would write it."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    outputs = v.shape[0] // x.shape[0]
    total: dict[str, Tensor] = {}
    for start in range(0, len(x), size):
        rows = x[start : start + size]
        _, pullback, *_ = vjp(lambda p, rows=rows: functional_call(module, p, (rows,)).flatten(), parameters)
        part = vmap(lambda c, pull=pullback: pull(c)[0], in_dims=1)(v[start * outputs : (start + size) * outputs])
        total = {name: total[name] + value if total else value for name, value in part.items()}
    done = []
    for start in range(0, len(x), size):
        rows = x[start : start + size]
        done.append(
            vmap(
                lambda t, rows=rows: jvp(lambda p: functional_call(module, p, (rows,)).flatten(), (parameters,), (t,))[
                    1
                ]
            )(total)
        )
    return torch.cat(done, 1).mT
