"""Conjugate gradients for many right-hand sides, each stopped on its own, and determinants by random probes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gpntk.inference.factors import AbstractFactor, SpectralFactor
from gpntk.inference.features import exact_dtype
from gpntk.inference.outcome import Outcome
from gpntk.inference.system import WhitenedSystem
from gpntk.memory import chunks

# Iterations without a new smallest residual after which a column is given up; residuals of ill-conditioned systems
# oscillate for long.
_PATIENCE = 300


class Run(NamedTuple):
    """The result of a run of conjugate gradients: solutions, outcomes and coefficients.

    Attributes:
        value: A⁻¹ b `[K, n]`, the last iterate.
        outcomes: Of each column.
        iterations: Products with A.
        steps: α of every iteration `[T, K]` (NaN once a column has stopped).
        ratios: β of every iteration `[T, K]`.
    """

    value: Tensor
    outcomes: list[Outcome]
    iterations: int
    steps: Tensor
    ratios: Tensor


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    rhs: Tensor,
    targets: Tensor,
    max_iterations: int,
    observe: Callable[[int, Tensor], None] = lambda _iteration, _value: None,
) -> Run:
    """Solve A x = b from x = 0 for every row b of ``rhs`` `[K, n]`, until the residual's norm is ``targets`` `[K]`.

    Columns that have stopped take no further part in products. Coefficients are accumulated in float64. The recursive
    residual is what is compared with the target: check the true one where it matters. ``observe`` is shown each
    iteration's number and iterate.

    References:
        Hestenes and Stiefel (1952); Golub and Van Loan (2013), Matrix Computations, section 11.3.
    """
    value, residual, direction = torch.zeros_like(rhs), rhs.clone(), rhs.clone()
    squares = _dot(residual, residual)
    outcomes: list[Outcome] = [Outcome.EXHAUSTED] * rhs.shape[0]
    steps, ratios = [], []
    best, since = squares.clone(), torch.zeros_like(squares)
    active = torch.arange(rhs.shape[0], device=rhs.device)
    iteration = 0
    while True:
        active = _stop(active, squares, targets, since, outcomes)
        if not active.numel() or iteration >= max_iterations:
            break
        iteration += 1
        image = product(direction[active])
        curvature = _dot(direction[active], image)
        step = squares[active] / curvature
        bad = ~(curvature > 0)
        for column, finite in zip(active[bad].tolist(), image[bad].isfinite().all(-1).tolist(), strict=True):
            outcomes[column] = Outcome.NOT_POSITIVE if finite else Outcome.NOT_FINITE
        step = torch.where(bad, torch.nan, step)
        moved = torch.where(bad, 0.0, step).to(rhs.dtype).unsqueeze(-1)
        value[active] += moved * direction[active]
        residual[active] -= moved * torch.where(bad.unsqueeze(-1), 0.0, image)
        new = _dot(residual[active], residual[active])
        ratio = new / squares[active]
        direction[active] = residual[active] + ratio.to(rhs.dtype).unsqueeze(-1) * direction[active]
        squares[active] = new
        since[active] = torch.where(new < best[active], 0.0, since[active] + 1)
        best = torch.minimum(best, squares)
        steps.append(_spread(step, active, rhs.shape[0]))
        ratios.append(_spread(ratio, active, rhs.shape[0]))
        active = active[~bad]
        observe(iteration, value)
    empty = torch.zeros(0, rhs.shape[0], dtype=squares.dtype, device=rhs.device)
    return Run(
        value, outcomes, iteration, torch.stack(steps) if steps else empty, torch.stack(ratios) if ratios else empty
    )


def _stop(active: Tensor, squares: Tensor, targets: Tensor, since: Tensor, outcomes: list[Outcome]) -> Tensor:
    """The columns that go on; the outcome of those that do not."""
    norms = squares[active].sqrt()
    verdicts = (
        (Outcome.NOT_FINITE, ~norms.isfinite()),
        (Outcome.CONVERGED, norms <= targets[active]),
        (Outcome.STAGNATED, since[active] >= _PATIENCE),
    )
    stopped = torch.zeros_like(norms, dtype=torch.bool)
    for outcome, holds in verdicts:
        for column in active[holds & ~stopped].tolist():
            outcomes[column] = outcome
        stopped |= holds
    return active[~stopped]


def logdet_by_quadrature(run: Run, size: int) -> tuple[float, float]:
    """log|A| and its standard error (infinite for one probe), from conjugate gradients on K probes of entries ±1.

    E[zᵀ log(A) z] = tr log A, and the Gauss quadrature of zᵀ log(A) z has the eigenvalues of the Lanczos matrix T for
    nodes and the squares of the first entries of its eigenvectors for weights; T follows from the coefficients α, β:

        T_11 = 1/α_1,  T_kk = 1/α_k + β_(k-1)/α_(k-1),  T_(k,k+1) = √β_k / α_k.

    References:
        Ubaru, Chen and Saad (2017), Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature, algorithm 1.
        Saad (2003), Iterative Methods for Sparse Linear Systems, section 6.7.3 (T from α and β).
    """
    estimates = []
    for step, ratio in zip(run.steps.mT.cpu(), run.ratios.mT.cpu(), strict=True):
        if not bool(step.isfinite().any()):
            estimates.append(0.0)
            continue
        nodes, vectors = torch.linalg.eigh(_lanczos_matrix(step, ratio))
        weights = vectors[0].square()
        estimates.append(size * float((weights * nodes.clamp_min(torch.finfo(nodes.dtype).tiny).log()).sum()))
    mean = sum(estimates) / len(estimates)
    if len(estimates) == 1:
        return mean, math.inf
    spread = sum((estimate - mean) ** 2 for estimate in estimates) / (len(estimates) - 1)
    return mean, math.sqrt(spread / len(estimates))


def smallest_ritz_value(run: Run) -> float:
    """Smallest eigenvalue of the Lanczos matrix of the column that took longest (1 without any iteration)."""
    lengths = run.steps.isfinite().sum(0)
    if not run.steps.shape[0] or not int(lengths.max()):
        return 1.0
    column = int(lengths.argmax())
    values = torch.linalg.eigvalsh(_lanczos_matrix(run.steps[:, column].cpu(), run.ratios[:, column].cpu()))
    return max(values[0].item(), torch.finfo(values.dtype).eps)


def _lanczos_matrix(step: Tensor, ratio: Tensor) -> Tensor:
    """T `[t, t]` from the coefficients of one column that made t iterations."""
    length = int(step.isfinite().sum())
    inverse, growth = 1 / step[:length], ratio[: length - 1]
    diagonal = inverse.clone()
    diagonal[1:] += growth * inverse[:-1]
    side = growth.sqrt() * inverse[:-1]
    return torch.diag(diagonal) + torch.diag(side, 1) + torch.diag(side, -1)


def _dot(one: Tensor, two: Tensor) -> Tensor:
    """Inner products of rows, `[K]`, summed in float64 where there is one."""
    wide = torch.float32 if one.device.type == "mps" else torch.float64
    # Products of pieces, so that no float64 copy of the whole is made.
    return torch.stack(
        [(a * b).sum(-1, dtype=wide) for a, b in zip(one.split(2**20, -1), two.split(2**20, -1), strict=True)]
    ).sum(0)


def _spread(values: Tensor, active: Tensor, columns: int) -> Tensor:
    full = values.new_full((columns,), torch.nan)
    full[active] = values
    return full


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
