"""What may be chosen as the prior of a transfer: kernels, and which moves of the weights their tangent kernels have.

Where the tangent kernel of all parameters would take longer than the time budget, `Moves` says what stands between it
and that of the readout alone:

| moves | tangent kernel of |
|---|---|
| last block, last 2 blocks, last 4 blocks | the weights from there on; paths such as ``layer4.1`` number blocks |
| norms and biases | parameters that are vectors |
| random directions | all parameters, by random features: `gpntk.SketchedNTKKernel` |
| sum of outputs | all parameters, of the sum of the outputs; each output has this kernel |
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gpntk.cost import Machine
from gpntk.kernels import SketchedNTKKernel
from gpntk.network import FrozenNetwork
from gpntk.network.selection import layer_name

KernelChoice = Literal["auto", "ntk", "nngp", "ntk+stationary", "stationary", "custom"]
MeanChoice = Literal["auto", "network", "constant", "zero"]
StationaryInputs = Literal["inputs", "features"]

# Difference of log evidence, in nats, from which on it counts as strong: Kass and Raftery (1995), Bayes Factors.
STRONG_EVIDENCE = 3.0
# Factorisations until Newton's method has found the mode of class labels, that at the mode included.
FACTORISATIONS = 4
# Directions in which the body's tangent kernel is taken under a new head.
DIRECTIONS = 8
# Products with the features until conjugate gradients have converged, those of the preconditioner with them.
_PRODUCTS = 460
# Blocks from the last one on; outputs from which on their sum is much cheaper; random features of the tangent kernel.
_BLOCKS, _MANY_OUTPUTS, RANDOM_FEATURES = (1, 2, 4), 3, 512

ALL, NORMS, RANDOM, SUM = "all", "norms and biases", "random directions", "sum of outputs"


class Candidate(NamedTuple):
    """A prior that may be chosen: a kernel, and a prior mean where it is not the one of the other candidates.

    ``moves`` are those of the weights that its tangent kernel has.
    """

    kernel: KernelChoice
    stationary_inputs: StationaryInputs = "inputs"
    mean: MeanChoice = "auto"
    moves: str = ALL

    def __str__(self) -> str:
        of_features = "stationary" in self.kernel and self.stationary_inputs == "features"
        kernel = f"{self.kernel} of features" if of_features else self.kernel
        moves = "" if self.moves == ALL else f", {self.moves}"
        return kernel + moves if self.mean == "auto" else f"{kernel}{moves}, mean {self.mean}"


class Comparison(NamedTuple):
    """What was compared, by name: log evidence of each candidate, in nats, and the seconds that it took.

    Candidates share what they are made of: a Gram counts for the first of them alone.
    """

    chosen: Candidate
    log_evidence: dict[str, float]
    seconds: dict[str, float]


def preferred(log_evidence: Mapping[Candidate, float], new_head: bool) -> Candidate:
    """The candidate of largest evidence; under the network's own head, a sum unless a single kernel is better by far.

    In the sum the single kernel is contained. A new head's tangent kernel is a sum already.
    """
    best = max(log_evidence, key=log_evidence.__getitem__)
    if new_head:
        return best
    sums = [candidate for candidate in log_evidence if "+" in candidate.kernel]
    if not sums:
        return best
    general = max(sums, key=log_evidence.__getitem__)
    return best if log_evidence[best] > log_evidence[general] + STRONG_EVIDENCE else general


@final
class Moves:
    """Which moves of the weights a tangent kernel can have, and what each takes.

    Args:
        network: The source network.
        x: Inputs of the target task `[N, D]`.
        outputs: Outputs of the tangent kernel for each input.
        new_head: Whether the readout is replaced.
        plain: Whether all parameters have one prior variance.
        time_budget: Seconds that a kernel may take.
        newton_flops: Operations of Newton's steps by the matrix of all labels; 0 where labels are targets.
    """

    def __init__(
        self,
        network: FrozenNetwork,
        x: Tensor,
        *,
        outputs: int,
        new_head: bool,
        plain: bool,
        time_budget: float,
        newton_flops: float,
    ) -> None:
        self._network, self._x, self._outputs, self._new_head, self._plain = network, x, outputs, new_head, plain
        self._time_budget, self._newton_flops = time_budget, newton_flops

    def parameters(self, moves: str) -> list[str]:
        """The parameters that move."""
        network = self._network
        if moves == NORMS:
            return [name for name in network.names if len(network.shapes[name]) < 2]
        if moves in (ALL, RANDOM, SUM):
            return list(network.names)
        count = 1 if moves == _blocks(1) else int(moves.split()[1])
        first = f"{self._blocks[-count]}."
        start = next(index for index, name in enumerate(network.names) if name.startswith(first))
        return list(network.names[start:])

    def affords(self, moves: str) -> bool:
        """Whether they keep to the time budget."""
        return self.seconds(moves) <= self._time_budget

    @cached_property
    def between(self) -> list[str]:
        """Those between the readout's and all, affordable or not."""
        listed = [_blocks(count) for count in _BLOCKS if count < len(self._blocks)]
        vectors = {layer_name(name) for name in self.parameters(NORMS)}
        listed += [NORMS] if vectors - {self._readout} else []
        listed += [RANDOM] if self._plain and self._network.num_params > RANDOM_FEATURES else []
        return listed + ([SUM] if self._outputs >= _MANY_OUTPUTS and not self._new_head else [])

    def seconds(self, moves: str) -> float:
        """What their tangent kernel takes, at least, by the cheapest of the ways there are.

        A pass forward and back per input and output; and the Gram of all rows, or the second moment of the features, or
        products with them until conjugate gradients have converged. For classes, Newton's steps by one of the three,
        beside which a Gram is little.
        """
        samples, outputs = float(len(self._x)), 1 if moves == SUM else self._outputs
        sizes = (self._network.shapes[name].numel() for name in self.parameters(moves))
        features = RANDOM_FEATURES if moves == RANDOM else sum(sizes)
        steps = FACTORISATIONS if self._newton_flops else 1
        ways = (
            self._newton_flops or 2 * samples**2 * outputs * features,
            steps * samples * (outputs * features) ** 2,
            steps * 4 * samples * outputs * features * _PRODUCTS,
        )
        passes = outputs * 3.0 * self._forward_flops + (self._sketch_flops if moves == RANDOM else 0.0)
        return (samples * passes + min(ways)) / Machine.of(self._x.device).attained

    @cached_property
    def _forward_flops(self) -> float:
        """Of a pass of one input through the network."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self._network(self._x[:1].to(self._network.dtype))
        return float(counter.get_total_flops())

    @cached_property
    def _sketch_flops(self) -> float:
        """Of the random features of one input, of each output if these are many."""
        kernel = SketchedNTKKernel(self._network, num_features=RANDOM_FEATURES)
        row = self._x[:1].to(self._network.dtype)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            kernel.features(row).to_dense()
        return counter.get_total_flops() * max(1.0, self._outputs / self._network.num_outputs(row))

    @cached_property
    def _readout(self) -> str:
        return layer_name(self._network.select_readout().names[0])

    @cached_property
    def _blocks(self) -> list[str]:
        """Paths of the blocks that have weights, in order, the readout left out: up to the first number in a path."""
        network = self._network
        layers = [layer_name(name) for name in network.names if len(network.shapes[name]) > 1]
        return list(dict.fromkeys(_block(layer) for layer in layers if layer != self._readout))


def _block(layer: str) -> str:
    parts = layer.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1])


def _blocks(count: int) -> str:
    return "last block" if count == 1 else f"last {count} blocks"
