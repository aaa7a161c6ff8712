"""Transfer learning with a frozen source network: tensors in, tensors out.

    y = m(x) + g(x) + noise,    g ~ GP(0, K)

With m(x) = f(x; w*) and K(x, x') = s J(x) J(x')ᵀ this is Bayesian linear regression in the tangent space of the network
at its pretrained weights. A stationary kernel, added to K, stands for what that space cannot say.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any, final, get_args

import torch
from gpytorch.kernels import Kernel
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn

from gpntk._checks import check_choice, check_flags, check_input
from gpntk._types import PriorGroups
from gpntk.errors import InputError
from gpntk.inference.hyperposterior import Draws, Treatment, named
from gpntk.io import Checkpoint, Identity, described
from gpntk.likelihoods import Link
from gpntk.network import FrozenNetwork
from gpntk.network.heads import with_readout
from gpntk.network.selection import select_groups
from gpntk.transfer.candidates import ALL, Candidate, Comparison, KernelChoice, MeanChoice, StationaryInputs
from gpntk.transfer.choices import check_choices, check_data
from gpntk.transfer.fitting import Fit, Fitting
from gpntk.transfer.forms import DenseForm, FeatureForm, Recipe
from gpntk.transfer.labels import Likelihood, classes, targets
from gpntk.transfer.prior import PriorBuilder, StationaryForm, WeightPrior
from gpntk.transfer.task import AbstractTask, Prediction

_PREDICTION_ROWS = 512
# Inputs whose outputs tell networks apart.
_COMPARED = 16


@final
class TransferGP:
    """A GP for the target task on top of a frozen source network.

    `TransferRegressor` is its scikit-learn face; use this one for tensors on any device.

    Args:
        network: The source network, frozen.
        x: Inputs of the target task `[N, D]`.
        y: Targets `[N, C]`, NaN where missing; or classes `[N]`, integers from 0.
        likelihood: What labels say: targets with ``"gaussian"`` noise; classes by ``"categorical"`` (softmax of logits,
            by Laplace's approximation) or ``"dirichlet"`` (regression on transformed labels, in closed form).
        num_classes: K. Default: that of the network's outputs, or under a new head one more than the largest label.
        known_noise: Noise variances of the labels `[N, C]`, to which a learned one is added.
        weights: Of labels `[N]`: the variances of their noise are divided by them; not for ``"categorical"``.
        noise_network: Maps inputs to the logarithm of the relative noise variance `[N]` or `[N, C]`.
        mean, kernel, ...: The options that the estimators have, too: see `gpntk.estimators.base.TransferEstimator`.

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

    def __init__(
        self,
        network: FrozenNetwork,
        x: Tensor,
        y: Tensor,
        *,
        likelihood: Likelihood = "gaussian",
        num_classes: int | None = None,
        mean: MeanChoice = "auto",
        kernel: KernelChoice | Kernel = "auto",
        new_head: bool = False,
        layer_variances: bool = False,
        prior_groups: PriorGroups | None = None,
        prior: WeightPrior = "equal",
        stationary: StationaryForm = "rbf",
        stationary_inputs: StationaryInputs | None = None,
        hyperparameters: Treatment | Mapping[str, float] = "auto",
        known_noise: Tensor | None = None,
        weights: Tensor | None = None,
        noise_network: nn.Module | None = None,
        time_budget: float = 120.0,
    ) -> None:
        if not isinstance(network, FrozenNetwork):
            raise InputError(f"network is a {type(network).__name__}: freeze it first, with gpntk.freeze(network).")
        check_choices(
            likelihood=likelihood,
            kernel=kernel,
            mean=mean,
            prior=prior,
            stationary=stationary,
            stationary_inputs=stationary_inputs,
            hyperparameters=hyperparameters,
            new_head=new_head,
            layer_variances=layer_variances,
            time_budget=time_budget,
        )
        check_data(x, y, network.device, noise_network)
        if prior_groups is not None:
            if layer_variances:
                raise InputError("layer_variances=True and prior_groups= both say which variances there are: give one.")
            network, layer_variances = network.grouped(select_groups(network.names, prior_groups)), True
        self.network, self.likelihood = with_readout(network, x) if new_head else network, likelihood
        self._grouped, self._prior = prior_groups is not None, prior
        self._kernel: KernelChoice | Kernel = kernel
        self._moves = ALL
        self._new_head, self._layer_variances = new_head, layer_variances
        self._form: StationaryForm = stationary
        if stationary_inputs == "inputs" and not network.adapter.continuous:
            raise InputError(
                "stationary_inputs='inputs', but x holds ids, masks or objects, whose distances mean nothing: choose "
                f"'features'. ({network.adapter})"
            )
        self._stationary_inputs: StationaryInputs | None = stationary_inputs
        self._treatment: Treatment = "auto" if isinstance(hyperparameters, Mapping) else hyperparameters
        self._fixed = dict(hyperparameters) if isinstance(hyperparameters, Mapping) else None
        self._time_budget, self._free_mean = time_budget, mean == "auto" and not new_head
        asked: dict[str, Any] = {"mean": mean, "new_head": new_head, "weights": weights}
        self._task: AbstractTask
        if likelihood == "gaussian":
            noise = {"known_noise": known_noise, "noise_network": noise_network}
            self._task = targets(self.network, x, y, **asked, **noise, time_budget=time_budget)
        else:
            self._task = classes(self.network, x, y, **asked, likelihood=likelihood, num_classes=num_classes)
        # Units of the kernels are those of the rows that `fit` saw: hyperparameters mean the same for more rows.
        self._reference = len(x)
        self._fit: Fit | None = None

    # --- fitting -----------------------------------------------------------------------------------------------

    def fit(self, checkpoint: str | os.PathLike[str] | None = None) -> float:
        """Choose the kernel and infer its hyperparameters; returns the log evidence at the best ones.

        In nats, in the units of y; NaN where conjugate gradients solve the posterior, which only estimate it.

        Args:
            checkpoint: File in which the best hyperparameters of each search are kept after each step. If it exists,
                the fit goes on from there.

        Raises:
            FileFormatError: ``checkpoint`` is damaged, or belongs to another model or other data.
        """
        file = None if checkpoint is None else Checkpoint(checkpoint, "fit", self._identity())
        fitting = self._fitting(file)
        if self._doubts_network:
            fitting = fitting.against(self._around(self.task.plain_mean)._fitting(file))
        self._fit = fitting.run()
        self._task, self._builder = fitting.task, fitting.builder
        return self._fit.model.log_evidence() - self.task.log_units()

    def _identity(self) -> Identity:
        """What distinguishes this fit from others; the mean output tells networks of the same weights apart."""
        network, x = self.network, self.task.x
        options = self._kernel, self._new_head, self._layer_variances, self._form, self._stationary_inputs, self._prior
        return {
            **{f"data {name}": described(tensor) for name, tensor in self.task.data().items()},
            "network's weights": described(network.tensors(network.dtype, network.device)),
            "mean output": network.forward(x[:_COMPARED]).double().mean().item(),
            "parameters": " ".join(f"{network.group_of(name)}: {name}" for name in network.names),
            "options": str((self.likelihood, self.task.mean, *options, self._treatment, self._fixed)),
            "time budget": self._time_budget,
        }

    @property
    def fitted(self) -> Fit:
        """The model, the kernel and the comparison that `fit` found.

        Raises:
            NotFittedError: `fit` was not called yet.
        """
        if self._fit is None:
            raise NotFittedError("this TransferGP is not fitted yet: call fit() first.")
        return self._fit

    @property
    def chosen(self) -> Candidate:
        """The kernel in use."""
        if self._fit is not None:
            return self._fit.chosen
        if isinstance(self._kernel, Kernel):
            return Candidate("custom")
        default: StationaryInputs = "inputs" if self.network.adapter.continuous else "features"
        kernel = "ntk" if self._kernel == "auto" else self._kernel
        return Candidate(kernel, self._stationary_inputs or default, moves=self._moves)

    @property
    def comparison(self) -> Comparison | None:
        """What kernels were compared, and their log evidence; None if there was no choice."""
        return None if self._fit is None else self._fit.comparison

    # --- predictions -------------------------------------------------------------------------------------------

    def predict(self, x: Tensor, covariance: bool = False, observation_noise: bool = True) -> Prediction:
        """Posterior at x `[M, D]`: mean, and variances or covariance, of y (or of the noise-free function)."""
        check_flags(covariance=covariance, observation_noise=observation_noise)
        return self.task.predict(self.fitted.model, self._checked(x), covariance, observation_noise)

    def predict_mean(self, x: Tensor) -> Tensor:
        """The posterior mean alone `[M*C]`, which costs no solve."""
        return self.task.mean_at(self.fitted.model, self._checked(x))

    def probabilities(self, x: Tensor, link: Link = "probit") -> Tensor:
        """Probabilities of the classes at x `[M, D]`: `[M, K]`."""
        model = self.fitted.model
        check_choice(get_args(Link), link=link)
        parts = self._checked(x).split(_PREDICTION_ROWS)
        return torch.cat([self.task.probabilities(model, rows, link) for rows in parts])

    def leave_one_out(self) -> Any:
        """What all other labels say of each, in closed form.

        Of targets, mean and variance `[N*C]` as a `Prediction`, noise included; of classes, probabilities `[N, K]`.
        """
        return self.task.leave_one_out(self.fitted.model)

    def condition_on(
        self, x: Tensor, y: Tensor, known_noise: Tensor | None = None, weights: Tensor | None = None
    ) -> TransferGP:
        """The posterior given more labels as well, hyperparameters as they are."""
        check_data(x, y, self.x.device)
        grown = copy.copy(self)
        grown._task, model = self.task.grown(self.fitted.model, self._checked(x), y, known_noise, weights)
        grown._fit = self.fitted._replace(model=model)
        return grown

    # --- what was learned --------------------------------------------------------------------------------------

    @property
    def task(self) -> AbstractTask:
        """The labels, and what they are taken for."""
        return self._task

    @property
    def x(self) -> Tensor:
        """Inputs of all labels `[N, D]`."""
        return self.task.x

    @property
    def noise(self) -> Tensor:
        """Noise variance of each output `[C]`, in the units of y squared."""
        units = self.x.new_ones(self.task.num_outputs) if self.task.units is None else self.task.units
        return self.fitted.model.noise_variance() * units.square()

    @property
    def log_evidence(self) -> float:
        """Of all labels, hyperparameters integrated out, in nats; NaN for more than a few hundred labels."""
        return self.fitted.model.draws.log_evidence - self.task.log_units()

    def hyperparameters(self) -> dict[str, float]:
        """Their values by name, in units of the residuals' mean square; those of the largest weight."""
        model = self.fitted.model
        return named(model.hyperparameters, model.draws.best)

    # --- for reports -------------------------------------------------------------------------------------------

    @property
    def has_readout(self) -> bool:
        """Whether the network ends in a linear readout."""
        return self._builder.has_readout

    def variant(self, candidate: Candidate, mean: MeanChoice, rows: Tensor) -> TransferGP:
        """Another prior, fitted to some rows, hyperparameters at their maximum."""
        other = self._around(mean, rows)
        other._kernel = self._kernel if candidate.kernel == "custom" else candidate.kernel
        other._stationary_inputs, other._moves = candidate.stationary_inputs, candidate.moves
        other._treatment, other._fixed, other._reference = "maximum", None, len(rows)
        # Few rows are always worth an exact fit: priors are compared by their evidence.
        other._time_budget = math.inf
        other.fit()
        return other

    def tangent_kernel(self, rows: Tensor) -> tuple[Tensor, bool]:
        """The tangent kernel of some rows, up to a factor, and whether it is that of every output."""
        prior = self._builder.build(self._builder.widest, self.task.shared("screening"))
        logs = torch.zeros(len(prior.hyperparameters), dtype=torch.float64, device="cpu")
        with torch.no_grad():
            return prior.matrix(logs, self.x[rows], self.x[rows]), prior.shared

    # --- files -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """What `fit` has learned, by name, for `load_state`."""
        model = self.fitted.model
        reference = {"reference": torch.tensor(self._reference, device="cpu")}
        recipe = {} if model.form.recipe is None else model.form.recipe.state()
        return self.task.state() | reference | model.draws.state() | recipe

    def load_state(self, state: Mapping[str, Tensor], chosen: Candidate) -> None:
        """Take what another `TransferGP` with the same arguments has learned, and the kernel that it chose."""
        if chosen.mean != "auto":
            self._task = self._around(chosen.mean).task
        self.task.load_state(state)
        self._reference = int(state["reference"])
        vars(self).pop("_builder", None)
        recipe = Recipe.from_state(state)
        prior = self._builder.build(chosen, self.task.shared("features" if recipe else "matrix"))
        form = DenseForm(prior, self.x) if recipe is None else FeatureForm(prior, self.x, recipe, self._reference)
        model = self.task.model(form)
        model.set_draws(Draws.from_state(state, len(model.hyperparameters)))
        self._fit = Fit(model, chosen, None, ())

    # --- private -----------------------------------------------------------------------------------------------

    def _checked(self, x: Tensor) -> Tensor:
        check_input(x, self.x.device, columns=self.x.shape[1])
        return x

    def _fitting(self, file: Checkpoint | None) -> Fitting:
        options: dict[str, Any] = {"treatment": self._treatment, "fixed": self._fixed}
        return Fitting(
            self.task, self._builder, self._candidates, **options, time_budget=self._time_budget, checkpoint=file
        )

    @property
    def _candidates(self) -> list[Candidate]:
        if isinstance(self._kernel, Kernel) or self._kernel != "auto":
            return [self.chosen]
        listed = self._builder.candidates(self._stationary_inputs)
        if not (self._free_mean and self.task.mean == self.task.plain_mean):
            return listed
        # Without the network's output, what would be tried without the network.
        return [candidate._replace(mean=self.task.mean) for candidate in listed if candidate.kernel == "stationary"]

    @property
    def _doubts_network(self) -> bool:
        """Whether the network's output is the prior mean until the labels say else."""
        free = self._free_mean and self.likelihood == "gaussian" and self._kernel == "auto"
        return free and self.task.mean == "network"

    def _around(self, mean: MeanChoice, rows: Tensor | None = None) -> TransferGP:
        """The same labels, or some rows of them, around another prior mean."""
        other = copy.copy(self)
        vars(other).pop("_builder", None)
        rows = torch.arange(len(self.x), device=self.x.device) if rows is None else rows
        other._task, other._fit = self.task.variant(rows, mean), None
        return other

    @cached_property
    def _builder(self) -> PriorBuilder:
        return PriorBuilder(
            self.network,
            self.x[: self._reference],
            num_outputs=self.task.num_outputs,
            new_head=self._new_head,
            layer_variances=self._layer_variances,
            grouped=self._grouped,
            form=self._form,
            medians=self.task.medians,
            constant=self.task.mean == "constant",
            units=self.task.units,
            time_budget=self._time_budget,
            newton_flops=self.task.flops(self._reference) if self.task.row_per_output else 0.0,
            custom=self._kernel if isinstance(self._kernel, Kernel) else None,
            g=self._prior == "g",
            root=self.task.root(self._reference) if self._prior == "g" else None,
        )
