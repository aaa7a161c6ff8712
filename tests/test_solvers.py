"""What solvers say of themselves: outcomes, errors, and each column on its own."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import gpntk
from gpntk.errors import InputError, SolveError
from gpntk.inference import (
    AutoSolver,
    ConjugateGradients,
    FeatureCovariance,
    Features,
    FunctionSpace,
    Nystrom,
    Outcome,
    Posterior,
    SampledGram,
    WeightSpace,
    WhitenedSystem,
    log_evidence,
)
from gpntk.inference.conjugate_gradients import conjugate_gradients
from gpntk.inference.outcome import SolveResult
from tests.dense_gp import DIRECT, ITERATIVE, SOLVERS, Problem, jacobian, network, relative


def case(rows: int, noise: float | Tensor, width: int = 6, variances: float = 1.0) -> Problem:
    module, x = network(1, width), torch.randn(rows, 5).double()
    y = x.sum(-1).sin() + 0.1 * torch.randn(rows).double()
    noise = torch.as_tensor(noise).double().reshape(-1)
    return Problem(module, x, y, torch.full((1,), variances).double(), noise)


# --- outcomes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("name", SOLVERS)
def test_not_finite(name: str, many: bool) -> None:
    problem = case(12, 0.1)
    covariance = FeatureCovariance(problem.features, problem.variances)
    # Changed behind its back: NaN in x is refused at once, what a network makes of x may still be anything.
    covariance.features.x[1, 2] = torch.nan
    with pytest.raises((SolveError, InputError), match="NaN or infinite values"):
        SOLVERS[name].prepare(WhitenedSystem(covariance, problem.noise), many).solve(
            torch.ones(1, 12).double()
        ).checked()
    with pytest.raises((SolveError, InputError)):
        log_evidence(covariance, problem.noise.requires_grad_(), problem.y, SOLVERS[name])


@pytest.mark.parametrize("name", SOLVERS)
def test_a_right_hand_side_that_is_not_finite_spoils_its_own_column_only(name: str) -> None:
    problem = case(12, 0.1)
    rhs = torch.randn(3, 12).double()
    rhs[1, 4] = torch.inf
    result = SOLVERS[name].prepare(problem.system).solve(rhs)
    assert result.outcomes == (Outcome.CONVERGED, Outcome.NOT_FINITE, Outcome.CONVERGED)
    assert result.outcome is Outcome.NOT_FINITE
    assert relative(result.value[[0, 2]], problem.dense.solve(rhs[[0, 2]])) < 1e-5
    with pytest.raises(SolveError, match=r"1 of 3 columns were not solved \(NOT_FINITE"):
        result.checked()


@pytest.mark.parametrize(
    ("variances", "noise", "message"),
    [
        ([1.0], [0.0], "noise variances must be positive"),
        ([1.0], [-1.0], "noise variances must be positive"),
        ([1.0], [math.nan], "noise variances must be positive"),
        ([1.0], [1.0, 1.0], r"noise has shape \(2,\): give one variance \(1,\) or one per row \(7,\)"),
        ([-1.0], [1.0], "prior variances must be finite and at least zero"),
        ([math.nan], [1.0], "prior variances must be finite"),
        ([math.inf], [1.0], "prior variances must be finite"),
        ([1.0, 1.0], [1.0], r"variances has shape \(2,\): give one prior variance \(1,\), one per layer \(3,\), or"),
        ([1.0] * 5, [1.0], r"variances has shape \(5,\)"),
        ([], [1.0], r"variances has shape \(0,\)"),
    ],
)
def test_wrong_hyperparameters(variances: list[float], noise: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        WhitenedSystem(FeatureCovariance(case(7, 1.0).features, torch.tensor(variances)), torch.tensor(noise))


def test_no_data() -> None:
    problem = case(7, 1.0)
    with pytest.raises(InputError, match="x has no rows"):
        WhitenedSystem(
            FeatureCovariance(Features(problem.features.backend, problem.x[:0]), problem.variances), problem.noise
        )
    with pytest.raises(InputError, match="x has no rows"):
        Posterior(problem.system, problem.y).condition_on(problem.x[:0], problem.y[:0], problem.noise)


def test_targets_must_fit() -> None:
    problem = case(7, 1.0)
    with pytest.raises(InputError, match=r"y has shape \(6,\): give one target per row, \(7,\)"):
        Posterior(problem.system, problem.y[:6])
    problem.y[2] = torch.nan
    with pytest.raises(InputError, match="give infinite noise to the rows that were not observed"):
        Posterior(problem.system, problem.y)


@pytest.mark.parametrize("name", ITERATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_impossible_tolerance(name: str, dtype: torch.dtype) -> None:
    problem = case(40, 1e-4)
    problem = Problem(problem.module.to(dtype), *(tensor.to(dtype) for tensor in problem[1:]))
    inverse = replace(ITERATIVE[name], tolerance=1e-30).prepare(problem.system)
    result = inverse.solve(problem.y.double().unsqueeze(0))
    assert result.outcome in (Outcome.STAGNATED, Outcome.EXHAUSTED)
    # The best there is comes back.
    assert relative(result.value, problem.dense.solve(problem.y.double().unsqueeze(0))) < 1e-4
    with pytest.raises(SolveError, match="relative residual"):
        result.checked()


@pytest.mark.parametrize("most", range(1, 30))
def test_iterations_that_do_not_suffice_are_never_called_convergence(most: int) -> None:
    """Whatever the number of iterations a solve is cut off after: in float32 it takes several runs."""
    problem = case(60, 1e-4)
    problem = Problem(problem.module.float(), *(tensor.float() for tensor in problem[1:]))
    rhs = problem.y.double().unsqueeze(0)
    result = (
        ConjugateGradients(Nystrom(max_rank=8), max_iterations=most, tolerance=1e-9).prepare(problem.system).solve(rhs)
    )
    matrix = problem.dense.covariance_of_y(problem.variances, problem.noise)
    residual = relative(result.value @ matrix, rhs)
    assert (result.outcome is Outcome.CONVERGED) == (residual <= 1e-9)
    assert result.outcome in (Outcome.CONVERGED, Outcome.EXHAUSTED)
    assert result.iterations <= most
    assert result.residual_norms.item() == pytest.approx(residual, rel=1e-3, abs=1e-15)


@pytest.mark.parametrize("name", SOLVERS)
def test_each_column_is_solved_on_its_own(name: str) -> None:
    """A column of zeros, a tiny one, a huge one and an easy one, as if each were alone."""
    problem = case(30, 1e-3)
    rhs = torch.stack([torch.zeros(30), 1e-30 * torch.randn(30), 1e30 * torch.randn(30), torch.ones(30)]).double()
    rhs[3] = jacobian(problem.module, problem.x)[:, -1]
    inverse = SOLVERS[name].prepare(problem.system)
    result = inverse.solve(rhs)
    assert result.outcome is Outcome.CONVERGED
    assert not result.value[0].any()
    for column in (1, 2, 3):
        alone = inverse.solve(rhs[column : column + 1]).value[0]
        allowed = 2e-6 * rhs[column].norm() / problem.noise
        assert (result.value[column] - problem.dense.solve(rhs)[column]).norm() < allowed
        assert (result.value[column] - alone).norm() < allowed
    assert inverse.solve(rhs[:0]).value.shape == (0, 30)


def test_columns_stop_when_they_are_done() -> None:
    diagonal = torch.logspace(0, 4, 50).double()
    rhs = torch.stack([torch.zeros(50).double(), torch.eye(50).double()[3], torch.ones(50).double()])
    active = []

    def product(v: Tensor) -> Tensor:
        active.append(len(v))
        return v * diagonal

    run = conjugate_gradients(product, rhs, 1e-10 * rhs.norm(dim=-1), 500)
    assert run.outcomes == [Outcome.CONVERGED] * 3
    assert active[0] == 2
    assert set(active[1:]) == {1}
    assert not run.value[0].any()
    torch.testing.assert_close(run.value[1:], rhs[1:] / diagonal, rtol=1e-8, atol=1e-12)
    assert run.steps[:, 1].isfinite().sum() == 1


def test_an_indefinite_matrix_is_noticed_column_by_column() -> None:
    diagonal = torch.tensor([1.0, 2.0, -3.0, math.nan]).double()
    rhs = torch.eye(4).double()
    mask = rhs.bool()
    run = conjugate_gradients(lambda v: torch.where(v == 0, 0.0, v * diagonal), rhs, torch.full((4,), 1e-9), 50)
    assert mask.all(-1).sum() == 0
    assert run.outcomes == [Outcome.CONVERGED, Outcome.CONVERGED, Outcome.NOT_POSITIVE, Outcome.NOT_FINITE]


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("shape", ["one row", "one feature", "duplicates", "all missing"])
def test_degenerate_problems(name: str, shape: str) -> None:
    problem = case(1 if shape == "one row" else 10, 0.05)
    if shape == "one feature":
        problem = problem._replace(module=torch.nn.Sequential(torch.nn.Linear(5, 1), torch.nn.Linear(1, 1)).double())
    if shape == "duplicates":
        problem = problem._replace(x=problem.x[:3].repeat(5, 1), y=torch.randn(15).double())
    if shape == "all missing":
        problem = problem._replace(noise=torch.full((10,), torch.inf).double(), y=torch.full((10,), torch.nan).double())
    only = "1.bias" if shape == "one feature" else None
    features = Features(gpntk.AutoBackend(gpntk.freeze(problem.module, parameters=only)), problem.x)
    posterior = Posterior(
        WhitenedSystem(FeatureCovariance(features, problem.variances), problem.noise), problem.y, SOLVERS[name]
    )
    z = torch.randn(4, 5).double()
    k = jacobian(problem.module, z)
    dense = problem.dense
    if shape == "one feature":
        assert features.num_features == 1
        dense = replace(dense, j=dense.j[:, -1:])
        k = k[:, -1:]
    sd = dense.covariance(k).diagonal().sqrt()
    assert bool(((posterior.mean(z) - dense.mean(k)).abs() <= 1e-4 * sd).all())
    torch.testing.assert_close(posterior.variance(z).sqrt(), sd, rtol=1e-3, atol=1e-12)
    value = log_evidence(FeatureCovariance(features, problem.variances), problem.noise, problem.y, SOLVERS[name])
    expected = dense.log_marginal_likelihood(problem.variances, problem.noise, problem.y)
    error = SOLVERS[name].prepare(posterior.inverse.system).logdet().standard_error
    assert abs(value - expected) <= 2 * error + 1e-3 * len(problem.y)


def test_one_infinite_noise_for_all_rows_is_no_data() -> None:
    problem = case(6, math.inf)
    assert problem.system.observed == 0
    assert problem.system.noise_logdet == 0
    for solver in SOLVERS.values():
        value = log_evidence(FeatureCovariance(problem.features, problem.variances), problem.noise, problem.y, solver)
        assert value == 0


def test_advice_is_given() -> None:
    result = SolveResult(torch.zeros(1, 2), (Outcome.EXHAUSTED,), 7, torch.tensor([0.5]))
    with pytest.raises(SolveError, match=r"relative residual 5\.0e-01 after 7 iterations.*allow more"):
        result.checked()


def test_direct_solvers_refuse_what_rounding_has_taken() -> None:
    for noise, solver in ((1e-18, FunctionSpace()), (1e-16, WeightSpace())):
        for many in (False, True):
            problem = case(60, noise)
            with pytest.raises(SolveError, match=r"NOT_POSITIVE|STAGNATED"):
                solver.prepare(problem.system, many).solve(problem.y.unsqueeze(0)).checked()
    assert set(DIRECT) == {"function", "weight"}
    assert gpntk.errors.SolveError is SolveError


@pytest.mark.parametrize(
    ("make", "name", "values"),
    [
        (ConjugateGradients, "tolerance", (-1, 0, 1.0, math.nan, math.inf, "small", True)),
        (ConjugateGradients, "variance_tolerance", (0, math.nan)),
        (ConjugateGradients, "max_iterations", (0, 2.5, True)),
        (ConjugateGradients, "probes", (0, 1.5)),
        (ConjugateGradients, "checkpoint_iterations", (0, 0.5)),
        (ConjugateGradients, "preconditioner", (None, "nystrom")),
        (Nystrom, "max_rank", (-1, 0, 2.5)),
        (Nystrom, "error", (-1, math.nan, "small")),
        (SampledGram, "oversampling", (-1, 0, math.nan)),
        (AutoSolver, "columns", (0, 2.5, "3")),
        *((make, "seed", (-1, 1.5)) for make in (ConjugateGradients, Nystrom, SampledGram)),
    ],
)
def test_options_that_mean_nothing(make, name: str, values) -> None:
    for value in values:
        with pytest.raises(InputError, match=f"{name}="):
            make(**{name: value})
