"""Preconditioners, the factors they are made of, and the stochastic log-determinants they help to estimate."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gpntk.inference import (
    ConjugateGradients,
    FeatureCovariance,
    Nystrom,
    SampledGram,
    WhitenedSystem,
    log_evidence,
)
from gpntk.inference.factors import AbstractFactor, BlockFactor, CholeskyFactor, SpectralFactor
from gpntk.inference.preconditioners import AbstractPreconditioner
from tests.dense_gp import ITERATIVE, Problem, jacobian, network, relative


def case(rows: int, noise: float | Tensor, width: int = 6, variances: float = 1.0) -> Problem:
    module, x = network(1, width), torch.randn(rows, 5).double()
    y = x.sum(-1).sin() + 0.1 * torch.randn(rows).double()
    noise = torch.as_tensor(noise).double().reshape(-1)
    return Problem(module, x, y, torch.full((1,), variances).double(), noise)


def whitened(problem: Problem, space: str) -> Tensor:
    """I + Ψ Ψᵀ or I + Ψᵀ Ψ."""
    scales = problem.noise.double().rsqrt().expand(len(problem.y)).unsqueeze(-1)
    psi = jacobian(problem.module, problem.x) * problem.variances.double().sqrt() * scales
    gram = psi @ psi.T if space == "function" else psi.T @ psi
    return gram + torch.eye(len(gram)).double()


# --- factors ---------------------------------------------------------------------------------------------------------


def spectral(dtype: torch.dtype = torch.float64) -> SpectralFactor:
    vectors = torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64)).Q.to(dtype)
    return SpectralFactor(torch.tensor([50.0, 7.0, 3.0, 2.5], dtype=dtype), vectors, 2.1)


def triangular(size: int) -> CholeskyFactor:
    root = torch.randn(size, size).double()
    return CholeskyFactor(torch.linalg.cholesky(root @ root.T + torch.eye(size).double()))


def block() -> BlockFactor:
    order = torch.randperm(9)
    return BlockFactor([triangular(4), triangular(3), triangular(2)], [order[:4], order[4:7], order[7:]])


@pytest.mark.parametrize("build", [spectral, lambda: triangular(9), block], ids=["spectral", "cholesky", "block"])
def test_factors_are_those_of_one_matrix(build: type) -> None:
    factor: AbstractFactor = build()
    eye = torch.eye(9).double()
    inverse = factor.solve(eye)
    matrix = torch.linalg.inv(inverse)
    # Rows are images: half(I) is R⁻ᵀ and half_transposed(I) is R⁻¹.
    root = factor.half_transposed(eye)
    torch.testing.assert_close(factor.half(eye), root.T)
    torch.testing.assert_close(root.T @ root, inverse)
    torch.testing.assert_close(inverse, inverse.T)
    assert bool((torch.linalg.eigvalsh(matrix) > 0).all())
    torch.testing.assert_close(factor.logdet(), torch.logdet(matrix))
    torch.testing.assert_close(factor.inverse_diagonal(), inverse.diagonal())
    torch.testing.assert_close(factor.half(eye.expand(2, 9, 9)), factor.half(eye).expand(2, 9, 9))


def test_a_log_determinant_is_exact_in_float64() -> None:
    """The part outside of the vectors counts n - r times: its rounding too."""
    vectors = torch.eye(10**6, 1).double()
    factor = SpectralFactor(torch.ones(1).double(), vectors, 1.1)
    assert factor.logdet().item() == pytest.approx((10**6 - 1) * math.log(1.1), rel=1e-14)


# --- preconditioners -------------------------------------------------------------------------------------------------


def condition_number(problem: Problem, preconditioner: AbstractPreconditioner) -> tuple[float, float]:
    """Of A and of R⁻¹ A R⁻ᵀ."""
    matrix, factor = whitened(problem, preconditioner.space), preconditioner.build(problem.system)
    split = factor.half(factor.half(matrix).T.contiguous())
    plain, values = torch.linalg.eigvalsh(matrix), torch.linalg.eigvalsh(split)
    return float(plain[-1] / plain[0]), float(values[-1] / values[0])


@pytest.mark.parametrize(
    ("preconditioner", "bound"),
    [
        (Nystrom(error=5.0), 30.0),
        (Nystrom(space="weight", error=5.0), 30.0),
        # ((1 + √(F/s)) / (1 - √(F/s)))² is 13.9 for s = 3 F and 34 for s = 2 F.
        (SampledGram(), 18.0),
        (SampledGram(oversampling=2.0), 45.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("noise", [1e-1, 1e-3])
def test_preconditioned_systems_are_well_conditioned(
    preconditioner: AbstractPreconditioner, bound: float, noise: float
) -> None:
    problem = case(500, noise, width=5)
    plain, split = condition_number(problem, preconditioner)
    assert plain > 1e3
    assert split < bound


def test_a_nystrom_approximation_of_full_rank_leaves_nothing_out() -> None:
    """More rows than features: H has rank F, and what is beyond is one, not the smallest eigenvalue found."""
    problem = case(150, 1e-7, width=3)
    assert condition_number(problem, Nystrom(max_rank=100))[1] < 5.0


def test_layers_on_their_own_are_better_than_nothing() -> None:
    problem = case(500, 1e-2, width=5)
    plain, split = condition_number(problem, SampledGram(per_layer=True))
    assert split < plain
    factor = SampledGram(per_layer=True).build(problem.system)
    dense = torch.linalg.inv(factor.solve(torch.eye(problem.features.num_features).double()))
    first = 5 * 5 + 5
    assert dense[:first, first:].abs().max() < 1e-6 * dense.abs().max()


@pytest.mark.parametrize("name", ITERATIVE)
def test_log_determinants_of_preconditioners_are_exact(name: str) -> None:
    problem = case(60, 0.01)
    factor = ITERATIVE[name].preconditioner.build(problem.system)
    size = problem.system.size(ITERATIVE[name].preconditioner.space)
    expected = -torch.logdet(factor.solve(torch.eye(size).double()))
    assert factor.logdet().item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("name", ITERATIVE)
def test_rows_that_were_not_observed_do_not_count_in_a_preconditioner(name: str) -> None:
    noise = torch.full((60,), 0.01).double()
    noise[::3] = torch.inf
    problem = case(60, noise)
    plain, split = condition_number(problem, ITERATIVE[name].preconditioner)
    assert split < plain
    seen = noise.isfinite()
    less = problem._replace(x=problem.x[seen], y=problem.y[seen], noise=noise[seen])
    expected = torch.logdet(whitened(less, "function"))
    determinant = ITERATIVE[name].prepare(problem.system).logdet()
    assert abs(determinant.value - expected) < 4 * determinant.standard_error + 0.04


def counted(preconditioner: AbstractPreconditioner, monkeypatch: pytest.MonkeyPatch) -> list[WhitenedSystem]:
    """The systems that factors are built for from now on."""
    seen, build = [], type(preconditioner).build
    monkeypatch.setattr(type(preconditioner), "build", lambda self, system: seen.append(system) or build(self, system))
    return seen


RECIPES = [Nystrom(error=5.0), Nystrom(space="weight", error=5.0), SampledGram()]


def spread_of_eigenvalues(factor: AbstractFactor, matrix: Tensor) -> float:
    values = torch.linalg.eigvalsh(factor.half(factor.half(matrix).T.contiguous()))
    return float(values[-1] / values[0])


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("preconditioner", RECIPES, ids=str)
def test_hyperparameters_nearby_share_a_factor(
    preconditioner: AbstractPreconditioner, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = case(300, 1e-2, width=5)
    features, middle, built = problem.features, 2.0**7 * 1e-2, counted(preconditioner, monkeypatch)
    own = preconditioner.build(
        WhitenedSystem(FeatureCovariance(features, torch.full((layers,), middle).double()), problem.noise)
    )
    at_best = spread_of_eigenvalues(
        own, whitened(problem._replace(variances=torch.tensor([middle])), preconditioner.space)
    )
    built.clear()
    for factors in ((1.0, 1.0, 1.0), (1.4, 0.72, 1.1), (0.72, 1.38, 1.4)):
        system = WhitenedSystem(
            FeatureCovariance(features, middle * torch.tensor(factors[:layers]).double()), problem.noise
        )
        matrix = whitened(
            problem._replace(variances=system.weighted.spread(system.weighted.variances)), preconditioner.space
        )
        # Eigenvalues change by √2 at most, up and, where layers differ, down.
        growth = 2.0 if layers > 1 else 2**0.5
        assert spread_of_eigenvalues(preconditioner.prepare(system), matrix) < growth * at_best * 1.001
    assert len(built) == 1
    preconditioner.prepare(
        WhitenedSystem(FeatureCovariance(features, torch.tensor([2 * middle]).double()), problem.noise)
    )
    assert len(built) == 2


@pytest.mark.parametrize("preconditioner", RECIPES, ids=str)
def test_another_noise_of_some_rows_is_another_factor(
    preconditioner: AbstractPreconditioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = case(60, 1e-2)
    features, noise = problem.features, torch.full((60,), 1e-2).double()
    built = counted(preconditioner, monkeypatch)
    for _ in range(2):
        preconditioner.prepare(WhitenedSystem(FeatureCovariance(features, problem.variances), noise))
    assert len(built) == 1
    noise[3] *= 2
    preconditioner.prepare(WhitenedSystem(FeatureCovariance(features, problem.variances), noise))
    assert len(built) == 2


def test_a_fit_builds_few_preconditioners(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, preconditioner = case(400, 1e-2), Nystrom()
    features, built, solver = problem.features, counted(preconditioner, monkeypatch), ConjugateGradients(preconditioner)
    logs = torch.tensor([0.0, -2.0]).double().requires_grad_()
    optimizer, calls = torch.optim.LBFGS([logs], max_iter=12, line_search_fn="strong_wolfe"), 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        variances, noise = logs.exp().unsqueeze(-1)
        loss = -log_evidence(FeatureCovariance(features, variances), noise, problem.y, solver)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert calls > 10
    assert len(built) < calls / 2


# --- log-determinants ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ITERATIVE)
def test_log_determinants_are_unbiased_and_know_their_error(name: str) -> None:
    problem = case(40, 0.02)
    preconditioner = {
        "nystrom": Nystrom(max_rank=6),
        "nystrom-weight": Nystrom(max_rank=6, space="weight"),
        "sampled": SampledGram(oversampling=0.25),
        "sampled-per-layer": SampledGram(per_layer=True),
    }[name]
    exact = torch.logdet(whitened(problem, "function"))
    runs = [
        ConjugateGradients(preconditioner, probes=8, seed=seed).prepare(problem.system).logdet() for seed in range(60)
    ]
    values, errors = torch.stack([run.value for run in runs]), torch.tensor([run.standard_error for run in runs])
    assert abs(values.mean() - exact) < 3.5 * values.std() / 60**0.5
    # A standard deviation of 60 draws is known to 10 %, that of its estimate from 8 probes adds little.
    assert 0.7 < errors.square().mean().sqrt() / values.std() < 1.4
    # The derivative with respect to the one prior variance: tr(I - A⁻¹).
    traces = torch.stack([run.by_variance[0] for run in runs])
    inverse = torch.linalg.inv(whitened(problem, "function"))
    assert abs(traces.mean() - (40 - inverse.trace())) < 3.5 * traces.std() / 60**0.5 + 1e-9
    by_noise = torch.stack([run.by_noise[0] for run in runs])
    torch.testing.assert_close(by_noise, 40 - traces, rtol=1e-9, atol=1e-9)


def test_one_probe_says_nothing_of_its_error() -> None:
    run = ConjugateGradients(probes=1).prepare(case(10, 0.1).system).logdet()
    assert run.standard_error == math.inf


def test_rows_of_a_heteroscedastic_determinant() -> None:
    """Unbiased row by row, and their sum as good as that of the features."""
    problem = case(30, 0.05 + 0.1 * torch.rand(30))
    exact = torch.linalg.inv(whitened(problem, "function")).diagonal()
    solver = ConjugateGradients(SampledGram(), probes=64)
    rows = torch.stack([replace(solver, seed=7 * seed).prepare(problem.system).logdet().by_noise for seed in range(20)])
    assert relative(rows.mean(0), exact) < 0.05
    assert abs(rows[0].sum() - exact.sum()) < 1e-6
