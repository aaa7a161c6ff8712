"""Features that are held as a matrix `[B, N*C, F]`: products are matrix products."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Hashable
from typing import final

import torch
from torch import Tensor

from gpntk._checks import check_count, check_device, check_dtype, check_functions
from gpntk.cost import Cost
from gpntk.errors import InputError
from gpntk.jacobians.autodiff import AutodiffBackend
from gpntk.jacobians.backend import (
    AbstractJacobianBackend,
    AbstractTangentBackend,
    Groups,
    contracted_diagonal,
    contracted_gram,
    contracted_jvp,
    contracted_vjp,
)
from gpntk.jacobians.backward import BackwardBackend
from gpntk.jacobians.rules import inner_products
from gpntk.memory import attached, chunks
from gpntk.network import FrozenNetwork


class AbstractDenseBackend(AbstractJacobianBackend, ABC):
    """Products by matrix products with ``jacobian(x)`` `[B, N*C, F]`, formed by chunks of rows within the budget."""

    def jvp(self, x: Tensor, v: Tensor) -> Tensor:
        return contracted_jvp(self, x, v)

    def vjp(self, x: Tensor, u: Tensor) -> Tensor:
        return contracted_vjp(self, x, u)

    def gram(self, x1: Tensor, x2: Tensor, per_layer: bool = False) -> Tensor:
        return contracted_gram(self, x1, x2, per_layer)

    def diagonal(self, x: Tensor, per_layer: bool = False) -> Tensor:
        return contracted_diagonal(self, x, per_layer)

    def costs(self, x: Tensor, columns: int) -> tuple[Cost, ...]:  # noqa: ARG002
        return ()


@final
class DenseBackend(AbstractDenseBackend, AbstractTangentBackend):
    """J `[B, N*C, P]` formed by per-sample reverse mode, kept while it fits the budget, and used by matrix products.

    By forward mode if C > P, and by plain backward passes where torch.func cannot run the network. Use it when P is
    small (hundreds), where one GEMM beats anything layer by layer. Memory N*C*P values; beyond the budget J is formed
    again by chunks of rows in each product.

    Args:
        network: The network, with the parameters to differentiate selected.
        memory_budget: Bytes that temporaries, and what is kept, stay within.

    Example:
        >>> import torch, gpntk
        >>> DenseBackend(gpntk.freeze(torch.nn.Linear(3, 2))).jacobian(torch.randn(1, 10, 3)).shape
        torch.Size([1, 20, 8])
    """

    def __init__(self, network: FrozenNetwork, memory_budget: int | None = None) -> None:
        super().__init__(network, memory_budget)
        self._autodiff = AutodiffBackend(network, self.memory_budget)
        self._passes = BackwardBackend(network, self.memory_budget)

    def jacobian(self, x: Tensor) -> Tensor:
        return self.remember("jacobian", (x,), lambda: self._rows(x).jacobian(x))

    def refusal(self, x: Tensor) -> str:
        """Why J is made by plain backward passes, row by row; empty where torch.func makes it of many rows at once."""
        return self._autodiff.refusal(x)

    def _rows(self, x: Tensor) -> AbstractTangentBackend:
        return self._passes if self.refusal(x) else self._autodiff


@final
class ExplicitBackend(AbstractJacobianBackend):
    """Features φ(x) `[M, F]` that a function gives: random Fourier or Nyström features of any kernel, say.

    Several outputs are independent, each with the features φ and with weights of its own: the features are φ ⊗ I_C
    `[M*C, F*C]`, row n*C + c, column f*C + c, and the Gram is (φ φᵀ) ⊗ I_C. They are one group of features. Stack them
    with the Jacobian features of a network by `StackedBackend`: the kernel is the sum.

    Args:
        feature_map: φ, from x `[M, D]` to `[M, F]` row by row, in x's dtype; differentiable in x if derivatives are
            asked for. What it returns must not change, because it is kept: make a new backend for other features.
        num_features: F, the columns of φ.
        num_outputs: C.
        dtype: Dtype of data that come without one, as from files; default float32.
        device: Where the features are computed.
        memory_budget: Bytes that temporaries, and what is kept, stay within.

    Raises:
        InputError: ``feature_map`` returns another shape than `[M, F]`.

    Example:
        >>> import torch
        >>> frequencies, x = torch.randn(2, 50), torch.randn(1, 7, 2)
        >>> waves = lambda x: torch.cat([(x @ frequencies).cos(), (x @ frequencies).sin()], -1) / 50**0.5
        >>> backend = ExplicitBackend(waves, num_features=100, num_outputs=3)
        >>> backend.gram(x, x).shape, backend.num_features
        (torch.Size([1, 1, 21, 21]), 300)

    References:
        Rahimi and Recht (2007), Random Features for Large-Scale Kernel Machines.
        Williams and Seeger (2001), Using the Nyström Method to Speed Up Kernel Machines.
    """

    def __init__(
        self,
        feature_map: Callable[[Tensor], Tensor],
        num_features: int,
        num_outputs: int = 1,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        memory_budget: int | None = None,
    ) -> None:
        self._device = check_device(device)
        super().__init__(self._device, memory_budget)
        check_functions(feature_map=feature_map)
        check_count(num_features=num_features, num_outputs=num_outputs)
        check_dtype(dtype)
        self._feature_map, self._columns, self._outputs, self._dtype = feature_map, num_features, num_outputs, dtype

    @property
    def num_features(self) -> int:
        return self._columns * self._outputs

    def num_outputs(self, x: Tensor) -> int:  # noqa: ARG002
        return self._outputs

    @property
    def groups(self) -> Groups:
        return ((slice(0, self.num_features),),)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def version(self) -> Hashable:
        return None

    def weights(self) -> dict[str, Tensor]:
        return {}

    def jvp(self, x: Tensor, v: Tensor) -> Tensor:
        v = self._by_output(v)  # [B, C, K, F]
        parts = [v @ self._rows(x[:, rows]).mT.unsqueeze(1) for rows in self._chunks(x)]
        return self._joined(torch.cat(parts, -1))

    def vjp(self, x: Tensor, u: Tensor) -> Tensor:
        u = self._by_output(u)  # [B, C, K, N]
        parts = [u[..., rows] @ self._rows(x[:, rows]).unsqueeze(1) for rows in self._chunks(x)]
        return self._joined(torch.stack(parts).sum(0) if len(parts) > 1 else parts[0])

    def gram(self, x1: Tensor, x2: Tensor, per_layer: bool = False) -> Tensor:  # noqa: ARG002
        blocks = []
        for rows in self._chunks(x1):
            left = self._rows(x1[:, rows])
            rights = (left if x1 is x2 and rows == others else self._rows(x2[:, others]) for others in self._chunks(x2))
            blocks.append(torch.cat([inner_products(left, right) for right in rights], -1))
        return self._for_every_output(torch.cat(blocks, -2)).unsqueeze(1)

    def diagonal(self, x: Tensor, per_layer: bool = False) -> Tensor:  # noqa: ARG002
        norms = torch.cat([self._rows(x[:, rows]).square().sum(-1) for rows in self._chunks(x)], -1)
        return norms.repeat_interleave(self._outputs, -1).unsqueeze(1)

    def jacobian(self, x: Tensor) -> Tensor:
        return self._for_every_output(self._rows(x))

    def costs(self, x: Tensor, columns: int) -> tuple[Cost, ...]:  # noqa: ARG002
        return ()

    def _rows(self, x: Tensor) -> Tensor:
        """φ(x) `[B, N, F]` for x `[B, N, D]`."""
        return self.remember("features", (x,), lambda: self._checked(x))

    def _checked(self, x: Tensor) -> Tensor:
        features = self._feature_map(x.flatten(0, 1))
        if features.shape != (x.shape[:2].numel(), self._columns):
            raise InputError(
                f"feature_map returned shape {tuple(features.shape)} for {x.shape[:2].numel()} rows of x: it must be "
                f"({x.shape[:2].numel()}, num_features={self._columns})."
            )
        return attached(features, x).unflatten(0, x.shape[:2])

    def _chunks(self, x: Tensor) -> list[slice]:
        return list(chunks(x.shape[1], 2 * x.shape[0] * self._columns * x.element_size(), self.memory_budget))

    def _by_output(self, w: Tensor) -> Tensor:
        """`[B, K, n*C]` as `[B, C, K, n]`."""
        return w.unflatten(-1, (-1, self._outputs)).movedim(-1, 1)

    def _joined(self, w: Tensor) -> Tensor:
        """`[B, C, K, n]` as `[B, K, n*C]`."""
        return w.movedim(1, -1).flatten(-2)

    def _for_every_output(self, block: Tensor) -> Tensor:
        """block ⊗ I_C, `[B, n*C, m*C]` for `[B, n, m]`."""
        if self._outputs == 1:
            return block
        eye = torch.eye(self._outputs, dtype=block.dtype, device=block.device)
        return (block[..., :, None, :, None] * eye[:, None]).flatten(-2).flatten(-3, -2)
