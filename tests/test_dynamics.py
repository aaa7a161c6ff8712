"""Closed-form training: against matrix exponentials, plain loops, neural-tangents' values, and networks that train."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gpytorch
import numpy as np
import pytest
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from scipy.integrate import solve_ivp
from scipy.linalg import expm
from torch import Tensor, nn
from torch.func import functional_call

import gpntk
from gpntk.dynamics.filters import GradientFilter
from gpntk.dynamics.matrix_functions import KrylovMatrix, SpectralMatrix
from gpntk.errors import InputError, SolveError

ORACLES = sorted((Path(__file__).parent / "oracles" / "nt").glob("predict_*.npz"))
TIMES = [0.0, 0.3, 1.0, 10.0, 1e3]
INF = math.inf


class StoredKernel(gpytorch.kernels.Kernel):
    """A kernel of points 0, 1, 2, ... by a stored matrix; ``jitter`` is added where both points are the same."""

    def __init__(self, matrix: Tensor, jitter: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.jitter = jitter

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **_params: Any) -> Tensor:
        first, second = x1.squeeze(-1).long(), x2.squeeze(-1).long()
        matrix = self.matrix[first][:, second] + self.jitter * (first[:, None] == second).to(self.matrix)
        return matrix.diagonal() if diag else matrix


class KroneckerKernel(gpytorch.kernels.Kernel):
    """k(x, x') ⊗ B with rows n*C + c."""

    def __init__(self, kernel: gpytorch.kernels.Kernel, outputs: Tensor) -> None:
        super().__init__()
        self.kernel = kernel
        self.register_buffer("outputs", outputs)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **_params: Any) -> Tensor:
        matrix = torch.kron(self.kernel(x1, x2).to_dense(), self.outputs)
        return matrix.diagonal() if diag else matrix

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        return self.outputs.shape[0]


def rbf(lengthscale: float) -> RBFKernel:
    kernel = RBFKernel().double()
    kernel.lengthscale = lengthscale
    return kernel


def data(samples: int = 10, outputs: int | None = None, tests: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.rand(samples + tests, 2, dtype=torch.float64)
    y = torch.randn(samples, dtype=torch.float64) if outputs is None else torch.randn(samples, outputs).double()
    return x[:samples], y, x[samples:]


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def close(value: Tensor | np.ndarray, reference: Tensor | np.ndarray, tolerance: float = 1e-10) -> None:
    value, reference = torch.as_tensor(value).detach(), torch.as_tensor(reference).detach()
    assert value.shape == reference.shape
    error = (value - reference).abs().max() / reference.abs().max().clamp_min(1e-3)
    assert error <= tolerance, f"relative error {error:.3e}"


# --- closed forms against the matrix exponential, a differential equation and loops ---------------------------------


def dense_filter(theta: Tensor, t: float, rate: float) -> Tensor:
    """P_t = Θ⁻¹(I - exp(-η Θ t)) in the most literal way."""
    identity = torch.eye(theta.shape[0], dtype=theta.dtype)
    decay = torch.zeros_like(theta) if t == INF else torch.from_numpy(expm(-rate * t * theta.numpy()))
    return torch.linalg.solve(theta, identity - decay)


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_the_ensemble_is_the_formula_with_matrix_exponentials(noise: float) -> None:
    x, y, x_test = data()
    ntk, nngp, rate = rbf(0.2), rbf(0.3), 0.7
    times = [*TIMES, INF]
    flow = gpntk.GradientFlow(ntk, x, y, nngp=nngp, learning_rate=rate, noise=noise)
    result = flow.predict(x_test, times)
    with torch.no_grad():
        theta, k = ntk(x).to_dense() + noise * torch.eye(10).double(), nngp(x).to_dense()
        theta_star, k_star, k_test = (ntk(x_test, x).to_dense(), nngp(x_test, x).to_dense(), nngp(x_test).to_dense())
    assert result.covariance is not None
    assert result.error is None
    for index, t in enumerate(times):
        w = theta_star @ dense_filter(theta, t, rate)
        close(result.mean[index], w @ y, 1e-8)
        close(result.covariance[index], k_test + w @ k @ w.T - w @ k_star.T - k_star @ w.T, 1e-8)
        alone = flow.predict(x_test, t)
        close(alone.mean, result.mean[index])
        assert alone.covariance is not None
        close(alone.covariance, result.covariance[index])


def test_the_flow_solves_its_differential_equation() -> None:
    x, y, x_test = data()
    network = mlp(2, 20, 1)
    kernel, f0 = gpntk.NTKKernel(network), gpntk.NetworkMean(network)
    joint = torch.cat([x, x_test])
    theta = kernel(joint).to_dense().detach()

    def derivative(_time: float, f: np.ndarray) -> np.ndarray:
        return -0.1 * theta.numpy()[:, :10] @ (f[:10] - y.numpy())

    start = f0(joint).detach()
    solution: Any = solve_ivp(derivative, (0, 30), start.numpy(), "LSODA", t_eval=[1.0, 30.0], rtol=1e-11, atol=1e-12)
    flow = gpntk.GradientFlow(kernel, x, y, initial=f0, learning_rate=0.1)
    result = flow.predict(joint, [1.0, 30.0])
    assert result.covariance is None
    close(result.mean, solution.y.T, 1e-7)


def test_time_zero_and_the_end_of_time() -> None:
    x, y, x_test = data()
    kernel, network = rbf(0.15), mlp(2, 5, 1)
    flow = gpntk.GradientFlow(kernel, x, y, nngp=rbf(0.3), initial=gpntk.NetworkMean(network))
    start = flow.predict(x_test, 0)
    close(start.mean, network(x_test).squeeze(-1))
    assert start.covariance is not None
    close(start.covariance, rbf(0.3)(x_test).to_dense())
    end = flow.predict(x)
    close(end.mean, y, 1e-8)
    assert end.covariance is not None
    assert end.covariance.abs().max() < 1e-8
    close(flow.predict(x_test, 1e12).mean, flow.predict(x_test).mean, 1e-8)


def test_a_singular_kernel_learns_what_it_can() -> None:
    x = torch.tensor([[0.1], [0.1], [0.7]], dtype=torch.float64)
    y = torch.tensor([0.0, 2.0, 5.0], dtype=torch.float64)
    expected = torch.tensor([1.0, 1.0, 5.0])
    for method in ("dense", "lanczos"):
        flow = gpntk.GradientFlow(rbf(0.2), x, y, method=method)
        close(flow.predict(x).mean, expected, 1e-10)
        close(flow.predict(x, t=1e4).mean, expected, 1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_discrete_steps_are_those_of_a_loop(momentum: float, noise: float) -> None:
    x, y, x_test = data(outputs=2)
    network = mlp(2, 16, 2)
    kernel = gpntk.NTKKernel(network)
    common = {"initial": gpntk.NetworkMean(network), "noise": noise, "momentum": momentum, "discrete": True}
    rate = 0.95 * gpntk.GradientFlow(kernel, x, y, **common).max_learning_rate()
    flow = gpntk.GradientFlow(kernel, x, y, learning_rate=rate, **common)
    jacobian, start = kernel.features(x).to_dense(), network(x).detach().flatten()
    weights = torch.zeros(jacobian.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weights], lr=rate, momentum=momentum, weight_decay=noise)
    steps = [0, 1, 2, 3, 10, 57]
    test_jacobian, visited = kernel.features(x_test).to_dense(), {}
    for step in range(58):
        visited[step] = weights.detach().clone()
        optimizer.zero_grad()
        (0.5 * (start + jacobian @ weights - y.flatten()).square().sum()).backward()
        optimizer.step()
    result = flow.predict(x_test, steps)
    for index, step in enumerate(steps):
        close(flow.weights(step), visited[step])
        close(result.mean[index].flatten(), network(x_test).detach().flatten() + test_jacobian @ visited[step])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_largest_learning_rate_is_where_descent_diverges(momentum: float) -> None:
    x, y, x_test = data(outputs=2)
    make: Callable[..., gpntk.GradientFlow] = lambda rate: gpntk.GradientFlow(  # noqa: E731
        rbf(0.3), x, y, learning_rate=rate, normalize=True, discrete=True, momentum=momentum, noise=0.1
    )
    eigenvalue = torch.linalg.eigvalsh(rbf(0.3)(x).to_dense().detach())[-1].item() + 0.1
    largest = make(1.0).max_learning_rate()
    assert largest == pytest.approx(2 * (1 + momentum) * 20 / eigenvalue)
    stable = make(0.99 * largest).predict(x_test, [100_000.0, INF]).mean
    close(stable[0], stable[1], 1e-6)
    with pytest.raises(InputError, match=f"must be below {largest:.6g}"):
        make(1.01 * largest).predict(x_test, 5)
    # The recurrence itself, on both sides of the bound.
    values = torch.tensor([eigenvalue / 20], dtype=torch.float64)
    for factor, bounded in ((0.99, True), (1.01, False)):
        rest = 1 - values * GradientFilter(factor * largest, momentum, True)(values, torch.tensor([2000.0]))
        assert bool(rest.abs() < 1) == bounded


def test_filters_agree_where_they_should() -> None:
    values = torch.tensor([0.0, 1e-14, 1e-3, 0.4, 1.0, 1.7], dtype=torch.float64)
    times = torch.tensor([0.0, 1.0, 7.0, 400.0, INF], dtype=torch.float64)
    loop = torch.zeros_like(values)
    descent, heavy = GradientFilter(1.1, 0.0, True)(values, times), GradientFilter(1.1, 0.6, True)(values, times)
    velocity, ball = torch.zeros_like(values), torch.zeros_like(values)
    for step in range(1, 401):
        loop = loop + 1.1 * (1 - values * loop)
        velocity = 0.6 * velocity + 1 - values * ball
        ball = ball + 1.1 * velocity
        for index in (times == step).nonzero().flatten().tolist():
            close(descent[index], loop, 1e-12)
            close(heavy[index], ball, 1e-12)
    for result in (descent, heavy, GradientFilter(1.1)(values, times)):
        assert (result[0] == 0).all()
        close(result[-1][1:] * values[1:], torch.ones(5))
        assert result[-1][0] == 0
    # Small steps are the flow, and no digit is lost where nothing has moved yet.
    slow = GradientFilter(1e-6, 0.0, True)(values, torch.tensor([1e6]))
    close(slow, GradientFilter(1e-6)(values, torch.tensor([1e6])), 1e-6)
    close(slow[0, :2], torch.ones(2))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.95])
def test_what_is_left_of_a_residual_is_bounded(momentum: float) -> None:
    step = GradientFilter(1.0, momentum, True)
    values = torch.linspace(0, step.largest_rate(1.0), 500, dtype=torch.float64)[1:-1]
    rest = 1 - values * step(values, torch.arange(200))
    assert rest.abs().max() <= step.gain


# --- neural-tangents -------------------------------------------------------------------------------------------------


class Oracle:
    """One case: kernels of points 0 .. 15, the first twelve for training."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as stored:
            self.arrays = {key: torch.as_tensor(stored[key]) for key in stored}
        value = float(path.stem.split("reg")[-1].removesuffix("_abs"))
        self.options = {"noise" if path.stem.endswith("_abs") else "diag_reg": value}
        self.x = torch.arange(12, dtype=torch.float64).unsqueeze(-1)
        self.x_test = torch.arange(12, 16, dtype=torch.float64).unsqueeze(-1)
        self.y = self["y_train"]

    def __getitem__(self, key: str) -> Tensor:
        return self.arrays[key]

    def noise(self, name: str) -> float:
        relative = self.options.get("diag_reg", 0.0) * self[f"k_train_train_{name}"].diagonal().mean().item()
        return self.options.get("noise", 0.0) + relative

    def kernel(self, name: str, jitter: float = 0.0) -> StoredKernel:
        train, cross, test = (self[f"k_{pair}_{name}"] for pair in ("train_train", "test_train", "test_test"))
        return StoredKernel(torch.cat([torch.cat([train, cross.T], 1), torch.cat([cross, test], 1)]), jitter)

    def flow(self) -> gpntk.GradientFlow:
        ntk, nngp = self.kernel("ntk"), self.kernel("nngp")
        return gpntk.GradientFlow(ntk, self.x, self.y, nngp=nngp, normalize=True, **self.options)


@pytest.fixture(params=ORACLES, ids=lambda path: path.stem, scope="module")
def oracle(request: pytest.FixtureRequest) -> Oracle:
    return Oracle(request.param)


def test_all_stored_cases_are_here() -> None:
    assert len(ORACLES) == 6


@pytest.mark.parametrize(("name", "trained"), [("ntk", "all"), ("nngp", "readout")])
def test_neural_tangents_ensembles(oracle: Oracle, name: str, trained: Any) -> None:
    result = oracle.flow().predict(oracle.x_test, [1.0, 10.0, 100.0, INF], trained=trained)
    assert result.covariance is not None
    for index, t in enumerate(("1", "10", "100", "inf")):
        close(result.mean[index], oracle[f"mean_{name}_t{t}"], 1e-12)
        close(result.covariance[index], oracle[f"cov_{name}_t{t}"], 1e-11)


@pytest.mark.parametrize(("name", "trained"), [("ntk", "all"), ("nngp", "readout")])
def test_neural_tangents_on_the_training_set(oracle: Oracle, name: str, trained: Any) -> None:
    # There the noise counts as part of the kernel that is trained, between a training point and itself.
    ntk, nngp = (oracle.kernel(key, oracle.noise(key) if key == name else 0.0) for key in ("ntk", "nngp"))
    flow = gpntk.GradientFlow(ntk, oracle.x, oracle.y, nngp=nngp, normalize=True)
    result = flow.predict(oracle.x, [1.0, 10.0, 100.0], trained=trained)
    assert result.covariance is not None
    close(result.mean, oracle[f"train_mean_{name}_t1_10_100"], 1e-12)
    assert (result.covariance - oracle[f"train_cov_{name}_t1_10_100"]).abs().max() < 1e-13


@pytest.mark.parametrize(("name", "prior"), [("nngp", "nngp"), ("ntkgp", "ntk")])
def test_neural_tangents_posteriors(oracle: Oracle, name: str, prior: Any) -> None:
    flow = oracle.flow()
    for x, where in ((oracle.x_test, "gp_"), (oracle.x, "gp_train_")):
        result = flow.posterior(x, prior)
        assert result.covariance is not None
        close(result.mean, oracle[f"{where}mean_{name}"], 1e-12)
        assert (result.covariance - oracle[f"{where}cov_{name}"]).abs().max() < 1e-13


def test_neural_tangents_infinite_ensemble(oracle: Oracle) -> None:
    for x, where in ((oracle.x_test, "gp_"), (oracle.x, "gp_train_")):
        result = oracle.flow().predict(x)
        assert result.covariance is not None
        close(result.mean, oracle[f"{where}mean_ntk"], 1e-12)
        assert (result.covariance - oracle[f"{where}cov_ntk"]).abs().max() < 1e-13


def test_the_posterior_is_that_of_an_exact_gp() -> None:
    x, y, x_test = data()
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = 0.05

    class GP(gpytorch.models.ExactGP):
        def __init__(self) -> None:
            super().__init__(x, y, likelihood)
            self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), rbf(0.4)

        def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    expected = GP().eval()(x_test)
    flow = gpntk.GradientFlow(rbf(0.4), x, y, nngp=rbf(0.4), noise=likelihood.noise.item())
    for result in (flow.posterior(x_test, "ntk"), flow.posterior(x_test), flow.predict(x_test, trained="readout")):
        assert result.covariance is not None
        close(result.mean, expected.mean)
        close(result.covariance, expected.covariance_matrix, 1e-8)


# --- several outputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_outputs_that_share_a_kernel_are_a_block_diagonal_one(method: Any) -> None:
    x, y, x_test = data(outputs=3)
    identity = torch.eye(3, dtype=torch.float64)
    ntk, nngp = rbf(0.2), rbf(0.3)
    shared = gpntk.GradientFlow(ntk, x, y, nngp=nngp, method=method, noise=0.01)
    options: dict[str, Any] = {"method": method, "diag_reg": 0.01}
    full = gpntk.GradientFlow(KroneckerKernel(ntk, identity), x, y, nngp=KroneckerKernel(nngp, identity), **options)
    first, second = shared.predict(x_test, [2.0, INF]), full.predict(x_test, [2.0, INF])
    assert first.mean.shape == (2, 4, 3)
    close(second.mean, first.mean, 1e-8)
    assert first.covariance is not None
    assert second.covariance is not None
    close(second.covariance, torch.stack([torch.kron(one, identity) for one in first.covariance]), 1e-8)
    close(full.coefficients(2.0), shared.coefficients(2.0), 1e-8)
    for column in range(3):
        alone = gpntk.GradientFlow(ntk, x, y[:, column], nngp=nngp, noise=0.01).predict(x_test, [2.0, INF])
        close(alone.mean, first.mean[..., column], 1e-8)


def test_rows_of_a_full_kernel_are_inputs_then_outputs() -> None:
    x, y, x_test = data(outputs=2)
    mixing = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)
    result = gpntk.GradientFlow(KroneckerKernel(rbf(0.2), mixing), x, y).predict(x_test, 3.0)
    theta = torch.kron(rbf(0.2)(x).to_dense(), mixing).detach()
    cross = torch.kron(rbf(0.2)(x_test, x).to_dense(), mixing).detach()
    close(result.mean.flatten(), cross @ dense_filter(theta, 3.0, 1.0) @ y.flatten(), 1e-9)


# --- weights, and networks that train --------------------------------------------------------------------------------

KERNELS: dict[str, Callable[[nn.Module], gpytorch.kernels.Kernel]] = {
    "full": gpntk.NTKKernel,
    "independent": lambda network: gpntk.NTKKernel(network, output="independent"),
    "one output": lambda network: gpntk.NTKKernel(network, output=1),
    "readout": gpntk.NNGPKernel,
    "scaled": lambda network: ScaleKernel(ScaleKernel(gpntk.NTKKernel(network))).double(),
    "layers": lambda network: gpntk.NTKKernel(network, layer_variances=True),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_the_weights_reproduce_the_predictions(name: str, method: Any) -> None:
    x, y, x_test = data(outputs=2)
    kernel: Any = KERNELS[name](mlp(2, 12, 2))
    y = y[:, 0] if name == "one output" else y
    if name == "layers":
        kernel.layer_variances = torch.tensor([[0.5], [2.0]])
    features = kernel.base_kernel.base_kernel.features if name == "scaled" else kernel.features
    flow = gpntk.GradientFlow(kernel, x, y, method=method, noise=1e-3, learning_rate=0.1)
    predicted = flow.predict(x_test, [0.5, 40.0]).mean
    jacobian, weights = features(x_test).to_dense(), flow.weights([0.5, 40.0])
    tail = (2,) if name == "independent" else ()
    assert weights.shape == (2, jacobian.shape[1], *tail)
    close((jacobian @ weights if tail else weights @ jacobian.T).reshape(predicted.shape), predicted, 1e-8)
    close(flow.weights(40.0), weights[1])


def test_a_linearized_network_trains_as_predicted() -> None:
    x, y, x_test = data(outputs=2)
    network = mlp(2, 10, 10, 2)
    frozen = gpntk.freeze(network)
    flow = gpntk.GradientFlow(
        gpntk.NTKKernel(frozen), x, y, initial=frozen, discrete=True, normalize=True, learning_rate=0.5
    )
    start = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}

    def linearized(moved: dict[str, Tensor], inputs: Tensor) -> Tensor:
        value, change = torch.func.jvp(lambda w: functional_call(network, w, (inputs,)), (start,), (moved,))
        return value + change

    def loss(moved: dict[str, Tensor]) -> Tensor:
        return 0.5 * (linearized(moved, x) - y).square().mean()

    moved = {name: torch.zeros_like(value) for name, value in start.items()}
    for step in range(61):
        if step in (0, 1, 20, 60):
            close(flow.predict(x_test, step).mean, linearized(moved, x_test), 1e-10)
            named = frozen.unflatten(flow.weights(step))
            for name, value in moved.items():
                assert (named[name] - value).abs().max() < 1e-10
        gradient = torch.func.grad(loss)(moved)
        moved = {name: value - 0.5 * gradient[name] for name, value in moved.items()}


class WideNetwork(nn.Module):
    """Two hidden layers in the NTK parametrization: standard normal weights, scaled by 1/sqrt(fan-in)."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        pairs = pairwise((2, width, width, 1))
        self.weights = nn.ParameterList([torch.randn(o, i, generator=generator) for i, o in pairs])

    def forward(self, x: Tensor) -> Tensor:
        for index, weight in enumerate(self.weights):
            x = (x if index == 0 else x.tanh()) @ weight.T / weight.shape[1] ** 0.5
        return x


def test_wide_networks_approach_the_prediction() -> None:
    angles = torch.linspace(0, 5, 9)
    points = torch.stack([angles.cos(), angles.sin()], -1)
    x, x_test, y = points[::2], points[1::2], (2 * angles[::2]).sin()
    linear, tanh = (lambda i, o: nn.Linear(i, o, bias=False)), nn.Tanh()
    architecture = nn.Sequential(linear(2, 1), tanh, linear(1, 1), tanh, linear(1, 1))
    limit = gpntk.InfiniteNTKKernel(architecture, weight_std=1.0, bias_std=0.0)

    def deviations(width: int, seed: int) -> list[float]:
        """Of a network after 40 steps from what its own kernel and what the limit predict, relative to its move."""
        network = WideNetwork(width, seed)
        flows = [
            gpntk.GradientFlow(kernel, x, y, None, 0.5, initial=gpntk.NetworkMean(network), discrete=True)
            for kernel in (gpntk.NTKKernel(network, backend=gpntk.jacobians.StructuredBackend), limit)
        ]
        predicted = [flow.predict(x_test, 40).mean for flow in flows]
        optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
        before = network(x_test).squeeze(-1).detach()
        for _ in range(40):
            optimizer.zero_grad()
            (0.5 * (network(x).squeeze(-1) - y).square().sum()).backward()
            optimizer.step()
        after = network(x_test).squeeze(-1).detach()
        return [((after - value).norm() / (after - before).norm()).item() for value in predicted]

    seeds = {64: 12, 256: 12, 1024: 6}
    measured = [np.array([deviations(width, seed) for seed in range(count)]) for width, count in seeds.items()]
    own, infinite = np.stack([np.sqrt(np.square(part).mean(0)) for part in measured]).T
    # The kernel of one network differs from the limit by O(1/sqrt(width)): what its training does, from what the limit
    # says, by as much. The bound of Lee et al. (2019), theorem 2.1, for its own kernel is the same, but what the kernel
    # moves in training is O(1/width), as they observe and Dyer and Gur-Ari (2020) derive.
    weights = np.sqrt(list(seeds.values()))
    slopes = [np.polyfit(np.log(list(seeds)), np.log(part), 1, w=weights)[0] for part in (own, infinite)]
    assert -1.3 < slopes[0] < -0.7, (slopes, own)
    assert -0.7 < slopes[1] < -0.3, (slopes, infinite)
    assert own[-1] < 0.01, own
    assert infinite[-1] < 0.05, infinite


# --- Lanczos ---------------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "flow": {},
    "descent": {"discrete": True, "learning_rate": 0.01},
    "heavy ball": {"discrete": True, "learning_rate": 0.02, "momentum": 0.9},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("outputs", [None, 2])
def test_lanczos_is_the_eigendecomposition(way: str, outputs: int | None) -> None:
    x, y, x_test = data(200, outputs, tests=7)
    times = [0.0, 1.0, 30.0, 1000.0, INF]
    ntk, nngp = rbf(0.2), rbf(0.4)
    common: dict[str, Any] = {"nngp": nngp, "noise": 0.01, **WAYS[way]}
    dense = gpntk.GradientFlow(ntk, x, y, method="dense", **common)
    lanczos = gpntk.GradientFlow(ntk, x, y, method="lanczos", **common)
    expected, result = dense.predict(x_test, times), lanczos.predict(x_test, times)
    close(result.mean, expected.mean, 1e-8)
    assert result.covariance is not None
    assert expected.covariance is not None
    close(result.covariance, expected.covariance, 1e-8)
    assert lanczos.max_learning_rate() == pytest.approx(dense.max_learning_rate(), rel=1e-9)
    # What is reported bounds the error on the training set.
    residual = torch.linalg.vector_norm(y, dim=0).max()
    assert result.error is not None
    for index in range(len(times)):
        error = lanczos.predict(x, times, covariance=False).mean[index] - dense.predict(x, times).mean[index]
        assert torch.linalg.vector_norm(error) / residual <= result.error[index]
    assert result.error.max() <= 1e-10


@pytest.mark.parametrize("t", [3.0, 1e3, 1e7])
def test_the_error_of_lanczos_is_bounded(t: float) -> None:
    generator = torch.Generator().manual_seed(3)
    vectors = torch.linalg.qr(torch.randn(150, 150, generator=generator, dtype=torch.float64)).Q
    gram = (vectors * torch.logspace(2, -8, 150, dtype=torch.float64)) @ vectors.T
    columns, times = torch.randn(1, 150, generator=generator, dtype=torch.float64), torch.tensor([t]).double()
    exact = SpectralMatrix(gram, 0.0).filtered(GradientFilter(1.0), 0.0, times, columns)
    for tolerance in (1e-2, 1e-5, 1e-9):
        matrix = KrylovMatrix(lambda v: v @ gram, columns[0], 0.0, tolerance)
        value, error = matrix.filtered(GradientFilter(1.0), 0.0, times, columns)
        true = torch.linalg.vector_norm((value - exact.value) @ gram) / torch.linalg.vector_norm(columns)
        assert error is not None
        assert true <= error.max()
        # The rest is rounding, of a matrix of norm 100 whose inverse is of the size of t.
        assert error.max() <= tolerance + 1e-13 * (1 + t)


def test_lanczos_takes_products_with_a_lazy_kernel_only(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, x_test = data(60)
    kernel = gpntk.NTKKernel(mlp(2, 30, 1))
    expected = gpntk.GradientFlow(kernel, x, y, noise=0.01).predict(x_test, [1.0, 50.0]).mean

    def refuse(*_args: Any, **_kwargs: Any) -> Tensor:
        raise AssertionError("a Gram matrix was formed")

    monkeypatch.setattr(gpntk.operators.FeatureGramLinearOperator, "to_dense", refuse)
    monkeypatch.setattr(gpntk.operators.FeatureGramLinearOperator, "_by_gram", lambda *_args: False)
    flow = gpntk.GradientFlow(kernel, x, y, noise=0.01, method="lanczos")
    close(flow.predict(x_test, [1.0, 50.0]).mean, expected, 1e-9)


def test_many_rows_are_left_to_lanczos(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, x_test = data(30)
    few = gpntk.GradientFlow(rbf(0.3), x, y, noise=0.01).predict(x_test, 50.0)
    monkeypatch.setattr("gpntk.dynamics.training_kernel._DENSE_ROWS", 29)
    many = gpntk.GradientFlow(rbf(0.3), x, y, noise=0.01).predict(x_test, 50.0)
    assert few.error is None
    assert many.error is not None
    close(many.mean, few.mean, 1e-9)


def test_a_krylov_space_serves_later_times() -> None:
    x, y, x_test = data(100)
    flow = gpntk.GradientFlow(rbf(0.3), x, y, method="lanczos", noise=0.01)
    matrix: Any = flow._ntk.matrix
    flow.predict(x_test, 1000.0)
    (space,) = matrix._first[1]
    size = space.size
    flow.predict(x_test, [1.0, 10.0])
    assert matrix._first[1] == [space]
    assert space.size == size


def test_lanczos_takes_as_many_columns_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, x_test = data(50, 2, tests=5)
    make = {method: gpntk.GradientFlow(rbf(0.2), x, y, nngp=rbf(0.4), method=method) for method in ("dense", "lanczos")}
    monkeypatch.setattr("gpntk.dynamics.matrix_functions._BYTES", 2 * 50 * 50 * 8)
    expected, result = (make[method].predict(x_test, [5.0, 100.0]) for method in ("dense", "lanczos"))
    assert expected.covariance is not None
    assert result.covariance is not None
    close(result.mean, expected.mean, 1e-9)
    close(result.covariance, expected.covariance, 1e-9)


def test_lanczos_that_does_not_converge_says_so() -> None:
    x, y, x_test = data(100)
    flow = gpntk.GradientFlow(rbf(0.1), x, y, method="lanczos", max_iterations=5)
    with pytest.raises(SolveError, match="max_iterations"):
        flow.predict(x_test, 1e6)
    zero = gpntk.GradientFlow(rbf(0.1), x, torch.zeros_like(y), method="lanczos", max_iterations=5)
    assert (zero.predict(x_test, [1.0, INF]).mean == 0).all()


# --- cross-entropy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dense", "lanczos"])
@pytest.mark.parametrize("full", [True, False])
def test_the_cross_entropy_flow_is_the_flow_of_the_weights(method: Any, full: bool) -> None:
    x, _, x_test = data(8)
    network = mlp(2, 6, 3)
    frozen = gpntk.freeze(network)
    kernel = gpntk.NTKKernel(frozen) if full else rbf(0.3)
    classes = torch.arange(8) % 3
    flow = gpntk.GradientFlow(
        kernel, x, classes, None, 0.3, loss="cross_entropy", initial=frozen, noise=0.02, method=method
    )
    root = (
        kernel.features(x).to_dense()
        if full
        else torch.linalg.cholesky(torch.kron(kernel(x).to_dense().detach(), torch.eye(3).double()))
    )
    one_hot = nn.functional.one_hot(classes, 3).double().flatten()

    def derivative(_time: float, weights: np.ndarray) -> np.ndarray:
        f = frozen(x) + (root @ torch.from_numpy(weights)).view(8, 3)
        return 0.3 * (root.T @ (one_hot - f.softmax(-1).flatten()) - 0.02 * torch.from_numpy(weights)).numpy()

    times = [0.0, 2.0, 50.0]
    solution: Any = solve_ivp(
        derivative, (0, 50), np.zeros(root.shape[1]), "LSODA", t_eval=times, rtol=1e-11, atol=1e-12
    )
    result = flow.predict(x, times).mean
    close(result, frozen(x) + (torch.from_numpy(solution.y.T) @ root.T).view(3, 8, 3), 1e-6)
    close(flow.predict(x_test, 0.0).mean, frozen(x_test))
    if full:
        close(flow.weights(times)[1:], solution.y.T[1:], 1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_cross_entropy_steps_are_those_of_an_optimizer(momentum: float) -> None:
    x, _, x_test = data(8)
    network = mlp(2, 6, 1)
    kernel, y = gpntk.NTKKernel(network), (torch.arange(8) % 2).double()
    common: dict[str, Any] = {"loss": "cross_entropy", "initial": gpntk.NetworkMean(network), "normalize": True}
    flow = gpntk.GradientFlow(kernel, x, y, None, 0.4, momentum=momentum, discrete=True, **common)
    jacobian = kernel.features(x).to_dense()
    weights = torch.zeros(jacobian.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weights], lr=0.4, momentum=momentum)
    for _ in range(30):
        optimizer.zero_grad()
        logits = network(x).detach().squeeze(-1) + jacobian @ weights
        nn.functional.binary_cross_entropy_with_logits(logits, y).backward()
        optimizer.step()
    expected = network(x_test).detach().squeeze(-1) + kernel.features(x_test).to_dense() @ weights
    result = flow.predict(x_test, [0, 30, 7, 30])
    assert result.covariance is None
    close(result.mean[1], expected)
    close(result.mean[3], expected)
    # Small steps are the flow.
    slow = gpntk.GradientFlow(kernel, x, y, None, 0.01, discrete=True, **common).predict(x_test, 300).mean
    close(gpntk.GradientFlow(kernel, x, y, None, 0.01, **common).predict(x_test, 300.0).mean, slow, 1e-2)


def test_descent_on_the_cross_entropy_converges_below_the_largest_rate() -> None:
    x, _, _ = data(8)
    classes = torch.arange(8) % 3
    common: dict[str, Any] = {"loss": "cross_entropy", "discrete": True, "noise": 0.1}
    largest = gpntk.GradientFlow(rbf(0.5), x, classes, **common).max_learning_rate()
    flow = gpntk.GradientFlow(rbf(0.5), x, classes, None, 0.99 * largest, **common)
    c = flow.coefficients([500, 501])
    close(c[0], c[1], 1e-8)
    f = flow.predict(x, 501).mean
    # Where the gradient vanishes, Y - softmax(f) = s c.
    close(0.1 * c[1], nn.functional.one_hot(classes, 3) - f.softmax(-1), 1e-8)


# --- numerics, derivatives, errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_float32_agrees_with_float64(method: Any) -> None:
    x, y, x_test = data(30)
    network = mlp(2, 20, 1)
    exact = gpntk.GradientFlow(gpntk.NTKKernel(network), x, y, nngp=rbf(0.3), noise=0.05)
    single = gpntk.GradientFlow(
        gpntk.NTKKernel(network.float()), x.float(), y.float(), nngp=rbf(0.3).float(), noise=0.05, method=method
    )
    first, second = exact.predict(x_test, [1.0, 20.0, INF]), single.predict(x_test.float(), [1.0, 20.0, INF])
    assert second.mean.dtype == torch.float32
    assert first.covariance is not None
    assert second.covariance is not None
    close(second.mean.double(), first.mean, 1e-3)
    close(second.covariance.double(), first.covariance, 1e-3)
    assert single.weights(1.0).dtype == torch.float32


@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_means_are_differentiable_in_the_test_inputs(method: Any) -> None:
    x, y, x_test = data(6, tests=2)
    network = mlp(2, 5, 1)
    flow = gpntk.GradientFlow(
        gpntk.NTKKernel(network), x, y, noise=0.1, initial=gpntk.NetworkMean(network), method=method
    )
    x_test.requires_grad_()
    assert torch.autograd.gradcheck(lambda inputs: flow.predict(inputs, [1.0, 9.0]).mean, (x_test,))


def test_dense_covariances_are_differentiable_and_others_have_no_derivative() -> None:
    x, y, x_test = data(6, tests=2)
    x_test.requires_grad_()
    flow = gpntk.GradientFlow(rbf(0.3), x, y, nngp=rbf(0.5))
    assert torch.autograd.gradcheck(lambda inputs: flow.predict(inputs, 2.0).covariance, (x_test,))
    lazy = gpntk.GradientFlow(rbf(0.3), x, y, nngp=rbf(0.5), noise=0.1, method="lanczos").predict(x_test, 2.0)
    assert lazy.covariance is not None
    assert lazy.mean.requires_grad
    assert not lazy.covariance.requires_grad


def test_both_kernels_of_a_wide_network_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, x_test = data()
    network = mlp(2, 3, 1)
    ntk, nngp = (kind(network, 1.3, 0.2).double() for kind in (gpntk.InfiniteNTKKernel, gpntk.InfiniteNNGPKernel))
    two = gpntk.GradientFlow(ntk, x, y, nngp=nngp, noise=0.01, diag_reg=0.02)
    runs: list[tuple[int, int]] = []
    compute = gpntk.infinite.InfiniteKernels.matrices

    def counting(self: gpntk.infinite.InfiniteKernels, x1: Tensor, x2: Tensor, *arguments: Any) -> list[Tensor]:
        runs.append((len(x1), len(x2)))
        return compute(self, x1, x2, *arguments)

    for given in (gpntk.infinite.kernels(network, 1.3, 0.2), ntk.both):
        one = gpntk.GradientFlow(given, x, y, noise=0.01, diag_reg=0.02)
        for result, expected in (
            (one.predict(x_test, TIMES), two.predict(x_test, TIMES)),
            (one.predict(x_test, trained="readout"), two.predict(x_test, trained="readout")),
            (one.posterior(x_test), two.posterior(x_test)),
        ):
            close(result.mean, expected.mean, 1e-9)
            assert result.covariance is not None
            assert expected.covariance is not None
            close(result.covariance, expected.covariance, 1e-9)
        monkeypatch.setattr(gpntk.infinite.InfiniteKernels, "matrices", counting)
        gpntk.GradientFlow(given, x, y, noise=0.01).predict(x_test, 3.0)
        monkeypatch.undo()
    # Each of the three matrices that mean and covariance need is computed once.
    assert sorted(runs) == sorted(2 * [(10, 10), (4, 10), (4, 4)])
    with pytest.raises(InputError, match="weights are those of a finite network: ntk is an infinitely wide"):
        one.weights()


def test_kernels_are_copied_and_left_alone() -> None:
    x, y, x_test = data()
    kernel = rbf(0.3)
    flow = gpntk.GradientFlow(kernel, x, y)
    before = flow.predict(x_test, 1.0).mean
    assert kernel.raw_lengthscale.requires_grad
    assert not before.requires_grad
    kernel.lengthscale = 0.01
    close(flow.predict(x_test, 1.0).mean, before)


X, Y = torch.rand(6, 2).double(), torch.rand(6).double()
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "y too short": ({"y": Y[:5]}, r"y must be \[6\] or \[6, C\] as x has 6 rows, got \(5,\)"),
    "y of integers": ({"y": torch.arange(6)}, "y must be floating point"),
    "y missing": ({"y": Y * torch.nan}, "must be finite"),
    "x a vector": ({"x": X[:, 0]}, r"x must be \[..., N, D\]"),
    "rate": ({"learning_rate": 0.0}, "learning_rate=0.0: give a positive number"),
    "noise": ({"noise": -1.0}, "noise=-1.0: give a number that is at least zero"),
    "tolerance": ({"tolerance": -1.0}, "tolerance=-1.0: give a positive number below 1"),
    "tolerance NaN": ({"tolerance": math.nan}, "tolerance=nan: give a positive number below 1"),
    "iterations": ({"max_iterations": 0}, "max_iterations=0: give a whole number, at least 1"),
    "no kernel": ({"ntk": torch.eye(6)}, "ntk is a Tensor: give a GPyTorch kernel, or gpntk.infinite.kernels"),
    "x of NumPy": ({"x": X.numpy()}, "x is a ndarray: pass a tensor"),
    "nngp twice": ({"ntk": gpntk.infinite.kernels(mlp(2, 3, 1)), "nngp": rbf(1.0)}, "ntk has both kernels"),
    "loss": ({"loss": "hinge"}, "choose one of 'mse', 'cross_entropy'"),
    "method": ({"method": "fast"}, "choose one of 'auto', 'dense', 'lanczos'"),
    "momentum": ({"momentum": 1.0, "discrete": True}, "momentum=1.0: give a number that is at least zero and below 1"),
    "flow with momentum": ({"momentum": 0.5}, "pass discrete=True"),
    "batch": ({"ntk": RBFKernel(batch_shape=torch.Size([2]))}, "batch shape"),
    "too many rows": (
        {"ntk": KroneckerKernel(rbf(1.0), torch.eye(3).double())}, r"ntk has 3 rows per input and y 1 output"
    ),
    "kernels of two kinds": ({"nngp": KroneckerKernel(rbf(1.0), torch.eye(3).double())}, "nngp has 18 rows and ntk 6"),
    "initial": ({"initial": lambda x: x}, r"initial\(x\) has shape \(6, 2\) and y \(6,\)"),
    "initial's rows": ({"initial": lambda x: x[:3]}, r"initial\(x\) must be a tensor \[6\] or \[6, C\]"),
    "Gaussian cross-entropy": ({"loss": "cross_entropy", "nngp": rbf(1.0)}, "not Gaussian"),
    "probabilities": ({"loss": "cross_entropy", "y": torch.ones(6, 2)}, "sum to one"),
    "classes": ({"loss": "cross_entropy", "y": torch.arange(6) - 1}, "y has classes below zero"),
    "classes beyond": (
        {"loss": "cross_entropy", "y": torch.arange(6), "initial": lambda x: x}, r"class 5 and initial\(x\) only 2"
    ),
    "classes of a single logit": (
        {"loss": "cross_entropy", "y": torch.arange(6) % 2, "initial": lambda x: x[:, 0]}, r"logit give y.double\(\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_the_arguments(name: str) -> None:
    changes, message = MISTAKES[name]
    with pytest.raises(InputError, match=message):
        gpntk.GradientFlow(**{"ntk": rbf(1.0), "x": X, "y": Y, **changes})


def test_mistakes_in_what_is_asked_for() -> None:
    flow = gpntk.GradientFlow(rbf(1.0), X, Y)
    for t, message in ((-1.0, "negative"), (torch.nan, "NaN"), ([], "sequence"), ([[1.0]], "sequence")):
        with pytest.raises(InputError, match=message):
            flow.predict(X, t)
    with pytest.raises(InputError, match=r"what it goes with is \[N, 2\]"):
        flow.predict(X[:, :1])
    with pytest.raises(InputError, match=r"float32 on cpu, the training inputs are torch\.float64"):
        flow.predict(X.float())
    with pytest.raises(InputError, match="give nngp"):
        flow.predict(X, trained="readout")
    with pytest.raises(InputError, match="give nngp"):
        flow.posterior(X)
    with pytest.raises(InputError, match="give an NTKKernel"):
        flow.weights(1.0)
    bad: Any = "head"
    with pytest.raises(InputError, match="choose one of 'all', 'readout'"):
        flow.predict(X, trained=bad)
    with pytest.raises(InputError, match="choose one of 'nngp', 'ntk'"):
        flow.posterior(X, bad)
    with pytest.raises(InputError, match="whole numbers"):
        gpntk.GradientFlow(rbf(1.0), X, Y, discrete=True).predict(X, 1.5)
    classifier = gpntk.GradientFlow(rbf(1.0), X, torch.arange(6) % 2, loss="cross_entropy")
    with pytest.raises(InputError, match="finite t"):
        classifier.predict(X)
    with pytest.raises(InputError, match="mse"):
        classifier.posterior(X, "ntk")
