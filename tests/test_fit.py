"""TangentGP.fit with a checkpoint: a fit that was stopped goes on as if it never had been."""

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_operator.utils.errors import NotPSDError
from torch import Tensor, nn
from tqdm import tqdm

import gpntk
from gpntk.errors import FileFormatError, InputError, SolveError
from gpntk.io import save_tensors
from gpntk.models import TangentGP
from gpntk.models.checkpoint import FitState, load_fit, save_fit
from tests.cases import mlp

ROOT = Path(__file__).parent.parent
KILLED_AT = 3

Values = list[tuple[int, float]]


class KilledError(Exception):
    pass


def data(outputs: int = 1, rows: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 5, dtype=torch.float64, generator=generator)
    noise = 0.3 * torch.randn(rows, outputs, dtype=torch.float64, generator=generator)
    y = x[:, :1] * torch.arange(1, outputs + 1) + noise + 2
    return x, y.squeeze(-1)


def build(
    outputs: int = 1, layer_variances: bool = False, constant_mean: bool = False, dtype: torch.dtype = torch.float64
) -> TangentGP:
    x, y = data(outputs)
    kernel = gpntk.NTKKernel(mlp(outputs).to(dtype).eval(), layer_variances=layer_variances)
    return TangentGP(x.to(dtype), y.to(dtype), kernel, constant_mean)


MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer-variances": {"layer_variances": True},
    "constant-mean": {"constant_mean": True},
    "both-of-three-outputs": {"outputs": 3, "layer_variances": True, "constant_mean": True},
    "single-precision": {"layer_variances": True, "dtype": torch.float32},
}
models = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)


def near(values: list[tuple[int, float]]) -> list[tuple[int, Any]]:
    """The same steps, and values up to what L-BFGS makes of rounding (kernels of BLAS depend on where memory lies)."""
    return [(step, pytest.approx(value, rel=1e-9)) for step, value in values]


def recorded(model: TangentGP, **options: Any) -> tuple[Values, float]:
    """What the callback saw, and the value that ``fit`` returned."""
    seen: Values = []
    value = model.fit(callback=lambda step, nats: seen.append((step, nats)), **options)
    return seen, value


def killed(model: TangentGP, checkpoint: Path, at: int = KILLED_AT) -> Values:
    """What the callback saw until it raised."""
    seen: Values = []

    def callback(step: int, nats: float) -> None:
        seen.append((step, nats))
        if step == at:
            raise KilledError

    with pytest.raises(KilledError):
        model.fit(callback=callback, checkpoint=checkpoint)
    return seen


def assert_same_state(one: TangentGP, two: TangentGP) -> None:
    torch.testing.assert_close(dict(one.state_dict()), dict(two.state_dict()), rtol=1e-7, atol=1e-9)


# --- a stopped fit goes on -------------------------------------------------------------------------------------------


@models
def test_a_resumed_fit_takes_the_same_steps(options: dict[str, Any], tmp_path: Path) -> None:
    whole, resumed = build(**options), build(**options)
    values, best = recorded(whole)
    assert len(values) > KILLED_AT + 4  # else nothing is left to resume
    before = killed(build(**options), tmp_path / "fit")
    after, value = recorded(resumed, checkpoint=tmp_path / "fit")
    assert before == near(values[: KILLED_AT + 1])
    assert after == near(values[KILLED_AT + 1 :])
    assert value == pytest.approx(best)
    assert not resumed.training
    assert_same_state(resumed, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["fit"]


def test_wherever_and_however_often_it_is_stopped(tmp_path: Path) -> None:
    whole = build(layer_variances=True)
    values, best = recorded(whole)
    seen: Values = []
    for step, _ in values:
        seen += killed(build(layer_variances=True), tmp_path / "fit", at=step)
    resumed = build(layer_variances=True)
    assert recorded(resumed, checkpoint=tmp_path / "fit") == ([], pytest.approx(best))
    assert seen == near(values)
    assert_same_state(resumed, whole)


PROCESS = """
import json, os, sys, torch
torch.set_num_threads(1)
from tests.test_fit import KILLED_AT, build

def callback(step, nats):
    print(json.dumps([step, nats]), flush=True)
    if step == KILLED_AT:
        os._exit(9)

build(**json.loads(sys.argv[2])).fit(callback=callback, checkpoint=sys.argv[1])
"""


@pytest.mark.parametrize("options", [{}, {"layer_variances": True, "constant_mean": True}], ids=["plain", "both"])
def test_a_process_that_dies(options: dict[str, Any], tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "fit"), json.dumps(options)]
    dead = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert dead.returncode == 9, dead.stderr
    before = [tuple(json.loads(line)) for line in dead.stdout.splitlines()]
    whole, resumed = build(**options), build(**options)
    values, best = recorded(whole)
    after, value = recorded(resumed, checkpoint=tmp_path / "fit")
    assert [step for step, _ in before] == list(range(KILLED_AT + 1))
    assert before + after == near(values)
    assert value == pytest.approx(best)
    assert_same_state(resumed, whole)


def test_the_checkpoint_is_where_the_fit_starts(tmp_path: Path) -> None:
    killed(build(), tmp_path / "fit")
    elsewhere, whole = build(), build()
    elsewhere.set_hyperparameters(50.0, 3.0, torch.zeros(0))
    after, _ = recorded(elsewhere, checkpoint=str(tmp_path / "fit"))
    assert after == near(recorded(whole)[0][KILLED_AT + 1 :])
    assert_same_state(elsewhere, whole)


def test_a_write_that_fails_leaves_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, _ = recorded(build())
    replace = Path.replace
    targets: Iterator[int] = iter(range(len(values)))

    def full(self: Path, target: Path) -> Path:
        if next(targets) > KILLED_AT:
            raise OSError("disk full")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        build().fit(checkpoint=tmp_path / "fit")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["fit"]
    assert recorded(build(), checkpoint=tmp_path / "fit")[0] == near(values[KILLED_AT + 1 :])


# --- the end of a fit ------------------------------------------------------------------------------------------------


@models
def test_a_finished_fit_returns_at_once(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = build(**options), build(**options)
    value = first.fit(checkpoint=tmp_path / "fit")
    content = (tmp_path / "fit").read_bytes()
    monkeypatch.setattr(torch.optim.LBFGS, "step", lambda *_: pytest.fail("a finished fit took a step"))
    assert recorded(again, checkpoint=tmp_path / "fit", max_steps=1000) == ([], pytest.approx(value))
    assert not again.training
    assert_same_state(again, first)
    assert (tmp_path / "fit").read_bytes() == content


def test_more_steps_may_be_added(tmp_path: Path) -> None:
    whole, longer = build(constant_mean=True), build(constant_mean=True)
    values, best = recorded(whole)
    some, value = recorded(build(constant_mean=True), checkpoint=tmp_path / "fit", max_steps=4)
    assert some == near(values[:4])
    assert recorded(build(constant_mean=True), checkpoint=tmp_path / "fit", max_steps=4) == ([], pytest.approx(value))
    assert recorded(longer, checkpoint=tmp_path / "fit") == (near(values[4:]), pytest.approx(best))
    assert_same_state(longer, whole)


def steps_until_not_psd(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    step, number = torch.optim.LBFGS.step, iter(range(steps))

    def limited(self: torch.optim.LBFGS, closure: Callable[[], float]) -> Any:
        if next(number, None) is None:
            raise NotPSDError("not positive definite")
        return step(self, closure)

    monkeypatch.setattr(torch.optim.LBFGS, "step", limited)


def test_a_covariance_that_cannot_be_factorised_ends_the_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps_until_not_psd(monkeypatch, 4)
    first, again = build(), build()
    seen, value = recorded(first, checkpoint=tmp_path / "fit")
    assert len(seen) == 4
    monkeypatch.undo()
    assert recorded(again, checkpoint=tmp_path / "fit") == ([], pytest.approx(value))
    assert_same_state(again, first)


def test_nothing_is_written_where_there_is_no_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps_until_not_psd(monkeypatch, 0)
    with pytest.raises(NotPSDError):
        build().fit(checkpoint=tmp_path / "fit")
    assert not list(tmp_path.iterdir())


def test_the_progress_bar_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr("gpntk.models.regression.tqdm", Bar)
    build().fit(checkpoint=tmp_path / "fit", max_steps=2)
    build().fit(checkpoint=tmp_path / "fit", max_steps=5)
    assert [(bar.initial, bar.n, bar.total) for bar in bars] == [(0, 2, 2), (2, 5, 5)]


# --- files -----------------------------------------------------------------------------------------------------------


def test_every_bit_of_a_state_survives(tmp_path: Path) -> None:
    state = {
        "n_iter": 3,
        "H_diag": 1,
        "t": 0.1 + 0.2,
        "prev_loss": -math.pi * 1e-300,
        "nothing": None,
        "ro": [torch.tensor(1 / 3, dtype=torch.float64), torch.tensor(2 / 3)],
        "al": [torch.tensor(-0.0), None, math.inf],
        "old_dirs": [],
        "d": torch.tensor([1e-320, math.nan, -math.inf], dtype=torch.float64),
    }
    fit = FitState(4, 2, False, 1e23 / 7, {"a.b": torch.ones(())}, {"a.b": torch.zeros(())}, state)
    save_fit(tmp_path / "fit", {"it": "this", "number": 1.0}, fit)
    loaded = load_fit(tmp_path / "fit", {"it": "this", "number": 1.0})
    assert loaded is not None
    assert loaded[:4] == fit[:4]
    torch.testing.assert_close(loaded.best, fit.best, rtol=0, atol=0)
    torch.testing.assert_close(loaded.model, fit.model, rtol=0, atol=0)
    assert {key: type(value) for key, value in loaded.optimizer.items()} == {k: type(v) for k, v in state.items()}
    for key in ("n_iter", "H_diag", "t", "prev_loss", "nothing", "old_dirs"):
        assert loaded.optimizer[key] == state[key]
    assert [str(item) for item in loaded.optimizer["al"]] == ["tensor(-0.)", "None", "inf"]
    torch.testing.assert_close(loaded.optimizer["ro"], state["ro"], rtol=0, atol=0)
    torch.testing.assert_close(loaded.optimizer["d"], state["d"], rtol=0, atol=0, equal_nan=True)


def test_the_optimizer_is_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[dict[str, Any]] = []
    step = torch.optim.LBFGS.step

    def before_step(self: torch.optim.LBFGS, closure: Callable[[], float]) -> Any:
        states.append(copy.deepcopy(self.state_dict()["state"].get(0, {})))
        return step(self, closure)

    monkeypatch.setattr(torch.optim.LBFGS, "step", before_step)
    build().fit(max_steps=6)
    kept = states[5]
    assert len(kept["old_dirs"]) == len(kept["old_stps"]) == len(kept["ro"]) > 1
    killed(build(), tmp_path / "fit", at=4)
    states.clear()
    build().fit(checkpoint=tmp_path / "fit", max_steps=6)
    (restored,) = states
    assert restored.keys() == kept.keys()
    assert {key: type(value) for key, value in restored.items()} == {key: type(value) for key, value in kept.items()}
    assert [item is None for item in restored["al"]] == [item is None for item in kept["al"]]
    for key in kept.keys() - {"al"}:
        torch.testing.assert_close(restored[key], kept[key], rtol=0, atol=0)


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "fit"
    killed(build(), path)
    content = path.read_bytes()
    path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    with pytest.raises(FileFormatError, match="checksum does not match"):
        build().fit(checkpoint=path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(FileFormatError, match="no readable safetensors file"):
        build().fit(checkpoint=path)
    path.write_bytes(b"")
    with pytest.raises(FileFormatError, match="no readable safetensors file"):
        build().fit(checkpoint=path)
    save_tensors(path, "TransferRegressor", {}, {})
    with pytest.raises(FileFormatError, match="holds a TransferRegressor, not a fit"):
        build().fit(checkpoint=path)


def on(network: nn.Module | None = None, x: Tensor | None = None, y: Tensor | None = None, **options: Any) -> TangentGP:
    """`build` with something replaced."""
    own_x, own_y = data()
    kernel = gpntk.NTKKernel(mlp(1).double().eval() if network is None else network, **options)
    return TangentGP(own_x if x is None else x, own_y if y is None else y, kernel)


def other_weight() -> nn.Module:
    network = mlp(1).double().eval()
    with torch.no_grad():
        network[2].weight[3, 1] += 1e-12
    return network


def other_activation() -> nn.Module:
    network = mlp(1).double().eval()
    network[1] = nn.Softplus()
    return network


def fixed_noise() -> TangentGP:
    model = build()
    model.likelihood.requires_grad_(False)
    return model


X, Y = data()
FOREIGN: dict[str, tuple[Callable[[], TangentGP], str]] = {
    "targets": (lambda: on(y=Y + 1e-12), r"its targets y: float64 \[40\], sha256 .*, but here: float64 \[40\], sha256"),
    "inputs": (lambda: on(x=X + 1e-12), r"its inputs x: float64 \[40, 5\], sha256 .*, but here: float64 \[40, 5\]"),
    "rows": (
        lambda: on(x=X[:30], y=Y[:30]),
        r"its inputs x: .*\[40, 5\].*here: .*\[30, 5\].*; its targets y: .*\[30\]",
    ),
    "dtype": (lambda: build(dtype=torch.float32), r"its inputs x: float64 .*, but here: float32"),
    "weights": (lambda: on(other_weight()), "another fit: its network's weights: sha256 .*, but here: sha256"),
    "activation": (lambda: on(other_activation()), r"another fit: its mean prior variance: \d.*, but here: \d"),
    "selection": (lambda: on(parameters="*weight"), "its differentiated parameters: 6, .*, but here: 3, "),
    "outputs": (lambda: build(outputs=3), "its kernel: .* here: .*; its hyperparameters: "),
    "layer variances": (
        lambda: build(layer_variances=True),
        r"its hyperparameters: .* here: .*layer_variances \[3, 1\]",
    ),
    "constant mean": (lambda: build(constant_mean=True), r"its hyperparameters: .* here: .*raw_constant \[\]"),
    "fixed noise": (fixed_noise, r"its hyperparameters: .* here: likelihood.*raw_noise \[1\] fixed"),
}


@pytest.mark.parametrize(("other", "message"), FOREIGN.values(), ids=FOREIGN)
def test_checkpoints_of_other_fits(other: Callable[[], TangentGP], message: str, tmp_path: Path) -> None:
    path = tmp_path / "fit"
    killed(build(), path)
    content = path.read_bytes()
    model, twin = other(), other()
    with pytest.raises(FileFormatError, match=f"{message}.*give another checkpoint, or delete this one"):
        model.fit(checkpoint=path)
    assert_same_state(model, twin)
    assert path.read_bytes() == content
    assert recorded(build(), checkpoint=path)[0] == near(recorded(build())[0][KILLED_AT + 1 :])


def test_a_sketch_of_another_seed(tmp_path: Path) -> None:
    def sketched(seed: int) -> TangentGP:
        return TangentGP(X, Y, gpntk.SketchedNTKKernel(mlp(1).double().eval(), num_features=30, seed=seed))

    killed(sketched(0), tmp_path / "fit", at=1)
    with pytest.raises(FileFormatError, match="its mean prior variance"):
        sketched(1).fit(checkpoint=tmp_path / "fit")
    assert recorded(sketched(0), checkpoint=tmp_path / "fit")[0] == near(recorded(sketched(0))[0][2:])


def test_some_columns_of_x(tmp_path: Path) -> None:
    def model() -> TangentGP:
        wide = torch.cat([torch.full((40, 2), 1e9, dtype=torch.float64), X], -1)
        return TangentGP(wide, Y, gpntk.NTKKernel(mlp(1).double().eval(), active_dims=(2, 3, 4, 5, 6)))

    killed(model(), tmp_path / "fit")
    assert recorded(model(), checkpoint=tmp_path / "fit")[0] == near(recorded(model())[0][KILLED_AT + 1 :])


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a folder: give the name of a file"):
        build().fit(checkpoint=tmp_path)
    with pytest.raises(InputError, match=r"there is no folder .*nowhere'"):
        build().fit(checkpoint=tmp_path / "nowhere" / "fit")
    assert not os.listdir(tmp_path)


def test_a_step_that_cannot_be_solved_ends_the_fit_with_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    values, _ = recorded(build())
    solve = gpntk.operators.noisy_gram.inv_quad_logdet
    left = iter(range(1000))

    def failing(*args: Any) -> tuple[Tensor, Tensor]:
        if next(left) >= 6:
            raise SolveError("too ill-conditioned")
        return solve(*args)

    monkeypatch.setattr("gpntk.operators.noisy_gram.inv_quad_logdet", failing)
    seen, best = recorded(build())
    assert 0 < len(seen) < len(values)
    assert best == max(value for _, value in seen)
    with pytest.raises(SolveError):
        build().fit()
