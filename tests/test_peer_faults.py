"""One regression test for each fault found in the library's ancestor and peers."""

import copy

import gpytorch
import pytest
import torch
from linear_operator import to_dense
from torch import Tensor, nn

import gpntk
from gpntk.errors import NetworkError
from gpntk.models import TangentGP
from tests.cases import Unused, mlp, reference_jacobian, scale_and_noise

# Three outputs and two hidden layers everywhere: with one hidden layer K_cd(x, x') is symmetric in c and d by accident.
MODULE = mlp(3).double().eval()
BACKENDS = [gpntk.jacobians.DenseBackend, gpntk.jacobians.AutodiffBackend, gpntk.jacobians.StructuredBackend]


def inputs(rows: int) -> Tensor:
    return torch.randn(rows, 5, dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_finite_ntk_indexed_cross_kernels_with_the_row_data(backend) -> None:
    x, z = inputs(6), inputs(4)
    cross = gpntk.NTKKernel(MODULE, backend=backend)(x, z).evaluate_kernel()
    dense = reference_jacobian(MODULE, x) @ reference_jacobian(MODULE, z).T
    torch.testing.assert_close(to_dense(cross[6:15, 7:12]), dense[6:15, 7:12])
    torch.testing.assert_close(
        to_dense(cross[torch.arange(9), torch.arange(9) % 4]), dense[range(9), [0, 1, 2, 3] * 2 + [0]]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_finite_ntk_filled_the_diagonal_of_the_last_output_only(backend) -> None:
    x = inputs(5)
    diagonal = gpntk.NTKKernel(MODULE, backend=backend)(x, diag=True)
    torch.testing.assert_close(diagonal, reference_jacobian(MODULE, x).square().sum(-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_finite_ntk_and_laplace_failed_on_frozen_and_unused_parameters(backend) -> None:
    module = Unused().double()
    module.first.weight.requires_grad_(False)
    x = torch.randn(4, 4, dtype=torch.float64)
    j = reference_jacobian(module, x)
    torch.testing.assert_close(to_dense(gpntk.NTKKernel(module, backend=backend)(x)), j @ j.T)
    trainable = lambda name, parameter: parameter.requires_grad  # noqa: E731
    part = reference_jacobian(module, x, [name for name, _ in module.named_parameters()][1:])
    torch.testing.assert_close(
        to_dense(gpntk.NTKKernel(module, parameters=trainable, backend=backend)(x)), part @ part.T
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_finite_ntk_wiped_the_users_gradients(backend) -> None:
    module = copy.deepcopy(MODULE)
    module(inputs(3)).sum().backward()
    gradients = [parameter.grad.clone() for parameter in module.parameters()]
    gpntk.NTKKernel(module, backend=backend)(inputs(4)) @ torch.ones(12, 2, dtype=torch.float64)
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0)


def test_finite_ntk_updated_batch_norm_inside_products() -> None:
    module = nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)
    ).double()
    with pytest.raises(NetworkError, match=r"BatchNorm1d.*train mode"):
        gpntk.NTKKernel(module)
    module.eval()
    kernel = gpntk.NTKKernel(module)
    gp = gpytorch.kernels.ScaleKernel(kernel).train()
    x = inputs(8)
    torch.testing.assert_close(to_dense(gp(x))[:9, :9], to_dense(gp(x[:3])))
    assert module[1].num_batches_tracked == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_finite_ntk_kept_a_stale_graph_after_the_weights_changed(backend) -> None:
    module, x = copy.deepcopy(MODULE), inputs(4)
    kernel = gpntk.NTKKernel(module, backend=backend)
    before = to_dense(kernel(x))
    with torch.no_grad():
        module[0].weight.mul_(2)
    # The kernel is frozen at the old weights; a new one sees the new weights, for the very same x.
    torch.testing.assert_close(kernel(x) @ torch.eye(12).double(), before)
    j = reference_jacobian(module, x)
    torch.testing.assert_close(to_dense(gpntk.NTKKernel(module, backend=backend)(x)), j @ j.T)


@pytest.mark.parametrize("backend", BACKENDS)
def test_finite_ntk_failed_on_zero_right_hand_sides(backend) -> None:
    kernel, x = gpntk.NTKKernel(MODULE, backend=backend), inputs(4)
    rhs = torch.stack([torch.zeros(12), torch.ones(12)], dim=-1).double()
    product = kernel(x) @ rhs
    assert (product[:, 0] == 0).all()
    assert torch.isfinite(product).all()
    assert (kernel.features(x).mT @ torch.zeros(12).double()).shape == (kernel.num_features,)


def test_finite_ntk_had_no_derivative_in_the_inputs() -> None:
    x, y, z = inputs(6), torch.randn(6, 3).double(), inputs(2).requires_grad_()
    model = TangentGP(x, y, gpntk.NTKKernel(MODULE)).eval()
    assert torch.autograd.gradcheck(lambda z: model(z).mean, z)


@pytest.mark.parametrize("backend", BACKENDS)
def test_finite_ntk_had_no_batch_dimension(backend) -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    kernel = gpntk.NTKKernel(MODULE, backend=backend)
    torch.testing.assert_close(to_dense(kernel(x)), torch.stack([to_dense(kernel(part)) for part in x]))


def test_finite_ntk_made_the_weights_gp_parameters() -> None:
    x = inputs(4)
    model = TangentGP(x, torch.randn(4, 3).double(), gpntk.NTKKernel(MODULE))
    assert {name for name, _ in model.named_parameters()} == {"likelihood.raw_noise", "covar_module.raw_outputscale"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_finite_ntk_looped_over_right_hand_sides(backend, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, x = gpntk.NTKKernel(MODULE, backend=backend), inputs(4)
    kernel(x) @ torch.ones(12, 1).double()  # probes and selection are behind us
    calls = []
    original = gpntk.FrozenNetwork.forward
    monkeypatch.setattr(gpntk.FrozenNetwork, "forward", lambda *args: calls.append(1) or original(*args))
    z = inputs(4)
    kernel(z) @ torch.randn(12, 50).double()
    assert len(calls) <= 2  # one pass for each direction, whatever the number of columns


def test_laplace_swapped_test_and_train_outputs() -> None:
    # K(x*, x)_cd = K(x, x*)_dc, not K(x*, x)_dc: the joint predictive covariance tells them apart.
    x, z, y = inputs(6), inputs(3), torch.randn(6, 3).double()
    model = TangentGP(x, y, gpntk.NTKKernel(MODULE))
    model.initialize(**scale_and_noise(1.0, 0.1))
    with torch.no_grad():
        posterior = model.eval()(z).covariance_matrix
    j, k = reference_jacobian(MODULE, x), reference_jacobian(MODULE, z)
    cross = k @ j.T
    noisy = j @ j.T + 0.1 * torch.eye(18).double()
    torch.testing.assert_close(posterior, k @ k.T - cross @ torch.linalg.solve(noisy, cross.T), rtol=1e-7, atol=1e-9)
    swapped = cross.unflatten(0, (3, 3)).unflatten(2, (6, 3)).permute(0, 3, 2, 1).reshape(9, 18)
    wrong = k @ k.T - swapped @ torch.linalg.solve(noisy, swapped.T)
    assert not torch.allclose(posterior, wrong, rtol=1e-3)
