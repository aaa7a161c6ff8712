"""Checks of arguments, made once at a public entry; inside, code trusts them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from gpntk.errors import InputError, KeywordError

# Words at least so similar are taken for misspellings: W_std for weight_std.
_SIMILAR = 0.5
# Powers of the largest and smallest numbers whose squares, and some more, can still be represented.
_SQUARED = 0.45


def check_keywords(owner: type, given: Iterable[str], others: Collection[str] = ()) -> None:
    """Raise `InputError` for a keyword that ``owner`` does not take, with the name that is spelled most like it.

    Args:
        owner: The class whose constructor collects unknown keywords in ``**kwargs``.
        given: The names in ``kwargs``.
        others: Those that are passed on to a host.
    """
    unknown = [name for name in given if name not in others]
    if not unknown:
        return
    own = [
        p.name for p in inspect.signature(owner).parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    known = {name.casefold(): name for name in (*own, *others)}
    near = get_close_matches(unknown[0].casefold(), known, 1, _SIMILAR)
    advice = f"did you mean {known[near[0]]!r}?" if near else f"it takes {', '.join(known.values())}."
    raise KeywordError(f"{owner.__name__} has no argument {unknown[0]!r}: {advice}")


def check_memory_budget(memory_budget: float | None) -> int | None:
    """The budget in whole bytes, None for the default; raise `InputError` unless it is at least one."""
    if memory_budget is None:
        return None
    if not is_number(memory_budget) or not 1 <= memory_budget < math.inf:
        raise InputError(
            f"memory_budget={memory_budget}: must be a positive number of bytes, or None for a quarter of the memory."
        )
    return int(memory_budget)


def check_count(least: int = 1, **counts: Any) -> None:
    """Raise `InputError` unless every argument, by name, is a whole number and at least ``least``."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise InputError(f"{name}={value}: give a whole number, at least {least}.")


def check_positive(below: float = math.inf, **numbers: Any) -> None:
    """Raise `InputError` unless every argument, by name, is a number above zero and ``below`` a limit."""
    for name, value in numbers.items():
        if not is_number(value) or not 0 < value < below:
            limit = "" if below == math.inf else f" below {below:g}"
            raise InputError(f"{name}={value!r}: give a positive number{limit}.")


def check_flags(**flags: Any) -> None:
    """Raise `InputError` unless every argument, by name, is True or False."""
    for name, value in flags.items():
        if not isinstance(value, (bool, np.bool_)):
            raise InputError(f"{name}={value!r}: give True or False.")


def as_shape(input_shape: Any) -> tuple[int, ...]:
    """The shape of one input as whole numbers; raise `InputError` unless they are, and at least one."""
    if isinstance(input_shape, (str, bytes, Mapping)) or not isinstance(input_shape, Iterable):
        raise InputError(f"input_shape={input_shape!r} must be a sequence: pass (3, 32, 32), say, or (5,).")
    sizes = tuple(input_shape)
    if any(isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1 for size in sizes):
        raise InputError(f"input_shape={sizes}: give whole numbers, at least 1.")
    return tuple(map(int, sizes))


def is_number(value: Any) -> bool:
    """Whether it is a real number; to Python, a truth value is one too."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_tensors(**tensors: Any) -> None:
    """Raise `InputError` unless every argument, by name, is a tensor or None."""
    for name, value in tensors.items():
        if value is not None and not isinstance(value, Tensor):
            raise InputError(f"{name} is a {type(value).__name__}: pass a tensor, torch.as_tensor({name}) say.")


def check_input(x: Tensor, device: torch.device, name: str = "x") -> None:
    """Raise `InputError` unless ``x`` is a finite, real floating `[..., N, D]` tensor on ``device``."""
    check_tensors(**{name: x})
    if x.dim() < 2:
        raise InputError(f"{name} must be [..., N, D], got shape {tuple(x.shape)}: add the row dimension.")
    if not x.dtype.is_floating_point:
        raise InputError(
            f"{name} must be floating point, got {x.dtype}: pass {name}.float() or {name}.double(), and let a network "
            "that needs integers (token ids, say) cast its own input."
        )
    if forward_ad.unpack_dual(x).tangent is not None:
        raise InputError(f"{name} carries a forward-mode tangent; kernels are differentiable in reverse mode only.")
    if x.device != device:
        raise InputError(
            f"{name} is on {x.device} but the network's frozen weights are on {device}: move the kernel with "
            f"kernel.to({str(x.device)!r}), or move {name}."
        )
    _check_finite(x.detach(), name)


def _check_finite(x: Tensor, name: str) -> None:
    # The sum needs no memory, and is finite unless an entry is not (or the sum overflows: then the entries decide).
    if bool(x.sum().isfinite()) or bool(x.isfinite().all()):
        return
    rows = (~x.isfinite()).any(-1)
    raise InputError(
        f"{name} contains NaN or infinite values in {int(rows.sum())} of {rows.numel()} rows, the first at index "
        f"{tuple(rows.nonzero()[0].tolist())}: leave these rows out or fill them in."
    )


def check_magnitude(y: Tensor, name: str = "y") -> None:
    """Raise `InputError` where squares of ``y`` would overflow or vanish in its precision; NaN does not count."""
    largest = y.detach()[y.isfinite()].abs().max().item() if bool(y.isfinite().any()) else 0.0
    limits = torch.finfo(y.dtype)
    if largest and not limits.tiny**_SQUARED < largest < limits.max**_SQUARED:
        raise InputError(
            f"{name} has values of {largest:.1e}, whose squares {y.dtype} cannot hold: give {name} in other units."
        )


def as_tensor(array: Any, name: str = "x") -> Tensor:
    """A copy of a tensor or array on the CPU; a NumPy array may have any strides, byte order and float type.

    Example:
        >>> import numpy as np
        >>> as_tensor(np.arange(3, dtype=">f8")[::-1])
        tensor([2., 1., 0.], dtype=torch.float64)

    Args:
        array: A tensor, or whatever ``numpy.asarray`` takes.
        name: What error messages call it.

    Raises:
        InputError: It does not hold numbers.
    """
    if isinstance(array, Tensor):
        return array.detach().cpu().clone()
    array = np.asarray(array)
    if array.dtype.kind == "c":
        raise InputError(f"{name} is an array of {array.dtype}: give real numbers.")
    # torch knows no floats of more than eight bytes, and none of the other byte order.
    dtype = np.dtype(np.float64) if array.dtype == np.longdouble else array.dtype.newbyteorder("=")
    try:
        return torch.from_numpy(np.array(array, dtype=dtype, order="C"))
    except TypeError:
        raise InputError(f"{name} is an array of {array.dtype}: give numbers, as {name}.astype(float) does.") from None
