"""curvlinops: a Jacobian operator times a transposed one, all data in one batch, determinism checks off."""

from __future__ import annotations

from collections.abc import Callable

from curvlinops import JacobianLinearOperator, TransposedJacobianLinearOperator
from torch import Tensor

from benchmarks.peers_torch import Problem, Product, main


def product(problem: Problem) -> Product:
    """``J @ (Jt @ V)``; the operators take x at construction and keep nothing of the network's passes."""
    parameters = list(problem.module.parameters())

    def at(x: Tensor) -> Callable[[Tensor], Tensor]:
        data = [(problem.shaped(x), x.new_zeros(len(x)))]
        jacobian, transposed = (
            operator(problem.module, parameters, data, check_deterministic=False, num_data=len(x))
            for operator in (JacobianLinearOperator, TransposedJacobianLinearOperator)
        )
        return lambda v: jacobian @ (transposed @ v)

    return at


if __name__ == "__main__":
    main(product, None)
