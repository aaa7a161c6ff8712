"""
Adapt a pretrained classifier with 100 labels
=============================================

A network was trained on many images. Now the images come from another device, and a
hundred of them have been labelled. This tutorial adapts the network without training
it, and

* compares the result with the network as it is, with its last layer refitted, and with
  fine-tuning;
* reads the report: does the source network help, and can the probabilities be trusted?
* takes in more labels afterwards, saves the model and loads it;
* compares two methods of approximation;
* replaces the head of a network, for classes that it has never seen.

The images are the 8 x 8 digits that come with scikit-learn, and the other device holds
them askew; nothing is downloaded. With ``--data DIR`` the source is MNIST and the
target USPS, read from the files ``mnist/*-ubyte.gz`` and ``usps/usps.npz`` (arrays
``x_test`` and ``y_test``) under DIR. The whole file runs in about a minute, with MNIST
and USPS in some minutes.
"""

import argparse
import copy
import gzip
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, train_test_split
from torch import Tensor, nn
from torch.nn import functional

from gpntk import TransferClassifier
from gpntk.plotting import plot_report

Array = NDArray[np.floating]
Labels = NDArray[np.integer]

LABELS = 100
ANGLE = 15.0  # degrees

parser = argparse.ArgumentParser(description="Adapt a pretrained classifier.")
parser.add_argument(
    "--data",
    type=Path,
    help="folder with MNIST and USPS; default: the digits of scikit-learn",
)
arguments, _ = parser.parse_known_args()  # a notebook has arguments of its own

torch.set_num_threads(1)  # the network is too small to gain from more

# %%
# The data
# --------
#
# Source and target show the same ten digits. Offline, one half of scikit-learn's images
# is the source, and the other half, turned by 15 degrees, the target.


def turned(images: Array, degrees: float) -> Array:
    """Images `[N, 1, side, side]` turned by an angle, bilinearly and without
    changing their size.
    """
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    matrix = torch.stack(
        [angle.cos(), -angle.sin(), 0 * angle, angle.sin(), angle.cos(), 0 * angle]
    ).reshape(1, 2, 3)
    grid = functional.affine_grid(
        matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False
    )
    return functional.grid_sample(
        torch.from_numpy(images), grid, align_corners=False
    ).numpy()


def digits_of_scikit_learn() -> tuple[Array, Labels, Array, Labels]:
    """Images `[N, 1, 8, 8]` and labels of the source, and of the target."""
    digits = load_digits()
    images = digits.images[:, None] / 16
    source, target, source_labels, target_labels = train_test_split(
        images, digits.target, test_size=0.5, random_state=0, stratify=digits.target
    )
    return source, source_labels, turned(target, ANGLE), target_labels


def mnist_and_usps(folder: Path) -> tuple[Array, Labels, Array, Labels]:
    """20,000 images of MNIST, shrunk to the 16 x 16 pixels of USPS, and the test
    images of USPS.
    """

    def read(name: str, offset: int) -> NDArray[np.uint8]:
        content = gzip.decompress(
            (folder / "mnist" / f"train-{name}-ubyte.gz").read_bytes()
        )
        return np.frombuffer(content, np.uint8, offset=offset)

    images, labels = (
        read("images-idx3", 16).reshape(-1, 1, 28, 28)[:20_000],
        read("labels-idx1", 8)[:20_000],
    )
    # MNIST leaves a margin of four pixels around the digits, USPS none.
    middle = torch.tensor(images[:, :, 4:24, 4:24]) / 255
    shrunk = (
        functional.interpolate(middle, size=(16, 16), mode="bilinear", antialias=True)
        .double()
        .numpy()
    )
    usps = np.load(folder / "usps" / "usps.npz")
    return (
        shrunk,
        labels.astype(int),
        usps["x_test"].reshape(-1, 1, 16, 16).astype(float),
        usps["y_test"].astype(int),
    )


data = (
    digits_of_scikit_learn()
    if arguments.data is None
    else mnist_and_usps(arguments.data)
)
source, source_labels, target, target_labels = data

# %%
# Of the target, 100 images are for learning, 100 come later, and the others are for
# testing.

x, rest, y, rest_labels = train_test_split(
    target, target_labels, train_size=LABELS, random_state=0, stratify=target_labels
)
x_later, y_later = rest[:LABELS], rest_labels[:LABELS]
x_test, y_test = rest[LABELS:], rest_labels[LABELS:]

# %%
# The source network
# ------------------
#
# A plain convolutional network, trained as usual. Its outputs are logits, and its last
# layer is a ``Linear``.


def make_network(side: int, classes: int) -> nn.Sequential:
    """An untrained network for images of ``side`` x ``side`` pixels."""
    return nn.Sequential(
        *(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(12, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(24 * (side // 4) ** 2, 32), nn.ReLU()),
        nn.Linear(32, classes),
    )


def as_tensors(x: Array, y: Labels) -> tuple[Tensor, Tensor]:
    """Float32, as the network was trained."""
    return torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y)


def train(x: Array, y: Labels, epochs: int) -> nn.Sequential:
    """A trained network, in eval mode."""
    torch.manual_seed(0)
    images, labels = as_tensors(x, y)
    network = make_network(x.shape[-1], int(y.max()) + 1)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
    return network.eval()


epochs = 30 if arguments.data is None else 3
network = train(source, source_labels, epochs)


def outputs(network: nn.Module, x: Array) -> Array:
    """What a network returns for the images x."""
    with torch.no_grad():
        return network(torch.as_tensor(x, dtype=torch.float32)).double().numpy()


def probabilities(network: nn.Module, x: Array) -> Array:
    """The softmax of a network's logits `[N, K]`."""
    return torch.as_tensor(outputs(network, x)).softmax(-1).numpy()


# %%
# Adapt it
# --------
#
# Two lines. The network is copied and frozen. Its logits become the mean of a Gaussian
# process over logits, whose kernel says how they change together when the weights move
# a little; the labels then say where to. Nothing is tuned or held out: the kernel, how
# far weights move, and over what distance images resemble each other follow from the
# 100 labels. Images go in as the network takes them.

start = time.perf_counter()
model = TransferClassifier(network).fit(x, y)
predicted = model.predict_proba(x_test)
print(
    f"fitted and predicted in {time.perf_counter() - start:.1f} s; kernel "
    f"{model.kernel_}"
)
print(f"accuracy on {len(y_test)} test images {model.score(x_test, y_test):.3f}")

# %%
# Three other ways
# ----------------
#
# **The network as it is**, and two that learn from the same 100 labels.
#
# **Last layer refitted.** Logistic regression on what enters the last layer, its
# penalty by cross-validation.


def refitted_last_layer(x_test: Array) -> Array:
    """Probabilities by logistic regression on the network's features."""
    penalties = {"C": np.logspace(-3, 3, 13)}
    search = GridSearchCV(
        LogisticRegression(max_iter=2000), penalties, scoring="neg_log_loss", cv=5
    )
    return search.fit(outputs(network[:-1], x), y).predict_proba(
        outputs(network[:-1], x_test)
    )


# %%
# **Fine-tuned.** Training goes on from the source network, with Adam on all labelled
# images at once. The learning rate and the number of steps (none is one of the choices)
# are those of the smallest loss on 25 of the 100 labelled images when training on the
# other 75; then the network is trained on all 100.


def path_of_training(
    x: Array, y: Labels, rate: float, steps: int, held: tuple[Array, Labels]
) -> tuple:
    """A copy of the network after ``steps`` of Adam, and the loss on ``held`` before
    each step and at the end.
    """
    tuned = copy.deepcopy(network)
    optimizer = torch.optim.Adam(tuned.parameters(), rate)
    (images, labels), (held_images, held_labels) = as_tensors(x, y), as_tensors(*held)
    losses = []
    for step in range(steps + 1):
        with torch.no_grad():
            losses.append(
                functional.cross_entropy(tuned(held_images), held_labels).item()
            )
        if step < steps:
            optimizer.zero_grad()
            functional.cross_entropy(tuned(images), labels).backward()
            optimizer.step()
    return tuned, losses


def fine_tuned(x_test: Array) -> Array:
    """Probabilities of the network trained further."""
    kept, held, kept_labels, held_labels = train_test_split(
        x, y, test_size=0.25, random_state=0, stratify=y
    )
    rates, held_out = (3e-4, 1e-3, 3e-3), (held, held_labels)
    losses = np.array(
        [path_of_training(kept, kept_labels, rate, 150, held_out)[1] for rate in rates]
    )
    row, steps = np.unravel_index(losses.argmin(), losses.shape)
    print(f"fine-tuning: learning rate {rates[row]:g}, {steps} steps")
    return probabilities(
        path_of_training(x, y, rates[row], int(steps), held_out)[0], x_test
    )


# %%
# The comparison
# --------------
#
# Accuracy looks at the most probable class alone. NLL, the mean negative log
# probability of the true class, also asks whether the probabilities mean what they say:
# a confident mistake is worse than a doubtful one. The standard errors are those of a
# mean over test images. All rows share these images, so that differences between rows
# are more certain than that; yet it is one draw of 100 labels, and another draw moves
# every row.


def print_scores(name: str, predicted: Array, truth: Labels) -> None:
    """Print accuracy and NLL, each ± its standard error."""
    right = predicted.argmax(-1) == truth
    loss = -np.log(predicted[np.arange(len(truth)), truth].clip(1e-300))
    cells = (
        f"{v.mean():.3f} ± {v.std() / len(truth) ** 0.5:.3f}" for v in (right, loss)
    )
    print(f"{name:<28}" + "".join(f"{cell:>18}" for cell in cells))


others: dict[str, Callable[[Array], Array]] = {
    "network as it is": lambda x_test: probabilities(network, x_test),
    "last layer refitted": refitted_last_layer,
    "fine-tuned": fine_tuned,
}
by_others = {name: method(x_test) for name, method in others.items()}
print(f"\n{'':<28}{'accuracy':>18}{'NLL':>18}")
print_scores("TransferClassifier", predicted, y_test)
for name, values in by_others.items():
    print_scores(name, values, y_test)

# %%
# Which row is best depends on how far the target is from the source and on the number
# of labels: change ``ANGLE`` and ``LABELS`` to see. No way of adapting is best
# everywhere. A table like this one, on your own data, is the way to know; when there
# are no labels to spare for testing, the report may help.
#
# The report
# ----------
#
# ``report_`` is made of the 100 labels alone. It compares the log evidence of the model
# with that of a GP on the pixels and of the last layer alone: a difference of three
# nats is strong evidence. It says whether the tangent kernel points to where the
# network errs (the alignment, beside that of chance), and how often the most probable
# class is right when the image's own label is left out, by its probability: above the
# diagonal the model is right more often than it says, below it promises too much. With
# 100 labels some of the points rest on very few. The last line is advice.

print(f"\n{model.report_}\n")

figure = plt.figure(figsize=(11, 5.5), layout="constrained")
above, below = figure.subfigures(2, 1, height_ratios=(1, 2.4))
above.suptitle("source above, target below", fontsize="medium")
for row, images in zip(above.subplots(2, 12), (source, target), strict=True):
    for axes, image in zip(row, images, strict=False):
        axes.imshow(image[0], cmap="gray_r")
        axes.set_axis_off()
plot_report(model.report_, below)
path = Path("adapt_a_classifier.png")
figure.savefig(path, dpi=150)
print(f"Picture saved to {path}")

# %%
# More labels
# -----------
#
# ``partial_fit`` takes them in without starting again: kernel and hyperparameters stay
# as they are, and the posterior is that of all labels. Jacobians are computed for the
# new images alone.

with TemporaryDirectory() as folder:
    file = Path(folder) / "model.safetensors"
    model.save(file)
    start = time.perf_counter()
    model.partial_fit(x_later, y_later)
    print(f"{LABELS} more labels taken in, in {time.perf_counter() - start:.1f} s")
    print_scores(f"{2 * LABELS} labels", model.predict_proba(x_test), y_test)

    # A file holds numbers, not code: `load` takes a network of the same architecture,
    # whose weights do not matter.
    loaded = TransferClassifier.load(file, make_network(x.shape[-1], 10))
    print(
        "the model as it was saved: within "
        f"{abs(loaded.predict_proba(x_test) - predicted).max():.0e} of its former"
    )

# %%
# Two methods
# -----------
#
# Labels are no Gaussian observations of the logits, so that the posterior has to be
# approximated.
#
# * ``"laplace"``, the default here, climbs to the most probable logits by Newton's
#   method and puts a Gaussian there.
# * ``"dirichlet"`` turns labels into real numbers with known noise, and solves one
#   regression: no iterations, for fitting again and again. It is the default under a
#   new head.
#
# For mini-batches there is `gpntk.models.VariationalGP`, with a few hundred inducing
# points.
#
# Here with the kernel of the last layer alone, ``kernel="nngp"``, which is the cheapest
# of all: Bayesian logistic regression on the features, around the present weights. It
# is also what to take when labels arrive all the time.

print(f"\n{'with kernel=nngp':<28}{'accuracy':>18}{'NLL':>18}")
for method in ("laplace", "dirichlet"):
    start = time.perf_counter()
    fitted = TransferClassifier(network, kernel="nngp", method=method).fit(x, y)
    print_scores(
        f"{method}, {time.perf_counter() - start:.1f} s",
        fitted.predict_proba(x_test),
        y_test,
    )

# %%
# A new head
# ----------
#
# The classes themselves can be new. A network that knows the digits 0 to 4 is to tell
# 5, 6, 7, 8 and 9 apart, from 10 labels each. Its five outputs mean something else now,
# which no program can know: ``new_head=True`` says so. (Without it, labels that are not
# the numbers of outputs are refused.) The last layer is then replaced by a new linear
# map with a prior of its own, and the layers below it move as before. There is no
# network "as it is" to compare with, but logistic regression on its features remains.
# Without trained logits as a prior mean the methods differ more, above all in how sure
# they are: compare their NLL.

known, unknown = source_labels < 5, target_labels >= 5
narrow = train(source[known], source_labels[known], epochs)
x_new, x_new_test, y_new, y_new_test = train_test_split(
    target[unknown],
    target_labels[unknown],
    train_size=50,
    random_state=0,
    stratify=target_labels[unknown],
)
search = GridSearchCV(
    LogisticRegression(max_iter=2000),
    {"C": np.logspace(-3, 3, 13)},
    scoring="neg_log_loss",
    cv=5,
)
search.fit(outputs(narrow[:-1], x_new), y_new)
print(f"\n{'5 to 9, by a network of 0-4':<28}{'accuracy':>18}{'NLL':>18}")
for method in ("laplace", "dirichlet"):
    headed = TransferClassifier(narrow, new_head=True, method=method).fit(x_new, y_new)
    print_scores(
        f"new head, {method}", headed.predict_proba(x_new_test), y_new_test - 5
    )
print_scores(
    "logistic regression",
    search.predict_proba(outputs(narrow[:-1], x_new_test)),
    y_new_test - 5,
)
