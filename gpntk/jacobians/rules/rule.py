"""What a layer rule is, and which functions have one.

A rule knows a function that is affine in its parameters, s = L_a(w) for inputs a: the change of s with w and its
adjoint. With g = df/ds (one per output of the network), products with the block of J that belongs to one *use* of the
parameters, one call of the function, need a and g only, never a per-sample gradient of the weights.

Rules are for functions (`torch.nn.functional.linear`), not modules: weights tied, called twice, computed from other
parameters or used by hand are then nothing special.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

# Features summed at once by a matrix product: of few rows, each sum is one after another, and its rounding grows.
_FEATURES = 2**16


class Factors(NamedTuple):
    """What one forward pass and C output-backwards leave of the uses of a layer.

    Attributes:
        a: Layer inputs `[B, N, ...]`, laid out as the rule wants them; None where the rule needs none.
        g: Derivatives of the network's outputs with respect to the layer's output, `[B, N, C, ...]`; None for the
            identity, where the layer's output `[N, C]` is the network's (only if the rule `takes_identity`).
    """

    a: Tensor | None
    g: Tensor | None

    def rows(self, rows: slice) -> Factors:
        """The factors of some of the N rows."""
        return Factors(*(None if tensor is None else tensor[:, rows] for tensor in self))

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """a and g, for rules that have both."""
        assert self.a is not None
        return self.a, self.cotangents

    @property
    def cotangents(self) -> Tensor:
        """The output gradients g, where they are not the identity."""
        assert self.g is not None
        return self.g

    @property
    def num_rows(self) -> int:
        """The number of rows N."""
        return next(tensor.shape[1] for tensor in self if tensor is not None)

    @property
    def num_values(self) -> int:
        """Values that are kept for later products."""
        return sum(tensor.numel() for tensor in self if tensor is not None)


class RuleSizes(NamedTuple):
    """What products with some factors take.

    Attributes:
        product: Multiplications of one row in a product with one column, one way.
        pair: Multiplications of a pair of rows in the Gram.
        column: Values of the largest temporary in a product of all rows with one column.
        tile: Values of temporaries in the Gram, for each row of a square block; 0 if there are none beside the result,
            so that a block costs no more for being computed in pieces.
    """

    product: float
    pair: float
    column: float
    tile: float


@dataclass(frozen=True)
class AbstractLayerRule(ABC):
    """Products with the Jacobian of one layer's parameters, from its `Factors`.

    Tangents and images are dictionaries by the layer's own names of its parameters ("weight", "bias"). B batches of
    rows never meet: batch b of the tangents belongs to batch b of the factors.

    Attributes:
        own: The own names of the parameters that are differentiated; products give these and no others.
    """

    own: tuple[str, ...]

    takes_identity: ClassVar[bool] = False
    """Whether products know what to do where g is None."""

    @abstractmethod
    def factors(self, inputs: tuple[Tensor, ...], cotangents: Tensor) -> Factors:
        """Factors a `[N, T, ...]` and g `[N, C, T, ...]` from inputs, each `[N, m, ...]`, and df/ds `[N, C, m, ...]`.

        T are the positions at which a row uses the parameters, and the m copies of a row among them. B comes later.
        """

    @abstractmethod
    def jvp(self, factors: Factors, tangents: Mapping[str, Tensor]) -> Tensor:
        """The part of J v, `[B, K, N, C]`, for tangents `[B, K, *shape]` by own name."""

    @abstractmethod
    def vjp(self, factors: Factors, u: Tensor) -> dict[str, Tensor]:
        """The part of Jᵀ u for u `[B, K, N, C]`: `[B, K, *shape]` by own name."""

    @abstractmethod
    def gram(self, left: Factors, right: Factors) -> Tensor:
        """The part of J Jᵀ, `[B, N, C, M, C]`; ``right is left`` where it is symmetric."""

    @abstractmethod
    def gradients(self, factors: Factors) -> dict[str, Tensor]:
        """Per-sample gradients `[B, N, C, *shape]` by own name."""

    @abstractmethod
    def sizes(self, factors: Factors) -> RuleSizes:
        """What products cost, and the memory that they need meanwhile."""

    # --- where a rule knows better -----------------------------------------------------------------------------

    def diagonal(self, factors: Factors) -> Tensor:
        """Diagonal of ``gram(factors, factors)``, `[B, N, C]`."""
        return torch.stack([g.flatten(3).square().sum(-1) for g in self.gradients(factors).values()]).sum(0)

    def join(self, uses: list[Factors]) -> Factors:
        """The factors of several uses of the same parameters in one: more positions T."""
        a, g = zip(*(use.pair for use in uses), strict=True)
        return Factors(torch.cat(a, 2), torch.cat(g, 3))


def gram_of_gradients(left: dict[str, Tensor], right: dict[str, Tensor]) -> Tensor:
    """The part of J Jᵀ `[B, N, C, M, C]` from per-sample gradients by own name: how any rule may do it."""
    terms = [outer(one.flatten(3), right[own].flatten(3)) for own, one in left.items()]
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


def outer(one: Tensor, two: Tensor) -> Tensor:
    """one_nc · two_md `[B, N, C, M, C]` for rows of gradients `[B, N, C, P]` and `[B, M, C, P]`."""
    product = inner_products(one.flatten(1, 2), two.flatten(1, 2))
    return product.unflatten(1, one.shape[1:3]).unflatten(3, two.shape[1:3])


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """A Bᵀ `[..., n, m]` for A `[..., n, F]` and B `[..., m, F]`, to the precision of their dtype whatever F.

    In float32, a plain product of five rows and F = 10⁷ is off by 1e-3; slice by slice, as fast, by 1e-6.
    """
    pairs = zip(a.split(_FEATURES, -1), b.split(_FEATURES, -1), strict=True)
    return functools.reduce(torch.add, (left @ right.mT for left, right in pairs))


def weighted(g: Tensor | None, u: Tensor) -> Tensor:
    """Cotangents of the layer's output, sum_c u_knc g_nc `[B, N, K, ...]`, for u `[B, K, N, C]`."""
    u = u.transpose(1, 2)
    if g is None:
        return u.unsqueeze(3)
    if g.shape[2] == 1:
        return u.reshape(*u.shape[:3], *[1] * (g.dim() - 3)) * g
    return (u @ g.flatten(3)).unflatten(-1, g.shape[3:])


class Binding(NamedTuple):
    """How one call of a function is read: the rule, its inputs, and which arguments are its parameters.

    Attributes:
        rule: The rule, with every parameter of the call in ``own``.
        inputs: The arguments, with a row for every row of the output, that `AbstractLayerRule.factors` makes ``a`` of.
        operands: The argument behind each own name.
        function: What to call instead, with the same arguments; None for the function itself.
        copied: Whether every row gets a copy of each operand (which broadcasts over rows), and g is the derivative with
            respect to that copy; otherwise g belongs to the output of the call.
        first_axis: Whether the rows of x must be the first axis of the output, rather than any but the last.
        mirrored: The rule where the weight is given as the transpose of a parameter, if there is one.
    """

    rule: AbstractLayerRule
    inputs: tuple[Tensor, ...]
    operands: dict[str, Tensor]
    function: Callable[..., Tensor] | None = None
    copied: bool = False
    first_axis: bool = False
    mirrored: AbstractLayerRule | None = None


Binder = Callable[..., Binding | None]
_BINDERS: dict[Callable[..., Any], Binder] = {}


def register(*functions: Callable[..., Any]) -> Callable[[Binder], Binder]:
    """Decorator: this binder reads calls of ``functions``.

    Args:
        *functions: Functions of torch, as the network calls them: ``torch.nn.functional.linear``, ``torch.Tensor.add``.
            (A module is found through the functions that its ``forward`` calls.)

    The binder takes the arguments of the function, under the same names, and returns a `Binding`, or None for calls
    that the rule does not cover: their parameters go by automatic differentiation.
    """

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
