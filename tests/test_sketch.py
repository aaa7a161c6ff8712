"""Random features: unbiased, with the variance that the formula gives, the same for the same seed."""

import pytest
import torch
from torch import Tensor, nn

import gpntk
from gpntk.errors import InputError
from gpntk.jacobians import SketchBackend
from gpntk.jacobians.sketch import sketch
from gpntk.testing import check_kernel
from tests.architectures import ARCHITECTURES
from tests.cases import CASES, Case, reference_jacobian

SEEDS = 400
NAMES = (
    "mlp-c3",
    "tokens-c3",
    "cnn-batchnorm",
    "attention",
    "tied",
    "lenet",
    "conv1d",
    "unet",
    "embedding-padding",
    "einsum",
)
SKETCHED = [case for case in [*CASES, *ARCHITECTURES] if case.name in NAMES]


def grams(case: Case, x: Tensor, features: int, seeds: int) -> Tensor:
    """Sketched Grams `[S, N*C, N*C]` for many seeds."""
    network = gpntk.freeze(case.module(), input_shape=case.input_shape)
    backend = gpntk.AutoBackend(network).by_rules(x.unsqueeze(0)).backend
    z = torch.stack([sketch(backend, x.unsqueeze(0), features, 7919 * seed)[0] for seed in range(seeds)])
    return z @ z.mT


@pytest.mark.parametrize("case", SKETCHED, ids=lambda case: case.name)
def test_inner_products_are_unbiased(case: Case) -> None:
    x = case.x(3)
    samples = grams(case, x, 16, SEEDS)
    j = reference_jacobian(case.module(), x.view(-1, *case.input_shape))
    error = (samples.mean(0) - j @ j.T) / (samples.std(0) / SEEDS**0.5)
    # As many standard errors as the largest of so many normal numbers has, with some to spare.
    assert error.abs().max() < 5
    # The test would see a bias of a fifth of the kernel's largest entry.
    assert (samples.std(0) / SEEDS**0.5).max() < 0.04 * (j @ j.T).abs().max()


def test_variance_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 4).double(), torch.randn(2, 5, dtype=torch.float64)
    network = gpntk.freeze(nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 1).double()), "0.weight")
    features, seeds = 8, 4000
    backend = gpntk.jacobians.StructuredBackend(network)
    z = torch.stack([sketch(backend, x.unsqueeze(0), features, seed)[0] for seed in range(seeds)])
    value = (z[:, 0] * z[:, 1]).sum(-1)
    g = (1 - layer(x).tanh().square()) * network.tensors(x.dtype, x.device)["2.weight"]
    p, q = x[0] @ x[1], g[0] @ g[1]
    forward = x[0].square().sum() * x[1].square().sum() + 2 * p**2
    backward = g[0].square().sum() * g[1].square().sum() + 2 * q**2
    expected = (forward * backward - (p * q) ** 2) / features
    assert abs(value.var() / expected - 1) < 0.15


def test_the_error_falls_with_the_number_of_features() -> None:
    case = next(case for case in CASES if case.name == "cnn-batchnorm")
    x = case.x(3)
    few, many = (grams(case, x, features, 100).std(0).mean() for features in (16, 256))
    assert 3 < few / many < 5.3


def test_features_depend_on_the_seed_alone() -> None:
    case = next(case for case in CASES if case.name == "cnn-batchnorm")
    network = gpntk.freeze(case.module(), input_shape=case.input_shape)
    x = case.x(6).unsqueeze(0)
    whole = SketchBackend(network, 40, seed=3).jacobian(x)
    torch.testing.assert_close(SketchBackend(network, 40, seed=3, memory_budget=30_000).jacobian(x), whole)
    assert not torch.allclose(SketchBackend(network, 40, seed=4).jacobian(x), whole)


@pytest.mark.parametrize("output", ["full", "independent", "sum", 1])
def test_the_kernel_obeys_the_laws(output) -> None:
    case = next(case for case in CASES if case.name == "mlp-c3")
    check_kernel(gpntk.SketchedNTKKernel(case.module(), num_features=32, output=output), case.x(5))


def test_the_kernel_is_differentiable_in_x() -> None:
    case = next(case for case in CASES if case.name == "mlp-c1")
    kernel = gpntk.SketchedNTKKernel(case.module(), num_features=16)
    x = case.x(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kernel(x).to_dense(), (x,))


def test_bad_numbers_of_features() -> None:
    with pytest.raises(InputError, match="num_features=0: give a whole number, at least 1"):
        gpntk.SketchedNTKKernel(nn.Linear(2, 1), num_features=0)
    backend = SketchBackend(gpntk.freeze(nn.Linear(2, 1)), 8)
    x = torch.randn(1, 3, 2)
    torch.testing.assert_close(backend.gram(x, x, per_layer=True), backend.gram(x, x))  # one group
    with pytest.raises(InputError, match="2 prior variances, but the features have 1 group"):
        gpntk.operators.FeatureGramLinearOperator(x, x, torch.ones(2, 1), backend=backend)


def test_features_of_different_calls_belong_together() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(72, 1)).double()
    backend = SketchBackend(gpntk.freeze(module, input_shape=(1, 8, 8)), 64, memory_budget=2**22)
    few, more = torch.randn(1, 3, 64).double(), torch.randn(1, 500, 64).double()
    alone = backend.jacobian(few)
    torch.testing.assert_close(backend.jacobian(torch.cat([few, more], 1))[:, :3], alone)


def test_gradients_of_features_that_do_not_depend_on_x() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    kernel = gpntk.SketchedNTKKernel(network, parameters="2.bias", num_features=8)
    (gradient,) = torch.autograd.grad(kernel(x).to_dense().sum(), x)
    assert bool((gradient == 0).all())
