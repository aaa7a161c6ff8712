"""Derivatives of a log-determinant by random probes, with the preconditioner's part exact."""

from __future__ import annotations

import torch
from torch import Tensor

from gpntk.inference.factors import AbstractFactor, SpectralFactor
from gpntk.inference.features import exact_dtype
from gpntk.inference.system import WhitenedSystem
from gpntk.memory import chunks


def signs(count: int, size: int, seed: int) -> Tensor:
    """Random signs `[K, n]` as integers, on the CPU: the same on all devices."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return 2 * torch.randint(0, 2, (count, size), generator=generator, device="cpu") - 1


def row_norms(rows: Tensor) -> Tensor:
    """Norms of rows `[K]`, in float64."""
    return torch.linalg.vector_norm(rows, dim=-1, dtype=exact_dtype(rows.device))


def function_derivatives(
    system: WhitenedSystem, factor: AbstractFactor, diagonal: Tensor, y: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor]:
    """Derivatives of log|B| by log prior variances and log noise variances, see `LogDet`, in function space.

    Args:
        system: Whose B it is.
        factor: M = R Rᵀ, the preconditioner.
        diagonal: diag B⁻¹ `[m]`.
        y: R⁻ᵀ z `[K, m]` for probes z.
        rest: R⁻ᵀ times what (R⁻¹ B R⁻ᵀ)⁻¹ z differs from z by `[K, m]`.
    """
    by_noise = diagonal.sum(0, keepdim=True) if system.homoscedastic else diagonal
    if system.covariance.features is None:
        return diagonal.new_zeros(0), by_noise
    weighted, exact = system.weighted, exact_dtype(system.covariance.device)
    if weighted.variances.shape == (1,):
        return (1 - diagonal).sum(0, keepdim=True), by_noise
    # tr(B⁻¹ H_g) = tr(M⁻¹ H_g) + E[rest H_g y], M⁻¹ = (1/c) I + U diag(1/m - 1/c) Uᵀ.
    assert isinstance(factor, SpectralFactor)
    gains = (1 / factor.values - 1 / factor.rest).to(exact)
    traces = system.group_traces() / factor.rest
    bytes_each = 3 * exact.itemsize * system.size("weight")
    for part in chunks(gains.shape[0], bytes_each, system.covariance.memory_budget // 4):
        images = system.adjoint(factor.vectors[:, part].mT).to(exact).square()
        traces = traces + weighted.by_group(gains[part] @ images)
    product = system.adjoint(rest) * system.adjoint(y)
    return traces + weighted.by_group(product.to(exact).mean(0)), by_noise
