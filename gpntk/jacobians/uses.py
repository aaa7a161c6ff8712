"""Which parameters a network uses where: every call of a torch function, recorded for a few rows of x.

A *use* is one call of a function that has a rule, on operands that are parameters or tensors computed from parameters
alone (a transposed or normalised weight, a slice of positional embeddings). `find_uses` runs the network three times.
Between a run on two rows and one on three, the axis that grows is the axis of rows; what does not grow and depends on a
parameter is computed from parameters alone. Everything else a parameter is used for has no rule, and is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from gpntk.errors import InputError, NetworkError
from gpntk.jacobians.record import Call, Recorder, storages
from gpntk.jacobians.rules import AbstractLayerRule, bind
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


class RowAxis(NamedTuple):
    """Which axis of a tensor holds the N rows of x.

    Attributes:
        axis: The axis, of length N * copies.
        copies: m, rows folded together with something else (times, windows, positions).
        outer: Whether the rows are the slower index of the two.
    """

    axis: int
    copies: int
    outer: bool

    def first(self, x: Tensor, leading: int = 0) -> Tensor:
        """x with its rows and copies in front, `[N, m, ...]`, after ``leading`` other dimensions."""
        x = x.movedim(self.axis + leading, leading)
        if self.outer:
            return x.unflatten(leading, (-1, self.copies))
        return x.unflatten(leading, (self.copies, -1)).transpose(leading, leading + 1)

    def spread(self, x: Tensor) -> Tensor:
        """x with one entry per row on the axis, as one per row and copy."""
        if self.copies == 1:
            return x
        if self.outer:
            return x.repeat_interleave(self.copies, self.axis)
        return torch.cat([x] * self.copies, self.axis)


class Operand(NamedTuple):
    """An argument that is a parameter, or is computed from parameters.

    Attributes:
        names: The parameters it depends on.
        direct: Whether it is the one parameter itself, reshaped at most.
        place: Its place among the flattened arguments of the call.
        shape: Its shape in the call; form: the shape in which the rule takes it.
    """

    names: frozenset[str]
    direct: bool
    place: int
    shape: torch.Size
    form: torch.Size


@dataclass(frozen=True)
class Use:
    """One use of operands.

    Attributes:
        rule: How products with it are computed.
        operands: The operands by the rule's own names.
        rows: Where the rows are in input and output (for copied operands: in the output, of ``dims`` dimensions).
        input_places: Places of the layer's inputs among the flattened arguments.
        copied: Whether every row gets a copy of the (only) operand, and the derivative is taken there.
        number: Tells the uses of a network apart.
    """

    rule: AbstractLayerRule
    operands: dict[str, Operand]
    rows: RowAxis
    dims: int
    input_places: tuple[int, ...] = ()
    copied: bool = False
    number: int = -1

    @property
    def names(self) -> frozenset[str]:
        """Names of the parameters that the call uses."""
        return frozenset[str]().union(*(operand.names for operand in self.operands.values()))

    @property
    def derived(self) -> bool:
        """Whether an operand is not simply a parameter."""
        return not all(operand.direct for operand in self.operands.values())


class UsingCall(NamedTuple):
    """A call that uses parameters; ``replacement`` is called in its stead, if not None."""

    function: Callable[..., Any]
    uses: tuple[Use, ...]
    replacement: Callable[..., Tensor] | None


@dataclass(frozen=True)
class Uses:
    """All uses of the selected parameters of a network.

    Attributes:
        calls: Where parameters are used by functions with a rule, by the number of the call.
        constant: Numbers of the calls that compute something from parameters alone.
        functions: The name of every call's function.
        unruled: Parameters used in any other way, each with the reason.
        tensors: The number of tensors that a forward pass makes, views and what it is given not counted.
        activations: Values that one row's forward pass computes.
        largest: Values in the largest tensor of one row.
    """

    calls: dict[int, UsingCall]
    constant: frozenset[int]
    functions: tuple[str, ...]
    unruled: dict[str, str]
    tensors: int
    activations: int
    largest: int


class _Known(NamedTuple):
    """What is known of a tensor that depends on parameters alone: which, and the one that it may be a view of."""

    names: frozenset[str]
    parameter: Tensor | None


def find_uses(network: FrozenNetwork, x: Tensor) -> Uses:
    """The uses of the selected parameters of ``network``, from some rows of x `[N, D]`.

    Raises:
        NetworkError: The calls depend on the number of rows, or on their values.
    """
    rows = sample_rows(x, 4)
    parameters = {name: t.detach().requires_grad_() for name, t in network.selected(x.dtype, x.device).items()}
    pair, others, triple = rows[[0, 1]], rows[[3, 1]], rows[[0, 1, 2]]
    two, other, three = (_record(network, some, parameters) for some in (pair, others, triple))
    if not [c.function for c in two] == [c.function for c in other] == [c.function for c in three]:
        raise NetworkError("the network runs other operations for other rows of x, or another number of them.")
    if any(_reorders_rows(call, depends) for call, depends in zip(two, _dependent(two, pair), strict=True)):
        raise NetworkError("the network reorders the rows of x by their values.")
    calls, constant, unruled = _find(parameters, two, other, three)
    _drop_unruled(calls, unruled)
    _number(calls)
    fresh = storages(two)
    return Uses(
        {index: call for index, call in calls.items() if call.uses},
        frozenset(constant),
        tuple(function_name(call.function) for call in two),
        unruled,
        tensors=len(fresh),
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


def operands_of(function: Callable[..., Any], leaves: list[Any], known: Mapping[int, T]) -> list[tuple[int, T]]:
    """Places of the arguments that depend on parameters alone, with what is known of them by id.

    Without those that are only read for their shape.
    """
    first = 1 if function in _READ_FOR_SHAPE else len(leaves)
    return [(place, known[id(leaf)]) for place, leaf in enumerate(leaves[:first]) if id(leaf) in known]


def function_name(function: Any) -> str:
    """A function's name; of a property such as ``Tensor.mT``, the property's."""
    name = getattr(function, "__name__", str(function))
    return getattr(getattr(function, "__self__", None), "__name__", name) if name == "__get__" else name


# --- private ---------------------------------------------------------------------------------------------------


def _record(network: FrozenNetwork, rows: Tensor, parameters: dict[str, Tensor]) -> list[Call]:
    with torch.enable_grad(), Recorder() as recorder:
        network(rows, parameters)
    return recorder.calls


def _find(
    parameters: dict[str, Tensor], two: list[Call], other: list[Call], three: list[Call]
) -> tuple[dict[int, UsingCall], set[int], dict[str, str]]:
    known = {id(tensor): _Known(frozenset([name]), tensor) for name, tensor in parameters.items()}
    calls: dict[int, UsingCall] = {}
    constant: set[int] = set()
    unruled: dict[str, str] = {}
    for index, (call, changed, longer) in enumerate(zip(two, other, three, strict=True)):
        used = operands_of(call.function, call.leaves, known)
        if not used:
            continue
        if all(map(torch.equal, call.values, changed.values)) and all(map(_same, call.values, longer.values)):
            constant.add(index)
            names = frozenset[str]().union(*(some.names for _, some in used))
            parameter = used[0][1].parameter if len(used) == 1 else None
            known |= {id(out): _Known(names, parameter) for out in call.outputs if out.requires_grad}
            continue
        using = _using_call(call, changed, longer, dict(used))
        accounted = {operand.place for use in using.uses for operand in use.operands.values()} if using else set()
        for place, some in used:
            if place not in accounted:
                reason = f"it is used by {function_name(call.function)} in a way that has no rule"
                unruled |= {name: reason for name in some.names if name not in unruled}
        if using:
            calls[index] = using
    return calls, constant, unruled


def _same(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and torch.equal(one, two)


def _dependent(calls: list[Call], x: Tensor) -> list[set[int]]:
    """For every call, the arguments that depend on x, by their ids."""
    dependent = {id(x)}
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


def _drop_unruled(calls: dict[int, UsingCall], unruled: dict[str, str]) -> None:
    """Take every use of an unruled parameter out, and with it those that it is computed together with."""
    while True:
        before = len(unruled)
        for index, call in calls.items():
            for operand in (operand for use in call.uses for operand in use.operands.values()):
                if operand.names & unruled.keys():
                    reason = f"it is combined with {min(operand.names & unruled.keys())!r}, which has no rule"
                    unruled |= {name: reason for name in operand.names if name not in unruled}
            uses = [_ruled(use, unruled) for use in call.uses]
            calls[index] = call._replace(uses=tuple(use for use in uses if use is not None))
        if len(unruled) == before:
            return


def _number(calls: dict[int, UsingCall]) -> None:
    count = 0
    for index, call in calls.items():
        calls[index] = call._replace(uses=tuple(replace(use, number=count + i) for i, use in enumerate(call.uses)))
        count += len(call.uses)


def _ruled(use: Use, unruled: dict[str, str]) -> Use | None:
    kept = {own: operand for own, operand in use.operands.items() if not operand.names & unruled.keys()}
    return replace(use, rule=_restricted(use.rule, kept), operands=kept) if kept else None


def _restricted(rule: AbstractLayerRule, operands: Mapping[str, Operand]) -> AbstractLayerRule:
    """The rule that differentiates these parameters only."""
    return replace(rule, own=tuple(own for own in rule.own if own in operands))


def _using_call(call: Call, changed: Call, longer: Call, known: dict[int, _Known]) -> UsingCall | None:
    """How a call uses parameters, or None where no rule says."""
    binding = bind(call.function, call.args, call.kwargs)
    rows = _row_axis(call, changed, longer)
    if binding is None or rows is None or len(call.outputs) != 1:
        return None
    dims = call.outputs[0].dim()
    places = {own: _place(call.leaves, tensor, known) for own, tensor in binding.operands.items()}
    places = {own: place for own, place in places.items() if place in known}
    if binding.copied:
        operands = [(_operand(call.leaves[place], place, known[place]), known[place]) for place in places.values()]
        uses = [_copied(binding.rule, operand, some.parameter, rows, dims) for operand, some in operands]
        return UsingCall(call.function, tuple(use for use in uses if use is not None), binding.function)
    inputs = [next(place for place, leaf in enumerate(call.leaves) if leaf is tensor) for tensor in binding.inputs]
    possible = rows.axis == 0 if binding.first_axis else rows.axis < dims - 1
    if not possible or any(call.leaves[place].shape[rows.axis] != 2 * rows.copies for place in inputs):
        return None
    operands = {own: _operand(call.leaves[place], place, known[place]) for own, place in places.items()}
    rule = binding.rule
    if binding.mirrored is not None and "weight" in operands and not operands["weight"].direct:
        weight, parameter = call.leaves[places["weight"]], known[places["weight"]].parameter
        if _is_view(weight.mT, parameter):
            rule = binding.mirrored
            operands["weight"] = operands["weight"]._replace(direct=True, form=weight.mT.shape)
    use = Use(_restricted(rule, operands), operands, rows, dims, tuple(inputs))
    return UsingCall(call.function, (use,), binding.function)


def _place(leaves: list[Any], tensor: Tensor, known: Mapping[int, _Known]) -> int:
    return next((place for place, leaf in enumerate(leaves) if leaf is tensor and place in known), -1)


def _copied(
    rule: AbstractLayerRule, operand: Operand, parameter: Tensor | None, rows: RowAxis, dims: int
) -> Use | None:
    position = rows.axis - (dims - len(operand.shape))
    if position >= 0 and operand.shape[position] != 1:
        return None
    if operand.direct and parameter is not None:
        operand = operand._replace(form=parameter.shape)
    return Use(rule, {rule.own[0]: operand}, rows, dims, copied=True)


def _operand(tensor: Tensor, place: int, known: _Known) -> Operand:
    return Operand(known.names, _is_view(tensor, known.parameter), place, tensor.shape, tensor.shape)


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
