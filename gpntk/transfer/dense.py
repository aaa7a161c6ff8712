"""Exact GP regression with a sum of components, by Cholesky factorisation, for up to a few thousand labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, final

import torch
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor

from gpntk.inference.hyperposterior import Draws, Hyperparameter, infer
from gpntk.transfer.components import SumOfComponents

_LARGEST_NOISE = 1e4
# Relative to the targets' variance; below it a covariance of order one cannot be factorised.
_SMALLEST_NOISE = {torch.float64: 1e-10, torch.float32: 1e-5}


class Prediction(NamedTuple):
    """A Gaussian prediction: mean `[N*C]`, and a variance `[N*C]` or covariance `[N*C, N*C]`, rows n*C + c."""

    mean: Tensor
    spread: Tensor


class _Factor(NamedTuple):
    """K + D of one draw: its Cholesky factor `[B', n, n]` and (K + D)⁻¹ y `[B, n]`."""

    cholesky: Tensor
    weights: Tensor


@final
class DenseGP:
    """y = g(x) + noise with g ~ GP(0, K_θ), averaged over draws of its hyperparameters θ; targets of order one.

    Shared covariances make B = C problems of n = N labels, others B = 1 problem of n = N*C. The noise variance of a
    label is σ² times its ``relative_noise`` plus its ``known_noise``; labels that are NaN are left out.

    Args:
        prior: K_θ.
        x: Inputs `[N, D]`.
        y: Targets `[N, C]`, NaN where missing.
        noise: Prior of σ², as its median and spread.
        relative_noise: `[N, C]`; None for ones.
        known_noise: `[N, C]`; None for zeros.
        parts: Those of x with itself, if they are known already.
    """

    def __init__(
        self,
        prior: SumOfComponents,
        x: Tensor,
        y: Tensor,
        noise: tuple[float, float],
        *,
        relative_noise: Tensor | None = None,
        known_noise: Tensor | None = None,
        parts: tuple[Tensor, ...] | None = None,
    ) -> None:
        self.prior, self.x, self.y, self._noise_prior = prior, x, y, noise
        bounds = (_SMALLEST_NOISE[x.dtype], _LARGEST_NOISE)
        self.hyperparameters = (*prior.hyperparameters, Hyperparameter("noise", *noise, bounds))
        self._parts = prior.parts(x, x) if parts is None else parts
        self._relative = torch.ones_like(y) if relative_noise is None else relative_noise
        self.known_noise = torch.zeros_like(y) if known_noise is None else known_noise
        self._seen = ~y.isnan()
        # One factorisation serves all outputs whose labels and noises are alike.
        columns = torch.stack([self._relative, self.known_noise, self._seen.to(y)])
        self._alike = prior.shared and bool((columns == columns[..., :1]).all())
        self.draws: Draws | None = None
        self._factors: list[_Factor] = []

    # --- hyperparameters ---------------------------------------------------------------------------------------

    def fit(self, average: bool, fixed: Mapping[str, float] | None = None, start: Tensor | None = None) -> Draws:
        """Infer the hyperparameters; see `gpntk.inference.hyperposterior.infer`."""
        draws = infer(self.log_likelihood, self.hyperparameters, average, start, fixed)
        self.set_draws(draws)
        return draws

    def set_draws(self, draws: Draws) -> None:
        """Predict with these draws from now on."""
        self._use(draws, [None] * len(draws.logs))

    def log_likelihood(self, logs: Tensor) -> Tensor:
        """log N(y; 0, K_θ + D), in nats `[]`; -inf where it cannot be factorised."""
        cholesky, info = torch.linalg.cholesky_ex(self._noisy(logs))
        # Where rounding is all that is left of the smallest pivot, the next rows would not factorise.
        pivots = cholesky.detach().diagonal(dim1=-2, dim2=-1)
        rounding = pivots.shape[-1] * torch.finfo(pivots.dtype).eps
        if info.any() or (pivots.amin(-1) < math.sqrt(rounding) * pivots.amax(-1)).any():
            return torch.tensor(-math.inf, dtype=torch.float64, device="cpu")
        targets = self._targets()
        white = torch.linalg.solve_triangular(cholesky, targets.unsqueeze(-1), upper=False)
        logdet = 2 * cholesky.diagonal(dim1=-2, dim2=-1).log().sum() * (len(targets) / len(cholesky))
        return (-0.5 * (white.square().sum() + logdet + self._seen.sum() * math.log(2 * math.pi))).double().cpu()

    # --- predictions -------------------------------------------------------------------------------------------

    def predict(self, x: Tensor, covariance: bool = False) -> Prediction:
        """The posterior of g at x `[M, D]`: the moments of the mixture over draws."""
        parts = self.prior.parts(x, self.x)
        own = self.prior.parts(x, x) if covariance else self.prior.blocks(x)
        moments = [self._moments(logs, factor, parts, own, covariance) for logs, factor in self._weighted()]
        return self._mixed(moments)

    def noise_variance(self) -> float:
        """The mean over draws of σ²."""
        return float(self._draws().weights @ self._draws().logs[:, -1].exp())

    def leave_one_out(self) -> Prediction:
        """Mean and variance of each label given all the others `[N*C]`, noise included; NaN where it is missing.

        References:
            Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, eqs. 5.10-5.12.
        """
        moments = []
        for factor in self._factors:
            variances = 1 / torch.cholesky_inverse(factor.cholesky).diagonal(dim1=-2, dim2=-1)
            means = self._targets() - factor.weights * variances
            moments.append((self._rows(means), self._rows(variances.expand_as(means))))
        mean, spread = self._mixed(moments)
        hidden = self._seen.reshape(-1).logical_not()
        return Prediction(mean.masked_fill(hidden, math.nan), spread.masked_fill(hidden, math.nan))

    def effective_parameters(self) -> float:
        """tr K (K + D)⁻¹, how many independent numbers the labels have taught, averaged over draws.

        References:
            Hastie, Tibshirani and Friedman (2009), The Elements of Statistical Learning, section 5.4.1.
        """
        counts = []
        for logs, factor in self._weighted():
            inverse = torch.cholesky_inverse(factor.cholesky).diagonal(dim1=-2, dim2=-1)
            noisy = (self._noise(logs) * inverse).masked_select(self._mask().expand_as(inverse))
            counts.append((self._mask().sum() - noisy.sum()) * (len(factor.weights) / len(inverse)))
        return float(self._draws().weights.to(counts[0]) @ torch.stack(counts))

    def condition_on(
        self, x: Tensor, y: Tensor, relative_noise: Tensor | None = None, known_noise: Tensor | None = None
    ) -> DenseGP:
        """The same with more labels, hyperparameters as they are; Jacobians and factors of the old ones are kept."""
        parts = self.prior.grown(self._parts, self.x, x)
        relative = torch.ones_like(y) if relative_noise is None else relative_noise
        known = torch.zeros_like(y) if known_noise is None else known_noise
        rows = [
            torch.cat(pair)
            for pair in ((self.x, x), (self.y, y), (self._relative, relative), (self.known_noise, known))
        ]
        grown = DenseGP(
            self.prior, rows[0], rows[1], self._noise_prior, relative_noise=rows[2], known_noise=rows[3], parts=parts
        )
        grown._use(self._draws(), self._factors)
        return grown

    # --- private -----------------------------------------------------------------------------------------------

    def _use(self, draws: Draws, known: Sequence[_Factor | None]) -> None:
        """Predict with these draws, whose factors for the first labels are ``known``."""
        self.draws = draws
        with torch.no_grad():
            self._factors = [self._factor(logs, old) for logs, old in zip(draws.logs, known, strict=True)]

    def _draws(self) -> Draws:
        assert self.draws is not None
        return self.draws

    def _weighted(self) -> list[tuple[Tensor, _Factor]]:
        return list(zip(self._draws().logs, self._factors, strict=True))

    def _problems(self, values: Tensor) -> Tensor:
        """`[N, C]` as `[B, n]`."""
        return values.mT if self.prior.shared else values.reshape(1, -1)

    def _rows(self, values: Tensor) -> Tensor:
        """`[B, m]` as `[M*C]`."""
        return values.mT.reshape(-1)

    def _mask(self) -> Tensor:
        """Which labels there are `[B', n]`."""
        seen = self._problems(self._seen)
        return seen[:1] if self._alike else seen

    def _targets(self) -> Tensor:
        return self._problems(self.y.nan_to_num(0.0))

    def _noise(self, logs: Tensor) -> Tensor:
        """Noise variances `[B', n]`."""
        noise = self._problems(logs[-1].exp().to(self.y) * self._relative + self.known_noise)
        return noise[:1] if self._alike else noise

    def _noisy(self, logs: Tensor) -> Tensor:
        """K + D `[B', n, n]`, with rows of the identity for labels that are missing."""
        mask = self._mask()
        covariance = self.prior.covariance(logs[:-1], self._parts)
        noise = torch.where(mask, self._noise(logs), torch.ones((), dtype=covariance.dtype, device=covariance.device))
        if mask.all():
            return covariance + torch.diag_embed(noise)
        return covariance * mask.unsqueeze(-1) * mask.unsqueeze(-2) + torch.diag_embed(noise)

    def _factor(self, logs: Tensor, known: _Factor | None = None) -> _Factor:
        noisy = self._noisy(logs)
        if known is None or len(known.cholesky) != len(noisy):
            cholesky = psd_safe_cholesky(noisy)
        else:
            cholesky = _extended(known.cholesky, noisy)
        targets = self._targets()
        # All right-hand sides at once where one factor serves them.
        columns = targets.mT.unsqueeze(0) if self._alike else targets.unsqueeze(-1)
        solution = torch.cholesky_solve(columns, cholesky)
        return _Factor(cholesky, solution[0].mT if self._alike else solution.squeeze(-1))

    def _moments(
        self, logs: Tensor, factor: _Factor, parts: tuple[Tensor, ...], own: tuple[Tensor, ...], joint: bool
    ) -> tuple[Tensor, Tensor]:
        """Mean `[M*C]` and variance `[M*C]` or covariance `[M*C, M*C]` under one draw."""
        cross = self.prior.covariance(logs[:-1], parts)
        masked = cross * self._mask().unsqueeze(-2)
        mean = (masked @ factor.weights.unsqueeze(-1)).squeeze(-1)
        explained = torch.linalg.solve_triangular(factor.cholesky, masked.mT, upper=False)
        problems = self.y.shape[1] if self.prior.shared else 1
        prior = self.prior.covariance(logs[:-1], own)
        if not joint:
            prior = prior.diagonal(dim1=-2, dim2=-1).reshape(1, -1)
            # Rounding can leave the variance of a training point a hair below zero.
            variance = (prior - explained.square().sum(-2)).clamp_min(0)
            return self._rows(mean), self._rows(variance.expand(problems, -1))
        covariance = (prior - explained.mT @ explained).expand(problems, -1, -1)
        if not self.prior.shared:
            return self._rows(mean), covariance[0]
        by_output = torch.diag_embed(covariance.movedim(0, -1))  # [M, M, C, C]
        return self._rows(mean), by_output.movedim(2, 1).flatten(2).flatten(0, 1)

    def _mixed(self, moments: list[tuple[Tensor, Tensor]]) -> Prediction:
        means, spreads = (torch.stack(values) for values in zip(*moments, strict=True))
        weights = self._draws().weights.to(means)
        mean = weights @ means
        deviation = means - mean
        if spreads.dim() == means.dim():
            return Prediction(mean, weights @ (spreads + deviation.square()))
        return Prediction(mean, torch.einsum("s,sij->ij", weights, spreads) + (deviation.mT * weights) @ deviation)


def _extended(cholesky: Tensor, matrix: Tensor) -> Tensor:
    """The Cholesky factor of ``matrix`` `[B, n, n]`, from that of its leading rows and columns `[B, m, m]`.

    References:
        Golub and Van Loan (2013), Matrix Computations, section 4.2.9, by blocks.
    """
    size = cholesky.shape[-1]
    below = torch.linalg.solve_triangular(cholesky, matrix[..., :size, size:], upper=False).mT
    corner = psd_safe_cholesky(matrix[..., size:, size:] - below @ below.mT)
    extended = torch.zeros_like(matrix)
    extended[..., :size, :size], extended[..., size:, :size], extended[..., size:, size:] = cholesky, below, corner
    return extended
