"""
Training in closed form: an ensemble of trained networks against its Gaussian process
=====================================================================================

A network that is wide enough stays near its expansion to first order while it is
trained, and for the squared loss the training of that expansion has a formula: f_t(x)
is known at every step t without taking a step. Over random initializations f_t(x) is a
Gaussian process, with a mean and a covariance for every t. This tutorial

* trains an ensemble of networks, and compares it with that Gaussian process;
* does the same for one network and its own tangent kernel, and says where its weights
  have gone;
* asks for the largest learning rate, and goes beyond it;
* measures how the deviation shrinks with the width.

The data are eight points on a line. The whole file runs in less than a minute.
"""

import copy
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from tqdm import tqdm

import gpntk
from gpntk.errors import InputError

WEIGHT_STD, BIAS_STD = 1.5, 0.3
WIDTH = 256
NETWORKS = 100
STEPS = (0, 10, 60, 300)

torch.manual_seed(0)
torch.set_num_threads(1)  # the networks are too small to gain from more

# %%
# Networks and data
# -----------------
#
# A network is a plain module. What makes it one draw of an ensemble is its
# initialization: here weights of variance σ_w²/n for n inputs to a layer, and biases of
# variance σ_b². Any elementwise function has a limit; the error function has one by
# formula, where most others, tanh among them, take quadrature.


class Erf(nn.Module):
    """The error function, elementwise."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(x)


def mlp(width: int) -> nn.Sequential:
    """A network 1-width-width-1 with random weights."""
    sizes = [1, width, width, 1]
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), Erf())]
    network = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for layer in layers[:-1:2]:
            layer.weight.normal_(0, WEIGHT_STD / layer.in_features**0.5)
            layer.bias.normal_(0, BIAS_STD)
    return network


x = torch.tensor(
    [-2.6, -2.2, -1.4, -1.0, -0.3, 0.9, 1.6, 2.1], dtype=torch.float64
).unsqueeze(-1)
y = (2 * x).sin().squeeze(-1)
x_test = torch.linspace(-3, 3, 121, dtype=torch.float64).unsqueeze(-1)

# %%
# The prediction
# --------------
#
# Two kernels of the limit of infinite width say all. Their ``network`` gives the
# architecture only; its weights are not read. The NNGP kernel K is the covariance of
# f_0, and the tangent kernel Θ says how f changes. With ``parametrization="standard"``
# it is the one of plain weights and biases, as torch's optimizers train them, and grows
# with the width.

architecture = mlp(WIDTH)
nngp = gpntk.InfiniteNNGPKernel(architecture, WEIGHT_STD, BIAS_STD, "standard").double()
ntk = gpntk.InfiniteNTKKernel(architecture, WEIGHT_STD, BIAS_STD, "standard").double()

# %%
# The loss is L = ½ Σ_n (f(x_n) - y_n)², on all data at once. Descent on it converges
# below a rate that depends on the largest eigenvalue of Θ; we take half of it. With
# ``discrete=True``, t counts steps.

rate = 0.5 * gpntk.GradientFlow(ntk, x, y, discrete=True).max_learning_rate()
flow = gpntk.GradientFlow(ntk, x, y, nngp=nngp, learning_rate=rate, discrete=True)
predicted = flow.predict(x_test, t=[*STEPS, float("inf")])
print(
    f"learning rate {rate:.2e}; mean {tuple(predicted.mean.shape)}, covariance "
    f"{tuple(predicted.covariance.shape)}"
)

# %%
# With P_t = Θ⁻¹ (I - (I - η Θ)^t), and a star for kernels between x* and the data,
# these are
#
# .. math::
#    \text{mean} = Θ_* P_t\, y, \qquad
#    \text{covariance} =
#    K_{**} + Θ_* P_t K P_t Θ_*^⊤ - Θ_* P_t K_*^⊤ - K_* P_t Θ_*^⊤.
#
# The experiment
# --------------
#
# Now a hundred networks of width 256 are trained, together by ``vmap``, in float32.
# Nothing is adapted to the prediction: it is the same loss, the same rate, and plain
# steps along the gradient.


def train(
    weights: dict[str, Tensor], width: int, rate: float, steps: tuple[int, ...]
) -> dict[int, Tensor]:
    """Outputs `[S, M]` at x_test of S networks with stacked ``weights`` after each
    of the numbers of ``steps``.
    """
    network, inputs, targets = mlp(width).to("meta"), x.float(), y.float()

    def outputs(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(network, weights, (x,)).squeeze(-1)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return 0.5 * (outputs(weights, inputs) - targets).square().sum()

    gradient, kept = vmap(grad(loss)), {}
    for step in tqdm(range(max(steps) + 1), desc=f"width {width}"):
        if step in steps:
            kept[step] = vmap(outputs, in_dims=(0, None))(
                weights, x_test.float()
            ).double()
        slope = gradient(weights)
        weights = {name: value - rate * slope[name] for name, value in weights.items()}
    return kept


def stacked(networks: list[nn.Sequential]) -> dict[str, Tensor]:
    """Weights of all networks, the first dimension counting networks."""
    return {
        name: value.detach() for name, value in stack_module_state(networks)[0].items()
    }


trained = train(stacked([mlp(WIDTH) for _ in range(NETWORKS)]), WIDTH, rate, STEPS)

# %%
# A mean over a hundred networks is uncertain by a tenth of their standard deviation,
# and a standard deviation by 7 %. Besides, networks of finite width deviate from the
# limit on average too, by O(1/width). In root mean squares over x:

print(
    "step   means differ by   expected by chance   standard deviation: trained / "
    "predicted"
)
for step, mean, covariance in zip(
    STEPS, predicted.mean, predicted.covariance, strict=False
):
    variance = covariance.diagonal()
    difference, chance = (
        (trained[step].mean(0) - mean).square().mean().sqrt(),
        (variance.mean() / NETWORKS).sqrt(),
    )
    ratio = (trained[step].var(0).mean() / variance.mean()).sqrt()
    print(f"{step:<6} {difference:>15.3f} {chance:>20.3f} {ratio:>41.2f}")

# %%
# At t = ∞ the mean goes through all points, and the covariance vanishes there. That
# does not make the ensemble a posterior: no GP with kernel K or Θ that has seen the
# data has this covariance. `GradientFlow.posterior` gives those. An ensemble of which
# only the last layer is trained, ``predict(..., trained="readout")``, does arrive at
# the posterior of K. That of Θ belongs to no ensemble of plain networks: the size of Θ,
# which grows with the width, is a speed and not a variance.

for name, covariance in (
    ("ensemble, t = ∞", predicted.covariance[-1]),
    (
        "ensemble of last layers, t = ∞",
        flow.predict(x_test, trained="readout").covariance,
    ),
    ("posterior of K", flow.posterior(x_test, prior="nngp").covariance),
    ("posterior of Θ", flow.posterior(x_test, prior="ntk").covariance),
):
    print(
        f"{name:<31} largest standard deviation "
        f"{covariance.diagonal().max().sqrt():.3f}"
    )

# %%
# One network
# -----------
#
# For a single network there is no randomness left: f_0 is what the network returns now,
# and Θ is its own tangent kernel. The prediction is then of the network linearized
# where it stands,
#
# .. math:: f_t(x) = f_0(x) + J(x)\, ω_t = f_0(x) + Θ(x, X)\, P_t\, (y - f_0(X)).

network = mlp(WIDTH)
frozen = gpntk.freeze(copy.deepcopy(network).double())
single = gpntk.GradientFlow(
    gpntk.NTKKernel(frozen),
    x,
    y,
    initial=gpntk.NetworkMean(frozen),
    learning_rate=rate,
    discrete=True,
)
one = train(stacked([network]), WIDTH, rate, STEPS)
print("step   moved by   deviation of the prediction   weights moved by")
lines = single.predict(x_test, STEPS).mean
for step, line in zip(STEPS, lines, strict=True):
    moved = (one[step][0] - lines[0]).square().mean().sqrt()
    error = (one[step][0] - line).square().mean().sqrt()
    print(
        f"{step:<6} {moved:>8.3f} {error:>29.3f} {single.weights(step).norm():>18.3f}"
    )

# %%
# ω_t says where the weights have gone, as one vector; ``unflatten`` names its parts.
# With it the linearized network is known everywhere. It can be put together by
# automatic differentiation, and agrees with the prediction to rounding:

moves = frozen.unflatten(single.weights(STEPS[-1]))
weights = {
    name: value.detach()
    for name, value in copy.deepcopy(network).double().named_parameters()
}
start, change = jvp(
    lambda weights: functional_call(network, weights, (x_test,)).squeeze(-1),
    (weights,),
    (moves,),
)
print(
    f"f_0 + J ω_t: {(start + change - lines[-1]).abs().max():.0e} from the prediction"
)
for name in ("0.weight", "2.weight", "4.weight"):
    print(
        f"{name} has moved by {100 * moves[name].norm() / weights[name].norm():.1f} % "
        "of its norm"
    )
print(
    f"at t = ∞ it meets the data within {(single.predict(x).mean - y).abs().max():.0e}"
)

# %%
# The largest learning rate
# -------------------------
#
# In the direction of an eigenvector of Θ with eigenvalue λ a step multiplies the
# residual by 1 - η λ. Descent on the linearized network therefore converges below η =
# 2/λ_max and diverges above; `GradientFlow` refuses to predict there.

limit = single.max_learning_rate()
try:
    gpntk.GradientFlow(
        gpntk.NTKKernel(frozen),
        x,
        y,
        learning_rate=1.2 * limit,
        initial=gpntk.NetworkMean(frozen),
        discrete=True,
    ).predict(x_test, t=100)
except InputError as refusal:
    print(f"InputError: {refusal}")

# %%
# The network itself is not linear. Above the limit its loss grows like that of the
# linearized network at first. Then it leaves the region in which they agree, and may
# end where the tangent kernel is smaller and the limit higher: the catapult of
# Lewkowycz et al. (2020), https://arxiv.org/abs/2003.02218.


def losses(rate: float, linearized: bool, steps: int = 60) -> list[float]:
    """The loss of the network, or of the network linearized, at every step of
    descent.
    """
    weights = {
        name: value.detach()
        for name, value in copy.deepcopy(network).double().named_parameters()
    }
    start, values = dict(weights), []

    def loss(weights: dict[str, Tensor]) -> Tensor:
        call = lambda weights: functional_call(network, weights, (x,)).squeeze(-1)  # noqa: E731
        if linearized:
            value, change = jvp(
                call,
                (start,),
                ({name: weights[name] - start[name] for name in weights},),
            )
            return 0.5 * (value + change - y).square().sum()
        return 0.5 * (call(weights) - y).square().sum()

    for _ in range(steps):
        values.append(loss(weights).item())
        slope = grad(loss)(weights)
        weights = {name: value - rate * slope[name] for name, value in weights.items()}
    return values


curves = {
    f"{factor} η_max, {name}": losses(factor * limit, name == "linearized")
    for factor in (0.9, 1.2)
    for name in ("linearized", "network")
}
for name, values in curves.items():
    print(
        f"{name:<24} loss {values[0]:.3g} at first, {max(values):.3g} at most, "
        f"{values[-1]:.3g} after 60 steps"
    )

# %%
# Width
# -----
#
# How good is all this? For several widths, networks are trained as before, and compared
# with two predictions: by the tangent kernel of each at its start, and by the kernel of
# the limit. Rates are scaled with the limit's kernel, so that a step does the same at
# all widths. Deviations are relative to how far the outputs have moved.

WIDTHS = {16: 32, 64: 32, 256: 16, 1024: 8}  # and how many networks of each
x_few, late = x_test[::6], 60
deviations: dict[str, list[float]] = {"its own kernel": [], "the limit's kernel": []}
for width, count in WIDTHS.items():
    limit_kernel = gpntk.InfiniteNTKKernel(
        mlp(width), WEIGHT_STD, BIAS_STD, "standard"
    ).double()
    speed = (
        0.5 * gpntk.GradientFlow(limit_kernel, x, y, discrete=True).max_learning_rate()
    )
    networks = [mlp(width) for _ in range(count)]
    outputs = train(stacked(networks), width, speed, (0, late))
    start, end = outputs[0][:, ::6], outputs[late][:, ::6]
    frozen_networks = [gpntk.freeze(candidate.double()) for candidate in networks]
    for name, values in deviations.items():
        predictions = []
        for frozen in frozen_networks:
            kernel = (
                limit_kernel
                if name == "the limit's kernel"
                else gpntk.NTKKernel(frozen)
            )
            training = gpntk.GradientFlow(
                kernel,
                x,
                y,
                initial=gpntk.NetworkMean(frozen),
                learning_rate=speed,
                discrete=True,
            )
            predictions.append(training.predict(x_few, late).mean)
        values.append(
            ((end - torch.stack(predictions)).norm() / (end - start).norm()).item()
        )
for name, values in deviations.items():
    print(
        f"{name:<20}"
        + "".join(
            f"{f'{width}: {value:.3f}':>14}"
            for width, value in zip(WIDTHS, values, strict=True)
        )
    )

# %%
# The kernel of one network differs from that of the limit by chance, by O(1/√width),
# and so does its training. From what its own kernel says, training deviates only as far
# as the kernel changes on the way, which falls off almost as fast as 1/width.
#
# The picture
# -----------
#
# Above: the ensemble, mean and two standard deviations, predicted (shaded) and trained
# (dashed), with three of the networks. Below: one network at the same steps, trained
# and predicted (dashed); the loss on both sides of the largest rate; deviation against
# width, with slopes -1 and -1/2 dotted.

figure = plt.figure(figsize=(14, 7), layout="constrained")
rows = figure.subfigures(2, 1)
above, (path_axes, loss_axes, width_axes) = (
    rows[0].subplots(1, len(STEPS), sharey=True),
    rows[1].subplots(1, 3),
)
grid = x_test.squeeze(-1)
for axes, step, mean, covariance in zip(
    above, STEPS, predicted.mean, predicted.covariance, strict=False
):
    spread = 2 * covariance.diagonal().sqrt()
    axes.fill_between(
        grid, mean - spread, mean + spread, alpha=0.25, label="predicted, ± 2 sd"
    )
    axes.plot(grid, mean, color="C0")
    centre, spread = trained[step].mean(0), 2 * trained[step].std(0)
    axes.plot(
        grid,
        centre,
        color="black",
        linestyle="--",
        linewidth=1,
        label="trained, ± 2 sd",
    )
    axes.plot(
        grid,
        torch.stack([centre - spread, centre + spread], -1),
        color="black",
        linestyle="--",
        linewidth=1,
    )
    axes.plot(grid, trained[step][:3].mT, color="C1", linewidth=0.5)
    axes.plot(x, y, "ko", markersize=4)
    axes.set_title(f"{step} steps")
above[0].legend(fontsize="small")
for number, (step, line) in enumerate(zip(STEPS, lines, strict=True)):
    path_axes.plot(grid, one[step][0], color=f"C{number}", label=f"{step} steps")
    path_axes.plot(grid, line, color="black", linestyle="--", linewidth=1)
path_axes.plot(x, y, "ko", markersize=4)
path_axes.set_title("one network")
for number, (name, values) in enumerate(curves.items()):
    loss_axes.semilogy(
        values,
        color=f"C{number // 2}",
        linestyle="--" if number % 2 == 0 else "-",
        label=name,
    )
loss_axes.set_ylim(0.1, 1e4)
loss_axes.set_xlabel("step")
loss_axes.set_title("loss by learning rate")
for (name, values), slope in zip(deviations.items(), (-1.0, -0.5), strict=True):
    width_axes.loglog(list(WIDTHS), values, marker="o", label=name)
    reference = [values[1] * (width / 64) ** slope for width in WIDTHS]
    width_axes.loglog(
        list(WIDTHS), reference, color="black", linestyle=":", linewidth=1
    )
width_axes.set_xticks(list(WIDTHS), [str(width) for width in WIDTHS])
width_axes.xaxis.minorticks_off()
width_axes.set_xlabel("width")
width_axes.set_title("relative deviation")
for axes in (path_axes, loss_axes, width_axes):
    axes.legend(fontsize="small")

path = Path("training_in_closed_form.png")
figure.savefig(path, dpi=150)
print(f"Picture saved to {path}")
