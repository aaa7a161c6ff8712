"""What is left of a network without its readout, for tasks whose outputs are others than the network's."""

from __future__ import annotations

from glob import escape
from typing import Any, final

import torch
from torch import Tensor, nn

from gpntk._types import Extract
from gpntk.errors import NetworkError
from gpntk.memory import is_out_of_memory
from gpntk.network.batches import Arguments
from gpntk.network.freezing import copied
from gpntk.network.frozen import FrozenNetwork
from gpntk.network.outputs import POOLINGS, extracted
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
        extract: Which of the things that the network returns is its output; see `gpntk.FrozenNetwork`.

    Where the readout makes outputs of every token, of which the network then selects or averages, h(x) is what it makes
    of the tokens' vectors themselves in the same way.

    Raises:
        NetworkError: The last layer is no ``Linear``, is not reached, or sees more than one vector per input.

    Example:
        >>> import torch
        >>> network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> Body(network)(torch.zeros(5, 3)).shape, Body(network, num_directions=4)(torch.zeros(5, 3)).shape
        (torch.Size([5, 8]), torch.Size([5, 4]))
    """

    directions: Tensor | None

    def __init__(
        self, network: nn.Module, num_directions: int | None = None, seed: int = 0, extract: Extract | str | None = None
    ) -> None:
        super().__init__()
        self._extract = extract
        name = readout_name(network)
        if not name:
            raise NetworkError("the network is a single layer: nothing is left of it without its readout.")
        readout = dict(network.named_modules())[name]
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
        self.network = _replaced(copied(network), name, self.recorder)
        self.training = network.training
        directions = None
        if num_directions is not None:
            generator = torch.Generator("cpu").manual_seed(seed)
            shape = readout.in_features, num_directions
            signs = torch.randint(2, shape, generator=generator, device="cpu") * 2 - 1
            directions = signs.to(readout.weight) / readout.in_features**0.5
        self.register_buffer("directions", directions)

    def check(self, *args: Any, **kwargs: Any) -> None:
        """Raise `NetworkError` unless what the network returns for these arguments depends on h(x) alone."""
        try:
            with torch.no_grad():
                features = self._features(args, kwargs)
                returned = self._returned(args, kwargs)
                if isinstance(returned, Tensor) and not returned.isfinite().all():
                    # A logarithm of -h, say.
                    self.recorder.sign = -1
                    returned = self._returned(args, kwargs)
                hidden, _ = self.recorder.calls.pop()
                if hidden.dim() > 2:
                    self.recorder.mixing = _numbers(features.shape[1], self.recorder.num_outputs, features)
                    alike = _close(self._returned(args, kwargs), features @ self.recorder.mixing)
                else:
                    alike = not isinstance(returned, Tensor) or _close(returned, returned[:1].expand_as(returned))
        except AttributeError as error:
            raise NetworkError(f"the network uses its readout otherwise than by calling it ({error}).") from None
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise NetworkError(f"the network does not run when another head stands for its readout: {error}") from error
        finally:
            self.recorder.calls.clear()
            self.recorder.mixing, self.recorder.sign = None, 1
        if not alike:
            raise NetworkError(
                "the network's outputs depend on its inputs by other ways than its last registered layer: register the "
                "readout last, and without a connection that bypasses it."
            )

    def returns_readout(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the network's outputs are those of a plain ``Linear``, untouched."""
        self.recorder.calls.clear()
        with torch.inference_mode(False), torch.no_grad():
            outputs = self._returned(args, kwargs)
        _, readout = self.recorder.calls.pop()
        # The very tensor that the readout let out, not one that is equal to it here; and not changed in place.
        return self._plain and outputs is readout and readout._version == 0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The features that enter the readout, h(x) `[N, H]`, or its projections `[N, R]`."""
        hidden = self._features(args, kwargs)
        return hidden if self.directions is None else hidden @ self.directions

    def _features(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        self.recorder.calls.clear()
        returned = self._returned(args, kwargs)
        if len(self.recorder.calls) != 1:
            raise NetworkError(f"the readout runs {len(self.recorder.calls)} times per input: a new head needs once.")
        hidden, _ = self.recorder.calls.pop()
        if hidden.dim() == 2:
            return hidden
        if isinstance(returned, Tensor) and returned.dim() == 2 and returned.shape[1] == hidden.shape[-1]:
            return returned
        raise NetworkError(
            f"the readout sees {tuple(hidden.shape)} for {hidden.shape[0]} inputs, but a new head needs one vector "
            "each: pass a module that selects it (the last token, say) before its last layer."
        )

    def _returned(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return extracted(self.network(*args, **kwargs), self._extract, Arguments(args, kwargs))[0]


class _Recorder(nn.Module):
    """Stands where the readout stood, and remembers what came in and went out.

    It lets out the same numbers for every input, none of them zero, since a network may divide by their norm or take
    their logarithm; of a vector per token the vectors themselves, or their products with ``mixing``.
    """

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.num_outputs, self.sign = num_outputs, 1
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.mixing: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.dim() > 2:
            out = hidden.clone() if self.mixing is None else hidden @ self.mixing
        else:
            out = self.sign * _numbers(1, self.num_outputs, hidden).expand(len(hidden), -1)
        self.calls.append((hidden, out))
        return out

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "calls": []}


def _numbers(rows: int, columns: int, like: Tensor) -> Tensor:
    """Numbers between a half and three halves, no two of which are close, `[rows, columns]`."""
    golden = (5**0.5 - 1) / 2
    numbers = torch.arange(1, rows * columns + 1, device=like.device, dtype=torch.float64) * golden
    return (numbers - numbers.floor() + 0.5).to(like.dtype).view(rows, columns)


def _close(one: Any, two: Tensor) -> bool:
    """Equal up to rounding."""
    tolerance = 64 * torch.finfo(two.dtype).eps * two.shape[-1] * float(two.abs().max())
    return isinstance(one, Tensor) and torch.allclose(one, two, rtol=0.0, atol=tolerance)


def _replaced(network: nn.Module, name: str, by: nn.Module) -> nn.Module:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, by)
    return network


@final
class Headed(nn.Module):
    """A linear map, of zeros as yet, of what a network returns.

    Args:
        network: The network.
        width: How many outputs it has.
        extract: Which of the things that it returns are these.
    """

    def __init__(self, network: nn.Module, width: int, extract: Extract | str | None = None) -> None:
        super().__init__()
        self.network, self._extract = network, extract
        like = next(network.parameters())
        self.head = nn.Linear(width, 2, device=like.device, dtype=like.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.training = network.training

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The map's outputs `[N, 2]`."""
        outputs, _ = extracted(self.network(*args, **kwargs), self._extract, Arguments(args, kwargs))
        return self.head(outputs)


def with_readout(network: FrozenNetwork, x: Tensor) -> FrozenNetwork:
    """The network, or if it ends in a vector per token that ``extract`` pools, the network under a linear readout."""
    if network.extract not in POOLINGS:
        return network
    module = network.thaw()
    rows = network.adapter.arguments(x[:: max(1, len(x) - 1)][:2].to(network.dtype))
    try:
        Body(module, extract=network.extract).check(*rows.args, **rows.kwargs)
    except NetworkError:
        headed = Headed(module, network.num_outputs(x), network.extract)
        names = [f"network.{escape(name)}" for name in network.names]
        frozen = grouped_like(FrozenNetwork(headed, names, inputs=network.adapter), network)
        frozen.entry.say(f"a new head on the {network.entry.name}")
        return frozen
    return network


@final
class Rescaled(nn.Module):
    """f_c(x) / units_c: a network whose outputs are measured in other units.

    Args:
        network: The network.
        units: `[C]`.
        extract: Turns what the network returns into its outputs.
    """

    def __init__(self, network: nn.Module, units: Tensor, extract: Extract | str | None = None) -> None:
        super().__init__()
        self.network, self._extract = network, extract
        self.inverse: Tensor
        self.training = network.training
        self.register_buffer("inverse", 1 / units)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Outputs in the units asked for, `[N, C]`."""
        outputs, _ = extracted(self.network(*args, **kwargs), self._extract, Arguments(args, kwargs))
        return outputs * self.inverse


def grouped_like(wrapped: FrozenNetwork, source: FrozenNetwork) -> FrozenNetwork:
    """A network that has ``source`` within it, as ``network``, with its groups of parameters."""
    groups: dict[str, list[str]] = {}
    for name in wrapped.names:
        groups.setdefault(source.group_of(name.removeprefix("network.")), []).append(name)
    return wrapped.grouped(groups)
