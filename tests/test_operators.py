"""Operators beyond the hosts' own suites: indexing, batches, gradients, samples, solves."""

import gpytorch
import linear_operator
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_operator.operators import DenseLinearOperator
from torch import nn

import gpntk
from gpntk.operators import FeatureGramLinearOperator, JacobianLinearOperator, NoisyGramLinearOperator
from tests.cases import mlp, reference_jacobian

MODULE = mlp(3).double().eval()
SINGLE = mlp(1).double().eval()


def gram(n: int, m: int, module: nn.Module = MODULE, groups: int = 1) -> tuple[FeatureGramLinearOperator, torch.Tensor]:
    """An operator and its dense twin."""
    x1, x2 = torch.randn(n, 5).double(), torch.randn(m, 5).double()
    backend = gpntk.jacobians.StructuredBackend(gpntk.freeze(module))
    variances = torch.linspace(0.5, 2.0, groups).double().unsqueeze(-1)
    sizes = [s.stop - s.start for _, s in backend.network.layers] if groups > 1 else [backend.num_features]
    scale = variances.squeeze(-1).repeat_interleave(torch.tensor(sizes))
    dense = (reference_jacobian(module, x1) * scale) @ reference_jacobian(module, x2).T
    return FeatureGramLinearOperator(x1, x2, variances, backend=backend), dense


def indices(size: int) -> st.SearchStrategy:
    ints = st.integers(0, size - 1)  # the host turns -1 into an empty slice
    slices = st.slices(size).filter(lambda s: len(range(*s.indices(size))) > 0 and (s.step or 1) > 0)
    return st.one_of(ints, slices, st.lists(st.integers(0, size - 1), min_size=1, max_size=5).map(torch.tensor))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), outputs=st.sampled_from([1, 3]), groups=st.sampled_from([1, 3]))
def test_indexing_equals_dense_indexing(data: st.DataObject, outputs: int, groups: int) -> None:
    module = MODULE if outputs == 3 else SINGLE
    operator, dense = gram(4, 3, module, groups)
    row, column = data.draw(indices(4 * outputs)), data.draw(indices(3 * outputs))
    if torch.is_tensor(row) and torch.is_tensor(column):
        column = column[torch.arange(len(row)) % len(column)]
    got = linear_operator.to_dense(operator[row, column])
    torch.testing.assert_close(got, dense[row, column], rtol=1e-9, atol=1e-10)


def test_sub_rows_stay_lazy() -> None:
    operator, dense = gram(6, 5)
    part = operator[3:9, :]
    assert isinstance(part, FeatureGramLinearOperator)
    torch.testing.assert_close(part.to_dense(), dense[3:9])
    one_output, dense = gram(6, 5, SINGLE)
    part = one_output[torch.tensor([4, 0, 4]), 1:3]
    assert isinstance(part, FeatureGramLinearOperator)
    torch.testing.assert_close(part.to_dense(), dense[[4, 0, 4], 1:3])


def test_constants_and_diagonals_stay_inside() -> None:
    operator, dense = gram(4, 4)
    assert isinstance(operator * 3.0, FeatureGramLinearOperator)
    assert isinstance(operator.add_jitter(1e-3), NoisyGramLinearOperator)
    noisy = (operator * 2.0) + linear_operator.operators.ConstantDiagLinearOperator(torch.ones(1).double(), 12)
    assert isinstance(noisy, NoisyGramLinearOperator)
    assert isinstance(noisy.evaluate_kernel(), NoisyGramLinearOperator)
    torch.testing.assert_close(noisy.to_dense(), 2 * dense + torch.eye(12).double())


@pytest.mark.parametrize("shape", [(), (3,), (2, 1)])
@pytest.mark.parametrize("variance_shape", [(), (3,), (2, 3)])
def test_batches_broadcast(shape: tuple[int, ...], variance_shape: tuple[int, ...]) -> None:
    backend = gpntk.jacobians.StructuredBackend(gpntk.freeze(MODULE))
    x1, x2 = torch.randn(*shape, 4, 5).double(), torch.randn(3, 2, 5).double()
    variances = torch.rand(*variance_shape, 1, 1).double()
    operator = FeatureGramLinearOperator(x1, x2, variances, backend=backend)
    j1, j2 = (
        reference_jacobian(MODULE, x.reshape(-1, 5)).view(*x.shape[:-2], -1, backend.num_features) for x in (x1, x2)
    )
    dense = (j1 @ j2.mT) * variances
    assert operator.shape == dense.shape
    torch.testing.assert_close(operator.to_dense(), dense)
    rhs = torch.randn(2, 3, 6, 2).double()
    torch.testing.assert_close(operator @ rhs, dense @ rhs)
    torch.testing.assert_close(operator.expand(2, 3, 12, 6).to_dense(), dense.expand(2, 3, 12, 6))


def test_an_expanded_batch_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    operator, dense = gram(4, 4, SINGLE)
    rows = []
    original = operator._backend.gram
    monkeypatch.setattr(operator._backend, "gram", lambda x1, x2, *a: rows.append(len(x1)) or original(x1, x2, *a))
    torch.testing.assert_close(operator.expand(7, 4, 4).to_dense(), dense.expand(7, 4, 4))
    assert rows == [1]


@pytest.mark.parametrize("groups", [1, 3])
def test_gradients_through_products_and_solves(groups: int) -> None:
    operator, _ = gram(4, 4, SINGLE, groups)
    x, _, variances = operator.representation()
    rhs = torch.randn(4, 2).double()

    def product(x: torch.Tensor, variances: torch.Tensor) -> torch.Tensor:
        return FeatureGramLinearOperator(x, x, variances, backend=operator._backend) @ rhs

    def solve(x: torch.Tensor, variances: torch.Tensor) -> torch.Tensor:
        lazy = FeatureGramLinearOperator(x, x, variances, backend=operator._backend)
        return lazy.add_jitter(0.5).solve(rhs)

    arguments = (x.clone().requires_grad_(), variances.clone().requires_grad_())
    for function in (product, solve):
        assert torch.autograd.gradcheck(function, arguments)


def test_second_derivatives_through_to_dense() -> None:
    operator, _ = gram(3, 3, SINGLE)
    x, _, variances = operator.representation()

    def dense(x: torch.Tensor, variances: torch.Tensor) -> torch.Tensor:
        return FeatureGramLinearOperator(x, x, variances, backend=operator._backend).to_dense()

    arguments = (x.clone().requires_grad_(), variances.clone().requires_grad_())
    assert torch.autograd.gradgradcheck(dense, arguments)


@pytest.mark.parametrize("groups", [1, 3])
def test_prior_samples_have_the_gram_as_covariance(groups: int) -> None:
    operator, _ = gram(2, 2, MODULE, groups)
    x, _, variances = operator.representation()
    square = FeatureGramLinearOperator(x, x, variances, backend=operator._backend)
    samples = square.zero_mean_mvn_samples(40_000)
    dense = square.to_dense()
    # The sampling error of a covariance entry is at most sqrt(2 K_ii K_jj / S); five of them is no accident.
    deviation = dense.diagonal().sqrt()
    bound = 5 * (2 / 40_000) ** 0.5 * deviation[:, None] * deviation
    assert ((samples.T @ samples / 40_000 - dense).abs() < bound).all()


def test_cg_reaches_the_tolerance_asked_for() -> None:
    operator, _ = gram(60, 60, SINGLE)
    x, _, variances = operator.representation()
    noisy = FeatureGramLinearOperator(x, x, variances, backend=operator._backend).add_jitter(1e-4)
    rhs = torch.randn(60, 1).double()
    host = linear_operator.operators.AddedDiagLinearOperator(noisy._linear_op, noisy._diag_tensor)
    settings_ = (
        gpytorch.settings.max_cholesky_size(1),
        gpytorch.settings.cg_tolerance(1e-10),
        gpytorch.settings.max_cg_iterations(400),
    )
    with settings_[0], settings_[1], settings_[2]:
        ours = noisy.solve(rhs)
        with pytest.warns(linear_operator.utils.warnings.NumericalWarning):
            theirs = host.solve(rhs)
    dense = noisy.to_dense()
    assert torch.linalg.norm(dense @ ours - rhs) / torch.linalg.norm(rhs) < 1e-9
    assert torch.linalg.norm(dense @ theirs - rhs) / torch.linalg.norm(rhs) > 1e-8  # why ours exists


def test_jacobian_operator() -> None:
    backend = gpntk.jacobians.StructuredBackend(gpntk.freeze(MODULE))
    x = torch.randn(2, 4, 5).double()
    operator = JacobianLinearOperator(x, backend=backend)
    dense = reference_jacobian(MODULE, x.view(8, 5)).view(2, 12, -1)
    torch.testing.assert_close(operator.to_dense(), dense)
    v, u = torch.randn(backend.num_features, 2).double(), torch.randn(2, 12, 3).double()
    torch.testing.assert_close(operator @ v, dense @ v)
    torch.testing.assert_close(operator.mT @ u, dense.mT @ u)
    part = operator[:, 3:9]
    assert isinstance(part, JacobianLinearOperator)
    torch.testing.assert_close(part.to_dense(), dense[:, 3:9])
    assert isinstance(operator[:, 1:9], DenseLinearOperator)
    torch.testing.assert_close(operator[:, 1:9, 2:5].to_dense(), dense[:, 1:9, 2:5])
    torch.testing.assert_close(operator.mT[:, 2:5].to_dense(), dense.mT[:, 2:5])


def test_operators_say_what_they_are() -> None:
    kernel = gpntk.NTKKernel(nn.Sequential(nn.Linear(3, 50), nn.Tanh(), nn.Linear(50, 1)))
    x = torch.randn(50, 3)
    assert repr(kernel.features(x)) == "JacobianLinearOperator[50, 251]"
    assert repr(kernel.features(x).mT) == "JacobianLinearOperator[251, 50]"
    assert repr(kernel(x).evaluate_kernel()) == "FeatureGramLinearOperator[50, 50]"
    assert not kernel.backend.cache._entries
