"""Classification on a target task with a frozen source network: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from typing import Literal, final

import torch
from torch import Tensor
from torch.nn import functional

from gpntk.errors import InputError
from gpntk.inference.features import draw
from gpntk.inference.hyperposterior import Draws, Treatment, named
from gpntk.likelihoods import Link, probabilities
from gpntk.likelihoods.targets import check_labels
from gpntk.network import FrozenNetwork
from gpntk.transfer.components import StationaryForm
from gpntk.transfer.dense_dirichlet import DenseDirichlet
from gpntk.transfer.dense_laplace import DenseLaplace
from gpntk.transfer.prior import (
    LOGITS,
    RESIDUAL_LOGITS,
    Candidate,
    Comparison,
    KernelChoice,
    MeanChoice,
    Medians,
    PriorBuilder,
    StationaryInputs,
    check_choices,
    preferred,
)
from gpntk.transfer.remembered import Outputs
from gpntk.transfer.variational import Variational

# Logits up to which the tangent kernel between different outputs is kept; beyond, they share its mean over outputs.
FULL_LIMIT = 300
# Inputs up to which methods that factorise are the default, and up to which they are possible.
DENSE_LIMIT = 2_000
LARGEST_DENSE = 5_000
_SCREENED = 100
# Inputs whose evidence sets the hyperparameters; more of them hardly move it.
_EVIDENCE_ROWS = 300
# Inputs up to which Dirichlet regression averages, which needs C factorisations kept for every draw.
_AVERAGED_DIRICHLET = 300
_PREDICTION_ROWS = 512


Method = Literal["auto", "laplace", "dirichlet", "variational"]
"""How the posterior is approximated.

``"auto"`` is, up to 2,000 inputs, Laplace's method under the network's own head and Dirichlet regression under a fresh
one: with a prior mean of zero and large variances, the Gaussian at the mode says too little. Beyond, the variational
method.
"""


@final
class TransferClassification:
    """Class probabilities for the target task on top of a frozen source network: a GP over logits.

        p(class k | x) = softmax_k(f(x)),   f ~ GP(f(x; w*), K)

    `TransferClassifier` is its scikit-learn face.

    Args:
        network: The source network, frozen; its outputs are logits.
        x: Inputs of the target task `[N, D]`.
        labels: Classes `[N]`, integers from 0 to K - 1.
        num_classes: K.
        fresh: Whether the readout is replaced by a fresh one with K outputs, because the network's mean other classes.
        mean: Prior mean of the logits: the network's own, a constant per class, or zero. ``"auto"`` is the network's,
            or zero under a fresh head.
        kernel: As for `TransferGP`.
        layer_variances: Learn one prior variance per layer instead of one for all.
        stationary: Form of the stationary kernel.
        stationary_inputs: Whether it compares inputs or the features that enter the readout.
        hyperparameters: As for `TransferGP`; ``"auto"`` averages.
        method: See `Method`.

    Raises:
        InputError: Labels are out of range, or the network has not K outputs (or one, for K = 2).

    Example:
        >>> import torch, gpntk
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).double()
        >>> x = torch.rand(12, 2, dtype=torch.float64)
        >>> model = TransferClassification(gpntk.freeze(network), x, x.argmax(-1), num_classes=2, fresh=True)
        >>> evidence = model.fit()
        >>> model.predict(x[:4]).shape
        torch.Size([4, 2])

    References:
        Immer, Korzepa and Bauer (2021), Improving predictions of Bayesian neural nets via local linearization,
        https://arxiv.org/abs/2008.08400.
        Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, chapter 3.
    """

    def __init__(
        self,
        network: FrozenNetwork,
        x: Tensor,
        labels: Tensor,
        num_classes: int,
        *,
        fresh: bool = False,
        mean: MeanChoice = "auto",
        kernel: KernelChoice = "auto",
        layer_variances: bool = False,
        stationary: StationaryForm = "rbf",
        stationary_inputs: StationaryInputs | None = None,
        hyperparameters: Treatment | Mapping[str, float] = "auto",
        method: Method = "auto",
    ) -> None:
        check_choices(
            kernel=kernel,
            mean=mean,
            stationary=stationary,
            stationary_inputs=stationary_inputs,
            hyperparameters=hyperparameters,
            fresh=fresh,
        )
        check_labels(labels, num_classes)
        outputs = network.num_outputs(x)
        if not fresh and not (outputs == num_classes or (outputs == 1 and num_classes == 2)):
            raise InputError(
                f"num_classes={num_classes}, but the network has {outputs} output(s): give fresh=True for a new head."
            )
        if method not in ("auto", "laplace", "dirichlet", "variational"):
            raise InputError(f"method={method!r}: choose 'auto', 'laplace', 'dirichlet' or 'variational'.")
        default: Method = "variational" if len(x) > DENSE_LIMIT else "dirichlet" if fresh else "laplace"
        self.method: Method = default if method == "auto" else method
        if self.method == "variational" and (layer_variances or mean == "constant" or hyperparameters != "auto"):
            raise InputError(
                "method='variational' (the default for more than 2,000 inputs) has no layer_variances, no "
                "mean='constant' and no choice of hyperparameters: leave these at their defaults."
            )
        if len(x) > LARGEST_DENSE and self.method != "variational":
            raise InputError(
                f"{len(x)} inputs are more than the {LARGEST_DENSE} that method={method!r} allows: use "
                "method='variational', or fewer inputs."
            )
        self.network, self.x, self.labels, self.num_classes = network, x, labels, num_classes
        self._outputs = Outputs(network)
        # A fresh head has a logit per class, two included.
        self.num_logits = num_classes if fresh else outputs
        self.mean: MeanChoice = ("zero" if fresh else "network") if mean == "auto" else mean
        self._kernel: KernelChoice = kernel
        self.fresh, self._treatment = fresh, hyperparameters
        self._layer_variances = layer_variances
        self._form: StationaryForm = stationary
        self._stationary_inputs: StationaryInputs | None = stationary_inputs
        self._fixed = dict(hyperparameters) if isinstance(hyperparameters, Mapping) else None
        self.comparison: Comparison | None = None
        self.log_evidence = float("nan")
        # Units of the inputs are those of the rows that `fit` saw.
        self._reference = len(x)
        self._engine: DenseLaplace | DenseDirichlet | Variational

    def fit(self) -> float:
        """Choose the kernel and infer its hyperparameters; returns the log evidence at the best ones, in nats.

        That of the method: Laplace's approximation, the density of the transformed labels, or the lower bound.
        """
        only = "inputs" if self.method == "variational" else self._stationary_inputs
        candidates = self._builder.candidates(only) if self._kernel == "auto" else [self.chosen]
        start: Tensor | None = None
        if len(candidates) > 1:
            rows = draw(len(self.x), min(len(self.x), _SCREENED), seed=0)
            fits = {c: self._some(c, rows).fit(average=False) for c in candidates}
            evidence = {candidate: draws.log_evidence for candidate, draws in fits.items()}
            chosen = preferred(evidence, self.fresh)
            self.comparison = Comparison(chosen, {str(c): value for c, value in evidence.items()})
            start = fits[chosen].best
        engine = self._engine = self._make_engine()
        if isinstance(engine, Variational):
            self.log_evidence = engine.fit()
            return self.log_evidence
        if isinstance(engine, DenseLaplace):
            few = len(self.x) <= _EVIDENCE_ROWS
            subset = None if few else self._laplace(self.chosen, draw(len(self.x), _EVIDENCE_ROWS, seed=0))
            draws = engine.fit(self._averages(), self._fixed, start, subset)
        else:
            draws = engine.fit(self._averages(), self._fixed, start)
        self.log_evidence = draws.log_evidence
        return engine.best_evidence

    @property
    def chosen(self) -> Candidate:
        """The kernel in use."""
        if self.comparison is not None:
            return self.comparison.chosen
        return Candidate("ntk" if self._kernel == "auto" else self._kernel, self._stationary_inputs or "inputs")

    def predict(self, x: Tensor, link: Link = "probit") -> Tensor:
        """Probabilities of the classes at x `[M, D]`: `[M, K]`."""
        return torch.cat([self._engine.predict(rows, self._offset(rows), link) for rows in x.split(_PREDICTION_ROWS)])

    def leave_one_out(self) -> Tensor | None:
        """Probabilities of the classes of each input given the other labels `[N, K]`, in closed form.

        None for the variational method.
        """
        return None if isinstance(self._engine, Variational) else self._engine.leave_one_out()

    def condition_on(self, x: Tensor, labels: Tensor) -> TransferClassification:
        """The posterior given more labels as well, hyperparameters as they are."""
        if isinstance(self._engine, Variational):
            raise InputError("method='variational' cannot take in more labels: fit anew on all of them.")
        check_labels(labels, self.num_classes)
        grown = TransferClassification.__new__(TransferClassification)
        grown.__dict__ = {**self.__dict__}
        grown._engine = self._engine.condition_on(x, labels, self._offset(x))
        grown.x, grown.labels = torch.cat([self.x, x]), torch.cat([self.labels, labels])
        return grown

    def hyperparameters(self) -> dict[str, float]:
        """Their values by name; those of the largest weight."""
        if isinstance(self._engine, Variational):
            return self._engine.values()
        assert self._engine.draws is not None
        prior = self._engine.hyperparameters
        return named(prior, self._engine.draws.best[: len(prior)])

    # --- for reports -------------------------------------------------------------------------------------------

    @property
    def has_readout(self) -> bool:
        """Whether the network ends in a linear readout."""
        return self._builder.has_readout

    def variant(self, candidate: Candidate, mean: MeanChoice, rows: Tensor) -> TransferClassification:
        """Another prior, fitted to some rows, hyperparameters at their maximum."""
        other = TransferClassification(
            self.network,
            self.x[rows],
            self.labels[rows],
            self.num_classes,
            fresh=self.fresh,
            mean=mean,
            kernel=candidate.kernel,
            layer_variances=self._layer_variances,
            stationary=self._form,
            stationary_inputs=candidate.stationary_inputs,
            hyperparameters="maximum",
            method="laplace",
        )
        other.fit()
        return other

    def residual_and_tangent_kernel(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Labels less the probabilities of the prior mean `[N, K]`, and the tangent kernel there, up to a factor."""
        prior = self._builder.build(self._builder.widest, shared=True)
        logs = torch.zeros(len(prior.hyperparameters), dtype=torch.float64, device="cpu")
        kernel = prior.covariance(logs, prior.parts(self.x[rows], self.x[rows]))
        latent = self._offset(self.x[rows])
        expected = probabilities(latent, torch.zeros_like(latent).diag_embed())
        return functional.one_hot(self.labels[rows], self.num_classes) - expected, kernel

    # --- files -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """What `fit` has learned, by name, for `load_state`."""
        if isinstance(self._engine, Variational):
            return {name: tensor.detach().clone() for name, tensor in self._engine.gp.state_dict().items()}
        assert self._engine.draws is not None
        return self._engine.draws.state() | {"reference": torch.tensor(self._reference, device="cpu")}

    def load_state(self, state: Mapping[str, Tensor], chosen: Candidate) -> None:
        """Take what another `TransferClassification` with the same arguments has learned."""
        self.comparison = Comparison(chosen, {})
        self._reference = int(state.get("reference", torch.tensor(len(self.x), device="cpu")))
        vars(self).pop("_builder", None)
        self._engine = self._make_engine()
        if isinstance(self._engine, Variational):
            self._engine.gp.load_state_dict(dict(state))
            self._engine.gp.eval()
            return
        self._engine.set_draws(Draws.from_state(state))

    # --- private -----------------------------------------------------------------------------------------------

    def _averages(self) -> bool:
        if self.method == "dirichlet" and len(self.x) > _AVERAGED_DIRICHLET:
            return self._treatment == "average"
        return self._treatment in ("auto", "average")

    @cached_property
    def _builder(self) -> PriorBuilder:
        outputs = self.num_logits if self.fresh else None
        constant = self.mean == "constant"
        return PriorBuilder(
            self.network,
            self.x[: self._reference],
            num_outputs=outputs,
            layer_variances=self._layer_variances,
            form=self._form,
            medians=self._medians(),
            constant=constant,
        )

    def _medians(self) -> Medians:
        return RESIDUAL_LOGITS if self.mean == "network" else LOGITS

    def _make_engine(self) -> DenseLaplace | DenseDirichlet | Variational:
        everything = torch.arange(len(self.x), device="cpu")
        if self.method == "laplace":
            return self._laplace(self.chosen, everything)
        if self.method == "dirichlet":
            return self._dirichlet(self.chosen, everything)
        mean = self.network if self.mean == "network" else None
        return Variational(
            self._builder.tangents(self.chosen),
            candidate=self.chosen,
            form=self._form,
            mean=mean,
            x=self.x,
            labels=self.labels,
            num_logits=self.num_logits,
            medians=self._medians(),
        )

    def _some(self, candidate: Candidate, rows: Tensor) -> DenseLaplace | DenseDirichlet:
        """What kernels are compared by, on some rows."""
        make = self._dirichlet if self.method == "dirichlet" else partial(self._laplace, shared=True)
        return make(candidate, rows)

    def _dirichlet(self, candidate: Candidate, rows: Tensor) -> DenseDirichlet:
        rows = rows.to(self.x.device)
        x = self.x[rows]
        prior = self._builder.build(candidate, shared=True)
        return DenseDirichlet(prior, x, self.labels[rows], self._offset(x), self.num_classes)

    def _laplace(self, candidate: Candidate, rows: Tensor, shared: bool | None = None) -> DenseLaplace:
        rows = rows.to(self.x.device)
        if shared is None:
            shared = self._reference * self.num_logits > FULL_LIMIT
        prior = self._builder.build(candidate, shared)
        x = self.x[rows]
        return DenseLaplace(prior, x, self.labels[rows], self._offset(x))

    def _offset(self, x: Tensor) -> Tensor:
        """The prior mean of the logits `[N, C]`."""
        if self.mean == "network":
            return self._outputs(x)
        return torch.zeros(x.shape[0], self.num_logits, dtype=x.dtype, device=x.device)
