"""Which of a module's parameters are differentiated, and which layer each belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from gpntk._types import ParameterSelection
from gpntk.errors import SelectionError


def layer_name(parameter_name: str) -> str:
    """Name of the layer that owns a parameter; a parametrised weight belongs to the layer it parametrises."""
    layer, parametrised, _ = f".{parameter_name}".partition(".parametrizations.")
    return (layer if parametrised else layer.rpartition(".")[0]).removeprefix(".")


def readout_name(module: nn.Module) -> str:
    """The last registered layer that owns parameters; `FrozenNetwork` checks that it is also the last to run."""
    return [layer_name(name) for name, _ in module.named_parameters()][-1]


def select_parameters(
    module: nn.Module, named: Mapping[str, nn.Parameter], selection: ParameterSelection
) -> tuple[str, ...]:
    """Names of the selected parameters, in the module's order.

    Raises:
        SelectionError: A glob or predicate that matches nothing; the message lists the names there are.
    """
    if selection is None:
        return tuple(named)
    if callable(selection):
        chosen = tuple(name for name, parameter in named.items() if selection(name, parameter))
        if not chosen:
            raise SelectionError(f"parameters= selected none of the network's parameters: {_listing(named)}.")
        return chosen
    if selection == "readout":
        readout = readout_name(module)
        return tuple(name for name in named if layer_name(name) == readout)
    if not isinstance(selection, (str, Sequence)):
        raise SelectionError(f"parameters={selection!r}: pass None, a glob, a list of globs, 'readout' or a predicate.")
    globs = [selection] if isinstance(selection, str) else list(selection)
    if not all(isinstance(glob, str) for glob in globs):
        raise SelectionError(f"parameters={selection!r}: give globs over the names of parameters, which are text.")
    if not globs:
        raise SelectionError("parameters=[] selects nothing: pass None for all parameters, or at least one glob.")
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in named):
            raise SelectionError(f"parameters={glob!r} matches none of the network's parameters: {_listing(named)}.")
    return tuple(name for name in named if any(fnmatchcase(name, glob) for glob in globs))


def select_groups(names: Sequence[str], groups: Mapping[str, str | Sequence[str]]) -> dict[str, list[str]]:
    """The parameters of every group, chosen by glob(s) over their names; the last group that matches one has it.

    Raises:
        SelectionError: A group is empty, or a parameter is in none.
    """
    if not isinstance(groups, Mapping) or not groups:
        raise SelectionError(f"prior_groups={groups!r} must be a mapping, such as {{'body': '*', 'head': 'fc.*'}}.")
    owner: dict[str, str] = {}
    for group, given in groups.items():
        globs = [given] if isinstance(given, str) else given
        if not isinstance(globs, Sequence) or not all(isinstance(glob, str) for glob in globs):
            raise SelectionError(f"prior_groups[{group!r}]={given!r}: give glob(s) over the names of parameters.")
        matched = [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]
        if not matched:
            raise SelectionError(f"prior_groups[{group!r}]={given!r} matches none of {_listing(dict.fromkeys(names))}.")
        owner |= dict.fromkeys(matched, str(group))
    chosen = {str(group): [name for name in names if owner.get(name) == str(group)] for group in groups}
    left = [name for name in names if name not in owner]
    if left:
        raise SelectionError(
            f"prior_groups has no group for {_listing(dict.fromkeys(left))}: add one, or put a group of '*' first; a "
            "parameter belongs to the last group that matches it."
        )
    for group, members in chosen.items():
        if not members:
            raise SelectionError(f"prior_groups[{group!r}] is left empty by the groups after it: put it after them.")
    return chosen


def _listing(named: Mapping[str, Any], most: int = 12) -> str:
    names = list(named)
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")
