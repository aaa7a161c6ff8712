"""The neural tangent kernel of a finite, trained network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from torch import nn

from gpntk._types import Extract, OutputSelection, ParameterSelection, PriorGroups
from gpntk.inference import AbstractSolver
from gpntk.kernels.feature_kernel import AbstractFeatureKernel, BackendFactory


@final
class NTKKernel(AbstractFeatureKernel):
    r"""k(x, x') = J(x) S J(x')ᵀ with J(x) = df(x; w)/dw at the network's present weights.

    The prior covariance of f(x; w + d) - f(x; w) to first order for d ~ N(0, S). Products are lazy; N x N and N x P
    matrices are formed only where that is the cheapest way. Differentiable in x and in the hyperparameters, not in the
    frozen weights. Multiply by a ``ScaleKernel`` for an overall prior variance.

    Args:
        network: The network, or a `gpntk.FrozenNetwork`. Its weights are copied; the module itself is left alone.
        parameters: Which parameters span the tangent space: ``None`` for all, glob(s) over their names,
            ``"readout"``, or a predicate of name and parameter.
        layer_variances: One learnable prior variance per layer, ``layer_variances`` `[..., L, 1]`, all 1 at first.
        prior_groups: One learnable prior variance for each of these groups of parameters, ``{"body": "encoder.*",
            "head": "fc.*"}``: glob(s) over their names; the last group that matches a parameter has it. Their order is
            that of ``layer_variances``.
        output: For C outputs: ``"full"``, the `[N*C, M*C]` kernel of all of them (rows n*C + c, GPyTorch's interleaved
            order); ``"independent"``, one GP per output sharing (1/C) sum_c K_cc; ``"sum"``, the kernel of
            sum_c f_c / sqrt(C); or the number of one output. With C = 1 all coincide.
        input_shape: Shape of one input as the network wants it; x then arrives flat, `[..., N, D]`.
        extract: Turns what the network returns (a dict, say) into the tensor `[N]` or `[N, C]` that is meant.
        memory_budget: Bytes that products may take; None for a quarter of the device's memory.
        backend: Makes the Jacobian backend from the frozen network; default `gpntk.AutoBackend`.
        solver: How an ``ExactGP`` with this kernel solves its systems; default `gpntk.inference.AutoSolver`.
        **kwargs: ``batch_shape``, ``active_dims``: see ``gpytorch.kernels.Kernel``.

    Raises:
        NetworkError: The network cannot be frozen or differentiated as it is.
        SelectionError: ``parameters`` or ``output`` does not fit the network.
        InputError: A keyword is not known, or x is not floating, finite and `[..., N, D]`, is on another device, or
            does not fit the network.

    Example:
        >>> import torch, gpytorch, gpntk
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> kernel = gpytorch.kernels.ScaleKernel(gpntk.NTKKernel(network))
        >>> kernel(torch.randn(5, 2)).shape
        torch.Size([5, 5])

    References:
        Jacot, Gabriel and Hongler (2018), Neural Tangent Kernel, https://arxiv.org/abs/1806.07572, eq. 4.
        Maddox et al. (2021), Fast Adaptation with Linearized Neural Networks, https://arxiv.org/abs/2103.01439.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        parameters: ParameterSelection = None,
        layer_variances: bool = False,
        prior_groups: PriorGroups | None = None,
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
            parameters=parameters,
            layer_variances=layer_variances,
            prior_groups=prior_groups,
            output=output,
            input_shape=input_shape,
            extract=extract,
            memory_budget=memory_budget,
            backend=backend,
            solver=solver,
            **kwargs,
        )
