"""Whether the choices that a transfer is given exist, and go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real

from gpytorch.kernels import Kernel

from gpntk.errors import InputError


def check_choices(
    *,
    likelihood: str,
    kernel: str | Kernel,
    mean: str,
    stationary: str,
    stationary_inputs: str | None,
    hyperparameters: object,
    new_head: bool,
    time_budget: float,
) -> None:
    """Raise `InputError` for a choice that does not exist, or does not go with a new head."""
    _check("likelihood", likelihood, ("gaussian", "categorical", "dirichlet"))
    _check("stationary", stationary, ("rbf", "matern"))
    if stationary_inputs is not None:
        _check("stationary_inputs", stationary_inputs, ("inputs", "features"))
    if not isinstance(hyperparameters, Mapping):
        _check("hyperparameters", str(hyperparameters), ("auto", "average", "maximum"))
    if not isinstance(kernel, Kernel):
        _check("kernel", kernel, ("auto", "ntk", "nngp", "ntk+stationary", "stationary"))
    _check("mean", mean, ("auto", "network", "constant", "zero"))
    if not (isinstance(time_budget, Real) and time_budget > 0):
        raise InputError(f"time_budget={time_budget!r}: give a positive number of seconds.")
    if new_head and mean == "network":
        raise InputError("mean='network' has no meaning for a new head: use mean='constant' or 'zero'.")


def _check(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise InputError(f"{name}={value!r}: choose one of {listed}.")
