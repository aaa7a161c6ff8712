"""
From a trained network to a Gaussian process
============================================

A network trained on one task is often nearly right on a related one. This tutorial
turns such a network into a Gaussian process (GP), teaches it the related task from a
few labelled examples, and compares the result with other uses of the same network and
the same labels.

* **Source task**, many labels: by what angle is an image of a digit 0, 1, 2, 3 or 4
  rotated?
* **Target task**, few labels: by what angle is an image of a digit 5, 6, 7, 8 or 9
  rotated?

The images are the 8 x 8 digits that come with scikit-learn; nothing is downloaded. The
whole file runs in about a minute.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.linear_model import BayesianRidge
from sklearn.model_selection import KFold
from torch import Tensor, nn
from tqdm import tqdm

from gpntk import TransferRegressor
from gpntk.plotting import learning_curves, predictions_against_truth

Array = NDArray[np.floating]

SEEDS = range(5)
SIZES = (10, 30, 100, 300)
LARGEST_ANGLE = 45.0

torch.set_num_threads(1)  # the network is too small to gain from more

# %%
# The data
# --------
#
# Each image is turned by a random angle between -45 and 45 degrees, which is its label.
# Images of the source task are turned afresh whenever they are used. Images of the
# target task are turned once, and each is either for learning or for testing, never for
# both. People do not write upright, so no method can be perfect.


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Rotate flat images `[N, 64]` by `[N]` degrees, bilinearly and without changing
    their size.
    """
    angle = degrees.deg2rad()
    zero = torch.zeros_like(angle)
    rows = [
        torch.stack([angle.cos(), -angle.sin(), zero], -1),
        torch.stack([angle.sin(), angle.cos(), zero], -1),
    ]
    grid = nn.functional.affine_grid(
        torch.stack(rows, 1), [len(images), 1, 8, 8], align_corners=False
    )
    return nn.functional.grid_sample(
        images.reshape(-1, 1, 8, 8), grid, align_corners=False
    ).flatten(1)


def rotate_at_random(
    images: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The images `[N, 64]` turned by random angles, and these angles `[N]` in
    degrees.
    """
    degrees = LARGEST_ANGLE * (2 * torch.rand(len(images), generator=generator) - 1)
    return rotate(images, degrees), degrees


digits = load_digits()
pixels = torch.tensor(digits.images / 16, dtype=torch.float32).flatten(1)
source_images, target_images = pixels[digits.target <= 4], pixels[digits.target >= 5]


def draw_target(seed: int) -> tuple[Array, Array]:
    """All images of the target task in random order, turned, and their angles; the
    first ones are for learning.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    order = torch.randperm(len(target_images), generator=generator)
    images, degrees = rotate_at_random(target_images[order], generator)
    return images.double().numpy(), degrees.double().numpy()


# %%
# The source network
# ------------------
#
# A plain network with two hidden layers. Its last step turns units of 45 degrees into
# degrees, so that training sees numbers of order one and everybody else sees degrees.


class Degrees(nn.Module):
    """Turns units of the largest angle into degrees."""

    def forward(self, x: Tensor) -> Tensor:
        return LARGEST_ANGLE * x


def mean_squared_error(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of the network, in units of the largest angle squared."""
    return ((network(x).squeeze(-1) - y) / LARGEST_ANGLE).square().mean()


def train_source(seed: int, steps: int = 3000) -> nn.Sequential:
    """A network trained to tell the angle of images of the source task; in eval
    mode, as GPs need it.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    hidden = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    network = nn.Sequential(*hidden, nn.Linear(128, 1), Degrees())
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-3, total_steps=steps
    )
    for _ in range(steps):
        batch = torch.randint(len(source_images), (128,), generator=generator)
        optimizer.zero_grad()
        mean_squared_error(
            network, *rotate_at_random(source_images[batch], generator)
        ).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def evaluate(network: nn.Module, x: Array) -> Array:
    """What the network returns for the rows of x."""
    with torch.no_grad():
        return network(torch.as_tensor(x, dtype=torch.float32)).double().numpy()


# %%
# Six ways to use it
# ------------------
#
# Each method is a function of the source network, n labelled images x with angles y,
# the test images and a seed. It returns the mean and the standard deviation of the
# angle of each test image, noise included. No method sees a test label.
#
# **Source network.** The network as it is; only the size of its error is learned from
# the labels.

Prediction = tuple[Array, Array]
Method = Callable[[nn.Sequential, Array, Array, Array, int], Prediction]


def source_network(
    network: nn.Sequential, x: Array, y: Array, x_test: Array, _seed: int
) -> Prediction:
    """The network as it is, with the root mean squared residual as standard
    deviation.
    """
    residual = y - evaluate(network, x)[:, 0]
    return evaluate(network, x_test)[:, 0], np.full(
        len(x_test), np.sqrt(np.square(residual).mean())
    )


# %%
# **Last layer refitted.** All layers but the last are frozen, and the last is learned
# anew by Bayesian ridge regression, which chooses its regularisation by the marginal
# likelihood.


def refitted_last_layer(
    network: nn.Sequential, x: Array, y: Array, x_test: Array, _seed: int
) -> Prediction:
    """Bayesian ridge regression on what enters the last layer."""
    features = network[:-2]
    return (
        BayesianRidge()
        .fit(evaluate(features, x), y)
        .predict(evaluate(features, x_test), return_std=True)
    )


# %%
# **Fine-tuned.** Nothing is frozen: training goes on from the source network, with Adam
# on all n labelled images at once. Learning rate and number of steps are chosen
# together by cross-validation in five folds (no step at all is one of the choices), and
# then the network is trained on all n. The error in the folds left out is the noise
# variance.

LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3)
MOST_STEPS = 200


def fine_tune(
    network: nn.Sequential, x: Array, y: Array, rate: float
) -> Iterator[nn.Sequential]:
    """A copy of the network after 0, 1, 2, ... steps of Adam on x and y."""
    network = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), rate, fused=True)
    data = (
        torch.as_tensor(x, dtype=torch.float32),
        torch.as_tensor(y, dtype=torch.float32),
    )
    while True:
        yield network
        optimizer.zero_grad()
        mean_squared_error(network, *data).backward()
        optimizer.step()


def fine_tuned(
    network: nn.Sequential, x: Array, y: Array, x_test: Array, seed: int
) -> Prediction:
    """All weights trained further; learning rate, number of steps and noise by
    cross-validation.
    """
    errors = np.zeros((len(LEARNING_RATES), MOST_STEPS + 1))
    for kept, left_out in KFold(5, shuffle=True, random_state=seed).split(x):
        for row, rate in enumerate(LEARNING_RATES):
            path = islice(fine_tune(network, x[kept], y[kept], rate), MOST_STEPS + 1)
            errors[row] += [
                np.square(y[left_out] - evaluate(tuned, x[left_out])[:, 0]).sum()
                for tuned in path
            ]
    row, steps = np.unravel_index(errors.argmin(), errors.shape)
    tuned = next(
        islice(fine_tune(network, x, y, LEARNING_RATES[row]), int(steps), None)
    )
    return evaluate(tuned, x_test)[:, 0], np.full(
        len(x_test), np.sqrt(errors.min() / len(x))
    )


# %%
# **RBF GP on pixels.** The usual GP, with a squared exponential kernel, which does
# without the network.


def rbf_gp(
    _network: nn.Sequential, x: Array, y: Array, x_test: Array, seed: int
) -> Prediction:
    """A GP with a squared exponential kernel on pixels, its hyperparameters by the
    marginal likelihood.
    """
    kernel = ConstantKernel(1.0, (1e-2, 1e3)) * RBF(2.0, (0.1, 100.0)) + WhiteKernel(
        0.1, (1e-5, 10.0)
    )
    model = GaussianProcessRegressor(
        kernel, normalize_y=True, n_restarts_optimizer=2, random_state=seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # with few points some optimum lies on a bound
        model.fit(x, y)
    return model.predict(x_test, return_std=True)


# %%
# **GP, last layer (NNGP)** and **GP, all layers (NTK).** The network is frozen at its
# weights w and replaced by its expansion to first order in a small move d of them,
#
# .. math::
#
#    f(x; w + d) \approx f(x; w) + J(x)\, d, \qquad
#    J(x) = \partial f(x; w) / \partial w.
#
# With a normal distribution over d this is a GP. Its mean is the network, so that it
# learns what the network gets wrong. Its kernel, J(x) J(x')ᵀ, is the neural tangent
# kernel (NTK): two images are similar if the same moves of the weights change their
# outputs alike. If only the last layer moves, that is the inner product of the inputs
# of the last layer (NNGP). How large moves and noise are is inferred from the labels,
# and with few labels averaged over: nothing is tuned or held out. (By default the
# estimator also tries sums with a stationary kernel; here each is on its own.)


def nngp(
    network: nn.Sequential, x: Array, y: Array, x_test: Array, _seed: int
) -> Prediction:
    """The GP over moves of the last layer."""
    return (
        TransferRegressor(network, kernel="nngp")
        .fit(x, y)
        .predict(x_test, return_std=True)
    )


def ntk(
    network: nn.Sequential, x: Array, y: Array, x_test: Array, _seed: int
) -> Prediction:
    """The GP over moves of all layers."""
    return (
        TransferRegressor(network, kernel="ntk")
        .fit(x, y)
        .predict(x_test, return_std=True)
    )


METHODS: dict[str, Method] = {
    "source network": source_network,
    "last layer refitted": refitted_last_layer,
    "fine-tuned": fine_tuned,
    "RBF GP on pixels": rbf_gp,
    "GP, last layer (NNGP)": nngp,
    "GP, all layers (NTK)": ntk,
}

# %%
# The experiment
# --------------
#
# Each seed trains its own source network, and draws its own angles and its own images
# for learning. Within a seed all methods see the same, and the images for testing are
# the same for all n.

predictions: dict[tuple[str, int, int], Prediction] = {}
truths: dict[int, Array] = {}
for seed in tqdm(SEEDS, desc="seeds"):
    network = train_source(seed)
    x, y = draw_target(seed)
    x_test, truths[seed] = x[max(SIZES) :], y[max(SIZES) :]
    for size in SIZES:
        for name, method in METHODS.items():
            predictions[name, seed, size] = method(
                network, x[:size], y[:size], x_test, seed
            )


# %%
# Results
# -------
#
# RMSE measures the mean alone. NLL, the negative log predictive density of the truth,
# also measures the standard deviation: being wrong is worse with small error bars than
# with large ones. For both, less is better. The numbers are means over seeds and their
# standard errors. Since the methods share seeds, and with them most of the luck,
# differences within a column are more certain than these errors suggest.


def rmse(y: Array, mean: Array, _std: Array) -> float:
    """Root mean squared error, in degrees."""
    return float(np.sqrt(np.square(y - mean).mean()))


def nll(y: Array, mean: Array, std: Array) -> float:
    """Mean negative log density of y under N(mean, std²), in nats."""
    return float(
        (
            0.5 * np.square((y - mean) / std)
            + np.log(std)
            + 0.5 * math.log(2 * math.pi)
        ).mean()
    )


def score(measure: Callable[[Array, Array, Array], float]) -> dict[str, Array]:
    """The scores `[seeds, sizes]` of each method."""
    return {
        name: np.array(
            [
                [
                    measure(truths[seed], *predictions[name, seed, size])
                    for size in SIZES
                ]
                for seed in SEEDS
            ]
        )
        for name in METHODS
    }


def print_table(title: str, scores: dict[str, Array]) -> None:
    """Print mean ± standard error over seeds, methods down and sizes across."""
    print(f"{title:<24}" + "".join(f"{f'n = {size}':>15}" for size in SIZES))
    for name, values in scores.items():
        mean, error = values.mean(0), values.std(0, ddof=1) / math.sqrt(len(values))
        print(
            f"{name:<24}"
            + "".join(
                f"{f'{m:.2f} ± {e:.2f}':>15}" for m, e in zip(mean, error, strict=True)
            )
        )
    print()


print_table("RMSE, degrees", score(rmse))
print_table("NLL, nats", score(nll))

# %%
# What the table says:
#
# * The network knows most of the answer. The GP without it is far behind even with 300
#   labels.
# * With 10 labels, refitting and fine-tuning are on average worse than the source
#   network as it is. The two GPs over weights are not: they take what the network
#   leaves unexplained for noise until the labels say otherwise, and average over all
#   that the labels leave open. With 30, nothing is clearly better than the source
#   network.
# * With 100 labels adapting begins to pay. With 100 and 300, fine-tuning and the GP
#   over all layers are equal within their errors in RMSE, and in NLL the GP is slightly
#   better. The GP over the last layer alone comes after them.
# * Refitting the last layer forgets what that layer knew, which costs most when labels
#   are few.
#
# So the GP does no harm when labels are few. With more of them it comes near carefully
# tuned fine-tuning, which takes thousands of training steps here because of its
# cross-validation, by linear algebra alone; and its error bars depend on the image.
#
# In the picture, left: RMSE against the number of labels, with bands of one standard
# deviation over seeds; the GP on pixels begins far above. Right: the GP over all layers
# after 100 labels, on 100 of the test images of the first seed.

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
learning_curves(left, SIZES, score(rmse))
left.set_ylim(2.5, 7.5)
left.legend(fontsize="small", loc="upper left")
left.set_ylabel("RMSE, degrees")
mean, std = predictions["GP, all layers (NTK)", SEEDS[0], 100]
predictions_against_truth(right, truths[SEEDS[0]][:100], mean[:100], std[:100])
right.set_title("angles in degrees: GP, all layers (NTK), n = 100")

path = Path("transfer_regression.png")
figure.savefig(path, dpi=150)
print(f"Picture saved to {path}")
