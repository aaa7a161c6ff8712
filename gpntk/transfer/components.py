"""Terms of a prior covariance: the tangent kernel, a stationary one, a constant.

Each term is a function of its hyperparameters θ and of *parts*: arrays that depend on the inputs alone and are computed
once. Parts of pairs of inputs are `[Q, n, m]`, those of single inputs `[Q, M, c, c]`; θ acts on them entry by entry, so
that every new θ costs one pass over the parts and no product with a Jacobian.

A term is *shared* when its outputs are independent and alike: its covariance is k(x, x') times the identity of size C,
and its parts are those of k, with n = N. Otherwise rows are n*C + c.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor

from gpntk.inference.features import draw
from gpntk.inference.hyperposterior import Hyperparameter
from gpntk.jacobians import AutoBackend, AverageBackend
from gpntk.network import FrozenNetwork
from gpntk.transfer.remembered import Outputs, Remembered

StationaryForm = Literal["rbf", "matern"]

# More columns than this share one lengthscale: a handful of labels cannot tell many.
_MOST_LENGTHSCALES = 20
_TYPICAL_ROWS = 1000


class AbstractComponent(ABC):
    """One term of a prior covariance, of order one for hyperparameters of order one."""

    shared: bool
    hyperparameters: tuple[Hyperparameter, ...]

    @abstractmethod
    def parts(self, x1: Tensor, x2: Tensor) -> Tensor:
        """What depends on the inputs x1 `[N, D]` and x2 `[M, D]` alone `[Q, n, m]`."""

    @abstractmethod
    def blocks(self, x: Tensor) -> Tensor:
        """The parts of each input with itself `[Q, M, c, c]`; c = 1 if shared, else C."""

    @abstractmethod
    def covariance(self, logs: Tensor, parts: Tensor) -> Tensor:
        """The term at the hyperparameters `[H]` whose logarithms are ``logs``: parts without their first axis."""


@final
class Tangent(AbstractComponent):
    """Σ_l s_l J_l(x) J_l(x')ᵀ, one variance in all or one per layer; in units where its mean variance at x is Σ_l s_l.

    Args:
        network: The frozen network, or a `gpntk.network.heads.Body`.
        x: Inputs that set the units.
        name: Of the variance.
        median: Of its prior.
        spread: Of its prior.
        per_layer: Whether each layer has a variance of its own.
        shared: Take the mean over outputs of the diagonal blocks, as the kernel of every output.
        units: What each output is measured in `[C]`; ones by default.
    """

    def __init__(
        self,
        network: FrozenNetwork,
        x: Tensor,
        name: str,
        *,
        median: float,
        spread: float,
        per_layer: bool = False,
        shared: bool = False,
        units: Tensor | None = None,
    ) -> None:
        self.network, self.shared, self._per_layer = network, shared, per_layer
        # Kernels of single outputs are averaged one after another: no block of C x C outputs is formed.
        self._backend = AverageBackend(network, AutoBackend) if shared else AutoBackend(network)
        self._outputs = self._backend.num_outputs(x)
        ones = torch.ones(self._outputs, dtype=x.dtype, device=x.device)
        self._inverse_units = ones if units is None or shared else 1 / units
        layers = [layer or "network" for layer, _ in network.layers] if per_layer else [""]
        names = [f"{name} {layer}".strip() for layer in layers]
        self.hyperparameters = tuple(Hyperparameter(name, median / len(names), spread) for name in names)
        # Priors that share this term are compared on the same inputs.
        self._own_parts = Remembered(self._symmetric_parts, 1)
        self._level = 1.0
        self._level = _mean_variance(self.blocks(x).sum(0))

    def parts(self, x1: Tensor, x2: Tensor) -> Tensor:
        return self._own_parts(x1) if x1 is x2 else self._parts(x1, x2)

    def _symmetric_parts(self, x: Tensor) -> Tensor:
        return self._parts(x, x)

    def _parts(self, x1: Tensor, x2: Tensor) -> Tensor:
        with torch.no_grad():
            grams = self._backend.gram(x1.unsqueeze(0), x2.unsqueeze(0), self._per_layer)[0] / self._level
        if self._outputs == 1:
            return grams * self._outer()
        by_output = grams.unflatten(1, (-1, self._outputs)).unflatten(3, (-1, self._outputs))
        return by_output.mul_(self._outer()[:, None, :]).flatten(3).flatten(1, 2)

    def blocks(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self._outputs == 1:
                blocks = self._backend.diagonal(x.unsqueeze(0), self._per_layer)[0][..., None, None]
            else:
                singles = x.unsqueeze(1)
                blocks = self._backend.gram(singles, singles, self._per_layer).movedim(1, 0)
        return blocks / self._level * self._outer()

    def covariance(self, logs: Tensor, parts: Tensor) -> Tensor:
        return torch.einsum("q,q...->...", logs.exp(), parts)

    def _outer(self) -> Tensor:
        return torch.outer(self._inverse_units, self._inverse_units)


@final
class Readout(AbstractComponent):
    """s (h(x)·h(x') + 1), the moves of a linear readout of the features h with independent weights and a bias; shared.

    Args:
        features: h.
        x: Inputs that set the units.
        name: Of the variance s.
        median: Of its prior.
        spread: Of its prior.
        bias: Whether there is a bias, the one in the formula.
    """

    shared = True

    def __init__(
        self, features: Outputs, x: Tensor, name: str, *, median: float, spread: float, bias: bool = True
    ) -> None:
        self._features, self._bias = features, float(bias)
        self.hyperparameters = (Hyperparameter(name, median, spread),)
        self._level = 1.0
        self._level = _mean_variance(self.blocks(x)[0])

    def parts(self, x1: Tensor, x2: Tensor) -> Tensor:
        return (self._features(x1) @ self._features(x2).mT + self._bias).unsqueeze(0) / self._level

    def blocks(self, x: Tensor) -> Tensor:
        return (self._features(x).square().sum(-1) + self._bias)[None, :, None, None] / self._level

    def covariance(self, logs: Tensor, parts: Tensor) -> Tensor:
        return logs[0].exp() * parts[0]


@final
class Stationary(AbstractComponent):
    """s κ(|x - x'|), an RBF or Matérn-5/2 kernel of the inputs or of what a network makes of them; shared.

    Distances are in units of the typical one between rows of x. With up to 20 columns each has a lengthscale of its
    own, with more they share one.

    Args:
        x: Inputs that set the units.
        form: ``"rbf"`` or ``"matern"``.
        median: Of the prior of the variance s.
        spread: Of the prior of the variance s.
        features: Maps inputs to the features to compare; None for the inputs themselves.

    References:
        Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, eqs. 4.9 and 4.17.
    """

    shared = True

    def __init__(
        self, x: Tensor, form: StationaryForm, median: float, spread: float, features: Outputs | None = None
    ) -> None:
        self._form, self._features = form, features
        rows = self._represent(x)
        columns = rows.shape[1]
        self._own = features is None and columns <= _MOST_LENGTHSCALES
        rows = rows[draw(len(rows), min(len(rows), _TYPICAL_ROWS), seed=0).to(rows.device)]
        if self._own:
            # The squared distance of two rows has the mean 2 Σ_d σ_d².
            typical = rows.std(0, correction=0) * math.sqrt(2 * columns)
        else:
            typical = torch.pdist(rows).median() if len(rows) > 1 else rows.new_ones(())
        self._typical = torch.where(typical > 0, typical, torch.ones_like(typical))
        where = "inputs" if features is None else "features"
        names = [f"lengthscale {column}" for column in range(columns)] if self._own else ["lengthscale"]
        lengthscales = (Hyperparameter(f"{where} {name}", 0.3, 1.0, (1e-3, 1e3), variance=False) for name in names)
        self.hyperparameters = (Hyperparameter(f"{where} {form}", median, spread), *lengthscales)

    def parts(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Squared distances, per column if each has a lengthscale."""
        one, two = self._represent(x1) / self._typical, self._represent(x2) / self._typical
        if self._own:
            return (one.mT.unsqueeze(-1) - two.mT.unsqueeze(-2)).square()
        # Differences, not inner products: equal inputs are at distance zero exactly.
        return torch.cdist(one, two, compute_mode="donot_use_mm_for_euclid_dist").square().unsqueeze(0)

    def blocks(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(self.hyperparameters) - 1, x.shape[0], 1, 1)

    def covariance(self, logs: Tensor, parts: Tensor) -> Tensor:
        squares = torch.einsum("q,q...->...", (-2 * logs[1:]).exp(), parts)
        if self._form == "rbf":
            return logs[0].exp() * (-0.5 * squares).exp()
        # The root has no derivative at zero, where that of the kernel is zero.
        scaled = (5 * squares + torch.finfo(squares.dtype).tiny).sqrt()
        return logs[0].exp() * (1 + scaled + 5 / 3 * squares) * (-scaled).exp()

    def _represent(self, x: Tensor) -> Tensor:
        return x if self._features is None else self._features(x)


@final
class Constant(AbstractComponent):
    """A constant per output with a wide prior of fixed variance; shared, without hyperparameters."""

    shared = True
    hyperparameters = ()

    def __init__(self, variance: float) -> None:
        self._variance = variance

    def parts(self, x1: Tensor, x2: Tensor) -> Tensor:
        return x1.new_full((1, x1.shape[0], x2.shape[0]), self._variance)

    def blocks(self, x: Tensor) -> Tensor:
        return x.new_full((1, x.shape[0], 1, 1), self._variance)

    def covariance(self, logs: Tensor, parts: Tensor) -> Tensor:  # noqa: ARG002
        return parts[0]


@final
class SumOfComponents:
    """The prior covariance: a sum of terms, shared if all of them are.

    Args:
        components: The terms.
        num_outputs: C.
    """

    def __init__(self, components: Sequence[AbstractComponent], num_outputs: int) -> None:
        self.components = tuple(components)
        self.num_outputs = num_outputs
        self.shared = all(component.shared for component in components)
        self.hyperparameters = tuple(h for component in components for h in component.hyperparameters)

    def parts(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
        """The parts of every term for x1 `[N, D]` and x2 `[M, D]`."""
        return tuple(component.parts(x1, x2) for component in self.components)

    def blocks(self, x: Tensor) -> tuple[Tensor, ...]:
        """The parts of every term for each input with itself."""
        return tuple(component.blocks(x) for component in self.components)

    def grown(self, parts: Sequence[Tensor], x: Tensor, new: Tensor) -> tuple[Tensor, ...]:
        """The parts of ``new`` below x with themselves, from those of x."""
        cross, own = self.parts(new, x), self.parts(new, new)
        return tuple(
            torch.cat([torch.cat([old, between.mT], -1), torch.cat([between, corner], -1)], -2)
            for old, between, corner in zip(parts, cross, own, strict=True)
        )

    def covariance(self, logs: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """The covariance at ``logs`` `[H]`: of pairs `[n, m]`, or of each input's outputs `[M, c, c]`."""
        total: Tensor | None = None
        logs = logs.to(parts[0])
        for component, own, part in zip(self.components, self._split(logs), parts, strict=True):
            term = component.covariance(own, part)
            if component.shared and not self.shared:
                identity = torch.eye(self.num_outputs, dtype=term.dtype, device=term.device)
                term = torch.kron(term, identity) if term.dim() == 2 else term * identity
            total = term if total is None else total + term
        assert total is not None
        return total

    def _split(self, logs: Tensor) -> tuple[Tensor, ...]:
        return logs.split([len(component.hyperparameters) for component in self.components])


def _mean_variance(blocks: Tensor) -> float:
    """Mean over inputs and outputs of the variances on the diagonals of ``blocks`` `[M, c, c]`; one for none."""
    return blocks.diagonal(dim1=-2, dim2=-1).mean().item() or 1.0
