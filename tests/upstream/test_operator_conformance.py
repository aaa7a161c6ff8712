"""linear_operator's own suites, run on our operators."""

import unittest

import torch
from linear_operator.test.linear_operator_test_case import LinearOperatorTestCase, RectangularLinearOperatorTestCase
from torch import Tensor, nn

import gpntk
from gpntk.operators import FeatureGramLinearOperator, JacobianLinearOperator, NoisyGramLinearOperator


def network(outputs: int = 1) -> gpntk.FrozenNetwork:
    # Wide and with gain, so that a Gram of five points is well conditioned in float32, as the host's tests assume.
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, outputs))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.0)
    return gpntk.FrozenNetwork(net)


def jacobian(net: gpntk.FrozenNetwork, x: Tensor) -> Tensor:
    """J(x) by torch.func alone, differentiable in x."""
    parameters = net.selected(x.dtype, x.device)
    rows = torch.func.vmap(torch.func.jacrev(lambda p, row: net(row.unsqueeze(0), p)[0]), (None, 0))(
        parameters, x.reshape(-1, x.shape[-1])
    )
    flat = torch.cat([rows[name].flatten(2) for name in net.names], dim=-1)
    return flat.flatten(0, 1).reshape(*x.shape[:-2], -1, net.num_params)


class GramCase(LinearOperatorTestCase):
    seed = 4
    backend: type = gpntk.jacobians.StructuredBackend
    batch: tuple[int, ...] = ()
    groups = 1
    outputs = 1
    rows = 5

    def create_linear_op(self) -> FeatureGramLinearOperator:
        net = network(self.outputs)
        x = 2 * torch.randn(*self.batch, self.rows, 4, generator=torch.Generator().manual_seed(5))
        variances = torch.linspace(0.7, 1.3, self.groups).unsqueeze(-1)
        return FeatureGramLinearOperator(x, x.clone(), variances, backend=self.backend(net))

    def evaluate_linear_op(self, linear_op: FeatureGramLinearOperator) -> Tensor:
        x1, x2, variances = linear_op.representation()
        net = linear_op._backend.network
        sizes = [s.stop - s.start for _, s in net.layers] if self.groups > 1 else [net.num_params]
        scale = variances.squeeze(-1).repeat_interleave(torch.tensor(sizes), -1)
        return (jacobian(net, x1) * scale.unsqueeze(-2)) @ jacobian(net, x2).mT


class TestGram(GramCase, unittest.TestCase):
    pass


class TestGramAutodiff(GramCase, unittest.TestCase):
    backend = gpntk.jacobians.AutodiffBackend


class TestGramDense(GramCase, unittest.TestCase):
    backend = gpntk.jacobians.DenseBackend


class TestGramLayerVariances(GramCase, unittest.TestCase):
    groups = 2


class TestGramBatch(GramCase, unittest.TestCase):
    batch = (3,)


class TestGramMultiBatch(GramCase, unittest.TestCase):
    batch = (2, 3)


class TestGramOutputs(GramCase, unittest.TestCase):
    outputs = 3
    rows = 2


class TestNoisyGram(GramCase, unittest.TestCase):
    should_call_cg = False  # solved by gpntk.inference

    def create_linear_op(self) -> NoisyGramLinearOperator:
        gram = super().create_linear_op()
        return gram.add_diagonal(torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5]))

    def evaluate_linear_op(self, linear_op: NoisyGramLinearOperator) -> Tensor:
        return super().evaluate_linear_op(linear_op._linear_op) + linear_op._diag_tensor.to_dense()


class TestCrossGram(RectangularLinearOperatorTestCase, unittest.TestCase):
    def create_linear_op(self) -> FeatureGramLinearOperator:
        return FeatureGramLinearOperator(
            torch.randn(5, 4),
            torch.randn(3, 4),
            torch.ones(1, 1),
            backend=gpntk.jacobians.StructuredBackend(network(2)),
        )

    def evaluate_linear_op(self, linear_op: FeatureGramLinearOperator) -> Tensor:
        x1, x2, variances = linear_op.representation()
        net = linear_op._backend.network
        return jacobian(net, x1) @ jacobian(net, x2).mT * variances


class TestJacobian(RectangularLinearOperatorTestCase, unittest.TestCase):
    def create_linear_op(self) -> JacobianLinearOperator:
        return JacobianLinearOperator(torch.randn(5, 4), backend=gpntk.jacobians.StructuredBackend(network(2)))

    def evaluate_linear_op(self, linear_op: JacobianLinearOperator) -> Tensor:
        return jacobian(linear_op._backend.network, linear_op._x)


class TestJacobianTransposed(RectangularLinearOperatorTestCase, unittest.TestCase):
    def create_linear_op(self) -> JacobianLinearOperator:
        return JacobianLinearOperator(
            torch.randn(5, 4), backend=gpntk.jacobians.StructuredBackend(network(1)), transposed=True
        )

    def evaluate_linear_op(self, linear_op: JacobianLinearOperator) -> Tensor:
        return jacobian(linear_op._backend.network, linear_op._x).mT
