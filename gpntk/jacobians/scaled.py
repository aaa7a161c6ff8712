"""Features times fixed factors, one for each: J S^½ for a prior variance of every parameter."""

from __future__ import annotations

from collections.abc import Hashable
from typing import final

import torch
from torch import Tensor

from gpntk._checks import check_tensors
from gpntk.cost import Cost
from gpntk.errors import InputError
from gpntk.jacobians.backend import AbstractJacobianBackend, Groups, contracted_diagonal, contracted_gram
from gpntk.memory import TensorCache


@final
class ScaledBackend(AbstractJacobianBackend):
    """J S^½ `[N*C, F]` for fixed prior variances S, one for each feature.

    Products cost what those of J do. A Gram has no structure left: it takes the rows of J, in chunks within the budget.

    Args:
        backend: That of J.
        variances: S `[F]`, finite and positive.

    Raises:
        InputError: The variances do not fit.

    Example:
        >>> import torch, gpntk
        >>> backend = gpntk.AutoBackend(gpntk.freeze(torch.nn.Linear(3, 1)))
        >>> scaled = ScaledBackend(backend, torch.tensor([1.0, 2.0, 3.0, 4.0]))
        >>> scaled.gram(torch.ones(1, 1, 3), torch.ones(1, 1, 3)).item()
        10.0
    """

    def __init__(self, backend: AbstractJacobianBackend, variances: Tensor) -> None:
        check_tensors(prior_variance=variances)
        super().__init__(backend.device, backend.memory_budget)
        if variances.shape != (backend.num_features,):
            raise InputError(
                f"prior_variance has shape {tuple(variances.shape)}: give one number for each of the "
                f"{backend.num_features} parameters, in the order of network.names."
            )
        if not (variances.isfinite() & (variances > 0)).all():
            raise InputError("prior_variance must be finite and positive: leave parameters out with parameters=.")
        self.backend, self._scales = backend, variances.detach().sqrt()
        self.share_cache(backend.cache)

    @property
    def num_features(self) -> int:
        return self.backend.num_features

    def num_outputs(self, x: Tensor) -> int:
        return self.backend.num_outputs(x)

    @property
    def groups(self) -> Groups:
        return self.backend.groups

    @property
    def dtype(self) -> torch.dtype:
        return self.backend.dtype

    @property
    def device(self) -> torch.device:
        return self.backend.device

    @property
    def version(self) -> Hashable:
        return self.backend.version

    def weights(self) -> dict[str, Tensor]:
        return {**self.backend.weights(), "prior_deviations": self._scales}

    def share_cache(self, cache: TensorCache) -> None:
        super().share_cache(cache)
        self.backend.share_cache(cache)

    def jvp(self, x: Tensor, v: Tensor) -> Tensor:
        return self.backend.jvp(x, v * self._scales.to(v))

    def vjp(self, x: Tensor, u: Tensor) -> Tensor:
        return self.backend.vjp(x, u) * self._scales.to(u)

    def jacobian(self, x: Tensor) -> Tensor:
        return self.backend.jacobian(x) * self._scales.to(x)

    def gram(self, x1: Tensor, x2: Tensor, per_layer: bool = False) -> Tensor:
        return contracted_gram(self, x1, x2, per_layer)

    def diagonal(self, x: Tensor, per_layer: bool = False) -> Tensor:
        return contracted_diagonal(self, x, per_layer)

    def costs(self, x: Tensor, columns: int) -> tuple[Cost, ...]:  # noqa: ARG002
        # Those of J count a Gram by its structure.
        return ()
