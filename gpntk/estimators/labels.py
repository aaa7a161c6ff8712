"""Which label stands for which of the network's outputs: decided by what was said, or refused, never guessed.

1. Labels that are the numbers of outputs, or that ``classes=`` names, keep the network's readout.
2. Any other labels need a new one, which ``new_head=True`` asks for and another number of classes implies.
"""

from __future__ import annotations

import warnings
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpntk.errors import InputError

# Labels that are listed in a message.
_LISTED = 10


def class_names(
    y: NDArray[Any], outputs: int, *, classes: ArrayLike | None, num_classes: int | None, new_head: bool
) -> NDArray[Any]:
    """The classes in the order of the model's outputs `[K]`; K tells whether the network's readout is kept.

    Args:
        y: Labels `[N]`.
        outputs: C of the network; one logit stands for two classes.
        classes: Names in the order of the outputs, or None.
        num_classes: K, or None.
        new_head: Whether a new readout was asked for.

    Raises:
        InputError: y does not say which class is which output, or contradicts what was said.

    Example:
        >>> class_names(np.array([2, 0]), 4, classes=None, num_classes=None, new_head=False)
        array([0, 1, 2, 3])
    """
    own, seen = max(2, outputs), np.unique(y)
    _check_count(num_classes, len(seen), classes)
    if classes is not None:
        names = _given(classes, y)
    elif num_classes is not None:
        names = _numbers(y, seen, num_classes)
        if names is None and len(seen) == num_classes and (new_head or num_classes != own):
            names = seen
        if names is None:
            raise InputError(
                f"y has classes {_listing(seen)}, but num_classes={num_classes}: give labels as integers from 0 to "
                f"{num_classes - 1}, or classes= with a name for each output, in their order."
            )
    elif new_head:
        if len(seen) < 2:
            raise InputError(f"y has one class only, {seen[0]}: give labels of at least two, or num_classes.")
        names = seen
    else:
        names = _own(y, seen, own)
    if len(names) != own and not new_head:
        warnings.warn(
            f"there are {len(names)} classes, but the network has {outputs} output(s): its readout is replaced by a "
            f"new one of {len(names)} outputs. new_head=True says so without this warning.",
            stacklevel=4,
        )
    return names


def check_vector(y: Any) -> None:
    """Raise `InputError` where y has a row of numbers for each input: one-hot labels, or probabilities."""
    shape = np.asarray(y).shape
    if len(shape) > 1 and shape[1] != 1:
        raise InputError(
            f"y has shape {shape}: give one class for each input. Of one-hot rows or probabilities that is y.argmax(1)."
        )


def positions(y: NDArray[Any], classes: NDArray[Any], said: str) -> NDArray[Any]:
    """Where each of y `[N]` is in the sorted ``classes``.

    Raises:
        InputError: It is not there, as ``said`` tells.
    """
    alike = (y.dtype.kind in "biuf") == (classes.dtype.kind in "biuf")
    unknown = np.setdiff1d(y, classes) if alike else np.unique(y)
    if len(unknown):
        raise InputError(f"y has classes {_listing(unknown)}, which {said}: {classes.tolist()}.")
    return np.searchsorted(classes, y)


# --- private -------------------------------------------------------------------------------------------------------


def _check_count(num_classes: int | None, seen: int, classes: ArrayLike | None) -> None:
    if num_classes is None:
        return
    if not isinstance(num_classes, Integral):
        raise InputError(f"num_classes={num_classes!r}: give an integer.")
    if num_classes < 2:
        raise InputError(f"num_classes={num_classes}: a classification needs at least 2 classes.")
    if classes is not None and num_classes != (given := np.size(np.asarray(classes))):
        raise InputError(f"num_classes={num_classes}, but classes= has {given}: give one of the two.")
    if seen > num_classes:
        raise InputError(f"y has {seen} classes, more than num_classes={num_classes}.")


def _given(classes: ArrayLike, y: NDArray[Any]) -> NDArray[Any]:
    names = np.asarray(classes)
    if names.ndim != 1 or len(names) < 2:
        raise InputError(f"classes={classes!r}: give a list of at least two, in the order of the network's outputs.")
    distinct = np.unique(names)
    if len(distinct) < len(names):
        raise InputError(f"classes={names.tolist()} has a class twice: give one for each output.")
    positions(y, distinct, "classes= does not have")
    return names


def _numbers(y: NDArray[Any], seen: NDArray[Any], count: int) -> NDArray[Any] | None:
    """0, 1, ..., as y has them, or False and True; None if y has other labels."""
    if y.dtype.kind == "b":
        return np.array([False, True]) if count == 2 else None
    if y.dtype.kind not in "iuf" or not np.isin(seen, np.arange(count)).all():
        return None
    return np.arange(count, dtype=y.dtype if np.can_cast(np.min_scalar_type(count - 1), y.dtype) else int)


def _own(y: NDArray[Any], seen: NDArray[Any], own: int) -> NDArray[Any]:
    """The network's outputs, where labels are their numbers."""
    names = _numbers(y, seen, own)
    if names is None:
        raise InputError(
            f"y has classes {_listing(seen)}, but the network's outputs are taken for classes 0 to {own - 1}. Say what "
            "labels mean: new_head=True if they are others than the network's; classes=[...] with a name for each "
            "output, in their order; or num_classes=K for integers from 0 to K - 1."
        )
    last = int(seen.max())
    if 2 * (last + 1) < own:
        warnings.warn(
            f"labels 0 to {last} are taken for the first {last + 1} of the network's {own} outputs. If they mean "
            f"others, say new_head=True; num_classes={own} says that they do not, without this warning.",
            stacklevel=5,
        )
    return names


def _listing(values: NDArray[Any]) -> str:
    more = f" and {len(values) - _LISTED} more" if len(values) > _LISTED else ""
    return f"{values[:_LISTED].tolist()}{more}"
