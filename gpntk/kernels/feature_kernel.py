"""A kernel that is an inner product of features: k(x, x') = J(x) S J(x')ᵀ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from gpytorch.constraints import GreaterThan
from linear_operator.operators import LinearOperator
from torch import Tensor, nn

from gpntk._checks import (
    check_columns,
    check_flags,
    check_functions,
    check_input,
    check_keywords,
    check_kinds,
    check_memory_budget,
    check_not_negative,
    check_pair,
)
from gpntk._types import Extract, OutputSelection, ParameterSelection, PriorGroups
from gpntk.errors import InputError, SelectionError
from gpntk.inference import AbstractSolver
from gpntk.jacobians import AbstractJacobianBackend, AutoBackend, AverageBackend, ScaledBackend
from gpntk.kernels.prediction_strategy import AbstractNetworkKernel
from gpntk.network import FrozenNetwork, freeze
from gpntk.network.selection import select_groups
from gpntk.operators import FeatureGramLinearOperator, JacobianLinearOperator

BackendFactory = Callable[..., AbstractJacobianBackend]
"""Makes a backend from the frozen network, and from ``memory_budget=`` where the user gives one."""


def log_scale_constraint(lower_bound: float = 0.0) -> GreaterThan:
    """Greater than a bound through exp: an optimizer's steps are relative, so that no unit matters."""
    check_not_negative(lower_bound=lower_bound)
    # The host's annotations are inferred from its default, softplus.
    return GreaterThan(lower_bound, transform=torch.exp, inv_transform=torch.log)  # pyright: ignore[reportArgumentType]


class AbstractFeatureKernel(AbstractNetworkKernel):
    """k(x, x') = J(x) S J(x')ᵀ for the Jacobian features of a frozen network.

    Subclasses say which parameters; products, Grams, diagonals and gradients are written once, here and in the
    operators. ``parameters()`` holds the kernel's own hyperparameters only: none, or one variance per layer. The frozen
    weights follow ``.to()`` and are shared by deep copies.

    Args:
        network, parameters, ...: See `gpntk.NTKKernel`, which adds nothing.
    """

    has_lengthscale = False
    _note = ""
    """What else its ``repr`` says."""
    raw_layer_variances: nn.Parameter
    raw_layer_variances_constraint: GreaterThan

    def __init__(
        self,
        network: nn.Module,
        *,
        parameters: ParameterSelection = None,
        layer_variances: bool = False,
        prior_groups: PriorGroups | None = None,
        prior_variance: Tensor | None = None,
        output: OutputSelection = "full",
        input_shape: Sequence[int] | None = None,
        extract: Extract | str | None = None,
        memory_budget: int | None = None,
        backend: BackendFactory | None = None,
        solver: AbstractSolver | None = None,
        **kwargs: Any,
    ) -> None:
        check_keywords(type(self), kwargs, ("batch_shape", "active_dims"))
        check_flags(layer_variances=layer_variances)
        check_columns(kwargs.get("active_dims"))
        if solver is not None:
            check_kinds(AbstractSolver, "a solver, WeightSpace() say, or None", solver=solver)
        if backend is not None:
            check_functions(backend=backend)
        super().__init__(**kwargs)
        frozen = freeze(network, parameters, input_shape, extract)
        budget = check_memory_budget(memory_budget)
        factory = AutoBackend if backend is None else backend
        if budget is not None:
            factory = partial(factory, memory_budget=budget)
        if prior_variance is not None:
            factory = partial(_scaled, factory, prior_variance)
        _check_output(output)
        if prior_groups is not None:
            if layer_variances:
                raise InputError("layer_variances=True and prior_groups= both say which variances there are: give one.")
            frozen = frozen.grouped(select_groups(frozen.names, prior_groups))
        self.output, self.solver = output, solver
        if output == "independent":
            self.network = frozen
            self.backend: AbstractJacobianBackend = AverageBackend(frozen, factory, factory(frozen).memory_budget)
        else:
            self.network = frozen if output == "full" else frozen.select_output(output)
            self.backend = factory(self.network)
        if layer_variances or prior_groups is not None:
            shape = (*self.batch_shape, len(frozen.groups), 1)
            zeros = torch.zeros(shape, dtype=frozen.dtype, device=frozen.device)
            self.register_parameter("raw_layer_variances", nn.Parameter(zeros))
            self.register_constraint("raw_layer_variances", log_scale_constraint())
            self.layer_variances = 1.0

    def __call__(self, x1: Tensor, x2: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """k(x1, x2), lazily; x2 is x1 by default. See ``gpytorch.kernels.Kernel``."""
        # The host reads dimensions off x before it asks ``forward``.
        check_pair(x1, x2, self._buffers["active_dims"])
        return super().__call__(x1, x2, *args, **kwargs)

    def features(self, x: Tensor) -> JacobianLinearOperator:
        """J(x), the features of x as a lazy operator `[..., N*C, F]`, before any prior variance."""
        check_input(x, self.network.device)
        return JacobianLinearOperator(x, backend=self.backend)

    def group_grams(self, x1: Tensor, x2: Tensor, grouped: bool) -> Tensor:
        """J_g(x1) J_g(x2)ᵀ for every group of features, the layers or all of them as one, `[..., G, N*C, M*C]`."""
        batch = x1.shape[:-2]
        grams = self.backend.gram(x1.reshape(-1, *x1.shape[-2:]), x2.reshape(-1, *x2.shape[-2:]), grouped)
        return grams.unflatten(0, batch) if batch else grams.squeeze(0)

    def group_diagonals(self, x: Tensor, grouped: bool) -> Tensor:
        """Diagonals of ``group_grams(x, x)`` for x `[N, D]`, without forming these, `[G, N*C]`."""
        return self.backend.diagonal(x.unsqueeze(0), grouped).squeeze(0)

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
        for name, x in (("x1", x1), ("x2", x2)):
            check_input(x, self.network.device, name)
            if x.numel():
                self.backend.num_outputs(x)  # says so here if the network does not run on such rows
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

    # The host reads dtype and device off the hyperparameters; a kernel may have none, and the weights count too.

    @property
    def dtype(self) -> torch.dtype:
        dtypes = {self.network.dtype, *(parameter.dtype for parameter in self.parameters())}
        if len(dtypes) > 1:
            # A RuntimeError, as the host's own.
            raise RuntimeError(f"the kernel's parameters have multiple dtypes, {dtypes}: use .double() or .float().")
        return dtypes.pop()

    @property
    def device(self) -> torch.device:
        return self.network.device

    def __repr__(self) -> str:
        groups = f", variances of {self._group_names}" if "raw_layer_variances" in self._parameters else ""
        batch = f", batch_shape={tuple(self.batch_shape)}" if self.batch_shape else ""
        if isinstance(self.output, int):
            outputs = f"output {self.output}"
        else:
            count = self.network.known_outputs if self.output != "sum" else None
            outputs = f'{count or "all"} output{"s" * (count != 1)} "{self.output}"'
        return f"{type(self).__name__}({self.network.summary}, {outputs}{groups}{batch}{self._note})"

    @property
    def _group_names(self) -> str:
        names = [name for name, _ in self.network.groups]
        return f"{len(names)} groups" if len(names) > 4 else ", ".join(name or "the network" for name in names)

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


def _scaled(factory: BackendFactory, prior_variance: Tensor, network: FrozenNetwork) -> ScaledBackend:
    return ScaledBackend(factory(network), prior_variance)


def _check_output(output: OutputSelection) -> None:
    if isinstance(output, bool) or not (isinstance(output, int) or output in ("full", "independent", "sum")):
        raise SelectionError(f"output={output!r}: choose 'full', 'independent', 'sum' or the number of one output.")
