"""Fine-tuning of all weights of a classifier, its learning rate and number of steps chosen by cross-validation."""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional

from gpntk.io import checksum

RATES = (3e-4, 1e-3, 3e-3)
STEPS = (0, 3, 10, 30, 100, 300)
FOLDS = 5
BATCH = 64


class Recipe(NamedTuple):
    """How to fine-tune: Adam's learning rate and the number of its steps."""

    rate: float
    steps: int


_KNOWN: dict[str, Recipe] = {}


def chosen(network: nn.Module, x: Tensor, y: Tensor, *, seed: int, dropout: bool = False) -> Recipe:
    """The recipe with the largest log-likelihood of held-out labels, mean over folds of the data at hand.

    Found once for the same network and data: the seconds of all but the first method that asks leave it out.
    """
    key = checksum({**dict(network.named_parameters()), "x": x, "y": y}, f"{seed} {dropout}")
    if key not in _KNOWN:
        _KNOWN[key] = _search(network, x, y, seed, dropout)
    return _KNOWN[key]


def _search(network: nn.Module, x: Tensor, y: Tensor, seed: int, dropout: bool) -> Recipe:
    folds = min(FOLDS, len(x))
    fold = torch.tensor(np.random.default_rng(seed).permutation(len(x)) % folds)
    held = (fold == torch.arange(folds).unsqueeze(1)).repeat(len(RATES), 1)
    runs = _Runs(network, torch.tensor(RATES).repeat_interleave(folds), seed, dropout)
    losses = torch.stack([(held * runs.after(steps, x, y, ~held).losses(x, y)).sum(1) for steps in STEPS], 1)
    totals = losses.reshape(len(RATES), folds, -1).double().sum(1).nan_to_num(torch.inf)
    rate, steps = divmod(int(totals.argmin()), len(STEPS))
    return Recipe(RATES[rate], STEPS[steps])


def fine_tuned(
    network: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, *, seed: int, dropout: bool = False
) -> nn.Module:
    """A copy of the network, trained on all of the data by the recipe, in eval mode."""
    runs = _Runs(network, torch.tensor([recipe.rate]), seed, dropout)
    return runs.after(recipe.steps, x, y, torch.ones(1, len(x), dtype=torch.bool)).network()


class _Runs:
    """Several runs of Adam from the same weights, side by side: for ten labels that takes a third of the time."""

    def __init__(self, network: nn.Module, rates: Tensor, seed: int, dropout: bool) -> None:
        self._network, self._dropout, self._done = copy.deepcopy(network), dropout, 0
        weights = {name: weight.detach() for name, weight in network.named_parameters()}
        self._weights = {name: torch.stack([weight] * len(rates)).requires_grad_() for name, weight in weights.items()}
        self._moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in self._weights.items()}
        self._rates, self._seed = rates, seed

    def after(self, steps: int, x: Tensor, y: Tensor, used: Tensor) -> _Runs:
        """The same, trained on until so many steps are done; run r has the rows `used[r]` of the data only."""
        self._network.train(self._dropout)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed + self._done)
            while self._done < steps:
                rows = torch.randperm(len(x))[:BATCH]
                share = used[:, rows] / used[:, rows].sum(1, keepdim=True).clamp_min(1)
                self._step((share * self._outputs_losses(x[rows], y[rows])).sum())
        self._network.eval()
        return self

    @torch.no_grad()
    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropies of the data `[R, N]`."""
        return self._outputs_losses(x, y)

    def network(self) -> nn.Module:
        """The network of the first run."""
        self._network.load_state_dict({name: weight[0] for name, weight in self._weights.items()}, strict=False)
        return self._network

    def _outputs_losses(self, x: Tensor, y: Tensor) -> Tensor:
        def losses(weights: dict[str, Tensor]) -> Tensor:
            return functional.cross_entropy(functional_call(self._network, weights, (x,)), y, reduction="none")

        return vmap(losses, randomness="different")(self._weights)

    def _step(self, loss: Tensor) -> None:
        """One step of Adam (Kingma and Ba 2015, algorithm 1) with a learning rate for each run."""
        self._done += 1
        slopes = torch.autograd.grad(loss, list(self._weights.values()))
        with torch.no_grad():
            for (name, weight), slope in zip(self._weights.items(), slopes, strict=True):
                first, second = self._moments[name]
                first.lerp_(slope, 0.1)
                second.lerp_(slope.square(), 0.001)
                scale = (second / (1 - 0.999**self._done)).sqrt() + 1e-8
                rates = self._rates.reshape(-1, *[1] * (weight.dim() - 1))
                weight.sub_(rates * first / (1 - 0.9**self._done) / scale)
