"""Variational classification with the tangent kernel, for more inputs than a factorisation can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import gpytorch
import torch
from gpytorch.kernels import Kernel, MaternKernel, RBFKernel, ScaleKernel
from gpytorch.means import Mean, ZeroMean
from torch import Tensor

from gpntk.errors import InputError
from gpntk.kernels import NTKKernel
from gpntk.likelihoods import Link, probabilities
from gpntk.means import NetworkMean
from gpntk.models import VariationalGP, greedy_inducing_points
from gpntk.network import FrozenNetwork
from gpntk.transfer.components import StationaryForm
from gpntk.transfer.prior import Candidate, Medians

_INDUCING_POINTS = 300
_EPOCHS = 30
_PREDICTION_ROWS = 512


@final
class Variational:
    """Class labels given logits with a prior of independent outputs; one set of inducing points for all.

    Args:
        tangents: Frozen networks whose tangent kernels, means over their outputs, are terms of the prior.
        candidate: Whether a stationary kernel of the inputs is a term.
        form: Its form.
        mean: The network whose outputs are the prior mean; None for zero.
        x: Inputs `[N, D]`.
        labels: Classes `[N]`.
        num_logits: C.
        medians: Where the variances start.
    """

    hyperparameters = ()
    draws = None

    def __init__(
        self,
        tangents: Mapping[str, FrozenNetwork],
        *,
        candidate: Candidate,
        form: StationaryForm,
        mean: FrozenNetwork | None,
        x: Tensor,
        labels: Tensor,
        num_logits: int,
        medians: Medians,
    ) -> None:
        if candidate.stationary_inputs == "features" and "stationary" in candidate.kernel:
            raise InputError("stationary_inputs='features' is not possible with method='variational': use 'inputs'.")
        self.x, self.labels = x, labels
        kernels = {
            name: _scaled(NTKKernel(network, output="independent"), x, medians.tangent)
            for name, network in tangents.items()
        }
        if "stationary" in candidate.kernel:
            base = RBFKernel(ard_num_dims=x.shape[1]) if form == "rbf" else MaternKernel(2.5, ard_num_dims=x.shape[1])
            base.lengthscale = 0.3 * (2 * x.shape[1]) ** 0.5 * x.std(0).clamp_min(1e-6)
            kernels[form] = _scaled(base.to(x), x, medians.stationary)
        self._names = list(kernels)
        kernel: Kernel = (
            gpytorch.kernels.AdditiveKernel(*kernels.values()) if len(kernels) > 1 else kernels[self._names[0]]
        )
        self._kernel = kernel
        prior_mean: Mean = ZeroMean() if mean is None else NetworkMean(mean)
        with torch.random.fork_rng(devices=[]):  # the host draws where the posterior starts, with no deviation
            points = greedy_inducing_points(x, kernel, min(_INDUCING_POINTS, len(x)))
            self.gp = VariationalGP(points, kernel, prior_mean, num_logits)

    def fit(self) -> float:
        """Maximise the evidence lower bound; returns it, in nats."""
        return self.gp.fit(self.x, self.labels, epochs=_EPOCHS)

    def predict(self, x: Tensor, offset: Tensor, link: Link) -> Tensor:  # noqa: ARG002 (the model knows its mean)
        """Probabilities of the classes at x `[M, D]`: `[M, K]`."""
        return probabilities(*self.gp.predict(x), link)

    def values(self) -> dict[str, float]:
        """Variances of the terms by name."""
        kernels = self._kernel.kernels if isinstance(self._kernel, gpytorch.kernels.AdditiveKernel) else [self._kernel]
        scales = (kernel.outputscale.item() for kernel in kernels if isinstance(kernel, ScaleKernel))
        return dict(zip(self._names, scales, strict=True))


def _scaled(kernel: Kernel, x: Tensor, variance: float) -> ScaleKernel:
    """``kernel`` times a scale that makes its mean variance at x ``variance``."""
    scaled = ScaleKernel(kernel).to(x)
    with torch.no_grad():
        rows = x[:_PREDICTION_ROWS]
        diagonal = kernel(rows, diag=True)
        assert isinstance(diagonal, Tensor)
        scaled.outputscale = variance / diagonal.mean().clamp_min(torch.finfo(x.dtype).tiny)
    return scaled
