"""The neural tangent kernel in F random features."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, final

from torch import nn

from gpntk._types import Extract, OutputSelection, ParameterSelection
from gpntk.inference import AbstractSolver
from gpntk.jacobians import SketchBackend
from gpntk.kernels.feature_kernel import AbstractFeatureKernel


@final
class SketchedNTKKernel(AbstractFeatureKernel):
    r"""An unbiased estimate of `NTKKernel`, z(x)·z(x') with F random features z(x) of J(x).

    A kernel in its own right: positive semi-definite, of rank F, differentiable in x. Entries deviate from the NTK's by
    about sqrt(2 k(x, x) k(x', x') / F), or somewhat more where one layer dominates. Use it where neither N x N nor
    P x P matrices fit; `NTKKernel` otherwise, whose products are exact.

    Args:
        network: As in `NTKKernel`.
        num_features: F, the number of random features.
        seed: Fixes the projections; they are the same on every device.
        parameters: As in `NTKKernel`.
        output: As in `NTKKernel`.
        input_shape: As in `NTKKernel`.
        extract: As in `NTKKernel`.
        memory_budget: As in `NTKKernel`.
        solver: As in `NTKKernel`.
        **kwargs: ``batch_shape``, ``active_dims``: see ``gpytorch.kernels.Kernel``.

    Example:
        >>> import torch, gpntk
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> gpntk.SketchedNTKKernel(network, num_features=40).features(torch.randn(5, 2)).shape
        torch.Size([5, 40])

    References:
        Park et al. (2023), TRAK: Attributing Model Behavior at Scale, https://arxiv.org/abs/2303.14186.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        num_features: int = 1024,
        seed: int = 0,
        parameters: ParameterSelection = None,
        output: OutputSelection = "full",
        input_shape: Sequence[int] | None = None,
        extract: Extract | str | None = None,
        memory_budget: int | None = None,
        solver: AbstractSolver | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            network,
            parameters=parameters,
            layer_variances=False,
            output=output,
            input_shape=input_shape,
            extract=extract,
            memory_budget=memory_budget,
            solver=solver,
            backend=partial(SketchBackend, num_features=num_features, seed=seed),
            **kwargs,
        )
        self._note = f", {num_features:,} random features"
