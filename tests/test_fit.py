"""TangentGP.fit, and its checkpoint: a fit that was stopped goes on from its best point to the same maximum."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Tensor, nn
from tqdm import tqdm

import gpntk
from gpntk.errors import FileFormatError, InputError, SolveError
from gpntk.io import save_tensors
from gpntk.models import TangentGP
from tests.cases import mlp, scale_and_noise

ROOT = Path(__file__).parent.parent
KILLED_AT = 2

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


def assert_same_fit(one: TangentGP, two: TangentGP) -> None:
    """Maxima are flat: points differ by the square root of what values differ by, and logarithms of nothing by more."""
    for first, second in ((one.scale, two.scale), (one.noise, two.noise)):
        torch.testing.assert_close(first, second, rtol=1e-2, atol=1e-6)


def assert_same_state(one: TangentGP, two: TangentGP) -> None:
    torch.testing.assert_close(dict(one.state_dict()), dict(two.state_dict()), rtol=1e-12, atol=1e-12)


def density(model: TangentGP) -> float:
    """log N(y; m, K + D) at the model's hyperparameters, by torch."""
    model.train()
    with torch.no_grad():
        marginal = model.likelihood(model(*model.train_inputs))
        covariance = marginal.covariance_matrix.double()
        mean, y = marginal.mean.double().flatten(), model.train_targets.double().flatten()
    return torch.distributions.MultivariateNormal(mean, covariance).log_prob(y).item()


# --- the maximum -----------------------------------------------------------------------------------------------------


@models
def test_the_fit_is_a_maximum(options: dict[str, Any]) -> None:
    model = build(**options)
    seen, value = recorded(model)
    values = [nats for _, nats in seen]
    assert values == sorted(values)
    assert [step for step, _ in seen] == list(range(len(seen)))
    single = options.get("dtype") == torch.float32
    assert value == pytest.approx(density(model), abs=1e-3 if single else 1e-8)
    for parameter in model.parameters():
        for shift in (-0.1, 0.1):
            with torch.no_grad():
                parameter.add_(shift)
                assert density(model) < value + (1e-3 if single else 1e-6)
                parameter.sub_(shift)


def test_steps_can_be_few_but_not_negative() -> None:
    model, twin = build(), build()
    assert recorded(model, max_steps=0) == ([], pytest.approx(density(twin)))
    assert_same_state(model, twin)
    assert len(recorded(model, max_steps=2)[0]) == 2
    with pytest.raises(InputError, match="max_steps=-1: give a whole number"):
        model.fit(max_steps=-1)


@pytest.mark.parametrize("unit", [1e-200, 1e-100, 1e100, 1e200])
def test_targets_in_units_that_cannot_be_fitted_are_refused(unit: float) -> None:
    x, y = data()
    with pytest.raises(InputError, match=r"y has .*: give y in other units"):
        TangentGP(x, unit * y, gpntk.NTKKernel(mlp(1).double().eval()))


def test_constant_targets_are_fitted_to_rounding() -> None:
    x, _ = data()
    y = torch.full((len(x),), 0.1, dtype=torch.float64)
    model = TangentGP(x, y, gpntk.NTKKernel(mlp(1).double().eval()), constant_mean=True)
    model.fit()
    torch.testing.assert_close(model(x + 0.1).mean, y, rtol=1e-5, atol=0)


def test_the_progress_bar_counts_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            bars.append((kwargs, self))

    monkeypatch.setattr("gpntk.inference.maximum.tqdm", Bar)
    build().fit(max_steps=2)
    ((options, bar),) = bars
    assert bar.n >= 3
    assert (options["delay"], options["leave"]) == (2, False)


# --- a stopped fit goes on -------------------------------------------------------------------------------------------


@models
def test_a_resumed_fit_comes_to_the_same_maximum(options: dict[str, Any], tmp_path: Path) -> None:
    whole, resumed = build(**options), build(**options)
    _, best = recorded(whole)
    before = killed(build(**options), tmp_path / "fit")
    after, value = recorded(resumed, checkpoint=tmp_path / "fit")
    assert [step for step, _ in before + after] == list(range(len(before + after)))
    assert after[0][1] >= before[-1][1]
    assert value == pytest.approx(best, abs=1e-4)
    assert not resumed.training
    assert_same_fit(resumed, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["fit"]


def test_wherever_and_however_often_it_is_stopped(tmp_path: Path) -> None:
    best = build(layer_variances=True).fit()
    seen: Values = []
    for step in range(4):
        seen += killed(build(layer_variances=True), tmp_path / "fit", at=step)
    assert [step for step, _ in seen] == list(range(4))
    assert seen == sorted(seen, key=lambda one: one[1])
    assert build(layer_variances=True).fit(checkpoint=tmp_path / "fit") == pytest.approx(best, abs=1e-4)


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


def test_a_process_that_dies(tmp_path: Path) -> None:
    options = {"layer_variances": True, "constant_mean": True}
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "fit"), json.dumps(options)]
    dead = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert dead.returncode == 9, dead.stderr
    before = [tuple(json.loads(line)) for line in dead.stdout.splitlines()]
    assert [step for step, _ in before] == list(range(KILLED_AT + 1))
    after, value = recorded(build(**options), checkpoint=tmp_path / "fit")
    assert after[0][0] == KILLED_AT + 1
    assert value == pytest.approx(build(**options).fit(), abs=1e-4)


def test_the_checkpoint_is_where_the_fit_starts(tmp_path: Path) -> None:
    killed(build(), tmp_path / "fit")
    elsewhere, here = build(), build()
    elsewhere.initialize(**scale_and_noise(50.0, 3.0))
    assert recorded(elsewhere, checkpoint=str(tmp_path / "fit"), max_steps=0)[0] == []
    assert here.fit(checkpoint=str(tmp_path / "fit"), max_steps=0) == pytest.approx(density(elsewhere))
    assert_same_state(elsewhere, here)


def test_a_write_that_fails_leaves_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace
    writes: Iterator[int] = iter(range(100))

    def full(self: Path, target: Path) -> Path:
        if next(writes) > KILLED_AT:
            raise OSError("disk full")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        build().fit(checkpoint=tmp_path / "fit")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["fit"]
    assert recorded(build(), checkpoint=tmp_path / "fit")[0][0][0] == KILLED_AT + 1


# --- the end of a fit ------------------------------------------------------------------------------------------------


@models
def test_a_finished_fit_returns_at_once(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = build(**options), build(**options)
    value = first.fit(checkpoint=tmp_path / "fit")
    content = (tmp_path / "fit").read_bytes()
    monkeypatch.setattr(TangentGP, "forward", lambda *_: pytest.fail("a finished fit was evaluated"))
    assert recorded(again, checkpoint=tmp_path / "fit", max_steps=1000) == ([], value)
    assert not again.training
    assert_same_state(again, first)
    assert (tmp_path / "fit").read_bytes() == content


def test_more_steps_may_be_added(tmp_path: Path) -> None:
    longer = build(constant_mean=True)
    some, value = recorded(build(constant_mean=True), checkpoint=tmp_path / "fit", max_steps=4)
    assert len(some) == 4
    assert recorded(build(constant_mean=True), checkpoint=tmp_path / "fit", max_steps=4) == ([], value)
    rest, best = recorded(longer, checkpoint=tmp_path / "fit")
    assert rest[0][0] == 4
    assert best == pytest.approx(build(constant_mean=True).fit(), abs=1e-4)


def fails_at(monkeypatch: pytest.MonkeyPatch, error: type[Exception], *calls: int) -> None:
    """Some evaluations of the prior, by their numbers, fail."""
    forward, number = TangentGP.forward, iter(range(1000))

    def failing(self: TangentGP, x: Tensor) -> Any:
        if next(number) in calls:
            raise error("cannot be factorised")
        return forward(self, x)

    monkeypatch.setattr(TangentGP, "forward", failing)


@pytest.mark.parametrize("error", [NotPSDError, NanError, SolveError])
def test_a_search_turns_back_where_the_covariance_cannot_be_factorised(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    best = build().fit()
    fails_at(monkeypatch, error, 2, 5)
    assert build().fit() == pytest.approx(best, abs=1e-4)


def test_nothing_is_written_where_there_is_no_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_at(monkeypatch, NotPSDError, 0)
    with pytest.raises(NotPSDError):
        build().fit(checkpoint=tmp_path / "fit")
    assert not list(tmp_path.iterdir())


# --- files -----------------------------------------------------------------------------------------------------------


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "fit"
    killed(build(), path)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(FileFormatError, match="checksum does not match"):
        build().fit(checkpoint=path)
    for cut in (content[: len(content) // 2], b""):
        path.write_bytes(cut)
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
    "selection": (lambda: on(parameters="*weight"), "its differentiated parameters: 6: .*, but here: 3: "),
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
    assert recorded(build(), checkpoint=path)[0][0][0] == KILLED_AT + 1


def test_a_sketch_of_another_seed(tmp_path: Path) -> None:
    def sketched(seed: int) -> TangentGP:
        return TangentGP(X, Y, gpntk.SketchedNTKKernel(mlp(1).double().eval(), num_features=30, seed=seed))

    killed(sketched(0), tmp_path / "fit", at=1)
    with pytest.raises(FileFormatError, match="its mean prior variance"):
        sketched(1).fit(checkpoint=tmp_path / "fit")
    assert recorded(sketched(0), checkpoint=tmp_path / "fit")[0][0][0] == 2


def test_some_columns_of_x(tmp_path: Path) -> None:
    def model() -> TangentGP:
        wide = torch.cat([torch.full((40, 2), 1e9, dtype=torch.float64), X], -1)
        return TangentGP(wide, Y, gpntk.NTKKernel(mlp(1).double().eval(), active_dims=(2, 3, 4, 5, 6)))

    killed(model(), tmp_path / "fit")
    assert recorded(model(), checkpoint=tmp_path / "fit")[0][0][0] == KILLED_AT + 1


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a folder: give the name of a file"):
        build().fit(checkpoint=tmp_path)
    with pytest.raises(InputError, match=r"there is no folder .*nowhere'"):
        build().fit(checkpoint=tmp_path / "nowhere" / "fit")
    assert not os.listdir(tmp_path)
