"""scikit-learn's faces of the models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal, Self, final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from gpntk._types import Extract, ParameterSelection
from gpntk.errors import FileFormatError, InputError, NetworkError, SelectionError
from gpntk.freezing import with_weights
from gpntk.io import load_tensors, save_tensors
from gpntk.network import FrozenNetwork
from gpntk.transfer import MeanChoice, TransferGP, freeze

_KIND = "TransferRegressor"
_STORED = ("mean", "layer_variances", "dtype", "input_shape")


@final
class TransferRegressor(RegressorMixin, BaseEstimator):
    """Gaussian process regression in the tangent space of a pretrained network.

    The network is frozen; the posterior over small moves of its weights is found in closed form. Use it with a network
    trained on a related task and few target labels. Output scale and noise are set by the exact marginal likelihood:
    nothing is tuned or held out, and results do not depend on the units of y. With about ten labels that likelihood is
    nearly flat and may take noise for signal; compare with the network as it is.

    Args:
        network: The source network, in eval mode. It is copied when `fit` is called and never changed.
        mean: Prior mean: ``"network"``, its output f(x; w*), so that the GP learns the residual; ``"constant"``, one
            number per output; or ``"zero"``. Take the network's where source and target labels mean the same.
        parameters: Which parameters may move: ``None`` for all, glob(s) over their names, ``"readout"`` for the last
            layer, or a predicate of name and parameter.
        layer_variances: Learn one prior variance per layer (L-BFGS) instead of a single one (closed form).
        input_shape: Shape of one input as the network wants it. Default: the shape of the rows of X.
        extract: Turns what the network returns into its output tensor `[N]` or `[N, C]`.
        dtype: Precision of the computation, ``"float64"`` or ``"float32"``; the network's weights are cast to it.

    Attributes:
        log_marginal_likelihood_: Log marginal likelihood of the fitted model, in nats, in the units of y.
        noise_variance_: Variance of the observation noise, in the units of y squared.
        scale_: Prior variance of the weights, in the units of y squared; one per layer with ``layer_variances``.
        n_features_in_: Size of the second dimension of X in `fit`.

    Example:
        >>> import torch, gpntk
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch...>
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
        >>> x = torch.rand(50, 2).numpy()
        >>> model = gpntk.TransferRegressor(network, mean="constant").fit(x, x[:, 0] * x[:, 1])
        >>> mean, std = model.predict(x[:3], return_std=True)
        >>> mean.shape, std.shape, model.score(x, x[:, 0] * x[:, 1]) > 0.99
        ((3,), (3,), True)

    References:
        Maddox et al. (2021), Fast Adaptation with Linearized Neural Networks, https://arxiv.org/abs/2103.01439.
        Khan et al. (2019), Approximate Inference Turns Deep Networks into Gaussian Processes,
        https://arxiv.org/abs/1906.01930, theorem 1.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: MeanChoice = "network",
        parameters: ParameterSelection = None,
        layer_variances: bool = False,
        input_shape: Sequence[int] | None = None,
        extract: Extract | None = None,
        dtype: Literal["float64", "float32"] = "float64",
    ) -> None:
        self.network = network
        self.mean: MeanChoice = mean
        self.parameters = parameters
        self.layer_variances = layer_variances
        self.input_shape = input_shape
        self.extract = extract
        self.dtype = dtype

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit to inputs X `[N, ...]` and targets y `[N]` or `[N, C]`; returns self.

        Raises:
            InputError: ``mean`` or ``dtype`` is none of the choices, or y does not match the network's outputs.
            NetworkError, SelectionError: See `gpntk.FrozenNetwork`.
            ValueError: NaN, infinite or empty X or y, or different numbers of rows (scikit-learn's checks).
        """
        if self.mean not in ("network", "constant", "zero"):
            raise InputError(f"mean={self.mean!r}: choose 'network', 'constant' or 'zero'.")
        if self.dtype not in ("float64", "float32"):
            raise InputError(f"dtype={self.dtype!r}: choose 'float64' or 'float32'.")
        self._prepare(*_validated(self, X, y=y, multi_output=True, y_numeric=True, dtype=self.dtype))
        self.log_marginal_likelihood_ = self._gp.fit()
        self._report()
        return self

    def predict(
        self, X: ArrayLike, return_std: bool = False, return_cov: bool = False, observation_noise: bool = True
    ) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]:
        """Posterior mean of y at X `[N, ...]`, and on request its standard deviation or joint covariance.

        Args:
            X: Inputs, shaped as in `fit`.
            return_std: Also return standard deviations, shaped as the mean.
            return_cov: Also return the covariance `[N*C, N*C]`, rows n*C + c.
            observation_noise: Whether the spread is that of y, noise included, or of the noise-free function.

        Returns:
            Mean `[N]` or `[N, C]`, as y was in `fit`; with ``return_std`` or ``return_cov`` a pair.
        """
        if return_std and return_cov:
            raise InputError("return_std and return_cov exclude each other: the diagonal of the covariance is std².")
        x = self._input(X)
        mean, spread = self._gp.predict(x, covariance=return_cov, observation_noise=observation_noise)
        if return_cov:
            return self._shaped(mean), spread.cpu().numpy()
        return (self._shaped(mean), self._shaped(spread.sqrt())) if return_std else self._shaped(mean)

    def sample(
        self,
        X: ArrayLike,
        num_samples: int = 1,
        random_state: int | np.random.RandomState | None = None,
        observation_noise: bool = False,
    ) -> NDArray[Any]:
        """Joint samples of the posterior at X: `[S, N]`, or `[S, N, C]`.

        Args:
            X: Inputs, shaped as in `fit`.
            num_samples: S.
            random_state: Seed or generator, scikit-learn's convention.
            observation_noise: Sample y, noise included, instead of the noise-free function.
        """
        if num_samples < 1:
            raise InputError(f"num_samples={num_samples}: at least one sample must be drawn.")
        mean, covariance = self._gp.predict(self._input(X), covariance=True, observation_noise=observation_noise)
        eigenvalues, vectors = torch.linalg.eigh(covariance)
        root = vectors * eigenvalues.clamp_min(0).sqrt()
        noise = check_random_state(random_state).standard_normal((num_samples, mean.numel()))
        samples = mean + torch.as_tensor(noise).to(root) @ root.mT
        return np.stack([self._shaped(sample) for sample in samples])

    # --- files -------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted model to one safetensors file: weights, training data, hyperparameters; no code.

        The network's architecture is not in the file: `load` takes the module. ``extract`` is not either.
        """
        check_is_fitted(self)
        frozen = self._network.tensors(self._network.dtype, self._network.device)
        tensors = {f"network.{name}": tensor for name, tensor in frozen.items()}
        tensors |= {f"gp.{name}": tensor for name, tensor in self._gp.state().items()}
        tensors |= {"x": self._x, "y": self._y}
        facts: dict[str, Any] = {name: getattr(self, name) for name in _STORED}
        facts |= {"parameters": list(self._network.names), "row_shape": list(self._row_shape), "y_ndim": self._y_ndim}
        facts |= {"log_marginal_likelihood": self.log_marginal_likelihood_}
        shape = self._network.input_shape
        facts["input_shape"] = None if shape is None else list(shape)
        save_tensors(path, _KIND, tensors, facts)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], network: nn.Module, extract: Extract | None = None
    ) -> TransferRegressor:
        """The model saved at ``path``; ``network`` gives the architecture, the file the weights.

        Raises:
            FileNotFoundError: There is no such file.
            FileFormatError: The file is damaged or foreign, or belongs to a network with other parameters.
        """
        tensors, facts = load_tensors(path, _KIND)
        weights = {name.removeprefix("network."): t for name, t in tensors.items() if name.startswith("network.")}
        try:
            module = with_weights(network, weights)
        except NetworkError as error:
            raise FileFormatError(f"{os.fspath(path)!r} belongs to another network: {error}") from None
        stored: dict[str, Any] = {name: facts[name] for name in _STORED}
        model = TransferRegressor(module, parameters=facts["parameters"], extract=extract, **stored)
        x, y = tensors["x"].reshape(-1, *facts["row_shape"]).numpy(), tensors["y"].numpy()
        model._prepare(x, y if facts["y_ndim"] == 2 else y[:, 0])
        model._gp.load_state({name.removeprefix("gp."): t for name, t in tensors.items() if name.startswith("gp.")})
        model.log_marginal_likelihood_ = facts["log_marginal_likelihood"]
        model._report()
        return model

    # --- private -----------------------------------------------------------------------------------------------

    def _prepare(self, X: NDArray[Any], y: NDArray[Any]) -> None:
        """Freeze the network and set up the GP, hyperparameters not yet fitted."""
        self._row_shape, self._y_ndim = X.shape[1:], y.ndim
        self._network = self._freeze()
        self._x = self._tensor(X)
        self._y = torch.tensor(y.reshape(len(y), -1)).to(self._x)
        self._gp = TransferGP(self._network, self._x, self._y, self.mean, self.layer_variances)

    def _freeze(self) -> FrozenNetwork:
        if not isinstance(self.network, FrozenNetwork):
            images = self._row_shape if len(self._row_shape) > 1 else None
            return freeze(self.network, self.parameters, self.input_shape or images, self.extract)
        if self.parameters is not None or self.input_shape is not None or self.extract is not None:
            raise SelectionError(
                "the network is frozen already: give parameters, input_shape and extract to gpntk.freeze instead."
            )
        return self.network

    def _input(self, X: ArrayLike) -> Tensor:
        check_is_fitted(self)
        checked = _validated(self, X, dtype=self.dtype, reset=False)
        if checked.shape[1:] != self._row_shape:
            raise InputError(f"X has rows of shape {checked.shape[1:]}, but fit saw rows of shape {self._row_shape}.")
        return self._tensor(checked)

    def _tensor(self, X: NDArray[Any]) -> Tensor:
        return torch.tensor(X, device=self._network.device).flatten(1)

    def _shaped(self, values: Tensor) -> NDArray[Any]:
        """`[N*C]` as y was given to `fit`."""
        array = values.cpu().numpy()
        return array if self._y_ndim == 1 else array.reshape(-1, self._y.shape[1])

    def _report(self) -> None:
        self.noise_variance_ = float(self._gp.noise)
        scale = self._gp.scale.cpu().numpy()
        self.scale_ = scale if self.layer_variances else float(scale[0])
        self.n_features_in_ = self._row_shape[0]


def _validated(estimator: BaseEstimator, X: ArrayLike, **kwargs: Any) -> Any:
    # scikit-learn's annotation of X is inferred from its default, a string.
    return validate_data(estimator, X, allow_nd=True, **kwargs)  # pyright: ignore[reportArgumentType]
