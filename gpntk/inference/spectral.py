"""The marginal likelihood of s K + σ² I as a function of s and σ², after one eigendecomposition of K."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, final

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

_GRID = 241
_LARGEST_RATIO = 1e10
# Smallest marginal variance, in units where y is of order one; keeps a perfect fit from an infinite likelihood.
_MIN_VARIANCE = 1e-12


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
        y: Targets `[N]`, of order one.
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
        eigenvalues, vectors = torch.linalg.eigh(gram)
        # Rounding leaves eigenvalues of either sign near zero; K is positive semi-definite by construction.
        self._eigenvalues = eigenvalues.clamp_min(0)
        self._y = vectors.mT @ y
        self._basis = vectors.mT @ (y.new_zeros(y.shape[0], 0) if basis is None else basis)
        self._level = self._eigenvalues.mean().item() or 1.0
        self._smallest_ratio = smallest_noise(y.dtype) * max(self._eigenvalues.max().item(), self._level)

    def __call__(self, scale: float, noise: float, coefficients: Tensor | None = None) -> float:
        """Log marginal likelihood at s = ``scale``, σ² = ``noise``, c = ``coefficients``."""
        variances = scale * self._eigenvalues + noise
        residual = self._y if coefficients is None else self._y - self._basis @ coefficients
        return float(-0.5 * (residual.square() / variances + variances.log() + math.log(2 * math.pi)).sum())

    def maximize(self, min_noise: float = 0.0) -> SpectralFit:
        """The maximum over s, σ² and c, with σ² >= ``min_noise`` and s K + σ² I fit to be factorised."""
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
        coefficients = torch.linalg.lstsq(weighted.mT @ self._basis, weighted.mT @ self._y).solution
        residual = self._y - self._basis @ coefficients
        scale = max((residual.square() / variances).mean().item(), _MIN_VARIANCE / (self._level + ratio))
        if scale * ratio < min_noise:
            # On the bound the ratio sweeps the scale instead.
            scale = min_noise / ratio
        return SpectralFit(scale, scale * ratio, coefficients, self(scale, scale * ratio, coefficients))
