"""Situations in which a wrong number could pass for a right one, or reasonable use would crash."""

import copy
import functools
import threading

import gpytorch
import pytest
import torch
from linear_operator import to_dense
from linear_operator.utils.errors import NotPSDError
from torch import Tensor, nn
from torch.autograd import forward_ad

import gpntk
from gpntk.errors import InputError, NetworkError, SelectionError
from gpntk.models import TangentGP
from tests.cases import mlp, reference_jacobian, scale_and_noise

MODULE = mlp(3).double().eval()
SINGLE = mlp(1).double().eval()
BACKENDS = [gpntk.jacobians.DenseBackend, gpntk.jacobians.AutodiffBackend, gpntk.jacobians.StructuredBackend]


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, 5, dtype=torch.float64)


def assert_kernel_is_right(module: nn.Module, x: Tensor, kernel: gpntk.NTKKernel | None = None) -> None:
    j = reference_jacobian(module, x)
    torch.testing.assert_close(to_dense((kernel or gpntk.NTKKernel(module))(x)), j @ j.T)


# --- networks whose layers behave otherwise on other rows ------------------------------------------------------------


class Gated(nn.Module):
    """A weight used directly, only where the first input is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 100), nn.Linear(100, 1)

    def forward(self, x: Tensor) -> Tensor:
        direct = (x @ self.first.weight.T).sum(1, keepdim=True)
        return self.head(torch.tanh(self.first(x))) + torch.relu(x[:, :1]) * direct


class Sorting(nn.Module):
    """Rows in another order inside than outside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 100), nn.Linear(100, 1)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.head(torch.tanh(self.first(x[order])))[order.argsort()]


class SequenceFirst(nn.Module):
    """A Linear on `[T, N, D]`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(1, 300), nn.Linear(300, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x.T.unsqueeze(-1)))).sum(0)


class Doubled(nn.Module):
    """A Linear on twice the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 100), nn.Linear(100, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.head(torch.tanh(self.first(torch.cat([x, -x])))).chunk(2)
        return one * two


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 100), nn.Linear(100, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(input=torch.tanh(self.first(input=x)))


def test_a_gate_that_is_shut_on_the_first_and_last_row() -> None:
    x = inputs(20)
    x[0, 0] = x[-1, 0] = -1.0
    assert_kernel_is_right(Gated().double(), x)


def test_rows_that_are_sorted_already() -> None:
    x = inputs(20)
    x = x[x[:, 0].argsort()]
    module = Sorting().double()
    j = torch.cat([reference_jacobian(module, row[None]) for row in x])
    torch.testing.assert_close(to_dense(gpntk.NTKKernel(module)(x)), j @ j.T)


@pytest.mark.parametrize("build", [SequenceFirst, Doubled, ByKeyword])
def test_layers_on_other_layouts(build) -> None:
    assert_kernel_is_right(build().double(), inputs(6))


class Again(nn.Module):
    """Runs its first layer a second time where an input is large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 100), nn.Linear(100, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if x.abs().max() > 100:
            hidden = hidden + (x.abs() > 100).any(-1, keepdim=True) * torch.sin(self.first(x))
        return self.head(hidden)


def test_a_later_input_on_another_path_goes_by_autodiff() -> None:
    module, x = Again().double(), inputs(6)
    # A budget that the explicit Jacobian does not fit.
    kernel = gpntk.NTKKernel(module, backend=functools.partial(gpntk.AutoBackend, memory_budget=60_000))
    assert_kernel_is_right(module, x, kernel)
    assert isinstance(kernel.backend.choice(x).backend, gpntk.jacobians.StructuredBackend)
    x = x.clone()
    x[2, 1] = 200.0
    assert_kernel_is_right(module, x, kernel)
    # This x went by automatic differentiation; what is right for others stays as it was.
    assert "no rules" in kernel.backend._made
    assert isinstance(kernel.backend.choice(x).backend, gpntk.jacobians.StructuredBackend)


def test_a_row_of_nan_does_not_disarm_the_check() -> None:
    module, x = Gated().double(), inputs(20)
    x[5] = float("nan")
    kernel = gpntk.NTKKernel(module)
    kernel.backend.gram(x[None], x[None])  # the kernel itself refuses such rows
    assert_kernel_is_right(module, inputs(10), kernel)
    with pytest.raises(InputError, match="NaN or infinite"):
        gpntk.NTKKernel(module)(x[[5]]).to_dense()


@pytest.mark.parametrize(("module", "rows"), [(SINGLE, 300), (MODULE, 260)])
def test_mirrored_blocks_of_a_symmetric_gram(module: nn.Module, rows: int) -> None:
    kernel, x = gpntk.NTKKernel(module, backend=gpntk.jacobians.StructuredBackend, layer_variances=True), inputs(rows)
    assert_kernel_is_right(module, x, kernel)


# --- sharing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_may_share_a_kernel(backend) -> None:
    kernel, x = gpntk.NTKKernel(SINGLE, backend=backend), inputs(12)
    j = reference_jacobian(SINGLE, x)
    failures: list[object] = []

    def work() -> None:
        for shift in range(10):
            try:
                torch.testing.assert_close(to_dense(kernel(x.clone())), j @ j.T)
                to_dense(kernel(x + shift))
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_many_independent_outputs_keep_their_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Linear(5, 50), nn.Tanh(), nn.Linear(50, 12)).double()
    kernel, x = gpntk.NTKKernel(module, output="independent"), inputs(6)
    v = torch.ones(6, 2, dtype=torch.float64)
    product, calls = kernel(x) @ v, []
    original = gpntk.FrozenNetwork.forward
    monkeypatch.setattr(gpntk.FrozenNetwork, "forward", lambda *args: calls.append(1) or original(*args))
    torch.testing.assert_close(kernel(x) @ v, product)
    assert not calls


def test_what_the_caller_gets_is_the_callers() -> None:
    kernel, x = gpntk.NTKKernel(SINGLE, backend=gpntk.jacobians.DenseBackend), inputs(6)
    features = kernel.features(x).to_dense()
    features -= features.mean(0)
    gram = to_dense(kernel(x))
    gram.zero_()
    assert_kernel_is_right(SINGLE, x, kernel)
    j = reference_jacobian(SINGLE, x)
    torch.testing.assert_close(kernel(x) @ torch.eye(6).double(), j @ j.T)


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_in_another_precision_share_nothing_wrong(backend) -> None:
    kernel, x = gpntk.NTKKernel(SINGLE, backend=backend), inputs(4)
    half = copy.deepcopy(kernel).half()
    rounded = to_dense(half(x))
    assert_kernel_is_right(SINGLE, x, kernel)
    torch.testing.assert_close(to_dense(kernel.half().double()(x)), rounded)


def test_a_frozen_network_is_not_moved_by_who_uses_it() -> None:
    frozen = gpntk.freeze(SINGLE)
    x = inputs(6)
    one, two = gpntk.NTKKernel(frozen), gpntk.NTKKernel(frozen)
    one.half()
    gpntk.NetworkMean(frozen).float()
    gpntk.TransferRegressor(frozen, dtype="float32").fit(x.numpy(), x[:, 0].numpy())
    assert frozen.dtype == two.dtype == torch.float64
    assert_kernel_is_right(SINGLE, x, two)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x.relu_().sub_(1))))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_network_that_works_in_place_leaves_x_alone(backend) -> None:
    module, x = InPlace().double(), inputs(4)
    before = x.clone()
    expected = module(x.clone()).detach()[:, 0]
    torch.testing.assert_close(gpntk.NetworkMean(module)(x), expected)
    j = torch.cat([reference_jacobian(module, row[None].clone()) for row in x])
    torch.testing.assert_close(to_dense(gpntk.NTKKernel(module, backend=backend)(x)), j @ j.T)
    torch.testing.assert_close(x, before, rtol=0, atol=0)


# --- gradients and modes ---------------------------------------------------------------------------------------------


def test_gradients_of_an_expanded_leaf_stay_apart() -> None:
    leaf = inputs(1, 4).expand(3, 4, 5).detach().requires_grad_()
    weights = torch.tensor([1.0, 2.0, 5.0]).double()
    kernel = gpntk.NTKKernel(SINGLE)
    (to_dense(kernel(leaf)).sum((1, 2)) * weights).sum().backward()
    torch.testing.assert_close(leaf.grad[1], 2 * leaf.grad[0])
    torch.testing.assert_close(leaf.grad[2], 5 * leaf.grad[0])


class TorchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.layer_norm(self.first(x), (6,), self.norm.weight, self.norm.bias))


@pytest.mark.parametrize("columns", [1, 3])
def test_layer_norm_by_its_other_name(columns: int) -> None:
    # Several columns go through vmap, where torch's own layer norm has wrong second derivatives.
    backend = gpntk.jacobians.AutodiffBackend(gpntk.freeze(TorchNorm().double()))
    u = torch.randn(1, columns, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: backend.vjp(x, u), inputs(1, 2).requires_grad_())


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_is_refused(backend) -> None:
    kernel, x = gpntk.NTKKernel(SINGLE, backend=backend), inputs(3)
    with forward_ad.dual_level(), pytest.raises(InputError, match="reverse mode only"):
        kernel(forward_ad.make_dual(x, torch.ones_like(x))).to_dense()


def test_threads_leave_the_process_as_it_was() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(1, 3, batch_first=True), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x.unsqueeze(-1))[0][:, -1])

    def switches() -> list[bool]:
        cuda = torch.backends.cuda
        attention = [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()]
        return [*attention, torch.backends.cudnn.enabled, torch._C._get_mkldnn_enabled()]

    before = switches()
    networks = [gpntk.freeze(Recurrent().double()) for _ in range(4)]
    threads = [threading.Thread(target=lambda n=n: [n(inputs(3)) for _ in range(30)]) for n in networks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert switches() == before


class TargetGP(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, kernel: gpytorch.kernels.Kernel) -> None:
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), kernel
        self.double().eval()

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


@pytest.mark.parametrize("layer_variances", [False, True])
def test_a_second_backward_through_a_posterior(layer_variances: bool) -> None:
    x = inputs(8)
    kernel = gpytorch.kernels.ScaleKernel(gpntk.NTKKernel(SINGLE, layer_variances=layer_variances))
    model, gradients = TargetGP(x, x[:, 0], kernel), []
    for _ in range(2):
        z = x[:3].clone().requires_grad_()
        model(z + 0.1).variance.sum().backward()
        gradients.append(z.grad)
    torch.testing.assert_close(*gradients)


def test_gradients_follow_the_detach_setting() -> None:
    x, z = inputs(8), inputs(3)

    def gradients(model: TargetGP) -> list[Tensor | None]:
        model.zero_grad()
        model(z).variance.sum().backward()
        return [
            p.grad.clone() if p.grad is not None else None for p in (model.covar_module.raw_outputscale, noise(model))
        ]

    def noise(model: TargetGP) -> Tensor:
        return model.likelihood.noise_covar.raw_noise

    def fresh() -> TargetGP:
        return TargetGP(x, x[:, 0], gpytorch.kernels.ScaleKernel(gpntk.NTKKernel(SINGLE)))

    model = fresh()
    scale, variance = model.covar_module.outputscale, model.likelihood.noise
    j, k = reference_jacobian(SINGLE, x), reference_jacobian(SINGLE, z)
    noisy = scale * j @ j.T + variance * torch.eye(8).double()
    cross = scale * k @ j.T
    (scale * k @ k.T - cross @ torch.linalg.solve(noisy, cross.T)).trace().backward()
    exact = [model.covar_module.raw_outputscale.grad.clone(), noise(model).grad.clone()]
    model = fresh()
    assert not model(z).variance.requires_grad
    with gpytorch.settings.detach_test_caches(False):
        for got, expected in zip(gradients(model), exact, strict=True):
            torch.testing.assert_close(got, expected)
    assert not model(z).variance.requires_grad


def test_inference_mode_does_not_poison_later_training() -> None:
    x = inputs(6)
    kernel = gpytorch.kernels.ScaleKernel(gpntk.NTKKernel(SINGLE, layer_variances=True)).double()
    with torch.inference_mode():
        to_dense(kernel(x))
    to_dense(kernel(x)).sum().backward()
    assert kernel.raw_outputscale.grad is not None


def test_missing_observations_do_not_shrink_the_variance() -> None:
    x, z = inputs(8), inputs(3)
    y = x[:, 0].clone()
    y[[2, 5]] = float("nan")
    kept = [0, 1, 3, 4, 6, 7]
    model = TargetGP(x, y, gpntk.NTKKernel(SINGLE))
    part = TargetGP(x[kept], y[kept], gpntk.NTKKernel(SINGLE))
    with torch.no_grad(), gpytorch.settings.observation_nan_policy("mask"):
        masked = model(z)
    with torch.no_grad():
        expected = part(z)
    torch.testing.assert_close(masked.mean, expected.mean)
    torch.testing.assert_close(masked.covariance_matrix, expected.covariance_matrix)


def test_tangent_gp_takes_missing_labels() -> None:
    x, z = inputs(8), inputs(3)
    y = x[:, 0].clone()
    y[2] = float("nan")
    kept = [0, 1, 3, 4, 5, 6, 7]
    models = TangentGP(x, y, gpntk.NTKKernel(SINGLE)), TangentGP(x[kept], y[kept], gpntk.NTKKernel(SINGLE))
    for model in models:
        model.initialize(**scale_and_noise(0.7, 0.1))
    with torch.no_grad(), gpytorch.settings.observation_nan_policy("mask"):
        one, two = (model.eval()(z) for model in models)
    torch.testing.assert_close(one.mean, two.mean)
    torch.testing.assert_close(one.variance, two.variance)
    with pytest.raises(InputError, match=r"y must be floating point, got torch.int64"):
        TangentGP(x, torch.arange(8), gpntk.NTKKernel(SINGLE))


def test_a_fit_that_runs_into_numerical_trouble_keeps_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(12)
    model = TangentGP(x, x[:, 0], gpntk.NTKKernel(SINGLE, layer_variances=True))
    seen: list[float] = []
    forward, calls = TangentGP.forward, []

    def failing(self: TangentGP, *args: Tensor) -> gpytorch.distributions.MultivariateNormal:
        calls.append(1)
        if len(calls) > 8:
            raise NotPSDError("too far")
        return forward(self, *args)

    monkeypatch.setattr(TangentGP, "forward", failing)
    assert model.fit(callback=lambda _, nats: seen.append(nats)) == max(seen)
    calls.extend([1] * 10)
    with pytest.raises(NotPSDError):
        model.fit()


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_products_with_an_expanded_x() -> None:
    x = inputs(4)
    kernel = gpntk.NTKKernel(SINGLE)
    lazy, v = kernel(x.expand(3, 4, 5)), torch.randn(4, dtype=torch.float64)
    j = reference_jacobian(SINGLE, x)
    torch.testing.assert_close(lazy @ v, (j @ j.T @ v).expand(3, 4))
    features = kernel.features(x.expand(3, 4, 5))
    w = torch.randn(features.shape[-1], 2, dtype=torch.float64)
    torch.testing.assert_close(features @ w, (j @ w).expand(3, 4, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_no_columns(backend) -> None:
    kernel, x = gpntk.NTKKernel(MODULE, backend=backend), inputs(4)
    kernel(x).to_dense()
    empty = inputs(0)
    assert to_dense(kernel(empty)).shape == (0, 0)
    assert to_dense(kernel(x, empty)).shape == (12, 0)
    assert to_dense(kernel(empty, x)).shape == (0, 12)
    assert kernel(empty, diag=True).shape == (0,)
    assert to_dense(kernel(x)[:, 3:3]).shape == (12, 0)
    assert (kernel(x) @ torch.zeros(12, 0).double()).shape == (12, 0)
    assert (kernel(x, empty) @ torch.zeros(0, 2).double()).eq(0).all()
    assert to_dense(kernel(inputs(0, 4))).shape == (0, 12, 12)


@pytest.mark.parametrize("combine", [lambda a, b: a + b, lambda a, b: b + a, lambda a, b: a * b])
def test_active_dims_in_sums_and_products(combine) -> None:
    x = torch.randn(5, 6, dtype=torch.float64)
    ntk = gpntk.NTKKernel(SINGLE, active_dims=(0, 1, 2, 3, 4))
    rbf = gpytorch.kernels.RBFKernel(active_dims=(5,)).double()
    both = combine(ntk, rbf)
    assert both(x).shape == (5, 5)
    torch.testing.assert_close(to_dense(both(x)), combine(to_dense(ntk(x)), to_dense(rbf(x))))


class Token(nn.Module):
    """A module that owns a parameter itself, so that its own hook fires after its readout's."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(5))
        self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x + self.token)))


def test_readout_of_a_module_with_parameters_of_its_own() -> None:
    module, x = Token().double(), inputs(4)
    features = torch.tanh(module.body(x + module.token)).detach()
    torch.testing.assert_close(to_dense(gpntk.NNGPKernel(module)(x)), features @ features.T + 1)


def test_independent_outputs_before_any_data() -> None:
    kernel = gpntk.NTKKernel(MODULE, output="independent")
    with pytest.raises(InputError, match="known only once the kernel has seen an input"):
        _ = kernel.num_features
    assert kernel(inputs(3)).evaluate_kernel().zero_mean_mvn_samples(2).shape == (2, 3)


def test_saved_models_of_frozen_networks_keep_their_input_shape(tmp_path) -> None:
    images = torch.randn(6, 1, 3, 3).double()
    module = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 1)).double()
    model = gpntk.TransferRegressor(gpntk.freeze(module, input_shape=(1, 3, 3)))
    model.fit(images.flatten(1).numpy(), images.mean((1, 2, 3)).numpy()).save(tmp_path / "m")
    loaded = gpntk.TransferRegressor.load(tmp_path / "m", module)
    torch.testing.assert_close(loaded.predict(images.flatten(1).numpy()), model.predict(images.flatten(1).numpy()))


def test_targets_that_leave_nothing_to_learn() -> None:
    x = inputs(10)
    y = SINGLE(x).detach().numpy()[:, 0]
    model = gpntk.TransferRegressor(SINGLE, layer_variances=True)
    with pytest.warns(UserWarning, match="trained on these labels"):
        model.fit(x.numpy(), y)
    torch.testing.assert_close(torch.as_tensor(model.predict(x.numpy())), torch.as_tensor(y))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: gpntk.freeze(nn.DataParallel(nn.Linear(2, 1))),
            NetworkError,
            "wrapped in DataParallel: pass module.mod",
        ),
        (lambda: gpntk.freeze(SINGLE, 3), SelectionError, "parameters=3: pass None, a glob"),
        (lambda: gpntk.freeze(SINGLE, input_shape=12), InputError, r"must be a sequence: pass \(12,\)"),
        (lambda: gpntk.NetworkMean(gpntk.freeze(SINGLE), input_shape=(5,)), SelectionError, "frozen already"),
    ],
)
def test_more_refusals(call, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
