"""Zellner's g-prior of the weights: a prior variance for every parameter from how much the data tell of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gpntk._checks import check_input, check_memory_budget
from gpntk._types import Extract, ParameterSelection
from gpntk.errors import InputError
from gpntk.inference import Features
from gpntk.jacobians import AutoBackend
from gpntk.network import freeze

# Of the curvatures, in units of their mean: what no label tells of has at most so many times the typical variance.
_FLOOR = 1e-3


@torch.no_grad()
def g_prior(
    network: nn.Module,
    x: Tensor,
    root: Tensor | None = None,
    *,
    floor: float = _FLOOR,
    parameters: ParameterSelection = None,
    input_shape: Sequence[int] | None = None,
    extract: Extract | str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Prior variances `[P]` of all parameters, so that the data tell as much of each; for `NTKKernel`.

    S_p = 1 / max(d_p, floor · mean(d)),    d = diag(Σ_n J(x_n)ᵀ Λ_n J(x_n)) / N,

    the inverse diagonal of the Gauss-Newton matrix. Moves of a parameter then change the outputs by one on average,
    whatever units its layer has. A parameter on which no output at x depends (d_p = 0) has the largest variance,
    1 / (floor · mean(d)). Takes one pass over the rows of J.

    Args:
        network: The network, or a `gpntk.FrozenNetwork`.
        x: Inputs of the labels `[N, D]`.
        root: R `[N, C, q]` with R Rᵀ = Λ, the likelihood's curvature in the outputs, as
            ``gpntk.likelihoods.AbstractLikelihood.root`` gives it; default I, as for targets with one noise.
        floor: Of the curvatures, in units of their mean: between 0 and 1.
        parameters: As in `NTKKernel`.
        input_shape: As in `NTKKernel`.
        extract: As in `NTKKernel`.
        memory_budget: Bytes that the pass may take; None for a quarter of the device's memory.

    Raises:
        InputError: ``root`` or ``floor`` does not fit.

    Example:
        >>> import torch, gpntk
        >>> line = torch.nn.Linear(2, 1)
        >>> gpntk.kernels.g_prior(line, torch.tensor([[10.0, 0.1], [10.0, 0.1]]), floor=1e-6)
        tensor([1.0000e-02, 1.0000e+02, 1.0000e+00])

    References:
        Zellner (1986), On Assessing Prior Distributions and Bayesian Regression Analysis with g-Prior Distributions.
        Antorán et al. (2022), Adapting the Linearised Laplace Model Evidence for Modern Deep Learning,
        https://arxiv.org/abs/2206.08900, section 4 (diagonal g-prior).
    """
    frozen = freeze(network, parameters, input_shape, extract)
    check_input(x, frozen.device)
    if not 0 < floor <= 1:
        raise InputError(f"floor={floor!r}: give a share of the mean curvature, more than 0 and at most 1.")
    features = Features(AutoBackend(frozen, check_memory_budget(memory_budget)), x)
    outputs = features.num_outputs
    if root is not None and (root.dim() != 3 or root.shape[:2] != (len(x), outputs)):
        raise InputError(f"root has shape {tuple(root.shape)}: give [N, C, q] with N, C = {(len(x), outputs)}.")
    curvatures = torch.zeros(features.num_features, dtype=x.dtype, device=x.device)
    for rows, block in features.blocks():
        rooted = block
        if root is not None:
            own = root[rows.start // outputs : rows.stop // outputs].to(block)
            rooted = torch.einsum("ncq,ncp->nqp", own, block.unflatten(0, (-1, outputs))).flatten(0, 1)
        curvatures += rooted.square().sum(0)
    curvatures /= len(x)
    return inverted(curvatures, floor)


def inverted(curvatures: Tensor, floor: float = _FLOOR) -> Tensor:
    """1 / max(d, floor · mean(d)) for curvatures d `[P]`; ones if they are all zero."""
    least = floor * curvatures.mean()
    return torch.ones_like(curvatures) if least == 0 else 1 / curvatures.clamp_min(least)
