"""One system, one posterior: dense kernels, noise in blocks, variances per parameter, several columns of targets."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gpntk
from gpntk.errors import InputError, SolveError
from gpntk.inference import (
    AbstractSolver,
    AutoSolver,
    ConjugateGradients,
    DenseCovariance,
    FeatureCovariance,
    Features,
    FunctionSpace,
    Nystrom,
    Posterior,
    SampledGram,
    WeightSpace,
    WhitenedSystem,
    log_evidence,
)
from gpntk.inference.auto import largest_dense, sizes_of
from tests.dense_gp import DIRECT, ITERATIVE, SOLVERS, jacobian, network

DENSE: dict[str, AbstractSolver] = {
    name: solver
    for name, solver in SOLVERS.items()
    if name == "function" or (name in ITERATIVE and solver.preconditioner.space == "function")
}


def kernel(one: Tensor, two: Tensor) -> Tensor:
    """Two correlated outputs of an RBF kernel, plus a linear one: `[..., 2N, 2M]`."""
    base = (-0.3 * torch.cdist(one, two).square()).exp()
    mixing = torch.tensor([[1.0, 0.4], [0.4, 0.7]], dtype=one.dtype)
    both = torch.einsum("...nm,cd->...ncmd", base, mixing).flatten(-4, -3).flatten(-2)
    linear = 0.1 * (one @ two.mT)
    return both + linear.repeat_interleave(2, -2).repeat_interleave(2, -1)


class Exact:
    """Rasmussen and Williams (2006), eqs. 2.23, 2.24, 2.30, for any precision of the noise, by an explicit inverse."""

    def __init__(self, gram: Tensor, precision: Tensor, y: Tensor) -> None:
        eye = torch.eye(len(gram), dtype=gram.dtype)
        # (K + Λ⁻¹)⁻¹ = Λ (I + K Λ)⁻¹, for singular Λ, too.
        self.p = precision @ torch.linalg.inv(eye + gram @ precision)
        self.logdet = torch.linalg.slogdet(eye + gram @ precision).logabsdet
        self.dual = y @ self.p

    def mean(self, cross: Tensor) -> Tensor:
        return self.dual @ cross.mT

    def covariance(self, cross: Tensor, prior: Tensor) -> Tensor:
        return prior - cross @ self.p @ cross.mT


def check(posterior: Posterior, exact: Exact, z: Tensor, cross: Tensor, prior: Tensor, direct: bool) -> None:
    tolerance = 1e-9 if direct else 2e-3
    covariance = exact.covariance(cross, prior)
    torch.testing.assert_close(posterior.mean(z), exact.mean(cross), rtol=0, atol=1e-9 if direct else 1e-5)
    assert (posterior.covariance(z) - covariance).abs().max() <= tolerance * prior.max()
    variance = covariance.diagonal()
    torch.testing.assert_close(posterior.variance(z), variance, rtol=1e-7 if direct else 3e-3, atol=1e-10)


# --- dense kernels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [None, 3])
@pytest.mark.parametrize("name", DENSE)
def test_a_dense_kernel(name: str, columns: int | None) -> None:
    x, z, new = torch.randn(14, 3).double(), torch.randn(4, 3).double(), torch.randn(3, 3).double()
    shape = (28,) if columns is None else (columns, 28)
    y, noise = torch.randn(shape).double(), 0.1 + torch.rand(28).double()
    y[..., [3, 9]], noise[[3, 9]] = torch.nan, torch.inf
    posterior = Posterior(WhitenedSystem(DenseCovariance(kernel, x, 2), noise), y, DENSE[name])
    direct, seen = name in DIRECT, noise.isfinite()
    precision = (1 / noise).diag()
    for step in range(3):
        exact = Exact(kernel(x, x), precision, y.nan_to_num(0.0))
        check(posterior, exact, z, kernel(z, x), kernel(z, z), direct)
        count = int(seen.sum())
        gram = kernel(x, x)[seen][:, seen] + (1 / precision.diagonal()[seen]).diag()
        logs = torch.distributions.MultivariateNormal(torch.zeros(count).double(), gram).log_prob(y[..., seen])
        error = 0 if direct else 4 * posterior.inverse.logdet().standard_error * (columns or 1)
        assert abs(posterior.log_evidence - logs.sum()) <= 1e-8 * abs(logs.sum()) + error
        if direct:
            check_leave_one_out(posterior, x, y, precision)
            trace = (kernel(x, x) @ exact.p).trace() * (columns or 1)
            assert posterior.effective_parameters() == pytest.approx(float(trace))
        if step == 2:
            break
        targets, noises = torch.randn(*shape[:-1], 6).double(), torch.full((6,), 0.05 + 0.1 * step).double()
        targets[..., 0], noises[0] = torch.nan, torch.inf
        posterior = posterior.condition_on(new + step, targets, noises)
        x, y = torch.cat([x, new + step]), torch.cat([y, targets], -1)
        precision = torch.block_diag(precision, (1 / noises).diag())
        seen = precision.diagonal() > 0


def check_leave_one_out(posterior: Posterior, x: Tensor, y: Tensor, precision: Tensor) -> None:
    """By leaving each target out in turn."""
    mean, variance = posterior.leave_one_out()
    gram = kernel(x, x)
    for row in (0, 3, 7, len(gram) - 1):
        without = precision.clone()
        without[row] = 0
        exact = Exact(gram, without, y.nan_to_num(0.0))
        if precision[row, row] == 0:
            assert bool(variance[row].isnan() & mean[..., row].isnan().all())
            continue
        torch.testing.assert_close(mean[..., row], exact.mean(gram[[row]]).squeeze(-1), rtol=1e-8, atol=1e-8)
        expected = exact.covariance(gram[[row]], gram[[row]][:, [row]]) + 1 / precision[row, row]
        torch.testing.assert_close(variance[row], expected.squeeze(), rtol=1e-8, atol=0)


@pytest.mark.parametrize("columns", [None, 3])
@pytest.mark.parametrize("shared_noise", [True, False])
def test_gradients_of_a_dense_evidence(shared_noise: bool, columns: int | None) -> None:
    x = torch.randn(9, 2).double()
    y = torch.randn((9,) if columns is None else (columns, 9)).double()
    noise = torch.tensor([0.3]).double() if shared_noise else 0.1 + torch.rand(9).double()
    scale = torch.tensor(0.7).double()
    if not shared_noise:
        noise[4], y[..., 4] = torch.inf, torch.nan
    seen = noise.isfinite().expand(9)

    def gram(scale: Tensor) -> Tensor:
        return (-scale * torch.cdist(x, x).square()).exp()

    def reference(scale: Tensor, noise: Tensor, y: Tensor) -> Tensor:
        inner = gram(scale)[seen][:, seen] + noise.expand(9)[seen].diag()
        return torch.distributions.MultivariateNormal(inner.new_zeros(len(inner)), inner).log_prob(y[..., seen]).sum()

    arguments = [value.clone().requires_grad_() for value in (scale, noise, y)]
    covariance = DenseCovariance(lambda one, two: (-arguments[0] * torch.cdist(one, two).square()).exp(), x)
    expected = reference(*arguments)
    gradients = torch.autograd.grad(expected, arguments)
    for value in (log_evidence(gram(arguments[0]), *arguments[1:]), log_evidence(covariance, *arguments[1:])):
        torch.testing.assert_close(value, expected)
        for ours, theirs in zip(torch.autograd.grad(value, arguments), gradients, strict=True):
            torch.testing.assert_close(ours.nan_to_num(0.0), theirs.nan_to_num(0.0), rtol=1e-9, atol=1e-10)


def test_a_dense_evidence_that_cannot_be_says_so() -> None:
    gram = torch.eye(3).double()
    with pytest.raises(SolveError, match="NOT_POSITIVE"):
        log_evidence(-2 * gram, torch.ones(1), torch.zeros(3))
    with pytest.raises(InputError, match="noise variances must be positive"):
        log_evidence(gram, torch.zeros(1), torch.zeros(3))
    with pytest.raises(InputError, match=r"do not fit: give \[n, n\]"):
        log_evidence(gram, torch.ones(2), torch.zeros(3))


def test_samples_of_a_dense_kernel() -> None:
    x, z = torch.randn(14, 3).double(), torch.randn(2, 3).double()
    system = WhitenedSystem(DenseCovariance(kernel, x, 2), torch.tensor([0.1]))
    posterior = Posterior(system, torch.randn(28).double())
    samples = posterior.sample(z, 20_000, torch.Generator().manual_seed(0))
    covariance = posterior.covariance(z)
    assert (samples.mean(0) - posterior.mean(z)).abs().max() < 0.02
    assert (samples.T.cov() - covariance).abs().max() < 0.03 * covariance.max() + 1e-3
    with pytest.raises(InputError, match="a dense covariance has no weight space"):
        posterior.sample_weights(3)
    for name in ("weight", "sampled"):
        with pytest.raises(InputError, match="a dense covariance has no weight space"):
            Posterior(system, torch.zeros(28), SOLVERS[name])


# --- noise in blocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", [*SOLVERS, "auto", "dense"])
def test_noise_in_blocks(name: str, rank: int) -> None:
    """A curvature of any rank, and of none for some inputs, is that of its explicit matrix."""
    module, x, z = network(3, 5), torch.randn(12, 5).double(), torch.randn(3, 5).double()
    features = Features(gpntk.AutoBackend(gpntk.freeze(module)), x)
    root, y = torch.randn(12, 3, rank).double(), torch.randn(36).double()
    root[4] = 0
    y[12:15] = torch.nan

    def tangents(one: Tensor, two: Tensor) -> Tensor:
        left, right = (jacobian(module, v.flatten(0, -2)).unflatten(0, (*v.shape[:-2], -1)) for v in (one, two))
        return 0.4 * left @ right.mT

    covariance = FeatureCovariance(features, torch.tensor([0.4], dtype=torch.float64))
    if name == "dense":
        covariance = DenseCovariance(tangents, x, 3)
    solver = {"auto": AutoSolver(), "dense": FunctionSpace()}.get(name) or SOLVERS[name]
    posterior = Posterior(WhitenedSystem(covariance, root=root), y, solver)
    direct = name not in ITERATIVE
    j, k = jacobian(module, x), jacobian(module, z)
    precision = torch.block_diag(*(root @ root.mT))
    exact = Exact(0.4 * j @ j.T, precision, y.nan_to_num(0.0))
    if name == "dense":
        mean = posterior.mean(z)
        torch.testing.assert_close(mean, exact.mean(0.4 * k @ j.T), rtol=0, atol=1e-9)
        torch.testing.assert_close(posterior.covariance(z), exact.covariance(0.4 * k @ j.T, 0.4 * k @ k.T))
    else:
        check(posterior, exact, z, 0.4 * k @ j.T, 0.4 * k @ k.T, direct)
    determinant = posterior.inverse.logdet()
    assert abs(determinant.value - exact.logdet) <= 1e-8 + 4 * determinant.standard_error
    # Blocks of B⁻¹ = I - Rᵀ (K⁻¹ + Λ)⁻¹ R, by the posterior covariance at the data.
    inner = exact.covariance(0.4 * j @ j.T, 0.4 * j @ j.T).unflatten(0, (12, 3)).unflatten(-1, (12, 3))
    blocks = inner.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    expected = torch.eye(rank).double() - root.mT @ blocks @ root
    error = (posterior.inverse.inverse_blocks() - expected).abs().max()
    assert error < (1e-9 if direct else 0.5)
    # One more input, with a block of its own.
    new, more = torch.randn(1, 3, rank).double(), torch.randn(1, 5).double()
    grown = posterior.condition_on(more, torch.ones(3).double(), root=new)
    all_x, all_y = torch.cat([x, more]), torch.cat([y, torch.ones(3).double()])
    together = posterior.inverse.system.covariance.extended(more)
    again = Posterior(WhitenedSystem(together, root=torch.cat([root, new])), all_y, solver)
    assert all_x.shape[0] == together.num_samples
    torch.testing.assert_close(grown.mean(z), again.mean(z), rtol=0, atol=1e-9 if direct else 1e-5)
    torch.testing.assert_close(grown.variance(z), again.variance(z), rtol=1e-7 if direct else 3e-3, atol=1e-9)


def test_noise_in_blocks_of_full_rank_has_an_evidence() -> None:
    x = torch.randn(6, 3).double()
    root, y = torch.randn(6, 2, 2).double(), torch.randn(12).double()
    posterior = Posterior(WhitenedSystem(DenseCovariance(kernel, x, 2), root=root), y)
    matrix = kernel(x, x) + torch.block_diag(*torch.linalg.inv(root @ root.mT))
    expected = torch.distributions.MultivariateNormal(torch.zeros(12).double(), matrix).log_prob(y)
    torch.testing.assert_close(posterior.log_evidence, expected)
    with pytest.raises(InputError, match="root is singular"):
        _ = Posterior(WhitenedSystem(DenseCovariance(kernel, x, 2), root=root[..., :1]), y).log_evidence
    with pytest.raises(InputError, match="leave_one_out of targets needs noise variances"):
        posterior.leave_one_out()


@pytest.mark.parametrize("shape", [(12, 2), (5, 2, 2), (6, 3, 2)])
def test_a_root_must_fit(shape: tuple[int, ...]) -> None:
    covariance = DenseCovariance(kernel, torch.randn(6, 3).double(), 2)
    with pytest.raises(InputError, match=r"root must be finite \[N, C, q\] with N, C = \(6, 2\)"):
        WhitenedSystem(covariance, root=torch.ones(shape))
    with pytest.raises(InputError, match="give either noise"):
        WhitenedSystem(covariance)


# --- a prior variance for every parameter ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_a_prior_variance_for_every_parameter(name: str) -> None:
    module, x, z = network(2, 5), torch.randn(15, 5).double(), torch.randn(3, 5).double()
    features = Features(gpntk.AutoBackend(gpntk.freeze(module)), x)
    j, k = jacobian(module, x), jacobian(module, z)
    s = (0.2 + torch.rand(j.shape[1]).double()).requires_grad_()
    y, noise = torch.randn(30).double(), torch.full((30,), 0.2).double()
    direct = name in DIRECT
    covariance = FeatureCovariance(features, s)
    posterior = Posterior(WhitenedSystem(covariance, noise), y, SOLVERS[name])
    prior = s.detach()
    exact = Exact((j * prior) @ j.T, (1 / noise).diag(), y)
    check(posterior, exact, z, (k * prior) @ j.T, (k * prior) @ k.T, direct)
    torch.testing.assert_close(covariance.gram(), (j * prior) @ j.T)
    torch.testing.assert_close(covariance.prior_diagonal(), (j.square() @ prior))
    value = log_evidence(covariance, noise, y, SOLVERS[name])
    matrix = (j * s) @ j.T + noise.diag()
    expected = torch.distributions.MultivariateNormal(torch.zeros(30).double(), matrix).log_prob(y)
    error = 4 * posterior.inverse.logdet().standard_error
    assert abs(value - expected) <= 1e-8 + error
    ours, theirs = torch.autograd.grad(value, s)[0], torch.autograd.grad(expected, s)[0]
    if direct:
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
    else:
        assert abs((ours * prior).sum() - (theirs * prior).sum()) < 0.01 * (30 + (theirs * prior).abs().sum()) + error


@pytest.mark.parametrize("name", SOLVERS)
def test_leave_one_out_and_effective_parameters_of_features(name: str) -> None:
    """In weight space from leverages; with conjugate gradients they are estimates."""
    module, x = network(1, 4), torch.randn(60, 5).double()
    features = Features(gpntk.AutoBackend(gpntk.freeze(module)), x)
    y, noise = torch.randn(60).double(), 0.5 + torch.rand(60).double()
    posterior = Posterior(WhitenedSystem(FeatureCovariance(features, torch.tensor([0.3])), noise), y, SOLVERS[name])
    j = jacobian(module, x)
    variances = torch.tensor([0.3]).double()
    inverse = torch.linalg.inv(variances * j @ j.T + noise.diag())
    variance = 1 / inverse.diagonal()
    mean = y - (inverse @ y) * variance
    ours = posterior.leave_one_out()
    direct = name in DIRECT
    torch.testing.assert_close(ours.variance, variance, rtol=1e-6 if direct else 0.3, atol=0)
    torch.testing.assert_close(ours.mean, mean, rtol=0, atol=1e-6 if direct else 0.3 * float((y - mean).abs().max()))
    effective = float((variances * j @ j.T @ inverse).trace())
    assert posterior.effective_parameters() == pytest.approx(effective, rel=1e-6 if direct else 0.05)


# --- the order of calls ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
@settings(max_examples=5, deadline=None)
@given(
    calls=st.lists(st.sampled_from(["mean", "evidence", "variance", "conditioned", "sample"]), min_size=2, max_size=4)
)
def test_no_answer_depends_on_the_calls_before(name: str, calls: list[str]) -> None:
    """What is kept with features saves time; it changes no result beyond rounding."""
    torch.manual_seed(0)
    module, x, new = network(1, 6), torch.randn(40, 5).double(), torch.randn(2, 5).double()
    y, more, z = torch.randn(40).double(), torch.randn(2).double(), torch.randn(3, 5).double()
    variance, noise = torch.ones(1).double(), torch.tensor([1e-5 if name in DIRECT else 1e-2]).double()

    def answer(features: Features, call: str) -> Tensor:
        if call == "evidence":
            arguments = variance.clone().requires_grad_(), noise.clone().requires_grad_()
            value = log_evidence(FeatureCovariance(features, arguments[0]), arguments[1], y, SOLVERS[name])
            return torch.stack([value.detach(), *(grad.squeeze() for grad in torch.autograd.grad(value, arguments))])
        posterior = Posterior(WhitenedSystem(FeatureCovariance(features, variance), noise), y, SOLVERS[name])
        if call == "mean":
            return posterior.mean(z)
        if call == "variance":
            return posterior.variance(z)
        if call == "sample":
            return posterior.sample(z, 2, torch.Generator().manual_seed(1))
        return posterior.condition_on(new, more, noise).mean(z)

    backend = gpntk.AutoBackend(gpntk.freeze(module))
    kept = Features(backend, x)
    for call in calls:
        fresh = Features(gpntk.AutoBackend(gpntk.freeze(module)), x)
        torch.testing.assert_close(answer(kept, call), answer(fresh, call), rtol=1e-9, atol=1e-10)


def test_settings_are_checked() -> None:
    for name, value in (("tolerance", -1), ("variance_tolerance", 0), ("max_iterations", -1), ("probes", 0)):
        with pytest.raises(InputError, match=f"{name}={value}"):
            ConjugateGradients(**{name: value})
    assert math.isfinite(ConjugateGradients().tolerance)
    with pytest.raises(InputError, match="tolerance=nan"):
        ConjugateGradients(tolerance=math.nan)
    with pytest.raises(InputError, match="columns=0"):
        AutoSolver(columns=0)
    for rank in (-1, 2.5):
        with pytest.raises(InputError, match=f"max_rank={rank}: give a whole number"):
            Nystrom(max_rank=rank)
    with pytest.raises(InputError, match=r"error=-0\.5"):
        Nystrom(error=-0.5)
    with pytest.raises(InputError, match="space='foo': choose 'function' or 'weight'"):
        Nystrom(space="foo")
    with pytest.raises(InputError, match="oversampling=0: give a positive number"):
        SampledGram(oversampling=0)


def test_costs_of_every_solver_are_counted() -> None:
    """Small systems of few features go to weight space, and a spectrum costs 27 factorisations."""
    features = Features(gpntk.AutoBackend(gpntk.freeze(torch.nn.Linear(5, 1))), torch.randn(1000, 5))
    system = WhitenedSystem(FeatureCovariance(features, torch.ones(1)), torch.ones(1))
    choice = AutoSolver().select(system)
    assert choice.solver == WeightSpace()
    assert "few beside 1000 rows" in str(choice)
    sizes = sizes_of(system, 1)
    assert AutoSolver().cost(sizes) == WeightSpace().cost(sizes)
    for solver, size in ((WeightSpace(), 6), (FunctionSpace(), 1000)):
        once, many = (solver.cost(sizes._replace(spectral=spectral)).once.flops for spectral in (False, True))
        assert many - once == pytest.approx(26 * size**3 / 3)
    assert Posterior(system, torch.zeros(1000)).choice.solver == WeightSpace()


def test_a_dense_factorisation_keeps_to_memory_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpntk.inference.auto.default_budget", lambda _device: 2**30)
    assert largest_dense(torch.device("cpu")) == int((2**31 / 24) ** 0.5)
    monkeypatch.setattr("gpntk.inference.auto.default_budget", lambda _device: 2**50)
    assert largest_dense(torch.device("cpu")) == int((3 * 20 * 1e11) ** (1 / 3))
