"""Kernels of a finite, trained network: of all its parameters, of its readout's, and in random features."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from gpntk._types import Extract, OutputSelection, ParameterSelection
from gpntk.inference import AbstractSolver
from gpntk.jacobians import SketchBackend
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
        prior_variance: Prior variances S `[P]` of all parameters, in the order of ``kernel.network.names``, which stay
            as they are: `gpntk.kernels.g_prior` makes some. Those of layers or groups are factors beside.
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
        self._size = num_features
        self._note = f", {num_features:,} random features"

    @torch.no_grad()
    def error(self, x: Tensor) -> float:
        """How far the Gram K of x `[N, D]` is from `NTKKernel`'s, an estimate of |K - K_NTK| / |K| (Frobenius).

        From two halves of the random features, which are independent: K = (K₁ + K₂) / 2, whose error has the size of
        (K₁ - K₂) / 2.
        """
        features = self.features(x).to_dense()
        # Independent outputs have F features each.
        halves = features.unflatten(-1, (-1, self._size)).chunk(2, -1)
        one, two = (self._size / half.shape[-1] * torch.einsum("icf,jcf->ij", half, half) for half in halves)
        total = torch.linalg.matrix_norm(one + two)
        return float(torch.linalg.matrix_norm(one - two) / total) if total > 0 else 0.0
