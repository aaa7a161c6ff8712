"""What a user gets wrong at the door of a kernel: every message names the argument and says what to do."""

import gpytorch
import numpy as np
import pytest
import torch
from linear_operator import to_dense
from torch import Tensor, nn

import gpntk
from gpntk.errors import InputError
from tests.cases import CASES, mlp, reference_jacobian

MODULE = mlp(3).double().eval()
CNN = next(case for case in CASES if case.name == "cnn-batchnorm")
KERNELS = [gpntk.NTKKernel, gpntk.NNGPKernel, gpntk.SketchedNTKKernel]


class Named(nn.Module):
    """A network that returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body = MODULE

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": x, "logits": self.body(x)}


@pytest.mark.parametrize("kind", [*KERNELS, gpntk.NetworkMean])
def test_every_door_takes_a_dict_and_a_frozen_network(kind) -> None:
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = to_dense(kind(MODULE)(x))
    extract = lambda returned: returned["logits"]  # noqa: E731
    torch.testing.assert_close(to_dense(kind(Named(), extract=extract)(x)), expected)
    torch.testing.assert_close(to_dense(kind(gpntk.freeze(Named(), extract=extract))(x)), expected)


@pytest.mark.parametrize("select", [None, "0.*"])
def test_the_readout_of_a_frozen_network(select: str | None) -> None:
    frozen = gpntk.freeze(MODULE, select)
    x = torch.randn(4, 5, dtype=torch.float64)
    readout = [name for name, _ in MODULE.named_parameters()][-2:]
    j = reference_jacobian(MODULE, x, readout)
    torch.testing.assert_close(to_dense(gpntk.NNGPKernel(frozen)(x)), j @ j.T)
    torch.testing.assert_close(to_dense(gpntk.NTKKernel(frozen, parameters="readout")(x)), j @ j.T)
    assert frozen.names == gpntk.freeze(MODULE, select).names


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("output", ["full", "independent"])
def test_memory_budget(kind, output: str) -> None:
    x = torch.randn(40, 5, dtype=torch.float64)
    kernel = kind(MODULE, memory_budget=2**18, output=output)
    assert kernel.backend.memory_budget == 2**18
    torch.testing.assert_close(to_dense(kernel(x)), to_dense(kind(MODULE, output=output)(x)))
    for wrong in (0, -1, float("inf"), float("nan"), True):
        with pytest.raises(InputError, match=r"memory_budget=\S+: must be a positive number"):
            kind(MODULE, memory_budget=wrong)
    with_backend = gpntk.NTKKernel(MODULE, memory_budget=2**20, backend=gpntk.jacobians.DenseBackend)
    assert with_backend.backend.memory_budget == 2**20


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize(
    ("given", "nearest"), [("imput_shape", "input_shape"), ("Output", "output"), ("batchshape", "batch_shape")]
)
def test_an_unknown_keyword_raises_with_the_nearest_name(kind, given: str, nearest: str) -> None:
    with pytest.raises(InputError, match=rf"^{kind.__name__} has no argument '{given}': did you mean '{nearest}'\?"):
        kind(MODULE, **{given: None})
    with pytest.raises(InputError, match="no argument 'lengthscale_prior'"):
        kind(MODULE, lengthscale_prior=None)
    with pytest.raises(InputError, match=r"no argument 'zzz': it takes network, "):
        kind(MODULE, zzz=None)


@pytest.mark.parametrize("kind", KERNELS)
def test_arguments_after_the_network_are_named(kind) -> None:
    with pytest.raises(TypeError, match="positional"):
        kind(MODULE, "full")


@pytest.mark.parametrize("kind", [*KERNELS, gpntk.NetworkMean])
class TestRowsOfX:
    def test_a_later_row_of_nan(self, kind) -> None:
        x = torch.randn(9, 5, dtype=torch.float64)
        x[7, 2] = torch.nan
        x[8, 0] = torch.inf
        with pytest.raises(InputError, match=r"NaN or infinite values in 2 of 9 rows, the first at index \(7,\)"):
            to_dense(kind(MODULE)(x))

    def test_values_whose_sum_overflows(self, kind) -> None:
        x = torch.full((2, 5), 3e38)
        x[0] = -3e38
        assert to_dense(kind(mlp(1).eval())(x)).isfinite().all()

    def test_a_wrong_width(self, kind) -> None:
        made = kind(MODULE)
        with pytest.raises(InputError, match=r"does not run on 2 rows of x, shape \(2, 7\).*columns"):
            to_dense(made(torch.randn(3, 7, dtype=torch.float64)))
        to_dense(made(torch.randn(3, 5, dtype=torch.float64)))
        with pytest.raises(InputError, match=r"does not run on 2 rows of x, shape \(2, 4\)"):
            to_dense(made(torch.randn(3, 4, dtype=torch.float64)))

    def test_an_array(self, kind) -> None:
        with pytest.raises(InputError, match=r"x1? is a ndarray: pass a tensor, torch.as_tensor"):
            kind(MODULE)(np.zeros((3, 5)))

    @pytest.mark.parametrize("shape", [(3, 36), (3, 1, 6, 6)])
    def test_images_without_their_shape(self, kind, shape: tuple[int, ...]) -> None:
        with pytest.raises(InputError, match=r"does not run on 2 rows of x.*input_shape=\(channels, height, width\)"):
            to_dense(kind(CNN.module())(torch.randn(shape, dtype=torch.float64)))

    def test_images_that_are_not_flat(self, kind) -> None:
        with pytest.raises(InputError, match=r"6 values per row, but input_shape=\(1, 6, 6\) needs 36: flatten"):
            to_dense(kind(CNN.module(), input_shape=(1, 6, 6))(torch.randn(3, 1, 6, 6, dtype=torch.float64)))


def test_another_width_where_the_network_takes_both() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.unsqueeze(-1)).sum(-2)

    kernel, module = gpntk.NTKKernel(Pooled().double()), None
    module = kernel.network.thaw()
    for width in (3, 6):
        x = torch.randn(4, width, dtype=torch.float64)
        j = reference_jacobian(module, x)
        torch.testing.assert_close(to_dense(kernel(x)), j @ j.T)


def test_an_error_of_the_network_itself_keeps_its_own_kind() -> None:
    class Broken(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.missing

    with pytest.raises(AttributeError, match="missing"):
        gpntk.NTKKernel(Broken(5, 1))(torch.randn(3, 5)).to_dense()


class SingleOutput(gpytorch.models.ExactGP):
    def __init__(self, kernel: gpytorch.kernels.Kernel) -> None:
        x, y = torch.rand(6, 5, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood().double())
        self.mean_module, self.covar_module = gpytorch.means.ConstantMean().double(), kernel

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


RBF = gpytorch.kernels.RBFKernel
COMPOUNDS = {
    "bare": lambda kernel: kernel,
    "scaled": gpytorch.kernels.ScaleKernel,
    "in a sum": lambda kernel: kernel + RBF(),
    "last of a sum": lambda kernel: RBF() + kernel,
    "in a product": lambda kernel: kernel * RBF(),
    "last of a product": lambda kernel: RBF() * kernel,
    "in a scaled sum": lambda kernel: gpytorch.kernels.ScaleKernel(RBF() + kernel),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("compound", COMPOUNDS)
def test_three_outputs_in_a_model_of_one(compound: str, training: bool) -> None:
    def evaluate(**options: object) -> Tensor:
        model = SingleOutput(COMPOUNDS[compound](gpntk.NTKKernel(MODULE, **options)).double()).train(training)
        if not training:
            return model(torch.rand(2, 5, dtype=torch.float64)).mean
        evidence = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
        return evidence(model(*model.train_inputs), model.train_targets)

    told = r"18 rows, but the likelihood's noise is of 6 values.*output=0.*MultitaskMultivariateNormal"
    if "last" in compound or compound == "in a scaled sum":
        told = r"differ in their rows per input: RBFKernel 1, NTKKernel 3.*output=0.*num_tasks=3"
    with pytest.raises(InputError, match=told):
        evaluate()
    assert evaluate(output=0).isfinite().all()


@pytest.mark.parametrize("rows", [1, 4])
def test_three_outputs_beside_one_are_not_broadcast(rows: int) -> None:
    x = torch.rand(rows, 5, dtype=torch.float64)
    for kernel in (gpntk.NTKKernel(MODULE) + RBF().double(), RBF().double() * gpntk.NTKKernel(MODULE)):
        with pytest.raises(InputError, match="differ in their rows per input"):
            kernel(x).to_dense()
    tasks = gpytorch.kernels.MultitaskKernel(RBF(), num_tasks=3, rank=1).double()
    both = to_dense((gpntk.NTKKernel(MODULE) + tasks)(x))
    torch.testing.assert_close(both, to_dense(gpntk.NTKKernel(MODULE)(x)) + to_dense(tasks(x)))


def test_repr() -> None:
    x = torch.randn(4, 5, dtype=torch.float64)
    kernel = gpntk.NTKKernel(MODULE)
    assert repr(kernel) == 'NTKKernel(161 of 161 parameters, all outputs "full")'
    kernel(x).to_dense()
    assert repr(kernel) == 'NTKKernel(161 of 161 parameters, 3 outputs "full")'
    assert repr(gpntk.NNGPKernel(MODULE, output=1)) == "NNGPKernel(27 of 161 parameters, output 1)"
    several = gpntk.NTKKernel(MODULE, layer_variances=True, output="sum", batch_shape=torch.Size([2]))
    several(x).to_dense()
    what = 'NTKKernel(161 of 161 parameters, all outputs "sum", variances of 0, 2, 5, batch_shape=(2,))'
    assert repr(several) == what
    assert "(base_kernel): NTKKernel(161 of" in repr(gpytorch.kernels.ScaleKernel(kernel))
    sketched = gpntk.SketchedNTKKernel(mlp(1).double().eval(), num_features=64)
    sketched(x).to_dense()
    assert repr(sketched) == 'SketchedNTKKernel(143 of 143 parameters, 1 output "full", 64 random features)'
    assert repr(gpntk.NetworkMean(MODULE)) == "NetworkMean(161 of 161 parameters)"
    assert repr(gpntk.freeze(MODULE, "0.*")) == "FrozenNetwork(54 of 161 parameters)"


def test_repr_of_what_is_below_the_kernels() -> None:
    frozen, x = gpntk.freeze(MODULE), torch.randn(4, 5, dtype=torch.float64)
    backend = gpntk.AutoBackend(frozen)
    assert repr(backend) == "AutoBackend(161 of 161 parameters)"
    # Before any data, how many features independent outputs have is not known.
    average = gpntk.jacobians.AverageBackend(frozen, gpntk.AutoBackend)
    assert repr(average) == "AverageBackend(161 of 161 parameters)"
    assert repr(gpntk.jacobians.ExplicitBackend(torch.sin, 5)) == "ExplicitBackend(5 features)"
    features = gpntk.inference.Features(backend, x)
    assert repr(features) == "Features[12, 161]"
    covariance = gpntk.inference.FeatureCovariance(features, torch.ones(1))
    assert (
        repr(gpntk.inference.WhitenedSystem(covariance, torch.ones(1))) == "WhitenedSystem(FeatureCovariance[12, 12])"
    )
    flow = gpntk.GradientFlow(gpntk.InfiniteNTKKernel(nn.Linear(5, 1)).double(), x, x[:, 0])
    assert repr(flow) == 'GradientFlow(4 inputs, "mse", single network)'
