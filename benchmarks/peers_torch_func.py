"""torch.func by hand: vjp, then jvp, columns by vmap; one column by a plain call, which is faster."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.func import jvp, vjp, vmap

from benchmarks.peers_torch import Problem, Product, main


def product(problem: Problem) -> Product:
    """J(Jᵀ V), both passes over the network in every call."""
    parameters = problem.parameters()

    def at(x: Tensor) -> Callable[[Tensor], Tensor]:
        def outputs(parameters: dict[str, Tensor]) -> Tensor:
            return problem.outputs(parameters, x)

        def times(v: Tensor) -> Tensor:
            pullback = vjp(outputs, parameters)[1]

            def column(cotangent: Tensor) -> Tensor:
                return jvp(outputs, (parameters,), pullback(cotangent))[1]

            return column(v[:, 0]).unsqueeze(-1) if v.shape[1] == 1 else vmap(column, in_dims=1, out_dims=1)(v)

        return times

    return at


if __name__ == "__main__":
    main(product, None)
