"""
NNGP and NTK of your own module
===============================

Draw the weights of a network at random and it is a random function. The wider its
layers, the more Gaussian that function, and in the limit it is a Gaussian process whose
kernel has a formula: the NNGP. Train such a network by gradient descent and the change
of its outputs is governed by another kernel, the neural tangent kernel (NTK), which in
the limit does not change during training. gpntk reads both from an ``nn.Module``. This
tutorial shows

* the two kernels of a module that is written down as usual, and how networks of finite
  width approach them;
* classification of digits with them, as regression on class indicators;
* learning the prior's variances σ_w² and σ_b² by marginal likelihood, with GPyTorch;
* what depth makes of signals: order, chaos, and the line between them, where deep
  kernels can be learned with.

The images are the 8 x 8 digits that come with scikit-learn; nothing is downloaded. With
``--data DIR`` they are those of MNIST, from its files in DIR. The whole file runs in
about a minute.
"""

import argparse
import gzip
import math
from itertools import pairwise
from pathlib import Path

import gpytorch
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import gpntk
from gpntk.infinite import activation_of, monte_carlo
from gpntk.infinite.phases import phase, phase_diagram
from gpntk.likelihoods import one_hot_targets
from gpntk.plotting import accuracy_map
from gpntk.plotting import phase_diagram as draw_phase_diagram

TRAIN, TEST, CLASSES = 300, 600, 10
DEPTH, DEEP = 3, 30
WIDTHS = (8, 32, 128, 512)
NETWORKS = 20

torch.manual_seed(0)
torch.set_num_threads(1)

# %%
# The data
# --------
#
# Each image is shifted and scaled to have mean 0 and variance 1 over its pixels, as is
# usual for these kernels: they depend on x only through inner products x·x'/D. Their
# matrices are close to singular, hence float64.


def read_images(folder: str | None) -> tuple[Tensor, Tensor]:
    """Images `[N, D]` in random order and their classes `[N]`."""
    if folder is None:
        digits = load_digits()
        images, labels = digits.data, digits.target
    else:
        images, labels = (
            np.frombuffer(
                gzip.decompress(Path(folder, f"train-{name}-ubyte.gz").read_bytes()),
                np.uint8,
                offset=offset,
            )
            for name, offset in (("images-idx3", 16), ("labels-idx1", 8))
        )
    order = torch.randperm(len(labels))[: TRAIN + TEST].numpy()
    x = torch.tensor(images.reshape(len(labels), -1)[order], dtype=torch.float64)
    x = x - x.mean(1, keepdim=True)
    return x / x.square().mean(1, keepdim=True).sqrt(), torch.tensor(
        labels[order]
    ).long()


parser = argparse.ArgumentParser()
parser.add_argument(
    "--data", help="folder with MNIST; default: the digits of scikit-learn"
)
x, labels = read_images(parser.parse_args().data)
x, x_test, labels, labels_test = x[:TRAIN], x[TRAIN:], labels[:TRAIN], labels[TRAIN:]
print(f"{len(x)} images to learn from, {len(x_test)} to test on, {x.shape[1]} pixels")

# %%
# The module
# ----------
#
# Anything that ``torch.fx`` can trace will do, if its layers are among those with a
# known limit (the page *Infinite width* has the table). Here it is a fully connected
# network whose activation is the error function, a close relative of tanh. The kernels
# read the architecture only. Weights are not looked at, and neither are widths.


class Network(nn.Module):
    """Fully connected, with error functions between the layers."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        sizes = [x.shape[1], *[width] * depth]
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        self.readout = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.hidden:
            x = torch.erf(layer(x))
        return self.readout(x)


network = Network(DEPTH, width=1)
nngp = gpntk.InfiniteNNGPKernel(network, weight_std=1.5, bias_std=0.3)
ntk = gpntk.InfiniteNTKKernel(network, weight_std=1.5, bias_std=0.3)
print("layers:", ", ".join(nngp.program.layers))
with torch.no_grad():
    print("NNGP of three images\n", nngp(x[:3]).to_dense().numpy().round(3))
    print("NTK of three images\n", ntk(x[:3]).to_dense().numpy().round(3))

# %%
# Finite width
# ------------
#
# Is that what wide networks do? We draw networks with the same variances, W ~ N(0,
# σ_w²/n) and b ~ N(0, σ_b²) for n inputs of a layer, and average f(x) f(x') and J(x)
# J(x')ᵀ over twenty of them. Plain PyTorch layers are in what is called the standard
# parametrization. Its NNGP is the same, but its NTK grows with the width, so that the
# limit, too, must be told the widths, which it takes from the module.


def draw(width: int) -> Network:
    """A network with weights from the prior."""
    drawn = Network(DEPTH, width)
    for layer in drawn.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=1.5 / math.sqrt(layer.in_features))
            nn.init.normal_(layer.bias, std=0.3)
    return drawn.double()


def deviation(value: Tensor, limit: Tensor) -> float:
    """Norm of the difference over that of the limit."""
    return ((value - limit).norm() / limit.norm()).item()


few = x[:10]
deviations: dict[str, list[float]] = {
    "NNGP": [],
    "NNGP, standard error": [],
    "NTK": [],
    "NTK, standard error": [],
}
for width in tqdm(WIDTHS, desc="widths"):
    sampled = monte_carlo(lambda width=width: draw(width), few, num_samples=NETWORKS)
    standard = gpntk.InfiniteNTKKernel(
        Network(DEPTH, width), 1.5, 0.3, parametrization="standard"
    )
    with torch.no_grad():
        limits = nngp(few).to_dense(), standard(few).to_dense()
    deviations["NNGP"].append(deviation(sampled.nngp, limits[0]))
    deviations["NNGP, standard error"].append(
        (sampled.nngp_error.norm() / limits[0].norm()).item()
    )
    deviations["NTK"].append(deviation(sampled.ntk, limits[1]))
    deviations["NTK, standard error"].append(
        (sampled.ntk_error.norm() / limits[1].norm()).item()
    )
print(
    f"{'relative to the limit, width':<30}" + "".join(f"{width:>9}" for width in WIDTHS)
)
for name, values in deviations.items():
    print(f"{name:<30}" + "".join(f"{value:>9.4f}" for value in values))

# %%
# The NTK settles: the wider the networks, the less they differ from each other and from
# the limit. What is left of the NNGP is sampling error, as its standard error says, and
# no width removes that: at any width it is a sample covariance, of twenty networks with
# ten outputs each.
#
# Classification by regression
# ----------------------------
#
# A GP per class is fitted to 0.9 for its own class and to -0.1 for the others, and the
# largest posterior mean wins. All classes share one kernel, hence one factorisation.
# This is no model of labels, and means are no probabilities, but it is exact and
# simple, and what the papers on these kernels report. `gpntk.GradientFlow` has both
# answers that a wide network gives: the posterior given the data, which is what
# Bayesian inference over its weights would find, and the mean of networks trained by
# gradient descent until they fit the data.

targets = one_hot_targets(labels, CLASSES, x.dtype)


def accuracy(mean: Tensor) -> float:
    """Share of (the first) test images whose class has the largest mean."""
    return (mean.argmax(-1) == labels_test[: len(mean)]).double().mean().item()


flow = gpntk.GradientFlow(ntk, x, targets, nngp=nngp, noise=1e-4)
with torch.no_grad():
    posterior = flow.posterior(x_test)
    trained = flow.predict(x_test, covariance=False)
print(
    f"test accuracy: NNGP posterior {accuracy(posterior.mean):.3f}, trained networks "
    f"{accuracy(trained.mean):.3f}"
)

# %%
# The posterior variance is the same for all classes. Does it know where the errors are?

assert posterior.covariance is not None
certain_first = posterior.covariance.diagonal().argsort()
wrong = (posterior.mean.argmax(-1) != labels_test).double()[certain_first]
quarters = wrong[: len(wrong) // 4 * 4].reshape(4, -1).mean(1)
print(
    "share of errors, from the most certain quarter to the least:",
    quarters.numpy().round(3),
)

# %%
# Learning the variances
# ----------------------
#
# Every layer has its own σ_w and σ_b, which are hyperparameters as any other in
# GPyTorch. The model below is a batch of ten GPs with one kernel. As usual in GPyTorch,
# batches come first, so that it takes the targets transposed.


class ClassGPs(gpytorch.models.ExactGP):
    """A GP per class, all with the same kernel."""

    def __init__(self, x: Tensor, y: Tensor, kernel: gpytorch.kernels.Kernel) -> None:
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.covar_module = kernel

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        covariance = self.covar_module(x).expand(CLASSES, len(x), len(x))
        return gpytorch.distributions.MultivariateNormal(
            x.new_zeros(CLASSES, len(x)), covariance
        )


model = ClassGPs(
    x, targets.mT, gpntk.InfiniteNNGPKernel(network, weight_std=1.5, bias_std=0.3)
).double()
model.likelihood.noise = 0.01
objective = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
optimizer = torch.optim.Adam(model.parameters(), lr=0.07)
evidence = []
model.train()
for _ in tqdm(range(30), desc="steps"):
    optimizer.zero_grad()
    loss = -objective(model(x), targets.mT).sum()
    loss.backward()
    optimizer.step()
    evidence.append(-loss.item() * len(x))
model.eval()
with torch.no_grad():
    learned = model(x_test).mean.mT
print(f"log marginal likelihood {evidence[0]:.0f} -> {evidence[-1]:.0f} nats")
for name, weight, bias in zip(
    nngp.program.layers,
    model.covar_module.weight_std,
    model.covar_module.bias_std,
    strict=True,
):
    print(f"{name:<10} σ_w² {weight.item() ** 2:6.3f}   σ_b² {bias.item() ** 2:6.3f}")
print(f"test accuracy {accuracy(learned):.3f}")

# %%
# The marginal likelihood has grown by a lot, and the accuracy has hardly changed. What
# is learned is how well the means and variances describe the targets; which mean is the
# largest is another question, and mostly settled before.
#
# Order and chaos
# ---------------
#
# How deep can such a network be? From layer to layer the variance of its units tends to
# a fixed point q*, and the correlation between two inputs to a fixed point c*. With χ₁
# the factor by which small differences between inputs grow in a layer, χ₁ = σ_w²
# E[φ'(u)²] for u ~ N(0, q*):
#
# * χ₁ < 1, order: all inputs become alike;
# * χ₁ > 1, chaos: the smallest difference becomes a large one.
#
# In both cases a deep network forgets its input at an exponential rate, over the depth
# ξ_c. Only near the line χ₁ = 1 is that depth large.

activation = activation_of(torch.erf)
assert activation is not None
for weight_variance in (0.5, 1.2, 4.0):
    at = phase(activation, weight_variance, 0.05)
    print(
        f"σ_w² {weight_variance}: {at.name}, χ₁ {at.susceptibility:.2f}, ξ_c "
        f"{at.correlation_depth:.1f} layers"
    )

weight_variances, bias_variances = (
    torch.linspace(0.25, 4.75, 10),
    torch.linspace(0, 1, 6),
)
susceptibility = phase_diagram(activation, weight_variances, bias_variances)[
    "susceptibility"
]

# %%
# Now the accuracy of a GP whose network has thirty hidden layers, for each pair of
# variances, on half of the test images. Its noise is a ten thousandth of the prior
# variance: differences between images that have shrunk below that are lost.

deep = Network(DEEP, width=1)
accuracies = torch.zeros_like(susceptibility)
for row, bias_variance in enumerate(tqdm(bias_variances.tolist(), desc="σ_b²")):
    for column, weight_variance in enumerate(weight_variances.tolist()):
        kernel = gpntk.InfiniteNNGPKernel(
            deep, weight_variance**0.5, bias_variance**0.5, learn=False
        )
        with torch.no_grad():
            mean = (
                gpntk.GradientFlow(kernel, x, targets, diag_reg=1e-4)
                .predict(x_test[: TEST // 2])
                .mean
            )
        accuracies[row, column] = accuracy(mean)

good = susceptibility[accuracies >= accuracies.max() - 0.05]
print(
    f"best accuracy {accuracies.max():.3f}, worst {accuracies.min():.3f}; guessing is "
    "0.1"
)
print(
    f"within 0.05 of the best: χ₁ from {good.min():.2f} to {good.max():.2f}", end="; "
)
print(f"on the whole map from {susceptibility.min():.2f} to {susceptibility.max():.2f}")

# %%
# Good pairs lie along the line, and far from it little or nothing is learned: in deep
# order all images are one to the kernel, in deep chaos each is alike to none but
# itself. The exception is order without bias, where what shrinks is the images'
# variance and not their differences. A shallow network does not mind: try ``DEEP = 3``.
#
# The picture
# -----------
#
# Left: how networks of finite width approach the limit. Middle: χ₁, and the line
# between order and chaos. Right: the accuracy of the deep GP on the same axes, a cross
# at the best.

figure, (left, middle, right) = plt.subplots(
    1, 3, figsize=(14, 4), layout="constrained"
)
for index, (name, values) in enumerate(deviations.items()):
    left.loglog(
        WIDTHS, values, "--" if index % 2 else "-o", color=f"C{index // 2}", label=name
    )
left.set_xlabel("width")
left.set_ylabel("relative deviation from the limit")
left.legend(fontsize="small")
figure.colorbar(
    draw_phase_diagram(middle, weight_variances, bias_variances, susceptibility),
    ax=middle,
)
middle.set_title("χ₁: order (blue) and chaos (red)")
figure.colorbar(
    accuracy_map(right, weight_variances, bias_variances, accuracies, susceptibility),
    ax=right,
)
right.set_title(f"test accuracy, {DEEP} hidden layers")

path = Path("nngp_and_ntk.png")
figure.savefig(path, dpi=150)
print(f"Picture saved to {path}")
