"""A chemical reactor simulated by an LSTM that was trained on another reactor, adapted to one sequence of it.

Protocol: 25 steps with the known outputs in place of the hidden state, then free simulation, of which the first step
is not counted: 998 steps of two outputs. The network takes a whole sequence as one input and returns all its outputs.

Reference:
    Forgione et al. (2022), On the adaptation of recurrent neural networks for system identification,
    https://arxiv.org/abs/2201.08660.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import final

import numpy as np
import torch
from sklearn.linear_model import BayesianRidge
from torch import Tensor, nn
from torch.nn import functional

import gpntk
from benchmarks.transfer.experiment import Array, Experiment, Gaussian, Task

KNOWN = 25
COUNTED = slice(KNOWN + 1, None)


@final
class Simulation(nn.Module):
    """An LSTM with projection whose hidden state is its output: inputs `[N, T, 2 + 2]` to outputs `[N, (T - 26) * 2]`.

    The last two channels are the outputs, used in the first 25 steps only. Written out step by step, since PyTorch's
    own LSTM has neither forward-mode derivatives nor a batching rule.
    """

    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    bias_ih_l0: Tensor
    bias_hh_l0: Tensor
    weight_hr_l0: Tensor

    def __init__(self, weights: dict[str, Array]) -> None:
        super().__init__()
        for name, values in weights.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(values)))

    def forward(self, x: Tensor) -> Tensor:
        return self.simulate(x)[0].flatten(1)

    def simulate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Counted outputs `[N, T - 26, 2]`, and the cell's 16 outputs before projection."""
        known = x[:, :KNOWN, 2:].unbind(1)
        driven = functional.linear(x[..., :2], self.weight_ih_l0, self.bias_ih_l0 + self.bias_hh_l0)
        hidden, cell = x.new_zeros(len(x), 2), x.new_zeros(len(x), self.weight_hr_l0.shape[1])
        outputs, cells = [], []
        for step, gates in enumerate(driven.unbind(1)):
            enter, keep, new, leave = (gates + hidden @ self.weight_hh_l0.mT).chunk(4, -1)
            cell = keep.sigmoid() * cell + enter.sigmoid() * new.tanh()
            cells.append(leave.sigmoid() * cell.tanh())
            outputs.append(cells[-1] @ self.weight_hr_l0.mT)
            hidden = known[step] if step < KNOWN else outputs[-1]
        return torch.stack(outputs[COUNTED], 1), torch.stack(cells[COUNTED], 1)


@cache
def _arrays(data: Path) -> dict[str, Array]:
    with np.load(data / "cstr" / "cstr.npz") as arrays:
        return dict(arrays)


def cstr(data: Path, _size: int, seed: int) -> tuple[Task, Array]:
    """From the nominal reactor to another one, seen in one sequence; tested on one with other inputs."""
    arrays = _arrays(data)
    prefix = "w/model."
    weights = {name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)}
    x, y = _sequence(arrays["u_transf"], arrays["y_transf"], seed)
    x_test, y_test = _sequence(arrays["u_eval"], arrays["y_eval"], seed)
    return Task(Simulation(weights).eval(), (), x, y, x_test, seed), y_test


def _sequence(inputs: Array, outputs: Array, number: int) -> tuple[Array, Array]:
    known = np.zeros_like(outputs[number])
    known[:KNOWN] = outputs[number, :KNOWN]
    return np.concatenate([inputs[number], known], -1)[None], outputs[number, COUNTED].astype(float)


# --- ours ----------------------------------------------------------------------------------------------------------


def transferred(task: Task) -> Gaussian:
    """The GP over moves of all weights around the network's own simulation; scale and noise by marginal likelihood.

    A sequence is one input with 1,996 outputs, more than there are weights: J is formed by forward mode.
    """
    model = gpntk.TransferRegressor(task.network, kernel="ntk").fit(task.x, task.y.reshape(1, -1))
    mean, std = model.predict(task.x_test, return_std=True)
    return Gaussian(mean.reshape(-1, 2), std.reshape(-1, 2))


# --- baselines -----------------------------------------------------------------------------------------------------

_RATES = (1e-3, 3e-3, 1e-2)
_MOST_STEPS, _STRIDE = 100, 10
# The first part of the sequence is for training, the rest says when to stop.
_TRAINED = 0.75


def unadapted(task: Task) -> Gaussian:
    """The network as it is; root mean squared residuals are the standard deviations."""
    residual = task.y - _simulated(task.network, task.x)
    mean = _simulated(task.network, task.x_test)
    return Gaussian(mean, np.broadcast_to(np.sqrt(np.square(residual).mean(0)), mean.shape))


def refitted_readout(task: Task) -> Gaussian:
    """Bayesian ridge regression of each output on the cell's outputs, which are simulated as before."""
    x, x_test = (_simulated(task.network, values, of_cells=True) for values in (task.x, task.x_test))
    predictions = [BayesianRidge().fit(x, y).predict(x_test, return_std=True) for y in task.y.T]
    return Gaussian(*(np.stack(values, -1) for values in zip(*predictions, strict=True)))


def fine_tuned(task: Task) -> Gaussian:
    """All weights trained further by Adam on the sequence; learning rate, steps and noise from its last quarter."""
    start = int(_TRAINED * len(task.y))
    tried = {}
    for rate in _RATES:
        for look, network in enumerate(islice(_training(task, start, rate), 0, _MOST_STEPS + 1, _STRIDE)):
            tried[rate, look * _STRIDE] = np.square(task.y - _simulated(network, task.x))[start:].mean(0)
    rate, steps = min(tried, key=lambda choice: tried[choice].sum())
    mean = _simulated(next(islice(_training(task, len(task.y), rate), steps, None)), task.x_test)
    return Gaussian(mean, np.broadcast_to(np.sqrt(tried[rate, steps]), mean.shape))


def _training(task: Task, steps_seen: int, rate: float) -> Iterator[nn.Module]:
    """A copy of the network after 0, 1, 2, ... steps of Adam on the first steps of the sequence."""
    network = copy.deepcopy(task.network)
    optimizer = torch.optim.Adam(network.parameters(), rate, fused=True)
    x = torch.tensor(task.x[:, : COUNTED.start + steps_seen])
    y = torch.tensor(task.y[:steps_seen], dtype=torch.float32).flatten()
    while True:
        yield network
        optimizer.zero_grad()
        (network(x)[0] - y).square().mean().backward()
        optimizer.step()


def _simulated(network: nn.Module, x: Array, of_cells: bool = False) -> Array:
    """The outputs, or the cell's, at the steps that count `[T - 26, 2 or 16]`."""
    assert isinstance(network, Simulation)
    with torch.no_grad():
        return network.simulate(torch.tensor(x))[of_cells][0].double().numpy()


CSTR = Experiment(
    cstr,
    sizes=(998,),
    methods={
        "unadapted network": unadapted,
        "readout refitted": refitted_readout,
        "fine-tuned": fine_tuned,
        "gpntk (ntk)": transferred,
    },
)
