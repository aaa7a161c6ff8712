"""Stochastic variational GP classification, for more data than a factorisation can hold."""

from __future__ import annotations

from typing import final

import gpytorch
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.means import Mean
from gpytorch.optim import NGD
from gpytorch.variational import (
    IndependentMultitaskVariationalStrategy,
    NaturalVariationalDistribution,
    VariationalStrategy,
)
from linear_operator.operators import DenseLinearOperator
from torch import Tensor
from tqdm import tqdm

from gpntk._checks import check_count, check_input, check_kinds, check_positive, check_tensors, check_values
from gpntk.errors import InputError
from gpntk.inference.features import draw
from gpntk.likelihoods.links import Latent, with_reference
from gpntk.likelihoods.targets import check_labels

# Candidates for one inducing point.
_CANDIDATES = 10
# Residual prior variance, summed over the candidates and relative to the largest, that needs no inducing point.
_RESIDUAL = 1e-6
_PREDICTION_ROWS = 512


@final
class VariationalGP(gpytorch.models.ApproximateGP):
    """C latent outputs f_c = m_c + g_c, g_c ~ GP(0, k) independent, known through Gaussians of their values at Z.

    The labels of f are those of softmax(f), or of σ(f) if C = 1. One pass over the data costs O(N (M + B) M) for M
    inducing points and batches of B, beside the kernel. `LaplacePosterior` is exact in the data, has no step sizes and
    is to be preferred while N fits.

    Args:
        inducing_points: Z `[M, D]`, fixed; see `greedy_inducing_points`.
        kernel: k, one output per input: ``gpntk.NTKKernel(network, output="independent")`` or any of GPyTorch's.
        mean: Prior mean with outputs `[N, C]`, or `[N]` for all alike: `gpntk.NetworkMean`, or any of GPyTorch's.
        num_outputs: C, the number of classes; or 1 for two classes by one logit.

    Raises:
        InputError: ``inducing_points`` is no floating matrix, or the kernel has several outputs per input.

    Example:
        >>> import torch, gpytorch
        >>> x = torch.linspace(-1, 1, 60, dtype=torch.float64).unsqueeze(-1)
        >>> kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()).double()
        >>> model = VariationalGP(x[::6], kernel, gpytorch.means.ZeroMean(), num_outputs=1)
        >>> bound = model.fit(x, (x[:, 0] > 0).long(), epochs=20)
        >>> model.predict(x[-3:]).mean.min().item() > 0.5
        True

    References:
        Hensman, Matthews and Ghahramani (2015), Scalable Variational Gaussian Process Classification,
        https://arxiv.org/abs/1411.2005.
        Salimbeni, Eleftheriadis and Hensman (2018), Natural Gradients in Practice, https://arxiv.org/abs/1803.09151.
    """

    def __init__(self, inducing_points: Tensor, kernel: Kernel, mean: Mean, num_outputs: int) -> None:
        _check_rows(inducing_points, "inducing_points")
        check_kinds(Kernel, "a GPyTorch kernel", kernel=kernel)
        check_kinds(Mean, "a GPyTorch mean", mean=mean)
        check_count(num_outputs=num_outputs)
        per_input = kernel.num_outputs_per_input(inducing_points, inducing_points)
        if per_input != 1:
            raise InputError(f"kernel has {per_input} outputs per input: construct it with output='independent'.")
        distribution = NaturalVariationalDistribution(
            len(inducing_points), batch_shape=torch.Size([num_outputs]), mean_init_std=0.0
        )
        strategy = VariationalStrategy(self, inducing_points, distribution, learn_inducing_locations=False)
        super().__init__(IndependentMultitaskVariationalStrategy(strategy, num_tasks=num_outputs))
        self.covar_module, self.mean_module, self._outputs = kernel, mean, num_outputs
        self._columns = inducing_points.shape[1]
        self.to(inducing_points)

    def forward(self, x: Tensor) -> MultivariateNormal:
        """Prior at x `[N, D]`, a batch of C."""
        mean = self.mean_module(x)
        assert isinstance(mean, Tensor)
        means = (mean.unsqueeze(-1) if mean.dim() == 1 else mean).mT.expand(self._outputs, -1)
        # Evaluated here, once for all outputs; lazily, each would do it again.
        covariance = self.covar_module(x).to_dense()
        return MultivariateNormal(means, DenseLinearOperator(covariance.expand(self._outputs, -1, -1)))

    def fit(
        self,
        x: Tensor,
        labels: Tensor,
        *,
        epochs: int = 50,
        batch_size: int = 256,
        lr: float = 0.01,
        natural_lr: float = 0.1,
        num_samples: int = 16,
        seed: int = 0,
    ) -> float:
        """Maximise the evidence lower bound by mini-batches; return its estimate over the last epoch, in nats.

        Natural-gradient steps for the distribution at Z, Adam's for the hyperparameters of kernel and mean that require
        gradients. The expected log-likelihood is estimated by draws in antithetic pairs. A progress bar appears when
        the fit takes longer than two seconds.

        Args:
            x: Inputs `[N, D]`.
            labels: Classes `[N]`, integers from 0 to C - 1, or 0 and 1 if C = 1.
            epochs: Passes over the data.
            batch_size: Rows per step.
            lr: Step size of Adam.
            natural_lr: Step size of the natural gradient, at most 1.
            num_samples: Draws per row and step, even.
            seed: Of batches and draws.

        Raises:
            InputError: ``x`` and ``labels`` do not fit, x is not finite, or a label is none of the classes.
        """
        check_labels(labels, max(2, self._outputs))
        _check_rows(x, "x", self._columns)
        if len(x) != len(labels):
            raise InputError(f"x has {len(x)} rows and labels {len(labels)}: give a label for each input.")
        check_values(x.device, labels=labels)
        check_count(epochs=epochs, batch_size=batch_size)
        check_count(2, num_samples=num_samples)
        check_count(0, seed=seed)
        check_positive(lr=lr)
        check_positive(1.0 + 1e-12, natural_lr=natural_lr)
        generator = torch.Generator("cpu").manual_seed(seed)
        natural = list(self.variational_parameters())
        hyper = [parameter for parameter in self.hyperparameters() if parameter.requires_grad]
        optimizers: list[torch.optim.Optimizer] = [NGD(natural, num_data=1, lr=natural_lr)]
        optimizers += [torch.optim.Adam(hyper, lr=lr)] if hyper else []
        self.train()
        value = 0.0
        for _ in (bar := tqdm(range(epochs), "evidence lower bound", delay=2, leave=False)):
            value = 0.0
            for rows in torch.randperm(len(x), generator=generator, device="cpu").split(batch_size):
                noise = torch.randn(
                    num_samples // 2, len(rows), self._outputs, generator=generator, dtype=x.dtype, device="cpu"
                )
                bound = self._bound(x[rows], labels[rows].long(), noise.to(x.device), len(x))
                for optimizer in optimizers:
                    optimizer.zero_grad()
                (-bound).backward()
                for optimizer in optimizers:
                    optimizer.step()
                value += bound.item() * len(rows) / len(x)
            bar.set_postfix(nats=f"{value:.3f}", refresh=False)
        self.eval()
        return value

    @torch.no_grad()
    def predict(self, x: Tensor) -> Latent:
        """Latent outputs at x `[M, D]`: mean `[M, C]`, and covariance `[M, C, C]`, which is diagonal."""
        _check_rows(x, "x", self._columns)
        self.eval()
        parts = [self(rows) for rows in x.split(_PREDICTION_ROWS)]
        mean, variance = (torch.cat([getattr(part, name) for part in parts]) for name in ("mean", "variance"))
        return Latent(mean, variance.diag_embed())

    def _bound(self, x: Tensor, labels: Tensor, noise: Tensor, total: int) -> Tensor:
        """Unbiased estimate of the bound for ``total`` rows `[]`, from a batch of them."""
        # GPyTorch's likelihoods do not serve: the Bernoulli one is a probit, whose f is no logit, and the softmax one
        # takes a batch of C rows for transposed.
        latent = self(x)
        assert isinstance(latent, MultitaskMultivariateNormal)
        deviations = latent.variance.sqrt() * noise
        draws = latent.mean + torch.cat([deviations, -deviations])
        index = labels.view(1, -1, 1).expand(len(draws), -1, 1)
        expected = with_reference(draws).log_softmax(-1).gather(-1, index).mean(0).sum()
        return expected * (total / len(x)) - self.variational_strategy.kl_divergence().sum()


@torch.no_grad()
def greedy_inducing_points(x: Tensor, kernel: Kernel, count: int, seed: int = 0) -> Tensor:
    """At most ``count`` rows of x, each where the prior variance given the ones before it is largest.

    Chosen among ten times as many rows, drawn at random; fewer when they explain the prior to 1e-6 of its variance.

    Args:
        x: Inputs `[N, D]`.
        kernel: One output per input.
        count: M, the most inducing points.
        seed: Of the draw.

    Example:
        >>> import torch, gpytorch
        >>> x = torch.randn(200, 2)
        >>> greedy_inducing_points(x, gpytorch.kernels.RBFKernel(), 15).shape
        torch.Size([15, 2])

    References:
        Burt, Rasmussen and van der Wilk (2020), Convergence of Sparse Variational Inference in Gaussian Processes
        Regression, https://arxiv.org/abs/2008.00323.
    """
    _check_rows(x, "x")
    check_kinds(Kernel, "a GPyTorch kernel", kernel=kernel)
    check_count(count=count)
    check_count(0, seed=seed)
    candidates = x[draw(len(x), _CANDIDATES * count, seed).to(x.device)]
    gram = DenseLinearOperator(kernel(candidates).to_dense())
    factor, pivots = gram.pivoted_cholesky(count, error_tol=_RESIDUAL, return_pivots=True)
    return candidates[pivots[: factor.shape[-1]]]


def _check_rows(x: Tensor, name: str, columns: int | None = None) -> None:
    check_tensors(**{name: x})
    check_input(x, x.device, name, columns)
    if x.dim() != 2 or not len(x):
        raise InputError(f"{name} must be [N, D] with at least one row, got shape {tuple(x.shape)}.")
