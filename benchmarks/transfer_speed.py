"""Suite of the time a transfer takes with a large network. Data are random: only time is measured."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import gpntk
from benchmarks.inference_suites import peak_gib
from tests.architectures import ResNet

_ROWS, _CLASSES, _EPOCHS, _BATCH = 1000, 10, 20, 64


def transfer_speed(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Adapting a ResNet-18 (11 million parameters, 32 x 32) with 1,000 labels of 10 classes; random weights and data.

    `fit_s`, `predict_s`: `gpntk.TransferClassifier` as it is by default (float64), 1,000 test images. `epochs_20_s`:
    fine-tuning all weights for 20 epochs by SGD in batches of 64, ten times what two epochs took.
    """
    torch.manual_seed(0)
    network = ResNet(outputs=_CLASSES).to(device, dtype).eval()
    x, x_test = torch.randn(2, _ROWS, 3, 32, 32, device=device, dtype=dtype)
    with torch.no_grad():
        logits = torch.cat([network(rows) for rows in x.split(_BATCH)])
    # Labels that the network gets right nine times in ten.
    labels = logits.argmax(-1)
    wrong = torch.rand(_ROWS, device=device) < 0.1
    labels[wrong] = torch.randint(_CLASSES, (int(wrong.sum()),), device=device)
    epochs = _fine_tuning(network, x, labels)
    rows = []
    for new_head in (False, True):
        model = gpntk.TransferClassifier(network, num_classes=_CLASSES, new_head=new_head)
        fit_s = _elapsed(lambda model=model: model.fit(x.cpu().numpy(), labels.cpu().numpy()))
        predict_s = _elapsed(lambda model=model: model.predict_proba(x_test.cpu().numpy()))
        rows.append(
            {
                "new_head": new_head,
                "kernel": model.kernel_,
                "method": model.method_,
                "fit_s": fit_s,
                "predict_s": predict_s,
                "epochs_20_s": epochs,
                "speedup": epochs / (fit_s + predict_s),
                "peak_gib": peak_gib(),
            }
        )
    return rows


def _fine_tuning(network: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> float:
    network = copy.deepcopy(network).train()
    optimizer = torch.optim.SGD(network.parameters(), 1e-3, momentum=0.9)

    def epoch() -> None:
        for rows in torch.randperm(_ROWS, device=x.device).split(_BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(network(x[rows]), labels[rows]).backward()
            optimizer.step()

    return _EPOCHS / 2 * _elapsed(lambda: (epoch(), epoch()))


def _elapsed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


SUITES: dict[str, Callable[[torch.device, torch.dtype], list[dict[str, Any]]]] = {"transfer-speed": transfer_speed}
