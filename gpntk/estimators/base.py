"""What the estimators share: validation, the frozen network, files."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import escape
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from gpntk._types import Extract, ParameterSelection
from gpntk.errors import FileFormatError, GpntkError, InputError, NetworkError, SelectionError
from gpntk.inference.hyperposterior import Treatment
from gpntk.io import load_tensors, save_tensors
from gpntk.network import FrozenNetwork, freeze
from gpntk.network.freezing import with_weights
from gpntk.transfer.components import StationaryForm
from gpntk.transfer.prior import Candidate, KernelChoice, MeanChoice, StationaryInputs
from gpntk.transfer.report import Report

# Inputs at which a network is compared with the one that was saved.
_COMPARED = 4
_STORED = (
    "mean",
    "kernel",
    "new_head",
    "layer_variances",
    "stationary",
    "stationary_inputs",
    "hyperparameters",
    "dtype",
    "input_shape",
    "verbose",
)


class TransferEstimator(BaseEstimator, ABC):
    """A model of the target task on a frozen source network, with scikit-learn's conventions."""

    network: nn.Module
    mean: MeanChoice
    kernel: KernelChoice
    new_head: bool
    parameters: ParameterSelection
    layer_variances: bool
    stationary: StationaryForm
    stationary_inputs: StationaryInputs | None
    hyperparameters: Treatment | Mapping[str, float]
    input_shape: Sequence[int] | None
    extract: Extract | None
    dtype: Literal["float64", "float32"]
    verbose: bool

    _stored: tuple[str, ...] = ()
    """Names of further constructor arguments to be saved."""

    # --- files -------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted model to one safetensors file: weights, training data, hyperparameters; no code.

        The network's architecture is not in the file: `load` takes the module. ``extract`` is not either.
        """
        check_is_fitted(self)
        if getattr(self, "noise_network", None) is not None:
            raise InputError("a model with a noise_network cannot be saved to this format: pickle it instead.")
        frozen = self._network.tensors(self._network.dtype, self._network.device)
        tensors = {f"network.{name}": tensor for name, tensor in frozen.items()}
        tensors |= {f"model.{name}": tensor for name, tensor in self._model.state().items()}
        tensors |= {f"data.{name}": tensor for name, tensor in self._data().items()}
        tensors["outputs"] = self._outputs()
        facts: dict[str, Any] = {name: _plain(getattr(self, name)) for name in (*_STORED, *self._stored)}
        facts |= {"parameters": list(self._network.names), "row_shape": list(self._row_shape)}
        facts |= {"chosen": list(self._model.chosen), "fitted": self._facts()}
        facts |= {"log_marginal_likelihood": self.log_marginal_likelihood_}
        shape = self._network.input_shape
        facts["input_shape"] = None if shape is None else list(shape)
        save_tensors(path, type(self).__name__, tensors, facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str], network: nn.Module, extract: Extract | None = None) -> Self:
        """The model saved at ``path``; ``network`` gives the architecture, the file the weights.

        Raises:
            FileNotFoundError: There is no such file.
            FileFormatError: The file is damaged or foreign, or belongs to a network with other parameters, or to one
                that computes something else with them.
        """
        contents = load_tensors(path, cls.__name__)
        try:
            module = with_weights(network, contents.group("network."))
        except NetworkError as error:
            raise FileFormatError(f"{os.fspath(path)!r} belongs to another network: {error}") from None
        with contents.reading():
            stored: dict[str, Any] = {name: contents.fact(name) for name in (*_STORED, *cls._stored)}
            constructor: Any = cls
            # As globs that match themselves alone.
            names = [escape(name) for name in contents.fact("parameters", list)]
            model = constructor(module, parameters=names, extract=extract, **stored)
            model._row_shape = tuple(contents.fact("row_shape", list))
            model._network = model._freeze()
            data = contents.group("data.")
            data.update({name: tensor.to(model._network.device) for name, tensor in data.items()})
            model._restore(data, contents.fact("fitted", dict))
            contents.same_values("outputs", model._outputs())
            model._model.load_state(contents.group("model."), Candidate(*contents.fact("chosen", list)))
            model.log_marginal_likelihood_ = contents.fact("log_marginal_likelihood", float)
        model._finish()
        return model

    @property
    def report_(self) -> Report:
        """What the labels say about the source network: whether it helps, and how much; made when first asked for."""
        check_is_fitted(self)
        if self._report is None:
            self._report = self._make_report()
        return self._report

    # --- what a model adds -------------------------------------------------------------------------------------

    _model: Any
    _network: FrozenNetwork
    _row_shape: tuple[int, ...]
    _report: Report | None
    log_marginal_likelihood_: float

    @abstractmethod
    def _data(self) -> dict[str, Tensor]:
        """The training data by name."""

    @abstractmethod
    def _facts(self) -> dict[str, Any]:
        """What else `_restore` needs."""

    @abstractmethod
    def _restore(self, data: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Set up the model, not fitted yet, from what `_data` and `_facts` gave."""

    @abstractmethod
    def _make_report(self) -> Report: ...

    @torch.no_grad()
    def _outputs(self) -> Tensor:
        """What the network makes of a few training inputs: weights do not tell a tanh from a ReLU, outputs do."""
        return self._network.forward(self._data()["x"][:_COMPARED])

    # --- shared ------------------------------------------------------------------------------------------------

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
        if self.dtype not in ("float64", "float32"):
            raise InputError(f"dtype={self.dtype!r}: choose 'float64' or 'float32'.")

    def _validate(self, X: ArrayLike, **kwargs: Any) -> Any:
        # scikit-learn's annotation of X is inferred from its default, a string.
        return validate_data(self, X, allow_nd=True, dtype=self.dtype, **kwargs)  # pyright: ignore[reportArgumentType]

    def _finish(self) -> None:
        """Set what is common to all fitted estimators."""
        self._report = None
        self.n_features_in_ = self._row_shape[0]
        self.kernel_ = str(self._model.chosen)
        self.hyperparameters_ = self._model.hyperparameters()

    def _model_arguments(self) -> dict[str, Any]:
        names = ("mean", "kernel", "layer_variances", "stationary", "stationary_inputs", "hyperparameters")
        return {name: getattr(self, name) for name in names}

    def _freeze(self) -> FrozenNetwork:
        if not isinstance(self.network, FrozenNetwork):
            images = self._row_shape if len(self._row_shape) > 1 else None
            return freeze(self.network, self.parameters, self.input_shape or images, self.extract)
        if self.parameters is not None or self.input_shape is not None or self.extract is not None:
            raise SelectionError(
                "the network is frozen already: give parameters, input_shape and extract to gpntk.freeze instead."
            )
        return self.network

    def _probe(self, x: Tensor) -> int:
        """The network's number of outputs, found by running it."""
        try:
            return self._network.num_outputs(x)
        except GpntkError:
            raise
        except Exception as error:
            raise InputError(
                f"X has rows of shape {self._row_shape}, which the network cannot take ({error}): give X as the "
                "network wants it, or input_shape, the shape of one input."
            ) from error

    def _new_input(self, X: ArrayLike) -> Tensor:
        """X `[M, ...]`, to predict at, as a tensor `[M, D]`."""
        check_is_fitted(self)
        checked = self._validate(X, reset=False)
        self._check_shape(checked)
        return self._tensor(checked)

    def _check_shape(self, X: NDArray[Any]) -> None:
        if X.shape[1:] != self._row_shape:
            raise InputError(f"X has rows of shape {X.shape[1:]}, but fit saw rows of shape {self._row_shape}.")

    def _tensor(self, X: NDArray[Any]) -> Tensor:
        return torch.tensor(X, device=self._network.device).flatten(1)


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's, which JSON can hold."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return value.item() if isinstance(value, np.generic) else value
