"""What each of two ranks does in `tests.test_sharded`, in a process of its own.

A folder holds the file by which the ranks find each other, and a file of results of each.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from linear_operator.utils import linear_cg
from linear_operator.utils.lanczos import lanczos_tridiag
from torch import Tensor, distributed, nn

import gpntk
from gpntk.errors import DistributedError, FileFormatError, InputError
from gpntk.inference import (
    AbstractSolver,
    AutoSolver,
    ConjugateGradients,
    FeatureCovariance,
    Features,
    FunctionSpace,
    Nystrom,
    Posterior,
    SampledGram,
    ShardedFeatures,
    StreamedFeatures,
    WeightSpace,
    WhitenedSystem,
    log_evidence,
)
from gpntk.inference.features import AbstractFeatures

ROWS, WIDTH, OUTPUTS = 60, 3, 2
SOLVERS: dict[str, AbstractSolver] = {
    "direct": WeightSpace(),
    "sampled": ConjugateGradients(SampledGram(oversampling=4.0), tolerance=1e-13, variance_tolerance=1e-12),
    "nystrom": ConjugateGradients(Nystrom(space="weight"), tolerance=1e-13, variance_tolerance=1e-12),
}


def network(seed: int = 0, hidden: int = 4) -> gpntk.FrozenNetwork:
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(nn.Linear(WIDTH, hidden), nn.Tanh(), nn.Linear(hidden, OUTPUTS)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return gpntk.freeze(module)


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, y, noise of every row, and test points."""
    generator = torch.Generator().manual_seed(1)
    x, y, z = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((ROWS, WIDTH), (ROWS * OUTPUTS,), (5, WIDTH))
    )
    noise = 0.1 + torch.rand(ROWS * OUTPUTS, generator=generator, dtype=torch.float64)
    noise[3] = torch.inf
    return x, y, noise, z


def answers(features: AbstractFeatures, rows: slice) -> dict[str, Tensor]:
    """Everything that must not depend on how the rows are spread; of vectors `[n]`, those of ``rows``."""
    _, y, noises, z = data()
    y, noises = y[rows].clone(), noises[rows]
    result: dict[str, Tensor] = {"moment": features.second_moment()}
    for name, solver in SOLVERS.items():
        variances, noise = torch.tensor([0.7], dtype=torch.float64), torch.tensor([0.05], dtype=torch.float64)
        posterior = Posterior(WhitenedSystem(FeatureCovariance(features, variances), noise), y, solver)
        result |= {f"{name} weights": posterior.weights, f"{name} mean": posterior.mean(z)}
        result |= {f"{name} covariance": posterior.covariance(z), f"{name} bound": posterior.covariance(z, rank=3)}
        updated = posterior.condition_on(z[:2], torch.ones(4, dtype=torch.float64), noise)
        result[f"{name} updated"] = updated.mean(z)
        result |= evidence(name, features, variances, noise, y, solver)
    layers = torch.tensor([0.5, 1.5], dtype=torch.float64)
    result |= evidence("heteroscedastic", features, layers, noises, y, WeightSpace())
    posterior = Posterior(WhitenedSystem(FeatureCovariance(features, layers), noises), y, SOLVERS["nystrom"])
    result["heteroscedastic mean"] = posterior.mean(z)
    weights = torch.where(noises.isfinite(), noises, 0)
    rhs = torch.linspace(-1, 1, features.num_features, dtype=torch.float64).unsqueeze(0)
    moment = features.second_moment(lambda rows, block: block * weights[rows].sqrt().unsqueeze(-1))
    result |= {"product": features.vjp(features.jvp(rhs) * weights), "dense": moment}

    # In linear_operator's own algorithms, whose columns are ours transposed.
    def product(columns: Tensor) -> Tensor:
        return features.vjp(features.jvp(columns.mT) * weights).mT

    result["cg"] = linear_cg(lambda columns: product(columns) + 10 * columns, rhs.mT, tolerance=1e-4)
    _, result["lanczos"] = lanczos_tridiag(product, 6, torch.float64, rhs.device, moment.shape, init_vecs=rhs.mT)
    return result


def evidence(
    name: str, features: AbstractFeatures, variances: Tensor, noise: Tensor, y: Tensor, solver: AbstractSolver
) -> dict[str, Tensor]:
    """The marginal likelihood and its gradients; those of y and of each row's noise are ``rows:`` of their own."""
    arguments = [argument.clone().requires_grad_() for argument in (variances, noise, y)]
    value = log_evidence(FeatureCovariance(features, arguments[0]), *arguments[1:], solver)
    value.backward()
    gradients = [argument.grad for argument in arguments]
    noises = "rows: " if name == "heteroscedastic" else ""
    labels = (f"{name} by variance", f"{noises}{name} by noise", f"rows: {name} by y")
    return {f"{name} evidence": value.detach()} | dict(zip(labels, gradients, strict=True))


# --- scenarios -------------------------------------------------------------------------------------------------------


def compare(rank: int, folder: Path) -> dict[str, Any]:
    """All answers, for rows spread evenly or not, in memory or streamed."""
    x = data()[0]
    np.save(folder / f"x{rank}.npy", x.numpy())
    mapped = np.load(folder / f"x{rank}.npy", mmap_mode="r")
    # Budgets differ, as they do when each rank takes a share of what memory is free.
    backend = gpntk.AutoBackend(network(), memory_budget=2**20 + 2**19 * rank)
    results: dict[str, Any] = {}
    for first in (37, 59, 60):
        rows = slice(0, first) if rank == 0 else slice(first, ROWS)
        local = Features(backend, x[rows])
        if first == 37 and rank == 1:
            local = StreamedFeatures(backend, mapped[rows], chunk_rows=10)
        features = ShardedFeatures(local, timeout=60)
        own = slice(rows.start * OUTPUTS, rows.stop * OUTPUTS)
        results[str(first)] = answers(features, own)
        results[f"{first} sampled"] = features.sample(25, seed=3)[0]
        posterior = Posterior(
            WhitenedSystem(FeatureCovariance(features, torch.ones(1)), torch.tensor([0.1])),
            data()[1][own],
            WeightSpace(),
        )
        # Twice from one generator: it must not move by as much as there are rows.
        generator = torch.Generator().manual_seed(5)
        results[f"{first} samples"] = torch.stack([posterior.sample_weights(2000, generator) for _ in range(2)])
        results[f"{first} global samples"] = posterior.sample_weights(3)
        results[f"{first} choice"] = AutoSolver().select(posterior.inverse.system).solver
    for solver in (FunctionSpace(), ConjugateGradients(Nystrom())):
        try:
            solver.prepare(WhitenedSystem(FeatureCovariance(features, torch.ones(1)), torch.tensor([0.1])))
        except InputError as error:
            results[type(solver).__name__] = str(error)
    return results


def differ(rank: int, _folder: Path) -> dict[str, Any]:
    """Ranks that do not fit together, in each way; all must hear of it."""
    x = data()[0]
    good = ShardedFeatures(Features(gpntk.AutoBackend(network()), x), timeout=60)
    dtypes = torch.float32 if rank else torch.float64
    noise = torch.full((1,) if rank else (ROWS * OUTPUTS,), 0.1)
    attempts: dict[str, Callable[[], object]] = {
        "features": lambda: ShardedFeatures(Features(gpntk.AutoBackend(network(hidden=4 + rank)), x)),
        "weights": lambda: ShardedFeatures(Features(gpntk.AutoBackend(network(seed=rank)), x)),
        "dtype": lambda: ShardedFeatures(Features(gpntk.AutoBackend(network()), x.to(dtypes))),
        "columns": lambda: good.vjp(torch.ones(2 + rank, ROWS * OUTPUTS, dtype=torch.float64)),
        "precision": lambda: good.total(torch.ones(3, dtype=dtypes)),
        "noise": lambda: WhitenedSystem(FeatureCovariance(good, torch.ones(1)), noise),
    }
    messages = {name: _message(attempt) for name, attempt in attempts.items()}
    # Last, since a group that has failed is of no more use: rank 1 takes longer than rank 0 waits.
    hasty = ShardedFeatures(Features(gpntk.AutoBackend(network()), x), timeout=60 if rank else 1)
    time.sleep(3 * rank)
    return messages | {"late": _message(hasty.second_moment)}


def die(rank: int, folder: Path) -> dict[str, Any]:
    """Rank 1 ends without a word in the middle of a solve."""
    features, system, y, solver = long_solve(rank, folder)
    products = 0

    def dying(v: Tensor) -> Tensor:
        nonlocal products
        products += 1
        if products == 7:
            os._exit(3)
        return type(features).jvp(features, v)

    if rank == 1:
        features.jvp = dying  # pyright: ignore[reportAttributeAccessIssue]
    start = time.monotonic()
    message = _message(lambda: Posterior(system, y, solver))
    return {"message": message, "seconds": time.monotonic() - start}


def resume(rank: int, folder: Path) -> dict[str, Any]:
    """The same solve once more, to its end; and one that finds the file of another."""
    _, system, y, solver = long_solve(rank, folder)
    resumed, again = (Posterior(system, y, solver).result for _ in range(2))
    fresh = Posterior(system, y, replace(solver, checkpoint=None)).result
    try:
        Posterior(system, 2 * y, solver)
        message = ""
    except FileFormatError as error:
        message = str(error)
    return {
        "outcomes": [resumed.outcome.name, again.outcome.name],
        "iterations": [resumed.iterations, again.iterations, fresh.iterations],
        "values": torch.cat([resumed.value, fresh.value]),
        "message": message,
    }


def long_solve(rank: int, folder: Path) -> tuple[ShardedFeatures, WhitenedSystem, Tensor, ConjugateGradients]:
    """A system whose solve takes many iterations, kept after each; the ranks need no disk in common."""
    x, y, *_ = data()
    rows = slice(0, 40) if rank == 0 else slice(40, ROWS)
    features = ShardedFeatures(Features(gpntk.AutoBackend(network()), x[rows]), timeout=60)
    solver = ConjugateGradients(
        Nystrom(max_rank=3, space="weight"),
        tolerance=1e-12,
        checkpoint=folder / f"solve{rank}",
        checkpoint_iterations=1,
    )
    system = WhitenedSystem(FeatureCovariance(features, torch.ones(1)), torch.tensor([1e-3]))
    return features, system, y[rows.start * OUTPUTS : rows.stop * OUTPUTS], solver


def _message(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except DistributedError as error:
        return str(error)
    return ""


# --- a rank ----------------------------------------------------------------------------------------------------------


def run(scenario: str, rank: int, folder: Path) -> None:
    """One rank of two, in a process of its own, which it ends."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    torch.save(globals()[scenario](rank, folder), folder / f"result{rank}")
    # The other rank may still read the file by which they met; and a group that has failed cannot be left in order.
    sys.stdout.flush()
    os._exit(0)
