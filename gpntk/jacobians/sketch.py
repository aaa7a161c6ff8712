"""Random features of a few numbers whose inner products are, on average, those of the Jacobian.

A layer's gradient is a sum of Kronecker products, df/dW = sum_t g_t a_tᵀ, and so can its projection be: with standard
normal R₁ `[F, I]` and R₂ `[F, O]`,

    z = sum_t (R₁ a_t) ∘ (R₂ g_t) / sqrt(F),      E[z·z'] = sum_ts (a_t·a'_s)(g_t·g'_s),

at F (I + O) operations a position instead of F I O. Projections of different layers are independent and add up: the
cross terms vanish on average. For one layer, one position and one output, with p = a·a', q = g·g',

    Var[z·z'] = ((|a|²|a'|² + 2 p²)(|g|²|g'|² + 2 q²) - p² q²) / F.

`project` is the table of rules: a rule that has no line of its own projects its per-sample gradients.
"""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatch
from typing import final

import torch
from torch import Tensor

from gpntk._checks import check_count
from gpntk.jacobians.auto import AutoBackend
from gpntk.jacobians.backend import AbstractJacobianBackend, AbstractNetworkBackend, Groups
from gpntk.jacobians.capture import Capture, Parts
from gpntk.jacobians.dense import AbstractDenseBackend
from gpntk.jacobians.grams import Grams, num_rows
from gpntk.jacobians.rules import AbstractLayerRule, ConvRule, EmbeddingRule, Factors, LinearRule
from gpntk.jacobians.stacked import StackedBackend
from gpntk.jacobians.structured import StructuredBackend
from gpntk.memory import attached, chunks
from gpntk.network import FrozenNetwork

# Rows of R drawn at once, so that it depends on the seed alone.
_BLOCK = 32
_BYTES = 2**26


@final
class SketchBackend(AbstractDenseBackend, AbstractNetworkBackend):
    """J(x) R `[B, N*C, F]` for a random R that is never formed, in place of J(x): one group of features.

    Use it where N and P are both too large for exact products, and an error of about 1/sqrt(F) is not: linear algebra
    with F features costs what a Bayesian linear model of F weights costs. Features are kept while they fit the budget.

    Args:
        network: The network.
        num_features: F.
        seed: Of R; the same seed gives the same features, on every device.
        memory_budget: Bytes that temporaries, and what is kept, stay within.

    Example:
        >>> import torch, gpntk
        >>> network = gpntk.freeze(torch.nn.Sequential(torch.nn.Linear(3, 50), torch.nn.Tanh(), torch.nn.Linear(50, 1)))
        >>> SketchBackend(network, num_features=64).jacobian(torch.randn(1, 10, 3)).shape
        torch.Size([1, 10, 64])

    References:
        Park et al. (2023), TRAK: Attributing Model Behavior at Scale, https://arxiv.org/abs/2303.14186, section 3.
        Pham and Pagh (2013), Fast and Scalable Polynomial Kernels via Explicit Feature Maps (products of projections).
    """

    def __init__(
        self, network: FrozenNetwork, num_features: int = 1024, seed: int = 0, memory_budget: int | None = None
    ) -> None:
        super().__init__(network, memory_budget)
        check_count(num_features=num_features)
        check_count(0, seed=seed)
        self._num_features, self._seed = num_features, seed
        self._exact: AbstractJacobianBackend | None = None

    @property
    def num_features(self) -> int:
        return self._num_features

    def num_outputs(self, x: Tensor) -> int:
        return self.network.num_outputs(x)

    @property
    def groups(self) -> Groups:
        return ((slice(0, self._num_features),),)

    def jacobian(self, x: Tensor) -> Tensor:
        if self._exact is None:
            self.num_outputs(x)
            # By rules whatever they cost: another backend would draw another R.
            self._exact = AutoBackend(self.network, self.memory_budget).by_rules(x).backend
            self._exact.share_cache(self.cache)
        exact = self._exact
        return self.remember("sketch", (x,), lambda: attached(sketch(exact, x, self._num_features, self._seed), x))


@singledispatch
def sketch(backend: AbstractJacobianBackend, x: Tensor, features: int, seed: int) -> Tensor:
    """J(x) R / sqrt(F) `[B, N*C, F]` for a standard normal R `[P, F]`, or a cheaper one that serves as well."""
    outputs, size = backend.num_outputs(x), backend.num_features
    blocks = []
    for rows in chunks(x.shape[1], 2 * x.shape[0] * outputs * size * x.element_size(), backend.memory_budget // 2):
        jacobian = backend.jacobian(x[:, rows])
        parts = []
        for index in range(0, features, _BLOCK):
            generator = torch.Generator("cpu").manual_seed(seed + index)
            r = _normal((min(_BLOCK, features - index), size), x, generator)
            parts.append(jacobian @ r.mT / features**0.5)
        blocks.append(torch.cat(parts, -1))
    return torch.cat(blocks, 1)


@sketch.register
def _of_stacked(backend: StackedBackend, x: Tensor, features: int, seed: int) -> Tensor:
    terms = [scale * sketch(part, x, features, seed + i) for i, (part, scale) in enumerate(backend.terms)]
    return torch.stack(terms).sum(0)


@sketch.register
def _of_structured(backend: StructuredBackend, x: Tensor, features: int, seed: int) -> Tensor:
    capture, blocks = backend.parts(x)
    limit = min(backend.memory_budget // 4, _BYTES)
    done = [_of_parts(capture, parts, features, seed, limit) for parts in blocks]
    return torch.cat(done, dim=1).to(x.dtype)


def _of_parts(capture: Capture, parts: Parts, features: int, seed: int, limit: int) -> Tensor:
    """Random features `[B, N*C, F]` of the rows whose activations and output gradients are given."""
    simple = [uses for uses in capture.shared if not uses.needs_gradients]
    outputs = max(factors.g.shape[2] if factors.g is not None else 1 for p in parts.values() for factors in [p.factors])
    grams = Grams(capture.shared, limit)
    kept = [tensor for part in parts.values() for tensor in part.factors if tensor is not None]
    positions = max(tensor[0, 0].numel() // tensor.shape[-1] // outputs + 1 for tensor in kept)
    row_bytes = kept[0].element_size() * kept[0].shape[0] * features * positions * (1 + 2 * outputs)
    done = []
    for rows in chunks(num_rows(parts), row_bytes, limit):
        terms = []
        for uses in simple:
            generator = torch.Generator("cpu").manual_seed(seed + 1000 * uses.key)
            terms.append(project(uses.rule, parts[uses.key].factors.rows(rows), features, generator))
        if len(simple) < len(capture.shared):
            generator = torch.Generator("cpu").manual_seed(seed + 1000 * len(parts))
            gradients = grams.gradients(parts, rows)
            terms += [_projected(gradients[name], features, generator) for name in sorted(gradients)]
        done.append(torch.stack(terms).sum(0))
    return torch.cat(done, 1).flatten(1, 2)


@singledispatch
def project(rule: AbstractLayerRule, factors: Factors, features: int, generator: torch.Generator) -> Tensor:
    """Random features `[B, N, C, F]` of one layer, whose inner products are unbiased for its Gram."""
    gradients = rule.gradients(factors)
    return torch.stack([_projected(gradients[own].flatten(3), features, generator) for own in sorted(gradients)]).sum(0)


@project.register
def _linear(rule: LinearRule, factors: Factors, features: int, generator: torch.Generator) -> Tensor:
    a, g = factors
    assert a is not None
    if g is None:
        g = torch.eye(rule.outputs, dtype=a.dtype, device=a.device)[:, None].expand(*a.shape[:2], -1, 1, -1)
    # The bias is the weight of an input that is one.
    parts = [a] if "weight" in rule.own else []
    parts += [a.new_ones(*a.shape[:3], 1)] if "bias" in rule.own else []
    return _product(torch.cat(parts, -1), g, features, generator)


@project.register
def _conv(rule: ConvRule, factors: Factors, features: int, generator: torch.Generator) -> Tensor:
    total = []
    for group in range(rule.groups) if "weight" in rule.own else ():
        positions = rule.positions(factors, group)
        total.append(_product(positions.a, positions.g, features, generator))
    if "bias" in rule.own:
        total.append(_projected(replace(rule, own=("bias",)).gradients(factors)["bias"], features, generator))
    return torch.stack(total).sum(0)


@project.register
def _embedding(rule: EmbeddingRule, factors: Factors, features: int, generator: torch.Generator) -> Tensor:
    index, g = factors.pair
    first, second = (_normal((features, size), g, generator) for size in (rule.vocabulary, g.shape[-1]))
    return torch.einsum("bntf,bnctf->bncf", first.mT[index], g @ second.mT) / features**0.5


def _product(a: Tensor, g: Tensor, features: int, generator: torch.Generator) -> Tensor:
    """sum_t (R₁ a_nt) ∘ (R₂ g_nct) / sqrt(F) `[B, N, C, F]`, for a `[B, N, T, I]` and g `[B, N, C, T, O]`."""
    first, second = (_normal((features, tensor.shape[-1]), a, generator) for tensor in (a, g))
    return torch.einsum("bntf,bnctf->bncf", a @ first.mT, g @ second.mT) / features**0.5


def _projected(gradients: Tensor, features: int, generator: torch.Generator) -> Tensor:
    """Gradients `[B, N, C, P]` times a standard normal R `[P, F]` over sqrt(F), some rows of R at a time."""
    parts = chunks(gradients.shape[-1], features * gradients.element_size(), _BYTES)
    total = gradients.new_zeros(*gradients.shape[:-1], features)
    for rows in parts:
        total = total + gradients[..., rows] @ _normal((rows.stop - rows.start, features), gradients, generator)
    return total / features**0.5


def _normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers, the same on every device."""
    return torch.randn(shape, generator=generator, dtype=like.dtype, device="cpu").to(like.device)
