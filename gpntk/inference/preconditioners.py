"""Preconditioners: cheap factors of I + Ψ Ψᵀ (function space) or I + Ψᵀ Ψ (weight space).

A preconditioner is a recipe; `AbstractPreconditioner.prepare` makes from it a factor M = R Rᵀ that gives solves and the
exact log|M|. It is good where R⁻¹ A R⁻ᵀ has few different eigenvalues.

    Nystrom       function or weight space   rank r from r products, chosen by an error estimate     memory n r
    SampledGram   weight space               ΦᵀΦ of a sample of the rows; whole, or layer by layer   memory F²
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, final, get_args

import torch
from torch import Tensor

from gpntk._checks import check_count, check_flags, check_positive
from gpntk.cost import Work
from gpntk.errors import InputError, SolveError
from gpntk.inference.covariance import FeatureCovariance
from gpntk.inference.factors import AbstractFactor, BlockFactor, CholeskyFactor, ScaledFactor, SpectralFactor
from gpntk.inference.features import Features, add_second_moment, exact_dtype, mirror
from gpntk.inference.outcome import Outcome
from gpntk.inference.system import Sizes, Space, WhitenedSystem
from gpntk.io import checksum

# Iterations and ranks that costs are counted with.
_TYPICAL_ITERATIONS, _TYPICAL_RANK = 30, 400
# Products with a fresh vector that estimate the norm of what a low-rank approximation leaves out.
_POWER_STEPS = 4
_FIRST_RANK = 32
# Trace of a Gram matrix, times ε, from which on the one that is added to it is mostly lost.
_ROUNDING = 0.5


class Counted(NamedTuple):
    """What a preconditioner costs: work once and for each application and column, bytes kept, iterations left."""

    once: Work
    each: Work
    kept: float
    iterations: int


class AbstractPreconditioner(ABC):
    """A recipe for a factor that resembles I + Ψ Ψᵀ or I + Ψᵀ Ψ."""

    space: Space
    """Which of the two matrices the factor resembles."""

    @abstractmethod
    def build(self, system: WhitenedSystem) -> AbstractFactor:
        """The factor of this very system, in the dtype of its features."""

    @abstractmethod
    def counted(self, sizes: Sizes) -> Counted:
        """What it costs, and the iterations that are typically left."""

    @final
    def prepare(self, system: WhitenedSystem) -> AbstractFactor:
        """A factor for ``system``, made from that of prior variances nearby, which is kept with the data.

        In units of the noise, if all rows have the same, prior variances S are rounded to powers of two, S₀. All values
        of the hyperparameters in between share one factor, the same whichever came first; the condition number grows by
        √2 at most, by 2 if layers have variances of their own. Another noise of some of the rows is another factor.
        """
        if system.covariance.features is None or system.noise is None:
            return self.build(system)
        weighted, noise = system.weighted, system.noise
        common = system.homoscedastic and bool(noise.isfinite())
        unit = noise if common else noise.new_ones(1)
        noise, variances = noise / unit, (weighted.variances / unit).log2().round().exp2()
        numbers = weighted.features.ranks.number(noise), checksum({"": variances.cpu()}, "")
        key = "preconditioner", self, weighted.dtype, *numbers
        rounded = FeatureCovariance(weighted.features, variances)
        factor = weighted.features.remember(key, lambda: self.build(WhitenedSystem(rounded, noise)))
        if self.space == "function":
            return factor
        # S^½ (S₀⁻¹ + Φᵀ D⁻¹ Φ) S^½ = T (I + S₀^½ Φᵀ D⁻¹ Φ S₀^½) T
        squares = torch.where(variances > 0, weighted.variances / (variances * unit), 1.0)
        scales = weighted.spread(squares).sqrt().to(weighted.dtype)
        return ScaledFactor(factor, scales.expand(system.size("weight")))


@final
@dataclass(frozen=True)
class Nystrom(AbstractPreconditioner):
    """Randomized Nyström approximation H ≈ (HΩ)(ΩᵀHΩ)⁺(HΩ)ᵀ of H = Ψ Ψᵀ or Ψᵀ Ψ, from products alone.

    The rank doubles until the norm of what is left out, estimated by a few power steps on a fresh vector, is below
    ``error`` (in units of the noise: the condition number is then about 1 + ``error``) or ``max_rank`` is reached.

    Attributes:
        max_rank: Largest r; memory is 2 r vectors.
        error: Error to be reached.
        space: Where H lives.
        seed: Of Ω.

    References:
        Frangella, Tropp and Udell (2023), Randomized Nyström Preconditioning, algorithms 2.1 and E.2, and eq. 1.3.
    """

    max_rank: int = 800
    error: float = 30.0
    space: Space = "function"
    seed: int = 0

    def __post_init__(self) -> None:
        check_count(max_rank=self.max_rank)
        check_count(0, seed=self.seed)
        if self.error != 0:
            check_positive(error=self.error)
        if self.space not in get_args(Space):
            raise InputError(f"space={self.space!r}: choose 'function' or 'weight'.")

    def counted(self, sizes: Sizes) -> Counted:
        size = sizes.rows if self.space == "function" else sizes.features
        rank, item = min(_TYPICAL_RANK, size), sizes.itemsize
        once = sizes.product.times(rank) + Work(8 * size * rank**2, 0, 100)
        each = Work(4 * size * rank, 2 * item * size * rank, 4)
        iterations = _TYPICAL_ITERATIONS if self.space == "function" else _TYPICAL_ITERATIONS // 2
        return Counted(once, each, 5.0 * item * size * rank, iterations)

    def build(self, system: WhitenedSystem) -> SpectralFactor:
        covariance = system.covariance
        like = torch.empty(system.size(self.space), dtype=covariance.dtype, device=covariance.device)
        values, vectors = nystrom(system.product(self.space), like, self.max_rank, self.error, self.seed)
        # Beyond the rank, eigenvalues are at most about the smallest found.
        return SpectralFactor(1 + values, vectors, 1 + (float(values[-1]) if values.numel() else 0.0))


def nystrom(
    product: Callable[[Tensor], Tensor], like: Tensor, max_rank: int, error: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[r]`, the largest first, and vectors `[n, r]` of a Nyström approximation of H `[n, n]`.

    H is given by ``product``: `[K, n]` -> `[K, n]` of the dtype and device of ``like`` `[n]`.
    """
    size = like.shape[0]
    generator = torch.Generator(like.device).manual_seed(seed)

    def normal(count: int) -> Tensor:
        return torch.randn(count, size, generator=generator, dtype=like.dtype, device=like.device)

    max_rank = min(max_rank, size)
    basis = image = like.new_zeros(0, size)
    rank = min(_FIRST_RANK, max_rank)
    while True:
        fresh = torch.linalg.qr(_without(basis, normal(rank - basis.shape[0])).mT).Q.mT
        basis, image = torch.cat([basis, fresh]), torch.cat([image, product(fresh)])
        values, vectors = _low_rank(basis, image)
        if rank >= max_rank:
            return values, vectors
        left_out = _norm(lambda v, w=values, u=vectors: product(v) - ((v @ u) * w) @ u.mT, normal(1))
        if left_out <= error:
            return values, vectors
        rank = min(2 * rank, max_rank)


def _low_rank(basis: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of Y (ΩᵀY)⁻¹ Yᵀ from the rows Ω and Y = H Ω, with a shift against rounding."""
    shift = torch.finfo(basis.dtype).eps * float(image.norm())
    shifted = image + shift * basis
    core = (basis @ shifted.mT).to(exact_dtype(basis.device))
    if not bool(core.isfinite().all()):
        raise SolveError(
            f"a product with the system is not finite ({Outcome.NOT_FINITE.name}): {Outcome.NOT_FINITE.value}"
        )
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    kept = values > torch.finfo(basis.dtype).eps * values[-1].clamp_min(0)
    root = (vectors[:, kept] * values[kept].rsqrt()).mT.to(basis.dtype) @ shifted
    # The spectrum of RᵀR for the root R `[r, n]`.
    q, upper = torch.linalg.qr(root.mT)
    u, singular, _ = torch.linalg.svd(upper)
    squares = singular.square()
    kept = squares > shift
    return squares[kept] - shift, (q @ u)[:, kept]


def _without(basis: Tensor, vectors: Tensor) -> Tensor:
    """The part of ``vectors`` orthogonal to the rows of ``basis``, projected twice against rounding."""
    for _ in range(2):
        vectors = vectors - (vectors @ basis.mT) @ basis
    return vectors


def _norm(product: Callable[[Tensor], Tensor], start: Tensor) -> float:
    """About the largest eigenvalue, by a few power steps."""
    vector, norm = start / start.norm(), 0.0
    for _ in range(_POWER_STEPS):
        image = product(vector)
        norm = float(image.norm())
        if not norm > 0:
            break
        vector = image / norm
    return norm


@final
@dataclass(frozen=True)
class SampledGram(AbstractPreconditioner):
    """Cholesky factor of I + (n/s) Ψ_Sᵀ Ψ_S for s rows of Ψ drawn at random: sketch and precondition.

    With s = ``oversampling`` F rows of like size, the condition number is about ((1 + √(F/s)) / (1 - √(F/s)))².

    Attributes:
        oversampling: s/F, at least 1 (all rows are taken if there are no more).
        per_layer: Keep only the blocks of the layers, whose memory and time are sums of squares and cubes of the
            layers' sizes instead of F² and F³; the better the less the layers interact.
        seed: Of the sample.

    References:
        Rokhlin and Tygert (2008), A Fast Randomized Algorithm for Overdetermined Linear Least-Squares Regression.
        Meng, Saunders and Mahoney (2014), LSRN, theorem 4.4 (condition number).
    """

    oversampling: float = 3.0
    per_layer: bool = False
    seed: int = 0
    space: Space = field(default="weight", init=False)

    def __post_init__(self) -> None:
        check_positive(oversampling=self.oversampling)
        check_flags(per_layer=self.per_layer)
        check_count(0, seed=self.seed)

    def counted(self, sizes: Sizes) -> Counted:
        f, item = sizes.features, sizes.itemsize
        s = min(sizes.rows, self.oversampling * f)
        once = Work(s * f**2 + f**3 / 3, 4 * item * s * f, 10 + s * f / 2**20)
        return Counted(
            once, Work(2 * f**2, item * f**2 / sizes.columns, 2), 2.0 * item * f**2, _TYPICAL_ITERATIONS // 2
        )

    def build(self, system: WhitenedSystem) -> AbstractFactor:
        features = system.weighted.features
        indices = [torch.arange(features.num_features, device=features.device)]
        if self.per_layer:
            groups = features.backend.feature_groups(features.device)
            indices = [(groups == group).nonzero().squeeze(-1) for group in range(int(groups.max()) + 1)]
        # Rounding in the data's precision may leave a Gram matrix that is not positive: then once more in float64, or
        # there at once where it is sure to.
        rounding = float(features.total(system.diagonal().sum())) * torch.finfo(features.dtype).eps
        exact = exact_dtype(features.device)
        moments: list[Tensor] = []
        for dtype in (exact,) if rounding > _ROUNDING else (features.dtype, exact):
            moments = self._moments(system.to(dtype), indices)
            lowers, failed = zip(*(torch.linalg.cholesky_ex(moment) for moment in moments), strict=True)
            if not any(bool(info) for info in failed):
                factors = [CholeskyFactor(lower.to(features.dtype)) for lower in lowers]
                return BlockFactor(factors, indices) if self.per_layer else factors[0]
        finite = all(bool(moment.isfinite().all()) for moment in moments)
        outcome = Outcome.NOT_POSITIVE if finite else Outcome.NOT_FINITE
        raise SolveError(f"the sampled Gram matrix cannot be factorised ({outcome.name}): {outcome.value}")

    def _moments(self, system: WhitenedSystem, indices: list[Tensor]) -> list[Tensor]:
        """I + (n/s) Ψ_Sᵀ Ψ_S of each block of features."""
        features, scales = system.weighted.features, system.weighted.scales
        wanted = math.ceil(self.oversampling * features.num_features / features.num_outputs)
        x, chosen = features.sample(wanted, self.seed)
        sampled, noise = Features(features.backend, x), system.likelihood.at(chosen)
        samples, held = (
            features.place[1],
            features.total(x.new_tensor(float(x.shape[0]), dtype=exact_dtype(x.device))),
        )
        share = float(samples / held) ** 0.5
        moments = [scales.new_zeros(index.numel(), index.numel()) for index in indices]
        for part, block in sampled.blocks():
            inputs = slice(part.start // features.num_outputs, part.stop // features.num_outputs)
            whitened = noise.at(inputs).rows(block * (share * scales))
            for moment, index in zip(moments, indices, strict=True):
                # One block of all features is the whole: no copy of it.
                own = whitened if index.numel() == whitened.shape[-1] else whitened[:, index]
                add_second_moment(moment, own)
        for index, moment in enumerate(moments):
            mirror(moment)
            moments[index] = features.total(moment)
            moments[index].diagonal().add_(1)
        return moments
