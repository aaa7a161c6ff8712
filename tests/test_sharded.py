"""Rows spread over two processes give the answers of one; a process that fails does not leave the other waiting."""

import multiprocessing
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gpntk
from gpntk.errors import DistributedError, FileFormatError, InputError
from gpntk.inference import (
    ConjugateGradients,
    FeatureCovariance,
    Features,
    Nystrom,
    Outcome,
    ShardedFeatures,
    WeightSpace,
    WhitenedSystem,
)
from gpntk.io import load_tensors
from tests import sharded_ranks
from tests.sharded_ranks import OUTPUTS, ROWS, answers, data, network

_PATIENCE = 120
# Processes begin as copies of one that has imported everything: imports take longer than what they then do.
_RANKS = multiprocessing.get_context("forkserver")
_RANKS.set_forkserver_preload([sharded_ranks.__name__])


def ranks(scenario: str, folder: Path) -> list[Any]:
    """What both ranks give; None for one that gave nothing."""
    for file in (folder / "ranks", folder / "result0", folder / "result1"):
        file.unlink(missing_ok=True)
    processes = [_RANKS.Process(target=sharded_ranks.run, args=(scenario, rank, folder)) for rank in range(2)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(_PATIENCE)
    finally:
        for process in processes:
            process.kill()
    files = [folder / f"result{rank}" for rank in range(2)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return ranks("compare", tmp_path_factory.mktemp("compare"))


def whole() -> Features:
    return Features(gpntk.AutoBackend(network()), data()[0])


@pytest.mark.parametrize("first", ["37", "59", "60"])
def test_two_processes_give_the_answers_of_one(compared: list[Any], first: str) -> None:
    expected = answers(whole(), slice(0, ROWS * OUTPUTS))
    for name, value in expected.items():
        parts = [rank[first][name] for rank in compared]
        if name.startswith("rows: "):
            parts = [torch.cat(parts)]
        for part in parts:
            error = (part - value).abs().max() / value.abs().max()
            assert error < 1e-10, (name, float(error))


@pytest.mark.parametrize("first", ["37", "59", "60"])
def test_samples_of_rows_do_not_depend_on_how_they_are_spread(compared: list[Any], first: str) -> None:
    x, _ = whole().sample(25, seed=3)
    assert torch.equal(torch.cat([rank[f"{first} sampled"] for rank in compared]), x)


def test_all_ranks_draw_the_same_weights_from_the_posterior(compared: list[Any]) -> None:
    for first in ("37", "59", "60"):
        one, two = (rank[f"{first} samples"] for rank in compared)
        assert torch.equal(one, two)
        assert not torch.equal(one[0], one[1])
        assert torch.equal(*(rank[f"{first} global samples"] for rank in compared))
    # The law: covariance S^(1/2) (I + ΨᵀΨ)⁻¹ S^(1/2), of 4000 draws.
    draws = compared[0]["37 samples"].flatten(0, 1)
    moment = answers(whole(), slice(0, ROWS * OUTPUTS))["moment"]
    precision = moment / 0.1 + torch.eye(moment.shape[0], dtype=torch.float64)
    # Hence x ~ N(m, P⁻¹) has E (x - m)ᵀ P (x - m) = F.
    centred = draws - draws.mean(0)
    energy = (centred @ precision * centred).sum(-1).mean() / moment.shape[0]
    assert abs(float(energy) - 1) < 0.03


def test_ranks_choose_one_solver_and_refuse_those_of_function_space(compared: list[Any]) -> None:
    assert compared[0]["37 choice"] == compared[1]["37 choice"]
    assert compared[0]["60 choice"] == compared[1]["60 choice"]
    for rank in compared:
        assert "needs all rows in one process" in rank["FunctionSpace"]
        assert "needs all rows in one process" in rank["ConjugateGradients"]


def test_ranks_that_do_not_fit_together_or_come_late_all_hear_of_it(tmp_path: Path) -> None:
    expected = {
        "features": "ranks differ in features: 26 on rank 0, 32 on rank 1",
        "weights": "ranks differ in weights",
        "dtype": "ranks differ in dtype: torch.float64 on rank 0, torch.float32 on rank 1",
        "columns": r"float64 [2, 26] on rank 0, float64 [3, 26] on rank 1",
        "precision": "float64 [3] on rank 0, float32 [3] on rank 1",
        "noise": "some ranks give one noise variance, others one for each",
    }
    first, second = ranks("differ", tmp_path)
    for messages in (first, second):
        for name, part in expected.items():
            assert part in messages[name], (name, messages[name])
    assert "took more than timeout=1 s" in first["late"]


def test_the_death_of_a_rank_ends_the_others_and_their_solve_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    left, gone = ranks("die", tmp_path)
    assert gone is None
    assert "lost the others" in left["message"]
    assert left["seconds"] < 20
    # The first rank alone writes.
    assert not (tmp_path / "solve1").exists()
    (piece,) = load_tensors(tmp_path / "solve0", "solve").fact("pieces", list)
    made = piece["iterations"]
    assert made > 0
    results = ranks("resume", tmp_path)
    for result in results:
        assert result["outcomes"] == ["CONVERGED", "CONVERGED"]
        resumed, again, fresh = result["iterations"]
        assert made < resumed == again
        assert fresh > made
        assert torch.allclose(*result["values"], rtol=1e-6)
    assert torch.equal(results[0]["values"], results[1]["values"])
    assert "another solve: its right-hand side" in results[0]["message"]
    assert "rank 0 says why" in results[1]["message"]


@pytest.mark.parametrize("space", ["function", "weight"])
def test_a_solve_in_one_process_goes_on_too(space: Any, tmp_path: Path) -> None:
    path = tmp_path / "solve"
    rhs = data()[1].expand(2, -1) * torch.tensor([[1.0], [2.0]])
    system = WhitenedSystem(FeatureCovariance(whole(), torch.ones(1)), torch.tensor([1e-3]))
    solver = ConjugateGradients(Nystrom(3, space=space), tolerance=1e-10, checkpoint=path, checkpoint_iterations=2)
    stopped = replace(solver, max_iterations=7).prepare(system)
    assert stopped.solve(rhs).outcome is Outcome.EXHAUSTED
    kept = path.read_bytes()
    # Only the first solve of an inverse is kept: what follows it does not overwrite it.
    stopped.solve(3 * rhs)
    assert path.read_bytes() == kept
    resumed = solver.prepare(system).solve(rhs)
    fresh = replace(solver, checkpoint=None).prepare(system).solve(rhs)
    assert resumed.outcome is fresh.outcome is Outcome.CONVERGED
    assert resumed.iterations > 7
    assert torch.allclose(resumed.value, fresh.value, rtol=1e-5, atol=1e-5)
    with pytest.raises(FileFormatError, match=r"another solve: .*its noise: \d+, but here: \d+"):
        solver.prepare(WhitenedSystem(FeatureCovariance(whole(), torch.ones(1)), torch.tensor([1e-2]))).solve(rhs)
    path.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(FileFormatError, match="cut short"):
        solver.prepare(system).solve(rhs)
    with pytest.raises(InputError, match="there is no folder"):
        replace(solver, checkpoint=tmp_path / "none" / "solve").prepare(system).solve(rhs)


def test_the_example_of_the_docs_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text()
    script = tmp_path / "sharded.py"
    script.write_text(page.split("```python\n")[1].split("```")[0])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tensor(") == 2


def test_without_a_group_there_are_no_shards() -> None:
    with pytest.raises(DistributedError, match="torchrun"):
        ShardedFeatures(whole())


def test_a_process_alone_is_a_group(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/f", rank=0, world_size=1)
    try:
        features = ShardedFeatures(whole())
        assert features.place == (0, ROWS)
        assert features.to(torch.float64) is features
        single = features.to(torch.float32)
        assert single.second_moment().dtype == torch.float32
        system = WhitenedSystem(FeatureCovariance(single, torch.ones(1)), torch.tensor([0.1]))
        assert WeightSpace().prepare(system).logdet().value.dtype == torch.float64
    finally:
        torch.distributed.destroy_process_group()
