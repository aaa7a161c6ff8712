"""What all activations share: the base class, and functions of a 2 x 2 covariance that stay exact where it is singular.

Parallel inputs are common (equal inputs, deep layers), and there q1 q2 - k² = 0. Two things go wrong in the textbook
formulas: the subtraction cancels (arccos(k / √(q1 q2)) of two equal rows is off by √ε, 4e-4 in float32), and
derivatives such as dθ/dk = -1/√(q1 q2 - k²) are infinite although they are multiplied by zero. Here the difference is
computed without cancellation, and a function whose derivative is known in closed form is given that one.

What remains is the rounding of q1, q2 and k themselves: a relative ε in k moves the angle of parallel inputs, and with
it the second moment of a kinked φ, by √ε (1e-8 in float64, 3e-4 in float32). Use `diagonal` for equal inputs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gpntk.memory import tracks_gradient

# Bytes of a temporary of elementary formulas: so many stay in a core's cache, or in a device.
_CACHED = 2**18
_ON_DEVICE = 2**27
# Work of so small a share of a chunk keeps what its backward pass needs: a few megabytes.
_SMALL = 16
# Share of q1 q2 below which a difference to k² is computed exactly; above, three digits are lost at most.
_LOST = 1e-3


class AbstractActivation(ABC):
    """An elementwise function φ, by its Gaussian moments.

    Laws: moments(q, q, q) = diagonal(q) up to rounding; the derivative of the first moment in k is the second
    (Price 1958); both are symmetric under exchange of q1 and q2. Gradients in q1, q2 and k are finite everywhere; a
    part of one that is infinite (of the second moment of a kinked φ at k = ±√(q1 q2)) or does not exist (at q = 0) is
    left out. All is computed in float64, unless float32 does as well (`single`), and returned in the dtype of k.
    """

    elementary: ClassVar[bool] = True
    """Whether each entry is computed by itself in a few operations, so that a few entries at a time cost less."""
    single: ClassVar[bool] = False
    """Whether float32 moments are computed in float32, because that rounds them as little as q1, q2 and k do."""

    def moments(self, q1: Tensor, q2: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Mean products of φ and of its slope, E[φ(u) φ(v)] and E[φ'(u) φ'(v)], for (u, v) ~ N(0, [[q1, k], [k, q2]]).

        Args:
            q1: Variances of u, broadcastable to the shape of ``k``.
            q2: Variances of v, likewise.
            k: Covariances, at most √(q1 q2) in absolute value; an excess by rounding is taken as equality.
        """
        q1, q2 = _unexpanded(q1), _unexpanded(q2)
        dtype = k.dtype if self._rounds_as(k) else torch.float64
        cached = _CACHED * torch.get_num_threads() if k.device.type == "cpu" else _ON_DEVICE
        entries = cached // dtype.itemsize
        if not self.elementary or k.numel() <= entries or tracked(q1, q2, k):
            first, second = self._moments(_cast(q1, dtype), _cast(q2, dtype), _cast(k, dtype))
            return _like(first, k), _like(second, k)
        results = torch.empty_like(k), torch.empty_like(k)
        for *part, first, second in _parts((q1, q2, k, *results), k.shape, entries):
            values = self._moments(*(tensor.to(dtype) for tensor in part))
            for output, value in zip((first, second), values, strict=True):
                output.copy_(value)
        return results

    def diagonal(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """E[φ(u)²] and E[φ'(u)²] for u ~ N(0, q): what the moments are at k = q1 = q2 = q."""
        first, second = self._diagonal(q if self._rounds_as(q) else q.double())
        return _like(first, q), _like(second, q)

    def _rounds_as(self, k: Tensor) -> bool:
        """Whether its moments are computed in the dtype of k."""
        return self.single and k.dtype in _RANGE

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """φ(x)."""

    @abstractmethod
    def _moments(self, q1: Tensor, q2: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The moments, in float64 unless `single`."""

    @abstractmethod
    def _diagonal(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """The diagonal in float64."""


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Small blocks spend much of their time in calls that change nothing.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _like(tensor: Tensor, k: Tensor) -> Tensor:
    """In the shape and dtype of k."""
    return _cast(tensor if tensor.shape == k.shape else tensor.expand(k.shape), k.dtype)


def _unexpanded(q: Tensor) -> Tensor:
    """The entries of an expanded view, once."""
    if 0 not in q.stride():
        return q
    for dim, stride in enumerate(q.stride()):
        if stride == 0 and q.shape[dim] > 1:
            q = q.narrow(dim, 0, 1)
    return q


def _halves(tensors: Sequence[Tensor], shape: torch.Size, trailing: Sequence[int]) -> Iterator[tuple[Tensor, ...]]:
    """Views of either half of tensors that broadcast to ``shape``, along its first axis that is longer than one.

    ``trailing`` dimensions of each tensor come after those of the shape.
    """
    # Counted from the last dimension of the shape.
    dim = next(index for index, size in enumerate(shape) if size > 1) - len(shape)
    half = shape[dim] // 2
    for start, length in ((0, half), (half, shape[dim] - half)):
        yield tuple(
            tensor.narrow(dim - last, start, length)
            if tensor.dim() - last >= -dim and tensor.shape[dim - last] > 1
            else tensor
            for tensor, last in zip(tensors, trailing, strict=True)
        )


def _parts(tensors: tuple[Tensor, ...], shape: torch.Size, entries: int) -> Iterator[tuple[Tensor, ...]]:
    """Views of parts of tensors that broadcast to ``shape``, of at most ``entries`` each."""
    if shape.numel() <= max(entries, 1):
        yield tensors
        return
    for half in _halves(tensors, shape, (0,) * len(tensors)):
        yield from _parts(half, torch.broadcast_shapes(*(tensor.shape for tensor in half)), entries)


def by_chunks(
    function: Callable[..., Tensor], arguments: Sequence[Tensor], entries: int, trailing: Sequence[int] | None = None
) -> Tensor:
    """``function(*arguments)``, computed for about ``entries`` of the entries at a time.

    Under automatic differentiation nothing is kept but the arguments, and parts are computed again in the backward pass
    (but where all is a small fraction of what is computed together).

    Args:
        function: Acts on every entry by itself, and may append dimensions.
        arguments: Tensors that broadcast together, not counting their ``trailing`` dimensions.
        entries: Entries computed together, at least one.
        trailing: Number of last dimensions of each argument that do not belong to entries; zeros if None.
    """
    trailing = trailing or [0] * len(arguments)
    shapes = [tensor.shape[: tensor.dim() - last] for tensor, last in zip(arguments, trailing, strict=True)]
    shape = torch.broadcast_shapes(*shapes)
    if shape.numel() > max(entries, 1):
        halves = [by_chunks(function, half, entries, trailing) for half in _halves(arguments, shape, trailing)]
        return torch.cat(halves, next(index for index, size in enumerate(shape) if size > 1))
    if tracked(*arguments) and shape.numel() * _SMALL > entries:
        result = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(result, Tensor)
        return result
    return function(*arguments)


def tracked(*tensors: Tensor) -> bool:
    """Whether automatic differentiation records what is done with any of them."""
    return any(map(tracks_gradient, tensors))


@final
class _Known(torch.autograd.Function):
    """A value with given derivatives."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *tensors: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(*tensors[len(tensors) // 2 :])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        slopes = ctx.saved_tensors
        return (None, *(gradient * slope for slope in slopes), *(None for _ in slopes))


def with_derivatives(value: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """``value``, to be differentiated as if d value = Σ slope d input over the ``pairs`` (input, slope).

    Slopes may be differentiable functions of the inputs themselves; derivatives of second order are then right too.
    """
    if not tracked(*(entry for entry, _ in pairs)):
        return value.detach()
    inputs = [entry.expand(value.shape) for entry, _ in pairs]
    slopes = [slope.expand(value.shape) for _, slope in pairs]
    result = _Known.apply(value.detach(), *inputs, *slopes)
    assert isinstance(result, Tensor)
    return result


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, zero (with zero derivatives) where the denominator is zero."""
    zero = denominator == 0
    return torch.where(zero, 0.0, numerator / torch.where(zero, 1.0, denominator))


def root(x: Tensor) -> Tensor:
    """√x, with derivative zero at x = 0."""
    if not tracked(x):
        return x.clamp_min(0).sqrt_()
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as a sum of two numbers of 26 bits each, whose products are exact (Dekker 1971)."""
    high = x * 134217729.0  # 2**27 + 1
    high = high - (high - x)
    return high, x - high


def _rounding(a: Tensor, b: Tensor, product: Tensor) -> Tensor:
    """a b - product, exactly, for the rounded product."""
    (a1, a2), (b1, b2) = _split(a), _split(b)
    return ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


def _difference(a: Tensor, b: Tensor, c: Tensor, product: Tensor) -> Tensor:
    """a b - c² of nearly equal terms, with what ``product``, a b, and the square have been rounded by."""
    square = c * c
    return (product - square) + (_rounding(a, b, product) - _rounding(c, c, square))


def determinant(q1: Tensor, q2: Tensor, k: Tensor) -> Tensor:
    """q1 q2 - k² without cancellation, at least zero, `[*k]`.

    A negative value can only be rounding of k: Cauchy and Schwarz forbid it. Its derivatives are kept all the same.
    """
    a, b, c = q1.detach(), q2.detach(), k.detach()
    product = a * b
    value = torch.addcmul(product, c, c, value=-1)
    lost = value < _LOST * product
    if lost.any():
        exact = _difference(*(tensor.expand(lost.shape)[lost] for tensor in (a, b, c, product)))
        value = value.masked_scatter(lost, exact)
    value = value.clamp_min_(0)
    return with_derivatives(value, (q1, q2), (q2, q1), (k, -2 * k)) if tracked(q1, q2, k) else value


# (u, v) at an angle of less than 0.03 have lost three digits of q1 q2 - k² at most.
_PARALLEL = math.pi / 2 - 0.03
# Variances whose products, and their rounding errors, are within the range of a floating-point number.
_RANGE = {torch.float32: (1e-15, 1e18), torch.float64: (1e-120, 1e140)}


def arc_moments(q1: Tensor, q2: Tensor, k: Tensor, bend: float, mean: float) -> tuple[Tensor, Tensor]:
    """b (s + k ψ) + m k and its derivative in k, b ψ + m, for ``bend`` b and ``mean`` m; `[*k]`.

    Here s = √(q1 q2 - k²), and ψ = arcsin(k / √(q1 q2)) in [-π/2, π/2] is zero where a variance is zero:
    P(u > 0, v > 0) = 1/4 + ψ / 2π and E|u v| = (2/π) (s + k ψ).
    """
    if not tracked(q1, q2, k):
        s, psi = _polar(q1, q2, k)
        second = psi.mul_(bend).add_(mean)
        return s.mul_(bend).addcmul_(k, second), second
    first, second, _ = cast("tuple[Tensor, Tensor, Tensor]", _Arc.apply(q1, q2, k, (bend, mean)))
    return first, second


@final
class _Arc(torch.autograd.Function):
    """`arc_moments`, and s, whose derivatives those of the others need."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, q1: Tensor, q2: Tensor, k: Tensor, factors: tuple[float, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        bend, mean = factors
        s, psi = _polar(q1, q2, k)
        second = psi.mul_(bend).add_(mean)
        ctx.save_for_backward(q1, q2, k, second, s)
        ctx.bend = bend
        ctx.set_materialize_grads(False)
        return torch.addcmul(bend * s, k, second), second, s

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, first: Tensor | None, second: Tensor | None, s: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q1, q2, k, slope, radius = ctx.saved_tensors
        # Derivatives in k, and in log √q1, which are those in log √q2.
        by_k, by_q = [], []
        if first is not None:
            by_k.append(first * slope)
            by_q.append(ctx.bend * (first * radius))
        if second is not None:
            inverse = divide(ctx.bend * second, radius)
            by_k.append(inverse)
            by_q.append(-k * inverse)
        if s is not None:
            tangent = divide(k, radius)
            by_k.append(-s * tangent)
            by_q.append(s * (radius + k * tangent))
        if not by_k:
            return (None,) * 4
        common = sum(by_q[1:], by_q[0])
        sides = (divide(0.5 * common.sum_to_size(q.shape), q) for q in (q1, q2))
        return *sides, sum(by_k[1:], by_k[0]), None


def _polar(q1: Tensor, q2: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """s and ψ of `arc_moments`, two new tensors."""
    if not k.numel():
        return k.clone(), k.clone()
    if _within_range(q1, k.dtype) and _within_range(q2, k.dtype):
        return _polar_within_range(q1, q2, k)
    if k.dtype != torch.float64:
        s, psi = _polar(q1.double(), q2.double(), k.double())
        return s.to(k.dtype), psi.to(k.dtype)
    # Powers of two, which round nothing.
    one, two = _unit(q1), _unit(q2)
    s, psi = _polar_within_range(q1 / one / one, q2 / two / two, k / one / two)
    return s * one * two, psi


def _within_range(q: Tensor, dtype: torch.dtype) -> bool:
    low, high = torch.aminmax(q)
    return _RANGE[dtype][0] < low.item() <= high.item() < _RANGE[dtype][1]


def _unit(q: Tensor) -> Tensor:
    """A power of two within a factor of two of √q; one for zero."""
    exponent = torch.frexp(q).exponent
    return torch.ldexp(torch.ones_like(q), torch.div(exponent, 2, rounding_mode="floor"))


def _polar_within_range(q1: Tensor, q2: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    square = q1 * q2
    square = (square if square.shape == k.shape else square.expand(k.shape).clone()).addcmul_(k, k, value=-1)
    # √x as x / √x, in half of the time that the vector library takes for √x; NaN at zero and below.
    s = square.rsqrt().mul_(square)
    psi = torch.atan2(k, s)
    low, high = torch.aminmax(psi)
    if -_PARALLEL < low.item() <= high.item() < _PARALLEL:
        return s, psi
    lost = ~(psi.abs() < _PARALLEL)
    if k.dtype == torch.float32:
        # Products of two are exact in float64.
        c = k.double()
        exact = torch.addcmul(q1.double() * q2, c, c, value=-1).clamp_min_(0).sqrt_()
        return torch.where(lost, exact.float(), s), torch.where(lost, torch.atan2(c, exact).float(), psi)
    a, b, c = (tensor.expand(lost.shape)[lost] for tensor in (q1, q2, k))
    exact = _difference(a, b, c, a * b).clamp_min_(0).sqrt_()
    return s.masked_scatter_(lost, exact), psi.masked_scatter_(lost, torch.atan2(c, exact))
