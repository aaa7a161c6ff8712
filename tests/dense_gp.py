"""A GP on Jacobian features by dense float64 formulas: what `gpntk.inference` is compared with."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import gpntk
from gpntk.inference import (
    AbstractSolver,
    ConjugateGradients,
    FeatureCovariance,
    Features,
    FunctionSpace,
    Nystrom,
    SampledGram,
    WeightSpace,
    WhitenedSystem,
)

DIRECT: dict[str, AbstractSolver] = {"function": FunctionSpace(), "weight": WeightSpace()}
ITERATIVE: dict[str, ConjugateGradients] = {
    "nystrom": ConjugateGradients(Nystrom(max_rank=40)),
    "nystrom-weight": ConjugateGradients(Nystrom(max_rank=40, space="weight")),
    "sampled": ConjugateGradients(SampledGram()),
    "sampled-per-layer": ConjugateGradients(SampledGram(per_layer=True)),
}
SOLVERS: dict[str, AbstractSolver] = {**DIRECT, **ITERATIVE}


def network(outputs: int = 1, width: int = 8, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Linear(5, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs)
    return nn.Sequential(*layers).double().eval()


def jacobian(module: nn.Module, x: Tensor) -> Tensor:
    """J `[N*C, F]` in float64, by torch.func, whatever the precision of the weights."""
    module = copy.deepcopy(module).double()
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def outputs(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(module, weights, (row.unsqueeze(0),))[0]

    parts = vmap(jacrev(outputs), (None, 0))(weights, x.double())
    return torch.cat([part.flatten(2) for part in parts.values()], -1).flatten(0, 1)


def layers_of(module: nn.Module) -> Tensor:
    """Number of the layer of every feature `[F]`."""
    names = [name.rpartition(".")[0] for name, _ in module.named_parameters()]
    numbers = [list(dict.fromkeys(names)).index(name) for name in names]
    sizes = torch.tensor([parameter.numel() for parameter in module.parameters()])
    return torch.tensor(numbers).repeat_interleave(sizes)


class Problem(NamedTuple):
    """Data and hyperparameters; y is NaN where the noise is infinite."""

    module: nn.Module
    x: Tensor
    y: Tensor
    variances: Tensor
    noise: Tensor

    @property
    def features(self) -> Features:
        return Features(gpntk.AutoBackend(gpntk.freeze(self.module)), self.x)

    @property
    def system(self) -> WhitenedSystem:
        return WhitenedSystem(FeatureCovariance(self.features, self.variances), self.noise)

    @property
    def dense(self) -> Dense:
        return Dense(self.module, jacobian(self.module, self.x), self.y, self.variances, self.noise)


@dataclass(frozen=True)
class Dense:
    """The formulas of Rasmussen and Williams (2006), chapter 2, on the rows observed."""

    module: nn.Module
    j: Tensor
    y: Tensor
    variances: Tensor
    noise: Tensor

    @property
    def rows(self) -> Tensor:
        return self.noise.isfinite().expand(self.j.shape[0])

    def prior(self, variances: Tensor) -> Tensor:
        """S `[F]`."""
        variances = variances.double()
        return variances[layers_of(self.module)] if len(variances) > 1 else variances.expand(self.j.shape[1])

    def covariance_of_y(self, variances: Tensor, noise: Tensor) -> Tensor:
        j = self.j[self.rows]
        return (j * self.prior(variances)) @ j.T + noise.double().expand(self.j.shape[0])[self.rows].diag()

    def solve(self, rhs: Tensor) -> Tensor:
        """(K + D)⁻¹ b `[K, n]`, zero where nothing was observed."""
        inside = torch.linalg.solve(self.covariance_of_y(self.variances, self.noise), rhs[:, self.rows].double().T).T
        result = torch.zeros_like(rhs, dtype=torch.float64)
        result[:, self.rows] = inside
        return result

    def weights(self) -> Tensor:
        y = torch.where(self.rows, self.y, 0.0).double()
        return self.prior(self.variances) * (self.solve(y.unsqueeze(0)) @ self.j).squeeze(0)

    def weight_covariance(self) -> Tensor:
        s, j = self.prior(self.variances), self.j * self.rows.unsqueeze(-1)
        return s.diag() - s.unsqueeze(-1) * (j.T @ self.solve((j * s).T.contiguous()).T)

    def mean(self, k: Tensor) -> Tensor:
        return k @ self.weights()

    def covariance(self, k: Tensor) -> Tensor:
        cross = (k * self.prior(self.variances)) @ (self.j * self.rows.unsqueeze(-1)).T
        return (k * self.prior(self.variances)) @ k.T - self.solve(cross) @ cross.T

    def log_marginal_likelihood(self, variances: Tensor, noise: Tensor, y: Tensor) -> Tensor:
        """By Cholesky; differentiable."""
        lower = torch.linalg.cholesky(self.covariance_of_y(variances, noise))
        half = torch.linalg.solve_triangular(lower, y[self.rows].double().unsqueeze(-1), upper=False)
        return -0.5 * half.square().sum() - lower.diagonal().log().sum() - 0.5 * len(lower) * math.log(2 * math.pi)

    def with_rows(self, x: Tensor, y: Tensor, noise: Tensor) -> Dense:
        """The same with more data."""
        j = torch.cat([self.j, jacobian(self.module, x)])
        noises = [self.noise.expand(len(self.j)), noise.expand(len(j) - len(self.j))]
        return Dense(self.module, j, torch.cat([self.y, y]), self.variances, torch.cat(noises))


class Singular:
    """The same for one prior variance and one noise variance, by the singular values of J / σ.

    Unlike formulas that square J, it is accurate at any condition number whose root float64 resolves.
    """

    def __init__(self, problem: Problem) -> None:
        noise = problem.noise.double()
        j, self.size = jacobian(problem.module, problem.x) * problem.variances.double().sqrt(), len(problem.y)
        u, s, vt = torch.linalg.svd(j / noise.sqrt(), full_matrices=False)
        b = problem.y.double() / noise.sqrt()
        self.noise, self.s, self.vt, self.scale = noise, s, vt, problem.variances.double().sqrt()
        self.inside, outside = u.T @ b, b - u @ (u.T @ b)
        self.outside = outside.square().sum() if len(s) < self.size else torch.zeros(()).double()

    def mean(self, k: Tensor) -> Tensor:
        return (k * self.scale) @ (self.vt.T @ (self.s / (1 + self.s**2) * self.inside))

    def variance(self, k: Tensor) -> Tensor:
        k = k * self.scale
        along = k @ self.vt.T
        return (k - along @ self.vt).square().sum(-1) + (along**2 / (1 + self.s**2)).sum(-1)

    def logdet(self) -> float:
        return float((self.s**2).log1p().sum() + self.size * self.noise.log())

    def quad(self) -> float:
        return float(self.outside + (self.inside**2 / (1 + self.s**2)).sum())

    def gradients(self) -> tuple[float, float]:
        """Of the log marginal likelihood with respect to the logarithms of prior variance and noise."""
        ratio = self.s**2 / (1 + self.s**2)
        by_variance = -0.5 * (ratio - ratio / (1 + self.s**2) * self.inside**2).sum()
        squares = self.outside + (self.inside**2 / (1 + self.s**2) ** 2).sum()
        return float(by_variance), float(-0.5 * (self.size - ratio.sum() - squares))


def relative(value: Tensor, expected: Tensor) -> float:
    """Norm of the error over that of what is expected."""
    return float((value.detach().double() - expected).norm() / expected.norm().clamp_min(1e-300))
