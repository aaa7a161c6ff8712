"""What a layer rule is, and which functions have one.

A rule knows a function that is affine in its parameters, s = L_a(w) for inputs a: the change of s with w and its
adjoint. With g = df/ds (one per output of the network), products with the block of J that belongs to one *use* of the
parameters, one call of the function, need a and g only, never a per-sample gradient of the weights.

Rules are for functions (`torch.nn.functional.linear`), not modules: weights tied, called twice, computed from other
parameters or used by hand are then nothing special.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor


class Factors(NamedTuple):
    """What one forward pass and C output-backwards leave of the uses of a layer.

    Attributes:
        a: Layer inputs `[B, N, ...]`, laid out as the rule wants them; None where the rule needs none.
        g: Derivatives of the network's outputs with respect to the layer's output, `[B, N, C, ...]`; None for the
            identity, where the layer's output `[N, C]` is the network's.
    """

    a: Tensor | None
    g: Tensor | None

    def rows(self, rows: slice) -> Factors:
        """The factors of some of the N rows."""
        return Factors(*(None if tensor is None else tensor[:, rows] for tensor in self))

    @property
    def num_rows(self) -> int:
        """N."""
        return next(tensor.shape[1] for tensor in self if tensor is not None)

    @property
    def num_values(self) -> int:
        """Values kept."""
        return sum(tensor.numel() for tensor in self if tensor is not None)


class Operations(NamedTuple):
    """Multiplications: of a row in a product with one column, one way; of a pair of rows in the Gram."""

    row: float
    pair: float


@dataclass(frozen=True)
class AbstractLayerRule(ABC):
    """Products with the Jacobian of one layer's parameters, from its `Factors`.

    Tangents and images are dictionaries by the layer's own names of its parameters ("weight", "bias"),
    `[B, K, *shape]`.

    Attributes:
        own: The own names of the parameters that are differentiated.
    """

    own: tuple[str, ...]

    @abstractmethod
    def factors(self, inputs: Tensor | None, cotangents: Tensor) -> Factors:
        """Factors, with B = 1 left out, from inputs `[N, m, ...]` and df/ds `[N, C, m, ...]`; m copies share a row."""

    @abstractmethod
    def jvp(self, factors: Factors, tangents: Mapping[str, Tensor]) -> Tensor:
        """The part of J v, `[B, K, N, C]`."""

    @abstractmethod
    def image(self, a: Tensor | None, w: Tensor) -> dict[str, Tensor]:
        """The adjoint of the change of s, for cotangents w of s `[B, N, K, ...]`: `[B, K, *shape]` by own name."""

    @abstractmethod
    def add_gram(self, out: Tensor, left: Factors, right: Factors, limit: int) -> None:
        """Add the part of J Jᵀ to ``out`` `[B, N, C, M, C]`, with temporaries of about ``limit`` bytes beyond it.

        ``right is left`` where it is symmetric.
        """

    @abstractmethod
    def operations(self, factors: Factors) -> Operations:
        """What products cost."""

    @abstractmethod
    def sketch(self, factors: Factors, features: int, generator: torch.Generator) -> Tensor:
        """Random features `[B, N, C, F]` whose inner products are unbiased for `gram`; see `gpntk.jacobians.sketch`."""

    def join(self, uses: list[Factors]) -> list[Factors]:
        """The factors of several uses of the same parameters in as few as can be."""
        return uses

    def gram(self, left: Factors, right: Factors) -> Tensor:
        """The part of J Jᵀ, `[B, N, C, M, C]`."""
        assert left.g is not None
        assert right.g is not None
        out = left.g.new_zeros(*left.g.shape[:3], *right.g.shape[1:3])
        self.add_gram(out, left, right, limit=2**30)
        return out

    def vjp(self, factors: Factors, u: Tensor) -> dict[str, Tensor]:
        """The part of Jᵀ u for u `[B, K, N, C]`: `[B, K, *shape]` by own name."""
        return self.image(factors.a, weighted(factors.g, u))

    def gradients(self, factors: Factors) -> dict[str, Tensor]:
        """Per-sample gradients `[B, N, C, *shape]` by own name: each row as a batch of its own."""
        if factors.g is None:
            raise AssertionError("an identity has no cotangents")
        batch, rows = factors.g.shape[:2]
        a = None if factors.a is None else factors.a.flatten(0, 1).unsqueeze(1)
        images = self.image(a, factors.g.flatten(0, 1).unsqueeze(1))
        return {own: image.unflatten(0, (batch, rows)) for own, image in images.items()}

    def diagonal(self, factors: Factors) -> Tensor:
        """Diagonal of ``gram(factors, factors)``, `[B, N, C]`."""
        return torch.stack([g.flatten(3).square().sum(-1) for g in self.gradients(factors).values()]).sum(0)

    def takes_rows(self, axis: int, dims: int) -> bool:
        """Whether the rows of x may be on this axis of an output with so many."""
        return axis < dims - 1

    def num_positions(self, factors: Factors) -> int:
        """T."""
        del factors
        return 1

    def column_bytes(self, factors: Factors) -> int:
        """Bytes of the largest temporary in a product with one column: the layer's output, unless overridden."""
        g = factors.g
        return 1 if g is None else g[:, :, 0].numel() * g.element_size()

    def flat(self, factors: Factors) -> bool:
        """Whether a block of the Gram costs no more for being computed in pieces."""
        del factors
        return False

    def without(self, own: set[str]) -> Self:
        """The same rule with fewer parameters to differentiate."""
        options = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return type(self)(**{**options, "own": tuple(name for name in self.own if name not in own)})


def weighted(g: Tensor | None, u: Tensor) -> Tensor:
    """Cotangents of the layer's output, sum_c u_knc g_nc `[B, N, K, ...]`, for u `[B, K, N, C]`."""
    u = u.transpose(1, 2)
    if g is None:
        return u.unsqueeze(3)
    if g.shape[2] == 1:
        return u.reshape(*u.shape[:3], *[1] * (g.dim() - 3)) * g
    return (u @ g.flatten(3)).unflatten(-1, g.shape[3:])


class Binding(NamedTuple):
    """How one call of a function is read: the rule, its input, and which arguments are its parameters.

    Attributes:
        rule: The rule, with every parameter of the call in ``own``.
        input: The argument that becomes ``a``; None where the rule needs none.
        operands: The argument behind each own name.
        function: What to call instead, with the same arguments; None for the function itself.
    """

    rule: AbstractLayerRule
    input: Tensor | None
    operands: dict[str, Tensor]
    function: Callable[..., Tensor] | None = None


Binder = Callable[..., Binding | None]
_BINDERS: dict[Callable[..., Any], Binder] = {}


def register(*functions: Callable[..., Any]) -> Callable[[Binder], Binder]:
    """Decorator: this binder reads calls of these functions, with their signature; None where it can't."""

    def decorate(binder: Binder) -> Binder:
        _BINDERS.update(dict.fromkeys(functions, binder))
        return binder

    return decorate


def bind(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Binding | None:
    """How a call is read, or None where there is no rule for it."""
    try:
        binder = _BINDERS.get(function)
    except TypeError:  # an unhashable callable
        return None
    if binder is None:
        return None
    try:
        arguments = inspect.signature(binder).bind(*args, **kwargs)
    except TypeError:
        return None
    return binder(*arguments.args, **arguments.kwargs)
