"""Finding the uses of parameters: three runs of the network on a few rows, compared call by call.

Between a run on two rows and one on three, the axis that grows is the axis of rows; what does not grow and depends on
a parameter is computed from parameters alone. Everything else a parameter is used for has no rule, and is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from gpntk.errors import InputError, NetworkError
from gpntk.jacobians.rules import ElementwiseRule, LinearRule, bind
from gpntk.jacobians.rules.elementwise import COPY
from gpntk.jacobians.sites import Operand, RowAxis, Site, Use
from gpntk.jacobians.tape import Call, Tape, storages
from gpntk.network import FrozenNetwork

T = TypeVar("T")

_PICKS = {
    torch.index_select,
    Tensor.index_select,
    torch.gather,
    Tensor.gather,
    torch.take_along_dim,
    Tensor.take_along_dim,
    torch.scatter,
    Tensor.scatter,
    torch.index_add,
    Tensor.index_add,
}
_READ_FOR_SHAPE = {Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as}


@dataclass(frozen=True)
class Plan:
    """The sites of a network, by the number of the call.

    Attributes:
        sites: Where parameters are used by functions with a rule.
        preludes: Calls that compute something from parameters alone.
        functions: The name of every call's function.
        unruled: Parameters used in any other way, each with the reason.
        activations: Values that one row's forward pass computes.
        largest: Values in the largest tensor of one row.
    """

    sites: dict[int, Site]
    preludes: frozenset[int]
    functions: tuple[str, ...]
    unruled: dict[str, str]
    activations: int
    largest: int


class _Origin(NamedTuple):
    """A tensor that depends on parameters alone."""

    names: frozenset[str]
    parameter: Tensor | None
    """The one parameter that it may be a view of."""


def make_plan(network: FrozenNetwork, x: Tensor) -> Plan:
    """The plan for the selected parameters of ``network``, from some rows of x `[N, D]`.

    Raises:
        NetworkError: The calls depend on the number of rows.
    """
    rows = sample_rows(x, 4)
    parameters = {name: t.detach().requires_grad_() for name, t in network.selected(x.dtype, x.device).items()}
    two, other, three = (_tape(network, rows[list(chosen)], parameters) for chosen in ((0, 1), (3, 1), (0, 1, 2)))
    if not [c.function for c in two] == [c.function for c in other] == [c.function for c in three]:
        raise NetworkError("the network runs other operations for other rows of x, or another number of them.")
    if any(_reorders_rows(call, depends) for call, depends in zip(two, _dependent(two), strict=True)):
        raise NetworkError("the network reorders the rows of x by their values.")
    sites, preludes, unruled = _find(parameters, two, other, three)
    _drop_unruled(sites, unruled)
    _number(sites)
    fresh = storages(two)
    return Plan(
        {index: site for index, site in sites.items() if site.uses},
        frozenset(preludes),
        tuple(function_name(call.function) for call in two),
        unruled,
        activations=sum(fresh) // 2,
        largest=max(fresh, default=0) // 2,
    )


def sample_rows(x: Tensor, count: int) -> Tensor:
    """Four to ``count`` finite rows of x `[N, D]` from all over it, shuffled; perturbed ones where x has too few."""
    x = x[x.isfinite().all(-1)]
    if not len(x):
        raise InputError("x has no row without NaN or infinite values.")
    generator = torch.Generator("cpu").manual_seed(0)
    chosen = x[torch.randperm(x.shape[0], generator=generator, device="cpu")[: max(4, count)].to(x.device)]
    perturbed = [chosen[:1] * 0.9**k + 0.1 * k for k in range(1, 5 - len(chosen))]
    return torch.cat([chosen, *perturbed])


def _tape(network: FrozenNetwork, rows: Tensor, parameters: dict[str, Tensor]) -> list[Call]:
    with torch.enable_grad(), Tape() as tape:
        network(rows, parameters)
    return tape.calls


def _find(
    parameters: dict[str, Tensor], two: list[Call], other: list[Call], three: list[Call]
) -> tuple[dict[int, Site], set[int], dict[str, str]]:
    origins = {id(tensor): _Origin(frozenset([name]), tensor) for name, tensor in parameters.items()}
    sites: dict[int, Site] = {}
    preludes: set[int] = set()
    unruled: dict[str, str] = {}
    for index, (call, changed, longer) in enumerate(zip(two, other, three, strict=True)):
        used = operand_slots(call.function, call.leaves, origins)
        if not used:
            continue
        if all(map(torch.equal, call.values, changed.values)) and all(map(_same, call.values, longer.values)):
            preludes.add(index)
            names = frozenset[str]().union(*(origin.names for _, origin in used))
            parameter = used[0][1].parameter if len(used) == 1 else None
            origins |= {id(out): _Origin(names, parameter) for out in call.outputs if out.requires_grad}
            continue
        site = _site(call, changed, longer, used)
        accounted = {operand.slot for use in site.uses for operand in use.operands.values()} if site else set()
        for slot, origin in used:
            if slot not in accounted:
                reason = f"it is used by {function_name(call.function)} in a way that has no rule"
                unruled |= {name: reason for name in origin.names if name not in unruled}
        if site:
            sites[index] = site
    return sites, preludes, unruled


def _same(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and torch.equal(one, two)


def _dependent(calls: list[Call]) -> list[set[int]]:
    """For every call, the arguments that depend on x, by their ids."""
    dependent = {id(leaf) for leaf in calls[0].leaves if isinstance(leaf, Tensor)} if calls else set()
    found = []
    for call in calls:
        arguments = {id(leaf) for leaf in call.leaves if isinstance(leaf, Tensor)} & dependent
        found.append(arguments)
        if arguments:
            dependent |= {id(out) for out in call.outputs}
    return found


def _reorders_rows(call: Call, dependent: set[int]) -> bool:
    """Whether a call picks along the first axis by an index that depends on x; rows checked may not show it."""
    if call.function is Tensor.__getitem__:
        index = call.args[1][0] if isinstance(call.args[1], tuple) and call.args[1] else call.args[1]
        return isinstance(index, Tensor) and id(index) in dependent and id(call.args[0]) in dependent
    if call.function in _PICKS:
        dim = call.kwargs.get("dim", next((leaf for leaf in call.args[1:] if isinstance(leaf, int)), None))
        index = [leaf for leaf in call.leaves[1:] if isinstance(leaf, Tensor) and not leaf.is_floating_point()]
        return dim == 0 and any(id(tensor) in dependent for tensor in index)
    return False


def _drop_unruled(sites: dict[int, Site], unruled: dict[str, str]) -> None:
    """Take every use of an unruled parameter out, and with it those that it is computed together with."""
    while True:
        before = len(unruled)
        for index, site in sites.items():
            for use in site.uses:
                for operand in use.operands.values():
                    if operand.names & unruled.keys():
                        reason = f"it is combined with {min(operand.names & unruled.keys())!r}, which has no rule"
                        unruled |= {name: reason for name in operand.names if name not in unruled}
            uses = [_ruled(use, unruled) for use in site.uses]
            sites[index] = site._replace(uses=tuple(use for use in uses if use is not None))
        if len(unruled) == before:
            return


def _number(sites: dict[int, Site]) -> None:
    count = 0
    for index, site in sites.items():
        sites[index] = site._replace(uses=tuple(replace(use, number=count + i) for i, use in enumerate(site.uses)))
        count += len(site.uses)


def _ruled(use: Use, unruled: dict[str, str]) -> Use | None:
    dropped = {own for own, operand in use.operands.items() if operand.names & unruled.keys()}
    if len(dropped) == len(use.operands):
        return None
    kept = {own: operand for own, operand in use.operands.items() if own not in dropped}
    return replace(use, rule=use.rule.without(dropped), operands=kept)


def operand_slots(function: Callable[..., Any], leaves: list[Any], origins: Mapping[int, T]) -> list[tuple[int, T]]:
    """The arguments that depend on parameters alone, with what is known of them; not those read for their shape."""
    first = 1 if function in _READ_FOR_SHAPE else len(leaves)
    return [(slot, origins[id(leaf)]) for slot, leaf in enumerate(leaves[:first]) if id(leaf) in origins]


def _site(call: Call, changed: Call, longer: Call, used: list[tuple[int, _Origin]]) -> Site | None:
    """How a call uses parameters, or None where no rule says."""
    binding = bind(call.function, call.args, call.kwargs)
    rows = _row_axis(call, changed, longer)
    if binding is None or rows is None or len(call.outputs) != 1:
        return None
    dims = call.outputs[0].dim()
    origins = dict(used)
    slots = {own: _slot(call.leaves, tensor, origins) for own, tensor in binding.operands.items()}
    if isinstance(binding.rule, ElementwiseRule):
        uses = [
            _copied(call.leaves[slot], slot, origins[slot], rows, dims) for slot in slots.values() if slot in origins
        ]
        return Site(call.function, tuple(use for use in uses if use is not None), binding.function)
    input_slot = next(slot for slot, leaf in enumerate(call.leaves) if leaf is binding.input)
    if not binding.rule.takes_rows(rows.axis, dims) or call.leaves[input_slot].shape[rows.axis] != 2 * rows.copies:
        return None
    operands = {own: _operand(call.leaves[slot], slot, origins[slot]) for own, slot in slots.items() if slot in origins}
    rule = binding.rule.without(set(slots) - set(operands))
    if isinstance(rule, LinearRule) and "weight" in operands and not operands["weight"].direct:
        weight, origin = call.leaves[slots["weight"]], origins[slots["weight"]]
        if _is_view(weight.mT, origin.parameter):
            # x @ W.T with W a parameter.
            rule = replace(rule, transposed=not rule.transposed)
            operands["weight"] = operands["weight"]._replace(direct=True, form=weight.mT.shape)
    return Site(call.function, (Use(rule, operands, rows, dims, input_slot),), None)


def _slot(leaves: list[Any], tensor: Tensor, origins: dict[int, _Origin]) -> int:
    return next((slot for slot, leaf in enumerate(leaves) if leaf is tensor and slot in origins), -1)


def _copied(tensor: Tensor, slot: int, origin: _Origin, rows: RowAxis, dims: int) -> Use | None:
    position = rows.axis - (dims - tensor.dim())
    if position >= 0 and tensor.shape[position] != 1:
        return None
    operand = _operand(tensor, slot, origin)
    if operand.direct and origin.parameter is not None:
        operand = operand._replace(form=origin.parameter.shape)
    return Use(ElementwiseRule((COPY,), tuple(operand.form)), {COPY: operand}, rows, dims, copied=True)


def _operand(tensor: Tensor, slot: int, origin: _Origin) -> Operand:
    return Operand(origin.names, _is_view(tensor, origin.parameter), slot, tensor.shape, tensor.shape)


def _is_view(tensor: Tensor, parameter: Tensor | None) -> bool:
    """Whether ``tensor`` is ``parameter``, or holds its numbers in the same order."""
    if parameter is None or tensor is parameter:
        return tensor is parameter
    same = tensor.data_ptr() == parameter.data_ptr() and tensor.numel() == parameter.numel()
    return same and tensor.is_contiguous() and parameter.is_contiguous()


def _row_axis(call: Call, changed: Call, longer: Call) -> RowAxis | None:
    """The axis that grows with the rows, from runs on rows (0, 1), (3, 1) and (0, 1, 2)."""
    shapes = call.outputs[0].shape, longer.outputs[0].shape
    if len(shapes[0]) != len(shapes[1]):
        return None
    axes = [axis for axis, (two, three) in enumerate(zip(*shapes, strict=True)) if two != three]
    if len(axes) != 1:
        return None
    (axis,) = axes
    copies, rest = divmod(shapes[0][axis], 2)
    if rest or shapes[1][axis] != 3 * copies:
        return None
    differs = (call.values[0] != changed.values[0]).movedim(axis, 0).reshape(2 * copies, -1).any(-1)
    # Entries of row 1 have not changed: the second half if rows are the slower index, every other one else.
    outer = copies == 1 or not bool(differs[copies:].any())
    if not outer and bool(differs[1::2].any()):
        return None
    return RowAxis(axis, copies, outer)


def function_name(function: Any) -> str:
    """A function's name; of a property such as ``Tensor.mT``, the property's."""
    name = getattr(function, "__name__", str(function))
    return getattr(getattr(function, "__self__", None), "__name__", name) if name == "__get__" else name
