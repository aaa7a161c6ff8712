"""What is left of a network without its readout, for tasks whose outputs are others than the network's."""

from __future__ import annotations

import copy
from typing import Any, final

import torch
from torch import Tensor, nn

from gpntk._types import Extract
from gpntk.errors import NetworkError
from gpntk.network.selection import readout_name


@final
class Body(nn.Module):
    """The features h(x) `[N, H]` that enter the readout (the last registered layer, a ``Linear``) of a network.

    With ``num_directions`` it returns R random sums Σ_j ±h_j(x) / √H instead. The mean over directions of their tangent
    kernels is an unbiased estimate of (1/H) Σ_j of those of h_j, the kernel that a fresh readout of random weights
    gives to all layers below it.

    Args:
        network: The network, which is copied.
        num_directions: R; None for h itself.
        seed: Of the signs.

    Raises:
        NetworkError: The last layer is no ``Linear``, is not reached, or sees more than one vector per input.

    Example:
        >>> import torch
        >>> network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> Body(network)(torch.zeros(5, 3)).shape, Body(network, num_directions=4)(torch.zeros(5, 3)).shape
        (torch.Size([5, 8]), torch.Size([5, 4]))
    """

    directions: Tensor | None

    def __init__(self, network: nn.Module, num_directions: int | None = None, seed: int = 0) -> None:
        super().__init__()
        name = readout_name(network)
        if not name:
            raise NetworkError("the network is a single layer: nothing is left of it without its readout.")
        readout = network.get_submodule(name)
        if not isinstance(readout, nn.Linear):
            raise NetworkError(
                f"the last layer, {name or 'the network itself'!r}, is a {type(readout).__name__}: a new head replaces "
                "a Linear. Pass a module whose last registered layer is the Linear to be replaced."
            )
        bias = () if readout.bias is None else (f"{name}.bias",)
        self.readout_parameters: tuple[str, ...] = (f"{name}.weight", *bias)
        # No parametrisation, no forward of its own, no hook.
        self._plain = type(readout) is nn.Linear and not (readout._forward_hooks or readout._forward_pre_hooks)
        self.recorder = _Recorder(readout.out_features)
        self.network = _replaced(copy.deepcopy(network), name, self.recorder)
        self.training = network.training
        directions = None
        if num_directions is not None:
            generator = torch.Generator("cpu").manual_seed(seed)
            shape = readout.in_features, num_directions
            signs = torch.randint(2, shape, generator=generator, device="cpu") * 2 - 1
            directions = signs.to(readout.weight) / readout.in_features**0.5
        self.register_buffer("directions", directions)

    def check(self, x: Tensor) -> None:
        """Raise `NetworkError` unless what the network returns at x depends on h(x) alone."""
        try:
            with torch.no_grad():
                self(x)
                returned = self.network(x)
        except AttributeError as error:
            raise NetworkError(f"the network uses its readout otherwise than by calling it ({error}).") from None
        finally:
            self.recorder.calls.clear()
        if isinstance(returned, Tensor) and not torch.equal(returned, returned[:1].expand_as(returned)):
            raise NetworkError(
                "the network's outputs depend on its inputs by other ways than its last registered layer: register the "
                "readout last, and without a connection that bypasses it."
            )

    def returns_readout(self, x: Tensor, extract: Extract | None = None) -> bool:
        """Whether the network's outputs are those of a plain ``Linear``, untouched."""
        self.recorder.calls.clear()
        with torch.inference_mode(False), torch.no_grad():
            returned = self.network(x.clone())
            outputs = returned if extract is None else extract(returned)
        _, readout = self.recorder.calls.pop()
        # The very tensor that the readout let out, not one that is equal to it here; and not changed in place.
        return self._plain and outputs is readout and readout._version == 0

    def forward(self, x: Tensor) -> Tensor:
        """The features that enter the readout, h(x) `[N, H]`, or its projections `[N, R]`."""
        self.recorder.calls.clear()
        self.network(x)
        if len(self.recorder.calls) != 1:
            raise NetworkError(f"the readout runs {len(self.recorder.calls)} times per input: a new head needs once.")
        hidden, _ = self.recorder.calls.pop()
        if hidden.dim() != 2:
            raise NetworkError(
                f"the readout sees {tuple(hidden.shape)} for {x.shape[0]} inputs, but a new head needs one vector "
                "each: pass a module that selects it (the last token, say) before its last layer."
            )
        return hidden if self.directions is None else hidden @ self.directions


class _Recorder(nn.Module):
    """Stands where the readout stood: lets zeros out, and remembers what came in and went out."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.num_outputs = num_outputs
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, hidden: Tensor) -> Tensor:
        zeros = hidden.new_zeros(*hidden.shape[:-1], self.num_outputs)
        self.calls.append((hidden, zeros))
        return zeros

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "calls": []}


def _replaced(network: nn.Module, name: str, by: nn.Module) -> nn.Module:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, by)
    return network


@final
class Rescaled(nn.Module):
    """f_c(x) / units_c: a network whose outputs are measured in other units.

    Args:
        network: The network.
        units: `[C]`.
        extract: Turns what the network returns into its outputs.
    """

    def __init__(self, network: nn.Module, units: Tensor, extract: Extract | None = None) -> None:
        super().__init__()
        self.network, self._extract = network, extract
        self.inverse: Tensor
        self.training = network.training
        self.register_buffer("inverse", 1 / units)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs in the units asked for, `[N, C]`."""
        returned = self.network(x)
        outputs = returned if self._extract is None else self._extract(returned)
        return outputs * self.inverse
