import math
import pickle
from collections.abc import Callable
from typing import Any

import gpytorch
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

import gpntk
from gpntk.errors import InputError, NetworkError
from gpntk.inference import ConjugateGradients, Nystrom
from gpntk.inference.hyperposterior import Draws, Hyperparameter, infer, log_prior
from gpntk.kernels.nystrom import nystrom_features
from gpntk.network.heads import Body, Rescaled
from gpntk.transfer import TransferGP
from gpntk.transfer.candidates import Candidate, preferred
from gpntk.transfer.forms import AbstractForm, DenseForm, FeatureForm, Recipe
from gpntk.transfer.gaussian import GaussianModel, Labels
from gpntk.transfer.prior import RESIDUAL, PriorBuilder
from gpntk.transfer.report import report_on
from gpntk.transfer.represented import Outputs
from gpntk.transfer.terms import FeatureTerm, HostTerm, LogStudentTPrior
from tests.cases import mlp, reference_jacobian

NETWORK = mlp(2).double().eval()
FROZEN = gpntk.freeze(NETWORK)
GENERATOR = torch.Generator().manual_seed(0)
X, Z = torch.randn(2, 9, 5, generator=GENERATOR, dtype=torch.float64)
Z = Z[:4]
Y = torch.randn(9, 2, generator=GENERATOR, dtype=torch.float64)


def logs(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).log()


def jacobian(x: Tensor) -> Tensor:
    """`[N*C, P]`."""
    return reference_jacobian(NETWORK, x).reshape(2 * len(x), -1)


def builder(network: gpntk.FrozenNetwork = FROZEN, x: Tensor = X, **options: Any) -> PriorBuilder:
    defaults = {
        "num_outputs": network.num_outputs(x),
        "new_head": False,
        "layer_variances": False,
        "form": "rbf",
        "medians": RESIDUAL,
        "constant": False,
    }
    return PriorBuilder(network, x, **{**defaults, **options})


# --- terms -----------------------------------------------------------------------------------------------------------


def test_tangent_term_is_the_kernel_in_units() -> None:
    units = torch.tensor([0.5, 3.0], dtype=torch.float64)
    prior = builder(units=units).build(Candidate("ntk"))
    scaled = jacobian(X) / units.repeat(9).unsqueeze(-1)
    level = scaled.square().sum(-1).mean()
    scaled_z = jacobian(Z) / units.repeat(4).unsqueeze(-1)
    torch.testing.assert_close(prior.matrix(logs(2.0), Z, X), 2 * scaled_z @ scaled.mT / level)
    full = 2 * scaled_z @ scaled_z.mT / level
    singles = Z.unsqueeze(1)
    blocks = torch.stack([full[i : i + 2, i : i + 2] for i in range(0, 8, 2)])
    torch.testing.assert_close(prior.matrix(logs(2.0), singles, singles), blocks)
    torch.testing.assert_close(prior.terms[0].diagonal(logs(2.0), Z), full.diagonal())


def test_shared_tangent_term_is_the_mean_over_outputs() -> None:
    prior = builder().build(Candidate("ntk"), shared=True)
    j = reference_jacobian(NETWORK, X).reshape(9, 2, -1)
    mean = torch.einsum("ncp,mcp->nm", j, j) / 2
    level = mean.diagonal().mean()
    assert prior.shared
    torch.testing.assert_close(prior.matrix(logs(1.0), X, X), mean / level)
    torch.testing.assert_close(prior.terms[0].diagonal(logs(1.0), X), mean.diagonal() / level)


def test_layers_add_up() -> None:
    one, many = (builder(layer_variances=layers).build(Candidate("ntk")) for layers in (False, True))
    assert [h.name for h in many.hyperparameters] == [f"ntk {layer}" for layer, _ in FROZEN.layers]
    assert sum(h.median for h in many.hyperparameters) == pytest.approx(one.hyperparameters[0].median)
    ones = torch.zeros(len(many.hyperparameters), dtype=torch.float64)
    torch.testing.assert_close(many.matrix(ones, Z, X), one.matrix(logs(1.0), Z, X))
    torch.testing.assert_close(many.terms[0].diagonal(ones, Z), one.terms[0].diagonal(logs(1.0), Z))


@pytest.mark.parametrize("form", ["rbf", "matern"])
@pytest.mark.parametrize("columns", [5, 30])
def test_stationary_term_is_the_hosts_kernel_of_typical_distances(form: str, columns: int) -> None:
    x = torch.randn(9, columns, generator=GENERATOR, dtype=torch.float64)
    network = gpntk.freeze(nn.Linear(columns, 1).double())
    prior = builder(network, x, form=form).build(Candidate("stationary"))
    scales = torch.linspace(0.5, 2, 5, dtype=torch.float64) if columns == 5 else torch.full((1,), 0.7).double()
    host = gpytorch.kernels.RBFKernel if form == "rbf" else gpytorch.kernels.MaternKernel
    kernel = host(ard_num_dims=columns).double()
    typical = x.std(0, correction=0) * math.sqrt(2 * columns) if columns == 5 else torch.pdist(x).median()
    kernel.lengthscale = (scales * typical).expand(columns)
    theta = torch.cat([logs(3.0), scales.log()])
    torch.testing.assert_close(prior.matrix(theta, x[:4], x), 3 * kernel(x[:4], x).to_dense().detach())
    torch.testing.assert_close(prior.terms[0].diagonal(theta, x), torch.full((9,), 3.0).double())


def test_gradients_at_coinciding_inputs_are_finite() -> None:
    prior = builder(form="matern").build(Candidate("stationary"))
    theta = logs(1.0, 1, 1, 1, 1, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(prior.matrix(theta, X, X).sum(), theta)
    assert gradient.isfinite().all()


def test_readout_term_is_bayesian_linear_regression_on_the_features() -> None:
    prior = builder(num_outputs=3, new_head=True).build(Candidate("nngp"))
    h = torch.cat([Body(NETWORK)(X).detach(), torch.ones(9, 1).double()], -1)
    level = h.square().sum(-1).mean()
    assert prior.shared
    torch.testing.assert_close(prior.matrix(logs(2.0), X, X), 2 * h @ h.mT / level)
    torch.testing.assert_close(prior.terms[0].diagonal(logs(2.0), X), 2 * h.square().sum(-1) / level)


def test_a_sum_of_shared_and_full_terms() -> None:
    total = builder(constant=True).build(Candidate("ntk+stationary"))
    theta = torch.zeros(len(total.hyperparameters), dtype=torch.float64)
    tangent, stationary, _ = total.terms
    full = tangent.matrix(theta[:1], tangent.prepare(Z, X))
    shared = stationary.matrix(theta[1:], stationary.prepare(Z, X)) + 100.0
    torch.testing.assert_close(total.matrix(theta, Z, X), full + torch.kron(shared, torch.eye(2).double()))
    square = total.matrix(theta, Z, Z)
    blocks = torch.stack([square[i : i + 2, i : i + 2] for i in range(0, 8, 2)])
    torch.testing.assert_close(total.matrix(theta, Z.unsqueeze(1), Z.unsqueeze(1)), blocks)


def test_hyperparameters_are_the_hosts_with_their_priors() -> None:
    gamma = gpytorch.priors.GammaPrior(3.0, 6.0)
    kernel = gpytorch.kernels.ScaleKernel(
        gpytorch.kernels.RBFKernel(ard_num_dims=2, lengthscale_prior=gamma),
        outputscale_prior=LogStudentTPrior(0.3, 1.2),
    )
    kernel.base_kernel.lengthscale = torch.tensor([0.5, 2.0])
    term = HostTerm(kernel, X[:, :2], 1)
    names = [h.name for h in term.hyperparameters]
    assert names == ["outputscale", "base_kernel.lengthscale 0", "base_kernel.lengthscale 1"]
    assert [h.median for h in term.hyperparameters] == pytest.approx([0.3, 0.5, 2.0])
    point = logs(0.7, 0.4, 1.5)
    student = torch.distributions.StudentT(4.0, math.log(0.3), 1.2).log_prob(point[0])
    expected = student + (gamma.log_prob(point[1:].exp()) + point[1:]).sum()
    torch.testing.assert_close(log_prior(point, term.hyperparameters), expected.double())
    torch.testing.assert_close(LogStudentTPrior(0.3, 1.2).log_prob(torch.tensor(0.7).double()) + point[0], student)


def test_nystrom_features_are_a_projection_that_explains_what_it_says() -> None:
    x = torch.rand(400, 2, generator=GENERATOR, dtype=torch.float64)

    def kernel(one: Tensor, two: Tensor) -> Tensor:
        return 2 * (-4 * torch.cdist(one, two).square()).exp()

    found = nystrom_features(kernel, lambda rows: rows.new_full((len(rows),), 2.0), x, 1e-4, 300)
    phi, points = found(x), found.points
    torch.testing.assert_close(found(points) @ phi.mT, kernel(points, x), rtol=1e-6, atol=1e-8)
    missed = (2 - phi.square().sum(-1)).mean() / 2
    assert found.unexplained == pytest.approx(missed.item(), rel=0.2)
    assert missed <= 1e-4
    few = nystrom_features(kernel, lambda rows: rows.new_full((len(rows),), 2.0), x, 1e-4, 5)
    assert few.size == 5
    assert few.unexplained > found.unexplained


# --- exact regression ------------------------------------------------------------------------------------------------

THETA = logs(0.8, 0.6, 0.4, 0.5, 0.6, 0.7, 0.8, 0.1)
RELATIVE, KNOWN = (torch.linspace(*ends, 18).double().reshape(9, 2) for ends in ((0.5, 2), (0, 0.3)))


def single(theta: Tensor) -> Draws:
    return Draws(theta.unsqueeze(0), torch.ones(1).double(), 0.0, theta)


def gaussian(
    shared: bool, missing: bool, form: type[AbstractForm] = DenseForm, rows: slice = slice(9)
) -> GaussianModel:
    prior = builder().build(Candidate("ntk+stationary"), shared)
    y = Y.clone()
    if missing:
        y[0, 1] = y[3, 0] = math.nan
    made = DenseForm(prior, X[rows]) if form is DenseForm else FeatureForm(prior, X[rows], Recipe(THETA[:-1], 1e-12, 9))
    gp = GaussianModel(made, Labels(y[rows], RELATIVE[rows], KNOWN[rows]), (1.0, 1.0))
    gp.set_draws(single(THETA))
    return gp


@pytest.mark.parametrize("form", [DenseForm, FeatureForm])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_gaussian_model_equals_the_formulas(shared: bool, missing: bool, form: type[AbstractForm]) -> None:
    gp = gaussian(shared, missing, form)
    prior, y = gp.form.prior, gp.labels.y.reshape(-1)
    relative, known = RELATIVE.reshape(-1), KNOWN.reshape(-1)

    def full(x1: Tensor, x2: Tensor) -> Tensor:
        covariance = prior.matrix(THETA[:-1], x1, x2)
        return torch.kron(covariance, torch.eye(2).double()) if shared else covariance

    seen = ~y.isnan()
    noisy = (full(X, X) + torch.diag(0.1 * relative + known))[seen][:, seen]
    cross = full(Z, X)[:, seen]
    inverse = torch.linalg.inv(noisy)
    mean, covariance = cross @ inverse @ y[seen], full(Z, Z) - cross @ inverse @ cross.mT
    predicted = gp.predict(Z, covariance=True)
    # Features leave out what their recipe allows.
    tolerances = {"rtol": 1e-7, "atol": 1e-7} if form is DenseForm else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(predicted.mean, mean, **tolerances)
    if form is DenseForm:  # features at nine points know covariances elsewhere but for their diagonal
        torch.testing.assert_close(predicted.spread, covariance)
    torch.testing.assert_close(gp.predict(Z).spread, covariance.diagonal(), **tolerances)
    density = torch.distributions.MultivariateNormal(torch.zeros(int(seen.sum())).double(), noisy).log_prob(y[seen])
    torch.testing.assert_close(gp.log_likelihood(THETA), density)
    assert gp.log_evidence() == pytest.approx(density.item())
    effective = (torch.eye(len(noisy)).double() - torch.diag((0.1 * relative + known)[seen]) @ inverse).trace()
    assert gp.effective_parameters() == pytest.approx(effective.item())
    left_out = gp.leave_one_out()
    for position, index in enumerate(seen.nonzero().flatten()):
        others = torch.arange(len(noisy)) != position
        weights = torch.linalg.solve(noisy[others][:, others], noisy[others, position])
        torch.testing.assert_close(left_out.mean[index], weights @ y[seen][others])
        variance = noisy[position, position] - weights @ noisy[others, position]
        torch.testing.assert_close(left_out.spread[index], variance)
    assert left_out.mean.isnan().equal(~seen)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("missing", [False, True])
def test_derivatives_of_the_evidence_are_those_of_differences(shared: bool, missing: bool) -> None:
    gp = gaussian(shared, missing)
    theta = THETA.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(gp.log_likelihood(theta), theta)
    step = 1e-5 * torch.eye(len(THETA)).double()
    with torch.no_grad():
        differences = [(gp.log_likelihood(THETA + s) - gp.log_likelihood(THETA - s)) / 2e-5 for s in step]
    torch.testing.assert_close(gradient, torch.stack(differences), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", [DenseForm, FeatureForm])
@pytest.mark.parametrize("shared", [False, True])
def test_conditioning_equals_all_the_data_at_once(shared: bool, form: type[AbstractForm]) -> None:
    whole = gaussian(shared, missing=True)
    first = gaussian(shared, missing=True, form=form, rows=slice(6))
    if form is FeatureForm:
        # Features of the first rows, for all of them.
        made = first.form.extended(X[6:])
        whole = GaussianModel(made, whole.labels, (1.0, 1.0))
        whole.set_draws(single(THETA))
    grown = first.condition_on(X[6:], Labels(whole.labels.y[6:], RELATIVE[6:], KNOWN[6:]))
    for one, two in zip(grown.predict(Z, covariance=True), whole.predict(Z, covariance=True), strict=True):
        torch.testing.assert_close(one, two)
    torch.testing.assert_close(grown.leave_one_out().mean, whole.leave_one_out().mean, equal_nan=True)


def test_moments_of_a_mixture() -> None:
    gp = gaussian(False, False)
    theta = torch.stack([THETA, THETA + 0.5])
    singles = []
    for point in theta:
        gp.set_draws(single(point))
        singles.append(gp.predict(Z, covariance=True))
    weights = torch.tensor([0.3, 0.7]).double()
    gp.set_draws(Draws(theta, weights, 0.0, theta[1]))
    mixed = gp.predict(Z, covariance=True)
    mean = sum(w * s.mean for w, s in zip(weights, singles, strict=True))
    second = sum(w * (s.spread + torch.outer(s.mean, s.mean)) for w, s in zip(weights, singles, strict=True))
    torch.testing.assert_close(mixed.mean, mean)
    torch.testing.assert_close(mixed.spread, second - torch.outer(mean, mean))
    torch.testing.assert_close(gp.predict(Z).spread, mixed.spread.diagonal())


# --- hyperparameters -------------------------------------------------------------------------------------------------


def test_average_and_evidence_against_quadrature() -> None:
    prior = Hyperparameter("a", 2.0, 1.5)

    def likelihood(x: Tensor) -> Tensor:
        return -0.5 * ((x - 1.7) / 0.6).square().sum() - 0.2 * (x - 1).pow(4).sum()

    student = torch.distributions.StudentT(4.0, math.log(2.0), 1.5)

    def density(x: float) -> float:
        point = torch.tensor([x], dtype=torch.float64)
        return (likelihood(point) + student.log_prob(point)[0]).exp().item()

    total = quad(density, -10, 10)[0]
    mean = quad(lambda x: x * density(x), -10, 10)[0] / total
    draws = infer(likelihood, [prior], average=True)
    assert draws.log_evidence == pytest.approx(math.log(total), abs=0.02)
    assert (draws.weights @ draws.logs[:, 0]).item() == pytest.approx(mean, abs=0.02)
    single = infer(likelihood, [prior], average=False)
    grid = torch.linspace(-3, 5, 80_001, dtype=torch.float64)
    values = torch.tensor([density(x) for x in grid[::100].tolist()])
    assert single.best.item() == pytest.approx(grid[::100][values.argmax()].item(), abs=0.01)
    assert single.log_evidence == pytest.approx(math.log(total), abs=0.1)  # Laplace's approximation


@pytest.mark.parametrize("labels", [300, 2000])
@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-6])
def test_many_labels_do_not_send_the_search_to_where_nothing_can_be_factorised(labels: int, noise: float) -> None:
    pair = (Hyperparameter("signal", 0.03, 1.5), Hyperparameter("noise", 0.7, 1.0))
    eigenvalues = torch.cat([torch.logspace(0, -8, 100), torch.zeros(labels - 100)]).double()
    eigenvalues /= eigenvalues.mean()
    squares = eigenvalues + noise  # of the labels along each eigenvector, on average

    def log_likelihood(at: Tensor) -> Tensor:
        if at[0] - at[1] + eigenvalues.max().log() > 34:
            return torch.tensor(-math.inf, dtype=torch.float64)
        variances = at[0].exp() * eigenvalues + at[1].exp()
        return -0.5 * (squares / variances + variances.log()).sum()

    draws = infer(log_likelihood, pair, average=False)
    truth = logs(1.0, noise)
    assert log_likelihood(draws.best) + log_prior(draws.best, pair) >= log_likelihood(truth) + log_prior(truth, pair)


def test_known_hyperparameters_stay() -> None:
    priors = [Hyperparameter("a", 1.0, 1.0), Hyperparameter("b", 1.0, 1.0)]
    draws = infer(lambda x: -(x - 1).square().sum(), priors, average=True, fixed={"a": 3.0})
    torch.testing.assert_close(draws.logs[:, 0].exp(), torch.full((len(draws.logs),), 3.0).double())
    assert draws.logs[:, 1].std() > 0
    with pytest.raises(InputError, match="hyperparameters has 'c', but those of this model are a, b"):
        infer(lambda x: x.sum(), priors, average=False, fixed={"c": 1.0})
    with pytest.raises(InputError, match=r"hyperparameters\['a'\]=-1"):
        infer(lambda x: x.sum(), priors, average=False, fixed={"a": -1.0})


def test_inference_needs_no_gradients_switched_on() -> None:
    with torch.inference_mode():
        draws = infer(lambda x: -(x - 1).square().sum(), [Hyperparameter("a", 1.0, 1.0)], average=False)
    assert 0 < draws.best.item() < 1


def test_a_single_kernel_must_be_better_by_far() -> None:
    single, both = Candidate("ntk"), Candidate("ntk+stationary")
    assert preferred({single: 2.0, both: 0.0}, new_head=False) == both
    assert preferred({single: 4.0, both: 0.0}, new_head=False) == single
    assert preferred({single: 2.0, both: 0.0}, new_head=True) == single


# --- heads -----------------------------------------------------------------------------------------------------------


def test_body_is_what_enters_the_readout() -> None:
    body = Body(NETWORK)
    torch.testing.assert_close(body(X), NETWORK[:-1](X))
    assert not any(name.startswith("network.5") for name, _ in body.named_parameters())
    wide = Body(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2), nn.Softmax(-1)).double())
    assert wide(X).shape == (9, 6)


def test_directions_estimate_the_mean_over_features() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 2)).double()
    h = reference_jacobian(network[:-1], X).reshape(9, 7, -1)
    exact = torch.einsum("ncp,mcp->nm", h, h) / 7
    estimates = []
    for seed in range(400):
        projected = reference_jacobian(Body(network, 1, seed), X)
        estimates.append(projected @ projected.mT)
    stack = torch.stack(estimates)
    error = (stack.mean(0) - exact).abs() / (stack.std(0) / 20 + 1e-12)
    assert error.max() < 5


def test_rescaled_outputs() -> None:
    units = torch.tensor([2.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(Rescaled(NETWORK, units)(X), NETWORK(X) / units)


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) + x[:, :2]


class Unused(Skip):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)[:, :2]


@pytest.mark.parametrize(
    ("module", "message"),
    [(Skip, "by other ways than its last registered layer"), (Unused, "the readout runs 0 times")],
)
def test_networks_without_a_proper_readout(module: type[nn.Module], message: str) -> None:
    network = module().double()
    with pytest.raises(NetworkError, match=message):
        Body(network).check(X)
    # They have no features, but a tangent kernel.
    gp = TransferGP(gpntk.freeze(network), X, Y)
    gp.fit()
    assert not any("features" in name for name in gp.comparison.log_evidence)


def test_thawed_networks_are_copies_that_keep_ties() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    thawed = gpntk.freeze(network).thaw()
    assert thawed[1].weight is thawed[0].weight
    x = torch.randn(4, 3)
    torch.testing.assert_close(thawed(x), network(x))
    with torch.no_grad():
        thawed[0].weight.zero_()
    assert (network[0].weight != 0).any()


# --- the models ------------------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(st.floats(-6, 6), st.floats(-6, 6), st.sampled_from(["network", "constant"]), st.booleans())
def test_units_do_not_matter(first: float, second: float, mean: str, tangent: bool) -> None:
    units = torch.tensor([10**first, 10**second], dtype=torch.float64)
    kernel = "ntk" if tangent else "ntk+stationary"
    treatment = "maximum" if tangent else "average"

    def posterior(scale: Tensor) -> tuple[Tensor, Tensor]:
        frozen = gpntk.freeze(Rescaled(NETWORK, 1 / scale))
        gp = TransferGP(frozen, X, Y * scale, mean=mean, kernel=kernel, hyperparameters=treatment)
        gp.fit()
        prediction = gp.predict(Z)
        return prediction.mean.reshape(-1, 2) / scale, prediction.spread.reshape(-1, 2) / scale.square()

    for one, two in zip(posterior(units), posterior(torch.ones(2).double()), strict=True):
        torch.testing.assert_close(one, two, rtol=2e-3, atol=1e-4)


def test_the_network_ends_where_the_labels_agree_with_it() -> None:
    gp = TransferGP(FROZEN, X, FROZEN(X), kernel="ntk+stationary")
    gp.fit()
    torch.testing.assert_close(gp.predict(Z).mean.reshape(-1, 2), FROZEN(Z))


def few_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a handful of labels were too many for exact factorisations."""
    monkeypatch.setattr("gpntk.transfer.fitting._EXACT_SHARE", 1e-12)
    monkeypatch.setattr("gpntk.transfer.regression.AVERAGE_LIMIT", 10)
    monkeypatch.setattr("gpntk.transfer.fitting.PREFER_MATRIX", 0.0)


def sines(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, 3, generator=generator, dtype=torch.float64)
    noise = 0.05 * torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    return x, (3 * x[:, :1]).sin() + x[:, 1:2] * x[:, 2:] + noise


def small(outputs: int = 1) -> gpntk.FrozenNetwork:
    torch.manual_seed(0)
    return gpntk.freeze(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, outputs)).double())


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("kernel", ["auto", "ntk", "nngp", "stationary"])
def test_no_number_of_labels_changes_the_model(outputs: int, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (x, y), (z, _) = sines(120), sines(20, seed=1)
    y = y if outputs == 1 else torch.cat([y, 2 * y.square()], -1)
    few_are_exact(monkeypatch)
    gp = TransferGP(small(outputs), x, y, kernel=kernel, mean="constant")
    gp.fit()
    assert "features" in gp.fitted.model.note
    # The same hyperparameters, exactly.
    exact = TransferGP(small(outputs), x, y, kernel=gp.chosen.kernel, mean="constant",
                       stationary_inputs=gp.chosen.stationary_inputs, hyperparameters=gp.hyperparameters())  # fmt: skip
    monkeypatch.undo()
    exact.fit()
    assert "matrix" in exact.fitted.model.note
    for noisy in (False, True):
        one, two = (each.predict(z, observation_noise=noisy) for each in (gp, exact))
        assert ((one.mean - two.mean).abs() < 0.5 * two.spread.sqrt() + 1e-3).all()
        torch.testing.assert_close(one.spread.sqrt(), two.spread.sqrt(), rtol=0.1, atol=1e-3)
    one, two = (each.leave_one_out() for each in (gp, exact))
    torch.testing.assert_close(one.mean, two.mean, rtol=0, atol=0.03)
    assert report_on(gp).log_density == pytest.approx(report_on(exact).log_density, abs=0.05)
    grown = gp.condition_on(*((z, y[:20])))
    assert grown.predict(z).mean.isfinite().all()


def test_missing_and_known_noise_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, y), (z, truth) = sines(120), sines(20, seed=1)
    y = torch.cat([y, -y], -1)
    y[::3, 0] = math.nan
    wild = y.clone()
    wild[1::3, 1] += 5
    known = torch.zeros_like(y)
    known[1::3, 1] = 1e4
    few_are_exact(monkeypatch)
    gp = TransferGP(small(2), x, wild, kernel="ntk+stationary", known_noise=known, mean="zero")
    gp.fit()
    assert "features" in gp.fitted.model.note
    mean = gp.predict(z).mean.reshape(-1, 2)
    torch.testing.assert_close(mean, torch.cat([truth, -truth], -1), rtol=0, atol=0.3)


def means_are_iterated(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if labels were too many for a factorisation before the first mean."""
    few_are_exact(monkeypatch)
    solver = ConjugateGradients(Nystrom(space="weight"))
    monkeypatch.setattr("gpntk.transfer.gaussian._solvable", lambda system, y: (system.to(torch.float32), y, solver))


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("outputs", [1, 2])
def test_deviations_are_exact_where_means_are_iterated(
    outputs: int, missing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (x, y), (z, new) = sines(120), sines(20, seed=1)
    y, new = (each if outputs == 1 else torch.cat([each, 2 * each.square()], -1) for each in (y, new))
    if missing:
        y[::3, 0] = math.nan
    means_are_iterated(monkeypatch)
    gp = TransferGP(small(outputs), x, y, kernel="ntk", mean="zero")
    gp.fit()
    assert "deviations exact, by" in gp.fitted.model.note
    hyperparameters = gp.hyperparameters()
    before = gp.condition_on(z[:5], new[:5])
    gp.predict(z)
    # With the factorisation, and without one that could be updated.
    after = gp.condition_on(z[:5], new[:5])
    torch.testing.assert_close(after.predict(z).spread, before.predict(z).spread, rtol=1e-6, atol=0)
    found = [(each.predict(z), each.predict(z, covariance=True)) for each in (gp, after)]
    monkeypatch.undo()
    exact = TransferGP(small(outputs), x, y, kernel="ntk", mean="zero", hyperparameters=hyperparameters)
    exact.fit()
    for (one, joint), gp in zip(found, (exact, exact.condition_on(z[:5], new[:5])), strict=True):
        expected = gp.predict(z, covariance=True)
        torch.testing.assert_close(one.mean, expected.mean, rtol=0, atol=1e-3 * float(expected.spread.max().sqrt()))
        torch.testing.assert_close(one.spread, expected.spread.diagonal(), rtol=1e-6, atol=0)
        torch.testing.assert_close(joint.spread, expected.spread, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("samples", [8, 64])
def test_deviations_from_samples_where_a_factorisation_takes_too_long(
    samples: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (x, y), (z, _) = sines(120), sines(20, seed=1)
    means_are_iterated(monkeypatch)
    monkeypatch.setattr("gpntk.transfer.gaussian._seconds", lambda *_: 1e9)
    gp = TransferGP(small(), x, y, kernel="ntk", mean="zero", time_budget=1e-9 if samples == 8 else 120.0)
    gp.fit()
    error = 1 / (2 * samples) ** 0.5
    assert f"deviations from {samples} samples, to {100 * error:.0f} %" in gp.fitted.model.note
    with caplog.at_level("WARNING", "gpntk.transfer"):
        found, joint = (gp.predict(z, covariance, observation_noise=False).spread for covariance in (False, True))
    said = [message for message in caplog.messages if "samples" in message]
    assert said == [
        f"deviations from {samples} samples, to {100 * error:.0f} %: a factorisation would take about 1e+09 s."
    ]
    torch.testing.assert_close(joint.diagonal(), found)
    hyperparameters = gp.hyperparameters()
    monkeypatch.undo()
    exact = TransferGP(small(), x, y, kernel="ntk", mean="zero", hyperparameters=hyperparameters)
    exact.fit()
    # Four standard errors.
    ratio = (found / exact.predict(z, observation_noise=False).spread).sqrt()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=min(4 * error, 0.99))


def test_a_kernel_of_gpytorchs_with_ours_inside() -> None:
    x, y = sines(40)
    network = small()
    kernel = gpytorch.kernels.ScaleKernel(gpntk.NTKKernel(network)) + gpytorch.kernels.ScaleKernel(
        gpytorch.kernels.PeriodicKernel()
    )
    gp = TransferGP(network, x, y, kernel=kernel, mean="zero", hyperparameters="maximum")
    gp.fit()
    names = list(gp.hyperparameters())
    assert names[0] == "outputscale"
    assert set(names[1:]) == {"outputscale", "base_kernel.lengthscale", "base_kernel.period_length", "noise"} - {
        "outputscale"
    }
    assert (gp.predict(x).mean - y[:, 0]).square().mean() < 0.02
    assert gp.chosen.kernel == "custom"
    assert report_on(gp).kernel == "custom"


def test_beyond_the_time_budget_it_says_what_was_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "gpntk.transfer"):
        gp = TransferGP(FROZEN, X, Y, time_budget=1e-9)
        gp.fit()
    compared = {"stationary of features", "nngp", "stationary"}
    without = {f"{name}, mean constant" for name in compared if "stationary" in name}
    assert set(gp.comparison.log_evidence) == compared | without
    assert "kernel='ntk+stationary' would take about" in caplog.text
    report = report_on(gp)
    assert report.alignment > 0
    assert any("time_budget" in note for note in report.notes)
    body = gpntk.freeze(NETWORK, lambda name, _: not name.startswith("5"))
    gp = TransferGP(body, X, Y, time_budget=1e-9)
    gp.fit()
    assert "ntk" in gp.comparison.log_evidence  # nothing stands in for it
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="time_budget"):
            TransferGP(FROZEN, X, Y, time_budget=wrong)


def test_predictions_before_a_fit_say_so() -> None:
    gp = TransferGP(FROZEN, X, Y)
    for call in (lambda: gp.predict(Z), gp.leave_one_out, lambda: gp.condition_on(X, Y), gp.state):
        with pytest.raises(NotFittedError, match="not fitted yet: call fit"):
            call()


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_targets_whose_squares_are_no_numbers_are_refused(size: float) -> None:
    with pytest.raises(InputError, match="give them in other units"):
        TransferGP(FROZEN, X, Y * size)


def test_a_constant_target_has_no_spread() -> None:
    y = torch.full((9, 1), 0.1).double()
    gp = TransferGP(small(), X[:, :3], y, mean="constant")
    gp.fit()
    prediction = gp.predict(Z[:, :3])
    torch.testing.assert_close(prediction.mean, y[:4, 0], rtol=0, atol=1e-6)
    assert (prediction.spread.sqrt() > 1e-9).all()
    torch.testing.assert_close(gp.task.units, torch.tensor([0.1]).double())


def test_a_network_whose_jacobian_is_zero() -> None:
    dead = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    nn.init.constant_(dead[0].bias, -100.0)
    x, y = sines(40)
    for kernel in ("ntk", "auto"):
        gp = TransferGP(gpntk.freeze(dead, "0.*"), x, y, kernel=kernel)
        gp.fit()
        assert gp.predict(x).mean.isfinite().all()


def test_the_time_of_a_tangent_kernel() -> None:
    # 9 inputs, 2 outputs: 3 passes of 2 * 5 * 2 operations each, and 2 * 9 * 9 products of rows of 12.
    found = builder(gpntk.freeze(nn.Linear(5, 2).double()), X).moves.seconds("all")
    assert found == pytest.approx(2 * 9 * (3 * 20 + 2 * 9 * 12) / 2.5e10)


@pytest.mark.parametrize(
    ("newton", "least"),
    [
        (1e4, 1e4),  # by the matrix
        (1e6, 4 * 9 * 24**2),  # or four second moments of 24 features
    ],
)
def test_the_time_of_a_tangent_kernel_counts_newtons_steps(newton: float, least: float) -> None:
    found = builder(gpntk.freeze(nn.Linear(5, 2).double()), X, newton_flops=newton).moves.seconds("all")
    assert found == pytest.approx((2 * 9 * 3 * 20 + least) / 2.5e10)


def test_classes_leave_out_a_kernel_whose_newton_steps_exceed_the_time_budget() -> None:
    # Newton's steps, by four times three matrices of 200 rows, are 9.6e7 operations.
    x = torch.randn(200, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    network = gpntk.freeze(nn.Sequential(nn.Linear(5, 50), nn.Tanh(), nn.Linear(50, 2)).double())
    gp = TransferGP(network, x, (x[:, 0] > 0).long(), likelihood="categorical", time_budget=9e7 / 2.5e10)
    gp.fit()
    assert gp.comparison is not None
    # In weight space the few biases are affordable, all parameters are not.
    tangents = {name for name in gp.comparison.log_evidence if "ntk" in name}
    assert {name.partition(", ")[2] for name in tangents} == {"norms and biases"}
    assert any("kernel='ntk+stationary' would take about 0.0038" in note for note in gp.fitted.notes)


def test_what_comparison_shares_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"tangent": 0, "network": 0}

    def counted(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            calls[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(FeatureTerm, "_grams", counted("tangent", FeatureTerm._grams))
    monkeypatch.setattr(Outputs, "_compute", counted("network", Outputs._compute))
    TransferGP(gpntk.freeze(mlp(1).double().eval()), X, Y[:, :1]).fit()
    # Of all rows, and of single rows of them, on which the network is probed.
    assert calls["tangent"] == 1
    assert calls["network"] <= 4


def test_outputs_come_in_the_networks_own_precision() -> None:
    network = mlp(2).eval()
    outputs = Outputs(gpntk.freeze(network))(X)
    assert outputs.dtype == torch.float64
    with torch.no_grad():
        torch.testing.assert_close(outputs, network(X.float()).double(), rtol=0, atol=0)
    assert not outputs.requires_grad
    half = Outputs(gpntk.freeze(mlp(2).half().eval()))(X)
    torch.testing.assert_close(half, Outputs(gpntk.freeze(mlp(2).half().float().eval()))(X), rtol=0, atol=0)
    changing = 3 * X
    remembered = Outputs(gpntk.freeze(NETWORK))
    remembered(changing)
    torch.testing.assert_close(remembered(changing.mul_(-2)), NETWORK(-6 * X).detach())
    assert len(pickle.dumps(remembered)) == len(pickle.dumps(Outputs(gpntk.freeze(NETWORK))))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("extract", [None, lambda outputs: outputs * torch.tensor([1.0, 2.0])])
@pytest.mark.parametrize("shared", [True, False])
def test_moves_of_the_readout_are_those_of_its_jacobian(bias: bool, extract: Any, shared: bool) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2, bias=bias)).double().eval()
    frozen = gpntk.freeze(network, extract=extract)
    prior = builder(frozen).build(Candidate("nngp"), shared)
    assert isinstance(prior.terms[0], HostTerm if extract is None else FeatureTerm)
    readout = nn.Sequential(network, *([] if extract is None else [Scaled()]))
    j = reference_jacobian(readout, X).reshape(9, 2, -1)[..., 42:]
    expected = torch.einsum("ncp,mdp->ncmd", j, j)
    if shared:
        expected = torch.einsum("ncmc->nm", expected) / 2
    elif extract is None:
        expected = expected[:, 0, :, 0]  # both outputs alike
    found = prior.matrix(logs(1.0), X, X)
    expected = expected.reshape(found.shape)
    torch.testing.assert_close(found, expected / expected.diagonal().mean())


class Cosine(nn.Linear):
    def forward(self, h: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.normalize(h), self.weight)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.readout = nn.Linear(5, 5), nn.Linear(5, 5)
        self.readout.weight = self.hidden.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.hidden(x).tanh())


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Linear(5, 7), nn.Tanh(), Cosine(7, 2, bias=False)),
        nn.Sequential(nn.Linear(5, 7), nn.Tanh(), orthogonal(nn.Linear(7, 2))),
        Tied(),
    ],
    ids=["changed in place", "a forward of its own", "parametrised", "tied"],
)
def test_readouts_that_are_no_plain_linear_map_keep_their_jacobian(network: nn.Module) -> None:
    prior = builder(gpntk.freeze(network.double().eval())).build(Candidate("nngp"))
    assert isinstance(prior.terms[0], FeatureTerm)


def test_labels_without_noise_leave_room_for_more_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(30, 3, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    for kernel in ("auto", "stationary", "ntk+stationary"):
        gp = TransferGP(gpntk.freeze(network), x, x.sum(-1, keepdim=True), kernel=kernel, new_head=True)
        gp.fit()
        grown = gp.condition_on(x[:3] + 0.1, (x[:3] + 0.1).sum(-1, keepdim=True))
        close = grown.predict(x[:3] + 0.05).mean
        torch.testing.assert_close(close, (x[:3] + 0.05).sum(-1), rtol=0, atol=0.01)


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor([1.0, 2.0])


def test_the_report_against_its_definitions() -> None:
    gp = TransferGP(FROZEN, X, Y, kernel="ntk", hyperparameters="maximum")
    gp.fit()
    report = report_on(gp)
    residual = ((Y - FROZEN(X)) / gp.task.units).reshape(-1)
    scaled = jacobian(X) / gp.task.units.repeat(9).unsqueeze(-1)
    kernel = scaled @ scaled.mT
    cosine = residual @ kernel @ residual / (kernel.norm() * residual.square().sum())
    assert report.alignment == pytest.approx(cosine.item())
    assert report.chance == pytest.approx((kernel.trace() / (kernel.norm() * 18)).item())
    assert set(report.log_evidence) == set(report.left_out) == {"ntk", "stationary alone", "readout alone"}
    assert report.advice in str(report)


def test_the_report_of_a_dense_model_is_calibrated_on_its_own_prior() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(150, 5, generator=generator, dtype=torch.float64)
    j = reference_jacobian(mlp(1).double().eval(), x)
    weights = torch.randn(j.shape[1], generator=generator, dtype=torch.float64)
    noise = torch.randn(150, generator=generator, dtype=torch.float64)
    y = (j @ weights + 0.5 * noise).unsqueeze(-1)
    network = gpntk.freeze(mlp(1).double().eval())
    gp = TransferGP(network, x, y, mean="zero", kernel="ntk+stationary", hyperparameters="maximum")
    gp.fit()
    report = report_on(gp)
    assert report.left_out["ntk+stationary"] == pytest.approx(report.log_density)
    assert report.left_out["stationary alone"] < report.log_density
    for level, seen in report.calibration.items():
        assert abs(level - seen) < 4 * math.sqrt(level * (1 - level) / 150)
    assert report.log_evidence["ntk+stationary"] > report.log_evidence["stationary alone"]
    assert report.alignment > 2 * report.chance
    assert "helps" in report.advice


# --- classification --------------------------------------------------------------------------------------------------


def blobs(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 3
    centres = 2.5 * torch.eye(3, 5, dtype=torch.float64)
    return centres[labels] + torch.randn(rows, 5, generator=generator, dtype=torch.float64), labels


@pytest.mark.parametrize("outputs", [1, 2, 3])
@pytest.mark.parametrize("likelihood", ["categorical", "dirichlet"])
def test_every_likelihood_learns_new_classes(likelihood: str, outputs: int) -> None:
    (x, labels), (z, truth) = blobs(60), blobs(200, seed=1)
    classes = 3 if outputs == 3 else 2
    x, labels = x[labels < classes], labels[labels < classes]
    z, truth = z[truth < classes], truth[truth < classes]
    frozen = gpntk.freeze(mlp(outputs).double().eval())
    model = TransferGP(
        frozen, x, labels, likelihood=likelihood, num_classes=classes, new_head=outputs != 1, kernel="ntk"
    )
    assert math.isfinite(model.fit())
    for link in ("probit", "monte_carlo", "laplace_bridge"):
        probabilities = model.probabilities(z, link)
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(len(z)).double())
        assert (probabilities.argmax(-1) == truth).double().mean() > 0.8


def test_one_logit_with_many_inputs() -> None:
    x, labels = blobs(480)
    x, labels = x[labels < 2], labels[labels < 2]
    frozen = gpntk.freeze(mlp(1).double().eval())
    model = TransferGP(frozen, x, labels, likelihood="categorical", kernel="ntk")
    model.fit()
    assert model.probabilities(x[:5]).shape == (5, 2)
    with pytest.raises(InputError, match="call probabilities"):
        model.predict(x[:5])


@pytest.mark.parametrize("likelihood", ["categorical", "dirichlet"])
def test_more_labels_at_the_same_hyperparameters(likelihood: str) -> None:
    (x, labels), (z, _) = blobs(30), blobs(7, seed=1)
    frozen = gpntk.freeze(mlp(3).double().eval())
    options = {"likelihood": likelihood, "num_classes": 3, "new_head": True, "kernel": "ntk"}
    first = TransferGP(frozen, x[:20], labels[:20], **options)
    first.fit()
    grown = first.condition_on(x[20:], labels[20:])
    whole = TransferGP(frozen, x, labels, **options)
    whole.load_state(first.state(), first.chosen)
    torch.testing.assert_close(grown.probabilities(z), whole.probabilities(z), rtol=1e-6, atol=1e-8)


def test_leave_one_out_is_nearly_that_of_refits() -> None:
    x, labels = blobs(18)
    frozen = gpntk.freeze(mlp(3).double().eval())
    fixed = {"ntk": 0.5, "readout": 2.0}

    def model(rows: Tensor) -> TransferGP:
        made = TransferGP(
            frozen,
            x[rows],
            labels[rows],
            likelihood="categorical",
            num_classes=3,
            new_head=True,
            kernel="ntk",
            hyperparameters=fixed,
        )
        made.fit()
        return made

    everything = torch.arange(18)
    whole = model(everything)
    left_out = whole.leave_one_out()
    for index in (0, 7, 13):
        others = model(everything[everything != index])
        # Units are those of the rows at hand; those of one row less hardly differ.
        torch.testing.assert_close(left_out[index], others.probabilities(x[index : index + 1])[0], rtol=0.2, atol=0.05)


def test_report_of_a_classification() -> None:
    x, labels = blobs(45)
    frozen = gpntk.freeze(mlp(3).double().eval())
    model = TransferGP(frozen, x, labels, likelihood="dirichlet", new_head=True, kernel="ntk")
    model.fit()
    report = report_on(model)
    left_out = model.leave_one_out()
    assert report.score == pytest.approx((left_out.argmax(-1) == labels).double().mean().item())
    assert report.log_density == pytest.approx(left_out[torch.arange(45), labels].log().mean().item())
    assert all(0 <= seen <= 1 for seen in report.calibration.values())
    assert np.isfinite(list(report.log_evidence.values())).all()


def test_labels_without_noise_are_polished_from_what_their_features_miss() -> None:
    """Hyperparameters of the subset have next to no noise, which makes a system of few features singular."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 640), nn.Tanh(), nn.Linear(640, 2)]
    x = torch.randn(200, 4, dtype=torch.float64)
    y = torch.stack([torch.sin(2 * x[:, 0] + c) * x[:, 1] for c in range(5)], -1)
    gp = TransferGP(gpntk.freeze(nn.Sequential(*layers).double()), x, y, new_head=True, mean="constant", time_budget=1)
    gp.fit()
    assert (gp.predict_mean(x).view_as(y) - y).abs().max() < 0.02
