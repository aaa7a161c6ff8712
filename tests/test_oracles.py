"""Agreement with laplace-torch on every regression case: NTK blocks, GLM variances and covariances, evidence."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gpntk
from gpntk.inference import (
    AbstractSolver,
    FeatureCovariance,
    Features,
    FunctionSpace,
    Posterior,
    WeightSpace,
    WhitenedSystem,
    log_evidence,
)
from gpntk.models import TangentGP
from tests.cases import scale_and_noise

DIRECTORY = Path(__file__).parent / "oracles"

NETWORKS = {
    "reg_mlp_3_12_1_map": lambda: nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 1)),
    "reg_mlp_2_16_16_1_relu": lambda: nn.Sequential(
        nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)
    ),
    "reg_mlp_3_10_8_3_multioutput": lambda: nn.Sequential(
        nn.Linear(3, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3)
    ),
    "reg_cnn_c2": lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 2)),
}


class Oracle:
    def __init__(self, name: str) -> None:
        with np.load(DIRECTORY / f"{name}.npz") as stored:
            self.arrays = {key: torch.as_tensor(stored[key]) for key in stored}
        self.module = NETWORKS[name]().double().eval()
        weights = {key.removeprefix("w/"): value for key, value in self.arrays.items() if key.startswith("w/")}
        self.module.load_state_dict(weights, strict=False)
        self.input_shape = tuple(self["x_train"].shape[1:])
        self.kernel = gpntk.NTKKernel(self.module, input_shape=self.input_shape)
        self.x, self.x_test = (self[key].flatten(1) for key in ("x_train", "x_test"))
        self.scale = 1 / self["prior_precision"].item()
        self.noise = self["sigma_noise"].item() ** 2

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.arrays[key]


def assert_agrees(value: torch.Tensor, reference: torch.Tensor, tolerance: float = 1e-10) -> None:
    error = (value - reference).abs().max() / reference.abs().max()
    assert error <= tolerance, f"relative error {error:.3e}"


def blocks(gram: torch.Tensor, outputs: int) -> torch.Tensor:
    return gram.unflatten(0, (-1, outputs)).unflatten(2, (-1, outputs)).permute(0, 2, 1, 3)


@pytest.fixture(params=NETWORKS, scope="module")
def oracle(request: pytest.FixtureRequest) -> Oracle:
    return Oracle(request.param)


def test_every_regression_case_is_covered() -> None:
    assert {path.stem for path in DIRECTORY.glob("reg_*.npz")} == set(NETWORKS)


def test_network(oracle: Oracle) -> None:
    frozen = gpntk.freeze(oracle.module, input_shape=oracle.input_shape)
    assert_agrees(frozen(oracle.x), oracle["f_train"])
    assert_agrees(frozen(oracle.x_test), oracle["f_test"])


@pytest.mark.parametrize("backend", [gpntk.AutoBackend, gpntk.jacobians.DenseBackend, gpntk.jacobians.AutodiffBackend])
def test_ntk_blocks(oracle: Oracle, backend) -> None:
    kernel = gpntk.NTKKernel(oracle.module, input_shape=oracle.input_shape, backend=backend)
    outputs = oracle["f_train"].shape[1]
    # The stored kernels carry no prior variance.
    assert_agrees(blocks(kernel(oracle.x).to_dense(), outputs), oracle["ntk_train"])
    cross = kernel(oracle.x_test, oracle.x).to_dense()
    assert_agrees(blocks(cross, outputs), oracle["ntk_test_train"])


def test_glm_predictive_by_exact_gp(oracle: Oracle) -> None:
    # math: prior w ~ N(0, I/delta), pseudo-targets J w* + y - f; f(x*) + J* (w_post - w*) refines the network's output.
    outputs = oracle["f_train"].shape[1]
    targets = oracle["pseudo_targets"]
    model = TangentGP(oracle.x, targets if outputs > 1 else targets.squeeze(-1), oracle.kernel)
    model.initialize(**scale_and_noise(oracle.scale, oracle.noise))
    with torch.no_grad():
        posterior = model.eval()(oracle.x_test)
    covariance = posterior.covariance_matrix
    assert_agrees(covariance, oracle["glm_joint_cov"])
    rows = torch.arange(len(oracle.x_test))
    assert_agrees(blocks(covariance, outputs)[rows, rows], oracle["glm_var"])
    dual = posterior.mean.reshape(-1, outputs)
    weights = torch.cat([oracle[f"w/{name}"].flatten() for name, _ in oracle.module.named_parameters()])
    moved = (oracle.kernel.features(oracle.x_test) @ weights).view(-1, outputs)
    assert_agrees(dual, oracle["dual_mean"])
    assert_agrees(oracle["f_test"] + dual - moved, oracle["refined_mean"])


def test_evidence_on_the_grid(oracle: Oracle) -> None:
    # The evidence of the dual model: pseudo-targets J w* + y - f, prior N(0, I/delta), noise sigma².
    gram, y = oracle.kernel(oracle.x).to_dense(), oracle["pseudo_targets"].flatten()
    values = [
        [log_evidence(gram / d, s.reshape(1).square(), y) for s in oracle["grid_sigma"]] for d in oracle["grid_delta"]
    ]
    assert_agrees(torch.tensor(values, dtype=torch.float64), oracle["grid_gp_evidence"])
    noise = torch.tensor([oracle.noise], dtype=torch.float64)
    assert log_evidence(oracle.scale * gram, noise, y).item() == pytest.approx(oracle["gp_evidence"].item(), rel=1e-10)


@pytest.mark.parametrize("solver", [FunctionSpace(), WeightSpace()], ids=lambda solver: type(solver).__name__)
def test_evidence_gradient_and_posterior_in_either_space(oracle: Oracle, solver: AbstractSolver) -> None:
    features, y = Features(oracle.kernel.backend, oracle.x), oracle["pseudo_targets"].flatten()
    values = [
        [
            log_evidence(FeatureCovariance(features, 1 / d.reshape(1)), s.reshape(1).square(), y, solver)
            for s in oracle["grid_sigma"]
        ]
        for d in oracle["grid_delta"]
    ]
    assert_agrees(torch.tensor(values, dtype=torch.float64), oracle["grid_gp_evidence"])

    logs = torch.stack([oracle["prior_precision"].log().squeeze(), oracle["sigma_noise"].log().squeeze()])
    logs.requires_grad_()
    value = log_evidence(FeatureCovariance(features, (-logs[:1]).exp()), (2 * logs[1:]).exp(), y, solver)
    value.backward()
    assert_agrees(value, oracle["gp_evidence"])
    assert_agrees(logs.grad, oracle["grad_evidence_logdelta_logsigma"], 1e-8)

    variances, noise = torch.tensor([[oracle.scale], [oracle.noise]], dtype=torch.float64)
    system = WhitenedSystem(FeatureCovariance(features, variances), noise)
    posterior = Posterior(system, y, solver)
    assert_agrees(posterior.mean(oracle.x_test), oracle["dual_mean"].flatten())
    assert_agrees(posterior.covariance(oracle.x_test), oracle["glm_joint_cov"])
