"""From Gaussian latent outputs to probabilities of classes: E[softmax(f)] for f ~ N(m, V).

With C = 1 output, f is the logit of class 1 against class 0, and everything below is that of the logits (0, f).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional
from torch.quasirandom import SobolEngine

from gpntk._checks import check_choice, check_count, check_tensors, check_values
from gpntk.errors import InputError

Link = Literal["probit", "monte_carlo", "laplace_bridge"]

# Numbers drawn at once: 256 MiB in float64.
_CHUNK = 2**25


class Latent(NamedTuple):
    """A Gaussian of C latent outputs at each of M inputs."""

    mean: Tensor
    """`[M, C]`."""
    covariance: Tensor
    """Between the outputs at one input `[M, C, C]`."""


def probabilities(
    mean: Tensor, covariance: Tensor, link: Link = "probit", num_samples: int = 512, seed: int = 0
) -> Tensor:
    """Probabilities of the classes `[M, C]`, or `[M, 2]` if C = 1, for latent outputs f ~ N(mean, covariance).

    - ``"probit"``: softmax(m_c / √(1 + π V_cc / 8)), for C = 1 MacKay's σ(m / √(1 + π V / 8)), good to 0.02 there. No
      cost. With C >= 2 it ignores covariances between outputs, and depends on the common level of the means.
    - ``"monte_carlo"``: the integral itself, over ``num_samples`` quasi-random draws in antithetic pairs; the same
      draws for every input. The reference for the others; with C = 1, off by at most 2 / ``num_samples``.
    - ``"laplace_bridge"``: the mean of the Dirichlet distribution whose Laplace approximation in the logits is N(m, V).
      No cost, but it fits a distribution of probabilities rather than their mean: with two classes, that is the
      softmax of m whatever V is.

    Args:
        mean: m `[M, C]`.
        covariance: V `[M, C, C]`, symmetric and positive semi-definite.
        link: The approximation.
        num_samples: Of ``"monte_carlo"``, even.
        seed: Of ``"monte_carlo"``.

    Raises:
        InputError: Shapes do not fit, values are not finite, the link is unknown, or ``num_samples`` is odd or below 2.

    Example:
        >>> import torch
        >>> from gpntk.likelihoods import probabilities
        >>> mean, covariance = torch.tensor([[2.0, 0.0, 0.0]]), 4 * torch.eye(3).unsqueeze(0)
        >>> probabilities(mean, covariance, "monte_carlo").argmax().item()
        0

    References:
        MacKay (1992), The Evidence Framework Applied to Classification Networks.
        Hobbhahn, Kristiadi and Hennig (2022), Fast Predictive Uncertainty for Classification with Bayesian Deep
        Networks, https://arxiv.org/abs/2003.01227.
    """
    _check(mean, covariance, link, num_samples, seed)
    if link == "monte_carlo":
        return monte_carlo(mean, covariance, num_samples, seed)
    return LINKS[link](mean, covariance)


def probit(mean: Tensor, covariance: Tensor) -> Tensor:
    """Softmax of means that shrink with their variances."""
    variances = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0)
    return with_reference(mean / (1 + math.pi / 8 * variances).sqrt()).softmax(-1)


def monte_carlo(mean: Tensor, covariance: Tensor, num_samples: int = 512, seed: int = 0) -> Tensor:
    """Average of the softmax over scrambled Sobol points, each with its mirror image."""
    outputs = mean.shape[-1]
    uniform = SobolEngine(outputs, scramble=True, seed=seed).draw(num_samples // 2, dtype=torch.float64)
    # Away from 0 and 1, where the normal quantile is infinite.
    tiny = torch.finfo(uniform.dtype).eps
    half = torch.special.ndtri(uniform * (1 - 2 * tiny) + tiny).to(mean)
    draws = torch.cat([half, -half])
    rows = max(1, _CHUNK // draws.numel())

    def average(mean: Tensor, root: Tensor) -> Tensor:
        return with_reference(mean + torch.einsum("sd,mcd->smc", draws, root)).softmax(-1).mean(0)

    parts = zip(mean.split(rows), _square_root(covariance).split(rows), strict=True)
    return torch.cat([average(*part) for part in parts])


def laplace_bridge(mean: Tensor, covariance: Tensor) -> Tensor:
    """Mean of the Dirichlet of parameters (1 - 2/C + e^{m_c} Σ_d e^{-m_d} / C²) / V_cc, given Σ_c f_c = 0."""
    if mean.shape[-1] == 1:
        return with_reference(mean).softmax(-1)
    outputs = mean.shape[-1]
    sums = covariance.sum(-1)
    total = sums.sum(-1, keepdim=True).clamp_min(torch.finfo(mean.dtype).tiny)
    mean = mean - sums * mean.sum(-1, keepdim=True) / total
    variances = covariance.diagonal(dim1=-2, dim2=-1) - sums.square() / total
    variances = variances.clamp_min(torch.finfo(mean.dtype).tiny)
    constant = mean.new_tensor(1 - 2 / outputs).log()
    odds = mean + (-mean).logsumexp(-1, keepdim=True) - 2 * math.log(outputs)
    return (torch.logaddexp(constant, odds) - variances.log()).softmax(-1)


LINKS: dict[Link, Callable[[Tensor, Tensor], Tensor]] = {
    "probit": probit,
    "monte_carlo": monte_carlo,
    "laplace_bridge": laplace_bridge,
}


def with_reference(f: Tensor) -> Tensor:
    """Logits of all classes: f `[..., C]` itself, or (0, f) `[..., 2]` if C = 1."""
    return functional.pad(f, (1, 0)) if f.shape[-1] == 1 else f


def _square_root(covariance: Tensor) -> Tensor:
    """The symmetric root; a Cholesky factor does not exist where the covariance is singular."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT


def _check(mean: Tensor, covariance: Tensor, link: str, num_samples: int, seed: int) -> None:
    check_tensors(mean=mean)
    check_values(mean.device, covariance=covariance)
    check_choice(get_args(Link), link=link)
    check_count(2, num_samples=num_samples)
    check_count(0, seed=seed)
    if mean.dim() != 2 or not mean.shape[1] or not mean.is_floating_point():
        raise InputError(f"mean must be floating point [M, C], got {mean.dtype} of shape {tuple(mean.shape)}.")
    expected = (*mean.shape, mean.shape[1])
    if covariance.shape != expected:
        raise InputError(f"covariance must be [M, C, C], here {expected}, got shape {tuple(covariance.shape)}.")
    for name, tensor in (("mean", mean), ("covariance", covariance)):
        if not tensor.isfinite().all():
            raise InputError(f"{name} has values that are not finite.")
    if num_samples % 2:
        raise InputError(f"num_samples={num_samples} must be even: draws come in antithetic pairs.")
