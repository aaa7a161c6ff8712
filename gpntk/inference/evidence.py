"""yᵀ (K + D)⁻¹ y and log|K + D| as differentiable functions of prior variances, noise and y."""

from __future__ import annotations

import math
from typing import Any, cast, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpntk.errors import InputError
from gpntk.inference.features import AbstractFeatures
from gpntk.inference.solver import AbstractSolver
from gpntk.inference.system import NoisySystem


def inv_quad_logdet(
    features: AbstractFeatures, variances: Tensor, noise: Tensor, rhs: Tensor, solver: AbstractSolver
) -> tuple[Tensor, Tensor]:
    """bᵀ (K + D)⁻¹ b `[K]` for b `[K, n]`, and log|K + D| `[]`, with first derivatives.

    Derivatives are those of the solver: exact for a factorisation, estimated with the preconditioner's part exact by
    conjugate gradients. A factorisation costs as much as without them.

    Raises:
        InputError: A prior variance is zero and a derivative with respect to it is asked for.
        SolveError: The system could not be solved.
        RuntimeError: A second derivative is asked for; it would need the dense matrix.
    """
    quad, logdet = cast("tuple[Tensor, Tensor]", _InvQuadLogdet.apply(features, solver, variances, noise, rhs))
    return quad, logdet


def log_marginal_likelihood(
    features: AbstractFeatures, variances: Tensor, noise: Tensor, y: Tensor, solver: AbstractSolver
) -> Tensor:
    """log N(y; 0, K + D) in nats `[]`, over the rows with finite noise, for y `[n]`; differentiable.

    Rows of infinite noise may be NaN in y.

    Example:
        >>> import torch, gpntk
        >>> from gpntk.inference import AutoSolver, Features, log_marginal_likelihood
        >>> backend = gpntk.AutoBackend(gpntk.freeze(torch.nn.Linear(3, 1).double()))
        >>> features = Features(backend, torch.randn(20, 3, dtype=torch.float64))
        >>> noise = torch.ones(1, dtype=torch.float64, requires_grad=True)
        >>> y = torch.randn(20, dtype=torch.float64)
        >>> value = log_marginal_likelihood(features, torch.ones(1, dtype=torch.float64), noise, y, AutoSolver())
        >>> value.backward()
        >>> noise.grad.shape
        torch.Size([1])

    References:
        Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, eqs. 2.30 and 5.9.
    """
    quad, logdet = inv_quad_logdet(features, variances, noise, y.unsqueeze(0), solver)
    observed = NoisySystem(features, variances, noise).observed
    return -0.5 * (quad.squeeze(0) + logdet + observed * math.log(2 * math.pi))


@final
class _InvQuadLogdet(torch.autograd.Function):
    """Both at once; with α = (K + D)⁻¹ b, the derivative of the first is as follows.

    d(bᵀα) = 2 αᵀ db - αᵀ (dK + dD) α,    αᵀ K_g α = |Φ_gᵀ α|².
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        features, solver, variances, noise, rhs = args
        system = NoisySystem(features, variances, noise)
        inverse = solver.prepare(system, many=variances.requires_grad or noise.requires_grad)
        exact = inverse.exact
        if variances.requires_grad and not bool((exact.variances > 0).all()):
            raise InputError("a prior variance is zero: its derivative is not computed.")
        # Rows that were not observed have no target.
        whitened = torch.where(exact.row_scales > 0, rhs.to(exact.row_scales), 0.0) * exact.row_scales
        solution = inverse.whitened(whitened)
        alpha = solution.result(solution.dual * exact.row_scales).checked()
        determinant = inverse.logdet(by_row=noise.requires_grad)
        # Of every prior variance, times it: primal = S^(1/2) Φᵀ α.
        energies = torch.stack([exact.by_group(row) for row in solution.primal.square()])
        ctx.save_for_backward(
            alpha, energies, determinant.by_variance, determinant.by_noise, exact.variances, exact.noise
        )
        ctx.dtypes = variances.dtype, noise.dtype, rhs.dtype
        ctx.total, ctx.homoscedastic = features.total, exact.homoscedastic
        return solution.quad.to(rhs.dtype), (determinant.value + exact.noise_logdet).to(rhs.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        alpha, energies, by_variance, by_noise, variances, noise = ctx.saved_tensors
        for_quad, for_logdet = (grad.to(alpha.dtype) for grad in grads)
        weighted = alpha.square() * for_quad.unsqueeze(-1)
        rows = ctx.total(weighted.sum()).unsqueeze(0) if ctx.homoscedastic else weighted.sum(0)
        to_variances = (for_logdet * by_variance - for_quad @ energies) / variances
        to_noise = for_logdet * by_noise / noise - rows
        to_rhs = 2 * for_quad.unsqueeze(-1) * alpha
        dtypes = ctx.dtypes
        return None, None, to_variances.to(dtypes[0]), to_noise.to(dtypes[1]), to_rhs.to(dtypes[2])
