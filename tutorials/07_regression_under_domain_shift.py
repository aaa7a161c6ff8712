"""
Regression under domain shift
=============================

A network was trained where measurements are plentiful, and is needed where they are few
and something has changed: a later year, another site, a replaced sensor. This tutorial
adapts it with `gpntk.TransferRegressor`, and

* draws learning curves beside a GP without the network, the network as it is, and its
  last layer refitted;
* says which kernels there are, which was chosen, and what the report tells;
* checks the predicted intervals;
* gives known errors of labels, and noise that differs between inputs;
* fits several outputs at once, some of them missing.

The data are two variants of Friedman's function, made by scikit-learn; nothing is
downloaded. With ``--data DIR`` they are maps of malaria prevalence in Nigeria, source
2012 and target 2015, read from ``malaria_years/nigeria_pfpr_2012_2015.npz`` under DIR
(arrays ``lon``, ``lat``, and ``pfpr_2012`` to ``pfpr_2015``, one number a cell of the
map; Malaria Atlas Project, Bhatt et al. 2015). The whole file runs in about a minute.
"""

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm
from sklearn.datasets import make_friedman1
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.linear_model import BayesianRidge
from torch import Tensor, nn

from gpntk import TransferRegressor
from gpntk.plotting import learning_curves, plot_report, predictions_against_truth

Array = NDArray[np.floating]

SIZES = (10, 30, 100, 300)
SEEDS = range(3)
TEST_ROWS = 1000

parser = argparse.ArgumentParser(description="Regression under domain shift.")
parser.add_argument(
    "--data", type=Path, help="folder with malaria_years; default: Friedman's function"
)
arguments, _ = parser.parse_known_args()  # a notebook has arguments of its own

torch.set_num_threads(1)  # the network is too small to gain from more

# %%
# The data
# --------
#
# Two quantities are measured at each input. The first sections use one of them.
#
# Offline, the target differs in two ways: its inputs come from one corner of the
# source's, and the function has another slope and another interaction of its inputs.


def friedman() -> tuple[Array, Array, Array, Array]:
    """Inputs `[N, 5]` and outputs `[N, 2]` of the source, and of the target."""
    generator = np.random.default_rng(0)
    x, y = make_friedman1(4000, n_features=5, random_state=0)
    z, w = make_friedman1(8000, n_features=5, random_state=1)
    corner = z[:, 0] + z[:, 3] > 1.1
    z, w = z[corner], w[corner]
    source = np.stack([y, 0.5 * y + 10 * np.square(x[:, 1] - 0.5)], -1)
    shifted = 0.9 * w + 3 * z[:, 1] * z[:, 4]
    target = np.stack([shifted, 0.5 * shifted + 8 * np.square(z[:, 1] - 0.5)], -1)
    return (
        x,
        source + 0.5 * generator.normal(size=source.shape),
        z,
        target + 0.5 * generator.normal(size=target.shape),
    )


def malaria(folder: Path) -> tuple[Array, Array, Array, Array]:
    """Positions `[N, 2]`, prevalence in 2012 and 2013 `[N, 2]`; other positions,
    prevalence in 2015 and 2014.
    """
    stored = np.load(folder / "malaria_years" / "nigeria_pfpr_2012_2015.npz")
    positions = np.stack([stored["lon"], stored["lat"]], -1).astype(float)
    positions = (positions - positions.mean(0)) / positions.std(0)
    first, second, third, fourth = (
        stored[f"pfpr_{year}"].astype(float) for year in (2012, 2013, 2014, 2015)
    )
    order = np.random.default_rng(0).permutation(len(positions))
    source, target = order[:8000], order[8000:12000]
    return (
        positions[source],
        np.stack([first, second], -1)[source],
        positions[target],
        np.stack([fourth, third], -1)[target],
    )


x_source, y_source, x_target, y_target = (
    friedman() if arguments.data is None else malaria(arguments.data)
)


def draw(seed: int, size: int) -> tuple[Array, Array]:
    """Inputs and both outputs of ``size`` labelled examples of the target."""
    rows = (
        TEST_ROWS
        + np.random.default_rng(seed).permutation(len(x_target) - TEST_ROWS)[:size]
    )
    return x_target[rows], y_target[rows]


x_test, y_test = x_target[:TEST_ROWS], y_target[:TEST_ROWS]

# %%
# The source network
# ------------------
#
# Two hidden layers, trained on the source as usual. The last step puts outputs into the
# units of the labels, so that training sees numbers of order one.


class Units(nn.Module):
    """Turns numbers of order one into the units of the labels."""

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", y.mean(0))
        self.register_buffer("std", y.std(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.mean + self.std * x


def train(x: Array, y: Array, steps: int = 2000) -> nn.Sequential:
    """A network trained to map x `[N, D]` to y `[N, C]`; in eval mode."""
    torch.manual_seed(0)
    inputs, labels = (
        torch.as_tensor(x, dtype=torch.float32),
        torch.as_tensor(y, dtype=torch.float32),
    )
    units = Units(labels)
    hidden = [nn.Linear(x.shape[1], 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()]
    network = nn.Sequential(*hidden, nn.Linear(64, y.shape[1]), units)
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-2, total_steps=steps
    )
    for _ in range(steps):
        rows = torch.randint(len(inputs), (256,))
        optimizer.zero_grad()
        ((network(inputs[rows]) - labels[rows]) / units.std).square().mean().backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def evaluate(network: nn.Module, x: Array) -> Array:
    """What a network returns for x."""
    with torch.no_grad():
        return network(torch.as_tensor(x, dtype=torch.float32)).double().numpy()


def rmse(y: Array, predicted: Array) -> float:
    """Root mean squared error."""
    return float(np.sqrt(np.square(y - predicted).mean()))


network = train(x_source, y_source[:, :1])
print(
    "RMSE of the network on its source "
    f"{rmse(y_source[:, :1], evaluate(network, x_source)):.3g}"
)
print(
    "RMSE of the network on the target "
    f"{rmse(y_test[:, :1], evaluate(network, x_test)):.3g}"
)
print(f"standard deviation of the target  {y_test[:, 0].std():.3g}")

# %%
# Learning curves
# ---------------
#
# Each method learns from the same n labels and predicts the same 1000 test rows.
#
# **TransferRegressor** with nothing but its defaults: the network's output is the prior
# mean, so that the GP learns what the network gets wrong.


def transfer(x: Array, y: Array) -> Array:
    """The GP around the network."""
    return TransferRegressor(network).fit(x, y).predict(x_test)


# %%
# **RBF GP**: a GP with a lengthscale per input, which does without the network. Its
# hyperparameters maximise the marginal likelihood, from three starts.


def rbf_gp(x: Array, y: Array) -> Array:
    """A GP on the inputs alone."""
    kernel = ConstantKernel(1.0) * RBF(
        np.ones(x.shape[1]), (0.05, 100.0)
    ) + WhiteKernel(0.1, (1e-5, 10.0))
    model = GaussianProcessRegressor(
        kernel, normalize_y=True, n_restarts_optimizer=2, random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # with few points some optimum lies on a bound
        return model.fit(x, y).predict(x_test)


# %%
# **The network as it is**, and its **last layer refitted**: Bayesian ridge regression
# on what enters the last layer.


def refitted_last_layer(x: Array, y: Array) -> Array:
    """Bayesian ridge regression on the network's features."""
    features = network[:-2]
    return (
        BayesianRidge()
        .fit(evaluate(features, x), y)
        .predict(evaluate(features, x_test))
    )


METHODS: dict[str, Callable[[Array, Array], Array]] = {
    "TransferRegressor": transfer,
    "RBF GP": rbf_gp,
    "network as it is": lambda _x, _y: evaluate(network, x_test)[:, 0],
    "last layer refitted": refitted_last_layer,
}
scores = {name: np.zeros((len(SEEDS), len(SIZES))) for name in METHODS}
for row, seed in enumerate(SEEDS):
    for column, size in enumerate(SIZES):
        x, y = draw(seed, size)
        for name, method in METHODS.items():
            scores[name][row, column] = rmse(y_test[:, 0], method(x, y[:, 0]))
print(
    f"\n{'RMSE, mean over seeds':<24}"
    + "".join(f"{f'n = {size}':>12}" for size in SIZES)
)
for name, values in scores.items():
    print(f"{name:<24}" + "".join(f"{value:>12.3g}" for value in values.mean(0)))

# %%
# Which kernel
# ------------
#
# * ``"ntk"``, the tangent kernel: functions within reach of small moves of all weights;
# * ``"nngp"``, the same for the last layer alone;
# * ``"stationary"``, an RBF kernel of the inputs or of the features: smooth functions,
#   whatever the network;
# * ``"ntk+stationary"``, the sum: what the tangent space cannot say is left to the
#   stationary kernel;
# * ``"auto"``, the default: the sum, unless another is better by three nats of log
#   evidence.
#
# The log marginal likelihood, here at the best hyperparameters, does not see test data.
# The table shows whether it ranks kernels as these do.

x, both = draw(seed=0, size=100)
y = both[:, 0]
print(f"\n{'n = 100':<24}{'log likelihood':>16}{'RMSE':>12}")
for kernel in ("ntk", "nngp", "stationary", "ntk+stationary", "auto"):
    model = TransferRegressor(network, kernel=kernel).fit(x, y)
    print(
        f"{kernel:<24}{model.log_marginal_likelihood_:>16.1f}"
        f"{rmse(y_test[:, 0], model.predict(x_test)):>12.3g}"
    )
print(f"chosen: {model.kernel_}")

# %%
# The report
# ----------
#
# ``report_`` puts the log evidence of the model beside that of a GP on the inputs and
# that of the last layer; says how many independent numbers the labels have taught;
# whether the tangent kernel points to where the network errs (alignment, beside that of
# chance); and, each label being left out in turn, what share of them lies within
# intervals of 50, 80, 90 and 95 %. It is made of the labels alone.

print(f"\n{model.report_}\n")

# %%
# Intervals
# ---------
#
# ``return_quantiles`` gives the borders of intervals for new observations, noise
# included. (``return_std`` and ``return_cov`` give moments, ``observation_noise=False``
# leaves the noise out, and ``sample`` draws functions.) Here is how many of the test
# labels lie within.

print(f"{'interval':<12}{'test labels within':>20}{'mean width':>14}")
for level in (0.5, 0.8, 0.95):
    _, (low, high) = model.predict(
        x_test, return_quantiles=[(1 - level) / 2, (1 + level) / 2]
    )
    within = ((low < y_test[:, 0]) & (y_test[:, 0] < high)).mean()
    print(f"{f'{level:.0%}':<12}{f'{within:.0%}':>20}{(high - low).mean():>14.3g}")

# %%
# Labels of known error
# ---------------------
#
# Suppose that half of the labels come from a worse instrument, whose errors have a
# known standard deviation. ``yvar`` takes the variances; a noise variance common to all
# labels is learned on top.

generator = np.random.default_rng(0)
error = np.where(np.arange(len(y)) % 2 == 0, 0.0, 0.5 * y_test[:, 0].std())
y_worse = y + error * generator.normal(size=len(y))
print(f"\n{'half of the labels with errors':<34}{'RMSE':>10}")
for name, yvar in (("errors not said", None), ("yvar", np.square(error))):
    told = TransferRegressor(network).fit(x, y_worse, yvar)
    print(f"{name:<34}{rmse(y_test[:, 0], told.predict(x_test)):>10.3g}")

# %%
# Noise that differs between inputs
# ---------------------------------
#
# Where only the pattern of the noise is known, a ``noise_network`` maps inputs to the
# logarithm of its variance. A factor is learned, so that the level does not matter. It
# may be a trained network; here it is the pattern of the noise that is added, whose
# standard deviation grows with the first input. NLL is the mean negative log density of
# new noisy labels.

GROWTH = 0.8 / x_test[:, 0].std()


class LogVariance(nn.Module):
    """The pattern of the noise: its log variance, up to a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * GROWTH * x[:, 0]


def noisy(x: Array, y: Array) -> Array:
    """Labels with noise of standard deviation exp(GROWTH x_0), times a constant."""
    growing = np.exp(GROWTH * (x[:, 0] - x_test[:, 0].mean()))
    return y + 0.3 * y_test[:, 0].std() * growing * generator.normal(size=len(y))


y_noisy, y_noisy_test = noisy(x, y), noisy(x_test, y_test[:, 0])
print(f"\n{'noise grows with an input':<34}{'NLL':>10}")
for name, noise_network in (
    ("one noise variance", None),
    ("noise network", LogVariance().eval()),
):
    uneven = TransferRegressor(network, noise_network=noise_network).fit(x, y_noisy)
    mean, std = uneven.predict(x_test, return_std=True)
    print(f"{name:<34}{-norm.logpdf(y_noisy_test, mean, std).mean():>10.3g}")

# %%
# Several outputs, some missing
# -----------------------------
#
# A network with two outputs makes a GP whose outputs are correlated: moving a weight
# changes both. Labels that are missing are NaN. Below, three quarters of those of the
# second output are.
#
# Where the outputs of the target are others than those of the network, say
# ``new_head=True``: the last layer is replaced by a new linear map, with a prior of its
# own. Here the network with one output serves two targets.

pair = train(x_source, y_source)
missing = both.copy()
missing[np.arange(100) % 4 > 0, 1] = np.nan
fits = {
    "network with two outputs, as it is": evaluate(pair, x_test),
    "adapted to 100 and 25 labels": TransferRegressor(pair)
    .fit(x, missing)
    .predict(x_test),
    "adapted to 100 and 100 labels": TransferRegressor(pair)
    .fit(x, both)
    .predict(x_test),
    "new head, 100 and 25 labels": TransferRegressor(network, new_head=True)
    .fit(x, missing)
    .predict(x_test),
}
print(f"\n{'RMSE':<36}{'first output':>14}{'second output':>15}")
for name, predicted in fits.items():
    first, second = (rmse(y_test[:, column], predicted[:, column]) for column in (0, 1))
    print(f"{name:<36}{first:>14.3g}{second:>15.3g}")

# %%
# The picture
# -----------
#
# Above: RMSE against the number of labels, with bands of one standard deviation over
# seeds; and predictions of the GP after 100 labels, for 100 test rows. Below: its
# report.

figure = plt.figure(figsize=(11, 8), layout="constrained")
above, below = figure.subfigures(2, 1, height_ratios=(1.3, 1))
left, right = above.subplots(1, 2)
learning_curves(left, SIZES, scores)
left.set_ylabel("RMSE")
left.set_yscale("log")
mean, std = model.predict(x_test[:100], return_std=True)
predictions_against_truth(right, y_test[:100, 0], mean, std)
right.set_title(f"n = 100, kernel {model.kernel_}", fontsize="medium")
plot_report(model.report_, below)
path = Path("regression_under_domain_shift.png")
figure.savefig(path, dpi=150)
print(f"\nPicture saved to {path}")
