"""How far gradient descent on a quadratic has come along each eigenvector: the spectral filters p_t(λ).

Gradient descent on ½ ‖A c - b‖² in the metric of a positive semi-definite A (in weights: on ½ ‖J ω - b‖², A = J Jᵀ and
ω = Jᵀ c) starts at c_0 = 0 and follows c' = η (b - A c). In the eigenbasis of A every coordinate moves on its own, and
c_t = p_t(A) b with p_t a function of one eigenvalue:

    flow              p_t(λ) = (1 - exp(-η t λ)) / λ
    descent           p_t(λ) = (1 - (1 - η λ)ᵗ) / λ,                                     t = 0, 1, 2, ...
    heavy ball        p_{t+1} = p_t - η v_{t+1},  v_{t+1} = μ v_t + (λ p_t - 1),         p_0 = v_0 = 0

all of which go to 1/λ. What is left of the residual is 1 - λ p_t(λ).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

# η λ below which (1 - η λ)ᵗ is computed through its logarithm, which keeps 1 - (1 - η λ)ᵗ accurate.
_SMALL_STEP = 0.5


@final
@dataclass(frozen=True)
class GradientFilter:
    """p_t(λ), for gradient flow, gradient descent or heavy-ball descent.

    Args:
        rate: η, the learning rate.
        momentum: μ in [0, 1): v ← μ v + gradient, w ← w - η v, as in ``torch.optim.SGD``. For discrete steps only.
        discrete: Whether t counts steps of descent; otherwise it is the time of the flow in units of the rate, so that
            both agree to first order in η.

    Example:
        >>> import torch
        >>> GradientFilter(0.1)(torch.tensor([0.0, 2.0]), torch.tensor([5.0, torch.inf]))
        tensor([[0.5000, 0.3161],
                [0.0000, 0.5000]])

    References:
        Lee et al. (2019), Wide Neural Networks of Any Depth Evolve as Linear Models Under Gradient Descent,
        https://arxiv.org/abs/1902.06720, eqs. 8 to 11. Polyak (1964) for the heavy ball.
    """

    rate: float
    momentum: float = 0.0
    discrete: bool = False

    def __call__(self, values: Tensor, times: Tensor) -> Tensor:
        """p_t(λ) `[T, ...]` for λ >= 0 `[...]` and t `[T]`; at t = ∞, 1/λ and, where λ = 0, zero.

        A direction with λ = 0 moves no prediction, and the smallest solution has nothing in it.
        """
        times = times.reshape(-1, *(1,) * values.dim()).to(values)
        inverse = torch.where(values > 0, 1 / values, 0.0)
        if not self.discrete:
            finite = self._flow(values, inverse, times)
        elif self.momentum:
            finite = torch.stack([self._heavy_ball(values, time) for time in times.flatten().tolist()])
        else:
            finite = self._descent(values, inverse, times)
        return torch.where(times.isinf(), inverse.expand_as(finite), finite)

    def _flow(self, values: Tensor, inverse: Tensor, times: Tensor) -> Tensor:
        moved = -torch.expm1(-self.rate * times * values) * inverse
        return torch.where(values > 0, moved, self.rate * times)

    def _descent(self, values: Tensor, inverse: Tensor, times: Tensor) -> Tensor:
        step = self.rate * values
        slow = -torch.expm1(times * torch.log1p(-step.clamp_max(_SMALL_STEP)))
        # A negative base has a real power, since t is whole.
        moved = torch.where(step < _SMALL_STEP, slow, 1 - (1 - step) ** times)
        return torch.where(values > 0, moved * inverse, self.rate * times)

    def _heavy_ball(self, values: Tensor, time: float) -> Tensor:
        """The affine map (p, v, 1) -> (p, v, 1) to the power t, by squaring: exact at λ = 0 too."""
        if math.isinf(time):
            return values
        eta, mu = self.rate, self.momentum
        one, zero = torch.ones_like(values), torch.zeros_like(values)
        rows = (1 - eta * values, -eta * mu * one, eta * one, values, mu * one, -one, zero, zero, one)
        step = torch.stack(rows, -1).unflatten(-1, (3, 3))
        return torch.linalg.matrix_power(step, round(time))[..., 0, 2]

    def largest_rate(self, largest_eigenvalue: float) -> float:
        """The rate 2 (1 + μ) / λ_max from which on descent diverges."""
        return math.inf if largest_eigenvalue == 0 else 2 * (1 + self.momentum) / largest_eigenvalue

    @property
    def gain(self) -> float:
        """The most that |1 - λ p_t(λ)| reaches for a stable rate: it is (1 + μ) / (1 - μ), by the roots of descent."""
        return (1 + self.momentum) / (1 - self.momentum)
