"""A Gram matrix plus a diagonal of noise, solved by our own solvers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import final

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

from gpntk.inference import AbstractSolver, FeatureCovariance, WhitenedSystem
from gpntk.inference.evidence import inv_quad_logdet
from gpntk.inference.solver import AbstractInverse

# Elements of a batch that are solved one after the other; more are left to the host's batched algorithms.
_MOST = 16


class AbstractGramLinearOperator(LinearOperator):
    """A Gram matrix that may be able to say which features it is made of."""

    @abstractmethod
    def covariances(self, batch_shape: torch.Size) -> list[FeatureCovariance] | None:
        """One for each element of a batch; None for batches of x, or if x1 is not x2 or carries a gradient."""

    @property
    @abstractmethod
    def solver(self) -> AbstractSolver:
        """How systems with it are solved."""


@final
class NoisyGramLinearOperator(AddedDiagLinearOperator):
    """K + diag(noise), whose solves and log-determinant are those of `gpntk.inference`.

    The host factorises in the precision of the data, and its conjugate gradients stop improving at a relative residual
    near 1e-5 without a word. Here the kernel's solver decides (by default `gpntk.inference.AutoSolver`), computes in
    float64 where it matters, and raises if it cannot reach its tolerance. Real batches of inputs, and inputs that carry
    a gradient, take the host's path, with a guard of its divisions that lets ``cg_tolerance`` mean what it says.

    Args:
        linear_ops: K and the diagonal, see `noisy_gram`.

    Example:
        >>> import torch, gpntk
        >>> noisy = gpntk.NTKKernel(torch.nn.Linear(3, 1))(torch.randn(5, 3)).evaluate_kernel().add_jitter(0.1)
        >>> noisy, noisy.solve(torch.ones(5)).shape
        (NoisyGramLinearOperator[5, 5], torch.Size([5]))
    """

    def __repr__(self) -> str:
        return f"{type(self).__name__}{list(self.shape)}"

    def systems(self) -> list[WhitenedSystem] | None:
        """What is to be solved, for every element of the batch: one x, but each its own hyperparameters.

        None for batches of x (or more than 16 in all), inputs that carry a gradient, and sums with other kernels.
        """
        parts = self._parts()
        return None if parts is None else [WhitenedSystem(*part) for part in parts]

    @property
    def solver(self) -> AbstractSolver:
        """How these systems are solved."""
        gram = self._linear_op
        assert isinstance(gram, AbstractGramLinearOperator)
        return gram.solver

    def _parts(self) -> list[tuple[FeatureCovariance, Tensor]] | None:
        """The covariance and the noise variances of every element, with their graphs."""
        gram = self._linear_op
        if not isinstance(gram, AbstractGramLinearOperator) or self.batch_shape.numel() > _MOST:
            return None
        covariances = gram.covariances(self.batch_shape)
        if covariances is None:
            return None
        noise = noise_of(self._diag_tensor)
        return list(zip(covariances, elements(noise, self.batch_shape), strict=True))

    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool | None = False, reduce_inv_quad: bool | None = True
    ) -> tuple[Tensor | None, Tensor | None]:
        parts = self._parts() if logdet and inv_quad_rhs is not None else None
        if parts is None or inv_quad_rhs is None:
            return super().inv_quad_logdet(inv_quad_rhs, logdet, reduce_inv_quad)
        columns = inv_quad_rhs.unsqueeze(-1) if inv_quad_rhs.dim() == 1 else inv_quad_rhs
        columns = columns.mT.reshape(len(parts), -1, self.shape[-1])
        found = [inv_quad_logdet(*part, rhs, self.solver) for part, rhs in zip(parts, columns, strict=True)]
        quad = torch.stack([each[0] for each in found]).reshape(*self.batch_shape, -1)
        determinant = torch.stack([each[1] for each in found]).reshape(self.batch_shape)
        return quad.sum(-1) if reduce_inv_quad else quad, determinant

    def _solve(
        self, rhs: Tensor, preconditioner: Callable[[Tensor], Tensor] | None = None, num_tridiag: int | None = 0
    ) -> Tensor | tuple[Tensor, Tensor]:
        inverses = None if num_tridiag else self._inverses()
        if inverses is not None:
            columns = rhs.mT.expand(*torch.broadcast_shapes(rhs.shape[:-2], self.batch_shape), *rhs.mT.shape[-2:])
            # The operator's own batch first, all other columns second.
            own = columns.reshape(-1, len(inverses), *columns.shape[-2:]).transpose(0, 1)
            solved = torch.stack(
                [
                    inverse.solve(part.flatten(0, 1)).checked().view(part.shape)
                    for inverse, part in zip(inverses, own, strict=True)
                ]
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

    @cached(name="inverses")
    def _inverses(self) -> list[AbstractInverse] | None:
        systems = self.systems()
        return None if systems is None else [self.solver.prepare(system) for system in systems]


def noise_of(diagonal: DiagLinearOperator) -> Tensor:
    """Noise variances `[..., n]`, or `[..., 1]` where all rows have the same."""
    if isinstance(diagonal, ConstantDiagLinearOperator):
        return diagonal.diag_values
    noise = diagonal._diagonal()
    return noise[..., :1] if not noise.requires_grad and bool((noise == noise[..., :1]).all()) else noise


def elements(values: Tensor, batch_shape: torch.Size) -> Tensor:
    """`[..., k]` for every element of a batch, `[B, k]`."""
    return values.expand(*batch_shape, values.shape[-1]).reshape(-1, values.shape[-1])


def noisy_gram(gram: LinearOperator, noise: DiagLinearOperator) -> NoisyGramLinearOperator:
    """A kernel matrix plus the noise of its rows, ``gram`` + ``noise``."""
    # The host annotates *each* of the two arguments as the pair of them.
    return NoisyGramLinearOperator(gram, noise)  # pyright: ignore[reportArgumentType]
