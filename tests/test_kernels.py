"""Kernels: values, outputs, hyperparameters, composition, and the protocols users rely on."""

import copy
import pickle

import gpytorch
import pytest
import torch
from linear_operator import to_dense
from torch import Tensor, nn

import gpntk
from gpntk.errors import InputError, SelectionError
from gpntk.testing import check_kernel
from tests.cases import CASES, Case, mlp, reference_jacobian

MODULE = mlp(3).double().eval()
SINGLE = mlp(1).double().eval()


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, 5, dtype=torch.float64)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_laws(case: Case) -> None:
    check_kernel(gpntk.NTKKernel(case.module(), input_shape=case.input_shape), case.x(4))
    check_kernel(gpntk.NTKKernel(case.module(), input_shape=case.input_shape, layer_variances=True), case.x(4))


@pytest.mark.parametrize("output", ["full", "independent", "sum", 0, 2])
def test_outputs(output) -> None:
    kernel = gpntk.NTKKernel(MODULE, output=output)
    x, z = inputs(4), inputs(3)
    j, k = (reference_jacobian(MODULE, points).unflatten(0, (-1, 3)) for points in (x, z))
    expected = {
        "full": j.flatten(0, 1) @ k.flatten(0, 1).T,
        "independent": torch.einsum("ncp,mcp->nm", j, k) / 3,
        "sum": j.sum(1) @ k.sum(1).T / 3,
    }.get(output, j[:, output] @ k[:, output].T if isinstance(output, int) else None)
    torch.testing.assert_close(to_dense(kernel(x, z)), expected)
    assert kernel.num_outputs_per_input(x, z) == (3 if output == "full" else 1)
    torch.testing.assert_close(kernel(x, diag=True), to_dense(kernel(x)).diagonal())
    torch.testing.assert_close(kernel(x, x + 1, diag=True), to_dense(kernel(x, x + 1)).diagonal())
    check_kernel(kernel, x)


@pytest.mark.parametrize("output", ["full", "independent", "sum", 0])
def test_one_output_makes_all_modes_equal(output) -> None:
    x = inputs(4)
    torch.testing.assert_close(
        to_dense(gpntk.NTKKernel(SINGLE, output=output)(x)), to_dense(gpntk.NTKKernel(SINGLE)(x))
    )


def test_readout_kernel_is_last_features_plus_one() -> None:
    x = inputs(4)
    features = SINGLE[:-1](x).detach()
    torch.testing.assert_close(to_dense(gpntk.NNGPKernel(SINGLE)(x)), features @ features.T + 1)
    both = to_dense(gpntk.NNGPKernel(MODULE)(x))
    features = MODULE[:-1](x).detach()
    torch.testing.assert_close(both, torch.kron(features @ features.T + 1, torch.eye(3, dtype=torch.float64)))
    assert gpntk.NNGPKernel(MODULE).num_features == 27


@pytest.mark.parametrize("output", ["full", "independent"])
def test_layer_variances_weight_the_layers(output: str) -> None:
    kernel = gpntk.NTKKernel(MODULE, layer_variances=True, output=output)
    variances = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    kernel.layer_variances = variances.unsqueeze(-1)
    x = inputs(4)
    j = reference_jacobian(MODULE, x)
    scaled = j * variances.repeat_interleave(torch.tensor([54, 80, 27]))
    full = scaled @ j.T
    expected = full if output == "full" else full.unflatten(0, (4, 3)).unflatten(2, (4, 3)).diagonal(0, 1, 3).mean(-1)
    torch.testing.assert_close(to_dense(kernel(x)), expected)
    rhs = torch.randn(len(expected), 2, dtype=torch.float64)
    torch.testing.assert_close(kernel(x) @ rhs, expected @ rhs)
    torch.testing.assert_close(kernel(x, diag=True), expected.diagonal())


def test_gradients_of_layer_variances() -> None:
    kernel = gpntk.NTKKernel(MODULE, layer_variances=True)
    x, rhs = inputs(4), torch.randn(12, 2, dtype=torch.float64)
    for evaluate in (lambda: to_dense(kernel(x)) @ rhs, lambda: kernel(x) @ rhs):
        kernel.zero_grad()
        evaluate().square().sum().backward()
        gradient = kernel.raw_layer_variances.grad.clone()
        step = torch.zeros_like(gradient)
        step[1] = 1e-6
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                kernel.raw_layer_variances.add_(sign * step)
                values.append(evaluate().square().sum())
                kernel.raw_layer_variances.sub_(sign * step)
        torch.testing.assert_close(gradient[1, 0], (values[0] - values[1]) / 2e-6, rtol=1e-6, atol=0)


def test_composition() -> None:
    x, z = inputs(4), inputs(3)
    ntk, rbf = gpntk.NTKKernel(SINGLE), gpytorch.kernels.RBFKernel().double()
    plain, other = to_dense(ntk(x, z)), to_dense(rbf(x, z))
    scaled = gpytorch.kernels.ScaleKernel(ntk).double()
    scaled.outputscale = 3.0
    torch.testing.assert_close(to_dense(scaled(x, z)), 3 * plain)
    assert isinstance(scaled(x, z).evaluate_kernel(), gpntk.operators.FeatureGramLinearOperator)
    torch.testing.assert_close(to_dense((ntk + rbf)(x, z)), plain + other)
    torch.testing.assert_close(to_dense((ntk * rbf)(x, z)), plain * other)
    torch.testing.assert_close(to_dense((ntk * rbf)(x)), to_dense(ntk(x)) * to_dense(rbf(x)))


def test_active_dims() -> None:
    wide = torch.cat([inputs(4), inputs(4)], dim=-1)
    kernel = gpntk.NTKKernel(SINGLE, active_dims=(0, 2, 4, 6, 8))
    torch.testing.assert_close(to_dense(kernel(wide)), to_dense(gpntk.NTKKernel(SINGLE)(wide[:, ::2].contiguous())))


def test_batches_of_kernels_keep_active_dims() -> None:
    kernel = gpntk.NTKKernel(SINGLE, active_dims=(0, 1, 2, 3, 4), layer_variances=True, batch_shape=torch.Size([3]))
    kernel.layer_variances = torch.rand(3, 3, 1).double() + 0.1
    x = inputs(3, 4)
    torch.testing.assert_close(to_dense(kernel[1](x[1])), to_dense(kernel(x))[1])


def test_batched_inputs() -> None:
    kernel, x, z = gpntk.NTKKernel(MODULE), inputs(2, 3, 4), inputs(2)
    dense = to_dense(kernel(x, z))
    assert dense.shape == (2, 3, 12, 6)
    torch.testing.assert_close(dense[1, 2], to_dense(kernel(x[1, 2], z)))


def test_input_gradient_matches_finite_differences() -> None:
    kernel = gpntk.NTKKernel(MODULE, layer_variances=True)
    x, z = inputs(2).requires_grad_(), inputs(3)
    assert torch.autograd.gradcheck(lambda x: to_dense(kernel(x, z)), x)
    assert torch.autograd.gradcheck(lambda x: to_dense(kernel(x)), x)
    assert torch.autograd.gradcheck(lambda x: kernel(x, diag=True), x)


def test_only_hyperparameters_are_parameters() -> None:
    kernel = gpntk.NTKKernel(mlp(1).eval())
    assert not list(kernel.parameters())
    assert not kernel.state_dict()
    kernel = gpntk.NTKKernel(mlp(1).eval(), layer_variances=True)
    assert [name for name, _ in kernel.named_parameters()] == ["raw_layer_variances"]
    twin = gpntk.NTKKernel(mlp(1).eval(), layer_variances=True)
    kernel.layer_variances = 2.5
    twin.load_state_dict(kernel.state_dict())
    torch.testing.assert_close(twin.layer_variances, torch.full((3, 1), 2.5))


def test_dtype_and_device_follow() -> None:
    kernel = gpntk.NTKKernel(mlp(1).eval())
    assert (kernel.dtype, kernel.device) == (torch.float32, torch.device("cpu"))
    x = torch.randn(4, 5)
    before = to_dense(kernel(x))
    assert before.dtype == torch.float32
    assert to_dense(kernel(x.double())).dtype == torch.float64
    kernel.double()
    assert kernel.dtype == torch.float64
    torch.testing.assert_close(to_dense(kernel(x.double())).float(), before)


@pytest.mark.parametrize("output", ["full", "independent"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda kernel: pickle.loads(pickle.dumps(kernel))])
def test_copies(duplicate, output: str) -> None:
    kernel, x = gpntk.NTKKernel(MODULE, layer_variances=True, output=output), inputs(4)
    dense = to_dense(kernel(x))
    twin = duplicate(kernel)
    torch.testing.assert_close(to_dense(twin(x)), dense)
    twin.layer_variances = 2.0
    torch.testing.assert_close(to_dense(twin(x)), 2 * dense)
    torch.testing.assert_close(to_dense(kernel(x)), dense)
    twin.float()
    assert (twin.dtype, kernel.dtype) == (torch.float32, torch.float64)


def test_deep_copies_share_the_weights() -> None:
    kernel = gpntk.NTKKernel(MODULE)
    assert copy.deepcopy(kernel).network.frozen_0.data_ptr() == kernel.network.frozen_0.data_ptr()
    twin = copy.deepcopy(kernel)
    assert twin.backend.network is twin.network


def test_images_arrive_flat() -> None:
    case = next(case for case in CASES if case.name == "cnn-batchnorm")
    x = case.x(3)
    kernel = gpntk.NTKKernel(case.module(), input_shape=case.input_shape)
    j = reference_jacobian(case.module(), x.view(3, 1, 6, 6))
    torch.testing.assert_close(to_dense(kernel(x)), j @ j.T)


def test_network_mean() -> None:
    x = inputs(2, 4)
    torch.testing.assert_close(gpntk.NetworkMean(SINGLE)(x), SINGLE(x.view(8, 5)).view(2, 4).detach())
    torch.testing.assert_close(gpntk.NetworkMean(MODULE)(x), MODULE(x.view(8, 5)).view(2, 4, 3).detach())
    leaf = x.requires_grad_()
    assert torch.autograd.gradcheck(gpntk.NetworkMean(SINGLE), leaf)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: gpntk.NTKKernel(MODULE)(torch.ones(3, 5, dtype=torch.long)).to_dense(),
            InputError,
            "must be floating",
        ),
        (lambda: gpntk.NTKKernel(MODULE)(torch.ones(3, 5, device="meta")).to_dense(), InputError, "is on meta but the"),
        (lambda: gpntk.NTKKernel(MODULE, output="mean"), SelectionError, "choose 'full', 'independent', 'sum'"),
        (lambda: gpntk.NTKKernel(MODULE, output=True), SelectionError, "output=True"),
        (lambda: gpntk.NTKKernel(MODULE, output=3)(inputs(2)).to_dense(), SelectionError, "has outputs 0 to 2"),
        (lambda: gpntk.NTKKernel(gpntk.freeze(MODULE), parameters="0.*"), SelectionError, "frozen already"),
        (lambda: gpntk.NNGPKernel(gpntk.freeze(MODULE), extract=len), SelectionError, "frozen already"),
        (lambda: setattr(gpntk.NTKKernel(MODULE), "layer_variances", 2.0), SelectionError, "layer_variances=True"),
    ],
)
def test_refusals(call, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_an_error_leaves_active_dims_alone() -> None:
    kernel = gpntk.NTKKernel(nn.Linear(2, 1), active_dims=(0, 1), batch_shape=torch.Size([2]))
    with pytest.raises(IndexError):
        kernel[5]
    assert kernel.active_dims.tolist() == [0, 1]
