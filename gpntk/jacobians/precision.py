"""Products in less than the precision of x, where asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from gpntk.memory import Lock

Precision = Literal["exact", "tf32", "bfloat16"]
"""``"exact"``: x's own. ``"tf32"``: float32 products on CUDA round their factors to 10 bits, an error of about 1e-3.
``"bfloat16"``: factors are kept in 7 bits and half the memory, an error of about 1e-2. Errors are relative to the
largest entry; sums are accumulated in float32."""

PRECISIONS = ("exact", "tf32", "bfloat16")
_SWITCH = Lock()


def rounded(tensor: Tensor, precision: Precision) -> Tensor:
    """A factor as it is kept: in bfloat16 where that is asked for, and unless it holds indices."""
    return tensor.bfloat16() if precision == "bfloat16" and tensor.is_floating_point() else tensor


@contextmanager
def arithmetic(precision: Precision) -> Iterator[None]:
    """float32 matrix products in TF32 where that is asked for: a switch of the process, so one thread at a time."""
    if precision != "tf32":
        yield
        return
    with _SWITCH:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
