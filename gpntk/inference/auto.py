"""The choice of a solver, as an object that can be asked what it would pick and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from gpntk._checks import check_count
from gpntk.cost import Cost, Machine, Work
from gpntk.inference.direct import FunctionSpace, WeightSpace, spectrum_serves
from gpntk.inference.iterative import ConjugateGradients
from gpntk.inference.preconditioners import Nystrom, SampledGram
from gpntk.inference.solver import AbstractInverse, AbstractSolver, SolverChoice
from gpntk.inference.system import Sizes, WhitenedSystem
from gpntk.memory import default_budget

# Right-hand sides that the choice is made for: a mean, the probes of a log-determinant, some variances.
_COLUMNS = 32
# A factorisation has no tolerance and no failure: it is taken even if it costs this much more.
_DIRECT_BONUS = 3.0
# What a dense factorisation may take, counted.
_SECONDS = 20.0
# Systems of up to this many rows are factorised without counting.
_SMALL = 2000
# There, weight space is taken where F is at most this share of n.
_FEW_FEATURES = 0.25


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

    Direct solvers are preferred up to three times the cost, and always for n <= 2,000: there weight space if F is at
    most a quarter of n, else function space. Where many hyperparameters will follow for one prior and one noise
    variance, an eigendecomposition is counted, 27 times a factorisation. A dense covariance has no weight space.

    Attributes:
        columns: Right-hand sides that the choice is made for: one for a mean, one for each variance.

    Example:
        >>> import torch, gpntk
        >>> from gpntk.inference import AutoSolver, FeatureCovariance, Features, WhitenedSystem
        >>> network = gpntk.freeze(torch.nn.Sequential(torch.nn.Linear(5, 30), torch.nn.Tanh(), torch.nn.Linear(30, 1)))
        >>> features = Features(gpntk.AutoBackend(network), torch.randn(20_000, 5))
        >>> choice = AutoSolver().select(WhitenedSystem(FeatureCovariance(features, torch.ones(1)), torch.ones(1)))
        >>> choice.solver
        WeightSpace()
    """

    columns: int = _COLUMNS

    def __post_init__(self) -> None:
        check_count(columns=self.columns)

    @property
    def is_direct(self) -> bool:
        return False

    def select(self, system: WhitenedSystem, many: bool = False) -> SolverChoice:
        """The solver for ``system``, with the reason and the costs."""
        sizes = sizes_of(system, self.columns, many)
        costs = {solver: solver.cost(sizes) for solver in _candidates(sizes)}
        machine = Machine.of(system.covariance.device)
        best, reason = _best(costs, sizes, machine)
        if system.covariance.sharded:
            # Estimates of ranks with different rows may differ by a hair, and their choices with them.
            solvers = tuple(costs)
            best = solvers[int(system.weighted.features.ranks.first(torch.tensor(solvers.index(best))))]
        return SolverChoice(best, reason, tuple(costs.values()))

    def prepare(self, system: WhitenedSystem, many: bool = False) -> AbstractInverse:
        return self.select(system, many).solver.prepare(system, many)

    def cost(self, sizes: Sizes) -> Cost:
        costs = {solver: solver.cost(sizes) for solver in _candidates(sizes)}
        return costs[_best(costs, sizes, Machine())[0]]


def largest_dense(device: torch.device) -> int:
    """The most rows n of a dense system that is factorised without asking: the one limit, for every model.

    By memory, three matrices `[n, n]` in float64 within twice the budget; by time, n³/3 operations within 20 seconds.
    """
    by_time = (3 * _SECONDS * Machine.of(device).flops) ** (1 / 3)
    return int(min((2 * default_budget(device) / 24) ** 0.5, by_time))


def _candidates(sizes: Sizes) -> tuple[AbstractSolver, ...]:
    if not sizes.features:
        return FunctionSpace(), ConjugateGradients(Nystrom())
    return (
        FunctionSpace(),
        WeightSpace(),
        ConjugateGradients(Nystrom()),
        ConjugateGradients(SampledGram()),
        ConjugateGradients(Nystrom(space="weight")),
    )


def _best(costs: dict[AbstractSolver, Cost], sizes: Sizes, machine: Machine) -> tuple[AbstractSolver, str]:
    """The solver to be taken, and why."""
    if sizes.rows <= _SMALL and not sizes.sharded:
        if 0 < sizes.features <= _FEW_FEATURES * sizes.rows:
            return WeightSpace(), f"{sizes.features} features are few beside {sizes.rows} rows."
        return FunctionSpace(), f"{sizes.rows} rows are few."
    fitting = {solver: cost for solver, cost in costs.items() if cost.fits}
    if not fitting:
        return tuple(costs)[-1], "nothing fits the memory budget: this needs the least."

    def seconds(solver: AbstractSolver) -> float:
        time = (fitting[solver].once + fitting[solver].product).seconds(machine)
        return time / _DIRECT_BONUS if solver.is_direct else time

    best = min(fitting, key=seconds)
    return best, f"the cheapest that fits for {sizes.rows} rows, {sizes.features} features."


def sizes_of(system: WhitenedSystem, columns: int, many: bool = False) -> Sizes:
    """What costs are counted from."""
    covariance = system.covariance
    item, rows = torch.finfo(covariance.dtype).bits // 8, system.size("function")
    if covariance.features is None:
        # The kernel itself is not counted: whoever takes a product needs the matrix, too.
        product = Work(2 * rows**2, item * rows**2, 1)
        return Sizes(rows, 0, 1, columns, item, Work(), product, covariance.memory_budget, False)
    features = covariance.features
    rows = int(features.total(torch.tensor(rows, device=features.device)))
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
    weighted = covariance.weighted
    return Sizes(
        rows=rows,
        features=f,
        groups=weighted.variances.shape[0] if weighted.per_layer else 1,
        columns=columns,
        itemsize=item,
        gram=gram,
        product=product,
        budget=features.memory_budget,
        sharded=features.sharded,
        spectral=many and spectrum_serves(system),
    )
