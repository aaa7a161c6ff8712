"""What the labels of a transfer say: targets with noise, or classes."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from gpntk.errors import InputError
from gpntk.likelihoods.targets import check_labels
from gpntk.network import FrozenNetwork
from gpntk.transfer.candidates import MeanChoice
from gpntk.transfer.classes import AbstractClassTask, DirichletTask, LaplaceTask
from gpntk.transfer.regression import RegressionTask
from gpntk.transfer.represented import Outputs

Likelihood = Literal["gaussian", "categorical", "dirichlet"]
"""What the labels of a transfer are: targets with noise, or classes by one of two methods."""


def targets(
    network: FrozenNetwork,
    x: Tensor,
    y: Tensor,
    *,
    mean: MeanChoice,
    new_head: bool,
    known_noise: Tensor | None,
    weights: Tensor | None,
    noise_network: nn.Module | None,
    time_budget: float,
) -> RegressionTask:
    """Targets `[N, C]`, one column for each output of the network."""
    outputs = y.shape[1] if new_head else network.num_outputs(x)
    if y.shape != (x.shape[0], outputs):
        raise InputError(
            f"y has shape {tuple(y.shape)}, but {x.shape[0]} rows and a network with {outputs} output(s) need "
            f"{(x.shape[0], outputs)}: give one column of y per output, or new_head=True."
        )
    chosen: MeanChoice = ("constant" if new_head else "network") if mean == "auto" else mean
    noise = {"known_noise": known_noise, "weights": weights, "noise_network": noise_network}
    return RegressionTask(x, y, chosen, Outputs(network), **noise, time_budget=time_budget)


def classes(
    network: FrozenNetwork,
    x: Tensor,
    labels: Tensor,
    *,
    mean: MeanChoice,
    new_head: bool,
    likelihood: Likelihood,
    num_classes: int | None,
    weights: Tensor | None,
) -> AbstractClassTask:
    """Classes `[N]`, integers from 0."""
    outputs = network.num_outputs(x)
    if num_classes is None and not new_head:
        num_classes = max(2, outputs)
    check_labels(labels, num_classes)
    count = max(2, int(labels.max()) + 1) if num_classes is None else num_classes
    if not new_head and count != max(2, outputs):
        raise InputError(
            f"num_classes={count}, but the network has {outputs} output(s): give new_head=True for a new head."
        )
    # A new head has a logit per class, two included.
    logits = count if new_head else outputs
    chosen: MeanChoice = ("zero" if new_head else "network") if mean == "auto" else mean
    kind = LaplaceTask if likelihood == "categorical" else DirichletTask
    sizes = {"num_classes": count, "num_logits": logits}
    return kind(x, labels, **sizes, mean=chosen, offset=Outputs(network), weights=weights)
