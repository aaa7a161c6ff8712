"""The conjugate kernel of a finite network: its readout's features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from torch import nn

from gpntk._types import Extract, OutputSelection
from gpntk.inference import AbstractSolver
from gpntk.kernels.feature_kernel import AbstractFeatureKernel, BackendFactory


@final
class NNGPKernel(AbstractFeatureKernel):
    r"""k(x, x') = J(x) J(x')ᵀ over the readout's weights: a(x)·a(x') + 1 for a linear readout with a bias.

    What a Bayesian linear regression on the network's last features believes; the finite-width counterpart of the
    NNGP kernel. Use it when the features are good and the data few; `NTKKernel` when the features must move too.

    Args:
        network: The network, or a `gpntk.FrozenNetwork`; its readout is the last layer with parameters, which must also
            be the last to run.
        output: As in `NTKKernel`.
        input_shape: As in `NTKKernel`.
        extract: As in `NTKKernel`.
        memory_budget: As in `NTKKernel`.
        backend: As in `NTKKernel`.
        solver: How an ``ExactGP`` with this kernel solves its systems; default `gpntk.inference.AutoSolver`.
        **kwargs: ``batch_shape``, ``active_dims``: see ``gpytorch.kernels.Kernel``.

    Raises:
        SelectionError: The last registered layer is not the last one executed; the message names the latter.

    Example:
        >>> import torch, gpntk
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> gpntk.NNGPKernel(network).num_features
        17

    References:
        Lee et al. (2018), Deep Neural Networks as Gaussian Processes, https://arxiv.org/abs/1711.00165.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        output: OutputSelection = "full",
        input_shape: Sequence[int] | None = None,
        extract: Extract | str | None = None,
        memory_budget: int | None = None,
        backend: BackendFactory | None = None,
        solver: AbstractSolver | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            network,
            parameters="readout",
            layer_variances=False,
            output=output,
            input_shape=input_shape,
            extract=extract,
            memory_budget=memory_budget,
            backend=backend,
            solver=solver,
            **kwargs,
        )
