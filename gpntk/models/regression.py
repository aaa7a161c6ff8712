"""Exact GP regression with a feature kernel, as a GPyTorch model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import final

import gpytorch
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood, MultitaskGaussianLikelihood
from gpytorch.means import ConstantMean, Mean, MultitaskMean, ZeroMean
from gpytorch.mlls import ExactMarginalLogLikelihood
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Tensor
from tqdm import tqdm

from gpntk.errors import InputError, SolveError
from gpntk.inference.spectral import smallest_noise
from gpntk.kernels import AbstractFeatureKernel, log_scale_constraint
from gpntk.models.checkpoint import (
    FitState,
    Identity,
    identify,
    load_fit,
    optimizer_state,
    restore_optimizer,
    save_fit,
)

_RELATIVE_CHANGE = 1e-7
# Stands in for the size of targets that are all zero.
_SMALLEST_SQUARE = 1e-12
_PATIENCE = 3


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
        outputs = kernel.num_outputs_per_input(x, x)
        if not y.is_floating_point():
            raise InputError(f"y must be floating point, got {y.dtype}: pass y.double().")
        self.min_noise = smallest_noise(y.dtype) * max(y.square().nanmean().item(), _SMALLEST_SQUARE)
        super().__init__(x, y, _likelihood(outputs, self.min_noise))
        mean = ConstantMean() if constant_mean else ZeroMean()
        self.mean_module = mean if outputs == 1 else MultitaskMean(mean, num_tasks=outputs)
        own_scale = "raw_layer_variances" in dict(kernel.named_parameters())
        self.covar_module = kernel if own_scale else ScaleKernel(kernel, outputscale_constraint=log_scale_constraint())
        self._distribution = MultivariateNormal if outputs == 1 else MultitaskMultivariateNormal
        self.to(x)

    def forward(self, x: Tensor) -> MultivariateNormal:
        """Prior at x `[N, D]`."""
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
        """Noise variance `[]`."""
        noise = self.likelihood.noise
        assert noise is not None
        return noise.squeeze()

    def set_hyperparameters(self, scale: float, noise: float, constants: Tensor) -> None:
        """Set s (every layer's variance alike), the noise variance, and the constants `[C]` (or none)."""
        # As float64 tensors: the host would round a Python number to float32 on the way.
        prior_variance, noise_variance = torch.tensor([scale, noise], dtype=torch.float64, device="cpu")
        if isinstance(self.covar_module, ScaleKernel):
            self.covar_module.outputscale = prior_variance
        else:
            self.covar_module.layer_variances = prior_variance
        self.likelihood.noise = noise_variance
        constant_means = (module for module in self.mean_module.modules() if isinstance(module, ConstantMean))
        for mean, constant in zip(constant_means, constants, strict=True):
            mean.initialize(constant=constant)

    def fit(
        self,
        max_steps: int = 200,
        callback: Callable[[int, float], None] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> float:
        """Maximise the marginal likelihood by L-BFGS from the present hyperparameters; return its value in nats.

        Stops when three steps in a row improve it by less than 1e-7 of its size, or at a step whose covariance cannot
        be factorised. ``callback(step, value)`` runs after each step. A progress bar appears when the fit takes longer
        than two seconds.

        With a ``checkpoint``, each step ends with the state of the fit written to that file, before the callback runs.
        If the file exists when ``fit`` is called, the fit goes on from there, not from the present hyperparameters:
        through the same values as one that was never stopped, bit for bit where the covariance is factorised densely
        (GPyTorch's ``max_cholesky_size``), else to rounding. A fit that has finished returns at once; one that ran out
        of ``max_steps``, which count from the first start, goes on if given more.

        Args:
            max_steps: Most steps to take, those before a resumption included.
            callback: Is given the number of each step, from 0, and the value in nats at the point it started from.
            checkpoint: File to keep the fit in.

        Raises:
            SolveError, NotPSDError, NanError: The covariance cannot be factorised at the start already.
            FileFormatError: ``checkpoint`` is damaged, or belongs to another model or other data.
            InputError: ``checkpoint`` is a folder, or stands in one that does not exist.
        """
        self.train()
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.LBFGS(parameters, max_iter=1, max_eval=20, line_search_fn="strong_wolfe")
        loss = self._loss(optimizer)
        identity = {} if checkpoint is None else self._identity()
        fit = self._resume(optimizer, None if checkpoint is None else load_fit(checkpoint, identity))

        def keep(fit: FitState) -> None:
            if checkpoint is not None:
                now = fit._replace(model=self._snapshot(), optimizer=optimizer_state(optimizer))
                save_fit(checkpoint, identity, now)

        steps = range(fit.steps, fit.steps if fit.finished else max_steps)
        bar = tqdm(steps, "marginal likelihood", initial=fit.steps, total=max_steps, delay=2, leave=False)
        for step in bar:
            before = self._snapshot()
            try:
                value = -torch.as_tensor(optimizer.step(loss)).item()  # at the point the step started from
            except (SolveError, NotPSDError, NanError):
                if not math.isfinite(fit.value):
                    raise
                fit = fit._replace(finished=True)
                keep(fit)
                break
            fit = _after_step(fit, value, before)
            keep(fit)
            if callback is not None:
                callback(step, value)
            bar.set_postfix(nats=f"{value:.3f}", refresh=False)
            if fit.finished:
                break
        self.load_state_dict(fit.best)
        self.eval()
        return fit.value

    # --- private -----------------------------------------------------------------------------------------------

    def _loss(self, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
        """The negative marginal likelihood in nats `[]`, leaving its gradient in the parameters."""
        objective = ExactMarginalLogLikelihood(self.likelihood, self)
        x, targets = self._data

        def loss() -> Tensor:
            optimizer.zero_grad()
            # The same random probes in every evaluation: large problems estimate the log-determinant stochastically,
            # and a line search needs one function to descend, not a new one at each point.
            with torch.random.fork_rng(devices=[targets.device] if targets.is_cuda else []):
                torch.manual_seed(0)
                # Importing botorch switches this off, and a dense factorisation on, for the whole process.
                with gpytorch.settings.fast_computations(log_prob=True):
                    value = objective(self(x), targets)
            assert isinstance(value, Tensor)
            value = -value * targets.numel()  # the host's value is per observation
            value.backward()
            return value

        return loss

    def _resume(self, optimizer: torch.optim.LBFGS, fit: FitState | None) -> FitState:
        """``fit``, with the model and the optimizer put where it stands; or the start of a new one."""
        if fit is None:
            state = self._snapshot()
            return FitState(steps=0, stalled=0, finished=False, value=-math.inf, best=state, model=state, optimizer={})
        self.load_state_dict(fit.model)
        restore_optimizer(optimizer, fit.optimizer)
        return fit

    def _identity(self) -> Identity:
        kernel = self.covar_module.base_kernel if isinstance(self.covar_module, ScaleKernel) else self.covar_module
        assert isinstance(kernel, AbstractFeatureKernel)
        return identify(*self._data, kernel, self)

    @property
    def _data(self) -> tuple[Tensor, Tensor]:
        inputs, targets = self.train_inputs, self.train_targets
        assert inputs is not None
        assert isinstance(targets, Tensor)
        return inputs[0], targets

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.state_dict().items()}


def _after_step(fit: FitState, value: float, before: dict[str, Tensor]) -> FitState:
    """``fit`` one step later, a step that started from ``before``, where the marginal likelihood is ``value``."""
    stalled = 0 if value > fit.value + _RELATIVE_CHANGE * (1 + abs(value)) else fit.stalled + 1
    fit = fit._replace(steps=fit.steps + 1, stalled=stalled, finished=stalled >= _PATIENCE)
    return fit._replace(value=value, best=before) if value > fit.value else fit


def _likelihood(outputs: int, min_noise: float) -> GaussianLikelihood | MultitaskGaussianLikelihood:
    if outputs == 1:
        return GaussianLikelihood(noise_constraint=log_scale_constraint(min_noise))
    return MultitaskGaussianLikelihood(
        num_tasks=outputs, has_task_noise=False, noise_constraint=log_scale_constraint(min_noise)
    )
