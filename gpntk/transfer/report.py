"""What a fit says about the transfer itself: whether the source network helps, how much, and how far to trust it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gpntk.inference.features import draw
from gpntk.transfer.classification import TransferClassification
from gpntk.transfer.prior import STRONG_EVIDENCE, Candidate, MeanChoice
from gpntk.transfer.regression import TransferGP

# Labels on which priors are compared.
_MOST_LABELS = 300
_LEVELS = (0.5, 0.8, 0.9, 0.95)
_BINS = 10


@final
@dataclass(frozen=True)
class Report:
    """What `TransferRegressor` and `TransferClassifier` leave as ``report_``; printed, it is a table.

    Log evidences are those of one (random) set of at most 300 labels, so that they can be compared; for classification
    they are Laplace's, whatever the method in use.

    Attributes:
        kernel: The kernel in use.
        log_evidence: In nats, by prior: the one in use, ``"stationary alone"`` without the network (with an RBF or
            Matérn kernel and a constant mean), and ``"readout alone"``.
        effective_parameters: tr K (K + D)⁻¹: how many independent numbers the labels have taught. None if unknown.
        alignment: Cosine between the tangent kernel and what the network leaves unexplained, ``rᵀ K r / (|K| |r|²)``:
            whether the tangent space points where the new task needs it. Noise alone would have ``chance``.
        chance: The mean of ``alignment`` over independent residuals, ``tr K / (|K| n)``.
        score: Leave-one-out R² or accuracy, in closed form. None if unknown.
        log_density: Mean leave-one-out log density of a label, in nats. None if unknown.
        calibration: Nominal against leave-one-out frequency: of central intervals for regression, of the most probable
            class by its mean probability for classification. Empty if unknown.
        advice: A sentence.

    References:
        Cristianini et al. (2001), On Kernel-Target Alignment, NIPS 14.
        Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, sections 5.4.1 and 5.4.2.
    """

    kernel: str
    log_evidence: dict[str, float]
    effective_parameters: float | None
    alignment: float
    chance: float
    score: float | None
    log_density: float | None
    calibration: dict[float, float]
    advice: str

    def __str__(self) -> str:
        def cell(value: float | None) -> str:
            return "unknown" if value is None else f"{value:.3g}"

        lines = [f"{'kernel':38} {self.kernel}"]
        lines += [f"{'log evidence, ' + name:38} {value:.1f} nats" for name, value in self.log_evidence.items()]
        lines += [
            f"{'effective number of parameters':38} {cell(self.effective_parameters)}",
            f"{'alignment (by chance)':38} {cell(self.alignment)} ({cell(self.chance)})",
            f"{'leave-one-out score':38} {cell(self.score)}",
            f"{'leave-one-out log density':38} {cell(self.log_density)}",
        ]
        lines += [f"{f'calibration at {level:.0%}':38} {seen:.0%}" for level, seen in self.calibration.items()]
        return "\n".join([*lines, self.advice])


def report_regression(gp: TransferGP) -> Report:
    """The report of a fitted `TransferGP`."""
    rows = _some_rows(len(gp.x), gp.num_outputs).to(gp.x.device)

    def evidence(candidate: Candidate, mean: MeanChoice) -> float:
        return gp.variant(candidate, mean, rows).log_evidence

    evidences = {
        str(gp.chosen): evidence(gp.chosen, gp.mean),
        "stationary alone": evidence(Candidate("stationary"), "constant"),
    }
    if gp.chosen.kernel != "nngp" and gp.has_readout:
        evidences["readout alone"] = evidence(Candidate("nngp"), gp.mean)
    residual, kernel = gp.residual_and_tangent_kernel(rows)
    score = log_density = None
    calibration: dict[float, float] = {}
    left_out = gp.leave_one_out()
    if left_out is not None:
        y = gp.y.reshape(-1)
        seen = ~y.isnan()
        error, variance, y = (y - left_out.mean)[seen], left_out.spread[seen], y[seen]
        spread = (y - y.mean()).square().mean()
        score = 1 - (error.square().mean() / spread).item() if spread > 0 else None
        log_density = -0.5 * (error.square() / variance + variance.log() + math.log(2 * math.pi)).mean().item()
        standard = (error / variance.sqrt()).abs()
        calibration = {level: (standard <= _quantile(level)).double().mean().item() for level in _LEVELS}
    alignment, chance = _alignment(residual, kernel)
    effective = gp.effective_parameters()
    return Report(
        str(gp.chosen), evidences, effective, alignment, chance, score, log_density, calibration,
        _advice(evidences, gp.chosen, effective),
    )  # fmt: skip


def report_classification(model: TransferClassification) -> Report:
    """The report of a fitted `TransferClassification`."""
    rows = _some_rows(len(model.x), 1).to(model.x.device)
    evidences = {
        str(model.chosen): model.variant(model.chosen, model.mean, rows).log_evidence,
        "stationary alone": model.variant(Candidate("stationary"), "zero", rows).log_evidence,
    }
    if model.chosen.kernel != "nngp" and model.has_readout:
        evidences["readout alone"] = model.variant(Candidate("nngp"), model.mean, rows).log_evidence
    residual, kernel = model.residual_and_tangent_kernel(rows)
    score = log_density = None
    calibration: dict[float, float] = {}
    probabilities = model.leave_one_out()
    if probabilities is not None:
        top, classes = probabilities.max(-1)
        right = (classes == model.labels).double()
        own = probabilities.gather(1, model.labels.unsqueeze(-1)).clamp_min(torch.finfo(probabilities.dtype).tiny)
        score, log_density = right.mean().item(), own.log().mean().item()
        bins = (top * _BINS).long().clamp_max(_BINS - 1)
        calibration = {
            top[bins == index].mean().item(): right[bins == index].mean().item() for index in bins.unique().tolist()
        }
    alignment, chance = _alignment(residual, kernel)
    return Report(
        str(model.chosen), evidences, None, alignment, chance, score, log_density, calibration,
        _advice(evidences, model.chosen, None),
    )  # fmt: skip


def _alignment(residual: Tensor, kernel: Tensor) -> tuple[float, float]:
    """rᵀ K r / (|K| |r|²) and tr K / (|K| n), for K `[n, n]` and r `[n]`, or `[n, C]` if K is that of each output."""
    columns = residual.reshape(kernel.shape[0], -1)
    norm = torch.linalg.matrix_norm(kernel)
    squares = columns.square().sum()
    if squares == 0 or norm == 0:
        return 0.0, 0.0
    value = ((kernel @ columns) * columns).sum() / (norm * squares)
    return value.item(), (kernel.trace() / (norm * kernel.shape[0])).item()


def _advice(evidence: Mapping[str, float], chosen: Candidate, effective: float | None) -> str:
    own = evidence[str(chosen)]
    alone = evidence["stationary alone"]
    readout = evidence.get("readout alone", -math.inf)
    if chosen.kernel == "stationary" and alone <= own + STRONG_EVIDENCE:
        return "The labels are best explained without moves of the network's weights: by its prior mean and the inputs."
    if alone > own + STRONG_EVIDENCE:
        return (
            f"The labels are better explained without the source network, by {alone - own:.1f} nats: use a GP on the "
            "inputs, kernel='ntk+stationary', or a source network of a closer task."
        )
    if effective is not None and effective < 0.5:
        return "The labels have taught next to nothing: predictions are the prior mean's; more labels would help."
    if readout > own + STRONG_EVIDENCE:
        return f"The readout alone explains the labels {readout - own:.1f} nats better: kernel='nngp' is cheaper."
    if alone > own - STRONG_EVIDENCE:
        return "The labels do not yet tell whether the source network helps: compare again with more of them."
    return f"The source network helps by {own - alone:.1f} nats over a GP on the inputs."


def _some_rows(rows: int, outputs: int) -> Tensor:
    most = max(1, _MOST_LABELS // outputs)
    return torch.arange(rows) if rows <= most else draw(rows, most, seed=0)


def _quantile(level: float) -> float:
    """z with P(|standard normal| <= z) = level."""
    return torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)).item()
