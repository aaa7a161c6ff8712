"""Features of rows that are spread over processes, one all-reduce of a vector per product.

Each process ("rank") holds some of the rows, in memory or streamed, and all of the weights. With Φ_r its rows,

    Φᵀ u = Σ_r Φ_rᵀ u_r  (one all-reduce of F values per column),    Φ v = (Φ_r v)_r  (no communication),

so whatever lives in weight space, `[F]` or `[F, F]`, is the same on all ranks, and what lives in function space, `[n]`,
is spread over them. All ranks run the same program; they must do the same things in the same order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator
from typing import Any, final

import torch
from torch import Tensor, distributed

from gpntk.errors import DistributedError
from gpntk.inference.features import AbstractFeatures
from gpntk.inference.ranks import DTYPES, Group, by_rank
from gpntk.io import checksum
from gpntk.memory import TensorCache


@final
class ShardedFeatures(AbstractFeatures):
    """The features of all ranks' rows, in the order of the ranks.

    Solvers of weight space (`WeightSpace`, `ConjugateGradients` with `SampledGram` or ``Nystrom(space="weight")``) give
    every rank the answer that one process with all rows would give. Targets y and noise variances `[n]` are those of
    the rank's own rows; prior variances, test points and random seeds must be the same on all ranks. So must be the
    kind of machine and the number of threads, since ranks decide alike only if they round alike.

    Args:
        local: The rows of this rank, `Features` or `StreamedFeatures`; there may be none.
        group: The process group; default: that of all processes.
        timeout: Seconds to wait for the other ranks, at least the longest difference between their times for a piece
            of work. With NCCL the timeout of ``torch.distributed.init_process_group`` acts too.

    Raises:
        DistributedError: Here: ranks have other networks, precisions or numbers of outputs. In any later product: a
            rank has died, does not answer within ``timeout``, or asks for a sum of another shape.

    Example:
        >>> import tempfile, torch, gpntk
        >>> from gpntk.inference import FeatureCovariance, Features, Posterior, ShardedFeatures
        >>> from gpntk.inference import WeightSpace, WhitenedSystem
        >>> with tempfile.TemporaryDirectory() as folder:  # one process; ``torchrun`` starts more, see docs/scaling.md
        ...     torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/f", rank=0, world_size=1)
        >>> x = torch.randn(50, 3, dtype=torch.float64)
        >>> backend = gpntk.AutoBackend(gpntk.freeze(torch.nn.Linear(3, 1).double()))
        >>> features = ShardedFeatures(Features(backend, x))
        >>> system = WhitenedSystem(FeatureCovariance(features, torch.ones(1)), torch.tensor([0.1]))
        >>> Posterior(system, x.sum(-1), WeightSpace()).weights.shape
        torch.Size([4])
        >>> torch.distributed.destroy_process_group()

    References:
        Wang et al. (2019), Exact Gaussian Processes on a Million Data Points, https://arxiv.org/abs/1903.08114 (rows of
            K spread over devices, in function space).
    """

    def __init__(
        self, local: AbstractFeatures, group: distributed.ProcessGroup | None = None, timeout: float = 600.0
    ) -> None:
        self._local = local
        ranks = Group(local.device, group, timeout)
        weights = {name: weight.cpu() for name, weight in local.backend.weights().items()}
        own = {
            "features": local.num_features,
            "dtype": DTYPES.index(local.dtype),
            "outputs": local.num_outputs if local.num_samples else 0,
            "weights": int(checksum(weights, "")[:15], 16),
            "samples": local.num_samples,
            "memory budget": local.memory_budget,
        }
        gathered = ranks.gather(list(own.values()), local.device)
        facts = dict(zip(own, map(list, zip(*gathered, strict=True)), strict=True))
        # Who has no rows may not know how many outputs there are.
        facts["outputs"] = [number or max(facts["outputs"]) for number in facts["outputs"]]
        told = {"dtype": lambda code: str(DTYPES[code]), "weights": hex}
        for name in ("features", "dtype", "outputs", "weights"):
            if len(set(facts[name])) > 1:
                raise DistributedError(
                    f"ranks differ in {name}: {by_rank(map(told.get(name, str), facts[name]))}; all must load the same "
                    "network and cast their data alike."
                )
        samples = facts["samples"]
        super().__init__(
            local.backend, local.dtype, local.device, local.num_samples, max(1, facts["outputs"][0]), ranks=ranks,
            place=(sum(samples[: ranks.rank]), sum(samples)), memory_budget=min(facts["memory budget"]),
        )  # fmt: skip
        self._cache = TensorCache(self.memory_budget)

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        return self._local.parts()

    def take(self, chosen: Tensor) -> Tensor:
        return self._local.take(chosen)

    def to(self, dtype: torch.dtype) -> ShardedFeatures:
        if dtype == self.dtype:
            return self
        other = copy.copy(self)
        other._local, other.dtype = self._local.to(dtype), dtype
        return other

    def remember(self, kind: Hashable, compute: Callable[[], Any]) -> Any:
        # Not by the backend, whose budget may be another on each rank: all must forget the same, as they compute it
        # together.
        return self._cache.get((kind, self.backend.version), (), compute)

    def holds(self, kind: Hashable) -> bool:
        return self._cache.holds((kind, self.backend.version), ())
