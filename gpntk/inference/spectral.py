"""The marginal likelihood of s K + σ² I as a function of s and σ², after one eigendecomposition of K."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, final

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from gpntk._checks import check_magnitude
from gpntk.errors import InputError
from gpntk.inference.direct import spectrum
from gpntk.inference.features import AbstractFeatures, exact_dtype
from gpntk.inference.ranks import AbstractRanks, Alone

_GRID = 241
_LARGEST_RATIO = 1e10
# Smallest marginal variance, in the unit of y; keeps a perfect fit from an infinite likelihood.
_MIN_VARIANCE = 1e-12
# Eigenvalues of ΦᵀΦ that are rounding, in units of the largest.
_ROUNDING = 1e-12
# Stands for the exponent of a zero.
_NOTHING = 10**6


def smallest_noise(dtype: torch.dtype) -> float:
    """Noise, relative to the largest prior variance, below which s K + σ² I cannot be factorised in ``dtype``."""
    return torch.finfo(dtype).eps ** 0.65


class SpectralFit(NamedTuple):
    """Maximum of the marginal likelihood.

    Attributes:
        scale: s, the prior variance that multiplies K.
        noise: σ², the noise variance.
        coefficients: c `[Q]` of the prior mean H c (empty without a basis).
        log_marginal_likelihood: log N(y; H c, s K + σ² I), in nats.
    """

    scale: float
    noise: float
    coefficients: Tensor
    log_marginal_likelihood: float


@final
class SpectralMarginalLikelihood:
    """log N(y; H c, s K + σ² I) in O(N) per value, for any s and σ².

    With K = U diag(λ) Uᵀ and ρ = σ²/s, the best s and c are closed forms of ρ,

        c = (Hᵀ D⁻¹ H)⁻¹ Hᵀ D⁻¹ y,   s = (1/N) (y - H c)ᵀ D⁻¹ (y - H c),   D = diag(λ + ρ) (all in the basis U),

    so that maximising over (s, σ², c) is a search along one line, done globally on a grid and then refined.

    Args:
        gram: K `[N, N]`, symmetric positive semi-definite.
        y: Targets `[N]`.
        basis: H `[N, Q]`, the columns of the prior mean; None for mean zero.

    Example:
        >>> import torch
        >>> x = torch.linspace(0, 1, 30, dtype=torch.float64)
        >>> gram = (-8 * (x[:, None] - x) ** 2).exp()
        >>> fit = SpectralMarginalLikelihood(gram, (4 * x).sin()).maximize()
        >>> fit.noise < 1e-6 < fit.scale
        True

    References:
        Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, eq. 2.30 and section 2.7.
    """

    def __init__(self, gram: Tensor, y: Tensor, basis: Tensor | None = None) -> None:
        self._unit = _unit(y, Alone())
        values, vectors = torch.linalg.eigh(gram)
        basis = y.new_zeros(y.shape[0], 0) if basis is None else basis
        # Rounding leaves eigenvalues of either sign near zero; K is positive semi-definite by construction.
        self._set(values.clamp_min(0), vectors.mT @ (y / self._unit), vectors.mT @ basis)

    @classmethod
    def from_features(
        cls, features: AbstractFeatures, y: Tensor, basis: Tensor | None = None
    ) -> SpectralMarginalLikelihood:
        """That of K = Φ Φᵀ, from the smaller of Φ Φᵀ `[n, n]` and ΦᵀΦ `[F, F]`, in float64.

        The spectrum is kept with the features, for the solver that predicts later. In weight space Φ v_i / √λ_i are the
        eigenvectors of K with eigenvalues λ_i > 0; on all that is orthogonal to them, K is zero.

        Args:
            features: Φ, in memory, streamed, or spread over processes.
            y: Targets `[n]` of the rows held.
            basis: H `[n, Q]` of the rows held.
        """
        dtype = exact_dtype(features.device)
        y, features = y.to(dtype), features.to(dtype)
        basis = y.new_zeros(y.shape[0], 0) if basis is None else basis.to(dtype)
        likelihood = cls.__new__(cls)
        likelihood._unit = _unit(y, features.ranks)
        y = y / likelihood._unit
        if features.num_rows <= features.num_features and not features.sharded:
            values, vectors = spectrum(features, "function")
            likelihood._set(values, vectors.mT @ y, vectors.mT @ basis)
            return likelihood
        values, vectors = spectrum(features, "weight")
        kept = values > _ROUNDING * values.max()
        values, roots = values[kept], (vectors[:, kept] * values[kept].rsqrt()).mT
        both = torch.cat([y.unsqueeze(-1), basis], -1)
        inside = roots @ features.vjp(both.mT.contiguous()).mT
        outside = features.total(both.mT @ both) - inside.mT @ inside
        rows = int(features.total(torch.tensor(features.num_rows)))
        likelihood._set(values, inside[:, 0], inside[:, 1:], outside, rows - values.shape[0])
        return likelihood

    def _set(
        self, eigenvalues: Tensor, y: Tensor, basis: Tensor, outside: Tensor | None = None, dimension: int = 0
    ) -> None:
        """Take coordinates in the eigenbasis, and the second moment of [y, H] `[1 + Q, 1 + Q]` where K is zero."""
        self._eigenvalues, self._y, self._basis = eigenvalues, y, basis
        self._outside = y.new_zeros(1 + basis.shape[1], 1 + basis.shape[1]) if outside is None else outside
        self._dimension, self._rows = dimension, y.shape[0] + dimension
        self._level = eigenvalues.sum().item() / max(1, self._rows) or 1.0
        largest = eigenvalues.max().item() if eigenvalues.numel() else 0.0
        self._smallest_ratio = smallest_noise(y.dtype) * max(largest, self._level)

    def __call__(self, scale: float, noise: float, coefficients: Tensor | None = None) -> float:
        """Log marginal likelihood at s = ``scale``, σ² = ``noise``, c = ``coefficients``."""
        square = self._unit**2
        fit = SpectralFit(scale / square, noise / square, self._y.new_zeros(self._basis.shape[1]), 0.0)
        if coefficients is not None:
            fit = fit._replace(coefficients=coefficients.to(self._y) / self._unit)
        return self._value(fit) - self._rows * math.log(self._unit)

    def _value(self, fit: SpectralFit) -> float:
        """Log marginal likelihood of y in its unit."""
        variances = fit.scale * self._eigenvalues + fit.noise
        inside, outside = self._residual(fit.coefficients)
        quad = (inside.square() / variances).sum() + outside / fit.noise
        logdet = variances.log().sum() + self._dimension * math.log(fit.noise)
        return float(-0.5 * (quad + logdet + self._rows * math.log(2 * math.pi)))

    def _residual(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """y - H c where K is not zero `[r]`, and its squared norm elsewhere `[]`."""
        combination = torch.cat([coefficients.new_ones(1), -coefficients])
        squares = combination @ self._outside @ combination
        return self._y - self._basis @ coefficients, squares.clamp_min(0)

    def maximize(self, min_noise: float = 0.0) -> SpectralFit:
        """The maximum over s, σ² and c, with σ² >= ``min_noise`` and s K + σ² I fit to be factorised.

        Where K is zero all s are alike, and s = σ².

        Raises:
            InputError: ``min_noise`` is negative.
        """
        if not min_noise >= 0:
            raise InputError(f"min_noise={min_noise}: give a variance, zero or more.")
        square = self._unit**2
        fit = self._maximum(min_noise / square)
        value = fit.log_marginal_likelihood - self._rows * math.log(self._unit)
        return SpectralFit(fit.scale * square, fit.noise * square, fit.coefficients * self._unit, value)

    def _maximum(self, min_noise: float) -> SpectralFit:
        """That of y in its unit."""
        if not self._eigenvalues.any():
            return self._profile(0.0, min_noise)
        low, high = math.log(self._smallest_ratio), math.log(_LARGEST_RATIO * self._level)
        grid = torch.linspace(low, high, _GRID).tolist()
        fits = [self._profile(log_ratio, min_noise) for log_ratio in grid]
        best = max(range(_GRID), key=lambda index: fits[index].log_marginal_likelihood)
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, _GRID - 1)]
        refined: Any = minimize_scalar(
            lambda log_ratio: -self._profile(log_ratio, min_noise).log_marginal_likelihood,
            bounds=(low, high),
            method="bounded",
            options={"xatol": 1e-9},
        )
        candidates = (self._profile(float(refined.x), min_noise), fits[best])
        return max(candidates, key=lambda fit: fit.log_marginal_likelihood)

    def _profile(self, log_ratio: float, min_noise: float) -> SpectralFit:
        """The best s and c for a given ratio ρ = σ²/s."""
        ratio = math.exp(log_ratio)
        variances = self._eigenvalues + ratio
        weighted = self._basis / variances.unsqueeze(-1)
        normal = weighted.mT @ self._basis + self._outside[1:, 1:] / ratio
        coefficients = torch.linalg.lstsq(normal, weighted.mT @ self._y + self._outside[1:, 0] / ratio).solution
        inside, outside = self._residual(coefficients)
        quad = ((inside.square() / variances).sum() + outside / ratio).item()
        scale = max(quad / self._rows, _MIN_VARIANCE / (self._level + ratio))
        if scale * ratio < min_noise:
            # On the bound the ratio sweeps the scale instead.
            scale = min_noise / ratio
        fit = SpectralFit(scale, scale * ratio, coefficients, math.nan)
        return fit._replace(log_marginal_likelihood=self._value(fit))


def _unit(y: Tensor, ranks: AbstractRanks) -> float:
    """A power of two near the largest |y| of all ranks: results do not depend on units, and squares do not overflow."""
    check_magnitude(y)
    if not bool(y.isfinite().all()):
        raise InputError("y has NaN or infinite values: leave these rows out.")
    largest = y.abs().max() if y.numel() else y.new_zeros(())
    exponent = int(torch.frexp(largest).exponent) if largest > 0 else -_NOTHING
    exponent = max(there[0] for there in ranks.gather([exponent], y.device))
    return 1.0 if exponent == -_NOTHING else math.ldexp(1.0, exponent)
