"""Features side by side: laws, dense twins, and sums of kernels through every solver."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

import gpntk
from gpntk.errors import InputError
from gpntk.inference import (
    ConjugateGradients,
    FeatureCovariance,
    Features,
    FunctionSpace,
    Nystrom,
    Posterior,
    WeightSpace,
    WhitenedSystem,
)
from gpntk.jacobians import (
    AbstractJacobianBackend,
    AutoBackend,
    AverageBackend,
    ExplicitBackend,
    SketchBackend,
    StackedBackend,
    StructuredBackend,
)
from gpntk.testing import check_backend
from tests.cases import CASES, reference_jacobian

WIDTH, OUTPUTS = 20, 3
CASE = next(case for case in CASES if case.name == "mlp-c3")


def waves(x: Tensor) -> Tensor:
    """Random Fourier features, as a function of x alone."""
    frequencies = torch.arange(1, 1 + x.shape[-1] * WIDTH, dtype=x.dtype).cos().view(x.shape[-1], WIDTH)
    return torch.cat([(x @ frequencies).cos(), (x @ frequencies).sin()], -1) / math.sqrt(WIDTH)


def explicit(outputs: int = OUTPUTS, **options) -> ExplicitBackend:
    return ExplicitBackend(waves, 2 * WIDTH, outputs, dtype=torch.float64, **options)


def stacked(**options) -> StackedBackend:
    return StackedBackend([AutoBackend(gpntk.freeze(CASE.module())), explicit()], **options)


def dense_features(x: Tensor) -> Tensor:
    """[J | φ ⊗ I] from plain autograd and torch's own Kronecker product."""
    fourier = torch.kron(waves(x), torch.eye(OUTPUTS, dtype=x.dtype))
    return torch.cat([reference_jacobian(CASE.module(), x), fourier], 1)


MAKERS = {
    "explicit, one output": lambda: explicit(1),
    "explicit, three outputs": explicit,
    "explicit, many chunks": lambda: explicit(memory_budget=2_000),
    "stacked": stacked,
    "stacked, weighted": lambda: stacked(weights=[0.3, 1.7]),
    "stacked, one group each": lambda: stacked(by_layer=False),
    "stacked twice": lambda: StackedBackend([stacked(), explicit()]),
    "two alike": lambda: StackedBackend([StructuredBackend(gpntk.freeze(CASE.module())) for _ in range(2)]),
    "with an average": lambda: StackedBackend([AverageBackend(gpntk.freeze(CASE.module()), AutoBackend), explicit(1)]),
    "with a sketch": lambda: StackedBackend([SketchBackend(gpntk.freeze(CASE.module()), 30), explicit()]),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_laws(make) -> None:
    check_backend(make(), CASE.x(6).view(2, 3, -1), CASE.x(4).view(2, 2, -1))


@pytest.mark.parametrize("budget", [None, 3_000])
def test_features_are_those_of_the_parts_side_by_side(budget: int | None) -> None:
    x, backend = CASE.x(5), stacked(memory_budget=budget)
    phi = dense_features(x)
    torch.testing.assert_close(backend.jacobian(x[None])[0], phi)
    v, u = torch.randn(2, phi.shape[1]).double(), torch.randn(2, phi.shape[0]).double()
    torch.testing.assert_close(backend.jvp(x[None], v[None])[0], v @ phi.T)
    torch.testing.assert_close(backend.vjp(x[None], u[None])[0], u @ phi)
    groups = backend.feature_groups(x.device)
    assert backend.num_groups == 4
    grams, diagonals = backend.gram(x[None], x[None], per_layer=True)[0], backend.diagonal(x[None], per_layer=True)[0]
    for group, (gram, diagonal) in enumerate(zip(grams, diagonals, strict=True)):
        part = phi[:, groups == group]
        torch.testing.assert_close(gram, part @ part.T)
        torch.testing.assert_close(diagonal, part.square().sum(1))


def test_weights_and_groups() -> None:
    x = CASE.x(4)
    phi, size = dense_features(x), gpntk.freeze(CASE.module()).num_params
    backend = stacked(weights=[0.25, 4.0], by_layer=False)
    expected = torch.stack([0.25 * phi[:, :size] @ phi[:, :size].T, 4 * phi[:, size:] @ phi[:, size:].T])
    torch.testing.assert_close(backend.gram(x[None], x[None], per_layer=True)[0], expected)
    torch.testing.assert_close(backend.diagonal(x[None])[0, 0], expected.sum(0).diagonal())
    assert backend.num_groups == 2
    mixed = stacked(by_layer=[True, False])
    assert torch.equal(mixed.feature_groups(x.device), stacked().feature_groups(x.device))


def test_two_networks_alike_do_not_share_what_is_kept() -> None:
    """Both backends see the same x in the same cache."""
    x = CASE.x(4)[None]
    other = copy.deepcopy(CASE.module())
    nn.init.normal_(other[0].weight)
    parts = [StructuredBackend(gpntk.freeze(module)) for module in (CASE.module(), other)]
    expected = sum(StructuredBackend(gpntk.freeze(module)).gram(x, x) for module in (CASE.module(), other))
    backend = StackedBackend(parts)
    torch.testing.assert_close(backend.gram(x, x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(backend)).gram(x, x), expected)
    same = StackedBackend([parts[0], StructuredBackend(parts[0].network.restrict(["0.weight"]))])
    weights = reference_jacobian(CASE.module(), x[0], ["0.weight"])
    torch.testing.assert_close(same.gram(x, x)[0, 0], parts[0].gram(x, x)[0, 0] + weights @ weights.T)


SOLVERS = [
    FunctionSpace(),
    WeightSpace(),
    ConjugateGradients(Nystrom(), tolerance=1e-12, variance_tolerance=1e-10),
    ConjugateGradients(Nystrom(space="weight"), tolerance=1e-12, variance_tolerance=1e-10),
    None,
]


@pytest.mark.parametrize("solver", SOLVERS, ids=["function", "weight", "CG", "CG in weight space", "auto"])
@pytest.mark.parametrize("many", [False, True], ids=["one variance", "per group"])
def test_sums_of_kernels_go_through_every_solver(solver, many: bool) -> None:
    x, z = CASE.x(30), CASE.x(4)
    backend = stacked(by_layer=[True, False])
    variances = torch.tensor([0.5, 2.0, 1.0, 0.7]).double() if many else torch.tensor([0.8]).double()
    noise, y = torch.tensor([0.1]).double(), torch.randn(30 * OUTPUTS).double()
    posterior = Posterior(WhitenedSystem(FeatureCovariance(Features(backend, x), variances), noise), y, solver)
    phi, psi = dense_features(x), dense_features(z)
    s = variances[backend.feature_groups(x.device)] if many else variances
    gram = (phi * s) @ phi.T + noise * torch.eye(len(y))
    cross = (psi * s) @ phi.T
    torch.testing.assert_close(posterior.mean(z), cross @ torch.linalg.solve(gram, y))
    covariance = (psi * s) @ psi.T - cross @ torch.linalg.solve(gram, cross.T)
    torch.testing.assert_close(posterior.covariance(z), covariance, rtol=1e-6, atol=1e-8)


def test_features_are_differentiable_in_x() -> None:
    backend, x = stacked(), CASE.x(2)[None].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: backend.gram(x, x), (x,))
    u = torch.randn(1, 2, 2 * OUTPUTS).double()
    assert torch.autograd.gradcheck(lambda x: backend.vjp(x, u), (x,))


def test_what_does_not_fit_together_says_so() -> None:
    x = CASE.x(3)[None]
    with pytest.raises(InputError, match=r"the stacked backends have \[3, 1\] outputs: they must have equally many"):
        StackedBackend([AutoBackend(gpntk.freeze(CASE.module())), explicit(1)]).num_outputs(x)
    with pytest.raises(InputError, match="backends is empty"):
        StackedBackend([])
    with pytest.raises(InputError, match="weights and by_layer need one entry for each of 2 backends"):
        stacked(weights=[1.0])
    with pytest.raises(InputError, match=r"feature_map returned shape \(3, 40\) for 3 rows of x: it must be"):
        ExplicitBackend(waves, 7).gram(x, x)
    with pytest.raises(InputError, match="num_features=0: give a whole number, at least 1"):
        ExplicitBackend(waves, 0)


def test_costs_are_those_of_the_parts_together() -> None:
    x = CASE.x(300)[None]
    single = StructuredBackend(gpntk.freeze(CASE.module()))
    both: AbstractJacobianBackend = StackedBackend([single, StructuredBackend(gpntk.freeze(CASE.module()))])
    for one, two in zip(single.costs(x, 5), both.costs(x, 5), strict=True):
        assert two.strategy == one.strategy
        assert two.product.flops == 2 * one.product.flops
        assert two.kept == 2 * one.kept
