"""
An exact GP on a quarter of a million points
============================================

A Gaussian process on N points is often said to cost N³ operations and N² numbers. With
N = 250,000 the matrix alone would take 500 GB. The GP that a network defines has F
features, one for each of its weights, and F is often far smaller than N: then
everything can be exact at a cost that grows with N only in proportion. This tutorial

* trains a small network on a noisy map, and makes what it misses the data of a GP;
* asks gpntk by which solver it would compute the posterior, and why, and takes another
  one;
* finds scale and noise by the marginal likelihood of all points;
* solves by conjugate gradients, looks at what is reported of the solve, and provokes
  solves that fail;
* draws means, standard deviations and samples, checks the error bars, and adds points
  afterwards;
* does the same in GPyTorch, and on data that stay on disk.

The map is synthetic; nothing is downloaded. As it stands the file uses N = 20,000
points and runs on one thread in about half a minute. With ``--full`` it uses 250,000
points and all cores, and takes some minutes.
"""

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import gpytorch
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

import gpntk
from gpntk.cost import Work
from gpntk.errors import SolveError
from gpntk.inference import (
    AutoSolver,
    ConjugateGradients,
    FeatureCovariance,
    Features,
    FunctionSpace,
    Nystrom,
    Posterior,
    SampledGram,
    StreamedFeatures,
    WeightSpace,
    WhitenedSystem,
    log_evidence,
)
from gpntk.inference.factors import SpectralFactor
from gpntk.inference.hyperposterior import Hyperparameter, infer
from gpntk.inference.preconditioners import AbstractPreconditioner, Counted
from gpntk.inference.system import Sizes

parser = argparse.ArgumentParser(description="An exact GP on many points.")
parser.add_argument(
    "--full", action="store_true", help="250,000 points in place of 20,000"
)
arguments, _ = parser.parse_known_args()  # a notebook has arguments of its own

ROWS = 250_000 if arguments.full else 20_000
TEST_ROWS = 2000
UNITS = 32  # of each hidden layer; F grows with its square
NOISE = 0.1
LAKE, RADIUS = torch.tensor([0.35, -0.3]), 0.15

if not arguments.full:
    torch.set_num_threads(
        1
    )  # on a busy machine threads that wait for each other cost more than they gain
torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print how long the block took."""
    start = time.perf_counter()
    yield
    print(f"{time.perf_counter() - start:7.2f} s  {what}")


# %%
# The data
# --------
#
# A field over the square [-1, 1]² with structure at three scales, seen at random places
# with noise of standard deviation 0.1. One disc, the lake, has no measurements. Test
# points have noise too, so that no RMSE can be much below 0.1.

WAVES = [
    (
        frequency * torch.randn(64, 2, generator=generator),
        2 * math.pi * torch.rand(64, generator=generator),
        height,
    )
    for frequency, height in ((2.0, 1.0), (6.0, 0.5), (15.0, 0.25))
]


def field(x: Tensor) -> Tensor:
    """The true value `[N]` at the places x `[N, 2]`: waves in random directions, the
    shorter the lower.
    """
    return sum(
        height / math.sqrt(32) * (x @ waves.mT + phases).cos().sum(-1)
        for waves, phases, height in WAVES
    )


def in_lake(x: Tensor) -> Tensor:
    """Whether a place is in the lake `[N]`."""
    return (x - LAKE).norm(dim=-1) < RADIUS


def measure(x: Tensor) -> Tensor:
    """Noisy values `[N]` at the places x `[N, 2]`."""
    return field(x) + NOISE * torch.randn(len(x), generator=generator)


places = 2 * torch.rand(2 * (ROWS + TEST_ROWS), 2, generator=generator) - 1
places, wet = places[~in_lake(places)], places[in_lake(places)]
x, x_test = places[:ROWS], places[ROWS : ROWS + TEST_ROWS]
y, y_test = measure(x), measure(x_test)
print(f"N = {len(x)} points to learn from, {len(x_test)} to test on")

# %%
# The network
# -----------
#
# Three hidden layers of 32 units, trained by Adam on batches of 512. It finds the large
# shapes and misses the small ones.


def train(steps: int = 1500) -> nn.Sequential:
    """A network that approximates the field; in eval mode, as GPs need it."""
    hidden = [
        nn.Linear(2, UNITS),
        nn.Tanh(),
        nn.Linear(UNITS, UNITS),
        nn.Tanh(),
        nn.Linear(UNITS, UNITS),
        nn.Tanh(),
    ]
    network = nn.Sequential(*hidden, nn.Linear(UNITS, 1))
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-2, total_steps=steps
    )
    for _ in range(steps):
        batch = torch.randint(len(x), (512,), generator=generator)
        optimizer.zero_grad()
        (network(x[batch]).squeeze(-1) - y[batch]).square().mean().backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def rmse(error: Tensor) -> float:
    """Root mean square."""
    return error.square().mean().sqrt().item()


with timed("training"):
    network = train()
with torch.no_grad():
    residual, residual_test = (
        y - network(x).squeeze(-1),
        y_test - network(x_test).squeeze(-1),
    )
print(f"test RMSE of the network {rmse(residual_test):.3f}; noise {NOISE}")

# %%
# The posterior, twice
# --------------------
#
# To first order in a move d of its weights the network is f(x) + J(x) d. With
# independent normal moves of variance s, what the network misses, r = y - f(x), is a GP
# with kernel s J(x) J(x')ᵀ, seen with noise of variance σ². Let Φ be the N rows J(x),
# each of F numbers. The mean of the posterior at x* can be written in two ways, which
# are equal:
#
# .. math::
#
#     m(x_*) = s\, J(x_*) \Phi^T \left(s\, \Phi \Phi^T + \sigma^2 I_N\right)^{-1} r
#            = s\, J(x_*) \left(s\, \Phi^T \Phi + \sigma^2 I_F\right)^{-1} \Phi^T r.
#
# The first, in *function space*, needs a matrix with N rows and columns: up to N² F
# operations to make it, N³/3 to factorise it. The second, in *weight space*, needs one
# with F rows and columns: N F² and F³/3. Either matrix may also be left unmade:
# conjugate gradients need only products with it, at 4 N F operations each. These are
# ways to compute one and the same posterior; none of them is another model.
#
# A `WhitenedSystem` is the matrix to be inverted, with prior variance s and noise σ².
# Here they are guessed, and on 1,000 rows the two ways are compared.

backend = gpntk.AutoBackend(gpntk.freeze(network))
features = Features(backend, x)


def system_of(features: Features, scale: float, noise: float) -> WhitenedSystem:
    """The system with one prior variance for all weights, and one noise variance for
    all rows.
    """
    return WhitenedSystem(
        FeatureCovariance(features, torch.tensor([scale], dtype=torch.float64)),
        torch.tensor([noise], dtype=torch.float64),
    )


small = system_of(Features(backend, x[:1000]), scale=1.0, noise=0.01)
one, two = (
    Posterior(small, residual[:1000], solver).mean(x_test)
    for solver in (FunctionSpace(), WeightSpace())
)
print(
    f"F = {features.num_features}; largest difference of the two ways "
    f"{(one - two).abs().max():.0e}"
)

# %%
# Who decides
# -----------
#
# `AutoSolver`, the default, counts what every solver would cost and takes the cheapest
# that fits the memory budget. It can be asked:

system = system_of(features, scale=1.0, noise=0.01)
print(AutoSolver().select(system))

# %%
# One line is one solver. *once*: operations paid once. *product*: operations for 32
# right-hand sides, since a variance takes one for each point. *kept*: memory. *fits*:
# whether that is within the budget. The last two lines are conjugate gradients in
# weight space with two preconditioners, `SampledGram` and `Nystrom`. A factorisation is
# taken up to three times the cost, since it has no tolerance and leaves every further
# right-hand side almost free.
#
# A mean is a single right-hand side. For that alone conjugate gradients need far fewer
# operations, and they gain the more the more rows there are:

print(AutoSolver(columns=1).select(system))

# %%
# To force a solver, give it: ``Posterior(system, residual,
# ConjugateGradients(SampledGram()))``.
#
# Scale and noise
# ---------------
#
# The marginal likelihood, or evidence, says how well a scale and a noise explain all N
# points. `log_evidence` is differentiable in both, and `infer` climbs to its maximum,
# under priors so wide that the data decide, and within bounds: beyond a scale of 1,000
# systems come near what float64 can solve. With one eigendecomposition of ΦᵀΦ every
# evaluation costs a few products. The decomposition is kept with the features. For
# networks whose F² does not fit, a subset of the rows is the way; but not too small a
# subset. Here are the fits to the first 500 rows and to all:

WIDE = [
    Hyperparameter("scale", median=1.0, spread=3.0, bounds=(1e-8, 1e3)),
    Hyperparameter("noise", median=0.1, spread=3.0),
]


def fit(features: Features, y: Tensor) -> tuple[float, float]:
    """Scale and noise of the largest evidence."""

    def evidence(logs: Tensor) -> Tensor:
        scale, noise = logs.exp().split(1)
        return log_evidence(FeatureCovariance(features, scale), noise, y)

    best = infer(evidence, WIDE, average=False, curvature=False, tolerance=0.1).best
    scale, noise = best.exp().tolist()
    print(
        f"{len(y):>7} rows: scale {scale:9.2e}, standard deviation of the noise "
        f"{math.sqrt(noise):.3f}"
    )
    return scale, noise


fit(Features(backend, x[:500]), residual[:500])
with timed(f"eigendecomposition and fit of {ROWS} rows"):
    scale, noise = fit(features, residual)
system = system_of(features, scale, noise)

# %%
# The few rows cannot tell structure from noise, and the likelihood takes all of it for
# noise. All rows can. What noise they leave beyond 0.1 is structure that moves of the
# weights, to first order, cannot follow.
#
# The solve
# ---------
#
# The ratio of scale to noise is what makes a GP hard to solve: the condition number is
# about the largest eigenvalue of s ΦΦᵀ over σ². A preconditioner is a cheap relative of
# the matrix. `SampledGram` computes ΦᵀΦ from a sample of the rows, three for each
# feature. A `Posterior` solves once when it is made, and keeps what the solver said of
# it:

with timed("preconditioner and solve"):
    iterated = Posterior(system, residual, ConjugateGradients(SampledGram()))
result = iterated.result
print(
    f"{result.outcome.name} after {result.iterations} iterations, error "
    f"{result.residual_norms.item():.0e}"
)

# %%
# Iterations run in the precision of the data, here float32. The residual is then
# computed anew in float64, and if need be the system is solved again for it. The error
# reported is estimated from that residual, not from what the iterations believe; it is
# relative to the solution.
#
# Much depends on the preconditioner. To see it, here is one that does nothing, which
# takes three lines; then `Nystrom`, which finds the 400 largest directions by products
# alone; then a sample of one row for each feature, beside the three of above. Nobody
# may take more than 200 iterations. ``prepare`` makes the inverse and ``solve``
# solves, unchecked.


class Nothing(AbstractPreconditioner):
    """The identity: plain conjugate gradients."""

    space = "weight"

    def counted(self, sizes: Sizes) -> Counted:  # noqa: ARG002
        return Counted(once=Work(), each=Work(), kept=0.0, iterations=200)

    def build(self, system: WhitenedSystem) -> SpectralFactor:
        scales = system.weighted.scales
        return SpectralFactor(
            scales.new_ones(0), scales.new_ones(system.size("weight"), 0)
        )


MOST = 200
PRECONDITIONERS: dict[str, AbstractPreconditioner] = {
    "none": Nothing(),
    "Nystrom, rank 400": Nystrom(max_rank=400, error=0.0, space="weight"),
    "SampledGram, 1 row a feature": SampledGram(oversampling=1.0),
}
results = {}
for name, preconditioner in PRECONDITIONERS.items():
    solver = ConjugateGradients(preconditioner, max_iterations=MOST)
    with timed(name):
        results[name] = solver.prepare(system).solve(residual.unsqueeze(0))
results["SampledGram, 3 rows a feature"] = result
for name, tried in results.items():
    print(
        f"{name:<30} {tried.outcome.name:<10} {tried.iterations:>4} iterations, error "
        f"{tried.residual_norms.item():.0e}"
    )

# %%
# The many directions that 400 do not cover stay ill-conditioned; a sample of rows sees
# all of them.
#
# A solve that fails says so. ``SolveResult.value`` is then the best there is,
# ``outcome`` says what happened and what may help, and ``checked()`` raises.
# `Posterior` always checks: it gives no means of unfinished solves. Nor does it
# factorise what rounding has already destroyed, here for a noise far below what the
# data have:

failed = results["none"]
print(f"{failed.outcome.name}: {failed.outcome.value}")
for wrong, solver in (
    (system, ConjugateGradients(Nothing(), max_iterations=MOST)),
    (system_of(features, scale, 1e-12), WeightSpace()),
):
    try:
        Posterior(wrong, residual, solver)
    except SolveError as refusal:
        print(f"SolveError: {refusal}")

# %%
# Predictions
# -----------
#
# The posterior with `AutoSolver` finds the eigendecomposition of the fit, and has
# nothing left to factorise. Its means and those of conjugate gradients agree.

with timed("posterior"):
    posterior = Posterior(system, residual)
with timed(f"{TEST_ROWS} means and variances"):
    mean, variance = posterior.mean(x_test), posterior.variance(x_test)
print(
    f"solver {posterior.solver}; difference from conjugate gradients "
    f"{(mean - iterated.mean(x_test)).abs().max():.0e}"
)

# %%
# The data are the network's residual, so the mean is added to what the network returns.
# Error bars of 95 % should hold 95 % of the test points: 1.96 standard deviations,
# noise included.

error, spread = residual_test - mean, (variance + noise).sqrt()
inside = (error.abs() < 1.96 * spread).double().mean()
print(
    f"test RMSE: network {rmse(residual_test):.3f}, with the GP {rmse(error):.3f}, "
    f"noise {NOISE}"
)
print(f"{100 * inside:.1f} % of the test points are inside their 95 % intervals")

# %%
# More points do not make the RMSE smaller here: with 250,000 it is what it is with
# 20,000, since the features are as many, and what they cannot follow remains. The
# intervals hold because the noise was fitted to all that the GP cannot follow. The
# standard deviation of the field alone does not know of that part. In the lake, where
# nothing has been measured, it rises, but compare it with the RMSE there: away from
# data, error bars rest on the prior alone, which no measurement has put to the test.

x_wet, shore = wet[:500], x_test[:500]
with torch.no_grad():
    error_wet, error_shore = (
        field(part) - network(part).squeeze(-1) - posterior.mean(part)
        for part in (x_wet, shore)
    )
deviation_wet, deviation_dry = (
    posterior.variance(part).mean().sqrt() for part in (x_wet, shore)
)
print(
    f"outside the lake: standard deviation {deviation_dry:.3f}, RMSE from the field "
    f"{rmse(error_shore):.3f}"
)
print(
    f"in the lake:      standard deviation {deviation_wet:.3f}, RMSE from the field "
    f"{rmse(error_wet):.3f}"
)

# %%
# Samples are functions: weights are drawn from the posterior, exactly, and a sample can
# be evaluated anywhere. These are on a line through the lake. The standard deviation
# over samples is the computed one, up to the luck of 32 draws.

line = torch.stack([torch.linspace(-1, 1, 201), LAKE[1].expand(201)], -1)
with torch.no_grad():
    network_line = network(line).squeeze(-1)
with timed("32 samples"):
    samples = posterior.sample(line, 32, generator)
mean_line, deviation_line = posterior.mean(line), posterior.variance(line).sqrt()
ratio = samples.std(0) / deviation_line
print(
    f"standard deviation of samples over the computed one: {ratio.min():.2f} to "
    f"{ratio.max():.2f}"
)

# %%
# New measurements
# ----------------
#
# A boat measures at 50 places of the lake. `condition_on` gives the posterior with
# these points added: not an approximation, but the posterior of all N + 50, by an
# update of rank 50.

x_boat = wet[500:550]
with torch.no_grad():
    residual_boat = measure(x_boat) - network(x_boat).squeeze(-1)
with timed("50 more points"):
    updated = posterior.condition_on(x_boat, residual_boat, torch.tensor([noise]))
error_boat = error_wet + posterior.mean(x_wet) - updated.mean(x_wet)
print(f"RMSE in the lake {rmse(error_wet):.3f} before, {rmse(error_boat):.3f} after")
print(
    f"standard deviation {deviation_wet:.3f} before, "
    f"{updated.variance(x_wet).mean().sqrt():.3f} after"
)

# %%
# The same in GPyTorch
# --------------------
#
# `NTKKernel` is a GPyTorch kernel, and its `ExactGP` uses the same solvers. There is
# nothing to be switched on, and the kernel takes ``solver=`` if you have a wish.


class MapGP(gpytorch.models.ExactGP):
    """The network as the mean, its tangent kernel as the kernel."""

    def __init__(self, x: Tensor, y: Tensor, network: nn.Module) -> None:
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.mean_module = gpntk.NetworkMean(network)
        self.covar_module = gpytorch.kernels.ScaleKernel(gpntk.NTKKernel(network))

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(
            self.mean_module(x), self.covar_module(x)
        )


model = MapGP(x, y, network).eval()
model.covar_module.outputscale, model.likelihood.noise = scale, noise
with timed("GPyTorch"), torch.no_grad():
    predicted = model(x_test[:500])
    network_mean = network(x_test[:500]).squeeze(-1)
print(
    "largest difference of means "
    f"{(predicted.mean - network_mean - mean[:500]).abs().max():.0e}"
)
print(
    "largest difference of standard deviations "
    f"{(predicted.stddev - variance[:500].sqrt()).abs().max():.0e}"
)

# %%
# Data that stay on disk
# ----------------------
#
# Nothing above needs the rows of Φ at once, and neither does it need those of x.
# `StreamedFeatures` reads x piece by piece in each pass: from a memory-mapped array, a
# `Dataset` or a `DataLoader`. An iteration of conjugate gradients is two passes;
# `WeightSpace` takes a few in all, whatever follows. Only y is in memory.

with TemporaryDirectory() as folder:
    path = Path(folder, "places.npy")
    np.save(path, x.numpy())
    streamed = StreamedFeatures(backend, np.load(path, mmap_mode="r"), chunk_rows=8192)
    with timed("streamed"):
        on_disk = Posterior(
            system_of(streamed, scale, noise),
            residual,
            ConjugateGradients(SampledGram()),
        )
    print(f"{on_disk.result.outcome.name} after {on_disk.result.iterations} iterations")
print(f"largest difference of means {(on_disk.mean(x_test) - mean).abs().max():.0e}")

# %%
# The picture
# -----------
#
# Above: the field, what the network misses of it, and what the GP puts back; the circle
# is the lake. Below: the standard deviation of the field; a cut through the lake, with
# the field, the mean, two standard deviations and three samples; iterations by
# preconditioner, hatched where 200 were not enough.

SIDE = 72
axis = torch.linspace(-1, 1, SIDE)
grid = torch.cartesian_prod(axis, axis)
with torch.no_grad():
    truth, network_grid = field(grid), network(grid).squeeze(-1)
with timed(f"{len(grid)} means and variances"):
    mean_grid, deviation_grid = posterior.mean(grid), posterior.variance(grid).sqrt()

figure, rows = plt.subplots(2, 3, figsize=(13, 7.5), layout="constrained")
maps = {
    "the field": (truth, "viridis", None),
    "what the network misses": (truth - network_grid, "RdBu", 0.8),
    "what the GP puts back": (mean_grid, "RdBu", 0.8),
    "standard deviation, log₁₀": (deviation_grid.log10(), "magma", None),
}
for axes, (title, (values, colours, limit)) in zip(
    rows.flat, maps.items(), strict=False
):
    image = values.reshape(SIDE, SIDE).mT.numpy()
    limits = {} if limit is None else {"vmin": -limit, "vmax": limit}
    shown = axes.imshow(
        image, origin="lower", extent=(-1, 1, -1, 1), cmap=colours, **limits
    )
    axes.add_patch(plt.Circle(LAKE.tolist(), RADIUS, fill=False, linewidth=0.8))
    figure.colorbar(shown, ax=axes, shrink=0.85)
    axes.set_title(title)

cut, bars = rows[1, 1], rows[1, 2]
centre = network_line + mean_line
cut.fill_between(
    line[:, 0],
    centre - 2 * deviation_line,
    centre + 2 * deviation_line,
    alpha=0.2,
    label="± 2 sd",
)
cut.plot(line[:, 0], (network_line + samples[:3]).mT, color="C0", linewidth=0.5)
cut.plot(line[:, 0], centre, color="C0", label="network + GP")
cut.plot(line[:, 0], field(line), color="black", linewidth=0.8, label="field")
cut.set_title("a cut through the lake")
cut.legend(fontsize="small")
for height, (name, tried) in enumerate(results.items()):
    solved = tried.outcome.name == "CONVERGED"
    bars.barh(
        height,
        tried.iterations,
        color="C0" if solved else "lightgrey",
        hatch=None if solved else "//",
    )
    bars.text(4, height + 0.45, name, fontsize="small")
bars.set_yticks([])
bars.set_ylim(-0.6, len(results) - 0.2)
bars.set_title("iterations")

path = Path("exact_gp.png")
figure.savefig(path, dpi=150)
print(f"Picture saved to {path}")
