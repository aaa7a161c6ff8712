"""gpntk, with the backend that it chooses itself."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import gpntk
from benchmarks.peers_torch import Problem, Product, main


def product(problem: Problem) -> Product:
    """``NTKKernel(module)(x).evaluate_kernel() @ V``."""
    kernel = _kernel(problem)

    def at(x: Tensor) -> Callable[[Tensor], Tensor]:
        operator = kernel(x).evaluate_kernel()
        return lambda v: operator @ v

    return at


def gram(problem: Problem) -> Callable[[Tensor], Tensor]:
    """``NTKKernel(module)(x).to_dense()``."""
    kernel = _kernel(problem)
    return lambda x: kernel(x).to_dense()


def _kernel(problem: Problem) -> gpntk.NTKKernel:
    return gpntk.NTKKernel(problem.module, input_shape=problem.input_shape)


if __name__ == "__main__":
    main(product, gram)
