"""The covariance of any kernel, by its matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import final

import torch
from torch import Tensor

from gpntk._checks import check_count, check_functions, check_input, check_tensors, check_values
from gpntk.errors import InputError
from gpntk.inference.covariance import AbstractCovariance, FeatureCovariance
from gpntk.memory import budget_on

Kernel = Callable[[Tensor, Tensor], Tensor]


@final
class DenseCovariance(AbstractCovariance):
    """K = k(X, X) of any kernel, given as a function that returns matrices.

    Args:
        kernel: k, from x1 `[..., N, D]` and x2 `[..., M, D]` to `[..., N*C, M*C]`; with a graph, if derivatives of the
            evidence in its hyperparameters are wanted.
        x: X `[N, D]`.
        num_outputs: C, rows of k for each input.
        gram: K `[N*C, N*C]`, if it is known already.
        memory_budget: Bytes that work stays within; default: a share of the memory.

    Example:
        >>> import torch
        >>> from gpntk.inference import DenseCovariance, Posterior, WhitenedSystem
        >>> x = torch.linspace(0, 1, 20, dtype=torch.float64).unsqueeze(-1)
        >>> covariance = DenseCovariance(lambda one, two: (-8 * torch.cdist(one, two) ** 2).exp(), x)
        >>> posterior = Posterior(WhitenedSystem(covariance, torch.tensor([0.01])), x.sin().squeeze(-1))
        >>> abs(posterior.mean(x[:1] + 0.5) - 0.4794).item() < 0.01
        True
    """

    def __init__(
        self,
        kernel: Kernel,
        x: Tensor,
        num_outputs: int = 1,
        gram: Tensor | None = None,
        memory_budget: int | None = None,
    ) -> None:
        check_functions(kernel=kernel)
        check_tensors(x=x)
        check_input(x, x.device)
        check_count(num_outputs=num_outputs)
        if x.dim() != 2:
            raise InputError(f"x has shape {tuple(x.shape)}: give [N, D].")
        if gram is not None:
            check_values(x.device, gram=gram)
        budget = budget_on(x.device, memory_budget)
        rows = x.shape[0] * num_outputs
        if gram is not None and gram.shape != (rows, rows):
            raise InputError(f"gram has shape {tuple(gram.shape)}: it must be square with N*C = {rows} rows.")
        super().__init__(x.shape[0], num_outputs, x.dtype if gram is None else gram.dtype, x.device, budget)
        self.kernel, self.x, self._given, self._kept = kernel, x, gram, gram

    @classmethod
    def of_matrix(cls, matrix: Tensor, num_outputs: int = 1) -> DenseCovariance:
        """A covariance that is known at the data alone, K `[N*C, N*C]`; the inputs are their numbers `[N, 1]`."""
        x = torch.arange(matrix.shape[0] // num_outputs, dtype=matrix.dtype, device=matrix.device).unsqueeze(-1)
        return cls(partial(_entries, matrix=matrix.detach(), outputs=num_outputs), x, num_outputs, matrix)

    @property
    def weighted(self) -> FeatureCovariance:
        raise InputError("a dense covariance has no weight space: take FunctionSpace() or ConjugateGradients().")

    def gram(self) -> Tensor:
        if torch.is_grad_enabled() and self._given is None:
            gram = self.kernel(self.x, self.x)
            self._kept = gram.detach()
            return gram.to(self.dtype)
        if self._kept is None:
            self._kept = self.kernel(self.x, self.x)
        return self._kept.to(self.dtype)

    def cross(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.x.shape[-1]:
            raise InputError(f"x has {x.shape[-1]} columns, but the data have {self.x.shape[-1]}: give as many.")
        x = x.to(self.x.dtype)
        flat = self.kernel(x.flatten(0, 1), self.x)
        return flat.unflatten(0, (x.shape[0], -1)).to(self.dtype)

    def prior(self, x: Tensor) -> Tensor:
        x = x.to(self.x.dtype)
        return self.kernel(x, x).to(self.dtype)

    def prior_diagonal(self) -> Tensor:
        return self.gram().diagonal()

    def product(self, u: Tensor) -> Tensor:
        return u @ self.gram()

    def coefficients(self, dual: Tensor) -> Tensor:
        return dual

    def values(self, x: Tensor, coefficients: Tensor) -> Tensor:
        cross = self.cross(x.unsqueeze(0)).squeeze(0)
        return coefficients @ cross[:, : coefficients.shape[-1]].mT

    def representers(self, x: Tensor) -> Tensor:
        size = x.shape[0] * self.num_outputs
        identity = torch.eye(size, dtype=self.dtype, device=self.device)
        return torch.cat([identity.new_zeros(size, self.num_rows), identity], 1)

    def padded(self, coefficients: Tensor, x: Tensor) -> Tensor:
        size = self.num_rows + x.shape[0] * self.num_outputs
        return torch.nn.functional.pad(coefficients, (0, size - coefficients.shape[-1]))

    def widened(self, x: Tensor) -> DenseCovariance:
        return self.extended(x)

    def inputs(self, rows: int) -> Iterator[Tensor]:
        yield from self.x.split(rows)

    def at(self, x: Tensor) -> DenseCovariance:
        x = x.to(self.x.dtype)
        other = DenseCovariance(self.kernel, x, self.num_outputs, memory_budget=self.memory_budget)
        other.dtype = self.dtype
        return other

    def extended(self, x: Tensor) -> DenseCovariance:
        x = x.to(self.x.dtype)
        extended = self.at(torch.cat([self.x, x]))
        if self._kept is not None:
            cross, new = self.kernel(x, self.x), self.kernel(x, x)
            extended._kept = torch.cat([torch.cat([self._kept, cross.mT], 1), torch.cat([cross, new], 1)])
        return extended

    def to(self, dtype: torch.dtype) -> DenseCovariance:
        if dtype == self.dtype:
            return self
        other = DenseCovariance(self.kernel, self.x, self.num_outputs, self._given, self.memory_budget)
        other.dtype, other._kept = dtype, self._kept
        return other


def _entries(one: Tensor, two: Tensor, matrix: Tensor, outputs: int) -> Tensor:
    """A kernel of the numbers of inputs: what a matrix has for them."""
    offsets = torch.arange(outputs, device=matrix.device)
    rows, columns = ((outputs * x.long() + offsets).flatten(-2) for x in (one, two))
    return matrix[rows.unsqueeze(-1), columns.unsqueeze(-2)]
