"""GP regression with the tangent kernel alone, for any number of labels: the maximum of the marginal likelihood."""

from __future__ import annotations

from contextlib import ExitStack
from typing import final

import gpytorch
import torch
from gpytorch.distributions import MultivariateNormal
from torch import Tensor

from gpntk.inference import Features, SpectralFit, SpectralMarginalLikelihood
from gpntk.inference.features import draw
from gpntk.kernels import NTKKernel
from gpntk.models import TangentGP
from gpntk.network import FrozenNetwork
from gpntk.transfer.dense import Prediction

# Largest matrix, min(N*C, P), whose eigendecomposition serves a fit; one of this size took 13 s on two cores.
SPECTRAL_LIMIT = 5_000
# Rows predicted at once when only their means and variances are wanted.
_PREDICTION_ROWS = 512


@final
class TangentRegression:
    """y = c + g(x) + noise with g ~ GP(0, s J(x) S J(x')ᵀ); targets of order one.

    With a single scale and min(N*C, P) up to 5,000 labels, scale and noise come from one eigendecomposition: exact and
    global. Else L-BFGS from that solution on (at most 5,000 rows of) the data.

    Args:
        network: The frozen network.
        x: Inputs `[N, D]`.
        y: Targets `[N, C]`.
        constant: Whether there is a constant c per output, by generalised least squares.
        layer_variances: One prior variance per layer.

    References:
        Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, eqs. 2.23-2.26 and section 2.7.
    """

    def __init__(self, network: FrozenNetwork, x: Tensor, y: Tensor, constant: bool, layer_variances: bool) -> None:
        self._network, self._x, self._constant = network, x, constant
        self._outputs = y.shape[1]
        self._targets = y.squeeze(-1) if self._outputs == 1 else y
        kernel = NTKKernel(network, layer_variances=layer_variances)
        # One for all: what it keeps of x serves fit and predictions.
        self._backend = kernel.backend
        self._layers = [layer or "network" for layer, _ in network.layers] if layer_variances else None
        self.gp = TangentGP(x, self._targets, kernel, constant_mean=constant).eval()
        size = min(y.numel(), network.num_params)
        self._spectral_only = not layer_variances and size <= SPECTRAL_LIMIT

    def fit(self) -> float:
        """Maximise the marginal likelihood over scales, noise and constants; return it in nats."""
        fit = self._spectral_fit()
        self.gp.set_hyperparameters(fit.scale, fit.noise, fit.coefficients)
        if self._spectral_only:
            return fit.log_marginal_likelihood
        with _settings():
            return self.gp.fit()

    def predict(self, x: Tensor, covariance: bool = False) -> Prediction:
        """The posterior of c + g at x `[M, D]`."""
        if covariance:
            distribution = self._posterior(x)
            return Prediction(distribution.mean.detach().reshape(-1), distribution.covariance_matrix.detach())
        parts = []
        for rows in x.split(_PREDICTION_ROWS):
            distribution = self._posterior(rows)
            # Rounding can leave the variance of a training point a hair below zero.
            variance = distribution.lazy_covariance_matrix.diagonal().clamp_min(0)
            parts.append((distribution.mean.reshape(-1), variance))
        return Prediction(*(torch.cat(pieces).detach() for pieces in zip(*parts, strict=True)))

    def noise_variance(self) -> float:
        """σ²."""
        return self.gp.noise.item()

    def hyperparameters(self) -> dict[str, float]:
        """Values by name; variances are those of the terms, averaged over the inputs."""
        names = ["ntk"] if self._layers is None else [f"ntk {layer}" for layer in self._layers]
        diagonals = self._backend.diagonal(self._x.unsqueeze(0), self._layers is not None)[0]
        levels = diagonals.mean(-1) if self._layers else diagonals.sum(0).mean().unsqueeze(0)
        variances = self.gp.scale.detach() * levels.detach()
        return {**dict(zip(names, variances.tolist(), strict=True)), "noise": self.noise_variance()}

    def condition_on(self, x: Tensor, y: Tensor) -> TangentRegression:
        """The same with more labels, hyperparameters as they are; for one output by an update of low rank."""
        if self._outputs > 1:
            both = torch.cat([self._x, x]), torch.cat([self._targets, y])
            grown = TangentRegression(self._network, *both, self._constant, self._layers is not None)
            grown.gp.load_state_dict(self.gp.state_dict())
            grown.gp.eval()
            return grown
        self._posterior(x[:1])  # the host updates what a prediction has cached
        grown = TangentRegression.__new__(TangentRegression)
        grown.__dict__ = {
            **self.__dict__,
            "_x": torch.cat([self._x, x]),
            "_targets": torch.cat([self._targets, y[:, 0]]),
        }
        with torch.no_grad(), _settings():
            gp = self.gp.get_fantasy_model(x, y.squeeze(-1))
        assert isinstance(gp, TangentGP)
        grown.gp = gp
        return grown

    # --- private -----------------------------------------------------------------------------------------------

    def _spectral_fit(self) -> SpectralFit:
        x, targets = self._x, self._targets
        most = max(1, SPECTRAL_LIMIT // self._outputs)
        if x.shape[0] > most and self._network.num_params > SPECTRAL_LIMIT:
            chosen = draw(x.shape[0], most, seed=0).to(x.device)
            x, targets = x[chosen], targets[chosen]
        features = Features(self._backend, x)
        basis = None
        if self._constant:
            basis = torch.eye(self._outputs, dtype=x.dtype, device=x.device).repeat(x.shape[0], 1)
        with torch.no_grad():
            likelihood = SpectralMarginalLikelihood.from_features(features, targets.reshape(-1), basis)
        return likelihood.maximize(self.gp.min_noise)

    def _posterior(self, x: Tensor) -> MultivariateNormal:
        with torch.no_grad(), _settings():
            distribution = self.gp(x)
            assert isinstance(distribution, MultivariateNormal)
            return distribution


def _settings() -> ExitStack:
    """What the hosts' process-wide settings must not change here: importing botorch does."""
    stack = ExitStack()
    stack.enter_context(gpytorch.settings.fast_computations(True, True, True))
    stack.enter_context(gpytorch.settings.fast_pred_var(False))
    stack.enter_context(gpytorch.settings.debug(False))  # predicting at the training inputs is no mistake here
    return stack
