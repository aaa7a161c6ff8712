"""Regression on a target task with a frozen source network: tensors in, tensors out.

    y = m(x) + g(x) + noise,    g ~ GP(0, K)

With m(x) = f(x; w*) and K(x, x') = s J(x) J(x')ᵀ this is Bayesian linear regression in the tangent space of the network
at its pretrained weights. A stationary kernel, added to K, stands for what that space cannot say.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from glob import escape
from typing import Any, final

import torch
from torch import Tensor, nn

from gpntk.errors import InputError
from gpntk.inference.features import draw
from gpntk.inference.hyperposterior import Draws, Treatment, named
from gpntk.network import FrozenNetwork
from gpntk.network.heads import Rescaled
from gpntk.transfer.components import StationaryForm
from gpntk.transfer.dense import DenseGP, Prediction
from gpntk.transfer.noise import relative_noise
from gpntk.transfer.prior import (
    RESIDUAL,
    TARGET,
    Candidate,
    Comparison,
    KernelChoice,
    MeanChoice,
    Medians,
    PriorBuilder,
    StationaryInputs,
    check_choices,
    preferred,
    units_of,
)
from gpntk.transfer.remembered import Outputs
from gpntk.transfer.tangent import TangentRegression

# Hyperparameters are averaged over up to so many labels; beyond, their posterior is narrow and its draws are dear.
AVERAGE_LIMIT = 300
# Labels up to which sums of kernels are the default: one factorisation of this size took 0.1 s on two cores.
DENSE_LIMIT = 2_000
# Labels up to which they are possible.
LARGEST_DENSE = 10_000
_PREDICTION_ROWS = 512


@final
class TransferGP:
    """A GP for the target task on top of a frozen source network.

    `TransferRegressor` is its scikit-learn face; use this one for tensors on any device.

    Args:
        network: The source network, frozen.
        x: Inputs of the target task `[N, D]`.
        y: Targets `[N, C]`; NaN where missing.
        mean: Prior mean: the network's own output, a constant per output, or zero. ``"auto"`` is the network's, or a
            constant under a new head.
        kernel: The tangent kernel ``"ntk"``, that of the readout ``"nngp"``, a stationary one, the sum
            ``"ntk+stationary"``, or ``"auto"``: of all these, the one with the largest evidence.
        num_outputs: C, if the readout is to be replaced by a fresh one; None to keep it.
        layer_variances: Learn one prior variance per layer instead of one for all.
        stationary: Form of the stationary kernel.
        stationary_inputs: Whether it compares inputs or the features that enter the readout.
        hyperparameters: ``"average"`` over their posterior, put them at its ``"maximum"``, or ``"auto"``: the first up
            to 300 labels. Or a mapping of names to values that are known, in units of the residuals' mean square.
        known_noise: Noise variances of the labels `[N, C]`, to which a learned one is added.
        noise_network: Maps inputs to the logarithm of the relative noise variance `[N]` or `[N, C]`.

    Raises:
        InputError: The targets do not have the right number of outputs, or a choice does not exist.

    Example:
        >>> import torch, gpntk
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> x = torch.rand(20, 2, dtype=torch.float64)
        >>> gp = TransferGP(gpntk.freeze(network), x, x.sum(-1, keepdim=True), mean="constant")
        >>> evidence = gp.fit()
        >>> gp.predict(x[:3]).mean.shape, gp.predict(x[:3], covariance=True).spread.shape
        (torch.Size([3]), torch.Size([3, 3]))

    References:
        Maddox et al. (2021), Fast Adaptation with Linearized Neural Networks, https://arxiv.org/abs/2103.01439.
        Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, eqs. 2.23-2.26 and section 2.7.
    """

    log_evidence: float
    """Of all labels, hyperparameters integrated out (at their maximum on the spectral path), in nats."""

    def __init__(
        self,
        network: FrozenNetwork,
        x: Tensor,
        y: Tensor,
        *,
        mean: MeanChoice = "auto",
        kernel: KernelChoice = "auto",
        num_outputs: int | None = None,
        layer_variances: bool = False,
        stationary: StationaryForm = "rbf",
        stationary_inputs: StationaryInputs | None = None,
        hyperparameters: Treatment | Mapping[str, float] = "auto",
        known_noise: Tensor | None = None,
        noise_network: nn.Module | None = None,
    ) -> None:
        check_choices(
            kernel=kernel,
            mean=mean,
            stationary=stationary,
            stationary_inputs=stationary_inputs,
            hyperparameters=hyperparameters,
            fresh=num_outputs is not None,
        )
        outputs = network.num_outputs(x) if num_outputs is None else num_outputs
        if y.shape != (x.shape[0], outputs):
            raise InputError(
                f"y has shape {tuple(y.shape)}, but {x.shape[0]} rows and a network with {outputs} output(s) need "
                f"{(x.shape[0], outputs)}: give one column of y per output, or num_outputs for a new head."
            )
        if y.isnan().all(0).any():
            raise InputError("y has an output with only missing values (NaN): give each at least one label.")
        self.network, self.x, self.y, self.num_outputs = network, x, y, outputs
        self._outputs = Outputs(network)
        self.mean: MeanChoice = ("network" if num_outputs is None else "constant") if mean == "auto" else mean
        self._kernel: KernelChoice = kernel
        self.known_noise, self._noise_network = known_noise, noise_network
        self._fresh, self._layer_variances = num_outputs is not None, layer_variances
        self._form: StationaryForm = stationary
        self._stationary_inputs: StationaryInputs | None = stationary_inputs
        self._treatment = hyperparameters
        self.centre = y.nanmean(0) if self.mean == "constant" else y.new_zeros(outputs)
        self.units = units_of(y, self._residual())
        self.comparison: Comparison | None = None
        self._engine: DenseGP | TangentRegression
        self._fixed = dict(hyperparameters) if isinstance(hyperparameters, Mapping) else None
        self._always_dense = False
        self._reference = len(x)
        self._arguments: dict[str, Any] = {
            "num_outputs": num_outputs,
            "layer_variances": layer_variances,
            "stationary": stationary,
            "noise_network": noise_network,
        }

    # --- fitting -----------------------------------------------------------------------------------------------

    @property
    def num_labels(self) -> int:
        """How many labels there are, those that are missing left out."""
        return int((~self.y.isnan()).sum())

    def fit(self) -> float:
        """Choose the kernel and infer its hyperparameters; returns the log marginal likelihood of the best ones.

        In nats, in the units of y.
        """
        if self._goes_spectral():
            if self._kernel == "auto":
                self.comparison = Comparison(self._builder.widest, {})
            engine = self._engine = self._tangent()
            self.log_evidence = engine.fit() - self._log_units()
            return self.log_evidence
        engine = self._dense(self._choose())
        start = None if self._screened is None else self._screened.best
        draws = engine.fit(self._averages(self.num_labels), self._fixed, start)
        self._engine, self.log_evidence = engine, draws.log_evidence - self._log_units()
        with torch.no_grad():
            return engine.log_likelihood(draws.best).item() - self._log_units()

    @property
    def chosen(self) -> Candidate:
        """The kernel in use."""
        if self.comparison is not None:
            return self.comparison.chosen
        kernel: KernelChoice = "ntk" if self._kernel == "auto" else self._kernel
        return Candidate(kernel, self._stationary_inputs or "inputs")

    # --- predictions -------------------------------------------------------------------------------------------

    def predict(self, x: Tensor, covariance: bool = False, observation_noise: bool = True) -> Prediction:
        """Posterior at x `[M, D]`: mean, and variances or covariance, of y (or of the noise-free function)."""
        with torch.no_grad():
            if covariance:
                return self._in_units(x, self._engine.predict(x, covariance=True), observation_noise)
            parts = [
                self._in_units(rows, self._engine.predict(rows), observation_noise)
                for rows in x.split(_PREDICTION_ROWS)
            ]
            return Prediction(*(torch.cat(pieces) for pieces in zip(*parts, strict=True)))

    def leave_one_out(self) -> Prediction | None:
        """Mean and variance of each label `[N*C]` given the others, in closed form; None beyond what is dense."""
        if not isinstance(self._engine, DenseGP):
            return None
        with torch.no_grad():
            return self._back(self.x, self._engine.leave_one_out())

    def condition_on(self, x: Tensor, y: Tensor, known_noise: Tensor | None = None) -> TransferGP:
        """The posterior given more labels as well, hyperparameters as they are."""
        grown = TransferGP.__new__(TransferGP)
        grown.__dict__ = {**self.__dict__}
        targets = (y - self._offset(x) - self.centre) / self.units
        if isinstance(self._engine, DenseGP):
            known = None if known_noise is None else known_noise / self.units.square()
            grown._engine = self._engine.condition_on(x, targets, self._relative_noise(x), known)
        elif known_noise is None and not y.isnan().any():
            grown._engine = self._engine.condition_on(x, targets)
        else:
            raise InputError(
                f"yvar and missing values of y cannot be taken in by kernel={self.chosen.kernel!r} fitted to "
                f"{self.num_labels} labels without: fit anew on all of them."
            )
        grown.x, grown.y = torch.cat([self.x, x]), torch.cat([self.y, y])
        if self.known_noise is not None or known_noise is not None:
            old, new = (
                torch.zeros_like(targets) if noise is None else noise
                for targets, noise in ((self.y, self.known_noise), (y, known_noise))
            )
            grown.known_noise = torch.cat([old, new])
        return grown

    @property
    def noise(self) -> Tensor:
        """Noise variance of each output `[C]`, in the units of y squared."""
        return self._engine.noise_variance() * self.units.square()

    def hyperparameters(self) -> dict[str, float]:
        """Their values by name, in units of the residuals' mean square; those of the largest weight."""
        if isinstance(self._engine, TangentRegression):
            return self._engine.hyperparameters()
        assert self._engine.draws is not None
        return named(self._engine.hyperparameters, self._engine.draws.best)

    def effective_parameters(self) -> float | None:
        """tr K (K + D)⁻¹; None beyond what is dense."""
        with torch.no_grad():
            return self._engine.effective_parameters() if isinstance(self._engine, DenseGP) else None

    # --- for reports -------------------------------------------------------------------------------------------

    @property
    def has_readout(self) -> bool:
        """Whether the network ends in a linear readout."""
        return self._builder.has_readout

    def variant(self, candidate: Candidate, mean: MeanChoice, rows: Tensor) -> TransferGP:
        """Another prior, fitted to some rows, hyperparameters at their maximum."""
        changed: dict[str, Any] = {"kernel": candidate.kernel, "stationary_inputs": candidate.stationary_inputs}
        changed |= {"known_noise": None if self.known_noise is None else self.known_noise[rows]}
        changed |= {"mean": mean, "hyperparameters": "maximum"}
        other = TransferGP(self.network, self.x[rows], self.y[rows], **{**self._arguments, **changed})
        other._always_dense = True
        other.fit()
        return other

    def residual_and_tangent_kernel(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What the prior mean leaves unexplained, in units, and the tangent kernel there, up to a factor."""
        residual = (self._residual() / self.units)[rows].nan_to_num(0.0)
        prior = self._builder.build(self._builder.widest)
        logs = torch.zeros(len(prior.hyperparameters), dtype=torch.float64, device="cpu")
        kernel = prior.covariance(logs, prior.parts(self.x[rows], self.x[rows]))
        return (residual if prior.shared else residual.reshape(-1)), kernel

    # --- files -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """What `fit` has learned, by name, for `load_state`."""
        own = {"units": self.units, "centre": self.centre, "reference": torch.tensor(self._reference, device="cpu")}
        if isinstance(self._engine, TangentRegression):
            return own | {f"gp.{name}": t.detach().clone() for name, t in self._engine.gp.state_dict().items()}
        assert self._engine.draws is not None
        return own | self._engine.draws.state()

    def load_state(self, state: Mapping[str, Tensor], chosen: Candidate) -> None:
        """Take what another `TransferGP` with the same arguments has learned, and the kernel that it chose."""
        self.units, self.centre = state["units"].to(self.y), state["centre"].to(self.y)
        self._reference = int(state["reference"])
        vars(self).pop("_builder", None)
        self.comparison = Comparison(chosen, {})
        if "draws.logs" in state:
            self._engine = self._dense(chosen)
            self._engine.set_draws(Draws.from_state(state))
            return
        tangent = self._tangent()
        tangent.gp.load_state_dict({k.removeprefix("gp."): t for k, t in state.items() if k.startswith("gp.")})
        tangent.gp.eval()
        self._engine = tangent

    # --- private -----------------------------------------------------------------------------------------------

    def _goes_spectral(self) -> bool:
        """Whether a single tangent kernel at the maximum of its marginal likelihood is what is wanted."""
        plain = self.known_noise is None and self._noise_network is None and not self.y.isnan().any()
        free = self._fixed is None and not self._fresh and not self._always_dense
        if plain and free and self._kernel in ("ntk", "nngp"):
            return not self._averages(self.num_labels)
        size = self.y.numel()
        if self._kernel == "auto" and size > DENSE_LIMIT and plain and free:
            return True
        if size > LARGEST_DENSE:
            raise InputError(
                f"{size} labels are more than the {LARGEST_DENSE} that a sum of kernels, known or missing labels' "
                "noise, a new head or given hyperparameters allow: use kernel='ntk' without these, or fewer labels."
            )
        return False

    def _averages(self, labels: int) -> bool:
        if self._treatment in ("average", "maximum"):
            return self._treatment == "average"
        return labels <= AVERAGE_LIMIT

    def _choose(self) -> Candidate:
        self._screened: Draws | None = None
        candidates = self._builder.candidates(self._stationary_inputs) if self._kernel == "auto" else [self.chosen]
        if len(candidates) == 1:
            return candidates[0]
        # All, or as many as make 300 labels.
        most = min(len(self.x), max(1, AVERAGE_LIMIT // self.num_outputs))
        rows = draw(len(self.x), most, seed=0)
        fits = {candidate: self._dense(candidate, rows).fit(average=False) for candidate in candidates}
        chosen = preferred({candidate: draws.log_evidence for candidate, draws in fits.items()}, self._fresh)
        self._screened = fits[chosen]
        shift = self._log_units(rows)
        self.comparison = Comparison(chosen, {str(c): draws.log_evidence - shift for c, draws in fits.items()})
        return chosen

    @property
    def _medians(self) -> Medians:
        return RESIDUAL if self.mean == "network" else TARGET

    @cached_property
    def _builder(self) -> PriorBuilder:
        return PriorBuilder(
            self.network,
            # Units are those of the rows that `fit` saw: hyperparameters mean the same for fewer and for more.
            self.x[: self._reference],
            num_outputs=self.num_outputs if self._fresh else None,
            layer_variances=self._layer_variances,
            form=self._form,
            medians=self._medians,
            constant=self.mean == "constant",
            units=self.units,
        )

    def _dense(self, candidate: Candidate, rows: Tensor | None = None) -> DenseGP:
        rows = torch.arange(len(self.x), device="cpu") if rows is None else rows
        rows = rows.to(self.x.device)
        x = self.x[rows]
        prior = self._builder.build(candidate)
        known = None if self.known_noise is None else (self.known_noise / self.units.square())[rows]
        targets = (self._residual() / self.units)[rows]
        noise = (self._medians.noise, self._medians.noise_spread)
        return DenseGP(prior, x, targets, noise, relative_noise=self._relative_noise(x), known_noise=known)

    def _tangent(self) -> TangentRegression:
        network = self._builder.network_of(self.chosen)
        if self.num_outputs > 1:
            rescaled = Rescaled(network.thaw(), self.units.to(network.dtype), network.extract)
            network = FrozenNetwork(rescaled, [f"network.{escape(n)}" for n in network.names], network.input_shape)
        constant, layers = self.mean == "constant", self._layer_variances
        return TangentRegression(network, self.x, self._residual() / self.units, constant, layers)

    def _relative_noise(self, x: Tensor) -> Tensor | None:
        return None if self._noise_network is None else relative_noise(self._noise_network, x, self.num_outputs)

    def _offset(self, x: Tensor) -> Tensor:
        """What the GP need not explain `[N, C]`."""
        if self.mean == "network":
            return self._outputs(x)
        return torch.zeros(x.shape[0], self.num_outputs, dtype=x.dtype, device=x.device)

    def _residual(self) -> Tensor:
        return self.y - self._offset(self.x) - self.centre

    def _log_units(self, rows: Tensor | None = None) -> float:
        """Sum over labels of the logarithm of their unit: what a density gains by being measured in it."""
        seen = ~self.y.isnan() if rows is None else ~self.y[rows.to(self.y.device)].isnan()
        return float((seen * self.units.log()).sum())

    def _back(self, x: Tensor, prediction: Prediction) -> Prediction:
        """A prediction of residuals in units, as one of y; x `[M, D]`."""
        units = self.units.repeat(len(x))
        spread = prediction.spread * (units.square() if prediction.spread.dim() == 1 else torch.outer(units, units))
        offset = (self._offset(x) + self.centre).reshape(-1)
        return Prediction(offset + units * prediction.mean, spread)

    def _in_units(self, x: Tensor, prediction: Prediction, observation_noise: bool) -> Prediction:
        mean, spread = prediction
        if observation_noise:
            relative = self._relative_noise(x)
            noise = torch.ones_like(mean) if relative is None else relative.reshape(-1)
            noise = self._engine.noise_variance() * noise
            spread = spread + (noise if spread.dim() == 1 else noise.diag())
        return self._back(x, Prediction(mean, spread))
