"""What an experiment in transfer learning is: tasks drawn from data, and methods that see only a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

Array = NDArray[np.floating]


class Task(NamedTuple):
    """One repetition of an experiment at one size: what a method is given, all but the test labels."""

    network: nn.Module
    """The source network, float32, in eval mode."""
    ensemble: Sequence[nn.Module]
    """Source networks of other seeds, for the baseline that averages several."""
    x: Array
    """Labelled inputs of the target task `[n, ...]`, float32."""
    y: NDArray
    """Their labels: floating `[n]` or `[n, C]`, or classes `[n]`."""
    x_test: Array
    """Inputs of the target task to predict at `[M, ...]`."""
    seed: int
    num_classes: int | None = None
    """Number of classes of the target task; None for regression."""


class Gaussian(NamedTuple):
    """A prediction of targets, noise included: means and standard deviations, shaped as the labels."""

    mean: Array
    std: Array


Prediction = Gaussian | Array
"""A Gaussian for regression, probabilities `[M, K]` for classification."""

Method = Callable[[Task], Prediction]


class Experiment(NamedTuple):
    """Tasks of several sizes and seeds with the methods to be compared on them."""

    draw: Callable[[Path, int, int], tuple[Task, NDArray]]
    """From the folder of data, the size n and the seed, a task and the labels of its test inputs."""
    sizes: Sequence[int]
    methods: Mapping[str, Method]
    seeds: int = 5
