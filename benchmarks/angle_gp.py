"""Classification by GP regression of tens of thousands of inputs: a tabulated kernel, factorised in place."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import gpntk
from gpntk.likelihoods import one_hot_targets

# Rows of a matrix worked on at once.
_BLOCK = 1024
# Intervals of a table of the kernel over [0, π]: linear interpolation is then exact to 1e-11.
_INTERVALS = 2**18
_NODES = 128


class AngleKernel:
    """A fully connected NNGP of standardised inputs (x·x/D = 1) from a table over the angle between them.

    All variances are equal then, and k(x, x') = f(θ), cos θ = x·x'/D, with f analytic, also at θ = 0 and for ReLU. As
    in the paper's code values come from a table; here it is accurate to rounding, see `error`.

    f is a power series in cos θ with no negative terms (Schoenberg), so that f(π/2) is a covariance, of a constant.
    It is left out of values and kept as ``constant``: it is most of k, and would be most of the rounding errors.
    """

    def __init__(self, kernel: gpntk.InfiniteNNGPKernel, device: torch.device) -> None:
        def exact(angles: np.ndarray) -> np.ndarray:
            points = math.sqrt(2) * np.stack([np.cos(angles), np.sin(angles)], -1)
            with torch.no_grad():
                return kernel(torch.tensor([[math.sqrt(2), 0.0]]).double(), torch.tensor(points)).to_dense()[0].numpy()

        series = np.polynomial.Chebyshev.interpolate(exact, _NODES, [0, math.pi])
        self.constant = float(series(math.pi / 2))
        self._table = torch.tensor(series(np.linspace(0, math.pi, _INTERVALS + 1)) - self.constant, device=device)
        self._slopes = self._table.diff()
        self._exact = exact
        self.variance = self._table[0].item()

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        """k(x, z) less the constant, `[N, M]`."""
        position = (x @ z.mT).div_(x.shape[1]).clamp_(-1, 1).arccos_().mul_(_INTERVALS / math.pi)
        index = position.long().clamp_(max=_INTERVALS - 1)
        slopes = self._slopes.to(x.dtype)[index]
        return self._table.to(x.dtype)[index].addcmul_(slopes, position.sub_(index))

    def error(self, x: Tensor) -> float:
        """Largest error between the rows of x, relative to the variance."""
        angles = (x @ x.mT).div(x.shape[1]).clamp(-1, 1).arccos().flatten()
        exact = torch.tensor(self._exact(angles.cpu().numpy()) - self.constant).to(x)
        return ((self(x, x).flatten() - exact).abs().max() / self.variance).item()


class OneHotRegression:
    """(k + s I)⁻¹ Y for k = K + κ 1 1ᵀ, κ the kernel's constant, with as little memory as K takes.

    L is below the diagonal of K, which is known, and K above it.
    """

    def __init__(self, kernel: AngleKernel, x: Tensor, y: Tensor, noise: float = 1e-10) -> None:
        self._kernel, self._x = kernel, x
        # The last column is 1, for Woodbury's identity.
        self._columns = functional.pad(one_hot_targets(y, dtype=torch.float64), (0, 1), value=1.0)
        count = len(x)
        self._matrix = x.new_empty(count, count)
        for start in range(0, count, _BLOCK):
            self._matrix[start : start + _BLOCK] = kernel(x[start : start + _BLOCK], x)
        self.noise = noise
        while not self._factorised():
            self.noise *= 10
        self._solution = self._solved(self._columns)

    def means(self, z: Tensor) -> Tensor:
        """Posterior means at z `[M, C]`."""
        targets, ones = self._solution[:, :-1], self._solution[:, -1:]
        constant = self._kernel.constant
        coefficients = targets - ones * (constant * targets.sum(0) / (1 + constant * ones.sum()))
        parts = [self._kernel(rows, self._x).double() @ coefficients for rows in z.split(_BLOCK)]
        return torch.cat(parts) + constant * coefficients.sum(0)

    def refine(self) -> None:
        """One step of iterative refinement, the residual in float64."""
        solution = self._solution
        residual = self._columns - (self._kernel.variance + self.noise) * solution
        for start, end in self._blocks():
            above = self._matrix[start:end].double().triu_(start + 1)
            residual[start:end] -= above @ solution
            residual -= above.mT @ solution[start:end]
        self._solution = solution + self._solved(residual)

    def _blocks(self) -> list[tuple[int, int]]:
        count = len(self._x)
        return [(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK)]

    def _factorised(self) -> bool:
        """K + s I = L Lᵀ, whether it succeeds: L from K above the diagonal, which stays, to below it."""
        matrix = self._matrix
        for start, end in self._blocks():
            square = matrix[start:end, start:end]
            square.copy_(square.triu(1) + square.triu(1).mT).diagonal().fill_(self._kernel.variance + self.noise)
            for lower, upper in self._blocks():
                if lower >= end:
                    matrix[lower:upper, start:end] = matrix[start:end, lower:upper].mT
        for start, end in self._blocks():
            square = matrix[start:end, start:end]
            above = square.triu(1)
            # Left-looking: what earlier columns contribute to these.
            square -= matrix[start:end, :start] @ matrix[start:end, :start].mT
            factor, failed = torch.linalg.cholesky_ex(square)
            square.copy_(above if failed else above + factor)
            if failed:
                return False
            for lower, upper in self._blocks():
                if lower >= end:
                    below = matrix[lower:upper, start:end]
                    below -= matrix[lower:upper, :start] @ matrix[start:end, :start].mT
                    below.copy_(torch.linalg.solve_triangular(factor, below.mT, upper=False).mT)
        return True

    def _solved(self, targets: Tensor) -> Tensor:
        """(L Lᵀ)⁻¹ targets, in float64."""
        matrix, blocks = self._matrix, self._blocks()
        result = targets.to(matrix, copy=True)
        for start, end in blocks:
            part = result[start:end] - matrix[start:end, :start] @ result[:start]
            result[start:end] = torch.linalg.solve_triangular(matrix[start:end, start:end], part, upper=False)
        for start, end in reversed(blocks):
            part = result[start:end] - matrix[end:, start:end].mT @ result[end:]
            result[start:end] = torch.linalg.solve_triangular(matrix[start:end, start:end].mT, part, upper=True)
        return result.to(targets)
