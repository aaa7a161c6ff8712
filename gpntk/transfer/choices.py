"""Whether the choices that a transfer is given exist, and go together."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from gpytorch.kernels import Kernel
from torch import Tensor, nn

from gpntk._checks import check_choice, check_flags, check_input, check_kinds, check_positive, check_values
from gpntk.errors import InputError


def check_choices(
    *,
    likelihood: str,
    kernel: str | Kernel,
    mean: str,
    prior: str,
    stationary: str,
    stationary_inputs: str | None,
    hyperparameters: object,
    new_head: bool,
    layer_variances: bool,
    time_budget: float,
) -> None:
    """Raise `InputError` for a choice that does not exist, or does not go with a new head."""
    check_choice(("gaussian", "categorical", "dirichlet"), likelihood=likelihood)
    check_choice(("rbf", "matern"), stationary=stationary)
    if stationary_inputs is not None:
        check_choice(("inputs", "features"), stationary_inputs=stationary_inputs)
    if not isinstance(hyperparameters, Mapping):
        check_choice(("auto", "average", "maximum"), hyperparameters=hyperparameters)
    if not isinstance(kernel, Kernel):
        check_choice(("auto", "ntk", "nngp", "ntk+stationary", "stationary"), kernel=kernel)
    check_choice(("equal", "g"), prior=prior)
    if isinstance(kernel, Kernel) and prior != "equal":
        raise InputError(
            f"prior={prior!r} is for the kernels that have names: in a kernel of your own, give "
            "gpntk.NTKKernel(network, prior_variance=gpntk.kernels.g_prior(network, x))."
        )
    check_choice(("auto", "network", "constant", "zero"), mean=mean)
    check_flags(new_head=new_head, layer_variances=layer_variances)
    if time_budget != math.inf:
        check_positive(time_budget=time_budget)
    if new_head and mean == "network":
        raise InputError("mean='network' has no meaning for a new head: use mean='constant' or 'zero'.")


def check_data(x: Tensor, y: Tensor, device: torch.device, noise_network: nn.Module | None = None) -> None:
    """Raise `InputError` unless x is `[N, D]` with N > 0 and finite, y is real numbers, and both are on ``device``."""
    check_input(x, device)
    check_values(device, y=y)
    check_kinds(nn.Module | None, "an nn.Module", noise_network=noise_network)
    if x.dim() != 2 or not len(x):
        raise InputError(f"x has shape {tuple(x.shape)}: give [N, D], at least one row.")
