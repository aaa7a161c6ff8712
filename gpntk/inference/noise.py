"""What a likelihood says of every input to second order: the curvature Λ = R Rᵀ, block-diagonal, by its root R.

Noise of variance d per row is R = diag(d^-½); a likelihood of several outputs has a block R `[C, q]` per input, which
may be of any rank. A row of zeros in R has not been observed. Λ⁻¹ is never formed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self, final

import torch
from torch import Tensor

from gpntk.errors import InputError

# Inputs whose blocks are multiplied at once.
_SAMPLES = 1024


class AbstractNoise(ABC):
    """R `[n, m]`, block-diagonal over the inputs."""

    @abstractmethod
    def whiten(self, u: Tensor) -> Tensor:
        """Divide values by the noise: Rᵀ u `[..., m]` for u `[..., n]`."""

    @abstractmethod
    def unwhiten(self, v: Tensor) -> Tensor:
        """The transpose of `whiten`: R v `[..., n]` for v `[..., m]`."""

    @abstractmethod
    def rows(self, block: Tensor) -> Tensor:
        """Rows of features divided by the noise: Rᵀ A `[m, F]` for A `[n, F]`."""

    @abstractmethod
    def congruence(self, matrix: Tensor) -> Tensor:
        """Rᵀ A R `[m, m]` for A `[n, n]`, in new memory."""

    @abstractmethod
    def at(self, samples: slice | Tensor) -> Self:
        """That of some of the inputs."""

    @abstractmethod
    def size(self, rows: int) -> int:
        """Number m of whitened rows, for n = ``rows`` rows of the data."""

    @property
    @abstractmethod
    def width(self) -> int:
        """q, whitened rows for each block: 1 for noise by row."""

    @abstractmethod
    def logdet(self, rows: int) -> Tensor:
        """log|Λ⁻¹| over the rows observed `[]`, for n = ``rows``."""

    @abstractmethod
    def observed(self, rows: int) -> Tensor:
        """How many rows were observed `[]`, for n = ``rows``."""


@final
class RowNoise(AbstractNoise):
    """Noise variances: one for all rows, or one for each.

    Args:
        variances: `[1]` or `[n]`, infinite where nothing was observed; exact.
        outputs: C, rows of each input.
        dtype: Of products.
    """

    def __init__(self, variances: Tensor, outputs: int, dtype: torch.dtype) -> None:
        self.variances, self.outputs = variances, outputs
        self.scales = variances.rsqrt().to(dtype)

    def whiten(self, u: Tensor) -> Tensor:
        return u * self.scales

    def unwhiten(self, v: Tensor) -> Tensor:
        return v * self.scales

    def rows(self, block: Tensor) -> Tensor:
        return block * self.scales.unsqueeze(-1)

    def congruence(self, matrix: Tensor) -> Tensor:
        return self.scales * matrix * self.scales.unsqueeze(-1)

    def at(self, samples: slice | Tensor) -> RowNoise:
        if self.variances.shape == (1,):
            return self
        chosen = self.variances.unflatten(0, (-1, self.outputs))[samples].flatten()
        return RowNoise(chosen, self.outputs, self.scales.dtype)

    def size(self, rows: int) -> int:
        return rows

    @property
    def width(self) -> int:
        return 1

    def logdet(self, rows: int) -> Tensor:
        logs = torch.where(self.variances.isfinite(), self.variances, 1.0).log()
        return logs.expand(rows).sum()

    def observed(self, rows: int) -> Tensor:
        return self.variances.isfinite().expand(rows).sum().to(self.variances)


@final
class BlockNoise(AbstractNoise):
    """A block R_n for every input.

    Args:
        root: R `[N, C, q]`.
    """

    def __init__(self, root: Tensor) -> None:
        self.root = root

    def whiten(self, u: Tensor) -> Tensor:
        return torch.einsum("...nc,ncq->...nq", u.unflatten(-1, self.root.shape[:2]), self.root).flatten(-2)

    def unwhiten(self, v: Tensor) -> Tensor:
        inner = (self.root.shape[0], self.root.shape[2])
        return torch.einsum("...nq,ncq->...nc", v.unflatten(-1, inner), self.root).flatten(-2)

    def rows(self, block: Tensor) -> Tensor:
        return (self.root.mT @ block.unflatten(0, self.root.shape[:2])).flatten(0, 1)

    def congruence(self, matrix: Tensor) -> Tensor:
        return congruence(matrix, self.root)

    def at(self, samples: slice | Tensor) -> BlockNoise:
        return BlockNoise(self.root[samples])

    def size(self, rows: int) -> int:  # noqa: ARG002
        return self.root.shape[0] * self.root.shape[2]

    @property
    def width(self) -> int:
        return self.root.shape[2]

    def logdet(self, rows: int) -> Tensor:  # noqa: ARG002
        seen = self.root.flatten(1).any(-1)
        singular = InputError("root is singular: y has no density under it; give a root of full rank, or noise.")
        if self.root.shape[1] != self.root.shape[2]:
            raise singular
        logs = torch.linalg.slogdet(self.root[seen]).logabsdet
        if not bool(logs.isfinite().all()):
            raise singular
        return -2 * logs.sum()

    def observed(self, rows: int) -> Tensor:  # noqa: ARG002
        return self.root.any(-1).sum().to(self.root)


def congruence(matrix: Tensor, blocks: Tensor) -> Tensor:
    """Xᵀ A X `[N*J, N*J]` for A `[N*I, N*I]` and X block-diagonal, given as `[N, I, J]`; A is not copied."""
    points, rows, columns = blocks.shape
    matrix = matrix.reshape(points, rows, points * rows)
    result = matrix.new_empty(points, columns, points * columns)
    step = max(1, _SAMPLES // rows)
    for start in range(0, points, step):
        part = slice(start, start + step)
        left = (blocks[part].mT @ matrix[part]).reshape(-1, points, rows)
        result[part] = (left.transpose(0, 1) @ blocks).transpose(0, 1).reshape(-1, columns, points * columns)
    return result.view(points * columns, points * columns)
