"""Every part of a saved estimator, taken away or of another kind: refused by name, or the model the same."""

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gpntk
from gpntk.errors import FileFormatError
from gpntk.io import load_tensors, save_tensors

X = np.random.default_rng(0).random((8, 2))
KINDS: list[Any] = [None, True, 3, -1, 2.5, "a", [], {}, [1], ["a"], {"a": 1}, [[1]], [None]]
# Whatever number or word there is, it may be the right one; and what no prediction depends on.
FREE = (
    "padding",
    "leaves",
    "log_marginal_likelihood",
    "time_budget",
    "verbose",
    "hyperparameters",
    "named",
    "num_classes",
)


def network(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def regressor() -> Any:
    groups = {"body": "0.*", "head": ["2.*"]}
    model = gpntk.TransferRegressor(network(1), kernel="ntk+stationary", hyperparameters="maximum", prior_groups=groups)
    return model.fit(X, X.sum(1), np.full(8, 0.1))


def classifier() -> Any:
    return gpntk.TransferClassifier(network(3), kernel="ntk", hyperparameters="maximum").fit(X, np.arange(8) % 3)


def places(fact: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    if isinstance(fact, (dict, list)):
        for key in fact if isinstance(fact, dict) else range(len(fact)):
            yield from places(fact[key], (*place, key))


def forged(facts: dict[str, Any], place: tuple[Any, ...], value: Any = ...) -> dict[str, Any]:
    facts = copy.deepcopy(facts)
    inner: Any = facts
    for key in place[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return facts


def other_tensors(tensor: Tensor) -> dict[str, Tensor]:
    flat = tensor.flatten()
    return {
        "empty": flat[:0],
        "twice": torch.cat([flat, flat]),
        "of more dimensions": tensor[None],
        "NaN": torch.full_like(tensor.double(), math.nan),
        "complex": tensor.to(torch.complex64),
        "half": tensor.half(),
    }


@pytest.fixture(params=[regressor, classifier], scope="module")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = request.param()
    path = tmp_path_factory.mktemp("models") / "model"
    model.save(path)
    contents = load_tensors(path, type(model).__name__)
    return model, path, dict(contents._tensors), json.loads(json.dumps(dict(contents._facts)))


def refused(saved: Any, tensors: dict[str, Tensor], facts: dict[str, Any]) -> str:
    """What `load` says; "" where it gives a model that predicts the same."""
    model, path, *_ = saved
    save_tensors(path, type(model).__name__, tensors, facts)
    try:
        loaded = type(model).load(path, model.network)
    except FileFormatError as error:
        return str(error)
    np.testing.assert_allclose(loaded.predict(X), model.predict(X), rtol=1e-9)
    return ""


def test_facts_that_were_forged(saved: Any) -> None:
    _, path, tensors, facts = saved
    assert not refused(saved, tensors, facts)
    for place in places(facts):
        if not place or place[0] == "parameters":
            continue
        message = refused(saved, tensors, forged(facts, place))
        assert message or place[0] == "chosen", place
        assert not any(raw in message for raw in ("KeyError", "TypeError", "RuntimeError")), message
        there: Any = facts
        for key in place:
            there = there[key]
        for value in KINDS:
            if type(value) is type(there) or (isinstance(there, float) and isinstance(value, int)):
                continue
            message = refused(saved, tensors, forged(facts, place, value))
            assert not any(raw in message for raw in ("KeyError", "TypeError", "AttributeError")), (place, message)
            optional = there is None and place[-1] not in ("num_outputs", "num_classes")
            assert message or optional or any(name in place for name in (*FREE, "names", "prior_groups")), (
                place,
                value,
            )
    Path(path).unlink()


def test_tensors_that_were_forged(saved: Any) -> None:
    _, _, tensors, facts = saved
    for name, tensor in tensors.items():
        message = refused(saved, {key: value for key, value in tensors.items() if key != name}, facts)
        assert message, name
        for what, other in other_tensors(tensor).items():
            if other.shape == tensor.shape and other.dtype == tensor.dtype and what != "NaN":
                continue
            if name == "outputs" and what == "half":  # compared up to what machines differ by
                continue
            message = refused(saved, {**tensors, name: other}, facts)
            assert message, (name, what)
            assert not any(raw in message for raw in ("KeyError", "TypeError", "AttributeError")), (name, what, message)
    for name in ("z", "model.z", "data.z", "network.z"):
        assert refused(saved, {**tensors, name: torch.ones(1)}, facts)


def test_files_that_end_early(saved: Any) -> None:
    model, path, tensors, facts = saved
    save_tensors(path, type(model).__name__, tensors, facts)
    whole = Path(path).read_bytes()
    for size in (0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1):
        Path(path).write_bytes(whole[:size])
        with pytest.raises(FileFormatError, match="no readable safetensors file"):
            type(model).load(path, model.network)
