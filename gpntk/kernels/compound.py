"""What the host's compound kernels and lazy matrices do not ask of kernels of networks, which have C rows per input.

Sums and products of kernels, and the matrices of scaled ones, are the host's own classes, made by the left part's + or
by the user, so that the questions can be asked here only. All other kernels go on as they were.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import AdditiveKernel, Kernel, ProductKernel
from gpytorch.lazy import LazyEvaluatedKernelTensor
from gpytorch.likelihoods import Likelihood
from gpytorch.models.exact_prediction_strategies import DefaultPredictionStrategy
from linear_operator.operators import LinearOperator
from torch import Tensor

from gpntk.errors import InputError
from gpntk.kernels.prediction_strategy import AbstractNetworkKernel, PosteriorPredictionStrategy


def _has_network(kernel: Kernel) -> bool:
    return any(isinstance(part, AbstractNetworkKernel) for part in kernel.modules())


def _compound_strategy(
    kernel: Kernel,
    train_inputs: Any,
    train_prior_dist: MultivariateNormal,
    train_labels: Tensor,
    likelihood: Likelihood,
) -> DefaultPredictionStrategy:
    """That of a sum or a product of kernels: ours if it contains one of ours, else the host's."""
    strategy = PosteriorPredictionStrategy if _has_network(kernel) else DefaultPredictionStrategy
    return strategy(train_inputs, train_prior_dist, train_labels, likelihood)


def _with_equal_rows(forward: Any) -> Any:
    """``forward`` of a sum or a product whose parts have equally many rows per input: torch would broadcast one row."""

    @wraps(forward)
    def checked(kernel: Any, x1: Tensor, x2: Tensor, *args: Any, **params: Any) -> Any:
        if _has_network(kernel):
            rows = [part.num_outputs_per_input(x1, x2) for part in kernel.kernels]
            if len(set(rows)) > 1:
                parts = ", ".join(f"{type(part).__name__} {n}" for part, n in zip(kernel.kernels, rows, strict=True))
                raise InputError(
                    f"the parts of {type(kernel).__name__} differ in their rows per input: {parts}. A network of C "
                    "outputs has C: for one output, give its kernel output=0 (its number) or output='independent'; for "
                    f"all, make the others gpytorch.kernels.MultitaskKernel(..., num_tasks={max(rows)})."
                )
        return forward(kernel, x1, x2, *args, **params)

    return checked


def _plus(gram: Any, other: Any) -> Any:
    """A lazy matrix plus the noise of the labels, of which there must be one for each row."""
    if isinstance(other, LinearOperator) and other.shape[-1] != gram.shape[-1] and _has_network(gram.kernel):
        raise InputError(
            f"the kernel has {gram.shape[-1]} rows, but the likelihood's noise is of {other.shape[-1]} values: a "
            "network of C outputs has C rows per input. For one output, take output=0 (its number) or "
            "output='independent'. For all, return a MultitaskMultivariateNormal with a mean [N, C], "
            "gpntk.NetworkMean's say, and use a MultitaskGaussianLikelihood."
        )
    return LinearOperator.__add__(gram, other)


for _host in (AdditiveKernel, ProductKernel):
    if "prediction_strategy" not in vars(_host):
        setattr(_host, "prediction_strategy", _compound_strategy)  # noqa: B010
        setattr(_host, "forward", _with_equal_rows(_host.forward))  # noqa: B010
if "__add__" not in vars(LazyEvaluatedKernelTensor):
    setattr(LazyEvaluatedKernelTensor, "__add__", _plus)  # noqa: B010
