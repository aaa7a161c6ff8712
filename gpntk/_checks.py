"""Checks of arguments, made once at a public entry; inside, code trusts them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from gpntk.errors import InputError, KeywordError, KindError

# Words at least so similar are taken for misspellings: W_std for weight_std.
_SIMILAR = 0.5
# Powers of the largest and smallest numbers whose squares, and some more, can still be represented.
_SQUARED = 0.45
# Bytes of the smallest numbers that torch computes with.
_HALF = 2
# What tensors may be instead of numbers in memory, and the way out.
_PLAIN: tuple[tuple[Callable[[Tensor], bool], str, str], ...] = (
    (
        lambda x: x.is_nested,
        "of parts of different sizes",
        "one whose rows are alike, {name}.to_padded_tensor(0.0) say",
    ),
    (lambda x: x.layout != torch.strided, "in a sparse layout", "{name}.to_dense()"),
    (lambda x: x.is_quantized, "of quantized numbers", "{name}.dequantize()"),
    (lambda x: x.is_meta, "on the meta device, which holds no numbers", "one with values, on a real device"),
)


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


def check_not_negative(below: float = math.inf, **numbers: Any) -> None:
    """Raise `InputError` unless every argument, by name, is a number of at least zero and ``below`` a limit."""
    for name, value in numbers.items():
        if not is_number(value) or not 0 <= value < below:
            limit = "finite" if below == math.inf else f"below {below:g}"
            raise InputError(f"{name}={value!r}: give a number that is at least zero and {limit}.")


def check_choice(choices: Iterable[str], **words: Any) -> None:
    """Raise `InputError` unless every argument, by name, is one of the ``choices``."""
    for name, value in words.items():
        if not isinstance(value, str) or value not in choices:
            raise InputError(f"{name}={value!r}: choose one of {', '.join(map(repr, choices))}.")


def check_kinds(kind: Any, advice: str = "", **values: Any) -> None:
    """Raise `InputError` unless every argument, by name, is a ``kind``; ``advice`` says how to come by one."""
    for name, value in values.items():
        if not isinstance(value, kind):
            given = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
            raise KindError(f"{name} is {given}: give {advice or f'a {kind.__name__}'}.")


def check_functions(**functions: Any) -> None:
    """Raise `InputError` unless every argument, by name, can be called."""
    for name, value in functions.items():
        if not callable(value):
            raise KindError(f"{name} is a {type(value).__name__}: give a function.")


def check_dtype(dtype: Any) -> None:
    """Raise `InputError` unless it is one of torch's real floating dtypes."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < _HALF:
        raise InputError(f"dtype={dtype!r}: choose torch.float64 or torch.float32.")


def check_device(device: Any) -> torch.device:
    """The device that is meant; raise `InputError` if there is none of that name."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"device={device!r}: give a torch.device or its name, 'cpu' or 'cuda:0' say.") from None


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
    """Raise `InputError` unless every argument, by name, is a tensor of plain numbers that are there."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise KindError(f"{name} is a {type(value).__name__}: pass a tensor, torch.as_tensor({name}) say.")
        for wrong, what, advice in _PLAIN:
            if wrong(value):
                raise InputError(f"{name} is a tensor {what}: pass {advice.format(name=name)}.")


def check_input(x: Tensor, device: torch.device, name: str = "x", columns: int | None = None) -> None:
    """Raise `InputError` unless ``x`` is a finite, real floating `[..., N, D]` tensor on ``device``.

    Args:
        x: To be checked.
        device: Where it must be.
        name: What error messages call it.
        columns: D, where it is known; x must then be a matrix.
    """
    if isinstance(x, Tensor) and x.device != device:
        raise InputError(
            f"{name} is on {x.device} but the network's frozen weights are on {device}: move the kernel with "
            f"kernel.to({str(x.device)!r}), or move {name}."
        )
    check_tensors(**{name: x})
    if x.dim() < 2:
        raise InputError(f"{name} must be [..., N, D], got shape {tuple(x.shape)}: add the row dimension.")
    if not x.dtype.is_floating_point or x.dtype.itemsize < _HALF:
        raise InputError(
            f"{name} must be floating point, got {x.dtype}: pass {name}.float() or {name}.double(), and let a "
            "network that needs integers (token ids, say) cast its own input."
        )
    if forward_ad.unpack_dual(x).tangent is not None:
        raise InputError(f"{name} carries a forward-mode tangent; kernels are differentiable in reverse mode only.")
    if columns is not None and (x.dim() != 2 or x.shape[1] != columns):
        raise InputError(
            f"{name} has shape {tuple(x.shape)}, but what it goes with is [N, {columns}]: give [M, {columns}]."
        )
    if not x.shape[-1]:
        raise InputError(f"{name} has shape {tuple(x.shape)}, rows without a number: give at least one column.")
    _check_finite(x.detach(), name)


def check_pair(x1: Any, x2: Any, active_dims: Tensor | None) -> None:
    """Raise `InputError` unless a kernel's host can read the columns of x1 and x2, None for x1."""
    x2 = x1 if x2 is None else x2
    # What is on the meta device is on another one than the kernel, which says so.
    check_tensors(**{name: x for name, x in (("x1", x1), ("x2", x2)) if not getattr(x, "is_meta", False)})
    widths = [x.shape[-1] if x.dim() > 1 else x.dim() for x in (x1, x2)]
    for name, x, width in zip(("x1", "x2"), (x1, x2), widths, strict=True):
        if not width or width != widths[0]:
            expected = f"[N, {widths[0]}] as x1" if width and widths[0] else "[N, D], D at least 1"
            raise InputError(f"{name} has shape {tuple(x.shape)}: give {expected}.")
        if active_dims is not None and int(active_dims.max()) >= width:
            raise InputError(
                f"active_dims has column {int(active_dims.max())}, but {name} has {width}: 0 is the first."
            )


def check_columns(active_dims: Any) -> None:
    """Raise `InputError` unless it is None, or distinct numbers of columns from 0."""
    if active_dims is None:
        return
    columns = active_dims.tolist() if isinstance(active_dims, Tensor) else active_dims
    whole = isinstance(columns, Sequence) and columns and all(isinstance(c, (int, np.integer)) for c in columns)
    if not whole or any(isinstance(c, bool) for c in columns) or min(columns) < 0 or len(set(columns)) < len(columns):
        raise InputError(f"active_dims={active_dims!r}: give the numbers of columns, (0, 2) say, each once.")


def check_values(device: torch.device, **values: Any) -> None:
    """Raise `InputError` unless every argument, by name, is a tensor of real numbers on ``device``."""
    check_tensors(**values)
    for name, value in values.items():
        if value.is_complex():
            raise InputError(f"{name} holds {value.dtype}: give real numbers.")
        if value.device != device:
            raise InputError(
                f"{name} is on {value.device}, but what it goes with is on {device}: pass {name}.to({str(device)!r})."
            )


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
        check_values(array.device, **{name: array})
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
