"""scikit-learn's face of regression on a frozen source network."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, Self, final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import RegressorMixin
from sklearn.utils import check_random_state
from torch import Tensor, nn

from gpntk._checks import as_tensor, check_count, check_flags, check_kinds
from gpntk.errors import InputError
from gpntk.estimators.arrays import as_array, kept, weights_of
from gpntk.estimators.base import Inputs, Kinds, TransferEstimator
from gpntk.io import Contents
from gpntk.network.adapters import Adapted
from gpntk.network.batches import num_rows
from gpntk.transfer import TransferGP


@final
@dataclass(eq=False, repr=False, kw_only=True)
class TransferRegressor(RegressorMixin, TransferEstimator):
    """Gaussian process regression in the tangent space of a pretrained network.

    The network is frozen; the posterior over small moves of its weights is found in closed form. Use it with a network
    trained on a related task and few target labels. Nothing is tuned or held out: kernel and hyperparameters are
    inferred from their posterior, and results do not depend on the units of y. `report_` says whether the source
    network helps.

    Args:
        num_outputs: C, the number of columns of y. If it is not that of the network's outputs, the readout is replaced
            by a new linear map; its weights, and what they make of those below, have priors of their own. Unless this
            or ``new_head=True`` says so, another number of columns is refused.
        noise_network: Maps inputs, shaped as the network wants them, to the logarithm of the noise variance `[N]` or
            `[N, C]`, up to a factor that is learned; for noise that differs between inputs.
        network, mean, kernel, ...: The options that all transfer estimators share: see
            `gpntk.estimators.base.TransferEstimator`.

    Attributes:
        log_marginal_likelihood_: Log marginal likelihood of the labels of `fit` at the best hyperparameters, in nats,
            in the units of y.
        noise_variance_: Variance of the observation noise, in the units of y squared: a number, or one per output.
        hyperparameters_: Best hyperparameters by name, in units of the residuals' mean square.
        kernel_: Name of the kernel in use.
        report_: See `gpntk.transfer.report.Report`.
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

    num_outputs: int | None = None
    noise_network: nn.Module | None = None

    def fit(
        self, X: Inputs, y: ArrayLike, yvar: ArrayLike | None = None, sample_weight: ArrayLike | None = None
    ) -> Self:
        """Fit to inputs X `[N, ...]` and targets y `[N]` or `[N, C]`, NaN where missing; returns self.

        Args:
            X: Inputs.
            y: Targets.
            yvar: Known variances of the targets' errors, shaped as y, in the units of y squared. A noise variance
                common to all is learned on top.
            sample_weight: Weights of the rows' labels `[N]`: the variance of a label's noise is divided by its weight,
                as if it were the mean of so many labels. Zero leaves it out.

        Raises:
            InputError: An argument is none of its choices, or y does not match the network's outputs.
            NetworkError, SelectionError: See `gpntk.FrozenNetwork`.
            ValueError: NaN, infinite or empty X, or different numbers of rows (scikit-learn's checks).
        """
        self._check_arguments()
        with self._whole_or_not_at_all():
            X, y = self._validated(X, y)
            self._y_ndim = y.ndim
            parts = self._parts(y, yvar, sample_weight)
            x, *labels = self._tensors(self._prepare(X), *parts)
            self._check_width(labels[0].shape[1], self._network.num_outputs(x))
            self._fit_model(self._transfer(x, *labels))
        if self.verbose:
            print(self.report_)  # noqa: T201
        return self

    def partial_fit(
        self, X: Inputs, y: ArrayLike, yvar: ArrayLike | None = None, sample_weight: ArrayLike | None = None
    ) -> Self:
        """Take more data in, hyperparameters as they are: the posterior of all data, at the cost of the new rows.

        Before `fit`, the same as `fit`. Arguments are as there.
        """
        if not hasattr(self, "_model"):
            return self.fit(X, y, yvar, sample_weight)
        X, y = self._validated(X, y, reset=False)
        self._check_shape(X)
        if y.ndim != self._y_ndim or (y.ndim == 2 and y.shape[1] != self._model.task.num_outputs):
            raise InputError(f"y has shape {y.shape}, but fit saw {self._model.task.num_outputs} output(s).")
        tensors = self._tensors(self._packed(X), *self._parts(y, yvar, sample_weight))
        self._model = self._model.condition_on(*tensors)
        self._finish()
        return self

    def predict(
        self,
        X: Inputs,
        return_std: bool = False,
        return_cov: bool = False,
        return_quantiles: Sequence[float] | None = None,
        observation_noise: bool = True,
    ) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]:
        """Posterior mean of y at X `[N, ...]`, and on request how far it may be off.

        Args:
            X: Inputs, shaped as in `fit`.
            return_std: Also return standard deviations, shaped as the mean.
            return_cov: Also return the covariance `[N*C, N*C]`, rows n*C + c.
            return_quantiles: Also return these quantiles, numbers between 0 and 1, as ``[Q, ...]``.
            observation_noise: Whether the spread is that of y, noise included, or of the noise-free function.

        Returns:
            Mean `[N]` or `[N, C]`, as y was in `fit`; with one of the ``return_`` arguments a pair.
        """
        if bool(return_std) + bool(return_cov) + (return_quantiles is not None) > 1:
            raise InputError("return_std, return_cov and return_quantiles exclude each other: ask for one.")
        check_flags(return_std=return_std, return_cov=return_cov, observation_noise=observation_noise)
        x = self._new_input(X)
        if not (return_std or return_cov or return_quantiles is not None):
            return self._shaped(self._model.predict_mean(x))
        mean, spread = self._model.predict(x, covariance=return_cov, observation_noise=observation_noise)
        if return_cov:
            return self._shaped(mean), spread.cpu().numpy()
        if return_quantiles is not None:
            levels = as_tensor(np.atleast_1d(return_quantiles), "return_quantiles").double()
            if levels.dim() != 1 or not len(levels) or not ((levels > 0) & (levels < 1)).all():
                raise InputError(f"return_quantiles={return_quantiles}: give numbers between 0 and 1.")
            rows = mean + torch.special.ndtri(levels).to(mean).unsqueeze(-1) * spread.sqrt()
            return self._shaped(mean), np.stack([self._shaped(row) for row in rows])
        return self._shaped(mean), self._shaped(spread.sqrt())

    def sample_y(
        self,
        X: Inputs,
        n_samples: int = 1,
        random_state: int | np.random.RandomState | None = 0,
        observation_noise: bool = False,
    ) -> NDArray[Any]:
        """Joint samples of the Gaussian posterior at X, as scikit-learn's: `[N, S]`, or `[N, C, S]`.

        Args:
            X: Inputs, shaped as in `fit`.
            n_samples: S.
            random_state: Seed or generator, scikit-learn's convention.
            observation_noise: Sample y, noise included, instead of the noise-free function.
        """
        check_count(n_samples=n_samples)
        check_flags(observation_noise=observation_noise)
        x = self._new_input(X)
        mean, covariance = self._model.predict(x, covariance=True, observation_noise=observation_noise)
        eigenvalues, vectors = torch.linalg.eigh(covariance)
        root = vectors * eigenvalues.clamp_min(0).sqrt()
        try:
            generator = check_random_state(random_state)
        except ValueError as error:
            raise InputError(f"random_state={random_state!r}: {error}.") from None
        noise = generator.standard_normal((n_samples, mean.numel()))
        samples = mean + torch.as_tensor(noise).to(root) @ root.mT
        return np.stack([self._shaped(sample) for sample in samples], -1)

    # --- private -----------------------------------------------------------------------------------------------

    def _validated(self, X: Any, y: ArrayLike, reset: bool = True) -> tuple[Any, NDArray[Any]]:
        """X and y as arrays; scikit-learn's checks, but that y may have missing values."""
        y = as_array(y, "y")
        targets = np.asarray(y)
        if targets.dtype.kind != "f" or targets.ndim not in (1, 2) or not np.isnan(targets).any():
            return self._validate(X, y=y, multi_output=True, y_numeric=True, reset=reset)
        if np.isinf(targets).any():
            raise InputError("y contains infinity: give finite targets, or NaN where a target is missing.")
        inputs = self._validate(X, reset=reset)
        if num_rows(inputs) != len(targets):
            raise InputError(f"X has {num_rows(inputs)} inputs, but y has {len(targets)} targets: give one for each.")
        return inputs, targets

    def _parts(self, y: NDArray[Any], yvar: ArrayLike | None, sample_weight: ArrayLike | None) -> tuple[Any, ...]:
        """Labels, their variances and weights, checked."""
        return y, None if yvar is None else _variances(yvar, y), weights_of(sample_weight, len(y))

    def _tensors(
        self, x: Tensor, y: NDArray[Any], yvar: NDArray[Any] | None, weights: NDArray[Any] | None
    ) -> tuple[Any, ...]:
        """Inputs, labels, variances and weights of the labels that count."""
        targets = as_tensor(y.reshape(len(y), -1), "y").to(x)
        known = None if yvar is None else as_tensor(yvar.reshape(len(y), -1), "yvar").to(x)
        return kept(weights, x, targets, known)

    def _transfer(self, x: Tensor, y: Tensor, yvar: Tensor | None, weights: Tensor | None) -> TransferGP:
        return TransferGP(
            self._network,
            x,
            y,
            new_head=self.new_head or y.shape[1] != self._network.num_outputs(x),
            known_noise=yvar,
            weights=weights,
            noise_network=self._noise(),
            **self._model_arguments(),
        )

    def _check_width(self, columns: int, outputs: int) -> None:
        """Raise or warn where y does not have a column for each of the network's outputs."""
        if self.num_outputs is not None and self.num_outputs != columns:
            raise InputError(f"num_outputs={self.num_outputs!r}, but y has {columns} column(s): give their number.")
        if self.new_head or columns == outputs:
            return
        if self.num_outputs is None:
            raise InputError(
                f"y has {columns} column(s), but the network has {outputs} output(s): give a column for each, extract= "
                f"for the outputs that are meant, or new_head=True or num_outputs={columns} for a new readout."
            )
        warnings.warn(
            f"num_outputs={columns}, but the network has {outputs} output(s): its readout is replaced by a new one of "
            f"{columns} output(s). new_head=True says so without this warning.",
            stacklevel=3,
        )

    def _noise(self) -> nn.Module | None:
        if self.noise_network is None:
            return None
        check_kinds(nn.Module, "an nn.Module", noise_network=self.noise_network)
        if self.noise_network.training:
            raise InputError("noise_network is in train mode, so its outputs may be random: call .eval() first.")
        return Adapted(copy.deepcopy(self.noise_network), self._network.adapter)

    @classmethod
    def _own_options(cls) -> Mapping[str, Kinds]:
        return {"num_outputs": (int, NoneType)}

    def _facts(self) -> dict[str, Any]:
        return {"y_ndim": self._y_ndim}

    def _restore(self, data: Mapping[str, Tensor], facts: Contents) -> None:
        self._y_ndim = facts.fact("fitted.y_ndim", int)
        if self._y_ndim not in ((1, 2) if data["y"].shape[1:] == (1,) else (2,)):
            raise InputError(f"y_ndim={self._y_ndim} does not go with y of shape {tuple(data['y'].shape)}.")
        self._check_width(data["y"].shape[1], self._network.num_outputs(data["x"]))
        self._model = self._transfer(data["x"], data["y"], data.get("yvar"), data.get("weights"))

    def _shaped(self, values: Tensor) -> NDArray[Any]:
        """`[N*C]` as y was given to `fit`."""
        array = values.cpu().numpy()
        return array if self._y_ndim == 1 else array.reshape(-1, self._model.task.num_outputs)

    def _finish(self) -> None:
        super()._finish()
        noise = self._model.noise
        self.noise_variance_ = noise.item() if noise.numel() == 1 else noise.cpu().numpy()


def _variances(yvar: ArrayLike, y: NDArray[Any]) -> NDArray[Any]:
    variances = as_tensor(yvar, "yvar").double().numpy()
    if variances.shape != y.shape:
        raise InputError(f"yvar has shape {variances.shape}, but y has shape {y.shape}: give one variance per target.")
    variances = np.where(np.isnan(y), 0.0, variances)
    if not (np.isfinite(variances) & (variances >= 0)).all():
        raise InputError("yvar has negative, infinite or NaN values: give variances, zero where an error is not known.")
    return variances
