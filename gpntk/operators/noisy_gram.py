"""A Gram matrix plus a diagonal of noise, solved by our own solvers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple, final

import torch
from linear_operator import settings, utils
from linear_operator.operators import (
    AddedDiagLinearOperator,
    ConstantDiagLinearOperator,
    DiagLinearOperator,
    LinearOperator,
)
from linear_operator.utils.memoize import cached
from torch import Tensor

from gpntk.inference import AbstractInverse, AbstractSolver, Features, NoisySystem, inv_quad_logdet
from gpntk.operators.batching import collapse


class Problem(NamedTuple):
    """A noisy Gram matrix in the terms of `gpntk.inference`: features, prior variances `[G]`, noise `[1]` or `[n]`."""

    features: Features
    variances: Tensor
    noise: Tensor
    solver: AbstractSolver

    def system(self, missing: Tensor | None = None) -> NoisySystem:
        """The system; rows ``missing`` `[n]` get infinite noise."""
        noise = self.noise
        if missing is not None and bool(missing.any()):
            noise = torch.where(missing, torch.inf, noise.expand(self.features.num_rows))
        return NoisySystem(self.features, self.variances, noise)


class AbstractGramLinearOperator(LinearOperator):
    """A Gram matrix that may be able to say which features it is made of."""

    @abstractmethod
    def statement(self) -> tuple[Features, Tensor, AbstractSolver] | None:
        """Features, prior variances `[G]` and solver; None for batches, or x1 other than x2 or with a gradient."""


@final
class NoisyGramLinearOperator(AddedDiagLinearOperator):
    """K + diag(noise), whose solves and log-determinant are those of `gpntk.inference`.

    The host factorises in the precision of the data, and its conjugate gradients stop improving at a relative residual
    near 1e-5 without a word. Here the kernel's solver decides (by default `gpntk.inference.AutoSolver`), computes in
    float64 where it matters, and raises if it cannot reach its tolerance. Real batches of inputs, and inputs that carry
    a gradient, take the host's path, with a guard of its divisions that lets ``cg_tolerance`` mean what it says.

    Example:
        >>> import torch, gpntk
        >>> noisy = gpntk.NTKKernel(torch.nn.Linear(3, 1))(torch.randn(5, 3)).evaluate_kernel().add_jitter(0.1)
        >>> type(noisy).__name__, noisy.solve(torch.ones(5)).shape
        ('NoisyGramLinearOperator', torch.Size([5]))
    """

    def problem(self) -> Problem | None:
        """What is to be solved; None for real batches, inputs that carry a gradient, and sums with other kernels."""
        gram, diagonal = self._linear_op, self._diag_tensor
        stated = gram.statement() if isinstance(gram, AbstractGramLinearOperator) else None
        if stated is None:
            return None
        constant = isinstance(diagonal, ConstantDiagLinearOperator)
        noise = diagonal.diag_values if constant else diagonal._diagonal()
        if collapse(noise.unsqueeze(-2)).shape[:-2].numel() != 1:
            return None
        noise = collapse(noise.unsqueeze(-2)).reshape(-1)
        if not constant and not noise.requires_grad and bool((noise == noise[:1]).all()):
            noise = noise[:1]
        return Problem(*stated[:2], noise, stated[2])

    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool | None = False, reduce_inv_quad: bool | None = True
    ) -> tuple[Tensor | None, Tensor | None]:
        problem = self.problem() if logdet and self.dim() == 2 else None
        if problem is None or inv_quad_rhs is None:
            return super().inv_quad_logdet(inv_quad_rhs, logdet, reduce_inv_quad)
        columns = inv_quad_rhs.unsqueeze(-1) if inv_quad_rhs.dim() == 1 else inv_quad_rhs
        quad, determinant = inv_quad_logdet(*problem[:3], columns.mT, problem.solver)
        return quad.sum() if reduce_inv_quad else quad, determinant

    def _solve(
        self, rhs: Tensor, preconditioner: Callable[[Tensor], Tensor] | None = None, num_tridiag: int | None = 0
    ) -> Tensor | tuple[Tensor, Tensor]:
        problem = None if num_tridiag else self.problem()
        if problem is not None and self.dim() == 2:
            columns = self._inverse(problem).solve(rhs.mT.flatten(0, -2)).checked()
            return columns.to(rhs.dtype).reshape(rhs.mT.shape).mT
        tiny = torch.finfo(rhs.dtype).tiny
        # Through the module, so that whoever counts the host's CG calls counts these.
        return utils.linear_cg(
            self._matmul,
            rhs,
            n_tridiag=num_tridiag or 0,
            eps=tiny,
            stop_updating_after=tiny,
            max_iter=settings.max_cg_iterations.value(),
            max_tridiag_iter=settings.max_lanczos_quadrature_iterations.value(),
            preconditioner=preconditioner,
        )

    @cached(name="inverse", ignore_args=True)
    def _inverse(self, problem: Problem) -> AbstractInverse:
        return problem.solver.prepare(problem.system())


def noisy_gram(gram: LinearOperator, noise: DiagLinearOperator) -> NoisyGramLinearOperator:
    """``gram`` + ``noise``."""
    # The host annotates *each* of the two arguments as the pair of them.
    return NoisyGramLinearOperator(gram, noise)  # pyright: ignore[reportArgumentType]
