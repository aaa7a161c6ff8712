"""The script for an accelerator, at toy sizes on the CPU; a part that fails or takes too long stops no other."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.run import _tables

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", sorted(gpu.PARTS.keys() - {"tests"}))
def test_every_part_measures_something_at_toy_sizes(name: str) -> None:
    rows = gpu.PARTS[name].run(CPU, torch.float32, True)
    assert rows
    json.dumps(rows, allow_nan=False)
    for row in rows:
        assert row.get("error", 0.0) < 1e-5
        assert all(value > 0 for key, value in row.items() if key.endswith("seconds") or key.endswith("_s"))


def test_the_whole_script_on_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["gpu", "--device", "cpu", "--toy", "--only", "tests", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    gpu.main()
    stored = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert {"commit", "hardware", "versions"} <= stored.keys()
    assert stored["parts"].keys() == {"tests"}
    part = stored["parts"]["tests"]
    assert part["outcome"] == "done"
    (row,) = part["rows"]
    assert row["failed"] == []
    assert row["passed"] + row["skipped"] > 80


def test_what_fails_is_told_and_the_others_run(tmp_path: Path) -> None:
    good = "import json; print('noise'); print(json.dumps({'rows': [{'n': 1}], 'peak_gib': 0.5}))"
    programs = {"bad": "raise ValueError('as expected')", "slow": "import time; time.sleep(60)", "good": good}
    commands = {name: ([sys.executable, "-c", text], 0.5 if name == "slow" else 30) for name, text in programs.items()}
    path = tmp_path / "folder" / "result.json"
    gpu.run({**commands, "late": (commands["good"][0], 0.0)}, {"device": "cpu"}, path)
    stored = json.loads(path.read_text())
    outcomes = {name: part["outcome"] for name, part in stored["parts"].items()}
    assert outcomes == {"bad": "failed", "slow": "out of time", "good": "done", "late": "not begun"}
    assert "ValueError: as expected" in stored["parts"]["bad"]["message"]
    assert stored["parts"]["good"]["rows"] == [{"n": 1}]
    bad, _, done, _ = _tables(stored)
    assert "ValueError: as expected" in bad
    assert "| 1 |" in done


def test_no_device_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match="--device cpu --toy"):
        gpu.main()


def test_limits_of_the_parts_leave_time_for_all() -> None:
    # Whoever borrows a device for eight minutes gets every figure, whatever one of the parts does.
    longest = max(part.limit for part in gpu.PARTS.values())
    assert longest < gpu.LIMIT / 2
