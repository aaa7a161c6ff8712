"""Suites of exact inference: real data sets, millions of rows, how cost grows. Data are read from ``GPNTK_DATA``."""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gpytorch
import numpy as np
import torch
from torch import Tensor, nn

import gpntk
from benchmarks.measure import relative_error, seconds
from gpntk.inference import (
    AutoSolver,
    ConjugateGradients,
    FeatureCovariance,
    Features,
    Posterior,
    SampledGram,
    WeightSpace,
    WhitenedSystem,
    log_evidence,
)
from gpntk.inference.hyperposterior import Hyperparameter, infer

_SUBSET = 5000
_BATCH = 512
# Priors of scale and noise, wide enough that the data decide; bounds keep to what float64 can solve.
_WIDE = [Hyperparameter("scale", 0.1, 3.0, (1e-8, 1e3)), Hyperparameter("noise", 0.1, 3.0)]


def protein(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """UCI protein, 5 splits of 41,157 + 4,573 rows, MLP 9-64-64-1: scale and noise, means and variances, in seconds.

    The GP of mean zero sees the targets themselves: at the minimum of its loss a network leaves nothing in the span of
    its own tangents to be explained. `fit_s`: the largest evidence over scale and noise;
    `predict_s`: means and variances of all test rows; `rmse` and `nll` in units of y's standard deviation.
    """
    stored = np.load(data_folder() / "uci_pbp_splits" / "protein-tertiary-structure.npz")
    rows = []
    for split, (train, test) in enumerate(zip(stored["train_idx"], stored["test_idx"], strict=True)):
        x, y, z, truth = standardised(stored["X"], stored["y"], (train, test), device, dtype)
        module = trained(mlp(9, 64, 64, 1).to(device, dtype), x, y, 100 * (len(x) // _BATCH))
        rows.append({"split": split, **_regression(module, (x, y), (z, truth), residual=False)})
    return rows


def protein_gpytorch(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """GPyTorch's exact GP (ARD RBF, conjugate gradients) on rows of the first split of protein.

    `step_s`: one step of Adam on the marginal likelihood (median of 3, one beyond 5,000 rows); `predict_s`: means and
    variances of the 4,573 test rows; `total_s`: 50 steps and the prediction; `at_41157_s`: that times the square of the
    ratio of rows.
    """
    stored = np.load(data_folder() / "uci_pbp_splits" / "protein-tertiary-structure.npz")
    x, y, z, truth = standardised(
        stored["X"], stored["y"], (stored["train_idx"][0], stored["test_idx"][0]), device, dtype
    )
    rows = []
    for count in (2500, 5000, 10_000):
        model = _RBF(x[:count], y[:count]).to(device, dtype)
        objective = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)

        def step(model: Any = model, objective: Any = objective, optimizer: Any = optimizer, n: int = count) -> None:
            model.train()
            optimizer.zero_grad()
            (-objective(model(x[:n]), y[:n])).backward()
            optimizer.step()

        step_s = seconds(step, 3 if count <= 5000 else 1)
        model.eval()
        start = time.perf_counter()
        with torch.no_grad():
            predicted = model(z)
            mean, _ = predicted.mean, predicted.variance
        predict_s = time.perf_counter() - start
        total = 50 * step_s + predict_s
        rows.append(
            {
                "rows": count,
                "step_s": step_s,
                "predict_s": predict_s,
                "total_s": total,
                "at_41157_s": total * (len(x) / count) ** 2,
                "peak_gib": peak_gib(),
                "rmse": (mean - truth).square().mean().sqrt().item(),
            }
        )
    return rows


def malaria(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Malaria raster, 236,579 rows, MLP 2-64-64-64-1: the posterior mean by conjugate gradients in weight space.

    Scale and noise from 5,000 rows. `mean_s`: preconditioner, iterations and means of 20,000 test rows, to a tolerance
    of 1e-5; `error`: of those means against a tolerance of 1e-9; `fitted_rmse` of the GP against `network_rmse`.
    """
    stored = np.load(data_folder() / "malaria" / "CentralAfrica_Pf_incidence.npz")
    known = ~np.isnan(stored["z"])
    inputs, targets = np.stack([stored["x"], stored["y"]], -1)[known], stored["z"][known]
    order = np.random.default_rng(0).permutation(len(targets))
    x, y, z, truth = standardised(inputs, targets, (order[20_000:], order[:20_000]), device, dtype)
    module = trained(mlp(2, 64, 64, 64, 1).to(device, dtype), x, y, 8 * (len(x) // _BATCH))
    with torch.no_grad():
        residual, network_rmse = y - module(x).squeeze(-1), (truth - module(z).squeeze(-1)).square().mean().sqrt()
    backend = gpntk.AutoBackend(gpntk.freeze(module), memory_budget=2**30)
    scale, noise = _fit(Features(backend, x[:_SUBSET]), residual[:_SUBSET])
    solver = ConjugateGradients(SampledGram(), tolerance=1e-5)
    start = time.perf_counter()
    posterior = Posterior(_system(Features(backend, x), scale, noise), residual, solver)
    mean = posterior.mean(z)
    mean_s = time.perf_counter() - start
    peak = peak_gib()
    tight = Posterior(posterior.inverse.system, residual, ConjugateGradients(SampledGram(), tolerance=1e-9))
    rmse = (truth - module(z).squeeze(-1).detach() - mean).square().mean().sqrt()
    return [
        {
            "rows": len(x),
            "features": backend.num_features,
            "noise_over_scale": (noise / scale).item(),
            "mean_s": mean_s,
            "iterations": posterior.result.iterations,
            "residual": posterior.result.residual_norms.max().item(),
            "error": relative_error(mean, tight.mean(z)),
            "peak_gib": peak,
            "network_rmse": network_rmse.item(),
            "fitted_rmse": rmse.item(),
        }
    ]


def millions(device: torch.device, dtype: torch.dtype, count: int = 2_000_000) -> list[dict[str, Any]]:
    """Synthetic, N = 2,000,000 and D = 11 (the size of houseelectric), MLP 11-32-32-1: 1,000 means and variances.

    In weight space: `fit_s` is ΦᵀΦ, its eigendecomposition, and scale and noise from all rows; `predict_s` the rest.
    """
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(count, 11, generator=generator, device=device, dtype=dtype)
    noise = torch.randn(len(x), generator=generator, device=device, dtype=dtype)
    y = (x[:, :3].sin().sum(-1) + (x[:, 3] * x[:, 4]).tanh() + 0.3 * noise) / 1.5
    module = trained(mlp(11, 32, 32, 1).to(device, dtype), x[:200_000], y[:200_000], 2 * (count // 10 // _BATCH))
    z = torch.randn(1000, 11, generator=generator, device=device, dtype=dtype)
    truth = (z[:, :3].sin().sum(-1) + (z[:, 3] * z[:, 4]).tanh()) / 1.5
    return [_regression(module, (x, y), (z, truth), residual=True)]


def evidence(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """N = 5,000, P = 10⁶: scale and noise by marginal likelihood, beside one eigendecomposition and the Gram."""
    x = torch.randn(5000, 64, device=device, dtype=dtype)
    module = mlp(64, 960, 970, 1).to(device, dtype)
    backend = gpntk.AutoBackend(gpntk.freeze(module))
    y = x[:, 0].sin() + 0.1 * torch.randn(len(x), device=device, dtype=dtype)
    wide = x.double()
    gram_s = seconds(lambda: gpntk.AutoBackend(backend.network).gram(wide[None], wide[None]), 1)
    gram = backend.gram(wide[None], wide[None])[0, 0]
    eigh_s = seconds(lambda: torch.linalg.eigh(gram), 1)
    start = time.perf_counter()
    fresh = Features(gpntk.AutoBackend(gpntk.freeze(module)), x)
    _, noise = _fit(fresh, y)
    ours = time.perf_counter() - start
    ratio = ours / (gram_s + eigh_s)
    row = {"rows": len(x), "parameters": backend.num_features, "gram_s": gram_s, "eigh_s": eigh_s, "fit_s": ours}
    return [{**row, "ratio": ratio, "noise": noise.item()}]


def growth(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Seconds of a mean and 100 variances with `AutoSolver`, against N (P = 1,473) and against P (N = 2,000)."""
    rows = []
    for count in (1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000):
        rows.append(_timed(mlp(11, 32, 32, 1).to(device, dtype), count, device, dtype))
    for width in (16, 50, 160, 500, 1600):
        rows.append(_timed(mlp(11, width, width, 1).to(device, dtype), 2000, device, dtype))
    return rows


SUITES: dict[str, Callable[[torch.device, torch.dtype], list[dict[str, Any]]]] = {
    "protein": protein,
    "protein-gpytorch": protein_gpytorch,
    "malaria": malaria,
    "millions": millions,
    "evidence": evidence,
    "growth": growth,
}


def _regression(
    module: nn.Module, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], residual: bool
) -> dict[str, Any]:
    """Fit scale and noise of a GP on the targets or the network's residual, predict, and compare with the network."""
    (x, y), (z, truth) = train, test
    with torch.no_grad():
        network = module(z).squeeze(-1).double()
        offset, targets = (network, y - module(x).squeeze(-1)) if residual else (torch.zeros_like(network), y)
    start = time.perf_counter()
    features = Features(gpntk.AutoBackend(gpntk.freeze(module)), x)
    scale, noise = _fit(features, targets)
    fitted = time.perf_counter()
    posterior = Posterior(_system(features, scale, noise), targets, WeightSpace())
    mean, variance = posterior.mean(z) + offset, posterior.variance(z) + noise
    done = time.perf_counter()
    error = truth.double() - mean
    nll = 0.5 * (error.square() / variance + variance.log() + math.log(2 * math.pi)).mean()
    return {
        "rows": len(x),
        "features": features.num_features,
        "fit_s": fitted - start,
        "predict_s": done - fitted,
        "total_s": done - start,
        "peak_gib": peak_gib(),
        "noise_over_scale": (noise / scale).item(),
        "network_rmse": (truth - network).square().mean().sqrt().item(),
        "rmse": error.square().mean().sqrt().item(),
        "nll": nll.item(),
    }


def _timed(module: nn.Module, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    x = torch.randn(count, 11, device=device, dtype=dtype)
    y = x[:, 0].sin()
    features = Features(gpntk.AutoBackend(gpntk.freeze(module)), x)
    system = WhitenedSystem(
        FeatureCovariance(features, torch.ones(1, device=device)), torch.full((1,), 0.1, device=device)
    )
    chosen = AutoSolver(columns=101).select(system).solver
    start = time.perf_counter()
    posterior = Posterior(system, y, chosen)
    posterior.variance(x[:100])
    elapsed = time.perf_counter() - start
    return {"rows": count, "features": features.num_features, "solver": str(chosen).split("(")[0], "seconds": elapsed}


def _fit(features: Features, y: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and noise `[1]` of the largest evidence."""

    def evidence(logs: Tensor) -> Tensor:
        scale, noise = logs.exp().to(features.device).split(1)
        return log_evidence(FeatureCovariance(features, scale), noise, y).cpu()

    scale, noise = (
        infer(evidence, _WIDE, average=False, curvature=False, tolerance=0.1).best.exp().to(features.device).split(1)
    )
    return scale, noise


def _system(features: Features, scale: Tensor, noise: Tensor) -> WhitenedSystem:
    return WhitenedSystem(FeatureCovariance(features, scale), noise)


class _RBF(gpytorch.models.ExactGP):
    """The host's own exact GP."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel(ard_num_dims=x.shape[-1]))

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def trained(module: nn.Sequential, x: Tensor, y: Tensor, steps: int) -> nn.Sequential:
    """Adam with a falling step, batches of 512."""
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator("cpu").manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(x), (_BATCH,), generator=generator).to(x.device)
        optimizer.zero_grad()
        (module(x[batch]).squeeze(-1) - y[batch]).square().mean().backward()
        optimizer.step()
        schedule.step()
    return module


def standardised(
    inputs: Any, targets: Any, rows: tuple[Any, Any], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test inputs and targets, in units of the training data's standard deviations."""
    parts, train = [], rows[0]
    for array in (inputs, targets):
        mean, spread = array[train].mean(0), array[train].std(0)
        parts.append([torch.as_tensor((array[part] - mean) / spread, device=device, dtype=dtype) for part in rows])
    (x, z), (y, truth) = parts
    return x, y, z, truth


def peak_gib() -> float:
    """Largest resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def data_folder() -> Path:
    """Where the real data sets are."""
    if "GPNTK_DATA" not in os.environ:
        raise SystemExit("this suite reads real data: set GPNTK_DATA to the folder that holds them.")
    return Path(os.environ["GPNTK_DATA"])
