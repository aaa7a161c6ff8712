"""Which components a prior of the target task is made of, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from glob import escape
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gpntk.errors import InputError, NetworkError, SelectionError
from gpntk.network import FrozenNetwork
from gpntk.network.heads import Body
from gpntk.transfer.components import (
    AbstractComponent,
    Constant,
    Readout,
    Stationary,
    StationaryForm,
    SumOfComponents,
    Tangent,
)
from gpntk.transfer.remembered import Outputs

KernelChoice = Literal["auto", "ntk", "nngp", "ntk+stationary", "stationary"]
MeanChoice = Literal["auto", "network", "constant", "zero"]
StationaryInputs = Literal["inputs", "features"]

# Directions in which the body's tangent kernel is taken under a new head.
_DIRECTIONS = 8
# Variance of the constant, in units of that of the targets: wide, yet no strain on a factorisation.
_CONSTANT_VARIANCE = 100.0


class Medians(NamedTuple):
    """Medians of the priors of variances, and their widths in powers of e; chosen as docs/decisions/008 says."""

    tangent: float
    stationary: float
    noise: float
    noise_spread: float
    spread: float = 1.5


# In units of the residuals' mean square. What a good source network leaves unexplained is noise until labels say else.
RESIDUAL = Medians(tangent=0.03, stationary=0.1, noise=0.7, noise_spread=1.0)
# Targets themselves are mostly signal.
TARGET = Medians(tangent=0.5, stationary=0.5, noise=0.1, noise_spread=1.5)
# The same for logits, in their own units: those of a source network that fits, and those of a fresh head.
RESIDUAL_LOGITS = Medians(tangent=1.0, stationary=0.5, noise=0.0, noise_spread=0.0, spread=1.2)
LOGITS = Medians(tangent=3.0, stationary=3.0, noise=0.0, noise_spread=0.0)

# Floating-point operations of a tangent kernel, a minute's or two: a dearer one must be asked for by name.
TANGENT_COST = 3e12
# Difference of log evidence, in nats, from which on it counts as strong: Kass and Raftery (1995), Bayes Factors.
STRONG_EVIDENCE = 3.0


class Candidate(NamedTuple):
    """A kernel that may be chosen."""

    kernel: KernelChoice
    stationary_inputs: StationaryInputs = "inputs"

    def __str__(self) -> str:
        of_features = "stationary" in self.kernel and self.stationary_inputs == "features"
        return f"{self.kernel} of features" if of_features else self.kernel


class Comparison(NamedTuple):
    """What was compared: log evidence of each candidate, in nats, by its name."""

    chosen: Candidate
    log_evidence: dict[str, float]


def preferred(log_evidence: Mapping[Candidate, float], fresh: bool) -> Candidate:
    """The candidate of largest evidence; under the network's own head, a sum unless a single kernel is better by far.

    In the sum the single kernel is contained. A fresh head's tangent kernel is a sum already.
    """
    best = max(log_evidence, key=log_evidence.__getitem__)
    if fresh:
        return best
    sums = [candidate for candidate in log_evidence if "+" in candidate.kernel]
    if not sums:
        return best
    general = max(sums, key=log_evidence.__getitem__)
    return best if log_evidence[best] > log_evidence[general] + STRONG_EVIDENCE else general


@final
class PriorBuilder:
    """Makes the prior covariance of any candidate for one network and one set of inputs.

    Args:
        network: The source network.
        x: Inputs of the target task `[N, D]`.
        num_outputs: C, if the readout is to be replaced by a fresh one; None to keep it.
        layer_variances: One variance per layer instead of one.
        form: Of stationary kernels.
        medians: Of the variances' priors.
        constant: Whether a constant per output with a wide prior is a term.
        units: What each output is measured in `[C]`.
    """

    def __init__(
        self,
        network: FrozenNetwork,
        x: Tensor,
        *,
        num_outputs: int | None,
        layer_variances: bool,
        form: StationaryForm,
        medians: Medians,
        constant: bool,
        units: Tensor | None = None,
    ) -> None:
        self._network, self._x, self._fresh = network, x, num_outputs is not None
        self._layer_variances, self._medians = layer_variances, medians
        self._form: StationaryForm = form
        self._constant, self._units = constant, units
        self._made: dict[tuple[str, bool], Tangent] = {}
        self.num_outputs = network.num_outputs(x) if num_outputs is None else num_outputs

    def candidates(self, stationary_inputs: StationaryInputs | None = None) -> list[Candidate]:
        """What ``kernel="auto"`` compares, stationary kernels of ``stationary_inputs`` alone if these are given.

        Those that ask for features are left out where the network has no linear readout; those with all parameters
        where their products would take too long; the readout's kernel where the readout is not to move.
        """
        features = self.has_readout
        listed = [
            Candidate("ntk"),
            Candidate("ntk+stationary"),
            *([Candidate("ntk+stationary", "features")] if features else []),
        ]
        if not self.affords_tangent:
            listed = [Candidate("stationary", "features")]
        if self._moves_linear_readout:
            listed.append(Candidate("nngp"))
        listed.append(Candidate("stationary", stationary_inputs or "inputs"))
        if stationary_inputs is None:
            return listed
        return [c for c in listed if "stationary" not in c.kernel or c.stationary_inputs == stationary_inputs]

    @cached_property
    def tangent_cost(self) -> float:
        """Floating-point operations, at least: a pass forward and back per input and output, and their products."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self._network(self._x[:1].to(self._network.dtype))
        rows, params = len(self._x), self._network.num_params
        outputs = _DIRECTIONS if self._fresh else self.num_outputs
        return outputs * rows * (3.0 * counter.get_total_flops() + 2.0 * rows * params)

    @property
    def affords_tangent(self) -> bool:
        """Whether the tangent kernel of all parameters takes no more than minutes, or nothing stands in for it."""
        return self.tangent_cost <= TANGENT_COST or not self._moves_linear_readout

    @property
    def widest(self) -> Candidate:
        """The tangent kernel of as many parameters as are affordable."""
        return Candidate("ntk" if self.affords_tangent else "nngp")

    @property
    def has_readout(self) -> bool:
        """Whether the network ends in a linear readout, on which its outputs depend alone."""
        try:
            return self._hidden is not None
        except (NetworkError, SelectionError):
            return False

    @property
    def _moves_linear_readout(self) -> bool:
        return self.has_readout and (self._fresh or set(self._only_readout().names) <= set(self._network.names))

    def build(self, candidate: Candidate, shared: bool = False) -> SumOfComponents:
        """The prior covariance of a candidate; ``shared`` gives all outputs the same, independent kernel."""
        parts: list[AbstractComponent] = []
        if candidate.kernel in ("ntk", "ntk+stationary"):
            parts += self._fresh_tangents() if self._fresh else [self._tangent(self._network, "ntk", shared)]
        if candidate.kernel == "nngp":
            parts.append(self._moves_of_readout(shared))
        if "stationary" in candidate.kernel:
            features = self._hidden if candidate.stationary_inputs == "features" else None
            parts.append(Stationary(self._x, self._form, self._medians.stationary, self._medians.spread, features))
        if self._constant:
            parts.append(Constant(_CONSTANT_VARIANCE))
        return SumOfComponents(parts, self.num_outputs)

    def tangents(self, candidate: Candidate) -> dict[str, FrozenNetwork]:
        """Networks whose tangent kernels, means over outputs, are the terms of a candidate, by name."""
        if candidate.kernel == "stationary":
            return {}
        if not self._fresh:
            return {"nngp" if candidate.kernel == "nngp" else "ntk": self.network_of(candidate)}
        body = None if candidate.kernel == "nngp" else self._projected_body()
        # The mean over outputs of the readout's own kernel is a fraction 1 / C of it, which its scale makes up for.
        return {"readout": self._only_readout()} | ({} if body is None else {"ntk": body})

    def _tangent(self, network: FrozenNetwork, name: str, shared: bool, share: float = 1.0) -> Tangent:
        """One for all priors that it is a term of: its parts are what costs."""
        if (name, shared) not in self._made:
            self._made[name, shared] = Tangent(
                network,
                self._x,
                name,
                median=share * self._medians.tangent,
                spread=self._medians.spread,
                per_layer=self._layer_variances and name == "ntk",
                shared=shared,
                units=None if shared else self._units,
            )
        return self._made[name, shared]

    def _readout(self, name: str = "readout", share: float = 1.0, bias: bool = True) -> Readout:
        median, spread = share * self._medians.tangent, self._medians.spread
        return Readout(self._hidden, self._x, name, median=median, spread=spread, bias=bias)

    def _moves_of_readout(self, shared: bool) -> AbstractComponent:
        """The same for every output where the network returns its readout as it is: no Jacobian is needed then."""
        if self._fresh:
            return self._readout()
        readout = self._only_readout()
        alike = self.num_outputs == 1 or shared or self._units is None
        if alike and self.has_readout:
            body = Body(self._network.thaw())
            # A weight that is tied to another layer's is not the readout's alone.
            own = body.readout_parameters == readout.names
            if own and body.returns_readout(self._probe(), self._network.extract):
                return self._readout("nngp", bias=len(readout.names) > 1)
        return self._tangent(readout, "nngp", shared)

    def _fresh_tangents(self) -> list[AbstractComponent]:
        """A fresh readout, and what it makes of the layers below."""
        body = self._projected_body()
        if body is None:
            return [self._readout()]
        return [self._readout(share=0.5), self._tangent(body, "ntk", shared=True, share=0.5)]

    def network_of(self, candidate: Candidate) -> FrozenNetwork:
        """The network with the parameters that a candidate moves."""
        return self._only_readout() if candidate.kernel == "nngp" else self._network

    def _only_readout(self) -> FrozenNetwork:
        module = self._network.thaw()
        return FrozenNetwork(module, "readout", self._network.input_shape, self._network.extract)

    @cached_property
    def _hidden(self) -> Outputs:
        """What enters the readout."""
        module = self._network.thaw()
        Body(module).check(self._probe())
        body = FrozenNetwork(Body(module), None, self._network.input_shape)
        return Outputs(body)

    def _probe(self) -> Tensor:
        """The first and the last input as the network wants them."""
        rows = self._x[:: max(1, len(self._x) - 1)][:2].to(self._network.dtype)
        shape = self._network.input_shape
        return rows if shape is None else rows.reshape(-1, *shape)

    def _projected_body(self) -> FrozenNetwork | None:
        """Sums of what enters the readout, by the chosen parameters below it; None if there are none."""
        body = Body(self._network.thaw(), _DIRECTIONS)
        there = {name for name, _ in body.named_parameters()}
        chosen = [f"network.{escape(name)}" for name in self._network.names if f"network.{name}" in there]
        return FrozenNetwork(body, chosen, self._network.input_shape) if chosen else None


def units_of(y: Tensor, residual: Tensor) -> Tensor:
    """What the GP measures each output in `[C]`: the spread of its targets, times one factor for all.

    The factor makes the mean square of the residuals one. Targets and residuals are `[N, C]`, NaN where missing.
    """
    centred = y - y.nanmean(0)
    spread = centred.square().nanmean(0).sqrt()
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    factor = (residual / spread).square().nanmean().sqrt()
    return spread * torch.where(factor > 0, factor, torch.ones_like(factor))


def check_choices(
    *, kernel: str, mean: str, stationary: str, stationary_inputs: str | None, hyperparameters: object, fresh: bool
) -> None:
    """Raise `InputError` for a choice that does not exist, or does not go with a fresh head."""
    _check("stationary", stationary, ("rbf", "matern"))
    if stationary_inputs is not None:
        _check("stationary_inputs", stationary_inputs, ("inputs", "features"))
    if not isinstance(hyperparameters, Mapping):
        _check("hyperparameters", str(hyperparameters), ("auto", "average", "maximum"))
    _check("kernel", kernel, ("auto", "ntk", "nngp", "ntk+stationary", "stationary"))
    _check("mean", mean, ("auto", "network", "constant", "zero"))
    if fresh and mean == "network":
        raise InputError("mean='network' has no meaning for a new head: use mean='constant' or 'zero'.")


def _check(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise InputError(f"{name}={value!r}: choose one of {listed}.")
