"""The parts of a transfer: components, dense posteriors, hyperparameters, heads, reports; against dense formulas."""

import math
import pickle
from collections.abc import Callable
from typing import Any

import gpytorch
import numpy as np
import pytest
import torch
from gpntk.transfer.classification import TransferClassification
from gpntk.transfer.components import Constant, Readout, Stationary, SumOfComponents, Tangent
from gpntk.transfer.dense import DenseGP
from gpntk.transfer.remembered import Outputs, Remembered
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

import gpntk
from gpntk.errors import InputError, NetworkError
from gpntk.inference.hyperposterior import Draws, Hyperparameter, infer, log_prior
from gpntk.network.heads import Body, Rescaled
from gpntk.transfer import TransferGP
from gpntk.transfer.prior import RESIDUAL, Candidate, PriorBuilder, preferred
from gpntk.transfer.report import report_classification, report_regression
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


# --- components ------------------------------------------------------------------------------------------------------


def test_tangent_component_is_the_kernel_in_units() -> None:
    units = torch.tensor([0.5, 3.0], dtype=torch.float64)
    component = Tangent(FROZEN, X, "ntk", median=1.0, spread=1.0, units=units)
    scaled = jacobian(X) / units.repeat(9).unsqueeze(-1)
    level = scaled.square().sum(-1).mean()
    scaled_z = jacobian(Z) / units.repeat(4).unsqueeze(-1)
    covariance = component.covariance(logs(2.0), component.parts(Z, X))
    torch.testing.assert_close(covariance, 2 * scaled_z @ scaled.mT / level)
    blocks = component.covariance(logs(2.0), component.blocks(Z))
    full = 2 * scaled_z @ scaled_z.mT / level
    torch.testing.assert_close(blocks, torch.stack([full[i : i + 2, i : i + 2] for i in range(0, 8, 2)]))


def test_shared_tangent_component_is_the_mean_over_outputs() -> None:
    component = Tangent(FROZEN, X, "ntk", median=1.0, spread=1.0, shared=True)
    j = reference_jacobian(NETWORK, X).reshape(9, 2, -1)
    mean = torch.einsum("ncp,mcp->nm", j, j) / 2
    level = mean.diagonal().mean()
    torch.testing.assert_close(component.parts(X, X)[0], mean / level)
    torch.testing.assert_close(component.blocks(X)[0, :, 0, 0], mean.diagonal() / level)


def test_layers_add_up() -> None:
    one, many = (Tangent(FROZEN, X, "ntk", median=1.0, spread=1.0, per_layer=layers) for layers in (False, True))
    ones = torch.zeros(len(many.hyperparameters), dtype=torch.float64)
    assert len(ones) == len(FROZEN.layers)
    torch.testing.assert_close(many.covariance(ones, many.parts(Z, X)), one.covariance(logs(1.0), one.parts(Z, X)))
    torch.testing.assert_close(many.covariance(ones, many.blocks(Z)), one.covariance(logs(1.0), one.blocks(Z)))


@pytest.mark.parametrize("form", ["rbf", "matern"])
@pytest.mark.parametrize("columns", [5, 30])
def test_stationary_component_is_the_hosts_kernel(form: str, columns: int) -> None:
    x = torch.randn(9, columns, generator=GENERATOR, dtype=torch.float64)
    component = Stationary(x, form, 1.0, 1.0)
    scales = torch.linspace(0.5, 2, 5, dtype=torch.float64) if columns == 5 else torch.full((1,), 0.7).double()
    host = gpytorch.kernels.RBFKernel if form == "rbf" else gpytorch.kernels.MaternKernel
    kernel = host(ard_num_dims=columns).double()
    typical = x.std(0, correction=0) * math.sqrt(2 * columns) if columns == 5 else torch.pdist(x).median()
    kernel.lengthscale = (scales * typical).expand(columns)
    theta = torch.cat([logs(3.0), scales.log()])
    covariance = component.covariance(theta, component.parts(x[:4], x))
    torch.testing.assert_close(covariance, 3 * kernel(x[:4], x).to_dense().detach())
    torch.testing.assert_close(component.covariance(theta, component.blocks(x)), torch.full((9, 1, 1), 3.0).double())


def test_gradients_at_coinciding_inputs_are_finite() -> None:
    component = Stationary(X, "matern", 1.0, 1.0)
    theta = logs(1.0, 1, 1, 1, 1, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(component.covariance(theta, component.parts(X, X)).sum(), theta)
    assert gradient.isfinite().all()


def test_readout_component_is_bayesian_linear_regression_on_the_features() -> None:
    component = Readout(Outputs(gpntk.freeze(Body(NETWORK))), X, "readout", median=1.0, spread=1.0)
    h = torch.cat([Body(NETWORK)(X).detach(), torch.ones(9, 1).double()], -1)
    level = h.square().sum(-1).mean()
    torch.testing.assert_close(component.covariance(logs(2.0), component.parts(X, X)), 2 * h @ h.mT / level)
    torch.testing.assert_close(component.blocks(X)[0, :, 0, 0], h.square().sum(-1) / level)


def test_a_sum_of_shared_and_full_components() -> None:
    tangent = Tangent(FROZEN, X, "ntk", median=1.0, spread=1.0)
    stationary = Stationary(X, "rbf", 1.0, 1.0)
    total = SumOfComponents([tangent, stationary, Constant(7.0)], 2)
    theta = torch.zeros(len(total.hyperparameters), dtype=torch.float64)
    parts = [component.covariance(own, component.parts(Z, X)) for component, own in zip(
        total.components, (theta[:1], theta[1:], theta[:0]), strict=True)]  # fmt: skip
    expected = parts[0] + torch.kron(parts[1] + parts[2], torch.eye(2).double())
    torch.testing.assert_close(total.covariance(theta, total.parts(Z, X)), expected)
    square = total.covariance(theta, total.parts(Z, Z))
    blocks = torch.stack([square[i : i + 2, i : i + 2] for i in range(0, 8, 2)])
    torch.testing.assert_close(total.covariance(theta, total.blocks(Z)), blocks)


# --- exact regression ------------------------------------------------------------------------------------------------


def dense_problem(shared: bool, missing: bool) -> tuple[DenseGP, SumOfComponents, Tensor, Tensor, Tensor, Tensor]:
    tangent = Tangent(FROZEN, X, "ntk", median=1.0, spread=1.0, shared=shared)
    prior = SumOfComponents([tangent, Stationary(X, "rbf", 1.0, 1.0)], 2)
    y = Y.clone()
    if missing:
        y[0, 1] = y[3, 0] = math.nan
    relative = torch.linspace(0.5, 2, 18).double().reshape(9, 2)
    known = torch.linspace(0, 0.3, 18).double().reshape(9, 2)
    gp = DenseGP(prior, X, y, (1.0, 1.0), relative_noise=relative, known_noise=known)
    theta = torch.cat([logs(0.8, 0.6, 0.4, 0.5, 0.6, 0.7, 0.8), logs(0.1)])
    gp.set_draws(Draws(theta.unsqueeze(0), torch.ones(1).double(), 0.0, theta))
    return gp, prior, theta, y.reshape(-1), relative.reshape(-1), known.reshape(-1)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_dense_gp_equals_the_formulas(shared: bool, missing: bool) -> None:
    gp, prior, theta, y, relative, known = dense_problem(shared, missing)

    def full(x1: Tensor, x2: Tensor) -> Tensor:
        covariance = prior.covariance(theta[:-1], prior.parts(x1, x2))
        return torch.kron(covariance, torch.eye(2).double()) if shared else covariance

    seen = ~y.isnan()
    noisy = (full(X, X) + torch.diag(0.1 * relative + known))[seen][:, seen]
    cross = full(Z, X)[:, seen]
    inverse = torch.linalg.inv(noisy)
    mean, covariance = cross @ inverse @ y[seen], full(Z, Z) - cross @ inverse @ cross.mT
    predicted = gp.predict(Z, covariance=True)
    torch.testing.assert_close(predicted.mean, mean)
    torch.testing.assert_close(predicted.spread, covariance)
    torch.testing.assert_close(gp.predict(Z).spread, covariance.diagonal())
    density = torch.distributions.MultivariateNormal(torch.zeros(int(seen.sum())).double(), noisy).log_prob(y[seen])
    torch.testing.assert_close(gp.log_likelihood(theta), density)
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
def test_conditioning_equals_all_the_data_at_once(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, prior, theta, y, relative, known = dense_problem(shared, missing=True)
    split = [values.reshape(9, 2) for values in (y, relative, known)]
    first = DenseGP(prior, X[:6], split[0][:6], (1.0, 1.0), relative_noise=split[1][:6], known_noise=split[2][:6])
    first.set_draws(Draws(theta.unsqueeze(0), torch.ones(1).double(), 0.0, theta))
    factorised = []

    def counted(matrix: Tensor) -> Tensor:
        factorised.append(matrix.shape[-1])
        return torch.linalg.cholesky(matrix)

    monkeypatch.setattr("gpntk.transfer.dense.psd_safe_cholesky", counted)
    grown = first.condition_on(X[6:], *(values[6:] for values in split))
    assert factorised == [3 if shared else 6]  # the new labels alone
    for one, two in zip(grown.predict(Z, covariance=True), whole.predict(Z, covariance=True), strict=True):
        torch.testing.assert_close(one, two)


def test_moments_of_a_mixture() -> None:
    gp, *_ = dense_problem(False, False)
    theta = torch.stack([gp.draws.best, gp.draws.best + 0.5])
    singles = []
    for point in theta:
        gp.set_draws(Draws(point.unsqueeze(0), torch.ones(1).double(), 0.0, point))
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
    with pytest.raises(InputError, match=r"hyperparameters\['a'\] = -1"):
        infer(lambda x: x.sum(), priors, average=False, fixed={"a": -1.0})


def test_inference_needs_no_gradients_switched_on() -> None:
    with torch.inference_mode():
        draws = infer(lambda x: -(x - 1).square().sum(), [Hyperparameter("a", 1.0, 1.0)], average=False)
    assert 0 < draws.best.item() < 1


def test_a_single_kernel_must_be_better_by_far() -> None:
    single, both = Candidate("ntk"), Candidate("ntk+stationary")
    assert preferred({single: 2.0, both: 0.0}, fresh=False) == both
    assert preferred({single: 4.0, both: 0.0}, fresh=False) == single
    assert preferred({single: 2.0, both: 0.0}, fresh=True) == single


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


def test_more_labels_than_are_dense_take_the_tangent_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpntk.transfer.regression.DENSE_LIMIT", 10)
    gp = TransferGP(FROZEN, X, Y)
    gp.fit()
    assert gp.chosen == Candidate("ntk")
    assert gp.leave_one_out() is None
    first = TransferGP(FROZEN, X[:7], Y[:7])
    first.fit()
    grown = first.condition_on(X[7:], Y[7:])
    assert grown.predict(Z).mean.isfinite().all()
    monkeypatch.setattr("gpntk.transfer.regression.LARGEST_DENSE", 10)
    with pytest.raises(InputError, match="18 labels are more than the 10"):
        TransferGP(FROZEN, X, Y, kernel="stationary").fit()


def test_costly_tangent_kernels_must_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpntk.transfer.prior.TANGENT_COST", 10)
    gp = TransferGP(FROZEN, X, Y)
    gp.fit()
    assert set(gp.comparison.log_evidence) == {"stationary of features", "nngp", "stationary"}
    monkeypatch.setattr("gpntk.transfer.regression.DENSE_LIMIT", 10)
    gp = TransferGP(FROZEN, X, Y)
    gp.fit()
    assert gp.chosen == Candidate("nngp")
    assert report_regression(gp).alignment > 0
    body = gpntk.freeze(NETWORK, lambda name, _: not name.startswith("5"))
    gp = TransferGP(body, X, Y)
    gp.fit()
    assert gp.chosen == Candidate("ntk")


def test_the_cost_of_a_tangent_kernel() -> None:
    common = {"layer_variances": False, "form": "rbf", "medians": RESIDUAL, "constant": False}
    builder = PriorBuilder(gpntk.freeze(nn.Linear(5, 2).double()), X, num_outputs=None, **common)
    # 9 inputs, 2 outputs: 3 passes of 2 * 5 * 2 operations each, and 2 * 9 * 9 products of rows of 12.
    assert builder.tangent_cost == 2 * 9 * (3 * 20 + 2 * 9 * 12)


def test_what_comparison_shares_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"tangent": 0, "network": 0}

    def counted(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            calls[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(Tangent, "_parts", counted("tangent", Tangent._parts))
    monkeypatch.setattr(Outputs, "_compute", counted("network", Outputs._compute))
    TransferGP(gpntk.freeze(mlp(1).double().eval()), X, Y[:, :1]).fit()
    assert calls == {"tangent": 1, "network": 2}  # the network's outputs and its features


def test_values_at_the_latest_inputs_are_remembered_but_not_pickled() -> None:
    asked = []

    def square(x: Tensor) -> Tensor:
        asked.append(x)
        return x.square()

    remembered = Remembered(square, 2)
    for x in (X, Z, X.clone(), Z, Y, Z, X):
        torch.testing.assert_close(remembered(x), x.square())
    assert [len(x) for x in asked] == [9, 4, 9, 9]  # X, Z, Y, and X again, which Y had displaced
    changing = 3 * X
    remembered(changing)
    torch.testing.assert_close(remembered(changing.mul_(-2)), 36 * X.square())
    outputs = Outputs(FROZEN)
    outputs(X)
    one, other = pickle.dumps(outputs), pickle.dumps(Outputs(FROZEN))
    assert len(one) == len(other)


def test_outputs_come_in_the_networks_own_precision() -> None:
    network = mlp(2).eval()
    outputs = Outputs(gpntk.freeze(network))(X)
    assert outputs.dtype == torch.float64
    with torch.no_grad():
        torch.testing.assert_close(outputs, network(X.float()).double(), rtol=0, atol=0)
    assert not outputs.requires_grad
    half = Outputs(gpntk.freeze(mlp(2).half().eval()))(X)
    torch.testing.assert_close(half, Outputs(gpntk.freeze(mlp(2).half().float().eval()))(X), rtol=0, atol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("extract", [None, lambda outputs: outputs * torch.tensor([1.0, 2.0])])
@pytest.mark.parametrize("shared", [True, False])
def test_moves_of_the_readout_are_those_of_its_jacobian(bias: bool, extract: Any, shared: bool) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2, bias=bias)).double().eval()
    frozen = gpntk.freeze(network, extract=extract)
    common = {"layer_variances": False, "form": "rbf", "medians": RESIDUAL, "constant": False}
    prior = PriorBuilder(frozen, X, num_outputs=None, **common).build(Candidate("nngp"), shared)
    assert isinstance(prior.components[0], Readout if extract is None else Tangent)
    readout = nn.Sequential(network, *([] if extract is None else [Scaled()]))
    j = reference_jacobian(readout, X).reshape(9, 2, -1)[..., 42:]
    expected = torch.einsum("ncp,mdp->ncmd", j, j)
    if shared:
        expected = torch.einsum("ncmc->nm", expected) / 2
    elif extract is None:
        expected = expected[:, 0, :, 0]  # both outputs alike
    expected = expected.reshape(prior.covariance(logs(1.0), prior.parts(X, X)).shape)
    torch.testing.assert_close(prior.covariance(logs(1.0), prior.parts(X, X)), expected / expected.diagonal().mean())


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
    common = {"layer_variances": False, "form": "rbf", "medians": RESIDUAL, "constant": False}
    builder = PriorBuilder(gpntk.freeze(network.double().eval()), X, num_outputs=None, **common)
    assert isinstance(builder.build(Candidate("nngp")).components[0], Tangent)


def test_labels_without_noise_leave_room_for_more_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(30, 3, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    for kernel in ("auto", "stationary", "ntk+stationary"):
        gp = TransferGP(gpntk.freeze(network), x, x.sum(-1, keepdim=True), kernel=kernel, num_outputs=1)
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
    report = report_regression(gp)
    residual = ((Y - FROZEN(X)) / gp.units).reshape(-1)
    scaled = jacobian(X) / gp.units.repeat(9).unsqueeze(-1)
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
    report = report_regression(gp)
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
@pytest.mark.parametrize("method", ["laplace", "dirichlet", "variational"])
def test_every_method_learns_new_classes(method: str, outputs: int) -> None:
    (x, labels), (z, truth) = blobs(60), blobs(200, seed=1)
    classes = 3 if outputs == 3 else 2
    x, labels = x[labels < classes], labels[labels < classes]
    z, truth = z[truth < classes], truth[truth < classes]
    frozen = gpntk.freeze(mlp(outputs).double().eval())
    model = TransferClassification(frozen, x, labels, classes, fresh=outputs != 1, kernel="ntk", method=method)
    assert math.isfinite(model.fit())
    for link in ("probit", "monte_carlo", "laplace_bridge"):
        probabilities = model.predict(z, link)
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(len(z)).double())
        assert (probabilities.argmax(-1) == truth).double().mean() > 0.8


def test_one_logit_with_many_inputs() -> None:
    x, labels = blobs(480)
    x, labels = x[labels < 2], labels[labels < 2]
    frozen = gpntk.freeze(mlp(1).double().eval())
    model = TransferClassification(frozen, x, labels, 2, kernel="ntk")
    model.fit()
    assert model.predict(x[:5]).shape == (5, 2)


@pytest.mark.parametrize("method", ["laplace", "dirichlet"])
def test_more_labels_at_the_same_hyperparameters(method: str) -> None:
    (x, labels), (z, _) = blobs(30), blobs(7, seed=1)
    frozen = gpntk.freeze(mlp(3).double().eval())
    first = TransferClassification(frozen, x[:20], labels[:20], 3, fresh=True, kernel="ntk", method=method)
    first.fit()
    grown = first.condition_on(x[20:], labels[20:])
    whole = TransferClassification(frozen, x, labels, 3, fresh=True, kernel="ntk", method=method)
    whole.load_state(first.state(), first.chosen)
    torch.testing.assert_close(grown.predict(z), whole.predict(z), rtol=1e-6, atol=1e-8)


def test_leave_one_out_is_nearly_that_of_refits() -> None:
    x, labels = blobs(18)
    frozen = gpntk.freeze(mlp(3).double().eval())
    fixed = {"ntk": 0.5, "readout": 2.0}

    def model(rows: Tensor) -> TransferClassification:
        made = TransferClassification(
            frozen, x[rows], labels[rows], 3, fresh=True, kernel="ntk", hyperparameters=fixed, method="laplace"
        )
        made.fit()
        return made

    everything = torch.arange(18)
    whole = model(everything)
    left_out = whole.leave_one_out()
    for index in (0, 7, 13):
        others = model(everything[everything != index])
        # Units are those of the rows at hand; those of one row less hardly differ.
        torch.testing.assert_close(left_out[index], others.predict(x[index : index + 1])[0], rtol=0.2, atol=0.05)


def test_report_of_a_classification() -> None:
    x, labels = blobs(45)
    model = TransferClassification(gpntk.freeze(mlp(3).double().eval()), x, labels, 3, fresh=True, kernel="ntk")
    model.fit()
    report = report_classification(model)
    left_out = model.leave_one_out()
    assert report.score == pytest.approx((left_out.argmax(-1) == labels).double().mean().item())
    assert report.log_density == pytest.approx(left_out[torch.arange(45), labels].log().mean().item())
    assert all(0 <= seen <= 1 for seen in report.calibration.values())
    assert np.isfinite(list(report.log_evidence.values())).all()
