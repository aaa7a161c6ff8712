"""Recurrent layers as steps of linear maps: all times at once for the inputs, one by one for the states.

Gates stand in torch's order: i, f, g, o for the LSTM and r, z, n for the GRU (see ``torch.nn.LSTM``, ``torch.nn.GRU``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gpntk.memory import Lock

State = tuple[Tensor, ...]
"""(h,), or (h, c) for the LSTM."""
Step = Callable[[Tensor, Tensor, State], State]
"""New state from the inputs' gates, the state's gates and the state."""

_SWITCHES = Lock()


def _lstm_step(inputs: Tensor, recurrent: Tensor, state: State) -> State:
    i, f, g, o = (inputs + recurrent).chunk(4, -1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _gru_step(inputs: Tensor, recurrent: Tensor, state: State) -> State:
    (r, z, n), (r_h, z_h, n_h) = inputs.chunk(3, -1), recurrent.chunk(3, -1)
    n = (n + (r + r_h).sigmoid() * n_h).tanh()
    return (n + (z + z_h).sigmoid() * (state[0] - n),)


def _tanh_step(inputs: Tensor, recurrent: Tensor, state: State) -> State:
    del state
    return ((inputs + recurrent).tanh(),)


def _relu_step(inputs: Tensor, recurrent: Tensor, state: State) -> State:
    del state
    return ((inputs + recurrent).relu(),)


def _scan(step: Step, x: Tensor, state: State, weights: Sequence[Tensor], reverse: bool) -> tuple[Tensor, State]:
    """One direction of one layer over x `[T, N, I]`: hidden states `[T, N, H]` and the last state."""
    # weights: w_ih, w_hh, then b_ih, b_hh where there are biases, then w_hr where the hidden state is projected.
    biases = weights[2:4] if len(weights) > 3 else (None, None)
    projection = weights[-1] if len(weights) in (3, 5) else None
    gates = functional.linear(x, weights[0], biases[0])
    hidden = []
    for gate in reversed(gates.unbind(0)) if reverse else gates.unbind(0):
        state = step(gate, functional.linear(state[0], weights[1], biases[1]), state)
        if projection is not None:
            state = (functional.linear(state[0], projection), *state[1:])
        hidden.append(state[0])
    return torch.stack(hidden[::-1] if reverse else hidden), state


def _layers(
    step: Step, x: Tensor, state: State, weights: Sequence[Tensor], layers: int, bidirectional: bool, batch_first: bool
) -> tuple[Tensor, State]:
    """All layers and directions; states `[layers * directions, N, H]`."""
    x = x.transpose(0, 1) if batch_first else x
    directions = 2 if bidirectional else 1
    each = len(weights) // (layers * directions)
    last = []
    for layer in range(layers):
        hidden = []
        for direction in range(directions):
            index = layer * directions + direction
            own = weights[index * each : (index + 1) * each]
            out, final = _scan(step, x, tuple(part[index] for part in state), own, reverse=direction == 1)
            hidden.append(out)
            last.append(final)
        x = torch.cat(hidden, -1)
    final_state = tuple(torch.stack(part) for part in zip(*last, strict=True))
    return (x.transpose(0, 1) if batch_first else x), final_state


def _recurrent_layer(fused: Callable[..., Any], step: Step) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        packed = isinstance(args[2], Tensor) or isinstance(args[1], Tensor) == (fused is torch.lstm)
        if kwargs or packed or (args[5] > 0 and args[6]):
            # Sequences of several lengths, or dropout in train mode.
            with _plain_kernels():
                return fused(*args, **kwargs)
        x, state, weights, _, layers, _, _, bidirectional, batch_first = args
        state = (state,) if isinstance(state, Tensor) else tuple(state)
        out, last = _layers(step, x, state, weights, layers, bidirectional, batch_first)
        return (out, *last)

    return run


def _recurrent_cell(step: Step) -> Callable[..., Any]:
    def run(
        x: Tensor,
        state: Tensor | Sequence[Tensor],
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        before = (state,) if isinstance(state, Tensor) else tuple(state)
        after = step(functional.linear(x, w_ih, b_ih), functional.linear(before[0], w_hh, b_hh), before)
        return after[0] if isinstance(state, Tensor) else after

    return run


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Composite recurrent layers, by switches of the whole process: one thread at a time may turn them."""
    # torch.backends.mkldnn.flags would also touch an Intel GPU setting, with a warning on every other machine.
    with _SWITCHES, torch.backends.cudnn.flags(enabled=False):
        enabled = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            yield
        finally:
            torch._C._set_mkldnn_enabled(enabled)


PRIMITIVES: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.lstm: _recurrent_layer(torch.lstm, _lstm_step),
    torch.gru: _recurrent_layer(torch.gru, _gru_step),
    torch.rnn_tanh: _recurrent_layer(torch.rnn_tanh, _tanh_step),
    torch.rnn_relu: _recurrent_layer(torch.rnn_relu, _relu_step),
    torch.lstm_cell: _recurrent_cell(_lstm_step),
    torch.gru_cell: _recurrent_cell(_gru_step),
    torch.rnn_tanh_cell: _recurrent_cell(_tanh_step),
    torch.rnn_relu_cell: _recurrent_cell(_relu_step),
}
