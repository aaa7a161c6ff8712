"""TransferRegressor: predictions, scikit-learn's own checks, files, refusals."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.base import clone
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import Tensor, nn
from tqdm import tqdm

import gpntk
from gpntk.errors import FileFormatError, InputError, NetworkError, SelectionError
from gpntk.io import load_tensors, save_tensors
from tests.architectures import LoRA, Recurrent
from tests.cases import CASES, mlp, reference_jacobian

MODULE = mlp(3).double().eval()
SINGLE = mlp(1).double().eval()


class AnyWidth(nn.Module):
    """scikit-learn's checks bring any number of features; a network wants one: pad or fold to ten."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, x: Tensor) -> Tensor:
        padded = nn.functional.pad(x, (0, -x.shape[-1] % 10))
        return self.net(padded.unflatten(-1, (-1, 10)).sum(-2))


@parametrize_with_checks(
    [
        gpntk.TransferRegressor(AnyWidth(), mean="constant", kernel="ntk", hyperparameters="maximum"),
        gpntk.TransferClassifier(AnyWidth(), new_head=True, kernel="ntk", hyperparameters="maximum"),
    ],
    expected_failed_checks=lambda estimator: {
        "check_estimators_overwrite_params": "joblib hashes two equal torch tensors differently",
        "check_sample_weight_equivalence_on_dense_data": "units are means over rows, repeated or not",
        **(
            {"check_supervised_y_2d": "a column y keeps its shape, without a warning"}
            if isinstance(estimator, gpntk.TransferRegressor)
            else {}
        ),
    },
)
def test_scikit_learn_checks(estimator, check) -> None:
    check(estimator)


def data(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((rows, 5))
    return x, np.sin(x[:, 0]) + 0.1 * generator.standard_normal(rows)


@pytest.mark.parametrize("mean", ["network", "constant", "zero"])
def test_posterior_equals_the_dense_formula(mean: str) -> None:
    x, y = data(30)
    z, _ = data(7, seed=1)
    model = gpntk.TransferRegressor(SINGLE, mean=mean, kernel="ntk", hyperparameters="maximum").fit(x, y)
    j, k = (reference_jacobian(SINGLE, torch.as_tensor(points)).numpy() for points in (x, z))
    prior = {"network": y - SINGLE(torch.as_tensor(x)).detach().numpy()[:, 0], "constant": y - y.mean(), "zero": y}
    unit = np.square(prior[mean]).mean() / np.square(j).sum(-1).mean()
    scale = model.hyperparameters_["ntk"] * unit
    # A constant has a wide prior, a hundred times the mean square of what it leaves.
    level = 100 * np.square(prior[mean]).mean() if mean == "constant" else 0.0
    noisy = scale * j @ j.T + level + model.noise_variance_ * np.eye(30)
    cross = scale * k @ j.T + level
    inverse = np.linalg.inv(noisy)
    offset = {
        "network": [SINGLE(torch.as_tensor(points)).detach().numpy()[:, 0] for points in (x, z)],
        "constant": [y.mean(), y.mean()],
        "zero": [0.0, 0.0],
    }[mean]
    predicted, std = model.predict(z, return_std=True)
    np.testing.assert_allclose(predicted, offset[1] + cross @ inverse @ (y - offset[0]), rtol=1e-6, atol=1e-8)
    covariance = scale * k @ k.T + level - cross @ inverse @ cross.T + model.noise_variance_ * np.eye(7)
    np.testing.assert_allclose(std, np.sqrt(covariance.diagonal()), rtol=1e-6)
    np.testing.assert_allclose(model.predict(z, return_cov=True)[1], covariance, rtol=1e-5, atol=1e-9)
    latent = model.predict(z, return_std=True, observation_noise=False)[1]
    np.testing.assert_allclose(latent**2 + model.noise_variance_, std**2, rtol=1e-9)
    residual = torch.as_tensor(y - offset[0])
    exact = torch.distributions.MultivariateNormal(torch.zeros(30).double(), torch.as_tensor(noisy)).log_prob(residual)
    assert model.log_marginal_likelihood_ == pytest.approx(exact.item(), rel=1e-7)


def test_multi_output() -> None:
    x, _ = data(20)
    y = np.stack([np.sin(x[:, 0]), x[:, 1], x[:, 2] * x[:, 3]], axis=-1)
    model = gpntk.TransferRegressor(MODULE, mean="constant").fit(x, y)
    mean, std = model.predict(x, return_std=True)
    assert mean.shape == std.shape == (20, 3)
    assert model.sample_y(x[:4], 5).shape == (4, 3, 5)
    assert model.predict(x[:4], return_cov=True)[1].shape == (12, 12)
    assert model.score(x, y) > 0.6


@pytest.mark.parametrize("layer_variances", [False, True])
def test_the_unit_of_the_targets_does_not_matter(layer_variances: bool) -> None:
    x, y = data(25)
    z, _ = data(5, seed=1)
    one = gpntk.TransferRegressor(SINGLE, mean="constant", layer_variances=layer_variances).fit(x, y)
    two = gpntk.TransferRegressor(SINGLE, mean="constant", layer_variances=layer_variances).fit(x, 1e6 * y - 3e6)
    (m1, s1), (m2, s2) = one.predict(z, return_std=True), two.predict(z, return_std=True)
    np.testing.assert_allclose(m2, 1e6 * m1 - 3e6, rtol=1e-4)
    np.testing.assert_allclose(s2, 1e6 * s1, rtol=1e-3)
    assert two.log_marginal_likelihood_ == pytest.approx(one.log_marginal_likelihood_ - 25 * np.log(1e6), abs=1e-3)


def test_layer_variances_raise_the_marginal_likelihood() -> None:
    x, y = data(40)
    single, layered = (
        gpntk.TransferRegressor(SINGLE, kernel="ntk", hyperparameters="maximum", layer_variances=layers).fit(x, y)
        for layers in (False, True)
    )
    assert layered.log_marginal_likelihood_ > single.log_marginal_likelihood_
    assert len(layered.hyperparameters_) == 4  # three layers and the noise


def test_the_network_as_it_is_where_there_is_nothing_to_learn() -> None:
    x, _ = data(20)
    y = SINGLE(torch.as_tensor(x)).detach().numpy()[:, 0]
    z, _ = data(5, seed=1)
    mean, std = gpntk.TransferRegressor(SINGLE, trained_on=False).fit(x, y).predict(z, return_std=True)
    np.testing.assert_allclose(mean, SINGLE(torch.as_tensor(z)).detach().numpy()[:, 0], atol=1e-8)
    assert (std < 1e-4).all()


def test_many_labels_take_features(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data(800)
    z, _ = data(9, seed=1)
    fit = gpntk.TransferRegressor(SINGLE, kernel="ntk", hyperparameters="maximum").fit
    exact = fit(x, y)
    (mean_of_exact, std_of_exact), evidence = exact.predict(z, return_std=True), exact.log_marginal_likelihood_
    assert "FunctionSpace" in exact.report_.method
    monkeypatch.setattr("gpntk.transfer.fitting._EXACT_SHARE", 1e-12)
    general = fit(x, y)
    mean, std = general.predict(z, return_std=True)
    assert "WeightSpace" in general.report_.method
    np.testing.assert_allclose(mean, mean_of_exact, atol=1e-3)
    np.testing.assert_allclose(std, std_of_exact, rtol=1e-2)
    assert general.log_marginal_likelihood_ == pytest.approx(evidence, abs=0.05)
    torch.manual_seed(99)  # what is drawn has a seed of its own
    assert fit(x, y).log_marginal_likelihood_ == general.log_marginal_likelihood_


def test_images_keep_their_shape() -> None:
    case = next(case for case in CASES if case.name == "cnn-batchnorm")
    images = case.x(12).view(12, 1, 6, 6).numpy()
    y = images.mean((1, 2, 3))
    model = gpntk.TransferRegressor(case.module(), mean="zero").fit(images, np.stack([y, -y], axis=-1))
    flat = gpntk.TransferRegressor(case.module(), mean="zero", input_shape=(1, 6, 6))
    flat.fit(images.reshape(12, -1), np.stack([y, -y], axis=-1))
    np.testing.assert_allclose(model.predict(images), flat.predict(images.reshape(12, -1)))


def dense_mean(network: nn.Module, names: str, x: Tensor, y: Tensor, z: Tensor, ratio: float) -> Tensor:
    """f(z) + K(z, x) (K(x, x) + ratio tr K / n)⁻¹ (y - f(x)), J over the parameters whose names have ``names``."""
    weights = {name: p for name, p in network.named_parameters() if names in name}

    def jacobian(at: Tensor) -> Tensor:
        rows = torch.func.jacrev(lambda some: torch.func.functional_call(network, some, (at,)).reshape(-1))(weights)
        return torch.cat([rows[name].flatten(1) for name in weights], -1)

    j, k = jacobian(x), jacobian(z)
    noisy = j @ j.mT + ratio * j.square().sum(-1).mean() * torch.eye(len(j), dtype=j.dtype)
    return network(z).reshape(-1) + k @ j.mT @ torch.linalg.solve(noisy, y - network(x).reshape(-1))


@pytest.mark.parametrize("chosen", ["low-rank matrices", "a recurrent layer", "the readout"])
def test_sequences_and_the_parameters_that_move(chosen: str) -> None:
    torch.manual_seed(0)
    if chosen == "low-rank matrices":
        network, names, shape = nn.Sequential(LoRA(6, 8, 2), nn.Tanh(), nn.Linear(8, 1)), "0.up", (6,)
        globs: Any = ["*.down", "*.up"]  # of which those of the first matrix change nothing while the second is zero
    else:
        network, shape = Recurrent(nn.GRU, 3, 4, batch_first=True), (5, 3)
        names, globs = ("cell", "cell.*") if chosen == "a recurrent layer" else ("head", "readout")
    network = network.double().eval()
    x, z = torch.randn(20, *shape, dtype=torch.float64), torch.randn(4, *shape, dtype=torch.float64)
    y = network(x).reshape(-1).detach() + x.flatten(1)[:, 0].sin()
    ratio = {"ntk": 2.0, "noise": 0.5}
    model = gpntk.TransferRegressor(network, kernel="ntk", parameters=globs, hyperparameters=ratio)
    model.fit(x.numpy(), y.numpy())
    expected = dense_mean(network, names, x, y, z, ratio["noise"] / ratio["ntk"]).detach().numpy()
    np.testing.assert_allclose(model.predict(z.numpy()), expected, rtol=1e-6, atol=1e-8)


def test_samples_follow_the_posterior() -> None:
    x, y = data(15)
    z, _ = data(3, seed=1)
    model = gpntk.TransferRegressor(SINGLE).fit(x, y)
    samples = model.sample_y(z, 20_000, random_state=0).T
    mean, covariance = model.predict(z, return_cov=True, observation_noise=False)
    deviation = np.sqrt(covariance.diagonal())
    assert (np.abs(samples.mean(0) - mean) < 5 * deviation / np.sqrt(20_000)).all()
    bound = 5 * np.sqrt(2 / 20_000) * np.outer(deviation, deviation)
    assert (np.abs(np.cov(samples.T) - covariance) < bound).all()
    np.testing.assert_array_equal(samples, model.sample_y(z, 20_000).T)  # the seed is zero by default


def test_within_scikit_learn() -> None:
    x, y = data(40)
    estimator = make_pipeline(StandardScaler(), gpntk.TransferRegressor(mlp(1).eval(), mean="constant"))
    assert cross_val_score(estimator, x, y, cv=3).shape == (3,)
    twin = clone(gpntk.TransferRegressor(SINGLE, mean="zero", parameters="readout"))
    assert twin.get_params()["parameters"] == "readout"


def test_frozen_networks_are_taken_as_they_are() -> None:
    x, y = data(20)
    frozen = gpntk.freeze(SINGLE, "readout")
    np.testing.assert_allclose(
        gpntk.TransferRegressor(frozen).fit(x, y).predict(x),
        gpntk.TransferRegressor(SINGLE, parameters="readout").fit(x, y).predict(x),
    )
    with pytest.raises(SelectionError, match="frozen already"):
        gpntk.TransferRegressor(frozen, parameters="readout").fit(x, y)


# --- more of a transfer --------------------------------------------------------------------------------------------


def test_quantiles_are_those_of_the_normal() -> None:
    x, y = data(20)
    model = gpntk.TransferRegressor(SINGLE, kernel="ntk").fit(x, y)
    mean, quantiles = model.predict(x, return_quantiles=[0.025, 0.5, 0.975])
    std = model.predict(x, return_std=True)[1]
    np.testing.assert_allclose(quantiles, mean + np.array([[-1.959964], [0], [1.959964]]) * std, rtol=1e-6)


def test_partial_fit_is_the_fit_of_all_at_the_same_hyperparameters(tmp_path: Path) -> None:
    x, y = data(30)
    z, _ = data(7, seed=1)
    for kernel in ("ntk", "ntk+stationary"):
        model = gpntk.TransferRegressor(SINGLE, kernel=kernel).fit(x[:20], y[:20])
        noise = model.noise_variance_
        model.partial_fit(x[20:25], y[20:25]).partial_fit(x[25:], y[25:])
        assert model.noise_variance_ == noise
        model.save(tmp_path / "model")  # which knows all the data, and the units of the first
        loaded = gpntk.TransferRegressor.load(tmp_path / "model", SINGLE)
        for one, two in zip(model.predict(z, return_std=True), loaded.predict(z, return_std=True), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-7)


def test_known_errors_of_labels_count() -> None:
    x, y = data(20)
    wrong = y.copy()
    wrong[0] += 100
    yvar = np.where(np.arange(20) == 0, 1e8, 1e-4)
    known = {"ntk": 1.0, "noise": 1e-3}
    fit = gpntk.TransferRegressor(SINGLE, kernel="ntk", mean="zero", hyperparameters=known).fit
    with_outlier = fit(x, wrong, yvar=yvar).predict(x[:1])
    assert abs(with_outlier - fit(x[1:], y[1:], yvar=yvar[1:]).predict(x[:1])) < 30
    assert abs(with_outlier - fit(x, wrong).predict(x[:1])) > 30
    for bad, message in ((-yvar, "negative"), (yvar[1:], "one variance per target"), (yvar * np.inf, "infinite")):
        with pytest.raises(InputError, match=message):
            fit(x, y, yvar=bad)


def test_missing_targets_are_left_out() -> None:
    x, y = data(20)
    z, _ = data(5, seed=1)
    gappy = np.stack([y, y**2], -1)
    gappy[3, 1] = np.nan
    network = mlp(2).double().eval()
    model = gpntk.TransferRegressor(network, kernel="ntk").fit(x, gappy.tolist())
    assert np.isfinite(model.predict(z)).all()
    with pytest.raises(InputError, match="an output with only missing values"):
        gpntk.TransferRegressor(network).fit(x, np.stack([y, y * np.nan], -1))


class Loud(nn.Module):
    """Noise with a standard deviation that is ten times larger where the first input is positive."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > 0, 2 * np.log(10.0), 0.0)


def test_noise_that_differs_between_inputs() -> None:
    x, _ = data(200)
    generator = np.random.default_rng(3)
    sigma = np.where(x[:, 0] > 0, 1.0, 0.1)
    y = x[:, 1] + sigma * generator.standard_normal(200)
    model = gpntk.TransferRegressor(SINGLE, mean="zero", kernel="ntk+stationary", noise_network=Loud().eval()).fit(x, y)
    noise = np.square(model.predict(x, return_std=True)[1]) - np.square(
        model.predict(x, return_std=True, observation_noise=False)[1]
    )
    np.testing.assert_allclose(noise[x[:, 0] > 0], 100 * noise[x[:, 0] < 0][0], rtol=1e-6)
    assert model.noise_variance_ == pytest.approx(0.01, rel=0.5)
    with pytest.raises(InputError, match="noise_network is in train mode"):
        gpntk.TransferRegressor(SINGLE, noise_network=nn.Linear(5, 1)).fit(x, y)
    with pytest.raises(InputError, match="noise_network returned shape"):
        gpntk.TransferRegressor(SINGLE, noise_network=nn.Linear(5, 3).eval()).fit(x, y)
    with pytest.raises(InputError, match="noise_network cannot be saved"):
        model.save("nowhere")


def test_a_new_head_for_several_targets() -> None:
    x, y = data(40)
    targets = np.stack([y, x[:, 1], 1e3 * x[:, 2]], -1)
    model = gpntk.TransferRegressor(SINGLE, new_head=True).fit(x, targets)
    assert model.predict(x).shape == (40, 3)
    assert model.score(x, targets) > 0.8
    assert model.sample_y(x[:2], 4).shape == (2, 3, 4)


def test_verbose_prints_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = data(15)
    model = gpntk.TransferRegressor(SINGLE, verbose=True).fit(x, y)
    assert capsys.readouterr().out == f"{model.report_}\n"


def test_progress_bars_say_what_they_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Bar(tqdm):
        def __init__(self, *args: Any, desc: str, **kwargs: Any) -> None:
            shown.append(desc)
            super().__init__(*args, desc=desc, **kwargs)

    monkeypatch.setattr("gpntk.inference.maximum.tqdm", Bar)
    x, _ = data(12)
    fitted = gpntk.TransferClassifier(MODULE, hyperparameters="maximum").fit(x, np.arange(12) % 3)
    comparison = fitted._model.comparison
    assert comparison is not None
    candidates = list(comparison.log_evidence)
    expected = [f"kernel {number} of {len(candidates)}, {name}" for number, name in enumerate(candidates, 1)]
    assert list(dict.fromkeys(shown)) == [*expected, f"{fitted.kernel_}, 12 labels"]


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_variances", [False, True])
@pytest.mark.parametrize("mean", ["network", "constant"])
def test_save_and_load(tmp_path: Path, mean: str, layer_variances: bool) -> None:
    x, y = data(20)
    model = gpntk.TransferRegressor(SINGLE, mean=mean, layer_variances=layer_variances, parameters="*weight").fit(x, y)
    model.save(tmp_path / "model.safetensors")
    other = mlp(1).double().eval()  # same architecture, other weights
    with torch.no_grad():
        other[0].weight.zero_()
    loaded = gpntk.TransferRegressor.load(tmp_path / "model.safetensors", other)
    assert (other[0].weight == 0).all()
    for one, two in zip(model.predict(x, return_std=True), loaded.predict(x, return_std=True), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12)
    assert loaded.log_marginal_likelihood_ == model.log_marginal_likelihood_
    assert loaded.noise_variance_ == pytest.approx(model.noise_variance_, rel=1e-12)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_save_and_load_images(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "cnn-batchnorm")
    images, y = case.x(6).view(6, 1, 6, 6).numpy(), np.ones((6, 2)) * np.arange(6)[:, None]
    model = gpntk.TransferRegressor(case.module()).fit(images, y)
    model.save(tmp_path / "m")
    loaded = gpntk.TransferRegressor.load(tmp_path / "m", case.module())
    np.testing.assert_allclose(loaded.predict(images), model.predict(images), rtol=1e-12)


def test_a_network_on_meta_is_loaded_with_the_weights_of_the_file(tmp_path: Path) -> None:
    x, y = data(20)
    model = gpntk.TransferRegressor(SINGLE).fit(x, y)
    model.save(tmp_path / "m")
    empty = copy.deepcopy(SINGLE).to("meta")
    loaded = gpntk.TransferRegressor.load(tmp_path / "m", empty)
    np.testing.assert_allclose(loaded.predict(x), model.predict(x), rtol=1e-10)
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_another_architecture_with_the_same_weights_is_refused(tmp_path: Path) -> None:
    x, y = data(20)
    gpntk.TransferRegressor(SINGLE).fit(x, y).save(tmp_path / "m")
    other = copy.deepcopy(SINGLE)
    places = [name for name, module in other.named_children() if isinstance(module, nn.Tanh)]
    other._modules[places[0]] = nn.ReLU()
    with pytest.raises(FileFormatError, match=r"does not fit: its tensor 'outputs' is .*, but here it is"):
        gpntk.TransferRegressor.load(tmp_path / "m", other)


def test_forged_files_say_what_does_not_fit(tmp_path: Path) -> None:
    """Every tensor and fact of a file taken away, or another put in, with the checksum made anew."""
    x, y = data(20)
    path = tmp_path / "m"
    gpntk.TransferRegressor(SINGLE).fit(x, y).save(path)
    whole = load_tensors(path, "TransferRegressor")
    tensors, facts = whole.group(""), dict(whole._facts)
    for name in tensors:
        save_tensors(path, "TransferRegressor", {k: t for k, t in tensors.items() if k != name}, facts)
        with pytest.raises(FileFormatError, match=r"belongs to another network|does not fit"):
            gpntk.TransferRegressor.load(path, SINGLE)
        save_tensors(path, "TransferRegressor", {**tensors, name: torch.zeros(7, dtype=tensors[name].dtype)}, facts)
        with pytest.raises(FileFormatError, match=r"belongs to another network|does not fit"):
            gpntk.TransferRegressor.load(path, SINGLE)
    for name in facts:
        save_tensors(path, "TransferRegressor", tensors, {k: f for k, f in facts.items() if k != name})
        with pytest.raises(FileFormatError, match=f"it has no fact '{name}'"):
            gpntk.TransferRegressor.load(path, SINGLE)
    for name in ("parameters", "row_shape", "chosen", "fitted", "log_marginal_likelihood"):
        save_tensors(path, "TransferRegressor", tensors, {**facts, name: "x"})
        with pytest.raises(FileFormatError, match=f"its fact '{name}' is 'x', of type str"):
            gpntk.TransferRegressor.load(path, SINGLE)
    for name in ("dtype", "row_shape"):
        save_tensors(path, "TransferRegressor", tensors, {**facts, name: []})
        with pytest.raises((FileFormatError, InputError), match=rf"fact '{name}' is \[\]|have shape \(\)"):
            gpntk.TransferRegressor.load(path, SINGLE)
    for name in (name for name in tensors if name.startswith("model.") or name == "outputs"):
        save_tensors(path, "TransferRegressor", {**tensors, name: tensors[name] * torch.nan}, facts)
        with pytest.raises(FileFormatError, match=f"its tensor '{name}' "):
            gpntk.TransferRegressor.load(path, SINGLE)
    save_tensors(path, "TransferRegressor", {**tensors, "more": torch.zeros(1)}, facts)
    with pytest.raises(FileFormatError, match="its tensor 'more' does not belong there"):
        gpntk.TransferRegressor.load(path, SINGLE)
    save_tensors(path, "TransferRegressor", tensors, {**facts, "more": 3})
    with pytest.raises(FileFormatError, match="its fact 'more' does not belong there"):
        gpntk.TransferRegressor.load(path, SINGLE)


def test_a_bug_in_the_network_is_not_blamed_on_x() -> None:
    class Broken(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.missing

    x, y = data(8)
    for estimator, labels in ((gpntk.TransferRegressor, y), (gpntk.TransferClassifier, y > 0)):
        with pytest.raises(AttributeError, match="missing"):
            estimator(Broken(5, 1).double()).fit(x, labels)


def test_targets_that_are_no_numbers() -> None:
    x, y = data(8)
    with pytest.raises(InputError, match=r"y is an array of .*: give numbers"):
        gpntk.TransferRegressor(SINGLE).fit(x, y.astype(str))
    with pytest.raises(InputError, match="time_budget='long': give a positive number"):
        gpntk.TransferRegressor(SINGLE, time_budget="long").fit(x, y)


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    x, y = data(20)
    path = tmp_path / "model.safetensors"
    gpntk.TransferRegressor(SINGLE).fit(x, y).save(path)
    content = path.read_bytes()
    load = gpntk.TransferRegressor.load

    path.write_bytes(content[:-40] + bytes([content[-40] ^ 1]) + content[-39:])
    with pytest.raises(FileFormatError, match="checksum does not match"):
        load(path, SINGLE)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(FileFormatError, match="no readable safetensors file"):
        load(path, SINGLE)
    path.write_bytes(b"hello")
    with pytest.raises(FileFormatError, match="no readable safetensors file"):
        load(path, SINGLE)
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="belongs to another network"):
        load(path, MODULE)
    with pytest.raises(FileFormatError, match="belongs to another network: tensors"):
        load(path, nn.Linear(5, 1))
    save_tensors(path, "SomethingElse", {}, {})
    with pytest.raises(FileFormatError, match="holds a SomethingElse, not a TransferRegressor"):
        load(path, SINGLE)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load(tmp_path / "nothing", SINGLE)


def test_newer_and_unrelated_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "plain")
    with pytest.raises(FileFormatError, match="was not written by gpntk"):
        gpntk.TransferRegressor.load(tmp_path / "plain", SINGLE)
    monkeypatch.setattr("gpntk.io.FORMAT_VERSION", 2)
    save_tensors(tmp_path / "new", "TransferRegressor", {}, {})
    monkeypatch.undo()
    with pytest.raises(FileFormatError, match="format version 2, newer than 1"):
        gpntk.TransferRegressor.load(tmp_path / "new", SINGLE)


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data(20)
    path = tmp_path / "model"
    model = gpntk.TransferRegressor(SINGLE).fit(x, y)
    model.save(path)
    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        model.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fit", "error", "message"),
    [
        (lambda x, y: gpntk.TransferRegressor(SINGLE, mean="prior").fit(x, y), InputError, "mean='prior': choose"),
        (lambda x, y: gpntk.TransferRegressor(SINGLE, dtype="half").fit(x, y), InputError, "dtype='half': choose"),
        (lambda x, y: gpntk.TransferRegressor(MODULE).fit(x, y), InputError, r"y has 1 column.*3 output"),
        (lambda x, y: gpntk.TransferRegressor(SINGLE).fit(x, y[:-1]), ValueError, "inconsistent numbers of samples"),
        (
            lambda x, y: gpntk.TransferRegressor(SINGLE).fit(x, y * np.nan),
            InputError,
            "an output with only missing values",
        ),
        (lambda x, y: gpntk.TransferRegressor(SINGLE).fit(np.where(x > 1, np.inf, x), y), ValueError, "X contains inf"),
        (lambda x, y: gpntk.TransferRegressor(SINGLE).fit(x[:0], y[:0]), ValueError, r"0 sample\(s\)"),
        (lambda x, y: gpntk.TransferRegressor(mlp(1)).fit(x, y), NetworkError, "Dropout.*train mode"),
        (
            lambda x, y: gpntk.TransferRegressor(SINGLE).fit(x, y).predict(x, return_std=True, return_cov=True),
            InputError,
            "exclude each other",
        ),
        (lambda x, y: gpntk.TransferRegressor(SINGLE).fit(x, y).sample_y(x, 0), InputError, "n_samples=0"),
        (lambda x, y: gpntk.TransferRegressor(SINGLE).fit(x, y).predict(x[:, :4]), ValueError, "expecting 5 features"),
        (
            lambda x, y: gpntk.TransferRegressor(SINGLE).fit(x, y).predict(x[:, :, None]),
            InputError,
            r"rows of shape \(5, 1\), but fit saw rows of shape \(5,\)",
        ),
    ],
)
def test_refusals(fit, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        fit(*data(20))


def test_one_example_is_enough() -> None:
    x, y = data(1)
    mean, std = gpntk.TransferRegressor(SINGLE).fit(x, y).predict(data(3, seed=1)[0], return_std=True)
    assert np.isfinite(mean).all()
    assert (std > 0).all()


@pytest.mark.parametrize("kernel", ["auto", "ntk+stationary", "nngp"])
def test_no_tensor_of_the_default_device(kernel: str) -> None:
    """Every fresh tensor of torch's factories on meta: one that is used without a device of its own would show."""
    (x, y), z = data(20), data(3, seed=1)[0]
    labels = (y.reshape(len(y), -1)[:, 0] > 0).astype(int)
    regressor, classifier = (
        gpntk.TransferRegressor(SINGLE, kernel=kernel),
        gpntk.TransferClassifier(MODULE, kernel=kernel, new_head=True),
    )
    expected = regressor.fit(x, y).predict(z), classifier.fit(x, labels).predict_proba(z)
    with torch.device("meta"):
        found = regressor.fit(x, y).predict(z), classifier.fit(x, labels).predict_proba(z)
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)
