"""Laplace's method against scipy, scikit-learn, laplace-torch and the formulas with explicit inverses."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Kernel
from torch import Tensor, nn

import gpntk
from gpntk.errors import InputError, SolveError
from gpntk.inference import (
    AbstractSolver,
    ConjugateGradients,
    DenseCovariance,
    FeatureCovariance,
    Features,
    FunctionSpace,
    Nystrom,
    WeightSpace,
)
from gpntk.likelihoods import probabilities
from gpntk.models import LaplacePosterior

ORACLES = Path(__file__).parent / "oracles" / "laplace"


def laplace(mean: Tensor, covariance: Tensor, labels: Tensor, start: Tensor | None = None) -> LaplacePosterior:
    return LaplacePosterior(covariance, labels, mean, start=start)


def some(matrix: Tensor, chosen: Tensor | int, outputs: int = 1) -> tuple[DenseCovariance, Tensor]:
    """A covariance at some of the points (or the first ones) of a matrix of all, and all inputs of its kernel."""
    every = DenseCovariance.of_matrix(matrix, outputs)
    data = every.x[:chosen] if isinstance(chosen, int) else every.x[chosen]
    return DenseCovariance(every.kernel, data, outputs), every.x


class Problem(NamedTuple):
    mean: Tensor
    covariance: Tensor
    labels: Tensor


def problem(points: int, outputs: int, seed: int = 0, rank: int | None = None, scale: float = 4.0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    rows = points * outputs
    root = torch.randn(rows, rank or rows, generator=generator, dtype=torch.float64)
    return Problem(
        torch.randn(points, outputs, generator=generator, dtype=torch.float64),
        scale * root @ root.mT / root.shape[1],
        torch.randint(max(2, outputs), (points,), generator=generator),
    )


def shared_problem(points: int, outputs: int, seed: int = 0) -> tuple[Problem, Problem]:
    """One problem, its covariance given as k and as k ⊗ I."""
    mean, _, labels = problem(points, outputs, seed)
    k = problem(points, 1, seed + 1).covariance
    return Problem(mean, k, labels), Problem(mean, torch.kron(k, torch.eye(outputs).double()), labels)


def log_likelihood(f: Tensor, labels: Tensor) -> Tensor:
    if f.shape[1] == 1:
        return torch.distributions.Bernoulli(logits=f[:, 0]).log_prob(labels.double()).sum()
    return torch.distributions.Categorical(logits=f).log_prob(labels).sum()


def hessian(f: Tensor, labels: Tensor) -> Tensor:
    """Λ `[N*C, N*C]`, by automatic differentiation."""
    flat = torch.autograd.functional.hessian(lambda v: -log_likelihood(v.view_as(f), labels), f.flatten())
    assert isinstance(flat, Tensor)
    return flat


def brute_force(mean: Tensor, covariance: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Mode and evidence, by a general optimiser and explicit inverses; K must be regular."""
    precision = covariance.inverse()

    def negative(f: np.ndarray) -> tuple[float, np.ndarray]:
        value = torch.tensor(f, requires_grad=True)
        offset = value - mean.flatten()
        loss = 0.5 * offset @ precision @ offset - log_likelihood(value.view_as(mean), labels)
        loss.backward()
        assert value.grad is not None
        return loss.item(), value.grad.numpy()

    found = minimize(negative, mean.flatten().numpy(), jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 9999})
    mode = torch.as_tensor(found.x).view_as(mean)
    _, logdet = torch.linalg.slogdet(precision + hessian(mode, labels))
    return mode, float(-found.fun - 0.5 * (torch.logdet(covariance) + logdet))


@settings(max_examples=25, deadline=None)
@given(
    points=st.integers(1, 6), outputs=st.integers(1, 4), seed=st.integers(0, 999), scale=st.sampled_from([0.1, 1, 30])
)
def test_mode_and_evidence(points: int, outputs: int, seed: int, scale: float) -> None:
    data = problem(points, outputs, seed, scale=scale)
    posterior = laplace(*data)
    mode, evidence = brute_force(*data)
    np.testing.assert_allclose(posterior.mode, mode, atol=1e-5 * max(1, mode.abs().max().item()))
    assert posterior.log_evidence.item() == pytest.approx(evidence, abs=1e-6)
    # At the mode itself, to rounding: f = m + K α and α is the gradient of the log-likelihood.
    f = posterior.mode.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_likelihood(f, data.labels), f)
    np.testing.assert_allclose(posterior.dual, gradient, atol=1e-8)
    implied = data.mean.flatten() + data.covariance @ posterior.dual.flatten()
    np.testing.assert_allclose(posterior.mode.flatten(), implied, atol=1e-9 * max(1, scale))


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_predictions_with_explicit_inverses(outputs: int) -> None:
    # One prior over eight points, of which five are labelled.
    mean, covariance, labels = problem(8, outputs, 1)
    known = 5 * outputs
    prior, inputs = some(covariance, 5, outputs)
    posterior = LaplacePosterior(prior, labels[:5], mean[:5])
    # (K⁻¹ + Λ)⁻¹ with Λ zero where there is no label, of all eight points at once: no identity of ours is used.
    curvature = torch.zeros_like(covariance)
    curvature[:known, :known] = hessian(posterior.mode, labels[:5])
    expected = (covariance.inverse() + curvature).inverse()[known:, known:]
    np.testing.assert_allclose(posterior.covariance(inputs[5:]), expected, atol=1e-8)
    np.testing.assert_allclose(posterior.variance(inputs[5:]), expected.diagonal(), atol=1e-8)
    latent = posterior.latent(inputs[5:], mean[5:])
    cross = covariance[known:, :known]
    offset = cross @ covariance[:known, :known].inverse() @ (posterior.mode - mean[:5]).flatten()
    np.testing.assert_allclose(posterior.mean(inputs[5:]), offset, atol=1e-8)
    np.testing.assert_allclose(latent.mean.flatten(), mean[5:].flatten() + offset, atol=1e-8)
    np.testing.assert_allclose(posterior.predict(inputs[5:], mean[5:]), probabilities(*latent), atol=1e-12)
    for m in range(3):
        rows = slice(m * outputs, (m + 1) * outputs)
        np.testing.assert_allclose(latent.covariance[m], expected[rows, rows], atol=1e-8)


@pytest.mark.parametrize("outputs", [1, 2, 4])
def test_leave_one_out_drops_the_factor_of_a_point(outputs: int) -> None:
    mean, covariance, labels = problem(6, outputs, 2)
    posterior = laplace(mean, covariance, labels)
    latent = posterior.leave_one_out()
    precision, curvature = covariance.inverse(), hessian(posterior.mode, labels)
    # The likelihood's Gaussian factors exp(-½ fᵀ Λ f + ηᵀ f), of which each point's is left out in turn.
    linear = (curvature @ posterior.mode.flatten()).view_as(mean) + posterior.dual
    for n in range(6):
        rows = slice(n * outputs, (n + 1) * outputs)
        left, left_linear = curvature.clone(), linear.clone()
        left[rows, rows], left_linear[n] = 0, 0
        cavity = (precision + left).inverse()
        expected = cavity @ (left_linear.flatten() + precision @ mean.flatten())
        np.testing.assert_allclose(latent.covariance[n], cavity[rows, rows], rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(latent.mean[n], expected[rows], rtol=1e-6, atol=1e-8)


def test_leave_one_out_is_near_refitting() -> None:
    x = torch.linspace(-2, 2, 25, dtype=torch.float64)
    covariance = 4 * (-2 * (x[:, None] - x) ** 2).exp()
    labels = ((3 * x).sin() > 0).long()
    mean = torch.zeros(25, 1, dtype=torch.float64)
    closed = probabilities(*laplace(mean, covariance, labels).leave_one_out())
    refitted = torch.empty_like(closed)
    for n in range(25):
        others = torch.arange(25) != n
        prior, inputs = some(covariance, others)
        refitted[n] = LaplacePosterior(prior, labels[others], mean[others]).predict(inputs[[n]], mean[[n]])
    assert (closed - refitted).abs().max() < 0.02
    assert refitted.std() > 0.2


@pytest.mark.parametrize(("outputs", "rank"), [(1, None), (2, 3), (3, None), (4, 2)])
def test_derivatives_of_the_evidence(outputs: int, rank: int | None) -> None:
    mean, covariance, labels = problem(4, outputs, 3)
    root = torch.linalg.cholesky(covariance)[:, :rank].clone()
    inputs = (mean.requires_grad_(), root.requires_grad_())
    assert torch.autograd.gradcheck(lambda m, r: laplace(m, r @ r.mT, labels).log_evidence, inputs)


@pytest.mark.parametrize("outputs", [2, 4])
def test_derivatives_of_the_evidence_of_a_shared_kernel(outputs: int) -> None:
    mean, _, labels = problem(5, outputs, 4)
    root = torch.linalg.cholesky(problem(5, 1, 5).covariance)
    inputs = (mean.requires_grad_(), root.requires_grad_())
    assert torch.autograd.gradcheck(lambda m, r: laplace(m, r @ r.mT, labels).log_evidence, inputs)


def test_the_incoming_gradient_counts() -> None:
    mean, covariance, labels = problem(4, 3)
    gradients = []
    for factor in (1.0, -3.0):
        leaves = (mean.clone().requires_grad_(), covariance.clone().requires_grad_())
        gradients.append(torch.autograd.grad(factor * laplace(*leaves, labels).log_evidence, leaves))
    for one, two in zip(*gradients, strict=True):
        assert one.abs().max() > 1e-3
        np.testing.assert_allclose(-3 * one, two, rtol=1e-9, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(points=st.integers(1, 7), outputs=st.integers(2, 5), seed=st.integers(0, 999))
def test_a_shared_kernel_is_a_dense_one(points: int, outputs: int, seed: int) -> None:
    shared, dense = shared_problem(points, outputs, seed)
    one, two = laplace(*shared), laplace(*dense)
    x = torch.arange(points, dtype=torch.float64).unsqueeze(-1)
    np.testing.assert_allclose(one.mode, two.mode, atol=1e-8)
    assert one.log_evidence.item() == pytest.approx(two.log_evidence.item(), abs=1e-9)
    for part, expected in zip(one.latent(x[::2]), two.latent(x[::2]), strict=True):
        np.testing.assert_allclose(part, expected, atol=1e-8)
    np.testing.assert_allclose(one.covariance(x), two.covariance(x), atol=1e-8)
    np.testing.assert_allclose(one.covariance(x.unsqueeze(1)), two.covariance(x.unsqueeze(1)), atol=1e-8)
    assert one.effective_parameters() == pytest.approx(two.effective_parameters())
    for part, expected in zip(one.leave_one_out(), two.leave_one_out(), strict=True):
        np.testing.assert_allclose(part, expected, rtol=1e-7, atol=1e-7)


@settings(max_examples=20, deadline=None)
@given(points=st.integers(1, 8), seed=st.integers(0, 999))
def test_two_classes_are_one_logit(points: int, seed: int) -> None:
    mean, covariance, labels = problem(points, 2, seed)
    difference = torch.kron(torch.eye(points), torch.tensor([[-1.0, 1.0]])).double()
    softmax = laplace(mean, covariance, labels)
    logit = laplace((difference @ mean.flatten()).view(-1, 1), difference @ covariance @ difference.mT, labels)
    np.testing.assert_allclose(logit.mode[:, 0], softmax.mode[:, 1] - softmax.mode[:, 0], atol=1e-8)
    assert logit.log_evidence.item() == pytest.approx(softmax.log_evidence.item(), abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(outputs=st.integers(2, 4), seed=st.integers(0, 999), shift=st.floats(-50, 50))
def test_symmetries(outputs: int, seed: int, shift: float) -> None:
    mean, covariance, labels = problem(4, outputs, seed)
    posterior = laplace(mean, covariance, labels)
    shifted = laplace(mean + shift, covariance, labels)
    np.testing.assert_allclose(shifted.mode - shift, posterior.mode, atol=1e-8)
    assert shifted.log_evidence.item() == pytest.approx(posterior.log_evidence.item(), abs=1e-8)
    order = torch.randperm(outputs, generator=torch.Generator().manual_seed(seed))
    rows = (outputs * torch.arange(4)[:, None] + order).flatten()
    renamed = laplace(mean[:, order], covariance[rows][:, rows], order.argsort()[labels])
    np.testing.assert_allclose(renamed.mode, posterior.mode[:, order], atol=1e-8)
    assert renamed.log_evidence.item() == pytest.approx(posterior.log_evidence.item(), abs=1e-9)


def rbf(kernel: Kernel, one: Tensor, two: Tensor) -> Tensor:
    """A kernel of the peer, on batches."""
    if one.dim() == 2:
        return torch.as_tensor(kernel(one.numpy(), two.numpy()))
    return torch.stack([rbf(kernel, *pair) for pair in zip(one, two, strict=True)])


def test_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    x, x_test = rng.normal(size=(40, 2)), rng.normal(size=(10, 2))
    labels = (x[:, 0] * x[:, 1] + 0.3 * rng.normal(size=40) > 0).astype(int)
    kernel = ConstantKernel(5.0) * RBF(0.8)
    peer = GaussianProcessClassifier(kernel, optimizer=None, max_iter_predict=1000).fit(x, labels)
    prior = DenseCovariance(lambda *points: rbf(kernel, *points), torch.as_tensor(x))
    posterior = LaplacePosterior(prior, torch.as_tensor(labels))
    # The peer stops when its log posterior rises by less than 1e-10.
    assert posterior.log_evidence.item() == pytest.approx(peer.log_marginal_likelihood_value_, abs=1e-6)
    latent = posterior.latent(torch.as_tensor(x_test))
    mean, variance = peer.base_estimator_.latent_mean_and_variance(x_test)
    np.testing.assert_allclose(latent.mean[:, 0], mean, atol=1e-5)
    np.testing.assert_allclose(latent.covariance[:, 0, 0], variance, atol=1e-5)
    # The peer approximates the integral of the sigmoid by five error functions.
    np.testing.assert_allclose(probabilities(*latent, "monte_carlo"), peer.predict_proba(x_test), atol=1e-3)


def test_scikit_learns_gradient() -> None:
    rng = np.random.default_rng(1)
    x = torch.as_tensor(rng.normal(size=(25, 1)))
    labels = (x[:, 0].sin() + 0.2 * torch.as_tensor(rng.normal(size=25)) > 0).long()
    kernel = ConstantKernel(3.0) * RBF(0.5)
    peer = GaussianProcessClassifier(kernel, optimizer=None, max_iter_predict=1000).fit(x.numpy(), labels.numpy())
    theta = torch.tensor([3.0, 0.5], dtype=torch.float64).log().requires_grad_()
    gram = theta[0].exp() * (-0.5 * (x - x.mT).square() / (2 * theta[1]).exp()).exp()
    laplace(torch.zeros(25, 1).double(), gram, labels).log_evidence.backward()
    _, gradient = peer.log_marginal_likelihood(theta.detach().numpy(), eval_gradient=True)
    np.testing.assert_allclose(theta.grad, gradient, rtol=1e-5)


class Oracle:
    def __init__(self, name: str, outputs: int, weights_of: AbstractSolver | None) -> None:
        with np.load(ORACLES / f"{name}.npz") as stored:
            self.arrays = {key: torch.as_tensor(stored[key]) for key in stored}
        network = nn.Sequential(nn.Linear(2, 10), nn.Tanh(), nn.Linear(10, outputs)).double()
        network.load_state_dict({key.removeprefix("w/"): v for key, v in self.arrays.items() if key.startswith("w/")})
        kernel, scale = gpntk.NTKKernel(network), 1 / self["prior_precision"].item()
        x, x_test = self["x_train"], self["x_test"]
        weights = torch.cat([p.detach().flatten() for p in network.parameters()])
        with torch.no_grad():
            # The prior is centred at weights zero: f(x; 0) is f(x) - J(x) w in the linearised network.
            means = [network(rows) - (kernel.features(rows) @ weights).view(-1, outputs) for rows in (x, x_test)]
        prior = DenseCovariance(lambda one, two: scale * kernel(one, two).to_dense().detach(), x, outputs)
        if weights_of is not None:
            prior = FeatureCovariance(Features(kernel.backend, x), torch.tensor([scale], dtype=torch.float64))
        self.x_test = x_test
        labels = self["y_train"].long().flatten()
        self.posterior = LaplacePosterior(prior, labels, means[0], solver=weights_of)
        self.latent = self.posterior.latent(x_test, means[1])

    def __getitem__(self, key: str) -> Tensor:
        return self.arrays[key]


@pytest.mark.parametrize(
    "solver", [None, WeightSpace(), FunctionSpace(), ConjugateGradients(Nystrom(max_rank=20))], ids=str
)
@pytest.mark.parametrize(("name", "outputs"), [("cls_mlp_2_10_3_map", 3), ("cls_bernoulli_2_10_1_map", 1)])
def test_laplace_torch(name: str, outputs: int, solver: AbstractSolver | None) -> None:
    oracle = Oracle(name, outputs, solver)
    iterative = solver is not None and not solver.is_direct
    tolerance = 1e-3 if iterative else 1e-6
    # At the MAP of the network the linearised network has its mode too; its gradient there is 1e-7.
    logit = slice(0 if outputs == 3 else 1, None)
    np.testing.assert_allclose(oracle.posterior.mode, oracle["f_train"][:, logit], atol=1e-6)
    np.testing.assert_allclose(oracle.latent.mean, oracle["f_mu"][:, logit], atol=1e-6)
    np.testing.assert_allclose(oracle.latent.covariance, oracle["f_var"][:, logit, logit], atol=tolerance)
    joint = oracle["own_joint_cov"].view(8, oracle["f_mu"].shape[1], 8, -1)[:, logit, :, logit]
    joint = joint.reshape(8 * outputs, -1)
    np.testing.assert_allclose(oracle.posterior.covariance(oracle.x_test), joint, atol=tolerance)
    error = 4 * oracle.posterior.log_evidence_error if iterative else 1e-6
    assert oracle.posterior.log_evidence.item() == pytest.approx(oracle["lml_full_laplace"].item(), abs=error + 1e-6)
    np.testing.assert_allclose(probabilities(*oracle.latent, "probit"), oracle["p_probit"], atol=tolerance)
    if outputs == 3:
        np.testing.assert_allclose(probabilities(*oracle.latent, "laplace_bridge"), oracle["p_bridge"], atol=tolerance)


@pytest.mark.parametrize("outputs", [1, 3])
def test_adding_labelled_points(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.rand(32, generator=generator, dtype=torch.float64)
    outer = torch.eye(outputs, dtype=torch.float64) + 0.5
    covariance = torch.kron(20 * (-20 * (x[:, None] - x).square()).exp(), outer)
    mean = torch.randn(32, outputs, generator=generator, dtype=torch.float64)
    labels = (x * max(2, outputs)).long()
    known, inputs = some(covariance, 30, outputs)
    old = LaplacePosterior(known, labels[:30], mean[:30])
    count = counter(monkeypatch)
    fresh = laplace(mean, covariance, labels)
    cold, count[0] = count[0], 0
    warm = old.condition_on(inputs[30:], labels[30:], mean[30:])
    assert count[0] < cold
    np.testing.assert_allclose(warm.mode, fresh.mode, atol=1e-7)
    assert warm.log_evidence.item() == pytest.approx(fresh.log_evidence.item(), abs=1e-9)
    for one, two in zip(warm.latent(inputs[:1]), fresh.latent(inputs[:1]), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-7)


def counter(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many factorisations there have been."""
    count, original = [0], FunctionSpace.prepare

    def counted(*arguments):
        count[0] += 1
        return original(*arguments)

    monkeypatch.setattr(FunctionSpace, "prepare", counted)
    return count


def test_starting_at_the_mode_costs_two_factorisations(monkeypatch: pytest.MonkeyPatch) -> None:
    data = problem(10, 3, 7)
    dual = laplace(*data).dual
    count = counter(monkeypatch)
    laplace(*data, start=dual)
    assert count[0] <= 2


def test_a_bad_start_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    data = problem(6, 3, 8, scale=100)
    count = counter(monkeypatch)
    cold = laplace(*data)
    before, count[0] = count[0], 0
    posterior = laplace(*data, start=1e3 * torch.ones(6, 3, dtype=torch.float64))
    assert count[0] == before
    np.testing.assert_allclose(posterior.mode, cold.mode, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-12, 1e4, 1e8])
@pytest.mark.parametrize("outputs", [1, 3])
def test_any_scale(scale: float, outputs: int) -> None:
    mean, covariance, labels = problem(30, outputs, 9, scale=scale)
    posterior = laplace(mean, covariance, labels)
    f = posterior.mode.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_likelihood(f, labels), f)
    np.testing.assert_allclose(posterior.dual, gradient, atol=1e-8)
    assert posterior.log_evidence < log_likelihood(posterior.mode, labels)


def test_singular_covariances() -> None:
    mean, _, labels = problem(5, 3, 10)
    zero = laplace(mean, torch.zeros(15, 15).double(), labels)
    assert zero.log_evidence.item() == pytest.approx(log_likelihood(mean, labels).item())
    # One feature: the posterior is that of its single weight.
    feature = torch.randn(15, dtype=torch.float64)
    posterior = laplace(mean, feature.outer(feature), labels)

    def negative(weight: np.ndarray) -> float:
        f = mean + (feature * float(weight[0])).view(5, 3)
        return 0.5 * float(weight[0]) ** 2 - log_likelihood(f, labels).item()

    weight = minimize(negative, np.zeros(1), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14})
    np.testing.assert_allclose(posterior.mode.flatten(), mean.flatten() + feature * weight.x[0], atol=1e-6)
    precision = 1 + feature @ hessian(posterior.mode, labels) @ feature
    assert posterior.log_evidence.item() == pytest.approx(-weight.fun - 0.5 * precision.log().item(), abs=1e-9)


def test_many_rows_are_transformed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    data = problem(11, 3, 11)
    whole = laplace(*data)
    monkeypatch.setattr(gpntk.inference.noise, "_SAMPLES", 6)
    parts = laplace(*data)
    np.testing.assert_allclose(parts.mode, whole.mode, atol=1e-12)
    np.testing.assert_allclose(parts.log_evidence, whole.log_evidence, atol=1e-12)


def test_float32() -> None:
    data = problem(10, 3, 12)
    low = laplace(data.mean.float(), data.covariance.float(), data.labels)
    assert low.mode.dtype == torch.float64
    np.testing.assert_allclose(low.mode, laplace(*data).mode, atol=1e-4)


def test_an_indefinite_covariance() -> None:
    mean, covariance, labels = problem(5, 3, 13)
    with pytest.raises(SolveError, match="NOT_POSITIVE"):
        laplace(mean, covariance - 100 * torch.eye(15).double(), labels)
    with pytest.raises(SolveError, match="NOT_POSITIVE"):
        laplace(mean, -100 * torch.eye(5).double(), labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 1, 2, 3])}, "labels has class 3"),
        ({"labels": torch.tensor([0, 1, 2, -1])}, "labels has class -1"),
        ({"labels": torch.tensor([0, 1, 2])}, "labels has 3 classes, but there are 4 inputs"),
        ({"labels": torch.tensor([0.0, 1, 2, 0])}, "labels must be integers"),
        ({"mean": torch.zeros(4).double()}, r"prior_mean must be \[N, C\]"),
        ({"mean": torch.zeros(4, 3).long()}, "prior_mean must be floating point"),
        ({"mean": torch.full((4, 3), torch.nan).double()}, "prior_mean has values that are not finite"),
        ({"covariance": torch.eye(11).double()}, r"covariance must be \[N\*C, N\*C\], here \(12, 12\)"),
        ({"covariance": torch.zeros(12, 4).double()}, "covariance must be"),
        ({"covariance": torch.full((12, 12), torch.nan).double()}, "covariance contains NaN"),
        ({"start": torch.zeros(12).double()}, "start must be"),
    ],
)
def test_bad_input(change: dict[str, Tensor], message: str) -> None:
    mean, covariance, labels = problem(4, 3)
    arguments = {"mean": mean, "covariance": covariance, "labels": labels, "start": None, **change}
    with pytest.raises(InputError, match=message):
        laplace(*arguments.values())


def test_bad_input_to_predictions() -> None:
    data = problem(4, 3)
    posterior = laplace(*data)
    x = torch.zeros(1, 1).double()
    with pytest.raises(InputError, match=r"prior_mean must be \[T, C\]"):
        posterior.latent(x, torch.zeros(3))
    covariance = DenseCovariance.of_matrix(data.covariance, 3)
    with pytest.raises(InputError, match="only dense ones with one row each are shared"):
        LaplacePosterior(covariance, data.labels, torch.zeros(4, 2).double())
