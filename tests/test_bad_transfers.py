"""Arguments of a wrong type or value are refused by name: the estimators, and what they are given as X and y."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import nn

import gpntk
from gpntk.errors import GpntkError, InputError
from tests.test_bad_arguments import CHOICES, CLASSES, COUNTS, FLAGS, FROZEN, NAN, NETWORK, POSITIVE, SHAPES, X, Y

TRANSFER = {
    "network": [3, None, "a", nn.Linear],
    "mean": CHOICES,
    "kernel": CHOICES,
    "new_head": [3, "no", NAN],
    "layer_variances": FLAGS,
    "parameters": [3, "foo.*", [], [3]],
    "prior_groups": [3, "a", {}, {"a": 3}],
    "stationary": CHOICES,
    "stationary_inputs": ["foo", 3, True],
    "hyperparameters": ["foo", 3, None, {"foo": 1.0}, {"noise": -1.0}, {"noise": NAN}, {"noise": "a"}, {3: 1.0}],
    "time_budget": POSITIVE,
    "input_shape": SHAPES,
    "extract": [3, True, []],
    "dtype": [*CHOICES, torch.float64],
    "checkpoint": [3, True, []],
    "trained_on": ["a", 3],
    "verbose": FLAGS,
}


def fitted(estimator: Any, labels: torch.Tensor) -> Callable[..., Any]:
    def fit(**options: Any) -> Any:
        options = {"network": NETWORK, "kernel": "ntk", "hyperparameters": "maximum", **options}
        return estimator(**options).fit(X.numpy(), labels.numpy())

    return fit


TABLE: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, list[Any]]]] = {
    "TransferRegressor": (
        fitted(gpntk.TransferRegressor, Y),
        {},
        {**TRANSFER, "num_outputs": ["a", -1, 0, 2.5, NAN, 7], "noise_network": [3, "a", nn.Linear]},
    ),
    "TransferClassifier": (
        fitted(gpntk.TransferClassifier, CLASSES.clamp_max(1)),
        {},
        {
            **TRANSFER,
            "num_classes": ["a", -1, 0, 2.5, NAN, 1],
            "classes": [3, "a", [0], [0, 0]],
            "method": CHOICES,
            "link": CHOICES,
        },
    ),
    "TransferRegressor.predict": (
        fitted(gpntk.TransferRegressor, Y)().predict,
        {"X": X.numpy()},
        {
            **{name: FLAGS for name in ("return_std", "return_cov", "observation_noise")},
            "return_quantiles": ["a", 3, [], [0.0], [1.5], [NAN], [1j], [[0.5]]],
        },
    ),
    "TransferRegressor.sample_y": (
        fitted(gpntk.TransferRegressor, Y)().sample_y,
        {"X": X.numpy()},
        {"n_samples": COUNTS, "random_state": ["a", -1, 2.5, NAN], "observation_noise": FLAGS},
    ),
    "TransferGP": (
        gpntk.TransferGP,
        {"network": FROZEN, "x": X, "y": Y.unsqueeze(-1)},
        {
            "y": [3, None, Y.tolist(), Y, Y.to_sparse(), Y.unsqueeze(-1) + 0j],
            "likelihood": CHOICES,
            "new_head": FLAGS,
            "time_budget": POSITIVE,
            "noise_network": [3, "a"],
        },
    ),
}


def said(value: Any) -> str:
    """The value as part of a test's name, without its address: names are the same in every process."""
    if isinstance(value, torch.Tensor):
        return f"tensor{list(value.shape)}{value.dtype}"
    return re.sub(r" at 0x\w+|\s", "", repr(value))


CASES = [
    pytest.param(call, {**given, name: value}, name, id=f"{title}-{name}-{said(value)}")
    for title, (call, given, bad) in TABLE.items()
    for name, values in bad.items()
    for value in values
]


@pytest.mark.parametrize("title", TABLE)
def test_what_is_right_is_taken(title: str) -> None:
    call, given, _ = TABLE[title]
    assert call(**given) is not None


@pytest.mark.parametrize(("call", "arguments", "name"), CASES)
def test_a_wrong_argument_is_refused_by_name(call: Callable[..., Any], arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(GpntkError, match=name):
        call(**arguments)


@pytest.mark.parametrize("network", [NETWORK, 3, None])
def test_a_transfer_says_that_it_wants_a_frozen_network(network: Any) -> None:
    with pytest.raises(GpntkError, match=r"network is a .*gpntk.freeze\(network\)"):
        gpntk.TransferGP(network, torch.ones(3, 2), torch.ones(3))


# --- X and y ---------------------------------------------------------------------------------------------------------

ARRAY = X.numpy()
GAP = np.where(np.arange(12).reshape(6, 2) == 9, NAN, ARRAY)
NO_INPUTS: dict[str, tuple[Any, str]] = {
    "NaN in a later row": (GAP, "X or y does not pass .*NaN"),
    "infinity": (np.where(np.isnan(GAP), math.inf, GAP), "X or y does not pass .*infinity"),
    "complex": (ARRAY + 0j, "X or y does not pass .*Complex"),
    "complex tensor": (X + 0j, "X or y does not pass .*Complex"),
    "text": (np.full((6, 2), "a"), "X is text"),
    "objects": (np.full((6, 2), None), "X or y does not pass"),
    "sparse": (scipy.sparse.csr_matrix(ARRAY), "X is a sparse matrix"),
    "sparse tensor": (X.to_sparse(), "X is a tensor in a sparse layout"),
    "on meta": (X.to("meta"), "X is a tensor on the meta device"),
    "masked": (np.ma.masked_array(ARRAY, mask=ARRAY.mean() < ARRAY), "X is a masked array"),
    "dates": (np.zeros((6, 2), dtype="M8[s]"), "X holds datetime64"),
    "a vector": (ARRAY[:, 0], "X or y does not pass .*2D"),
    "no rows": (ARRAY[:0], "X or y does not pass"),
    "no columns": (ARRAY[:, :0], "X or y does not pass"),
    "a number": (3.0, "X or y does not pass"),
    "None": (None, "X or y does not pass"),
    "too wide": (np.hstack([ARRAY, ARRAY]), r"does not run on 2 rows of x, shape \(2, 4\)"),
    "images": (ARRAY.reshape(6, 1, 2, 1), "does not run on 2 rows of x"),
    "other rows": (ARRAY[:4], "X or y does not pass"),
}
SAME_INPUTS: dict[str, Any] = {
    "negative strides": ARRAY[::-1].copy()[::-1],
    "big-endian": ARRAY.astype(">f8"),
    "long double": ARRAY.astype(np.longdouble),
    "Fortran order": np.asfortranarray(ARRAY),
    "list": ARRAY.tolist(),
    "objects that are numbers": ARRAY.astype(object),
    "tensor": X,
    "tensor with a graph": X.clone().requires_grad_(),
}


@pytest.mark.parametrize("estimator", [gpntk.TransferRegressor, gpntk.TransferClassifier])
@pytest.mark.parametrize("name", NO_INPUTS)
def test_inputs_that_are_none(name: str, estimator: Any) -> None:
    inputs, message = NO_INPUTS[name]
    labels = Y if estimator is gpntk.TransferRegressor else CLASSES.clamp_max(1)
    with pytest.raises(InputError, match=f"(?s){message}"):
        estimator(NETWORK, kernel="ntk").fit(inputs, labels.numpy())


@pytest.mark.parametrize("name", SAME_INPUTS)
def test_inputs_in_other_layouts_are_the_same(name: str) -> None:
    expected = fitted(gpntk.TransferRegressor, Y)().predict(ARRAY)
    model = gpntk.TransferRegressor(NETWORK, kernel="ntk", hyperparameters="maximum").fit(SAME_INPUTS[name], Y.numpy())
    np.testing.assert_allclose(model.predict(SAME_INPUTS[name]), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (Y.numpy() + 0j, "Complex"),
        (np.full(6, "a"), "y"),
        (np.zeros(6, dtype="M8[s]"), "y holds datetime64"),
        (scipy.sparse.csr_matrix(Y.numpy()[:, None]), "y is a sparse matrix"),
        (Y.to("meta"), "y is a tensor on the meta device"),
        (Y.numpy()[None, None], "y"),
        (Y.numpy()[:4], "y"),
        (np.full(6, math.inf), "y"),
        (np.full(6, NAN), "y"),
        (Y.numpy() * 1e200, "units"),
        (Y.numpy() * 1e-200, "units"),
        (None, "y"),
    ],
)
def test_targets_that_are_none(targets: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        gpntk.TransferRegressor(NETWORK, kernel="ntk").fit(ARRAY, targets)


@pytest.mark.parametrize("yvar", ["a", Y.numpy() + 0j, -Y.numpy(), Y.numpy()[:3], {}, Y.to("meta"), np.full(6, NAN)])
def test_variances_that_are_none(yvar: Any) -> None:
    with pytest.raises(InputError, match="yvar"):
        gpntk.TransferRegressor(NETWORK, kernel="ntk").fit(ARRAY, Y.numpy(), yvar)
