"""yᵀ (K + D)⁻¹ y and log|K + D| as differentiable functions of prior variances, noise and y."""

from __future__ import annotations

import math
from typing import Any, cast, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpntk._checks import check_input, check_kinds, check_values
from gpntk.errors import InputError
from gpntk.inference.auto import AutoSolver
from gpntk.inference.covariance import AbstractCovariance, FeatureCovariance
from gpntk.inference.direct import cholesky
from gpntk.inference.features import exact_dtype
from gpntk.inference.noise import RowNoise
from gpntk.inference.solver import AbstractSolver
from gpntk.inference.system import WhitenedSystem


def inv_quad_logdet(
    covariance: FeatureCovariance, noise: Tensor, rhs: Tensor, solver: AbstractSolver
) -> tuple[Tensor, Tensor]:
    """bᵀ (K + D)⁻¹ b `[K]` for b `[K, n]`, and log|K + D| `[]`, with first derivatives.

    Derivatives are those of the solver: exact for a factorisation, estimated with the preconditioner's part exact by
    conjugate gradients. A factorisation costs as much as without them.

    Raises:
        InputError: A prior variance is zero and a derivative with respect to it is asked for.
        SolveError: The system could not be solved.
        RuntimeError: A second derivative is asked for; it would need the dense matrix.
    """
    quad, logdet = cast("tuple[Tensor, Tensor]", _InvQuadLogdet.apply(covariance, solver, covariance.given, noise, rhs))
    return quad, logdet


@final
class _InvQuadLogdet(torch.autograd.Function):
    """Both at once; with α = (K + D)⁻¹ b, the derivative of the first is as follows.

    d(bᵀα) = 2 αᵀ db - αᵀ (dK + dD) α,    αᵀ K_g α = |Φ_gᵀ α|².
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        covariance, solver, variances, noise, rhs = args
        system = WhitenedSystem(covariance, noise)
        inverse = solver.prepare(system, many=variances.requires_grad or noise.requires_grad)
        exact, weighted = inverse.exact, inverse.exact.weighted
        assert exact.noise is not None
        if variances.requires_grad and not bool((weighted.variances > 0).all()):
            raise InputError("a prior variance is zero: its derivative is not computed.")
        # Rows that were not observed have no target.
        seen = torch.where(exact.noise.isfinite(), rhs.to(inverse.dtype), 0.0)
        solution = inverse.whitened(exact.likelihood.whiten(seen))
        assert solution.primal is not None
        alpha = solution.result(exact.likelihood.unwhiten(solution.dual)).checked()
        determinant = inverse.logdet(by_row=noise.requires_grad)
        # Of every prior variance, times it: primal = S^½ Φᵀ α.
        energies = torch.stack([weighted.by_group(row) for row in solution.primal.square()])
        ctx.save_for_backward(
            alpha, energies, determinant.by_variance, determinant.by_noise, weighted.variances, exact.noise
        )
        ctx.dtypes = variances.dtype, noise.dtype, rhs.dtype
        ctx.total, ctx.homoscedastic = covariance.total, exact.homoscedastic
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


def log_evidence(
    covariance: AbstractCovariance | Tensor, noise: Tensor, y: Tensor, solver: AbstractSolver | None = None
) -> Tensor:
    """log N(y; 0, K + D) in nats `[]`, differentiable in K (its hyperparameters), the noise and y.

    Of a dense K the gradient is in closed form, at one Cholesky factorisation and one inverse in all:

        ∂/∂K = ½ (α αᵀ - (K + D)⁻¹),    α = (K + D)⁻¹ y.

    Args:
        covariance: K, as a covariance or as a matrix `[n, n]`, with a graph to its hyperparameters.
        noise: D: `[1]` or `[n]`, infinite where y was not observed, and may be NaN.
        y: Targets minus prior mean `[n]`; or several columns `[K, n]` that share K and D, whose sum it is.
        solver: For features: how it is solved, default `AutoSolver`. A dense K is factorised.

    Raises:
        SolveError: The system could not be solved.

    Example:
        >>> import torch
        >>> from gpntk.inference import log_evidence
        >>> gram = torch.eye(3, dtype=torch.float64).requires_grad_()
        >>> log_evidence(gram, torch.ones(1), torch.zeros(3)).backward()
        >>> gram.grad.diagonal()
        tensor([-0.2500, -0.2500, -0.2500], dtype=torch.float64)

    References:
        Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, eqs. 2.30 and 5.9.
    """
    check_kinds(
        AbstractCovariance | Tensor, "FeatureCovariance(features, variances), or a matrix", covariance=covariance
    )
    check_values(covariance.device, noise=noise, y=y)
    columns = y.unsqueeze(0) if y.dim() == 1 else y
    if isinstance(covariance, Tensor) or covariance.features is None:
        gram = covariance if isinstance(covariance, Tensor) else covariance.gram()
        check_input(gram.detach(), gram.device, "covariance")
        return cast("Tensor", _DenseEvidence.apply(gram, noise, columns))
    weighted, solver = covariance.weighted, AutoSolver() if solver is None else solver
    check_kinds(AbstractSolver, "a solver, WeightSpace() say, or None", solver=solver)
    system = WhitenedSystem(weighted, noise)
    system.targets(columns.detach())
    quad, logdet = inv_quad_logdet(weighted, noise, columns, solver)
    observed = system.observed
    return -0.5 * (quad.sum() + len(columns) * (logdet + observed * math.log(2 * math.pi)))


@final
class _DenseEvidence(torch.autograd.Function):
    """`log_evidence` of a dense K; what its derivatives need is computed beside the value."""

    @staticmethod
    def forward(ctx: Any, gram: Tensor, noise: Tensor, y: Tensor) -> Tensor:
        exact = exact_dtype(gram.device)
        if noise.shape not in ((1,), gram.shape[:1]) or y.shape[1:] != gram.shape[:1] or gram.shape[0] != gram.shape[1]:
            raise InputError(
                f"covariance {tuple(gram.shape)}, noise {tuple(noise.shape)}, y {tuple(y.shape)} do not fit: give "
                "[n, n], [1] or [n], and [n] or [K, n]."
            )
        if not bool((noise > 0).all()):
            raise InputError("noise variances must be positive: they are what makes K + D invertible.")
        if not bool((y.isfinite() | ~noise.isfinite()).all()):
            raise InputError("y has NaN or infinite values: give infinite noise to the rows that were not observed.")
        curvature = RowNoise(noise.to(exact), 1, exact)
        rows, count = y.shape[1], y.shape[0]
        # Rows that were not observed have no target.
        targets = torch.where(noise.isfinite(), y.to(exact), 0.0)
        matrix = curvature.congruence(gram.to(exact))
        matrix.diagonal().add_(1)
        factor = cholesky(matrix)
        white = factor.half(curvature.whiten(targets))
        constant = curvature.logdet(rows) + curvature.observed(rows) * math.log(2 * math.pi)
        value = -0.5 * (white.square().sum() + count * (factor.logdet() + constant))
        if any(ctx.needs_input_grad):
            alpha = curvature.unwhiten(factor.half_transposed(white))
            slope = curvature.congruence(torch.cholesky_inverse(factor.lower))
            slope.mul_(-0.5 * count).addmm_(alpha.mT, alpha, alpha=0.5)
            ctx.save_for_backward(slope, alpha)
        ctx.kinds = gram.dtype, noise.dtype, noise.shape, y.dtype
        return value.to(gram.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        slope, alpha = ctx.saved_tensors
        gram, noise, shape, y = ctx.kinds
        grad = grads[0].to(slope.dtype)
        by_noise = slope.diagonal().sum_to_size(shape)
        return (grad * slope).to(gram), (grad * by_noise).to(noise), (-grad * alpha).to(y)
