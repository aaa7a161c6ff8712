"""Regression as the task of a transfer: targets in units of their own, a prior mean, noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import final

import torch
from torch import Tensor, nn

from gpntk._checks import check_values
from gpntk.errors import InputError
from gpntk.likelihoods import Link
from gpntk.transfer.candidates import MeanChoice
from gpntk.transfer.forms import AbstractForm
from gpntk.transfer.gaussian import GaussianModel, Labels, joined
from gpntk.transfer.prior import RESIDUAL, TARGET
from gpntk.transfer.task import AbstractTask, Checks, Prediction, Stage

# Labels up to which hyperparameters are averaged over; beyond, their posterior is narrow and its draws are expensive.
AVERAGE_LIMIT = 300
_PREDICTION_ROWS = 512
# Central intervals whose frequencies a report gives.
_LEVELS = (0.5, 0.8, 0.9, 0.95)
# Spreads of targets below so many units in their last place are rounding.
_ROUNDING = 8.0
# The share of the targets' variance below which, at so many rows, a network that leaves no more has seen them before.
_INTERPOLATED, _ENOUGH = 1e-3, 10
# Targets beyond these sizes have variances that no number can hold.
_LARGEST = {torch.float64: 1e140, torch.float32: 1e17}


@final
class RegressionTask(AbstractTask):
    """Targets y = m(x) + g(x) + noise, in units that make g of order one.

    Args:
        x: Inputs `[N, D]`.
        y: Targets `[N, C]`, NaN where missing.
        mean: Prior mean m: the network's, a constant, or zero.
        offset: The network's outputs `[N, C]` at given inputs.
        known_noise: Noise variances of the labels `[N, C]`, to which a learned one is added.
        weights: What the noise variances of the rows' labels are divided by `[N]`; None for ones.
        noise_network: Maps inputs to the logarithm of the relative noise variance.
        time_budget: Seconds that a fit may take; variances may take twice as long where means are iterated.
    """

    plain_mean = "constant"

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        mean: MeanChoice,
        offset: Callable[[Tensor], Tensor],
        *,
        known_noise: Tensor | None = None,
        weights: Tensor | None = None,
        noise_network: nn.Module | None = None,
        time_budget: float = 120.0,
    ) -> None:
        if y.isnan().all(0).any():
            raise InputError("y has an output with only missing values (NaN): give each at least one label.")
        sizes = y.abs().nan_to_num(0.0).amax(0)
        if bool(((sizes > _LARGEST[y.dtype]) | ((sizes > 0) & (sizes < 1 / _LARGEST[y.dtype]))).any()):
            raise InputError(
                f"y has targets of size {float(sizes.max()):.0e}, whose squares are beyond {y.dtype}: give them in "
                "other units."
            )
        if known_noise is not None:
            check_values(y.device, known_noise=known_noise)
            if known_noise.shape != y.shape or not bool((known_noise.isfinite() & (known_noise >= 0)).all()):
                raise InputError(f"known_noise must be variances {tuple(y.shape)}, finite and not below zero.")
        self.y, self.known_noise, self.weights, self._noise_network = y, known_noise, weights, noise_network
        self._network_outputs, self._time_budget = offset, time_budget
        outputs = y.shape[1]
        medians = RESIDUAL if mean == "network" else TARGET
        super().__init__(x, outputs, mean, medians)
        self.centre = y.nanmean(0) if mean == "constant" else y.new_zeros(outputs)
        self._units = units_of(y, self._residual())
        self.screened = max(1, AVERAGE_LIMIT // outputs)
        self.averages = int((~y.isnan()).sum()) <= AVERAGE_LIMIT

    @property
    def units(self) -> Tensor:
        return self._units

    def shared(self, stage: Stage) -> bool:  # noqa: ARG002
        return False

    def model(self, form: AbstractForm, rows: Tensor | None = None) -> GaussianModel:
        labels = self._labels(self.x, self.y, self.known_noise, self.weights)
        if rows is not None:
            relative, known = (None if part is None else part[rows] for part in labels[1:])
            labels = Labels(labels.y[rows], relative, known)
        return GaussianModel(form, labels, (self.medians.noise, self.medians.noise_spread), 2 * self._time_budget)

    def _labels(self, x: Tensor, y: Tensor, known_noise: Tensor | None, weights: Tensor | None) -> Labels:
        """Targets at x in units, and their noise."""
        known = None if known_noise is None else known_noise / self.units.square()
        relative = self._relative_noise(x)
        if weights is not None:
            relative = (torch.ones_like(y) if relative is None else relative) / weights.unsqueeze(-1)
            known = None if known is None else known / weights.unsqueeze(-1)
        return Labels((y - self.offset(x) - self.centre) / self.units, relative, known)

    def _residual(self) -> Tensor:
        return self.y - self.offset(self.x) - self.centre

    def offset(self, x: Tensor) -> Tensor:
        """What the GP need not explain `[M, C]`."""
        if self.mean == "network":
            return self._network_outputs(x)
        return torch.zeros(x.shape[0], self.num_outputs, dtype=x.dtype, device=x.device)

    def log_units(self, rows: Tensor | None = None) -> float:
        seen = ~self.y.isnan() if rows is None else ~self.y[rows].isnan()
        return float((seen * self.units.log()).sum())

    def noise_of(self, logs: Tensor) -> float:
        return float(logs[-1].exp())

    def flops(self, samples: int) -> float:
        return float(samples * self.num_outputs) ** 3

    def data(self) -> dict[str, Tensor]:
        data = {"x": self.x, "y": self.y, "yvar": self.known_noise, "weights": self.weights}
        return {name: tensor for name, tensor in data.items() if tensor is not None}

    def state(self) -> dict[str, Tensor]:
        return {"units": self.units, "centre": self.centre}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, value in (("units", self.units), ("centre", self.centre)):
            if state[name].shape != value.shape or (name == "units" and not bool((state[name] > 0).all())):
                raise InputError(f"{name} must be {len(value)} number(s), of units positive ones.")
        self._units, self.centre = state["units"].to(self.y), state["centre"].to(self.y)

    def variant(self, rows: Tensor, mean: MeanChoice) -> RegressionTask:
        known, weights = (None if part is None else part[rows] for part in (self.known_noise, self.weights))
        return self._with(self.x[rows], self.y[rows], known, weights, mean)

    def seems_trained_on(self) -> bool:
        if self.mean != "network" or len(self.x) < _ENOUGH:
            return False
        spread = (self.y - self.y.nanmean(0)).square().nanmean(0)
        return bool((self._residual().square().nanmean(0) < _INTERPOLATED * spread).all())

    def residual(self, rows: Tensor) -> Tensor:
        return (self._residual() / self.units)[rows].nan_to_num(0.0)

    def checks(self, model: GaussianModel) -> Checks:
        left_out = self.leave_one_out(model)
        y = self.y.reshape(-1)
        seen = ~y.isnan()
        error, variance, y = (y - left_out.mean)[seen], left_out.spread[seen], y[seen]
        spread = (y - y.mean()).square().mean()
        score = 1 - (error.square().mean() / spread).item() if spread > 0 else None
        log_density = -0.5 * (error.square() / variance + variance.log() + math.log(2 * math.pi)).mean().item()
        standard = (error / variance.sqrt()).abs()
        calibration = {level: (standard <= _quantile(level)).double().mean().item() for level in _LEVELS}
        return Checks(score, log_density, calibration)

    # --- predictions in the units of y -------------------------------------------------------------------------

    def predict(self, model: GaussianModel, x: Tensor, covariance: bool, observation_noise: bool) -> Prediction:
        """Posterior at x `[M, D]`: mean, and variances or covariance, of y (or of the noise-free function)."""
        with torch.no_grad():
            if covariance:
                return self._in_units(model, x, model.predict(x, covariance=True), observation_noise)
            parts = [
                self._in_units(model, rows, model.predict(rows), observation_noise)
                for rows in x.split(_PREDICTION_ROWS)
            ]
            return Prediction(*(torch.cat(pieces) for pieces in zip(*parts, strict=True)))

    @torch.no_grad()
    def mean_at(self, model: GaussianModel, x: Tensor) -> Tensor:
        parts = [
            (self.offset(rows) + self.centre).reshape(-1) + self.units.repeat(len(rows)) * model.mean(rows)
            for rows in x.split(_PREDICTION_ROWS)
        ]
        return torch.cat(parts)

    def probabilities(self, model: GaussianModel, x: Tensor, link: Link) -> Tensor:  # noqa: ARG002
        raise InputError("likelihood='gaussian' has targets, not classes: call predict instead of probabilities.")

    def leave_one_out(self, model: GaussianModel) -> Prediction:
        with torch.no_grad():
            return self._back(self.x, model.leave_one_out())

    def grown(
        self, model: GaussianModel, x: Tensor, y: Tensor, known_noise: Tensor | None, weights: Tensor | None
    ) -> tuple[RegressionTask, GaussianModel]:
        known = joined((self.y, self.known_noise), (y, known_noise), fill=0.0)
        together = joined((self.y[:, 0], self.weights), (y[:, 0], weights), fill=1.0)
        grown = self._with(torch.cat([self.x, x]), torch.cat([self.y, y]), known, together, self.mean)
        grown._units, grown.centre = self._units, self.centre
        return grown, model.condition_on(x, self._labels(x, y, known_noise, weights))

    def _back(self, x: Tensor, prediction: Prediction) -> Prediction:
        """A prediction of residuals in units, as one of y; x `[M, D]`."""
        units = self.units.repeat(len(x))
        spread = prediction.spread * (units.square() if prediction.spread.dim() == 1 else torch.outer(units, units))
        offset = (self.offset(x) + self.centre).reshape(-1)
        return Prediction(offset + units * prediction.mean, spread)

    def _in_units(self, model: GaussianModel, x: Tensor, prediction: Prediction, noisy: bool) -> Prediction:
        mean, spread = prediction
        if noisy:
            relative = self._relative_noise(x)
            noise = torch.ones_like(mean) if relative is None else relative.reshape(-1)
            noise = model.noise_variance() * noise
            spread = spread + (noise if spread.dim() == 1 else noise.diag())
        return self._back(x, Prediction(mean, spread))

    def _relative_noise(self, x: Tensor) -> Tensor | None:
        return None if self._noise_network is None else relative_noise(self._noise_network, x, self.num_outputs)

    def _with(
        self, x: Tensor, y: Tensor, known: Tensor | None, weights: Tensor | None, mean: MeanChoice
    ) -> RegressionTask:
        return RegressionTask(
            x,
            y,
            mean,
            self._network_outputs,
            known_noise=known,
            weights=weights,
            noise_network=self._noise_network,
            time_budget=self._time_budget,
        )


def units_of(y: Tensor, residual: Tensor) -> Tensor:
    """What the GP measures each output in `[C]`: the spread of its targets, times one factor for all.

    The factor makes the mean square of the residuals one. Targets and residuals are `[N, C]`, NaN where missing. What
    is rounding beside the targets counts as zero, and the largest target is the unit of an output without spread.
    """
    largest = y.abs().nan_to_num(0.0).amax(0)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    rounding = _ROUNDING * torch.finfo(y.dtype).eps
    spread = (y - y.nanmean(0)).square().nanmean(0).sqrt()
    spread = torch.where(spread > rounding * largest, spread, largest)
    factor = (residual / spread).square().nanmean().sqrt()
    return spread * torch.where(factor > rounding * (largest / spread).amax(), factor, torch.ones_like(factor))


def _quantile(level: float) -> float:
    """z with P(|standard normal| <= z) = level."""
    return torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64, device="cpu")).item()


def relative_noise(network: nn.Module, x: Tensor, num_outputs: int) -> Tensor:
    """Noise variances `[N, C]`, up to a common factor, at x `[N, D]`, from a network that returns their logarithms.

    Raises:
        InputError: The network returns values of the wrong shape, or such as are not finite.
    """
    weights = next(network.parameters(), x)
    with torch.no_grad():
        logs = network(x.to(weights))
    shapes = ((len(x),), (len(x), 1), (len(x), num_outputs))
    if logs.shape not in shapes or not torch.isfinite(logs).all():
        raise InputError(
            f"noise_network returned shape {tuple(logs.shape)}, or values that are not finite: it must map inputs to "
            f"the logarithm of the noise variance, [{len(x)}] or [{len(x)}, {num_outputs}]."
        )
    return logs.to(x).reshape(len(x), -1).exp().expand(-1, num_outputs)
