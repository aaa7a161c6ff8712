"""What the estimators share: validation, the frozen network, files."""

from __future__ import annotations

import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from glob import escape
from types import NoneType
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from gpytorch.kernels import Kernel
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from gpntk._checks import as_tensor, check_choice, check_flags, check_kinds
from gpntk._types import Extract, ParameterSelection, PriorGroups
from gpntk.errors import FileFormatError, InputError, NetworkError, SelectionError
from gpntk.estimators.arrays import as_array, refusing
from gpntk.inference.hyperposterior import Treatment
from gpntk.io import Contents, load_tensors, save_tensors
from gpntk.network import Adapter, FrozenNetwork, freeze
from gpntk.network.batches import is_batch, num_rows
from gpntk.network.calls import wants_integers
from gpntk.network.freezing import with_weights
from gpntk.transfer import TransferGP
from gpntk.transfer.candidates import Candidate, KernelChoice, MeanChoice, StationaryInputs
from gpntk.transfer.prior import StationaryForm, WeightPrior
from gpntk.transfer.report import Report, report_on

Inputs = ArrayLike | Mapping[str, Any] | Sequence[Any] | Tensor
"""What a network takes: an array, a dictionary, several tensors, or a list of objects."""

Kinds = type | tuple[type, ...]

# Inputs at which a network is compared with the one that was saved.
_COMPARED = 4
_TWICE = (
    "the network was trained on these labels, it was said, or it hits them so closely that it seems so. Then this fit "
    "counts them twice, and is too sure. Fit to labels that it has not seen, or take gpntk.models.LaplacePosterior "
    "with the prior of the training, of mean f(x; w) - J(x) w. trained_on=False says that they are new."
)
# Options that are written to a file, and what they are; the network and what is code are not.
_STORED: Mapping[str, Kinds] = {
    "mean": str,
    "kernel": str,
    "new_head": bool,
    "layer_variances": bool,
    "prior_groups": (list, NoneType),
    "prior": str,
    "stationary": str,
    "stationary_inputs": (str, NoneType),
    "hyperparameters": (str, dict),
    "time_budget": (int, float),
    "trained_on": (bool, NoneType),
    "dtype": str,
    "input_shape": (list, NoneType),
    "verbose": bool,
}


@dataclass(eq=False, repr=False)
class TransferEstimator(BaseEstimator, ABC):
    """A model of the target task on a frozen source network, with scikit-learn's conventions.

    X is an array `[N, ...]`, or what else the network takes: token ids, a tokenizer's dictionary of tensors, a tuple of
    tensors, or a list of objects; see `gpntk.network.Adapter`.

    Args:
        network: The source network, in eval mode. It is copied when `fit` is called and never changed.
        mean: Prior mean: ``"network"``, its output f(x; w*), so that the GP learns the residual; ``"constant"``, one
            number per output; or ``"zero"``. ``"auto"`` is the network's, or under a new head a constant (for classes
            zero). With ``kernel="auto"`` it is a constant too where that explains targets better by 3 nats, which a
            warning says.
        kernel: ``"ntk"``, the tangent kernel; ``"nngp"``, that of the readout alone; ``"stationary"``, an ARD kernel of
            the inputs or the features; ``"ntk+stationary"``, the sum, for what the tangent space cannot say. ``"auto"``
            compares them by their evidence and keeps the sum unless another is better by three nats, at any number of
            labels. Or any kernel of GPyTorch's, sums with ours included, with the priors registered for its parameters:
            a covariance of the residuals in units of their root mean square.
        new_head: Replace the readout even though the number of outputs fits, because they mean something else.
        parameters: Which parameters may move: ``None`` for all, glob(s) over their names, ``"readout"`` for the last
            layer, or a predicate of name and parameter.
        layer_variances: Learn one prior variance per layer instead of a single one.
        prior_groups: Learn one for each of these groups of parameters, ``{"body": "encoder.*", "head": "fc.*"}``:
            glob(s) over their names; the last group that matches a parameter has it.
        prior: Prior variances of the parameters that share a learned one: all ``"equal"``, or ``"g"``, the inverse of
            how much the labels' inputs tell of each (`gpntk.kernels.g_prior`). Learned ones are factors beside.
        stationary: Form of the stationary kernel, ``"rbf"`` or ``"matern"`` (5/2).
        stationary_inputs: What it compares: ``"inputs"``, or the ``"features"`` that enter the readout. Default: the
            inputs, or with ``kernel="auto"`` the better one.
        hyperparameters: ``"average"`` over their posterior, put them at its ``"maximum"``, or ``"auto"``: the first for
            up to 300 labels, and for classes. Or a mapping with values to be kept, by their names in
            ``hyperparameters_``.
        time_budget: Seconds that a fit may take. A kernel that would take longer is left out, and a line in the log and
            in ``report_`` says what it would cost. Deviations that take a factorisation of their own may take twice as
            long.
        trained_on: Whether the network was trained on these labels, so that a fit counts them a second time: ``True``
            warns and says what to do instead, and so does the default, ``None``, where the network hits the labels too
            closely for new ones. ``False``: it has never seen them.
        input_shape: Shape of one input as the network wants it. Default: the shape of the rows of X.
        extract: Which of the things that the network returns is its output: see `gpntk.FrozenNetwork`.
        dtype: Precision of Jacobians, ``"float64"`` or ``"float32"``; the network's outputs and features are computed
            in its own, and systems are solved in double precision.
        checkpoint: File in which `fit` keeps its best hyperparameters after each step; a `fit` to the same data that
            finds it goes on from there.
        verbose: Print the report after `fit`.
    """

    network: nn.Module
    _: KW_ONLY
    mean: MeanChoice = "auto"
    kernel: KernelChoice | Kernel = "auto"
    new_head: bool = False
    parameters: ParameterSelection = None
    layer_variances: bool = False
    prior_groups: PriorGroups | None = None
    prior: WeightPrior = "equal"
    stationary: StationaryForm = "rbf"
    stationary_inputs: StationaryInputs | None = None
    hyperparameters: Treatment | Mapping[str, float] = "auto"
    time_budget: float = 120.0
    trained_on: bool | None = None
    input_shape: Sequence[int] | None = None
    extract: Extract | str | None = None
    dtype: Literal["float64", "float32"] = "float64"
    checkpoint: str | os.PathLike[str] | None = None
    verbose: bool = False

    # --- files -------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted model to one safetensors file: weights, training data, hyperparameters; no code.

        The network's architecture is not in the file: `load` takes the module. A function ``extract`` is not either.
        """
        check_is_fitted(self)
        if getattr(self, "noise_network", None) is not None:
            raise InputError("a model with a noise_network cannot be saved to this format: pickle it instead.")
        if isinstance(self.kernel, Kernel):
            raise InputError("a model with a kernel of GPyTorch's cannot be saved to this format: pickle it instead.")
        frozen = self._network.tensors(self._network.dtype, self._network.device)
        tensors = {f"network.{name}": tensor for name, tensor in frozen.items()}
        tensors |= {f"model.{name}": tensor for name, tensor in self._model.state().items()}
        data = self._model.task.data()
        tensors |= {f"data.{name}": tensor for name, tensor in data.items()}
        tensors["outputs"] = self._outputs()
        names = (*_STORED, *self._own_options())
        facts: dict[str, Any] = {name: _plain(getattr(self, name)) for name in names}
        # As pairs: JSON does not keep the order of a mapping, and the last group that matches a parameter has it.
        facts["prior_groups"] = None if self.prior_groups is None else [list(p) for p in self.prior_groups.items()]
        facts |= {"parameters": list(self._network.names), "row_shape": list(self._row_shape)}
        facts |= {"data": list(data), "chosen": list(self._model.chosen), "fitted": self._facts()}
        facts |= {"log_marginal_likelihood": self.log_marginal_likelihood_, "adapter": self._network.adapter.facts()}
        shape = self._network.adapter.input_shape
        facts["input_shape"] = None if shape is None else list(shape)
        save_tensors(path, type(self).__name__, tensors, facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str], network: nn.Module, extract: Extract | str | None = None) -> Self:
        """The model saved at ``path``; ``network`` gives the architecture and ``extract`` the output, as in `fit`.

        Raises:
            FileNotFoundError: There is no such file.
            FileFormatError: The file is damaged or foreign, or belongs to a network with other parameters, or to one
                that computes something else with them.
        """
        check_kinds(nn.Module, "an nn.Module like the one that was fitted", network=network)
        contents = load_tensors(path, cls.__name__)
        try:
            module = with_weights(network, contents.group("network."))
        except NetworkError as error:
            raise FileFormatError(f"{os.fspath(path)!r} belongs to another network: {error}") from None
        with contents.reading():
            stored: dict[str, Any] = {
                name: contents.fact(name, kinds) for name, kinds in {**_STORED, **cls._own_options()}.items()
            }
            if stored["prior_groups"] is not None:
                stored["prior_groups"] = dict(_pair(*pair) for pair in contents.listed("prior_groups", list))
            constructor: Any = cls
            # As globs that match themselves alone.
            names = [escape(name) for name in contents.listed("parameters", str)]
            model = constructor(module, parameters=names, extract=extract, **stored)
            model._check_arguments()
            model._row_shape = tuple(contents.listed("row_shape", int))
            adapter = Adapter.from_facts(contents.fact("adapter", dict))
            model._takes_arrays = adapter.is_array
            model._network = freeze(module, names, extract=extract, inputs=adapter)
            data = contents.group("data.")
            data.update({name: tensor.to(model._network.device) for name, tensor in data.items()})
            if set(contents.listed("data", str)) != set(data):
                raise InputError(f"its data are {sorted(data)}")
            _check_data(data, getattr(torch, model.dtype), model._row_shape)
            contents.tensor("model.reference", ())
            fitted = contents.part("fitted")
            model._restore(data, fitted)
            fitted.finish()
            contents.same_kinds("data.", model._model.task.data())
            contents.same_values("outputs", model._outputs())
            model._model.load_state(contents.numbers("model."), _candidate(*contents.listed("chosen", str)))
            contents.same_kinds("model.", model._model.state())
            model.log_marginal_likelihood_ = contents.fact("log_marginal_likelihood", float)
            model._finish()
        return model

    @property
    def report_(self) -> Report:
        """What the labels say about the source network: whether it helps, and how much; made when first asked for."""
        check_is_fitted(self)
        if self._report is None:
            self._report = report_on(self._model)
        return self._report

    # --- what a model adds -------------------------------------------------------------------------------------

    _model: TransferGP = field(init=False)
    _network: FrozenNetwork = field(init=False)
    _row_shape: tuple[int, ...] = field(init=False)
    _takes_arrays: bool = field(init=False)
    _report: Report | None = field(init=False)

    @classmethod
    @abstractmethod
    def _own_options(cls) -> Mapping[str, Kinds]:
        """Further constructor arguments to be saved, and what they are."""

    @abstractmethod
    def _facts(self) -> dict[str, Any]:
        """What else `_restore` needs."""

    @abstractmethod
    def _restore(self, data: Mapping[str, Tensor], facts: Contents) -> None:
        """Set up the model, not fitted yet, from the training data by name and what `_facts` gave."""

    @torch.no_grad()
    def _outputs(self) -> Tensor:
        """What the network makes of a few training inputs: weights do not tell a tanh from a ReLU, outputs do."""
        return self._network.forward(self._model.task.data()["x"][:_COMPARED])

    # --- shared ------------------------------------------------------------------------------------------------

    def _fit_model(self, model: TransferGP, stacklevel: int = 3) -> None:
        """Fit it, and set what is common to all fitted estimators; the caller is ``stacklevel`` frames up."""
        if self.trained_on or (self.trained_on is None and model.task.seems_trained_on()):
            warnings.warn(_TWICE, stacklevel=stacklevel)
        self._model = model
        self.log_marginal_likelihood_ = model.fit(self.checkpoint)
        self._finish()

    @contextmanager
    def _whole_or_not_at_all(self) -> Iterator[None]:
        """Leave the estimator as it was if fitting fails."""
        before = vars(self).copy()
        try:
            yield
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise

    def _check_arguments(self) -> None:
        check_choice(("float64", "float32"), dtype=self.dtype)
        check_flags(verbose=self.verbose, **({} if self.trained_on is None else {"trained_on": self.trained_on}))

    def _validate(self, X: Any, y: Any = "no_validation", reset: bool = True, **kwargs: Any) -> Any:
        """X, or X and y, by scikit-learn's checks; of a batch, the adapter checks the tensors."""
        options: dict[str, Any]
        X, y = as_array(X, "X"), as_array(y, "y")
        if reset and isinstance(self.network, FrozenNetwork):
            self._takes_arrays = self.network.adapter.is_array
        elif reset:
            whole = not is_batch(X) and self.input_shape is None and wants_integers(self.network, X)
            self._takes_arrays = not (is_batch(X) or whole)
        if self._takes_arrays:
            options = {"y": y, "allow_nd": True, "dtype": self.dtype, "reset": reset, **kwargs}
            with refusing("X" if isinstance(y, str) else "X or y"):
                return validate_data(self, X, **options)
        if isinstance(y, str):
            return X
        options = {"y": y, "reset": False, **kwargs}
        with refusing("y"):
            labels: Any = validate_data(self, **options)
        if num_rows(X) != len(labels):
            raise InputError(f"X has {num_rows(X)} inputs, but y has {len(labels)} labels: give one for each.")
        return X, labels

    def _finish(self) -> None:
        """Set what is common to all fitted estimators."""
        self._report = None
        self.n_features_in_ = self._row_shape[0]
        self.kernel_ = str(self._model.chosen)
        self.hyperparameters_ = self._model.hyperparameters()

    def _model_arguments(self) -> dict[str, Any]:
        names = (
            "mean",
            "kernel",
            "layer_variances",
            "prior_groups",
            "prior",
            "stationary",
            "stationary_inputs",
            "hyperparameters",
            "time_budget",
        )
        return {name: getattr(self, name) for name in names}

    def _prepare(self, X: Any) -> Tensor:
        """Freeze the network for inputs like X, as `_validate` gave them, and pack these into `[N, D]`."""
        if isinstance(self.network, FrozenNetwork):
            if self.parameters is not None or self.input_shape is not None or self.extract is not None:
                raise SelectionError(
                    "the network is frozen already: give parameters, input_shape and extract to gpntk.freeze instead."
                )
            self._network = self.network
        elif self._takes_arrays:
            images = X.shape[1:] if X.ndim > 2 else None
            self._network = freeze(self.network, self.parameters, self.input_shape or images, self.extract)
        else:
            self._network = freeze(self.network, self.parameters, None, self.extract, X)
        x = self._packed(X)
        self._row_shape = X.shape[1:] if self._takes_arrays else (x.shape[1],)
        return x

    def _packed(self, X: Any) -> Tensor:
        if self._takes_arrays:
            return as_tensor(X, "X").to(self._network.device).flatten(1)
        return self._network.adapter.pack(X, getattr(torch, self.dtype), self._network.device)

    def _new_input(self, X: Inputs) -> Tensor:
        """X `[M, ...]`, to predict at, as a tensor `[M, D]`."""
        check_is_fitted(self)
        checked = self._validate(X, reset=False)
        self._check_shape(checked)
        return self._packed(checked)

    def _check_shape(self, X: Any) -> None:
        if self._takes_arrays and X.shape[1:] != self._row_shape:
            raise InputError(f"X has rows of shape {X.shape[1:]}, but fit saw rows of shape {self._row_shape}.")


def _check_data(data: Mapping[str, Tensor], dtype: torch.dtype, row_shape: tuple[int, ...]) -> None:
    """Raise `InputError` where data of a file are not in the model's precision, or have other rows."""
    for name, tensor in data.items():
        expected = torch.int64 if name == "labels" else dtype
        if tensor.dtype != expected:
            raise InputError(f"data.{name} holds {tensor.dtype}, not {expected}.")
    if math.prod(row_shape) != data["x"].shape[-1]:
        raise InputError(f"data.x has shape {tuple(data['x'].shape)}, but rows have shape {row_shape}.")


def _pair(group: Any = None, globs: Any = None, *others: Any) -> tuple[str, Any]:
    """A group of parameters, as a file has it."""
    check_kinds(str, "the name of a group", prior_groups=group)
    check_kinds(str | list, "globs", prior_groups=globs)
    if others:
        raise InputError(f"prior_groups[{group!r}] has {len(others)} too many.")
    return group, globs


def _candidate(kernel: Any = "", inputs: Any = "", mean: Any = "", moves: str = "", *others: str) -> Candidate:
    """What a file says was chosen."""
    for choices, word in ((KernelChoice, kernel), (StationaryInputs, inputs), (MeanChoice, mean)):
        check_choice(get_args(choices), chosen=word)
    if others:
        raise InputError(f"chosen has {len(others)} too many.")
    return Candidate(kernel, inputs, mean, moves)


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's, which JSON can hold."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return value.item() if isinstance(value, np.generic) else value
