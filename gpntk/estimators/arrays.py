"""Arrays as scikit-learn's users give them: inputs, labels and their weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import issparse
from torch import Tensor

from gpntk._checks import as_tensor, check_tensors
from gpntk.errors import InputError, KindError


def as_array(values: Any, name: str) -> Any:
    """A tensor as an array; what scikit-learn would take for numbers in silence is refused."""
    if isinstance(values, Tensor):
        check_tensors(**{name: values})
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    if issparse(values):
        raise KindError(f"{name} is a sparse matrix: give dense numbers, {name}.toarray().")
    if np.ma.is_masked(values):
        raise InputError(f"{name} is a masked array: leave the masked rows out, or give {name}.filled(value).")
    if isinstance(values, np.ndarray) and values.dtype.kind in "mM":
        raise InputError(f"{name} holds {values.dtype}: give numbers, as {name}.astype(float) does.")
    return values


@contextmanager
def refusing(name: str) -> Iterator[None]:
    """Within it, what scikit-learn refuses is an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        kind = KindError if isinstance(error, TypeError) else InputError
        raise kind(f"{name} does not pass scikit-learn's checks: {error}") from error


def weights_of(sample_weight: ArrayLike | None, rows: int) -> NDArray[Any] | None:
    """Weights of labels `[N]` as an array; None where all are alike one.

    Raises:
        InputError: They are not one for each row, negative, not finite, or all zero.
    """
    if sample_weight is None:
        return None
    weights = np.asarray(sample_weight, dtype=float)
    if weights.shape != (rows,):
        raise InputError(f"sample_weight has shape {weights.shape}, but y has {rows} rows: give one weight for each.")
    if not (np.isfinite(weights) & (weights >= 0)).all() or not weights.any():
        raise InputError("sample_weight has negative, infinite or NaN values, or zeros only: give finite weights.")
    return None if (weights == 1).all() else weights


def kept(weights: NDArray[Any] | None, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Rows of tensors whose labels count, and the weights of these: a label of weight zero is none."""
    if weights is None:
        return *tensors, None
    rows = torch.as_tensor(np.flatnonzero(weights))
    own: list[Any] = [None if tensor is None else tensor[rows.to(tensor.device)] for tensor in tensors]
    return *own, as_tensor(weights[weights > 0], "sample_weight").to(own[0])
