"""Transfer learning in closed form: freeze a source network, fit a GP to what it leaves unexplained, predict.

    y = m(x) + g(x) + noise,    g ~ GP(0, s J(x) S J(x')ᵀ)

With m(x) = f(x; w*), this is Bayesian linear regression in the tangent space of the network at its pretrained weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Literal, NamedTuple, final

import gpytorch
import torch
from gpytorch.distributions import MultivariateNormal
from torch import Tensor, nn

from gpntk._types import Extract, ParameterSelection
from gpntk.errors import InputError
from gpntk.inference import Features, SpectralFit, SpectralMarginalLikelihood
from gpntk.inference.features import draw
from gpntk.kernels import NTKKernel
from gpntk.models import TangentGP
from gpntk.network import FrozenNetwork

MeanChoice = Literal["network", "constant", "zero"]

# Largest matrix, min(N*C, P), whose eigendecomposition serves a fit; one of this size took 13 s on two cores.
SPECTRAL_LIMIT = 5_000
# Rows predicted at once when only their means and variances are wanted.
_PREDICTION_ROWS = 512


def freeze(
    network: nn.Module,
    parameters: ParameterSelection = None,
    input_shape: Sequence[int] | None = None,
    extract: Extract | None = None,
) -> FrozenNetwork:
    """The network frozen where it is, as a pure function of the selected parameters; see `FrozenNetwork`.

    Example:
        >>> import torch, gpntk
        >>> gpntk.freeze(torch.nn.Linear(3, 2), parameters="*bias").num_params
        2
    """
    return FrozenNetwork(network, parameters, input_shape, extract)


class Prediction(NamedTuple):
    """A Gaussian prediction: mean `[N*C]`, and a variance `[N*C]` or covariance `[N*C, N*C]`, rows n*C + c."""

    mean: Tensor
    spread: Tensor


@final
class TransferGP:
    """A GP for the target task on top of a frozen source network: tensors in, tensors out.

    `TransferRegressor` is its scikit-learn face; use this one for tensors on any device.

    Args:
        network: The source network, frozen.
        x: Inputs of the target task `[N, D]`.
        y: Targets `[N, C]`, C the network's number of outputs.
        mean: Prior mean: the network's own output, a constant per output (by generalised least squares), or zero.
        layer_variances: Learn one prior variance per layer instead of one for all.

    Raises:
        InputError: The targets do not have the network's number of outputs.

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
        self, network: FrozenNetwork, x: Tensor, y: Tensor, mean: MeanChoice = "network", layer_variances: bool = False
    ) -> None:
        outputs = network.num_outputs(x)
        if y.shape != (x.shape[0], outputs):
            raise InputError(
                f"y has shape {tuple(y.shape)}, but {x.shape[0]} rows and a network with {outputs} output(s) need "
                f"{(x.shape[0], outputs)}: give one column of y per output of the network."
            )
        self._network, self._mean = network, mean
        self._outputs = outputs
        with torch.no_grad():
            residual = y - self._offset(x)
            centered = residual - residual.mean(0) if mean == "constant" else residual
            # The GP sees targets of order one; a single factor for all outputs keeps their prior covariance.
            spread = centered.square().mean().sqrt()
        self._unit = spread if spread > 0 else torch.ones_like(spread)
        kernel = NTKKernel(network, layer_variances=layer_variances)
        targets = residual / self._unit
        self._x, self._targets = x, targets.squeeze(-1) if outputs == 1 else targets
        self._gp = TangentGP(x, self._targets, kernel, constant_mean=mean == "constant").eval()
        size = min(targets.numel(), network.num_params)
        self._spectral_only = not layer_variances and size <= SPECTRAL_LIMIT

    def fit(self) -> float:
        """Maximise the marginal likelihood over scale, noise and constants; return it in nats, in the units of y.

        With a single scale and min(N*C, P) up to 5,000, by one eigendecomposition: exact and global. Else L-BFGS from
        that solution on (at most 5,000 rows of) the data, with the log-determinant as exact as the solver's.
        """
        fit = self._spectral_fit()
        self._gp.set_hyperparameters(fit.scale, fit.noise, fit.coefficients)
        value = fit.log_marginal_likelihood
        if not self._spectral_only:
            with self._settings():
                value = self._gp.fit()
        return value - self._targets.numel() * self._unit.log().item()

    def predict(self, x: Tensor, covariance: bool = False, observation_noise: bool = True) -> Prediction:
        """Posterior at x `[N, D]`: mean, and variances or covariance, of y (or of the noise-free function)."""
        if covariance:
            distribution = self._posterior(x)
            spread = distribution.covariance_matrix
            noise = torch.eye(spread.shape[-1], dtype=x.dtype, device=x.device)
            return self._in_units(x, distribution, spread, noise, observation_noise)
        parts = []
        for rows in x.split(_PREDICTION_ROWS):
            distribution = self._posterior(rows)
            # Rounding can leave the variance of a training point a hair below zero.
            variance = distribution.lazy_covariance_matrix.diagonal().clamp_min(0)
            parts.append(self._in_units(rows, distribution, variance, torch.ones_like(variance), observation_noise))
        return Prediction(*(torch.cat(pieces) for pieces in zip(*parts, strict=True)))

    @property
    def scale(self) -> Tensor:
        """s, the prior variance of the weights in the units of y (one per layer `[L]` with ``layer_variances``)."""
        return self._gp.scale.detach() * self._unit.square()

    @property
    def noise(self) -> Tensor:
        """Noise variance, in the units of y squared."""
        return self._gp.noise.detach() * self._unit.square()

    def state(self) -> dict[str, Tensor]:
        """Hyperparameters by name, for `load_state`."""
        return {name: tensor.detach().clone() for name, tensor in self._gp.state_dict().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take the hyperparameters of another `TransferGP` on the same data and network."""
        self._gp.load_state_dict(state)
        self._gp.eval()

    # --- private -----------------------------------------------------------------------------------------------

    def _offset(self, x: Tensor) -> Tensor:
        """What the GP need not explain `[N, C]`."""
        if self._mean == "network":
            return self._network(x)
        return torch.zeros(x.shape[0], self._outputs, dtype=x.dtype, device=x.device)

    def _spectral_fit(self) -> SpectralFit:
        x, targets = self._x, self._targets
        most = max(1, SPECTRAL_LIMIT // self._outputs)
        if x.shape[0] > most and self._network.num_params > SPECTRAL_LIMIT:
            chosen = draw(x.shape[0], most, seed=0).to(x.device)
            x, targets = x[chosen], targets[chosen]
        features = Features(NTKKernel(self._network).backend, x)
        basis = None
        if self._mean == "constant":
            basis = torch.eye(self._outputs, dtype=x.dtype, device=x.device).repeat(x.shape[0], 1)
        with torch.no_grad():
            likelihood = SpectralMarginalLikelihood.from_features(features, targets.reshape(-1), basis)
        return likelihood.maximize(self._gp.min_noise)

    def _posterior(self, x: Tensor) -> MultivariateNormal:
        with torch.no_grad(), self._settings():
            distribution = self._gp(x)
            assert isinstance(distribution, MultivariateNormal)
            return distribution

    def _in_units(
        self, x: Tensor, distribution: MultivariateNormal, spread: Tensor, noise: Tensor, observation_noise: bool
    ) -> Prediction:
        with torch.no_grad():
            mean = self._offset(x).reshape(-1) + self._unit * distribution.mean.reshape(-1)
            spread = spread + noise * self._gp.noise if observation_noise else spread
            return Prediction(mean, spread * self._unit.square())

    @staticmethod
    def _settings() -> ExitStack:
        """What the hosts' process-wide settings must not change here: importing botorch does."""
        stack = ExitStack()
        stack.enter_context(gpytorch.settings.fast_computations(True, True, True))
        stack.enter_context(gpytorch.settings.fast_pred_var(False))
        stack.enter_context(gpytorch.settings.debug(False))  # predicting at the training inputs is no mistake here
        return stack
