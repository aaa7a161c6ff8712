"""Softmax Laplace in weight space: 20,000 digits on a network that has seen 1,000 of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import gpntk
from benchmarks import images
from benchmarks.inference_suites import data_folder
from benchmarks.peak import peak_bytes
from gpntk.inference import DenseCovariance, FeatureCovariance, Features, WeightSpace
from gpntk.models import LaplacePosterior

_CLASSES, _SEEN, _FEW, _LABELS, _TEST = 10, 1000, 500, 20_000, 2000
# All layers but the first: 2,050 of 33,450 parameters.
_SELECTED = ["2.*", "4.*"]
_VARIANCE = 0.1


def mnist_laplace(device: torch.device, _dtype: torch.dtype) -> list[dict[str, Any]]:
    """Softmax Laplace on MNIST: MLP 784-40-40-10 trained on 1,000 images, 2,050 parameters free, 20,000 other labels.

    `fit_s`: Newton's steps to the mode in weight space, and the evidence; `predict_s`: probabilities of 2,000 test
    images. The first row has 500 labels; its `mode_gap`, `evidence_gap` and `latent_gap` are the largest relative
    differences from the posterior by the dense kernel matrix of 5,000 rows. Prior variance 0.1; float64.
    """
    x, labels, z, truth = _digits(device)
    module = _trained(x[:_SEEN], labels[:_SEEN])
    x, labels = x[_SEEN:], labels[_SEEN:]
    few = gaps(module, (x[:_FEW], labels[:_FEW]), z[:100])
    return [
        measured(module, (x[:_FEW], labels[:_FEW]), (z, truth)) | few,
        measured(module, (x, labels), (z, truth)) | dict.fromkeys(few, ""),
    ]


SUITES: dict[str, Callable[[torch.device, torch.dtype], list[dict[str, Any]]]] = {"mnist-laplace": mnist_laplace}


def measured(
    module: nn.Module, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], variance: float = _VARIANCE
) -> dict[str, Any]:
    """Times, accuracy and log loss of the posterior in weight space beside the network's own."""
    (x, labels), (z, truth) = train, test
    with torch.no_grad():
        mean, output = module(x), module(z)
    start = time.perf_counter(), time.process_time()
    covariance = _covariance(module, x, variance)
    posterior = LaplacePosterior(covariance, labels, mean, solver=WeightSpace())
    evidence = posterior.log_evidence.item()
    fitted = time.perf_counter(), time.process_time()
    found = posterior.predict(z, output)
    predicted = time.perf_counter()
    own = output.softmax(-1)
    return {
        "labels": len(x),
        "features": covariance.features.num_features,
        "fit_s": fitted[0] - start[0],
        "fit_cpu_s": fitted[1] - start[1],
        "predict_s": predicted - fitted[0],
        "peak_gib": peak_bytes(str(x.device)) / 2**30,
        "log_evidence": evidence,
        "network_accuracy": _accuracy(own, truth),
        "accuracy": _accuracy(found, truth),
        "network_nll": _loss(own, truth),
        "nll": _loss(found, truth),
    }


def gaps(module: nn.Module, train: tuple[Tensor, Tensor], z: Tensor, variance: float = _VARIANCE) -> dict[str, float]:
    """Largest relative differences between weight space and the dense kernel matrix: mode, evidence, latent moments."""
    x, labels = train
    with torch.no_grad():
        mean, output = module(x), module(z)
    kernel = gpntk.NTKKernel(module, parameters=_SELECTED)
    dense = DenseCovariance(lambda one, two: variance * kernel(one, two).to_dense(), x, mean.shape[1])
    one = LaplacePosterior(_covariance(module, x, variance), labels, mean, solver=WeightSpace())
    two = LaplacePosterior(dense, labels, mean)
    found, expected = one.latent(z, output), two.latent(z, output)
    return {
        "mode_gap": _gap(one.mode, two.mode),
        "evidence_gap": _gap(one.log_evidence, two.log_evidence),
        "latent_gap": max(_gap(found.mean, expected.mean), _gap(found.covariance, expected.covariance)),
    }


def _covariance(module: nn.Module, x: Tensor, variance: float) -> FeatureCovariance:
    features = Features(gpntk.AutoBackend(gpntk.freeze(module, _SELECTED)), x)
    return FeatureCovariance(features, torch.tensor([variance], dtype=x.dtype, device=x.device))


def _digits(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images `[N, 784]` from -1 to 1 and labels, for training and for testing."""
    parts: list[Tensor] = []
    for part, count in (("train", _SEEN + _LABELS), ("t10k", _TEST)):
        pixels, labels = images.mnist(data_folder(), part)
        parts.append(torch.tensor(pixels[:count], device=device).flatten(1).double() / 127.5 - 1)
        parts.append(torch.tensor(labels[:count], device=device).long())
    x, labels, z, truth = parts
    return x, labels, z, truth


def _trained(x: Tensor, labels: Tensor, steps: int = 300) -> nn.Sequential:
    """MLP 784-40-40-10, by Adam with weight decay on all images at once."""
    torch.manual_seed(0)
    layers = nn.Linear(784, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, _CLASSES)
    module = nn.Sequential(*layers).to(x)
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(module(x), labels).backward()
        optimizer.step()
    return module.eval()


def _accuracy(found: Tensor, truth: Tensor) -> float:
    return (found.argmax(-1) == truth).double().mean().item()


def _loss(found: Tensor, truth: Tensor) -> float:
    return -found.gather(1, truth.unsqueeze(1)).log().mean().item()


def _gap(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()
