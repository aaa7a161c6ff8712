"""What a fit says about the transfer itself: whether the source network helps, how much, and how far to trust it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from tqdm import tqdm

from gpntk.inference.features import draw
from gpntk.transfer.candidates import STRONG_EVIDENCE, Candidate, Comparison, MeanChoice
from gpntk.transfer.gp import TransferGP

# The prior around the network's output, where the one in use is around another mean.
_AROUND = "around the network's output"
# Labels on which priors are compared.
_MOST_LABELS = 300


@final
@dataclass(frozen=True)
class Report:
    """What `TransferRegressor` and `TransferClassifier` leave as ``report_``; printed, it is a table.

    Log evidences are those of one (random) set of at most 300 labels, so that they can be compared; for classification
    they are Laplace's, whatever the method in use.

    Attributes:
        kernel: The kernel in use.
        log_evidence: In nats, by prior: the one in use, ``"stationary alone"`` without the network (with an RBF or
            Matérn kernel and a constant mean; not where inputs are ids or objects), and ``"readout alone"``; with
            the network's output for prior mean, where the one in use has another.
        left_out: Mean leave-one-out log density of a label, in nats, by the same priors, on the same labels.
        effective_parameters: tr K (K + D)⁻¹: how many independent numbers the labels have taught. None if unknown.
        alignment: Cosine between the tangent kernel and what the network leaves unexplained, ``rᵀ K r / (|K| |r|²)``:
            whether the tangent space points where the new task needs it. Noise alone would have ``chance``. Where the
            tangent kernel takes more than minutes, that of the readout stands for it.
        chance: The mean of ``alignment`` over independent residuals, ``tr K / (|K| n)``.
        score: Leave-one-out R² or accuracy, in closed form. None if unknown.
        log_density: Mean leave-one-out log density of a label, in nats. None if unknown.
        calibration: Nominal against leave-one-out frequency: of central intervals for regression, of the most probable
            class by its mean probability for classification. Empty if unknown.
        advice: A sentence.
        method: How the posterior was solved, and by which features where there are any.
        compared: What kernels were compared, on at most 300 labels (100 where they are classes): the evidence of each
            and the seconds it took. None if there was no choice, or the model is from a file.
        notes: What the time budget left out, how far random features are from what they stand for, and which entry of
            what the network returns is its output, a line each.

    References:
        Cristianini et al. (2001), On Kernel-Target Alignment, NIPS 14.
        Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, sections 5.4.1 and 5.4.2.
    """

    kernel: str
    log_evidence: dict[str, float]
    left_out: dict[str, float]
    effective_parameters: float | None
    alignment: float
    chance: float
    score: float | None
    log_density: float | None
    calibration: dict[float, float]
    advice: str
    method: str = "unknown"
    notes: tuple[str, ...] = ()
    compared: Comparison | None = None

    def __str__(self) -> str:
        def cell(value: float | None) -> str:
            return "unknown" if value is None else f"{value:.3g}"

        lines = [f"{'kernel':38} {self.kernel}", f"{'solved by':38} {self.method}"]
        if self.compared is not None:
            rows = self.compared.log_evidence.items()
            lines += [
                f"{'compared, ' + name:50} {value:.1f} nats, {self.compared.seconds[name]:.2g} s"
                for name, value in rows
            ]
        lines += [f"{'log evidence, ' + name:38} {value:.1f} nats" for name, value in self.log_evidence.items()]
        lines += [f"{'leave-one-out, ' + name:38} {value:.3g} nats a label" for name, value in self.left_out.items()]
        lines += [
            f"{'effective number of parameters':38} {cell(self.effective_parameters)}",
            f"{'alignment (by chance)':38} {cell(self.alignment)} ({cell(self.chance)})",
            f"{'leave-one-out score':38} {cell(self.score)}",
            f"{'leave-one-out log density':38} {cell(self.log_density)}",
        ]
        lines += [f"{f'calibration at {level:.0%}':38} {seen:.0%}" for level, seen in self.calibration.items()]
        return "\n".join([*lines, *self.notes, self.advice])


def report_on(gp: TransferGP) -> Report:
    """The report of a fitted `TransferGP`."""
    task, model = gp.task, gp.fitted.model
    rows = _some_rows(len(gp.x), task.num_outputs if gp.likelihood == "gaussian" else 1).to(gp.x.device)
    priors = _priors(gp.chosen, task.mean, task.plain_mean, gp.has_readout, gp.network.adapter.continuous)
    others = {
        name: gp.variant(candidate, mean, rows)
        for name, (candidate, mean) in tqdm(priors.items(), "report", delay=2, leave=False)
    }
    evidence = {name: other.log_evidence for name, other in others.items()}
    densities = {name: other.task.checks(other.fitted.model).log_density for name, other in others.items()}
    kernel, shared = gp.tangent_kernel(rows)
    residual = task.residual(rows)
    alignment, chance = _alignment(residual if shared else residual.reshape(-1), kernel)
    checks, effective = task.checks(model), model.effective_parameters()
    entry = gp.network.entry.name
    return Report(
        kernel=str(gp.chosen),
        method=model.note,
        compared=gp.comparison,
        notes=(*gp.fitted.notes, *([f"The network's output is {entry}."] if entry else [])),
        log_evidence=evidence,
        left_out={name: density for name, density in densities.items() if density is not None},
        effective_parameters=effective,
        alignment=alignment,
        chance=chance,
        score=checks.score,
        log_density=checks.log_density,
        calibration=dict(checks.calibration),
        advice=_advice(evidence, gp.chosen, effective) if gp.chosen.mean == "auto" else _doubts(evidence, gp.chosen),
    )


def _priors(
    chosen: Candidate, mean: MeanChoice, plain_mean: MeanChoice, has_readout: bool, continuous: bool
) -> dict[str, tuple[Candidate, MeanChoice]]:
    """What is compared, by name."""
    priors: dict[str, tuple[Candidate, MeanChoice]] = {str(chosen): (chosen, mean)}
    if continuous:
        priors["stationary alone"] = (Candidate("stationary"), plain_mean)
    if chosen.mean != "auto":
        priors[_AROUND] = (chosen, "network")
    if chosen.kernel != "nngp" and has_readout:
        priors["readout alone"] = (Candidate("nngp"), mean)
    return priors


def _alignment(residual: Tensor, kernel: Tensor) -> tuple[float, float]:
    """rᵀ K r / (|K| |r|²) and tr K / (|K| n), for K `[n, n]` and r `[n]`, or `[n, C]` if K is that of each output."""
    columns = residual.reshape(kernel.shape[0], -1).to(kernel)
    norm = torch.linalg.matrix_norm(kernel)
    squares = columns.square().sum()
    if squares == 0 or norm == 0:
        return 0.0, 0.0
    value = ((kernel @ columns) * columns).sum() / (norm * squares)
    return value.item(), (kernel.trace() / (norm * kernel.shape[0])).item()


def _advice(evidence: Mapping[str, float], chosen: Candidate, effective: float | None) -> str:
    own = evidence[str(chosen)]
    alone = evidence.get("stationary alone", -math.inf)
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
    gain = "Of ids, masks or objects there is no GP without the network, with which to compare."
    return (
        gain if alone == -math.inf else f"The source network helps by {own - alone:.1f} nats over a GP on the inputs."
    )


def _doubts(evidence: Mapping[str, float], chosen: Candidate) -> str:
    return (
        f"Around the network's output the labels are {evidence[str(chosen)] - evidence[_AROUND]:.1f} nats less likely "
        "than around the targets' mean, which is the prior mean: the source network may be one of another task."
    )


def _some_rows(rows: int, outputs: int) -> Tensor:
    most = max(1, _MOST_LABELS // outputs)
    return draw(rows, min(rows, most), seed=0)
