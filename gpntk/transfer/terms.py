"""Terms of a prior covariance: kernels of the library and of GPyTorch, with their hyperparameters as arguments.

A term is a function of its hyperparameters θ and of *prepared* inputs: what does not depend on θ is computed once, so
that every new θ costs one pass over matrices and no product with a Jacobian.

A term is *shared* when its outputs are independent and alike: its covariance is k(x, x') times the identity of size C,
and its matrices are those of k, with one row per input. Otherwise rows are n*C + c.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, final

import gpytorch
import torch
from gpytorch.constraints import Interval
from gpytorch.kernels import Kernel, ScaleKernel
from gpytorch.priors import Prior
from linear_operator import to_dense
from torch import Tensor, nn
from torch.distributions import Distribution, StudentT
from torch.func import functional_call

from gpntk.inference.features import draw, exact_dtype
from gpntk.inference.hyperposterior import Hyperparameter
from gpntk.kernels import AbstractFeatureKernel
from gpntk.memory import TensorCache

# Degrees of freedom of the priors: tails that give way when the data disagree.
_FREEDOM = 4.0
# Width of the prior of a hyperparameter that came without one, in powers of e.
_SPREAD = 1.5
# Rows that say how large a kernel is on the data.
_LEVEL_ROWS = 10_000
# Sets of inputs whose Grams may be asked for again.
_LATEST = 8

Represent = Callable[[Tensor], Tensor]
"""From inputs `[N, D]` to what a kernel compares `[N, D']`."""

Names = Mapping[str, Sequence[str]]
"""Names of the hyperparameters in each parameter of a kernel, by the parameter's name."""


class Slot(NamedTuple):
    """A parameter of a kernel that holds hyperparameters."""

    name: str
    shape: torch.Size
    constraint: Interval


@final
class LogStudentTPrior(Prior):
    """A GPyTorch prior of a positive number: its logarithm has Student's t-distribution with four degrees of freedom.

    Args:
        median: The number's median.
        spread: Width of the logarithm's distribution, in powers of e.
    """

    def __init__(self, median: float, spread: float) -> None:
        nn.Module.__init__(self)
        Distribution.__init__(self, validate_args=False)
        self.median, self.spread = median, spread

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density of the number x itself."""
        logs = StudentT(_FREEDOM, math.log(self.median), self.spread)
        return logs.log_prob(x.log()) - x.log()

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of the number."""
        return StudentT(_FREEDOM, math.log(self.median), self.spread).rsample(torch.Size(sample_shape)).exp()

    def expand(self, batch_shape: Any, _instance: Any = None) -> LogStudentTPrior:  # noqa: ARG002
        """The same: it has no batch."""
        return self


class AbstractTerm(ABC):
    """One term of a prior covariance.

    Attributes:
        shared: Whether its outputs are independent and alike.
        hyperparameters: θ.
        scale: Which hyperparameter is a factor of the whole term; None if none is.
    """

    shared: bool
    hyperparameters: tuple[Hyperparameter, ...]
    scale: int | None = None

    @abstractmethod
    def prepare(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
        """What does not depend on θ, for x1 `[..., N, D]` and x2 `[..., M, D]`."""

    @abstractmethod
    def matrix(self, logs: Tensor, prepared: tuple[Tensor, ...]) -> Tensor:
        """The covariance `[..., n, m]` at the hyperparameters whose logarithms are ``logs`` `[H]`."""

    @abstractmethod
    def diagonal(self, logs: Tensor, x: Tensor) -> Tensor:
        """Prior variances of the term at x `[N, D]`: `[n]`."""


@final
class FeatureTerm(AbstractTerm):
    """Σ_g s_g Φ_g(x) Φ_g(x')ᵀ: one variance for all features of a kernel of ours, or one per layer.

    Args:
        kernel: `gpntk.NTKKernel`, `gpntk.NNGPKernel` or another kernel of features, with ``layer_variances`` or within
            a ``ScaleKernel``.
        x: Inputs at which the mean of Σ_g Φ_g(x) Φ_g(x)ᵀ is the unit of the variances.
        outputs: C; a kernel with one row per input is shared where C is more.
        names: Of the hyperparameters in each parameter; see `HostTerm`.
        unit: Whether variances are measured in that unit, or are the kernel's own.
    """

    def __init__(self, kernel: Kernel, x: Tensor, outputs: int, names: Names | None = None, unit: bool = True) -> None:
        base = kernel.base_kernel if isinstance(kernel, ScaleKernel) else kernel
        assert isinstance(base, AbstractFeatureKernel)
        self.features, self._level = base, 1.0
        self.hyperparameters, slots = read_hyperparameters(kernel, names)
        self.grouped = any("layer_variances" in slot.name for slot in slots)
        if self.grouped and isinstance(kernel, ScaleKernel):
            # A scale beside the variances of all layers says nothing new.
            self.hyperparameters = self.hyperparameters[1:]
            self._level = 1 / float(kernel.outputscale)
        self.scale = 0 if len(self.hyperparameters) == 1 else None
        self.shared = base.num_outputs_per_input(x, x) != outputs
        if unit:
            rows = x if len(x) <= _LEVEL_ROWS else x[draw(len(x), _LEVEL_ROWS, seed=0).to(x.device)]
            with torch.no_grad():
                self._level = base.group_diagonals(rows, False).sum(0).mean().item() or 1.0
        self._cache = TensorCache(base.backend.memory_budget)
        self._latest: list[Tensor] = []

    def prepare(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
        one, two = self._known(x1), self._known(x2)
        return (self._cache.get("grams", (one, two), lambda: self._grams(one, two)),)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_latest": []}

    def _known(self, x: Tensor) -> Tensor:
        """x, or the same inputs as they came before: what is kept is found by their memory."""
        found = next((other for other in self._latest if other.shape == x.shape and torch.equal(other, x)), None)
        if found is None:
            found = x
        self._latest = [found, *(other for other in self._latest if other is not found)][:_LATEST]
        return found

    def matrix(self, logs: Tensor, prepared: tuple[Tensor, ...]) -> Tensor:
        (grams,) = prepared
        variances = self._own(logs).to(grams)
        return torch.einsum("g,...gnm->...nm", variances, grams) if self.grouped else variances * grams.squeeze(-3)

    def diagonal(self, logs: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._own(logs).to(x) @ self.features.group_diagonals(x, self.grouped) / self._level

    def variances(self, logs: Tensor) -> Tensor:
        """Prior variance of all features `[1]`, or of those of every layer `[L]`."""
        return self._own(logs) / self._level

    def _own(self, logs: Tensor) -> Tensor:
        return logs.exp() if len(self.hyperparameters) else torch.ones(1, dtype=logs.dtype, device=logs.device)

    @torch.no_grad()
    def _grams(self, x1: Tensor, x2: Tensor) -> Tensor:
        return self.features.group_grams(x1, x2, self.grouped) / self._level


@final
class HostTerm(AbstractTerm):
    """Any of GPyTorch's kernels, of the inputs or of what a network makes of them, in double precision.

    Its hyperparameters are the kernel's positive parameters that require gradients, with the priors registered for them
    (or a wide one around their present values). Parameters that may be negative stay where they are.

    Args:
        kernel: The kernel.
        x: Inputs, for their device.
        outputs: C; a kernel with one row per input is shared where C is more.
        names: Of the hyperparameters in each parameter, by the parameter's name; by default that name without ``raw_``.
        represent: What the kernel is given instead of the inputs.
    """

    def __init__(
        self, kernel: Kernel, x: Tensor, outputs: int, names: Names | None = None, represent: Represent | None = None
    ) -> None:
        self._exact = exact_dtype(x.device)
        kernel = kernel.to(device=x.device, dtype=self._exact)
        self._dense, self._represent = _Dense(kernel), represent
        self.hyperparameters, self._slots = read_hyperparameters(kernel, names)
        own = [slot.name for slot in self._slots]
        self.scale = own.index("kernel.raw_outputscale") if "kernel.raw_outputscale" in own else None
        row = self._rows(x[:1])
        self.shared = kernel.num_outputs_per_input(row, row) != outputs

    def prepare(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
        one = self._rows(x1)
        return one, one if x1 is x2 else self._rows(x2)

    def matrix(self, logs: Tensor, prepared: tuple[Tensor, ...]) -> Tensor:
        return self._call(logs, *prepared, diag=False)

    def diagonal(self, logs: Tensor, x: Tensor) -> Tensor:
        rows = self._rows(x)
        return self._call(logs, rows, rows, diag=True)

    def _rows(self, x: Tensor) -> Tensor:
        return (x if self._represent is None else self._represent(x)).to(self._exact)

    def _call(self, logs: Tensor, x1: Tensor, x2: Tensor, diag: bool) -> Tensor:
        values = logs.exp().to(x1).split([slot.shape.numel() for slot in self._slots])
        state = {
            slot.name: slot.constraint.inverse_transform(value.view(slot.shape))
            for slot, value in zip(self._slots, values, strict=True)
        }
        return functional_call(self._dense, state, (x1, x2, diag))


@final
class _Dense(nn.Module):
    """A kernel that is evaluated when it is called, while its parameters are those of the call."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x1: Tensor, x2: Tensor, diag: bool) -> Tensor:
        with gpytorch.settings.lazily_evaluate_kernels(False):
            return to_dense(self.kernel(x1, x2, diag=diag))


def read_hyperparameters(kernel: Kernel, names: Names | None) -> tuple[tuple[Hyperparameter, ...], list[Slot]]:
    """The positive parameters of a kernel that require gradients, with their priors; and where they stand."""
    priors = {name.removesuffix("_prior"): prior for name, _, prior, _, _ in kernel.named_priors()}
    hyperparameters: list[Hyperparameter] = []
    slots: list[Slot] = []
    for name, parameter, constraint in kernel.named_parameters_and_constraints():
        if not parameter.requires_grad or constraint is None or not bool((constraint.lower_bound >= 0).all()):
            continue
        label = name.replace("raw_", "")
        given = None if names is None else names.get(name)
        values = constraint.transform(parameter.detach()).flatten().tolist()
        for own, value in zip(given or _numbered(label, len(values)), values, strict=True):
            hyperparameters.append(_hyperparameter(own, value, constraint, priors.get(label)))
        slots.append(Slot(f"kernel.{name}", parameter.shape, constraint))
    return tuple(hyperparameters), slots


def _numbered(label: str, count: int) -> list[str]:
    return [label] if count == 1 else [f"{label} {index}" for index in range(count)]


def _hyperparameter(name: str, value: float, constraint: Interval, prior: Prior | None) -> Hyperparameter:
    length = "lengthscale" in name
    low, high = (1e-3, 1e3) if length else (1e-8, 1e6)
    bounds = max(low, float(constraint.lower_bound.max())), min(high, float(constraint.upper_bound.min()))
    if isinstance(prior, LogStudentTPrior):
        return Hyperparameter(name, prior.median, prior.spread, bounds, not length)
    return Hyperparameter(name, value, _SPREAD, bounds, not length, prior)


@final
class SumOfTerms:
    """The prior covariance: a sum of terms, shared if all of them are.

    Args:
        terms: The terms.
        num_outputs: C.
    """

    def __init__(self, terms: Sequence[AbstractTerm], num_outputs: int) -> None:
        self.terms, self.num_outputs = tuple(terms), num_outputs
        self.shared = all(term.shared for term in terms)
        self.hyperparameters = tuple(h for term in terms for h in term.hyperparameters)

    def matrix(self, logs: Tensor, x1: Tensor, x2: Tensor) -> Tensor:
        """The covariance of x1 `[..., N, D]` with x2 `[..., M, D]` at ``logs`` `[H]`: `[..., n, m]`."""
        parts = [
            self._spread(term, term.matrix(own, term.prepare(x1, x2)))
            for term, own in zip(self.terms, self.split(logs), strict=True)
        ]
        return sum(parts[1:], parts[0])

    def split(self, logs: Tensor) -> tuple[Tensor, ...]:
        """The hyperparameters of every term."""
        return logs.split([len(term.hyperparameters) for term in self.terms])

    def _spread(self, term: AbstractTerm, matrix: Tensor) -> Tensor:
        """k ⊗ I where other terms are full."""
        if self.shared or not term.shared:
            return matrix
        identity = torch.eye(self.num_outputs, dtype=matrix.dtype, device=matrix.device)
        return (matrix[..., :, None, :, None] * identity[:, None, :]).flatten(-4, -3).flatten(-2, -1)
