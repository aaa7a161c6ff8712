"""Attention that has a limit: scores divided by the width, not by its root, so that they become deterministic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, final

import torch
from torch import Tensor, nn

from gpntk.errors import SelectionError
from gpntk.infinite.moments import LayerMoments

Mechanism = Literal["softmax", "abs", "relu", "identity"]

_WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda scores: scores.softmax(-1),
    "abs": torch.abs,
    "relu": torch.relu,
    "identity": lambda scores: scores,
}


@final
class TiedAttention(nn.Module):
    """Every position's values as a mean over all positions, weighted by g(k kᵀ / d): queries are the keys.

    The widths d of keys k `[N, S, d]` and values v `[N, S, C]` may differ; both come from layers with weights. As they
    grow, k kᵀ / d becomes the NNGP of the keys, so that the limit of attention is a linear map of the values that
    depends on x alone. (With k kᵀ / √d, as usual, there is no closed form.)

    Args:
        mechanism: g: ``"softmax"`` over positions, or ``"abs"``, ``"relu"``, ``"identity"`` of every score.

    Raises:
        SelectionError: There is no such mechanism.

    Example:
        >>> import torch, gpntk
        >>> from gpntk.infinite import TiedAttention
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.key, self.value, self.out = (torch.nn.Linear(8, 8) for _ in range(3))
        ...         self.attention, self.head = TiedAttention(), torch.nn.Linear(8 * 5, 1)
        ...     def forward(self, x):
        ...         x = self.out(self.attention(self.key(x), self.value(x)))
        ...         return self.head(x.flatten(1))
        >>> gpntk.InfiniteNTKKernel(Block(), input_shape=(5, 8))(torch.randn(3, 40)).shape
        torch.Size([3, 3])

    References:
        Hron, Bahri, Sohl-Dickstein and Novak (2020), Infinite Attention, https://arxiv.org/abs/2006.10540, section 3.
    """

    def __init__(self, mechanism: Mechanism = "softmax") -> None:
        super().__init__()
        if mechanism not in _WEIGHTINGS:
            raise SelectionError(f"mechanism={mechanism!r}: choose one of {', '.join(_WEIGHTINGS)}.")
        self.mechanism: Mechanism = mechanism

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        """`[N, S, C]` for keys `[N, S, d]` and values `[N, S, C]`."""
        return _WEIGHTINGS[self.mechanism](keys @ keys.mT / keys.shape[-1]) @ values


def attend(keys: LayerMoments, values: LayerMoments, mechanism: Mechanism) -> LayerMoments:
    """k ← G₁ k G₂ᵀ, Θ ← G₁ Θ G₂ᵀ with G the weights of either input's positions; keys' own share of Θ vanishes."""
    assert keys.own is not None
    first, second = (_WEIGHTINGS[mechanism](scores) for scores in keys.own)
    return values.map(lambda block: first @ block @ second.mT, own=None)
