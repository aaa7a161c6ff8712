"""Exact GP regression with a feature kernel, as a GPyTorch model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import final

import gpytorch
import numpy as np
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import Kernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood, MultitaskGaussianLikelihood
from gpytorch.means import ConstantMean, Mean, MultitaskMean, ZeroMean
from gpytorch.mlls import ExactMarginalLogLikelihood
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from gpntk._checks import (
    check_flags,
    check_input,
    check_kinds,
    check_magnitude,
    check_tensors,
    check_values,
)
from gpntk.errors import InputError, SolveError
from gpntk.inference.maximum import Point, maximize
from gpntk.io import Checkpoint, Identity, described
from gpntk.kernels import AbstractFeatureKernel, log_scale_constraint

# Stands in for the size of targets that are all zero.
_SMALLEST_SQUARE = 1e-12
# Size of targets that searches reach from variances of one, in the host's float32 bounds.
_LARGEST = 1e12
# Values of the marginal likelihood are sums of rounding errors of so many of the precision's.
_ROUNDING = 10.0


@final
class TangentGP(gpytorch.models.ExactGP):
    """y = m + g(x) + noise with g ~ GP(0, s k(x, x')), k a feature kernel; for C outputs, jointly over all of them.

    Hyperparameters: scale s (or the kernel's own layer variances), noise variance (bounded below by what the precision
    can factorise), and a constant m per output if ``constant_mean``. Variances are fitted in log-space.

    Args:
        x: Inputs `[N, D]`.
        y: Targets `[N]`, or `[N, C]` if the kernel has C > 1 outputs per input; NaN for missing ones, to be used with
            ``gpytorch.settings.observation_nan_policy``.
        kernel: The feature kernel.
        constant_mean: Whether m is learned; otherwise it is zero.

    Example:
        >>> import torch, gpntk
        >>> x = torch.rand(20, 2, dtype=torch.float64)
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
        >>> model = TangentGP(x, x.sum(-1), gpntk.NTKKernel(network))
        >>> model.eval()(x[:3]).mean.shape
        torch.Size([3])
    """

    likelihood: GaussianLikelihood | MultitaskGaussianLikelihood
    covar_module: ScaleKernel | AbstractFeatureKernel
    mean_module: Mean

    def __init__(self, x: Tensor, y: Tensor, kernel: AbstractFeatureKernel, constant_mean: bool = False) -> None:
        check_kinds(Kernel, "an NTKKernel(network)", kernel=kernel)
        check_flags(constant_mean=constant_mean)
        check_tensors(x=x)
        check_input(x, x.device)
        check_values(x.device, y=y)
        if x.dim() != 2 or not len(x):
            raise InputError(f"x has shape {tuple(x.shape)}: give [N, D], at least one row.")
        outputs = kernel.num_outputs_per_input(x, x)
        expected = (len(x),) if outputs == 1 else (len(x), outputs)
        if y.shape != expected:
            raise InputError(f"y has shape {tuple(y.shape)}: give {expected} for {outputs} output(s) of the kernel.")
        if not y.is_floating_point():
            raise InputError(f"y must be floating point, got {y.dtype}: pass y.double().")
        check_magnitude(y)
        size = y.double().square().nanmean().sqrt().item()
        if not (size == 0 or 1 / _LARGEST < size < _LARGEST):
            raise InputError(f"y has a root mean square of {size:.1e}: give y in other units, of order one.")
        self.min_noise = _smallest_noise(y.dtype) * (size**2 or _SMALLEST_SQUARE)
        super().__init__(x, y, _likelihood(outputs, self.min_noise))
        mean = ConstantMean() if constant_mean else ZeroMean()
        self.mean_module = mean if outputs == 1 else MultitaskMean(mean, num_tasks=outputs)
        own_scale = "raw_layer_variances" in dict(kernel.named_parameters())
        self.covar_module = kernel if own_scale else ScaleKernel(kernel, outputscale_constraint=log_scale_constraint())
        self._distribution = MultivariateNormal if outputs == 1 else MultitaskMultivariateNormal
        self.to(x)

    def forward(self, x: Tensor) -> MultivariateNormal:
        """The prior distribution of f at x `[N, D]`, as GPyTorch calls it."""
        mean = self.mean_module(x)
        assert isinstance(mean, Tensor)
        return self._distribution(mean, self.covar_module(x))

    @property
    def scale(self) -> Tensor:
        """Prior variance of the weights `[1]`, or of each layer's `[L]`."""
        kernel = self.covar_module
        scale = kernel.layer_variances if isinstance(kernel, AbstractFeatureKernel) else kernel.outputscale
        assert isinstance(scale, Tensor)
        return scale.flatten()

    @property
    def noise(self) -> Tensor:
        """Variance of the observation noise `[]`."""
        noise = self.likelihood.noise
        assert noise is not None
        return noise.squeeze()

    def fit(
        self,
        max_steps: int = 200,
        callback: Callable[[int, float], None] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> float:
        """Maximise the marginal likelihood by L-BFGS from the present hyperparameters; return its value in nats.

        Priors of the host count as the host counts them. Where the covariance cannot be factorised, the search turns
        back. A progress bar appears when the fit takes longer than two seconds.

        With a ``checkpoint``, each step ends with the best hyperparameters so far written to that file, before the
        callback runs. If the file exists when ``fit`` is called, the fit goes on from there, not from the present
        hyperparameters. A fit that has finished returns at once; one that ran out of ``max_steps``, which count from
        the first start, goes on if given more.

        Args:
            max_steps: Most steps to take, those before a resumption included.
            callback: Is given the number of each step, from 0, and the best value so far in nats.
            checkpoint: File to keep the fit in.

        Raises:
            SolveError, NotPSDError, NanError: The covariance cannot be factorised at the start already.
            FileFormatError: ``checkpoint`` is damaged, or belongs to another model or other data.
            InputError: ``max_steps`` is negative, or ``checkpoint`` is a folder, or stands in one that does not exist.
        """
        self.train()
        found = maximize(
            self._objective(),
            [self._hyperparameters()],
            max_steps=max_steps,
            rounding=_ROUNDING * torch.finfo(self._data[1].dtype).eps,
            checkpoint=None if checkpoint is None else Checkpoint(checkpoint, "fit", self._identity()),
            callback=callback,
        )
        self._set_hyperparameters(found.point)
        self.eval()
        return found.value

    def _objective(self) -> Callable[[Point], tuple[float, Point]]:
        """The marginal likelihood in nats and its gradient; -inf where it cannot be computed, but not at the start."""
        objective = ExactMarginalLogLikelihood(self.likelihood, self)
        x, targets = self._data
        parameters = self._fitted()
        started = False

        def evaluate(point: Point) -> tuple[float, Point]:
            nonlocal started
            self._set_hyperparameters(point)
            # The same random probes in every evaluation: large problems estimate the log-determinant stochastically,
            # and a line search needs one function to climb, not a new one at each point.
            with torch.random.fork_rng(devices=[targets.device] if targets.is_cuda else []):
                torch.manual_seed(0)
                try:
                    # Importing botorch switches this off, and a dense factorisation on, for the whole process.
                    with gpytorch.settings.fast_computations(log_prob=True):
                        value = torch.as_tensor(objective(self(x), targets)) * targets.numel()  # it is per observation
                    gradients = torch.autograd.grad(value, parameters)
                except (InputError, SolveError, NotPSDError, NanError):
                    if not started:
                        raise
                    return -math.inf, np.zeros_like(point)
            started = True
            return value.item(), parameters_to_vector(gradients).double().cpu().numpy()

        return evaluate

    def _fitted(self) -> list[Tensor]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def _hyperparameters(self) -> Point:
        return parameters_to_vector(self._fitted()).detach().double().cpu().numpy()

    @torch.no_grad()
    def _set_hyperparameters(self, point: Point) -> None:
        parameters = self._fitted()
        for parameter, values in zip(
            parameters, torch.tensor(point).split([p.numel() for p in parameters]), strict=True
        ):
            parameter.copy_(values.view_as(parameter))

    @torch.no_grad()
    def _identity(self) -> Identity:
        """What distinguishes this fit from others: data, kernel, and names and shapes of the hyperparameters.

        Weights do not tell a tanh from a ReLU, nor one sketch from another; the mean of the prior variances k(x, x),
        for unit variances of the weights, does. It is taken over all rows, as the fit itself does it:
        `gpntk.AutoBackend` makes its choice at the first x it sees.
        """
        kernel = self.covar_module.base_kernel if isinstance(self.covar_module, ScaleKernel) else self.covar_module
        assert isinstance(kernel, AbstractFeatureKernel)
        x, y = self._data
        network, active_dims = kernel.network, kernel.active_dims
        columns = x.index_select(-1, active_dims) if isinstance(active_dims, Tensor) else x
        variances = kernel.backend.diagonal(columns.unsqueeze(0), False)
        names = (f"{name} {list(p.shape)}{'' if p.requires_grad else ' fixed'}" for name, p in self.named_parameters())
        return {
            "inputs x": described(x),
            "targets y": described(y),
            "network's weights": described(network.tensors(x.dtype, x.device)),
            "differentiated parameters": f"{len(network.names)}: {' '.join(network.names)}",
            "kernel": f"output={kernel.output!r}, {kernel.num_features} features",
            "hyperparameters": ", ".join(names),
            "mean prior variance": variances.double().mean().item(),
        }

    @property
    def _data(self) -> tuple[Tensor, Tensor]:
        inputs, targets = self.train_inputs, self.train_targets
        assert inputs is not None
        assert isinstance(targets, Tensor)
        return inputs[0], targets


def _smallest_noise(dtype: torch.dtype) -> float:
    """Noise, relative to the largest prior variance, below which s K + σ² I cannot be factorised in ``dtype``."""
    return torch.finfo(dtype).eps ** 0.65


def _likelihood(outputs: int, min_noise: float) -> GaussianLikelihood | MultitaskGaussianLikelihood:
    if outputs == 1:
        return GaussianLikelihood(noise_constraint=log_scale_constraint(min_noise))
    return MultitaskGaussianLikelihood(
        num_tasks=outputs, has_task_noise=False, noise_constraint=log_scale_constraint(min_noise)
    )
