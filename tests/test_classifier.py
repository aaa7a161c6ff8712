"""TransferClassifier: predictions, scikit-learn's conventions, updates, files, refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import gpntk
from gpntk.errors import FileFormatError, InputError, NetworkError
from tests.architectures import Recurrent
from tests.cases import CASES, mlp

NETWORK = mlp(3).double().eval()
QUICK = {"kernel": "ntk", "hyperparameters": "maximum"}


def blobs(rows: int, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    y = np.arange(rows) % classes
    return 2.5 * np.eye(classes, 5)[y] + generator.standard_normal((rows, 5)), y


def test_probabilities_classes_and_scores() -> None:
    (x, y), (z, truth) = blobs(60), blobs(200, seed=1)
    model = gpntk.TransferClassifier(NETWORK, new_head=True).fit(x, y)
    probabilities = model.predict_proba(z)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    np.testing.assert_array_equal(model.predict(z), model.classes_[probabilities.argmax(1)])
    np.testing.assert_allclose(model.decision_function(z), np.log(probabilities))
    linear = LogisticRegression().fit(x, y).score(z, truth)
    assert model.score(z, truth) > linear - 0.05
    assert model.method_ == "dirichlet"
    assert model.kernel_ in str(model.report_)


@pytest.mark.parametrize("method", ["laplace", "dirichlet"])
def test_classes_of_sequences(method: str) -> None:
    torch.manual_seed(0)
    network = Recurrent(nn.GRU, 5, 8, batch_first=True).eval()
    (steps, y), (new_steps, truth) = blobs(60), blobs(60, seed=1)
    x, z = (np.stack([0.5 * x, x, x[:, ::-1]], 1) for x in (steps, new_steps))
    model = gpntk.TransferClassifier(network, new_head=True, method=method).fit(x, y)
    assert model.score(z, truth) > 0.7  # by chance: a third
    with pytest.raises(InputError, match=r"rows of shape \(3, 4\), but fit saw rows of shape \(3, 5\)"):
        model.predict(z[..., :4])


def test_deterministic_and_the_network_is_not_changed() -> None:
    x, y = blobs(30)
    before = {name: tensor.clone() for name, tensor in NETWORK.state_dict().items()}
    state = torch.get_rng_state()
    one, two = (
        gpntk.TransferClassifier(NETWORK, method=m, **QUICK).fit(x, y).predict_proba(x) for m in ("laplace", "laplace")
    )
    np.testing.assert_array_equal(one, two)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in NETWORK.state_dict().items())


@pytest.mark.parametrize("kind", [str, bool, np.int32])
def test_labels_of_any_kind(kind: type) -> None:
    x, y = blobs(40, classes=2)
    labels = np.where(y == 1, kind(1), kind(0))
    model = gpntk.TransferClassifier(NETWORK, new_head=True, **QUICK).fit(x, labels)
    assert set(model.predict(x)) <= set(labels)
    assert model.score(x, labels) > 0.8
    odds = model.decision_function(x)
    assert odds.shape == (40,)
    np.testing.assert_array_equal(odds > 0, model.predict(x) == kind(1))


def test_classes_that_y_does_not_show() -> None:
    x, y = blobs(30)
    seen = y < 2
    model = gpntk.TransferClassifier(NETWORK, num_classes=3, **QUICK).fit(x[seen], y[seen])
    assert model.predict_proba(x).shape == (30, 3)
    streamed = gpntk.TransferClassifier(NETWORK, **QUICK).partial_fit(x[seen], y[seen], classes=[0, 1, 2])
    np.testing.assert_allclose(streamed.predict_proba(x), model.predict_proba(x))
    streamed.partial_fit(x[~seen], y[~seen], classes=[0, 1, 2])
    assert streamed.score(x, y) >= model.score(x, y)


@pytest.mark.parametrize("kernel", ["ntk", "nngp", "stationary", "ntk+stationary", "auto"])
def test_logits_of_a_binary_network(kernel: str) -> None:
    x, y = blobs(40, classes=2)
    model = gpntk.TransferClassifier(mlp(1).double().eval(), kernel=kernel, hyperparameters="maximum").fit(x, y)
    assert model.score(x, y) > 0.8
    assert model.kernel_ in model.report_.log_evidence


def test_without_labels_to_speak_of_the_network_speaks() -> None:
    x, _ = blobs(30)
    logits = 5 * NETWORK(torch.as_tensor(x))
    sure = nn.Sequential(NETWORK, Times(5.0)).eval()
    y = logits.argmax(-1).numpy()
    model = gpntk.TransferClassifier(sure, num_classes=3, hyperparameters={"ntk": 1e-6}, kernel="ntk").fit(x, y)
    np.testing.assert_allclose(model.predict_proba(x), logits.softmax(-1).detach().numpy(), atol=1e-3)


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def test_images_and_dictionaries() -> None:
    case = next(case for case in CASES if case.name == "cnn-batchnorm")
    images = case.x(12).view(12, 1, 6, 6).numpy()
    y = np.arange(12) % 2
    plain = gpntk.TransferClassifier(case.module(), **QUICK).fit(images, y)

    class Dictionary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = case.module()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(x)}

    wrapped = gpntk.TransferClassifier(Dictionary().eval(), extract=_logits, **QUICK).fit(images, y)
    np.testing.assert_allclose(wrapped.predict_proba(images), plain.predict_proba(images), rtol=1e-6)


def _logits(output: dict[str, Tensor]) -> Tensor:
    return output["logits"]


def test_within_scikit_learn() -> None:
    x, y = blobs(30)
    estimator = make_pipeline(StandardScaler(), gpntk.TransferClassifier(NETWORK, **QUICK))
    assert cross_val_score(estimator, x, y, cv=3, error_score="raise").mean() > 0.7
    search = GridSearchCV(
        gpntk.TransferClassifier(NETWORK, **QUICK), {"link": ["probit", "monte_carlo"]}, cv=2, error_score="raise"
    )
    assert search.fit(x, y).best_score_ > 0.7
    assert clone(gpntk.TransferClassifier(NETWORK, num_classes=4)).num_classes == 4


@pytest.mark.parametrize("method", ["laplace", "dirichlet"])
@pytest.mark.parametrize("new_head", [False, True])
def test_save_and_load(tmp_path: Path, method: str, new_head: bool) -> None:
    x, y = blobs(30)
    names = np.array(["ant", "bee", "cow"])[y]
    classes = None if new_head else ["cow", "ant", "bee"]
    model = gpntk.TransferClassifier(NETWORK, classes=classes, method=method, new_head=new_head, kernel="ntk")
    model.fit(x[:20], names[:20])
    model.partial_fit(x[20:], names[20:])  # units stay those of the first rows
    model.save(tmp_path / "model")
    loaded = gpntk.TransferClassifier.load(tmp_path / "model", mlp(3).double().eval())
    np.testing.assert_allclose(loaded.predict_proba(x), model.predict_proba(x), rtol=1e-6, atol=1e-9)
    assert loaded.predict(x).tolist() == model.predict(x).tolist()
    assert loaded.hyperparameters_ == pytest.approx(model.hyperparameters_)
    with pytest.raises(FileFormatError, match="holds a TransferClassifier, not a TransferRegressor"):
        gpntk.TransferRegressor.load(tmp_path / "model", NETWORK)


def test_numbers_of_numpy_are_saved(tmp_path: Path) -> None:
    x, y = blobs(12)
    known = {"ntk": np.float32(0.5)}
    model = gpntk.TransferClassifier(NETWORK, num_classes=np.int64(3), kernel="ntk", hyperparameters=known)
    model.fit(x, y).save(tmp_path / "model")
    loaded = gpntk.TransferClassifier.load(tmp_path / "model", NETWORK)
    np.testing.assert_allclose(loaded.predict_proba(x), model.predict_proba(x), rtol=1e-6)


def test_a_failed_fit_leaves_what_was_there() -> None:
    x, y = blobs(20)
    model = gpntk.TransferClassifier(NETWORK, **QUICK).fit(x, y)
    before = model.predict_proba(x)
    with pytest.raises(InputError):
        model.fit(np.ones((20, 7)), y)
    np.testing.assert_array_equal(model.predict_proba(x), before)


class Train(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 4), nn.Dropout(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize(
    ("arguments", "change", "error", "message"),
    [
        ({"new_head": True}, lambda x, y: (x, 0 * y), InputError, "y has one class only, 0"),
        ({}, lambda x, y: (x[:0], y[:0]), ValueError, r"0 sample\(s\)"),
        ({}, lambda x, y: (x * np.nan, y), ValueError, "X contains NaN"),
        ({}, lambda x, y: (x, y * np.nan), ValueError, "y contains NaN"),
        ({}, lambda x, y: (x, y + 0.5), ValueError, "Unknown label type"),
        ({}, lambda x, y: (x[:, :4], y), InputError, r"the network does not run on 2 rows of x, shape \(2, 4\)"),
        ({"num_classes": 2}, lambda x, y: (x, y), InputError, "y has 3 classes, more than num_classes=2"),
        ({"num_classes": 5}, lambda x, y: (x, y + 3), InputError, "give labels as integers from 0 to 4"),
        ({"method": "map"}, lambda x, y: (x, y), InputError, "method='map': choose"),
        ({"link": "softmax"}, lambda x, y: (x, y), InputError, "link='softmax': choose"),
        ({"kernel": "rbf"}, lambda x, y: (x, y), InputError, "kernel='rbf': choose"),
        ({"mean": "net"}, lambda x, y: (x, y), InputError, "mean='net': choose"),
        ({"stationary": "exp"}, lambda x, y: (x, y), InputError, "stationary='exp': choose"),
        ({"stationary_inputs": "x"}, lambda x, y: (x, y), InputError, "stationary_inputs='x': choose"),
        ({"hyperparameters": "map"}, lambda x, y: (x, y), InputError, "hyperparameters='map': choose"),
        ({"hyperparameters": {"a": 1.0}}, lambda x, y: (x, y), InputError, "hyperparameters has 'a'"),
        ({"dtype": "half"}, lambda x, y: (x, y), InputError, "dtype='half': choose"),
        ({"new_head": True, "mean": "network"}, lambda x, y: (x, y), InputError, "no meaning for a new head"),
        ({"num_classes": 2.5}, lambda x, y: (x, y), InputError, "num_classes=2.5: give an integer"),
    ],
)
def test_refusals(arguments: dict, change, error: type, message: str) -> None:
    arguments = {"kernel": "ntk", **arguments}
    with pytest.raises(error, match=message):
        gpntk.TransferClassifier(NETWORK, **arguments).fit(*change(*blobs(18)))


def test_more_refusals() -> None:
    x, y = blobs(18)
    with pytest.raises(NetworkError, match=r"Dropout.*train mode"):
        gpntk.TransferClassifier(Train()).fit(x, y)
    model = gpntk.TransferClassifier(NETWORK, **QUICK).fit(x, y)
    with pytest.raises(InputError, match=r"classes=\[0, 7\] are not those of fit"):
        model.partial_fit(x, y, classes=[0, 7])
    with pytest.raises(InputError, match=r"y has classes \[7\], which fit has not seen"):
        model.partial_fit(x[:1], [7])
    with pytest.raises(ValueError, match="expecting 5 features"):
        model.predict(x[:, :4])


def test_one_label_of_each_class_and_a_single_label() -> None:
    x, y = blobs(3)
    assert gpntk.TransferClassifier(NETWORK).fit(x, y).predict_proba(x).shape == (3, 3)
    alone = gpntk.TransferClassifier(NETWORK, num_classes=3).fit(x[:1], y[:1])
    assert np.isfinite(alone.predict_proba(x)).all()
