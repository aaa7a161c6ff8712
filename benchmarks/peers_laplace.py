"""laplace-torch: the kernel matrix of ``FunctionalLaplace.fit``, all data in one batch, its default BackPACK backend.

``fit`` does more than the Gram matrix: it forms the Jacobian twice, and ends with a Cholesky factor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from laplace import FunctionalLaplace
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers_torch import Problem, main


def gram(problem: Problem) -> Callable[[Tensor], Tensor]:
    """``FunctionalLaplace(module, "regression", n_subset=N).fit(loader)``, and its ``K_MM`` in the order of x."""

    def dense(x: Tensor) -> Tensor:
        # A second fit of one object adds to the first, and BackPACK changes the module: both are new in every call.
        peer = FunctionalLaplace(copy.deepcopy(problem.module), "regression", n_subset=len(x))
        peer.fit(DataLoader(TensorDataset(x, x.new_zeros(len(x), 1)), batch_size=len(x)))
        order = torch.stack(list(peer.train_loader.sampler)).argsort()
        return peer.K_MM[order][:, order]

    return dense


if __name__ == "__main__":
    main(None, gram)
