"""Random features of a few numbers whose inner products are, on average, those of the Jacobian.

A layer's gradient is a sum of Kronecker products, df/dW = sum_t g_t a_tᵀ, and so can its projection be: with standard
normal R₁ `[F, I]` and R₂ `[F, O]`,

    z = sum_t (R₁ a_t) ∘ (R₂ g_t) / sqrt(F),      E[z·z'] = sum_ts (a_t·a'_s)(g_t·g'_s),

at F (I + O) operations a position instead of F I O. Projections of different layers are independent and add up: the
cross terms vanish on average. For one layer, one position and one output, with p = a·a', q = g·g',

    Var[z·z'] = ((|a|²|a'|² + 2 p²)(|g|²|g'|² + 2 q²) - p² q²) / F.
"""

from __future__ import annotations

from typing import final

from torch import Tensor

from gpntk.errors import InputError
from gpntk.jacobians.auto import by_rules
from gpntk.jacobians.backend import AbstractJacobianBackend, AbstractNetworkBackend, Groups
from gpntk.jacobians.dense import AbstractDenseBackend
from gpntk.network import FrozenNetwork


@final
class SketchBackend(AbstractDenseBackend, AbstractNetworkBackend):
    """J(x) R `[B, N*C, F]` for a random R that is never formed, in place of J(x): one group of features.

    Use it where N and P are both too large for exact products, and an error of about 1/sqrt(F) is not: linear algebra
    with F features costs what a Bayesian linear model of F weights costs. Features are kept while they fit the budget.

    Args:
        network: The network.
        num_features: F.
        seed: Of R; the same seed gives the same features, on every device.
        memory_budget: Bytes.

    Example:
        >>> import torch, gpntk
        >>> network = gpntk.freeze(torch.nn.Sequential(torch.nn.Linear(3, 50), torch.nn.Tanh(), torch.nn.Linear(50, 1)))
        >>> SketchBackend(network, num_features=64).jacobian(torch.randn(1, 10, 3)).shape
        torch.Size([1, 10, 64])

    References:
        Park et al. (2023), TRAK: Attributing Model Behavior at Scale, https://arxiv.org/abs/2303.14186, section 3.
        Pham and Pagh (2013), Fast and Scalable Polynomial Kernels via Explicit Feature Maps (products of projections).
    """

    def __init__(
        self, network: FrozenNetwork, num_features: int = 1024, seed: int = 0, memory_budget: int | None = None
    ) -> None:
        super().__init__(network, memory_budget)
        if num_features < 1:
            raise InputError(f"num_features={num_features} must be at least 1.")
        self._num_features, self._seed = num_features, seed
        self._exact: AbstractJacobianBackend | None = None

    @property
    def num_features(self) -> int:
        return self._num_features

    def num_outputs(self, x: Tensor) -> int:
        return self.network.num_outputs(x)

    def jacobian(self, x: Tensor) -> Tensor:
        if self._exact is None:
            self.num_outputs(x)
            # By rules whatever they cost: another backend would draw another R.
            self._exact = by_rules(self.network, x, self.memory_budget).backend
            self._exact.share_cache(self.cache)
        sketch = self._exact.sketch
        return self.remember("sketch", (x,), lambda: sketch(x, self._num_features, self._seed))

    @property
    def groups(self) -> Groups:
        return ((slice(0, self._num_features),),)
