"""The benchmark of Laplace's method in weight space, at a toy size."""

import pytest
import torch
from torch import nn

from benchmarks import laplace_suites


@pytest.fixture
def module() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()


def test_both_spaces_agree(module: nn.Sequential) -> None:
    x, labels = torch.randn(30, 4).double(), torch.arange(30) % 3
    found = laplace_suites.gaps(module, (x[:20], labels[:20]), x[20:])
    assert found.keys() == {"mode_gap", "evidence_gap", "latent_gap"}
    assert max(found.values()) < 1e-9


def test_what_is_measured(module: nn.Sequential) -> None:
    # Labels of another network with the same first layers, which new weights of the last ones explain.
    x = torch.randn(400, 4).double()
    labels = (module[:3](x) @ torch.randn(5, 3).double()).argmax(-1)
    row = laplace_suites.measured(module, (x[:300], labels[:300]), (x[300:], labels[300:]), 100.0)
    assert (row["labels"], row["features"]) == (300, 6 * 5 + 5 + 5 * 3 + 3)
    assert row["accuracy"] > 0.9 > row["network_accuracy"]
    assert row["nll"] < row["network_nll"]
