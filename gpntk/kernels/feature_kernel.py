"""A kernel that is an inner product of features: k(x, x') = J(x) S J(x')ᵀ."""

from __future__ import annotations

import copy
from abc import ABC
from collections.abc import Callable
from typing import Any

import torch
from gpytorch.constraints import GreaterThan
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import Likelihood
from linear_operator.operators import LinearOperator
from torch import Tensor, nn

from gpntk._checks import check_input
from gpntk._types import OutputSelection, ParameterSelection
from gpntk.errors import SelectionError
from gpntk.inference import AbstractSolver
from gpntk.jacobians import AbstractJacobianBackend, AutoBackend, AverageBackend
from gpntk.kernels.prediction_strategy import FeaturePredictionStrategy
from gpntk.network import FrozenNetwork
from gpntk.operators import FeatureGramLinearOperator, JacobianLinearOperator

BackendFactory = Callable[[FrozenNetwork], AbstractJacobianBackend]


def log_scale_constraint(lower_bound: float = 0.0) -> GreaterThan:
    """Greater than a bound through exp: an optimizer's steps are relative, so that no unit matters."""
    # The host's annotations are inferred from its default, softplus.
    return GreaterThan(lower_bound, transform=torch.exp, inv_transform=torch.log)  # pyright: ignore[reportArgumentType]


class AbstractFeatureKernel(Kernel, ABC):
    """k(x, x') = J(x) S J(x')ᵀ for the Jacobian features of a frozen network.

    Subclasses say which parameters; products, Grams, diagonals and gradients are written once, here and in the
    operators. ``parameters()`` holds the kernel's own hyperparameters only: none, or one variance per layer. The frozen
    weights follow ``.to()`` and are shared by deep copies.
    """

    has_lengthscale = False
    raw_layer_variances: nn.Parameter
    raw_layer_variances_constraint: GreaterThan

    def __init__(
        self,
        network: nn.Module,
        *,
        parameters: ParameterSelection,
        layer_variances: bool,
        output: OutputSelection,
        input_shape: tuple[int, ...] | None,
        backend: BackendFactory | None,
        solver: AbstractSolver | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        frozen = _freeze(network, parameters, input_shape)
        factory = backend or AutoBackend
        _check_output(output)
        self.output, self.solver = output, solver
        if output == "independent":
            self.network = frozen
            self.backend: AbstractJacobianBackend = AverageBackend(frozen, factory, factory(frozen).memory_budget)
        else:
            self.network = frozen if output == "full" else frozen.select_output(output)
            self.backend = factory(self.network)
        if layer_variances:
            shape = (*self.batch_shape, len(frozen.layers), 1)
            zeros = torch.zeros(shape, dtype=frozen.dtype, device=frozen.device)
            self.register_parameter("raw_layer_variances", nn.Parameter(zeros))
            self.register_constraint("raw_layer_variances", log_scale_constraint())
            self.layer_variances = 1.0

    def features(self, x: Tensor) -> JacobianLinearOperator:
        """J(x), the features of x as a lazy operator `[..., N*C, F]`, before any prior variance."""
        check_input(x, self.network.device)
        return JacobianLinearOperator(x, backend=self.backend)

    @property
    def num_features(self) -> int:
        """F, the number of features: P, or C*P for ``output="independent"`` (known once the kernel has seen data)."""
        return self.backend.num_features

    @property
    def layer_variances(self) -> Tensor:
        """Prior variance of each group of features `[..., G, 1]`: ones unless ``layer_variances=True``."""
        if "raw_layer_variances" in self._parameters:
            return self.raw_layer_variances_constraint.transform(self.raw_layer_variances)
        return torch.ones(*self.batch_shape, 1, 1, dtype=self.network.dtype, device=self.network.device)

    @layer_variances.setter
    def layer_variances(self, value: Tensor | float) -> None:
        if "raw_layer_variances" not in self._parameters:
            raise SelectionError("layer_variances is fixed at one: construct the kernel with layer_variances=True.")
        raw = self.raw_layer_variances
        value = torch.as_tensor(value, dtype=raw.dtype, device=raw.device).expand_as(raw)
        self.initialize(raw_layer_variances=self.raw_layer_variances_constraint.inverse_transform(value))

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **_params: Any
    ) -> Tensor | LinearOperator:
        """J(x1) S J(x2)ᵀ `[..., N*C, M*C]`, lazily; with ``diag=True`` its diagonal `[..., N*C]`."""
        if last_dim_is_batch:
            raise NotImplementedError("last_dim_is_batch is not defined for a kernel of whole inputs to a network.")
        check_input(x1, self.network.device, "x1")
        check_input(x2, self.network.device, "x2")
        variances = self.layer_variances.to(x1.dtype)
        gram = FeatureGramLinearOperator(x1, x2, variances, backend=self.backend, solver=self.solver)
        return gram._diagonal() if diag else gram

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:  # noqa: ARG002
        """C' rows of the Gram per input: C for ``output="full"``, else 1."""
        # Inside a sum or product of kernels, the host asks with all columns of x.
        active_dims = self._buffers["active_dims"]
        if active_dims is not None and x1.shape[-1] != active_dims.numel():
            x1 = x1.index_select(-1, active_dims)
        return self.backend.num_outputs(x1)

    def prediction_strategy(
        self,
        train_inputs: Any,
        train_prior_dist: MultivariateNormal,
        train_labels: Tensor,
        likelihood: Likelihood,
    ) -> FeaturePredictionStrategy:
        """How an ``ExactGP`` with this kernel predicts."""
        return FeaturePredictionStrategy(train_inputs, train_prior_dist, train_labels, likelihood)

    # The host reads dtype and device off the hyperparameters; a kernel may have none, and the weights count too.

    @property
    def dtype(self) -> torch.dtype:
        dtypes = {self.network.dtype, *(parameter.dtype for parameter in self.parameters())}
        if len(dtypes) > 1:
            raise RuntimeError(f"The kernel's parameters have multiple dtypes: {dtypes}.")
        return dtypes.pop()

    @property
    def device(self) -> torch.device:
        return self.network.device

    def __getitem__(self, index: Any) -> AbstractFeatureKernel:
        """The kernel of one element (or several) of ``batch_shape``; ``active_dims`` are no batch and stay."""
        if not self.batch_shape:
            return self
        active_dims = self._buffers["active_dims"]
        self._buffers["active_dims"] = None
        try:
            selected = super().__getitem__(index)
        finally:
            self._buffers["active_dims"] = active_dims
        assert isinstance(selected, AbstractFeatureKernel)
        selected.batch_shape = torch.empty(self.batch_shape, device="cpu")[index].shape
        selected._buffers["active_dims"] = active_dims
        return selected


def _freeze(network: nn.Module, parameters: ParameterSelection, input_shape: tuple[int, ...] | None) -> FrozenNetwork:
    if not isinstance(network, FrozenNetwork):
        return FrozenNetwork(network, parameters, input_shape)
    if parameters is not None or input_shape is not None:
        raise SelectionError("the network is frozen already: give parameters and input_shape to gpntk.freeze instead.")
    return copy.deepcopy(network)  # shares the weights; moving or casting the kernel leaves the user's object alone


def _check_output(output: OutputSelection) -> None:
    if isinstance(output, bool) or not (isinstance(output, int) or output in ("full", "independent", "sum")):
        raise SelectionError(f"output={output!r}: choose 'full', 'independent', 'sum' or the number of one output.")
