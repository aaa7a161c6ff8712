"""Arguments of a wrong type or value are refused by name: public callables times values that mean nothing to them."""

import math
import re
from collections.abc import Callable
from typing import Any

import gpytorch
import numpy as np
import pytest
import torch
from torch import nn

import gpntk
from gpntk.errors import GpntkError
from gpntk.inference import (
    AutoSolver,
    ConjugateGradients,
    DenseCovariance,
    FeatureCovariance,
    Features,
    FunctionSpace,
    Nystrom,
    Posterior,
    SampledGram,
    StreamedFeatures,
    WhitenedSystem,
    log_evidence,
    targets,
)
from gpntk.inference.hyperposterior import Hyperparameter, infer
from gpntk.inference.maximum import maximize
from gpntk.infinite import LocallyConnected, PiecewiseLinear, Quadrature, TiedAttention, activation_of, monte_carlo
from gpntk.infinite.phases import phase
from gpntk.jacobians import AverageBackend, ExplicitBackend, SketchBackend, StackedBackend
from gpntk.kernels import log_scale_constraint
from gpntk.likelihoods import Categorical, Gaussian, dirichlet_targets, probabilities
from gpntk.models import LaplacePosterior, TangentGP, VariationalGP, greedy_inducing_points

NETWORK = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)).double()
NAN = math.nan
X = torch.rand(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y, CLASSES = X.sum(-1), torch.arange(6) % 3
FROZEN = gpntk.freeze(NETWORK)
BACKEND = gpntk.AutoBackend(FROZEN)
ONE = torch.ones(1, dtype=torch.float64)
COVARIANCE = FeatureCovariance(Features(BACKEND, X), ONE)
POSTERIOR = Posterior(WhitenedSystem(COVARIANCE, ONE), Y)
RBF = gpytorch.kernels.RBFKernel().double()
COUNTS = ["a", -1, 0, 2.5, NAN, None, True]
SEEDS = ["a", -1, 2.5, NAN, None, True]
POSITIVE = ["a", -1, 0, NAN, None, True, 1j]
FLAGS = [3, "no", None, NAN]
NOT_NEGATIVE = ["a", -1, NAN, None, True, 1j, math.inf]
CHOICES = ["foo", 3, None, True, []]
ACTIVE = ["a", [5], [1.5, 0], [NAN], [-1, 0], [True, False], [0, 0], [[0, 1]], [None], torch.tensor([0.0, 1.0])]
VARIANCES: list[Any] = [3, None, "a", [1.0], -ONE, ONE * NAN, ONE.expand(3), ONE.to("meta"), ONE + 0j, torch.ones(0)]
BUDGETS = ["a", 0, -1, NAN, True, math.inf]
SHAPES: list[Any] = ["a", -1, 2.5, (2, "a"), (0,), (2.0,), (True,), NAN, [[2]], {2: 3}]
STDS: list[Any] = [
    *("a", -1, NAN, None, True, 1j, math.inf, [1.0, 2.0], {}, {"0": "a", "2": 1.0}, {"0": -1.0, "2": 1.0}, {"0": 1.0}),
    *(torch.tensor([1.0, 2.0, 3.0]), torch.tensor(1), torch.tensor(1j), torch.tensor(NAN), ...),
]
INFINITE = {
    "network": [3, None, "a", nn.Linear],
    "weight_std": [*STDS, 0],
    "bias_std": STDS,
    "parametrization": [3, None, "foo"],
    "input_shape": SHAPES,
    "extract": [3, "foo", True, []],
    "memory_budget": BUDGETS,
    "active_dims": ACTIVE,
}
FINITE = {
    "network": [3, None, "a", nn.Linear],
    "input_shape": SHAPES,
    "output": ["foo", None, True, 1.0],
    "memory_budget": BUDGETS,
    "active_dims": ACTIVE,
    "extract": [3, True, []],
    "solver": [3, "a", FunctionSpace],
}


def called(kernel: Any) -> Callable[..., Any]:
    """The kernel, and a matrix: columns can only be counted with inputs."""

    def call(**options: Any) -> Any:
        made = kernel(**options)
        made.double()(X).to_dense()
        return made

    return call


TABLE: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, list[Any]]]] = {
    "InfiniteNTKKernel": (called(gpntk.InfiniteNTKKernel), {"network": NETWORK}, {**INFINITE, "learn": FLAGS}),
    "InfiniteNNGPKernel": (called(gpntk.InfiniteNNGPKernel), {"network": NETWORK}, {**INFINITE, "learn": FLAGS}),
    "infinite.kernels": (
        gpntk.infinite.kernels,
        {"network": NETWORK},
        {name: values for name, values in INFINITE.items() if name != "active_dims"},
    ),
    "NTKKernel": (called(gpntk.NTKKernel), {"network": NETWORK}, {**FINITE, "layer_variances": FLAGS}),
    "NNGPKernel": (called(gpntk.NNGPKernel), {"network": NETWORK}, FINITE),
    "SketchedNTKKernel": (
        called(gpntk.SketchedNTKKernel),
        {"network": NETWORK},
        {**FINITE, "num_features": COUNTS, "seed": SEEDS},
    ),
    "AutoSolver": (AutoSolver, {}, {"columns": COUNTS}),
    "ConjugateGradients": (
        ConjugateGradients,
        {},
        {
            **{name: [*POSITIVE, 1.0, math.inf] for name in ("tolerance", "variance_tolerance")},
            **{name: COUNTS for name in ("max_iterations", "probes", "checkpoint_iterations")},
            "seed": SEEDS,
        },
    ),
    "Nystrom": (Nystrom, {}, {"max_rank": COUNTS, "error": [-1, "a", NAN], "space": ["foo", 3], "seed": SEEDS}),
    "SampledGram": (SampledGram, {}, {"oversampling": POSITIVE, "per_layer": [*FLAGS, 1], "seed": SEEDS}),
    "AutoBackend": (gpntk.AutoBackend, {"network": FROZEN}, {"network": [3, None, NETWORK], "precision": CHOICES}),
    "StructuredBackend": (gpntk.StructuredBackend, {"network": FROZEN}, {"network": [3], "precision": CHOICES}),
    "DenseBackend": (gpntk.DenseBackend, {"network": FROZEN}, {"network": [3, NETWORK], "memory_budget": BUDGETS}),
    "SketchBackend": (SketchBackend, {"network": FROZEN}, {"num_features": COUNTS, "seed": SEEDS}),
    "AverageBackend": (
        AverageBackend,
        {"network": FROZEN, "factory": gpntk.AutoBackend},
        {"network": [3, NETWORK], "factory": [3, None]},
    ),
    "ExplicitBackend": (
        ExplicitBackend,
        {"feature_map": torch.sin, "num_features": 2},
        {
            "feature_map": [3, None],
            "num_features": COUNTS,
            "num_outputs": COUNTS,
            "dtype": ["a", 3, None, torch.int64, torch.complex64],
            "device": ["foo", 3.5, None],
        },
    ),
    "StackedBackend": (
        StackedBackend,
        {"backends": [BACKEND]},
        {"backends": [3, None, [], [3], BACKEND], "weights": ["a", 3, [NAN], [-1.0], [1j], [1.0, 1.0]]},
    ),
    "Features": (Features, {"backend": BACKEND, "x": X}, {"backend": [3, None, NETWORK, FROZEN]}),
    "StreamedFeatures": (
        StreamedFeatures,
        {"backend": BACKEND, "source": X.numpy()},
        {
            "backend": [3, None],
            "source": [3, None, {}, iter(X)],
            "chunk_rows": ["a", -1, 0, 2.5, NAN, True],
            "dtype": ["a", 3, torch.int64],
            "device": ["foo", 3.5],
            "progress": FLAGS,
        },
    ),
    "targets": (targets, {"source": torch.utils.data.TensorDataset(X, Y)}, {"source": [3, X], "outputs": COUNTS}),
    "FeatureCovariance": (
        FeatureCovariance,
        {"features": COVARIANCE.features, "variances": ONE},
        {"features": [3, None, BACKEND, X], "variances": VARIANCES},
    ),
    "DenseCovariance": (
        DenseCovariance,
        {"kernel": RBF, "x": X},
        {"kernel": [3, None], "num_outputs": COUNTS, "gram": [3, X], "memory_budget": BUDGETS},
    ),
    "WhitenedSystem": (
        WhitenedSystem,
        {"covariance": COVARIANCE, "noise": ONE},
        {"covariance": [3, None, X], "noise": [*VARIANCES, 0 * ONE]},
    ),
    "Posterior": (
        Posterior,
        {"system": POSTERIOR.system, "y": Y},
        {"system": [3, COVARIANCE], "solver": [3, FunctionSpace]},
    ),
    "Posterior.sample": (POSTERIOR.sample, {"x": X, "count": 2}, {"count": COUNTS}),
    "Posterior.covariance": (POSTERIOR.covariance, {"x": X}, {"rank": ["a", -1, 0, 2.5, NAN, True]}),
    "log_evidence": (
        log_evidence,
        {"covariance": COVARIANCE, "noise": ONE, "y": Y},
        {"covariance": [3, None, X.long()], "noise": VARIANCES, "solver": [3, FunctionSpace]},
    ),
    "GradientFlow": (
        gpntk.GradientFlow,
        {"ntk": RBF, "x": X, "y": Y},
        {
            "ntk": [3, None, NETWORK],
            "nngp": [3, "a", NETWORK],
            "learning_rate": [*POSITIVE, math.inf],
            "noise": NOT_NEGATIVE,
            "diag_reg": NOT_NEGATIVE,
            "momentum": [*NOT_NEGATIVE, 1.0, 0.5],
            "tolerance": [*POSITIVE, 1.0],
            "max_iterations": COUNTS,
            "normalize": FLAGS,
            "discrete": FLAGS,
            "method": CHOICES,
            "loss": CHOICES,
            "initial": [3, "a"],
        },
    ),
    "GradientFlow.predict": (
        gpntk.GradientFlow(RBF, X, Y).predict,
        {"x": X},
        {"t": ["a", -1, NAN, None, 1j, [], [1, "a"], [[1.0]]], "trained": CHOICES, "covariance": FLAGS},
    ),
    "Hyperparameter": (
        Hyperparameter,
        {"name": "a", "median": 1.0, "spread": 1.0},
        {"median": POSITIVE, "spread": POSITIVE, "bounds": [3, (1.0,), (2.0, 1.0), (NAN, 1.0), (-1, 1)]},
    ),
    "infer": (
        infer,
        {"log_likelihood": lambda z: -(z**2).sum(), "hyperparameters": [Hyperparameter("a", 1, 1)], "average": False},
        {
            "log_likelihood": [3, None],
            "hyperparameters": [3, None, [3]],
            "average": FLAGS,
            "curvature": FLAGS,
            "start": [3, torch.zeros(2)],
            "tolerance": ["a", -1, 0, NAN, True],
            "checkpoint": [3, "a"],
        },
    ),
    "maximize": (
        maximize,
        {"evaluate": lambda p: (-float(p @ p), -2 * p), "starts": [np.ones(2)]},
        {
            "evaluate": [3, None],
            "starts": [3, None, [], ["a"]],
            "bounds": [np.ones((3, 2)), np.full((2, 2), NAN)],
            "max_steps": ["a", -1, 2.5, NAN, None, True],
        },
    ),
    "Gaussian": (Gaussian, {}, {"noise": [*POSITIVE, math.inf]}),
    "Categorical": (Categorical, {}, {"link": CHOICES}),
    "dirichlet_targets": (
        dirichlet_targets,
        {"labels": CLASSES},
        {
            "labels": [3, None, "a", CLASSES.tolist(), CLASSES.to("meta"), CLASSES.to_sparse(), CLASSES - 1, X],
            "num_classes": ["a", -1, 0, 2.5, NAN, True, 2],
            "alpha_epsilon": [*POSITIVE, math.inf],
            "dtype": ["a", 3, torch.int64],
        },
    ),
    "probabilities": (
        probabilities,
        {"mean": torch.zeros(4, 3), "covariance": torch.eye(3).expand(4, 3, 3)},
        {
            "mean": [3, None, torch.zeros(4), torch.zeros(4, 3) * NAN],
            "covariance": [3, None, torch.eye(3), torch.eye(3).expand(4, 3, 3) + 0j],
            "link": CHOICES,
            "num_samples": [*COUNTS, 1, 3],
            "seed": SEEDS,
        },
    ),
    "LaplacePosterior": (
        LaplacePosterior,
        {"covariance": COVARIANCE, "labels": CLASSES.clamp_max(1)},
        {
            "covariance": [3, None, X],
            "labels": [3, None, CLASSES, CLASSES[:3], CLASSES.tolist(), CLASSES.to_sparse()],
            "prior_mean": [3, torch.zeros(6), torch.zeros(6, 1) * NAN],
            "likelihood": [3, Categorical],
            "solver": [3, FunctionSpace],
            "start": [3, torch.zeros(5, 1)],
        },
    ),
    "TangentGP": (
        TangentGP,
        {"x": X, "y": Y, "kernel": gpntk.NTKKernel(NETWORK)},
        {"y": [3, Y[:5], Y[None], Y.long()], "kernel": [3, None], "constant_mean": FLAGS},
    ),
    "VariationalGP": (
        VariationalGP,
        {"inducing_points": X, "kernel": RBF, "mean": gpytorch.means.ZeroMean(), "num_outputs": 1},
        {"kernel": [3, None], "mean": [3, None], "num_outputs": COUNTS},
    ),
    "VariationalGP.fit": (
        VariationalGP(X, RBF, gpytorch.means.ZeroMean(), 3).fit,
        {"x": X, "labels": CLASSES, "epochs": 1},
        {
            "labels": [3, Y, CLASSES[:3], CLASSES + 1],
            **{name: COUNTS for name in ("epochs", "batch_size", "num_samples")},
            "lr": POSITIVE,
            "natural_lr": [*POSITIVE, 2.0],
            "seed": SEEDS,
        },
    ),
    "greedy_inducing_points": (
        greedy_inducing_points,
        {"x": X, "kernel": RBF, "count": 3},
        {"kernel": [3, None], "count": COUNTS, "seed": SEEDS},
    ),
    "freeze": (
        gpntk.freeze,
        {"network": NETWORK},
        {
            "network": [3, None, "a", nn.Linear],
            "parameters": [3, "foo.*", [], [3]],
            "input_shape": SHAPES,
            "extract": [3, True, []],
        },
    ),
    "NetworkMean": (gpntk.NetworkMean, {"network": NETWORK}, {"network": [3, None, nn.Linear], "input_shape": SHAPES}),
    "monte_carlo": (
        monte_carlo,
        {"network_factory": lambda: nn.Linear(2, 2).double(), "x1": X, "num_samples": 2},
        {"network_factory": [3, None, lambda: 3], "num_samples": [*COUNTS, 1]},
    ),
    "phase": (
        phase,
        {"activation": activation_of(nn.Tanh()), "weight_variance": 1.0, "bias_variance": 0.1},
        {"activation": [3, None, nn.Tanh()], "weight_variance": [*POSITIVE, math.inf], "bias_variance": NOT_NEGATIVE},
    ),
    "Quadrature": (
        Quadrature,
        {"phi": torch.tanh},
        {"phi": [3, None], "kinks": [3, ("a",), (NAN,)], "scale": POSITIVE, "tolerance": POSITIVE},
    ),
    "PiecewiseLinear": (
        PiecewiseLinear,
        {"knots": (0.0,), "slopes": (0.0, 1.0)},
        {"knots": [3, "a", (NAN,), (1.0, 0.0)], "slopes": [3, (NAN, 1.0), ("a", 1.0)], "start": ["a", NAN, None]},
    ),
    "LocallyConnected": (
        LocallyConnected,
        {"in_channels": 1, "out_channels": 2, "input_size": (5,), "kernel_size": 3},
        {
            **{name: COUNTS for name in ("in_channels", "out_channels", "kernel_size", "stride")},
            "input_size": [3, "a", (0,), (2.5,), ()],
            "padding": ["a", -1, 2.5, None],
            "bias": FLAGS,
        },
    ),
    "TiedAttention": (TiedAttention, {}, {"mechanism": CHOICES}),
    "log_scale_constraint": (log_scale_constraint, {}, {"lower_bound": NOT_NEGATIVE}),
}


def said(value: Any) -> str:
    """The value as part of a test's name, without its address: names are the same in every process."""
    if isinstance(value, torch.Tensor):
        return f"tensor{list(value.shape)}{value.dtype}"
    return re.sub(r" at 0x\w+|\s", "", repr(value))


CASES = [
    pytest.param(call, {**given, name: value}, name, id=f"{title}-{name}-{said(value)}")
    for title, (call, given, bad) in TABLE.items()
    for name, values in bad.items()
    for value in values
]


@pytest.mark.parametrize("title", TABLE)
def test_what_is_right_is_taken(title: str) -> None:
    call, given, _ = TABLE[title]
    assert call(**given) is not None


@pytest.mark.parametrize(("call", "arguments", "name"), CASES)
def test_a_wrong_argument_is_refused_by_name(call: Callable[..., Any], arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(GpntkError, match=name):
        call(**arguments)
