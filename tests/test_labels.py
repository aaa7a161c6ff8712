"""What labels mean: kept heads, new ones, and everything between them that must be said or is refused."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import gpytorch
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import get_scorer, log_loss
from torch import nn

import gpntk
from gpntk.errors import InputError
from tests.cases import mlp, reference_jacobian

QUICK: dict[str, Any] = {"kernel": "nngp", "hyperparameters": "maximum"}
THREE = mlp(3).double().eval()
TEN = mlp(10).double().eval()
WORDS = np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])


def digits(rows: slice, least: int = 0, most: int = 9) -> tuple[np.ndarray, np.ndarray]:
    x, y = load_digits(return_X_y=True)
    chosen = (y >= least) & (y <= most)
    return x[chosen][rows] / 16, y[chosen][rows]


def trained(classes: int) -> nn.Module:
    """A small network for the digits below ``classes``."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, classes))
    x, y = (torch.as_tensor(part) for part in digits(slice(600), 0, classes - 1))
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x.float()), y).backward()
        optimizer.step()
    return network.eval()


def blobs(rows: int, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    y = np.arange(rows) % classes
    return 2.5 * np.eye(classes, 5)[y] + generator.standard_normal((rows, 5)), y


# --- the three everyday cases --------------------------------------------------------------------------------------


def test_digits_that_the_network_does_not_know() -> None:
    network = trained(5)
    (x, y), (z, truth) = digits(slice(40), 5), digits(slice(40, 340), 5)
    with pytest.raises(InputError, match=r"taken for classes 0 to 4.*new_head=True.*classes=\[...\].*num_classes=K"):
        gpntk.TransferClassifier(network, **QUICK).fit(x, y)
    with pytest.raises(InputError, match=r"y has classes \[5, 6, 7, 8, 9\], but num_classes=5"):
        gpntk.TransferClassifier(network, num_classes=5, **QUICK).fit(x, y)
    model = gpntk.TransferClassifier(network, new_head=True, **QUICK).fit(x, y)
    assert model.classes_.tolist() == [5, 6, 7, 8, 9]
    guessed = gpntk.TransferClassifier(network, classes=range(5, 10), **QUICK).fit(x, y)
    assert model.score(z, truth) > guessed.score(z, truth)


def test_a_class_that_does_not_occur_keeps_the_head() -> None:
    network = trained(10)
    x, y = digits(slice(30), 0, 8)
    z, truth = digits(slice(300, 600))
    model = gpntk.TransferClassifier(network, **QUICK).fit(x, y)
    said = gpntk.TransferClassifier(network, num_classes=10, **QUICK).fit(x, y)
    assert model.classes_.tolist() == list(range(10))
    np.testing.assert_array_equal(model.predict_proba(z), said.predict_proba(z))
    assert (model.predict(z[truth == 9]) == 9).mean() > 0.5


def test_names_mean_outputs_in_the_order_that_is_given() -> None:
    network = trained(10)
    (x, y), (z, truth) = digits(slice(30)), digits(slice(300, 600))
    with pytest.raises(InputError, match=r"'eight', .* are taken|taken for classes 0 to 9"):
        gpntk.TransferClassifier(network, **QUICK).fit(x, WORDS[y])
    numbers = gpntk.TransferClassifier(network, **QUICK).fit(x, y)
    names = gpntk.TransferClassifier(network, classes=list(WORDS), **QUICK).fit(x, WORDS[y])
    np.testing.assert_array_equal(names.predict(z), WORDS[numbers.predict(z)])
    # Columns are those of classes_, which scorers of scikit-learn take to be sorted.
    columns = [WORDS.tolist().index(name) for name in names.classes_]
    np.testing.assert_array_equal(names.predict_proba(z), numbers.predict_proba(z)[:, columns])
    own = log_loss(truth, numbers.predict_proba(z), labels=range(10))
    assert get_scorer("neg_log_loss")(names, z, WORDS[truth]) == pytest.approx(-own)


# --- what labels may look like -------------------------------------------------------------------------------------


def test_numbers_of_any_kind_are_the_numbers_of_outputs() -> None:
    x, y = blobs(30)
    expected = gpntk.TransferClassifier(THREE, **QUICK).fit(x, y)
    kinds = list, np.int8, np.uint8, np.float32, torch.as_tensor, lambda labels: torch.as_tensor(labels).float()
    for kind in kinds:
        model = gpntk.TransferClassifier(THREE, **QUICK).fit(x, kind(y))
        assert model.classes_.tolist() == [0, 1, 2]
        np.testing.assert_array_equal(model.predict_proba(x), expected.predict_proba(x))
        assert model.predict(x).tolist() == expected.predict(x).tolist()


def test_more_outputs_than_the_labels_type_can_count() -> None:
    x, y = blobs(6)
    model = gpntk.TransferClassifier(mlp(300).double().eval(), kernel="nngp", hyperparameters={"nngp": 1.0})
    with pytest.warns(UserWarning, match="first 3 of the network's 300 outputs"):
        model.fit(x, y.astype(np.uint8))
    assert len(np.unique(model.classes_)) == 300


@pytest.mark.parametrize("outputs", [1, 2])
def test_binary_networks_take_booleans_and_bits(outputs: int) -> None:
    network = mlp(outputs).double().eval()
    x, y = blobs(30, classes=2)
    bits = gpntk.TransferClassifier(network, **QUICK).fit(x, y)
    truths = gpntk.TransferClassifier(network, **QUICK).fit(x, y == 1)
    signs = gpntk.TransferClassifier(network, classes=[-1, 1], **QUICK).fit(x, 2 * y - 1)
    swapped = gpntk.TransferClassifier(network, classes=["b", "a"], **QUICK).fit(x, np.array(["b", "a"])[y])
    assert truths.predict(x).dtype == bool
    assert [m.classes_.tolist() for m in (bits, truths, signs)] == [[0, 1], [False, True], [-1, 1]]
    for model in (truths, signs):
        np.testing.assert_array_equal(model.predict_proba(x), bits.predict_proba(x))
    np.testing.assert_array_equal(swapped.predict_proba(x)[:, ::-1], bits.predict_proba(x))
    np.testing.assert_array_equal(swapped.decision_function(x), -bits.decision_function(x))
    only = gpntk.TransferClassifier(network, **QUICK).fit(x[y == 0], y[y == 0])
    assert only.predict_proba(x).shape == (30, 2)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (lambda y: y - 1, {}, r"y has classes \[-1, 0, 1\]"),
        (lambda y: y + 1, {}, r"y has classes \[1, 2, 3\]"),
        (lambda y: y == 1, {}, r"y has classes \[False, True\].*0 to 2"),
        (lambda y: np.array(list("abc"))[y], {}, r"y has classes \['a', 'b', 'c'\]"),
        (lambda y: y.astype(str), {}, r"y has classes \['0', '1', '2'\]"),
        (lambda y: np.arange(len(y)) // 2, {}, r"8, 9\] and 5 more, but"),
        (lambda y: np.eye(3)[y], {}, r"shape \(30, 3\): give one class for each input.*y.argmax\(1\)"),
        (lambda y: np.eye(3)[y].tolist(), {"new_head": True}, r"shape \(30, 3\)"),
        (lambda y: y + 0.25, {}, "Unknown label type"),
        (lambda y: y, {"classes": [0, 1]}, r"y has classes \[2\], which classes= does not have: \[0, 1\]"),
        (lambda y: y, {"classes": ["0", "1", "2"]}, r"y has classes \[0, 1, 2\], which classes= does not have"),
        (lambda y: y, {"classes": [0, 1, 1, 2]}, "has a class twice"),
        (lambda y: y, {"classes": [[0, 1, 2]]}, "give a list of at least two"),
        (lambda y: y, {"classes": {0, 1, 2}}, "give a list of at least two"),
        (lambda y: y, {"classes": "abc"}, "give a list of at least two"),
        (lambda y: y, {"classes": [0]}, "give a list of at least two"),
        (lambda y: y, {"classes": [0, 1, 2], "num_classes": 4}, "num_classes=4, but classes= has 3"),
        (lambda y: y, {"num_classes": 2}, "y has 3 classes, more than num_classes=2"),
        (lambda y: y - 1, {"num_classes": 3}, "integers from 0 to 2, or classes="),
        (lambda y: np.array(list("abc"))[y], {"num_classes": 3}, "integers from 0 to 2, or classes="),
        (lambda y: y, {"num_classes": 1}, "at least 2 classes"),
    ],
)
def test_what_would_decide_in_silence_is_refused(labels, options: dict[str, Any], message: str) -> None:
    x, y = blobs(30)
    with pytest.raises(ValueError, match=message):
        gpntk.TransferClassifier(THREE, **QUICK, **options).fit(x, labels(y))


# --- heads that are replaced ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "options", "classes"),
    [
        (lambda y: y, {"num_classes": 4}, [0, 1, 2, 3]),
        (lambda y: np.array(list("cab"))[y], {"classes": ["c", "a", "b", "d"]}, ["a", "b", "c", "d"]),
        (lambda y: y == 0, {"num_classes": 2}, [False, True]),
        (lambda y: np.array(list("caa"))[y], {"num_classes": 2}, ["a", "c"]),
    ],
)
def test_a_head_is_replaced_with_one_warning(labels, options: dict[str, Any], classes: list, tmp_path: Path) -> None:
    x, y = blobs(24)
    with pytest.warns(
        UserWarning, match=rf"there are {len(classes)} classes, .* 3 output.*readout is replaced"
    ) as said:
        model = gpntk.TransferClassifier(THREE, **QUICK, **options).fit(x, labels(y))
    assert len(said) == 1
    assert said[0].filename == __file__
    assert model.classes_.tolist() == classes
    asked = gpntk.TransferClassifier(THREE, new_head=True, **QUICK, **options).fit(x, labels(y))
    np.testing.assert_array_equal(asked.predict_proba(x), model.predict_proba(x))
    model.save(tmp_path / "model")
    loaded = gpntk.TransferClassifier.load(tmp_path / "model", THREE)
    assert loaded.classes_.tolist() == classes
    np.testing.assert_allclose(loaded.predict_proba(x), model.predict_proba(x), rtol=1e-9)
    assert loaded.predict(x).tolist() == model.predict(x).tolist()


def test_few_labels_of_many_outputs_are_said() -> None:
    x, y = blobs(20)
    with pytest.warns(
        UserWarning, match=r"labels 0 to 2 are taken for the first 3 of the network's 10 outputs"
    ) as said:
        model = gpntk.TransferClassifier(TEN, **QUICK).fit(x, y)
    assert len(said) == 1
    assert said[0].filename == __file__
    quiet = gpntk.TransferClassifier(TEN, num_classes=10, **QUICK).fit(x, y)
    np.testing.assert_array_equal(quiet.predict_proba(x), model.predict_proba(x))


def test_partial_fit_takes_all_classes_of_the_network_and_no_others(tmp_path: Path) -> None:
    x, y = blobs(30)
    names = np.array(["cow", "ant", "bee"])
    model = gpntk.TransferClassifier(THREE, classes=names, **QUICK)
    model.partial_fit(x[y < 2], names[y[y < 2]], classes=sorted(names))
    model.save(tmp_path / "model")
    loaded = gpntk.TransferClassifier.load(tmp_path / "model", THREE)
    for each in (model, loaded):
        each.partial_fit(x[y == 2], names[y[y == 2]])
        assert each.score(x, names[y]) > 0.8
        assert each.get_params()["classes"].tolist() == names.tolist()
        with pytest.raises(InputError, match=r"y has classes \['elk'\], which fit has not seen"):
            each.partial_fit(x[:1], ["elk"])
    # The order of scikit-learn's classes= means nothing: names need an order that was said.
    with pytest.raises(InputError, match="taken for classes 0 to 2"):
        gpntk.TransferClassifier(THREE, **QUICK).partial_fit(x, names[y], classes=names)
    with pytest.raises(InputError, match=r"y has classes \[2\], which classes= does not have"):
        gpntk.TransferClassifier(THREE, **QUICK).partial_fit(x, y, classes=[0, 1])


def test_tensors_in_tensors_out_keeps_the_head_likewise() -> None:
    x, y = (torch.as_tensor(part) for part in blobs(20, classes=2))
    frozen = gpntk.freeze(THREE)
    gp = gpntk.transfer.TransferGP(frozen, x, y, likelihood="categorical", kernel="ntk", hyperparameters="maximum")
    gp.fit()
    assert gp.probabilities(x).shape == (20, 3)
    with pytest.raises(InputError, match="labels has class 3, but num_classes=3"):
        gpntk.transfer.TransferGP(frozen, x, y + 2, likelihood="categorical")


# --- weights -------------------------------------------------------------------------------------------------------


def test_a_weight_is_so_many_equal_labels() -> None:
    """At known hyperparameters, weights 1, 2, 0 are rows once, twice and not at all."""
    x, _ = blobs(24)
    counts = np.arange(24) % 3
    rows = np.repeat(np.arange(24), counts)
    targets, one = x[:, 0] ** 2, mlp(1).double().eval()
    # Kernels are in units of their mean over the rows, which are others where some occur twice.
    unit = np.square(reference_jacobian(one, torch.as_tensor(x)).numpy()).sum(-1)
    ratio = unit[rows].mean() / unit[counts > 0].mean()
    yvar = np.full(24, 0.3)

    def fit(chosen, known: dict[str, float], **options) -> gpntk.TransferRegressor:
        model = gpntk.TransferRegressor(one, mean="zero", kernel="ntk", hyperparameters=known)
        return model.fit(x[chosen], targets[chosen], **options)

    level = np.square(targets[counts > 0]).mean() / np.square(targets[rows]).mean()
    weighted = fit(slice(None), {"ntk": 1.0, "noise": 0.1}, sample_weight=counts, yvar=yvar)
    repeated = fit(rows, {"ntk": level * ratio, "noise": 0.1 * level}, yvar=yvar[rows])
    for a, b in zip(weighted.predict(x, return_std=True), repeated.predict(x, return_std=True), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8)
    streamed = fit(counts == 2, {"ntk": 1.0, "noise": 0.1}, sample_weight=counts[counts == 2])
    noise = streamed.noise_variance_
    streamed.partial_fit(x[:5], targets[:5], sample_weight=counts[:5])
    assert streamed.noise_variance_ == noise


def test_weights_of_classes_are_those_of_the_log_likelihood(tmp_path: Path) -> None:
    x, y = blobs(24)
    counts = np.arange(24) % 3 + (np.arange(24) == 0)
    rows = np.repeat(np.arange(24), counts)
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()).requires_grad_(False)
    model = gpntk.TransferClassifier(THREE, method="dirichlet", kernel=kernel)
    weighted = copy.deepcopy(model).fit(x, y, sample_weight=counts)
    repeated = copy.deepcopy(model).fit(x[rows], y[rows])
    np.testing.assert_allclose(weighted.predict_proba(x), repeated.predict_proba(x), rtol=1e-6)
    more = copy.deepcopy(model).fit(x[:12], y[:12], sample_weight=counts[:12])
    more.partial_fit(x[12:], y[12:], sample_weight=counts[12:])
    np.testing.assert_allclose(more.predict_proba(x), weighted.predict_proba(x), rtol=1e-6)
    saved = gpntk.TransferClassifier(THREE, method="dirichlet", **QUICK).fit(x, y, sample_weight=counts)
    saved.save(tmp_path / "model")
    loaded = gpntk.TransferClassifier.load(tmp_path / "model", THREE)
    np.testing.assert_allclose(loaded.predict_proba(x), saved.predict_proba(x), rtol=1e-9)
    assert str(loaded.report_) == str(saved.report_)
    with pytest.raises(InputError, match="sample_weight does not go into method='laplace': take method='dirichlet'"):
        gpntk.TransferClassifier(THREE, **QUICK).fit(x, y, sample_weight=counts)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(3), r"sample_weight has shape \(3,\), but y has 12 rows"),
        (np.arange(12.0) - 1, "sample_weight has negative"),
        (np.full(12, np.nan), "sample_weight has negative, infinite or NaN"),
        (np.zeros(12), "zeros only"),
    ],
)
def test_weights_that_mean_nothing(weights: np.ndarray, message: str) -> None:
    x, y = blobs(12)
    with pytest.raises(InputError, match=message):
        gpntk.TransferClassifier(THREE, new_head=True).fit(x, y, sample_weight=weights)
    with pytest.raises(InputError, match=message):
        gpntk.TransferRegressor(THREE, new_head=True).fit(x, y, sample_weight=weights)


# --- labels that the network knows already -------------------------------------------------------------------------


def test_labels_of_the_training_are_said_to_count_twice() -> None:
    x, _ = blobs(30)
    network = mlp(1).double().eval()
    targets = network(torch.as_tensor(x)).detach().numpy()[:, 0]
    new = targets + 0.1 * targets.std() * np.random.default_rng(0).standard_normal(30)
    known = {"hyperparameters": {"nngp": 1.0, "noise": 1.0}, "kernel": "nngp"}
    for options, y in (({}, targets + 0.01 * (new - targets)), ({"trained_on": True}, new)):
        with pytest.warns(UserWarning, match=r"counts them twice.*gpntk.models.LaplacePosterior") as said:
            gpntk.TransferRegressor(network, **known, **options).fit(x, y)
        assert said[0].filename == __file__
    gpntk.TransferRegressor(network, trained_on=False, **known).fit(x, targets)
    gpntk.TransferRegressor(network, **known).fit(x, new)
    # Classes: a network that is sure of all of them.
    sure = trained(2)
    z, classes = digits(slice(150), 0, 1)
    known = {"hyperparameters": {"nngp": 1.0}, "kernel": "nngp"}
    with pytest.warns(UserWarning, match="counts them twice") as said:
        gpntk.TransferClassifier(sure, **known).fit(z, classes)
    assert said[0].filename == __file__
    gpntk.TransferClassifier(sure, trained_on=False, **known).fit(z, classes)


# --- the same for targets ------------------------------------------------------------------------------------------


def test_targets_of_another_width_are_said() -> None:
    x, _ = blobs(20)
    y = x[:, :2] ** 2
    with pytest.raises(
        InputError, match=r"y has 2 column.*network has 3 output.*extract=.*new_head=True or num_outputs=2"
    ):
        gpntk.TransferRegressor(THREE, **QUICK).fit(x, y)
    with pytest.raises(InputError, match=r"num_outputs=3, but y has 2 column"):
        gpntk.TransferRegressor(THREE, num_outputs=3, **QUICK).fit(x, y)
    with pytest.warns(UserWarning, match=r"num_outputs=2, but the network has 3 output.*replaced") as said:
        model = gpntk.TransferRegressor(THREE, num_outputs=2, **QUICK).fit(x, y)
    assert len(said) == 1
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked = gpntk.TransferRegressor(THREE, new_head=True, **QUICK).fit(x, y)
    np.testing.assert_array_equal(asked.predict(x), model.predict(x))
