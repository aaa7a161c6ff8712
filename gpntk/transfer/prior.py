"""Which terms a prior of the target task is made of, by name."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import cached_property
from glob import escape
from typing import Any, Literal, NamedTuple, final

import torch
from gpytorch.kernels import AdditiveKernel, ConstantKernel, Kernel, LinearKernel, MaternKernel, RBFKernel, ScaleKernel
from torch import Tensor

from gpntk.errors import NetworkError, SelectionError
from gpntk.inference.features import draw
from gpntk.kernels import AbstractFeatureKernel, NTKKernel, SketchedNTKKernel, g_prior, log_scale_constraint
from gpntk.kernels.weight_prior import inverted
from gpntk.network import FrozenNetwork
from gpntk.network.batches import Arguments
from gpntk.network.heads import Body, Rescaled, grouped_like
from gpntk.transfer.candidates import ALL, DIRECTIONS, RANDOM, RANDOM_FEATURES, SUM, Candidate, Moves, StationaryInputs
from gpntk.transfer.represented import Outputs, Represented
from gpntk.transfer.terms import AbstractTerm, FeatureTerm, HostTerm, LogStudentTPrior, SumOfTerms

StationaryForm = Literal["rbf", "matern"]
WeightPrior = Literal["equal", "g"]

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

# More columns than this share one lengthscale: a handful of labels cannot tell many.
_MOST_LENGTHSCALES = 20
_TYPICAL_ROWS = 1000
# Rows on which the error of random features is measured.
_ERROR_ROWS = 100


@final
class PriorBuilder:
    """Makes the prior covariance of any candidate for one network and one set of inputs.

    Args:
        network: The source network.
        x: Inputs of the target task `[N, D]`.
        num_outputs: C of the GP.
        new_head: Whether the readout is replaced by a new one.
        layer_variances: One variance per group of the network's parameters instead of one; grouped: whether these
            groups are others than its layers.
        form: Of stationary kernels.
        medians: Of the variances' priors.
        constant: Whether a constant per output with a wide prior is a term.
        units: What each output is measured in `[C]`.
        time_budget: Seconds that the kernel of all parameters may take.
        newton_flops: Operations of Newton's steps by the matrix of all labels; 0 where labels are targets.
        custom: The kernel of the candidate ``"custom"``.
        g: Whether parameters have the variances of `gpntk.kernels.g_prior`, and not all the same.
        root: R of the likelihood's curvature at x `[N, C, q]`, which these take; None if it is the same for all labels.
    """

    def __init__(
        self,
        network: FrozenNetwork,
        x: Tensor,
        *,
        num_outputs: int,
        new_head: bool,
        layer_variances: bool,
        grouped: bool = False,
        form: StationaryForm,
        medians: Medians,
        constant: bool,
        units: Tensor | None = None,
        time_budget: float = 120.0,
        newton_flops: float = 0.0,
        custom: Kernel | None = None,
        g: bool = False,
        root: Tensor | None = None,
    ) -> None:
        self._custom, self._g, self._root = custom, g, root
        self._network, self._x, self.new_head = network, x, new_head
        self.layered, self._grouped, self._medians = layer_variances, grouped, medians
        self._form: StationaryForm = form
        self._constant, self._units, self._time_budget = constant, units, time_budget
        self._newton_flops = newton_flops
        self._made: dict[tuple[str, bool, str], FeatureTerm] = {}
        self.num_outputs = num_outputs

    def candidates(self, stationary_inputs: StationaryInputs | None = None) -> list[Candidate]:
        """What ``kernel="auto"`` compares, stationary kernels of ``stationary_inputs`` alone if these are given.

        Those that ask for features are left out where the network has no linear readout, those of inputs where these
        are ids, masks or objects; those with all parameters where their products would take too long, for which others
        stand (`gpntk.transfer.candidates`); the readout's kernel where the readout is not to move.
        """
        features, inputs = self.has_readout, self._network.adapter.continuous
        kinds: list[StationaryInputs] = [*(["inputs"] if inputs else []), *(["features"] if features else [])]
        listed = [Candidate("stationary", "features")] if features and ALL not in self.tangents else []
        for moves in self.tangents:
            if moves == ALL or not kinds:
                listed.append(Candidate("ntk", moves=moves))
            # Of the others sums alone, which contain it: there are many.
            listed += [Candidate("ntk+stationary", kind, moves=moves) for kind in kinds]
        if self._moves_linear_readout:
            listed.append(Candidate("nngp"))
        if inputs:
            listed.append(Candidate("stationary", stationary_inputs or "inputs"))
        elif features and ALL in self.tangents:
            listed.append(Candidate("stationary", "features"))
        if stationary_inputs is None:
            return listed
        return [c for c in listed if "stationary" not in c.kernel or c.stationary_inputs == stationary_inputs]

    @cached_property
    def moves(self) -> Moves:
        """Of the weights, in tangent kernels."""
        return Moves(
            self._network,
            self._x,
            outputs=DIRECTIONS if self.new_head else self.num_outputs,
            new_head=self.new_head,
            plain=not (self.layered or self._g),
            time_budget=self._time_budget,
            newton_flops=self._newton_flops,
        )

    @cached_property
    def tangents(self) -> list[str]:
        """Moves of the tangent kernels that are compared: all, or what the budget affords; all if that is nothing."""
        if self.moves.affords(ALL):
            return [ALL]
        between = [moves for moves in self.moves.between if self.moves.affords(moves)]
        return between if between or self._moves_linear_readout else [ALL]

    @property
    def left_out(self) -> str | None:
        """What the time budget keeps from a comparison, and what it would cost; None if there is nothing."""
        if ALL in self.tangents:
            return None
        others = [moves for moves in self.moves.between if moves not in self.tangents]
        costs = "".join(f" With {moves}: about {self.moves.seconds(moves):.3g} s." for moves in others)
        compared = ", ".join([*self.tangents, "the readout and the inputs"])
        return (
            f"kernel='ntk+stationary' would take about {self.moves.seconds(ALL):.3g} s, more than "
            f"time_budget={self._time_budget:g}: kernels of {compared} were compared without it.{costs}"
        )

    @property
    def error(self) -> str | None:
        """How far random features are from the tangent kernel that they stand for; None where there are none."""
        made = [term.features for (_, _, moves), term in self._made.items() if moves == RANDOM]
        kernel = next((features for features in made if isinstance(features, SketchedNTKKernel)), None)
        if kernel is None:
            return None
        error = kernel.error(self._x[:_ERROR_ROWS])
        return f"{RANDOM} are {RANDOM_FEATURES} random features, whose Gram is off the tangent kernel's by {error:.0%}."

    @property
    def widest(self) -> Candidate:
        """The tangent kernel of as many parameters as are affordable."""
        if ALL in self.tangents:
            return Candidate("ntk")
        return Candidate("nngp") if self._moves_linear_readout else Candidate("ntk", moves=self.tangents[0])

    @property
    def has_readout(self) -> bool:
        """Whether the network ends in a linear readout, on which its outputs depend alone."""
        try:
            return self._hidden is not None
        except (NetworkError, SelectionError):
            return False

    @property
    def _moves_linear_readout(self) -> bool:
        return self.has_readout and (self.new_head or set(self._only_readout().names) <= set(self._network.names))

    def build(self, candidate: Candidate, shared: bool = False) -> SumOfTerms:
        """The prior covariance of a candidate; ``shared`` gives all outputs the same, independent kernel."""
        # GPyTorch's constructors make tensors of torch's default device.
        with self._x.device:
            return self._sum(self._terms(candidate, shared))

    def _terms(self, candidate: Candidate, shared: bool) -> list[AbstractTerm]:
        if candidate.kernel == "custom":
            return self._own_terms()
        terms: list[AbstractTerm] = []
        if candidate.kernel in ("ntk", "ntk+stationary"):
            names = self.moves.parameters(candidate.moves)
            if self.new_head:
                terms += self._new_tangents(names, candidate.moves)
            else:
                terms.append(self._tangent(self._network.restrict(names), "ntk", shared, moves=candidate.moves))
        if candidate.kernel == "nngp":
            terms.append(self._moves_of_readout(shared))
        if "stationary" in candidate.kernel:
            terms.append(self._stationary(candidate.stationary_inputs))
        return terms

    def _own_terms(self) -> list[AbstractTerm]:
        """A kernel of GPyTorch's, or a sum of them and of ours."""
        assert self._custom is not None
        kernel = copy.deepcopy(self._custom)
        terms: list[AbstractTerm] = []
        parts: list[Any] = list(kernel.kernels) if isinstance(kernel, AdditiveKernel) else [kernel]
        for one in parts:
            base = one.base_kernel if isinstance(one, ScaleKernel) else one
            if isinstance(base, AbstractFeatureKernel):
                terms.append(FeatureTerm(one, self._x, self.num_outputs, unit=False))
            else:
                terms.append(HostTerm(one, self._x, self.num_outputs))
        return terms

    def _sum(self, terms: list[AbstractTerm]) -> SumOfTerms:
        if self._constant:
            kernel = ConstantKernel()
            kernel.initialize(constant=torch.tensor(_CONSTANT_VARIANCE))
            terms = [*terms, HostTerm(kernel.requires_grad_(False), self._x, self.num_outputs)]
        return SumOfTerms(terms, self.num_outputs)

    def _tangent(
        self, network: FrozenNetwork, name: str, shared: bool, share: float = 1.0, moves: str = ALL
    ) -> AbstractTerm:
        """One for all priors that it is a term of: its Gram is what costs."""
        if (name, shared, moves) not in self._made:
            in_units = network if shared or self._units is None else self._wrapped(_in_units(network, self._units))
            per_layer = self.layered and name == "ntk"
            output = "sum" if moves == SUM else "independent" if shared else "full"
            if moves == RANDOM:
                kernel = SketchedNTKKernel(in_units, num_features=RANDOM_FEATURES, output=output)
            else:
                variances = g_prior(in_units, self._x, self._root) if self._g else None
                kernel = NTKKernel(in_units, layer_variances=per_layer, prior_variance=variances, output=output)
            groups = [group or "network" for group, _ in network.groups] if per_layer else [""]
            names = [f"{name} {group}".strip() for group in groups]
            prior = LogStudentTPrior(share * self._medians.tangent / len(names), self._medians.spread)
            if per_layer:
                kernel.register_prior("layer_variances_prior", prior, _layer_variances)
            scaled = kernel if per_layer else ScaleKernel(kernel, outputscale_prior=prior)
            parameter = "raw_layer_variances" if per_layer else "raw_outputscale"
            self._made[name, shared, moves] = FeatureTerm(scaled, self._x, self.num_outputs, {parameter: names})
        return self._made[name, shared, moves]

    def _readout(self, name: str = "readout", share: float = 1.0, bias: bool = True) -> AbstractTerm:
        """s (h(x)·h(x') + 1), the moves of a linear readout with independent weights and a bias."""
        rows = Represented(self._hidden, torch.ones((), dtype=self._x.dtype, device=self._x.device), bias)(self._x)
        squares = rows.square().mean(0)
        # The curvatures of a linear map are the mean squares of what enters.
        variances = inverted(squares) if self._g else torch.ones_like(squares)
        level = ((squares * variances).sum() / variances).sqrt()
        unit = torch.where(level > 0, level, torch.ones_like(level))
        prior = LogStudentTPrior(share * self._medians.tangent, self._medians.spread)
        linear = LinearKernel().initialize(variance=1.0).requires_grad_(False)
        kernel = ScaleKernel(linear, outputscale_prior=prior)
        represent = Represented(self._hidden, unit, bias)
        return HostTerm(kernel, self._x, self.num_outputs, {"raw_outputscale": [name]}, represent)

    def _stationary(self, inputs: StationaryInputs) -> AbstractTerm:
        """s κ(|x - x'|) of the inputs or the features, in units of the typical distance between rows of x.

        With up to 20 columns each has a lengthscale of its own, with more they share one; features share one.
        """
        features = self._hidden if inputs == "features" else None
        rows = self._x if features is None else features(self._x)
        columns = rows.shape[1]
        rows = rows[draw(len(rows), min(len(rows), _TYPICAL_ROWS), seed=0).to(rows.device)]
        own = features is None and columns <= _MOST_LENGTHSCALES
        if own:
            # The squared distance of two rows has the mean 2 Σ_d σ_d².
            typical = rows.std(0, correction=0) * math.sqrt(2 * columns)
        else:
            typical = torch.pdist(rows).median() if len(rows) > 1 else rows.new_ones(())
        typical = torch.where(typical > 0, typical, torch.ones_like(typical))
        lengths: dict[str, Any] = {
            "ard_num_dims": columns if own else None,
            "lengthscale_prior": LogStudentTPrior(0.3, 1.0),
            "lengthscale_constraint": log_scale_constraint(),
        }
        base = RBFKernel(**lengths) if self._form == "rbf" else MaternKernel(2.5, **lengths)
        prior = LogStudentTPrior(self._medians.stationary, self._medians.spread)
        kernel = ScaleKernel(base, outputscale_prior=prior, outputscale_constraint=log_scale_constraint())
        numbers = [f"{inputs} lengthscale {column}" for column in range(columns)] if own else [f"{inputs} lengthscale"]
        names = {"raw_outputscale": [f"{inputs} {self._form}"], "base_kernel.raw_lengthscale": numbers}
        return HostTerm(kernel, self._x, self.num_outputs, names, Represented(features, typical))

    def _moves_of_readout(self, shared: bool) -> AbstractTerm:
        """The same for every output where the network returns its readout as it is: no Jacobian is needed then."""
        if self.new_head:
            return self._readout()
        readout = self._only_readout()
        alike = self._root is None and (self.num_outputs == 1 or shared or self._units is None)
        if alike and self.has_readout:
            body = Body(self._network.thaw(), extract=self._network.extract)
            # A weight that is tied to another layer's is not the readout's alone.
            own = body.readout_parameters == readout.names
            probe = self._probe()
            if own and body.returns_readout(*probe.args, **probe.kwargs):
                return self._readout("nngp", bias=len(readout.names) > 1)
        return self._tangent(readout, "nngp", shared)

    def _new_tangents(self, names: Sequence[str], moves: str) -> list[AbstractTerm]:
        """A new readout, and what it makes of moves of these parameters below."""
        body = self._projected_body(names)
        if body is None:
            return [self._readout()]
        return [self._readout(share=0.5), self._tangent(body, "ntk", shared=True, share=0.5, moves=moves)]

    def _only_readout(self) -> FrozenNetwork:
        module = self._network.thaw()
        return FrozenNetwork(module, "readout", extract=self._network.extract, inputs=self._network.adapter)

    @cached_property
    def _hidden(self) -> Outputs:
        """What enters the readout."""
        body, probe = Body(self._network.thaw(), extract=self._network.extract), self._probe()
        body.check(*probe.args, **probe.kwargs)
        return Outputs(FrozenNetwork(body, inputs=self._network.adapter))

    def _probe(self) -> Arguments:
        """The first and the last input as the network wants them."""
        rows = self._x[:: max(1, len(self._x) - 1)][:2].to(self._network.dtype)
        return self._network.adapter.arguments(rows)

    def _projected_body(self, names: Sequence[str]) -> FrozenNetwork | None:
        """Sums of what enters the readout, by those of these parameters that are below it; None if there are none."""
        body = Body(self._network.thaw(), DIRECTIONS, extract=self._network.extract)
        there = {name for name, _ in body.named_parameters()}
        chosen = [f"network.{escape(name)}" for name in names if f"network.{name}" in there]
        return self._wrapped(FrozenNetwork(body, chosen, inputs=self._network.adapter)) if chosen else None

    def _wrapped(self, network: FrozenNetwork) -> FrozenNetwork:
        return grouped_like(network, self._network) if self._grouped else network


def _layer_variances(kernel: Any) -> Tensor:
    return kernel.layer_variances


def _in_units(network: FrozenNetwork, units: Tensor) -> FrozenNetwork:
    """The same parameters of a network whose outputs are measured in these units `[C]`."""
    if len(units) == 1:
        return network
    rescaled = Rescaled(network.thaw(), units.to(network.dtype), network.extract)
    return FrozenNetwork(rescaled, [f"network.{escape(name)}" for name in network.names], inputs=network.adapter)
