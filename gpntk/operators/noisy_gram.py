"""A Gram matrix plus a diagonal of noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from linear_operator import settings, utils
from linear_operator.operators import AddedDiagLinearOperator, DiagLinearOperator, LinearOperator
from torch import Tensor


@final
class NoisyGramLinearOperator(AddedDiagLinearOperator):
    """K + diag(noise) whose conjugate gradients reach the tolerance that was asked for.

    The host's iteration stops improving at a relative residual near 1e-5 in any precision, because it guards divisions
    with a constant 1e-10 (squared quantities). Here the guard is the smallest normal number of the dtype, so
    ``linear_operator.settings.cg_tolerance`` means what it says.

    Example:
        >>> import torch, gpntk
        >>> noisy = gpntk.NTKKernel(torch.nn.Linear(3, 1))(torch.randn(5, 3)).evaluate_kernel().add_jitter(0.1)
        >>> type(noisy).__name__, noisy.solve(torch.ones(5)).shape
        ('NoisyGramLinearOperator', torch.Size([5]))
    """

    def _solve(
        self, rhs: Tensor, preconditioner: Callable[[Tensor], Tensor] | None = None, num_tridiag: int | None = 0
    ) -> Tensor | tuple[Tensor, Tensor]:
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


def noisy_gram(gram: LinearOperator, noise: DiagLinearOperator) -> NoisyGramLinearOperator:
    """``gram`` + ``noise``."""
    # The host annotates *each* of the two arguments as the pair of them.
    return NoisyGramLinearOperator(gram, noise)  # pyright: ignore[reportArgumentType]
