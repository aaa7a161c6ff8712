"""
Jacobian products of a ResNet
=============================

A network with C outputs and P weights w has, at N inputs, a Jacobian J with N C rows
and P columns. Everything that the linearized network f(x; w + d) = f(x; w) + J(x) d can
do is said in products with it, and J itself is rarely worth its memory. This tutorial
takes a small residual network and shows

* what the products are for, and how to ask for them;
* how gpntk chooses between ways of computing them, and how to ask it what it chose and
  why;
* what they cost in time and memory, beside torch.func;
* what happens to a parameter that no rule covers, and what can be had more cheaply: a
  diagonal, one kernel for all outputs, random features, half the precision.

The weights are random and so are the images: costs do not depend on what a network has
learned. The whole file runs in about a minute. Its part about memory starts processes
of its own and needs Linux or macOS.
"""

import copy
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap
from tqdm import tqdm

import gpntk

SHAPE = (3, 16, 16)
CLASSES = 10
ROWS = 64
COLUMNS = (1, 2, 4, 8, 16, 32)
GRAM_ROWS = (8, 16, 32, 64)
MEMORY_ROWS = (64, 256, 1024)
MEBIBYTE = 2**20
LARGE_BUDGET, SMALL_BUDGET = 1024 * MEBIBYTE, 64 * MEBIBYTE

torch.manual_seed(0)
torch.set_num_threads(1)  # timings of one thread disturb each other least

# %%
# The network
# -----------
#
# Three residual blocks, of 8, 16 and 32 channels. In train mode, batch normalisation
# makes the output of an image depend on the other images of its batch, so that there is
# no J(x). In eval mode it scales and shifts by constants. A few batches in train mode
# give it running statistics, as training would; then the network is put into eval mode.


class Block(nn.Module):
    """relu(x + conv(relu(conv(x)))), each convolution followed by batch
    normalisation.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.shortcut(x) + self.body(x))


def resnet(pool: nn.Module, width: int = 8) -> nn.Sequential:
    """A ResNet in eval mode for images of the shape above, with the given pooling
    before its last layer.
    """
    stem = [
        nn.Conv2d(SHAPE[0], width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    blocks = [
        Block(width, width, 1),
        Block(width, 2 * width, 2),
        Block(2 * width, 4 * width, 2),
    ]
    network = nn.Sequential(
        *stem, *blocks, pool, nn.Flatten(), nn.Linear(4 * width, CLASSES)
    )
    with torch.no_grad():
        for _ in range(10):
            network(torch.randn(64, *SHAPE))
    return network.eval()


network = resnet(nn.AdaptiveAvgPool2d(1))

# %%
# Freezing copies the weights and makes of the network a pure function of those and of
# x. It takes x flat, a row per image, as GPs do; ``input_shape`` is what the network
# wants to see.

frozen = gpntk.freeze(network, input_shape=SHAPE)
x = torch.randn(ROWS, torch.Size(SHAPE).numel())
print(
    f"P = {frozen.num_params} parameters, C = {frozen.num_outputs(x)} outputs; x "
    f"{tuple(x.shape)}"
)

# %%
# The products
# ------------
#
# There are four, and row n C + c of J is output c of image n:
#
# * J v, with v of the size of the weights, is the change of all outputs when the
#   weights move along v. A sample of the GP is J v for a random v.
# * Jᵀ u, with u of the size of the outputs, is the gradient of uᵀ f in the weights. It
#   is the direction in which the weights move when the outputs are asked to move along
#   u, so fitting is made of it.
# * The Gram matrix J Jᵀ is the neural tangent kernel K. GP regression solves equations
#   with K + σ² I. By conjugate gradients that takes products K V = J (Jᵀ V) and never
#   K; by Cholesky it takes K.
# * The diagonal of J Jᵀ holds the prior variances. Predictive variances need it, and
#   should not pay for a Gram.
#
# Backends compute them. They take a dimension of batches first and columns second, so
# that each column is contiguous: x `[B, N, D]`, v `[B, K, P]`, u `[B, K, N C]`.

backend = gpntk.jacobians.StructuredBackend(frozen, memory_budget=LARGE_BUDGET)
v = torch.randn(1, 12, frozen.num_params)
u = torch.randn(1, 12, ROWS * CLASSES)
print("J v      ", tuple(backend.jvp(x[None], v).shape))
print("Jᵀ u     ", tuple(backend.vjp(x[None], u).shape))
print("J Jᵀ     ", tuple(backend.gram(x[None], x[None]).shape))
print("diagonal ", tuple(backend.diagonal(x[None]).shape))

# %%
# The second size of the Gram is 1 because all layers are taken together; with
# ``per_layer=True`` each has its own.
#
# `gpntk.jacobians.StructuredBackend` runs the network forwards and backwards once and
# keeps the *factors*: the input a and the derivative g of the outputs at every layer.
# The gradient of a layer's weight is a sum of products g aᵀ, over the positions that
# share the weight, so all four products are then matrix products of factors, without
# another pass.
#
# Are they right? On a few rows in float64 torch.func can form J itself.

few = x[:8].double()
module = copy.deepcopy(network).double()


def explicit_jacobian(module: nn.Module, x: Tensor) -> Tensor:
    """J `[N*C, P]` from the Jacobians of single images by torch.func."""
    weights = {name: weight.detach() for name, weight in module.named_parameters()}

    def outputs(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(module, weights, (row.reshape(1, *SHAPE),))[0]

    parts = vmap(jacrev(outputs), in_dims=(None, 0))(weights, x)
    return torch.cat([part.flatten(2).flatten(0, 1) for part in parts.values()], dim=1)


def error(value: Tensor, reference: Tensor) -> float:
    """Largest deviation over the largest reference value."""
    return ((value - reference).abs().max() / reference.abs().max()).item()


jacobian = explicit_jacobian(module, few)
v, u = v.double(), torch.randn(1, 12, 8 * CLASSES, dtype=torch.float64)
print("relative errors in float64")
print(f"J v      {error(backend.jvp(few[None], v), v @ jacobian.T):.1e}")
print(f"Jᵀ u     {error(backend.vjp(few[None], u), u @ jacobian):.1e}")
print(
    "J Jᵀ     "
    f"{error(backend.gram(few[None], few[None])[0, 0], jacobian @ jacobian.T):.1e}"
)
print(
    "diagonal "
    f"{error(backend.diagonal(few[None])[0, 0], jacobian.square().sum(-1)):.1e}"
)

# %%
# The choice
# ----------
#
# Kernels take `gpntk.AutoBackend` unless told otherwise. It chooses at the first x, by
# counting operations, bytes and calls, and can be asked what it would choose. All
# memory is counted against ``memory_budget``, in bytes. By default this is a quarter of
# the device's memory; here we give it 1 GiB and 64 MiB.

for budget in (LARGE_BUDGET, SMALL_BUDGET):
    print(f"memory_budget = {budget // MEBIBYTE} MiB")
    print(gpntk.AutoBackend.select(frozen, x, memory_budget=budget), end="\n\n")

# %%
# The tables count products with ten columns each. In a convolution many positions share
# a weight, and a product from factors visits each of them, while J has one number for
# each output. This network has more positions than outputs, so J is the cheaper thing
# to multiply with *where it fits*, and with the large budget it is chosen; with the
# small one it does not fit, and factors, which are smaller, are taken. The Gram is
# cheapest per product and dearest to make. `gpntk.NTKKernel` keeps count for you: the
# operator ``kernel(x).evaluate_kernel()`` goes over to the dense Gram, where that fits,
# once its products have cost as much as the Gram does.
#
# Time of products
# ----------------
#
# K V for k columns, in float32. All that backends keep is found by value: x that equals
# an earlier x is recognised, even if it is another tensor. That is what a solver with
# hundreds of products for one x wants. To time products with new data we must therefore
# draw another x for each. Four ways:
#
# * **torch.func**: one vjp and one jvp, columns by ``vmap``. New x or old makes no
#   difference.
# * **gpntk, new x**: `StructuredBackend`, with another x each time.
# * **gpntk, factors kept**: the same x each time.
# * **gpntk, J kept**: `DenseBackend`, which forms J at the first product and keeps it;
#   the same x each time.


def by_torch_func(x: Tensor, u: Tensor) -> Tensor:
    """J Jᵀ u `[1, K, N*C]` by a vjp and a jvp."""
    weights = {name: weight.detach() for name, weight in network.named_parameters()}

    def outputs(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(network, weights, (x.reshape(-1, *SHAPE),))

    value, pullback, *_ = vjp(outputs, weights)

    def column(u: Tensor) -> Tensor:
        return jvp(outputs, (weights,), pullback(u.view_as(value)))[1].flatten()

    # A plain call is faster than vmap for one column.
    return vmap(column)(u[0])[None] if u.shape[1] > 1 else column(u[0, 0])[None, None]


def by_backend(backend: Any, x: Tensor, u: Tensor) -> Tensor:
    """J Jᵀ u `[1, K, N*C]` by a backend of gpntk."""
    return backend.jvp(x[None], backend.vjp(x[None], u))


def seconds(
    work: Callable[[Tensor], object], prepare: Callable[[], Tensor], repeats: int = 5
) -> float:
    """Median time of ``work(prepare())`` after one warm-up, without the time of
    ``prepare``.
    """
    times = []
    for _ in range(repeats + 1):
        prepared = prepare()
        start = time.perf_counter()
        work(prepared)
        times.append(time.perf_counter() - start)
    return median(times[1:])


explicit = gpntk.jacobians.DenseBackend(frozen, memory_budget=LARGE_BUDGET)
product_times: dict[str, list[float]] = {
    "torch.func": [],
    "gpntk, new x": [],
    "gpntk, factors kept": [],
    "gpntk, J kept": [],
}
for _ in range(CLASSES):  # one column would not pay for factors; many do
    by_backend(backend, x, torch.randn(1, 1, ROWS * CLASSES))
for columns in tqdm(COLUMNS, desc="columns"):
    u = torch.randn(1, columns, ROWS * CLASSES)
    new, same = partial(torch.randn_like, x), lambda: x
    product_times["torch.func"].append(seconds(lambda x, u=u: by_torch_func(x, u), new))
    product_times["gpntk, new x"].append(
        seconds(lambda x, u=u: by_backend(backend, x, u), new)
    )
    product_times["gpntk, factors kept"].append(
        seconds(lambda x, u=u: by_backend(backend, x, u), same)
    )
    product_times["gpntk, J kept"].append(
        seconds(lambda x, u=u: by_backend(explicit, x, u), same)
    )


def print_table(
    title: str,
    sizes: tuple[int, ...],
    letter: str,
    table: dict[str, list[float]],
    digits: int,
) -> None:
    """Print one line per way of computing, with sizes across."""
    print(f"{title:<24}" + "".join(f"{f'{letter} = {size}':>11}" for size in sizes))
    for name, values in table.items():
        print(f"{name:<24}" + "".join(f"{value:>11.{digits}f}" for value in values))
    print()


print_table(
    "K V, milliseconds",
    COLUMNS,
    "k",
    {name: [1e3 * t for t in ts] for name, ts in product_times.items()},
    0,
)

# %%
# What to expect of the table:
#
# * What depends on x alone is paid once. After that a column costs matrix products
#   only, and gpntk is ahead of torch.func, the further the more columns there are.
# * For new data, factors take a backward pass for each of the C outputs, whatever the
#   number of columns. With many columns that is soon paid for. With few, gpntk runs a
#   pass per column, as torch.func does, until it has seen so many that factors would
#   have paid.
# * J, where it fits, is faster still for this network, as the table of costs foretold.
#
# Time of a Gram
# --------------
#
# The dense K `[N*C, N*C]` for new x: by gpntk's kernel with its own choice of backend,
# and from per-sample Jacobians by torch.func.

kernel = gpntk.NTKKernel(
    frozen, backend=partial(gpntk.AutoBackend, memory_budget=LARGE_BUDGET)
)


def gram_by_torch_func(x: Tensor) -> Tensor:
    """J Jᵀ from J."""
    jacobian = explicit_jacobian(network, x)
    return jacobian @ jacobian.T


gram_times: dict[str, list[float]] = {"torch.func": [], "gpntk": []}
for rows in tqdm(GRAM_ROWS, desc="rows"):
    new = partial(torch.randn, rows, x.shape[1])
    gram_times["torch.func"].append(seconds(gram_by_torch_func, new))
    gram_times["gpntk"].append(seconds(lambda x: kernel(x).to_dense(), new))
print_table(
    "Gram, milliseconds",
    GRAM_ROWS,
    "N",
    {name: [1e3 * t for t in ts] for name, ts in gram_times.items()},
    0,
)
print(f"relative error {error(kernel(x).to_dense(), gram_by_torch_func(x)):.1e}")

# %%
# With this budget gpntk has chosen to form J and to multiply, like torch.func, so there
# is no time to be gained. What it adds is the budget itself: where J does not fit, the
# Gram is made block by block.
#
# Memory
# ------
#
# The explicit J takes 4 N C P bytes and grows with N. Products of gpntk stay near a
# budget instead: if the factors of all rows do not fit half of it, they are made again,
# by chunks of rows, in each product.
#
# We measure by how much one K V with ten columns, or forming J in blocks of 32 rows,
# raises the largest resident memory of a process (``ru_maxrss``). That never falls, so
# each measurement has a process of its own, in which the same has been run on two rows
# before, to load what libraries load late. A module whose class is defined here could
# not be loaded there; what ``torch.fx`` traces from it can.

PEAK = f"""
import resource, sys, torch
from torch.func import functional_call, jacrev, vmap
import gpntk

path, way, rows, budget = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
network = torch.load(path, weights_only=False)
shape, classes = {SHAPE}, {CLASSES}
frozen = gpntk.freeze(network, input_shape=shape)
backend = gpntk.jacobians.StructuredBackend(frozen, memory_budget=budget)
weights = {{name: weight.detach() for name, weight in network.named_parameters()}}

def outputs(weights, row):
    return functional_call(network, weights, (row.reshape(1, *shape),))[0]

def form_jacobian(x):
    num_params = sum(weight.numel() for weight in weights.values())
    jacobian = torch.empty(len(x), classes, num_params)
    for rows in torch.arange(len(x)).split(32):
        parts = vmap(jacrev(outputs), in_dims=(None, 0))(weights, x[rows])
        flat = [part.flatten(2) for part in parts.values()]
        torch.cat(flat, dim=2, out=jacobian[rows[0] : rows[-1] + 1])

def multiply(x):
    backend.jvp(x[None], backend.vjp(x[None], torch.randn(1, 10, len(x) * classes)))

def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

x = torch.randn(rows, torch.Size(shape).numel())
work = {{"products": multiply, "jacobian": form_jacobian}}[way]
work(x[:2].clone())
before = peak()
work(x)
print(peak() - before)
"""


def peak_memory(path: Path, way: str, rows: int) -> float:
    """MiB by which the work raises the peak memory of a fresh process, for the
    network saved at ``path``.
    """
    command = [sys.executable, "-c", PEAK, str(path), way, str(rows), str(SMALL_BUDGET)]
    # By way of a shell, which is small: Linux counts what the parent process held until
    # then as the child's.
    shell = ["sh", "-c", '"$@"; exit $?', "sh", *command]
    return (
        int(subprocess.run(shell, stdout=subprocess.PIPE, text=True, check=True).stdout)
        / MEBIBYTE
    )


memory: dict[str, list[float]] = {}
with (
    TemporaryDirectory() as folder,
    ThreadPoolExecutor(2) as pool,
):  # two at once, since nothing is timed here
    path = Path(folder, "network.pt")
    torch.save(torch.fx.symbolic_trace(network), path)
    for name, way in {"explicit J": "jacobian", "gpntk, K V": "products"}.items():
        peaks = pool.map(partial(peak_memory, path, way), MEMORY_ROWS)
        memory[name] = list(tqdm(peaks, total=len(MEMORY_ROWS), desc=name))
print_table("peak memory, MiB", MEMORY_ROWS, "N", memory, 0)
print(f"budget of gpntk: {SMALL_BUDGET / MEBIBYTE:.0f} MiB")

# %%
# The budget is kept by counting, not by force: what a library takes inside an operation
# is not in the count, so the peak may lie somewhat above it. It does not grow with N.
#
# A parameter without a rule
# --------------------------
#
# Rules belong to functions: convolutions, linear maps, sums and products with a
# parameter, and more. No rule covers the exponent of generalised-mean pooling, which
# raises all activations to a power that is learned.


class GeneralisedMean(nn.Module):
    """(mean of x^p over positions)^(1/p) for a learned p: between the average and
    the maximum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([3.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp_min(1e-6).pow(self.p).mean((-2, -1)).pow(1 / self.p)


pooled = resnet(GeneralisedMean())
frozen_pooled = gpntk.freeze(pooled, input_shape=SHAPE)
choice = gpntk.AutoBackend.select(frozen_pooled, x, memory_budget=SMALL_BUDGET)
print(choice)
u = torch.randn(1, 12, ROWS * CLASSES)
jacobian = explicit_jacobian(pooled, x)
print(
    "relative error of K V "
    f"{error(by_backend(choice.backend, x, u), u @ jacobian @ jacobian.T):.1e}"
)

# %%
# That one parameter goes by automatic differentiation, and all others by their rules.
# `StructuredBackend` by itself says no, and names the parameter.

try:
    gpntk.jacobians.StructuredBackend(frozen_pooled).check(x[None])
except gpntk.errors.UnruledError as refusal:
    print(refusal)

# %%
# Less than everything
# --------------------
#
# **The diagonal.** ``kernel(x, diag=True)`` costs as much as the Grams of single
# images.

gram = kernel(x).to_dense()
diagonal = kernel(x, diag=True)
print(
    f"diagonal {tuple(diagonal.shape)}, relative error "
    f"{error(diagonal, gram.diagonal()):.1e}"
)

# %%
# **One kernel for all outputs.** The full Gram couples all outputs of all images. With
# ``output="independent"`` each output is a GP of its own, and all share one kernel: the
# average of theirs.

independent = gpntk.NTKKernel(
    frozen,
    output="independent",
    backend=partial(gpntk.AutoBackend, memory_budget=LARGE_BUDGET),
)
average = gram.reshape(ROWS, CLASSES, ROWS, CLASSES).diagonal(dim1=1, dim2=3).mean(-1)
shared = independent(x).to_dense()
print(
    f"full {tuple(gram.shape)}, shared {tuple(shared.shape)}, relative error "
    f"{error(shared, average):.1e}"
)

# %%
# **Random features.** `gpntk.SketchedNTKKernel` replaces the P features of an output by
# F random combinations of them. The kernel stays positive semi-definite and is right on
# average. Its error falls like 1/√F; here as the root of the mean square over all
# entries, relative to √(k(x, x) k(x', x')).

scale = gram.diagonal().sqrt()
for features in (128, 512, 2048):
    sketched = gpntk.SketchedNTKKernel(frozen, num_features=features)
    deviation = (
        ((sketched(x).to_dense() - gram) / scale / scale[:, None])
        .square()
        .mean()
        .sqrt()
        .item()
    )
    print(f"F = {features:<5} error {deviation:.3f}   1/√F = {features**-0.5:.3f}")

# %%
# **Half the precision.** With ``precision="bfloat16"`` factors are kept in 16 bits,
# which halves their memory; sums are accumulated in 32. That is for hardware that is
# fast in bfloat16, and for solves with noise well above this error.

half = gpntk.jacobians.StructuredBackend(
    frozen, memory_budget=LARGE_BUDGET, precision="bfloat16"
)
for name, candidate in {"float32": backend, "bfloat16": half}.items():
    product = by_backend(candidate, x, u)
    gram_error = error(candidate.gram(x[None], x[None])[0, 0], gram)
    print(
        f"{name:<9} relative error of K V "
        f"{error(product, (gram @ u[0].T).T[None]):.1e}, of K {gram_error:.1e}"
    )

# %%
# The picture
# -----------
#
# Left: time of K V against the number of columns. Right: peak memory against the number
# of rows; the dotted line is the budget.

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
for name, values in product_times.items():
    left.plot(COLUMNS, values, marker="o", label=name)
for name, values in memory.items():
    right.plot(MEMORY_ROWS, values, marker="o", label=name)
right.axhline(SMALL_BUDGET / MEBIBYTE, color="black", linewidth=0.8, linestyle=":")
for axes, sizes in ((left, COLUMNS), (right, MEMORY_ROWS)):
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.minorticks_off()
    axes.legend(fontsize="small")
right.yaxis.minorticks_off()
powers = [2**exponent for exponent in range(5, 11)]
right.set_yticks(powers, [str(power) for power in powers])
left.set_xlabel("columns k")
left.set_ylabel("seconds for K V")
right.set_xlabel("rows N")
right.set_ylabel("peak memory, MiB")
left.set_title(f"N = {ROWS} rows, C = {CLASSES} outputs, P = {frozen.num_params}")
right.set_title("ten columns, or forming J")

path = Path("jacobian_products.png")
figure.savefig(path, dpi=150)
print(f"Picture saved to {path}")
