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

from gpntk.inference import (
    AbstractInverse,
    AbstractSolver,
    FeatureCovariance,
    Features,
    WhitenedSystem,
    inv_quad_logdet,
)

# Elements of a batch that are solved one after the other; more are left to the host's batched algorithms.
_MOST = 16


class Problem(NamedTuple):
    """A noisy Gram matrix in the terms of `gpntk.inference`: features, prior variances `[G]`, noise `[1]` or `[n]`."""

    features: Features
    variances: Tensor
    noise: Tensor
    solver: AbstractSolver

    def system(self, missing: Tensor | None = None) -> WhitenedSystem:
        """The system; rows ``missing`` `[n]` get infinite noise."""
        noise = self.noise
        if missing is not None and bool(missing.any()):
            noise = torch.where(missing, torch.inf, noise.expand(self.features.num_rows))
        return WhitenedSystem(FeatureCovariance(self.features, self.variances), noise)


class AbstractGramLinearOperator(LinearOperator):
    """A Gram matrix that may be able to say which features it is made of."""

    @abstractmethod
    def statement(self) -> tuple[Features, Tensor, AbstractSolver] | None:
        """Features, variances `[..., G]`, solver; None for batches of x, or if x1 is not x2 or carries a gradient."""


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

    def problems(self) -> list[Problem] | None:
        """What is to be solved, for every element of the batch: one x, but each its own hyperparameters.

        None for batches of x (or more than 16 in all), inputs that carry a gradient, and sums with other kernels.
        """
        gram = self._linear_op
        stated = gram.statement() if isinstance(gram, AbstractGramLinearOperator) else None
        if stated is None or self.batch_shape.numel() > _MOST:
            return None
        features, variances, solver = stated
        pairs = zip(self._elements(variances), self._elements(self.noise()), strict=True)
        return [Problem(features, *pair, solver) for pair in pairs]

    def noise(self) -> Tensor:
        """Noise variances `[..., n]`, or `[..., 1]` where all rows have the same."""
        diagonal = self._diag_tensor
        if isinstance(diagonal, ConstantDiagLinearOperator):
            return diagonal.diag_values
        noise = diagonal._diagonal()
        return noise[..., :1] if not noise.requires_grad and bool((noise == noise[..., :1]).all()) else noise

    def _elements(self, values: Tensor) -> Tensor:
        """`[..., k]` for every element of the batch, `[B, k]`."""
        return values.expand(*self.batch_shape, values.shape[-1]).reshape(-1, values.shape[-1])

    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool | None = False, reduce_inv_quad: bool | None = True
    ) -> tuple[Tensor | None, Tensor | None]:
        problems = self.problems() if logdet and inv_quad_rhs is not None else None
        if problems is None or inv_quad_rhs is None:
            return super().inv_quad_logdet(inv_quad_rhs, logdet, reduce_inv_quad)
        columns = inv_quad_rhs.unsqueeze(-1) if inv_quad_rhs.dim() == 1 else inv_quad_rhs
        columns = columns.mT.reshape(len(problems), -1, self.shape[-1])
        parts = [
            inv_quad_logdet(*problem[:3], rhs, problem.solver) for problem, rhs in zip(problems, columns, strict=True)
        ]
        quad = torch.stack([part[0] for part in parts]).reshape(*self.batch_shape, -1)
        determinant = torch.stack([part[1] for part in parts]).reshape(self.batch_shape)
        return quad.sum(-1) if reduce_inv_quad else quad, determinant

    def _solve(
        self, rhs: Tensor, preconditioner: Callable[[Tensor], Tensor] | None = None, num_tridiag: int | None = 0
    ) -> Tensor | tuple[Tensor, Tensor]:
        problems = None if num_tridiag else self.problems()
        if problems is not None:
            columns = rhs.mT.expand(*torch.broadcast_shapes(rhs.shape[:-2], self.batch_shape), *rhs.mT.shape[-2:])
            # The operator's own batch first, all other columns second.
            own = columns.reshape(-1, len(problems), *columns.shape[-2:]).transpose(0, 1)
            pairs = zip(self._inverses(problems), own, strict=True)
            solved = torch.stack(
                [inverse.solve(part.flatten(0, 1)).checked().view(part.shape) for inverse, part in pairs]
            )
            return solved.transpose(0, 1).reshape(columns.shape).mT.to(rhs.dtype)
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

    @cached(name="inverses", ignore_args=True)
    def _inverses(self, problems: list[Problem]) -> list[AbstractInverse]:
        return [problem.solver.prepare(problem.system()) for problem in problems]


def noisy_gram(gram: LinearOperator, noise: DiagLinearOperator) -> NoisyGramLinearOperator:
    """``gram`` + ``noise``."""
    # The host annotates *each* of the two arguments as the pair of them.
    return NoisyGramLinearOperator(gram, noise)  # pyright: ignore[reportArgumentType]
