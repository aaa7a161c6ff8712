"""The choice of a solver, as an object that can be asked what it would pick and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, final

import torch

from gpntk.cost import Cost, Machine, Work, table
from gpntk.inference.direct import FunctionSpace, WeightSpace
from gpntk.inference.inverse import AbstractInverse
from gpntk.inference.iterative import ConjugateGradients
from gpntk.inference.preconditioners import Nystrom, SampledGram
from gpntk.inference.solver import AbstractSolver, Sizes
from gpntk.inference.system import NoisySystem

# Right-hand sides that the choice is made for: a mean, the probes of a log-determinant, some variances.
_COLUMNS = 32
# A factorisation has no tolerance and no failure: it is taken even if it costs this much more.
_DIRECT_BONUS = 3.0
# Systems of up to this many rows are factorised without counting.
_SMALL = 2000


class SolverChoice(NamedTuple):
    """A solver, the reason it was chosen, and what each would have cost; ``print`` shows them."""

    solver: AbstractSolver
    reason: str
    costs: tuple[Cost, ...]

    def __str__(self) -> str:
        return f"{type(self.solver).__name__}: {self.reason}\n{table(self.costs)}"


@final
@dataclass(frozen=True)
class AutoSolver(AbstractSolver):
    """The solver that counts as the cheapest among those that fit the memory budget.

    | solver                                        | once               | each column     | memory  |
    | `FunctionSpace`                               | Gram + n³/3        | 2 n²            | 16 n²   |
    | `WeightSpace`                                 | n F² + F³/3        | 4 n F + 2 F²    | 16 F²   |
    | `ConjugateGradients` (`Nystrom`)              | 4 n F r            | 30 (4 n F)      | 5 n r   |
    | `ConjugateGradients` (`SampledGram`)          | 3 F³               | 15 (4 n F)      | 2 F²    |
    | ``ConjugateGradients(Nystrom(space="weight"))`` | 4 n F r          | 30 (4 n F)      | 5 F r   |

    Direct solvers are preferred up to three times the cost, and always for n <= 2,000.

    Attributes:
        columns: Right-hand sides that the choice is made for: one for a mean, one for each variance.

    Example:
        >>> import torch, gpntk
        >>> from gpntk.inference import AutoSolver, Features, NoisySystem
        >>> network = gpntk.freeze(torch.nn.Sequential(torch.nn.Linear(5, 30), torch.nn.Tanh(), torch.nn.Linear(30, 1)))
        >>> features = Features(gpntk.AutoBackend(network), torch.randn(20_000, 5))
        >>> choice = AutoSolver().select(NoisySystem(features, torch.ones(1), torch.ones(1)))
        >>> choice.solver
        WeightSpace()
    """

    columns: int = _COLUMNS

    def select(self, system: NoisySystem) -> SolverChoice:
        """The solver for ``system``, with the reason and the costs."""
        sizes = sizes_of(system, self.columns)
        candidates: tuple[AbstractSolver, ...] = (
            FunctionSpace(),
            WeightSpace(),
            ConjugateGradients(Nystrom()),
            ConjugateGradients(SampledGram()),
            ConjugateGradients(Nystrom(space="weight")),
        )
        costs: dict[AbstractSolver, Cost] = {solver: solver.cost(sizes) for solver in candidates}
        counted = tuple(costs.values())
        if sizes.rows <= _SMALL and not sizes.sharded:
            return SolverChoice(FunctionSpace(), f"{sizes.rows} rows are few.", counted)
        fitting = {solver: cost for solver, cost in costs.items() if cost.fits}
        if not fitting:
            return SolverChoice(candidates[-1], "nothing fits the memory budget: this needs the least.", counted)

        def seconds(solver: AbstractSolver) -> float:
            time = (fitting[solver].once + fitting[solver].product).seconds(Machine())
            return time if isinstance(solver, ConjugateGradients) else time / _DIRECT_BONUS

        best = min(fitting, key=seconds)
        # Estimates of ranks with different rows may differ by a hair, and their choices with them.
        best = candidates[int(system.features.first(torch.tensor(candidates.index(best))))]
        return SolverChoice(best, f"the cheapest that fits for {sizes.rows} rows, {sizes.features} features.", counted)

    def prepare(self, system: NoisySystem, many: bool = False) -> AbstractInverse:
        return self.select(system).solver.prepare(system, many)

    def cost(self, sizes: Sizes) -> Cost:
        raise NotImplementedError("ask select for the costs of the solvers there are.")


def sizes_of(system: NoisySystem, columns: int) -> Sizes:
    """What costs are counted from."""
    features = system.features
    rows = int(features.total(torch.tensor(features.num_rows, device=features.device)))
    few = features.take(torch.arange(min(64, features.num_samples), device=features.device)).unsqueeze(0)
    costs = features.backend.costs(few, 1) if few.shape[1] else ()
    counted = {cost.strategy: cost for cost in costs if cost.strategy in ("Gram", "factors, kept")}
    share = rows / max(1, few.shape[1] * features.num_outputs)
    f = features.num_features
    gram, product = Work(2 * rows**2 * f, 0, 100), Work(4 * rows * f, 0, 100)
    if counted:
        gram = Work(counted["Gram"].once.flops * share**2, counted["Gram"].once.moved * share**2, 100)
        product = Work(
            counted["factors, kept"].product.flops * share, counted["factors, kept"].product.moved * share, 100
        )
    return Sizes(
        rows=rows,
        features=f,
        groups=system.variances.shape[0],
        columns=columns,
        itemsize=torch.finfo(features.dtype).bits // 8,
        gram=gram,
        product=product,
        budget=features.memory_budget,
        sharded=features.sharded,
    )
