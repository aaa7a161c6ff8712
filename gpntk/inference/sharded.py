"""Features of rows that are spread over processes, one all-reduce of a vector per product.

Each process ("rank") holds some of the rows, in memory or streamed, and all of the weights. With Φ_r its rows,

    Φᵀ u = Σ_r Φ_rᵀ u_r  (one all-reduce of F values per column),    Φ v = (Φ_r v)_r  (no communication),

so whatever lives in weight space, `[F]` or `[F, F]`, is the same on all ranks, and what lives in function space, `[n]`,
is spread over them. All ranks run the same program; they must do the same things in the same order.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from datetime import timedelta
from typing import Any, final

import torch
from torch import Tensor, distributed

from gpntk.errors import DistributedError
from gpntk.inference.features import AbstractFeatures
from gpntk.io import checksum

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
# Dimensions of a message, at most.
_DIMS = 3
# Matrices kept: a second moment and its spectrum, in two precisions.
_KEPT = 4


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
        self._local, self._group, self._timeout = local, group, timeout
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        if not distributed.is_initialized():
            raise DistributedError(
                "there is no process group: start the script with torchrun, and call "
                "torch.distributed.init_process_group first."
            )
        self._rank, self._world = distributed.get_rank(group), distributed.get_world_size(group)
        names = ("features", "dtype", "outputs", "weights", "samples", "memory budget")
        weights = int(checksum(_weights(local), "")[:15], 16)
        outputs = local.num_outputs if local.num_samples else 0
        budget = local.memory_budget
        own = [local.num_features, _DTYPES.index(local.dtype), outputs, weights, local.num_samples, budget]
        facts = dict(zip(names, torch.stack(self._gather(own, local.device)).mT.tolist(), strict=True))
        # Who has no rows may not know how many outputs there are.
        facts["outputs"] = [number or max(facts["outputs"]) for number in facts["outputs"]]
        told = {
            **facts,
            "dtype": [str(_DTYPES[code]) for code in facts["dtype"]],
            "weights": map(hex, facts["weights"]),
        }
        for name in names[:4]:
            if len(set(facts[name])) > 1:
                advice = "all must load the same network and cast their data alike."
                raise DistributedError(f"ranks differ in {name}: {_by_rank(told[name])}; {advice}")
        super().__init__(local.backend, local.dtype, local.device, local.num_samples, max(1, facts["outputs"][0]))
        samples = facts["samples"]
        self._place = sum(samples[: self._rank]), sum(samples)
        self._budget = min(facts["memory budget"])

    # --- this rank's rows --------------------------------------------------------------------------------------

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
        # Not by the backend, which forgets when memory is short: all ranks must forget the same, as they compute it
        # together.
        key = (kind, self.backend.version)
        if key not in self._kept:
            with torch.inference_mode(False), torch.no_grad():
                self._kept[key] = compute()
        self._kept.move_to_end(key)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return self._kept[key]

    def holds(self, kind: Hashable) -> bool:
        return (kind, self.backend.version) in self._kept

    # --- all ranks ---------------------------------------------------------------------------------------------

    @property
    def sharded(self) -> bool:
        return True

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def memory_budget(self) -> int:
        return self._budget

    def place(self) -> tuple[int, int]:
        return self._place

    def total(self, local: Tensor) -> Tensor:
        here, device = local.detach().to(self.device).contiguous(), local.device
        self._agree(here)
        self._wait(lambda: distributed.all_reduce(here, group=self._group, async_op=True))
        return here.to(device)

    def first(self, local: Tensor) -> Tensor:
        return self.total(local.clone() if self._rank == 0 else torch.zeros_like(local))

    def generators(self, generator: torch.Generator | None) -> tuple[torch.Generator | None, torch.Generator | None]:
        # One draw on each rank, whatever the number of its rows: generators that were alike stay alike.
        device = self.device if generator is None else generator.device
        seed = int(self.first(torch.randint(2**62, (), generator=generator, device=device)))
        seeds = torch.Generator("cpu").manual_seed(seed)
        # Rank r takes draw number r + 1.
        drawn = torch.randint(2**62, (self._world + 1,), generator=seeds, device="cpu").tolist()
        alike, own = torch.Generator(self.device), torch.Generator(self.device)
        return alike.manual_seed(drawn[0]), own.manual_seed(drawn[self._rank + 1])

    # --- private -----------------------------------------------------------------------------------------------

    def _agree(self, tensor: Tensor) -> None:
        """Refuse messages of different shapes before they are sent: gloo ends the process that gets one."""
        shape = [-1] * (_DIMS - tensor.dim()) + list(tensor.shape)
        headers = torch.stack(self._gather([*shape, _DTYPES.index(tensor.dtype)], tensor.device))
        if bool((headers == headers[0]).all()):
            return
        told = [
            f"{str(_DTYPES[dtype]).removeprefix('torch.')} {[size for size in sizes if size >= 0]}"
            for *sizes, dtype in headers.tolist()
        ]
        raise DistributedError(
            f"ranks want sums of different shapes: {_by_rank(told)}. All ranks must make the same calls in the same "
            "order, with as many columns, test points and prior variances."
        )

    def _gather(self, values: list[int], device: torch.device) -> list[Tensor]:
        own = torch.tensor(values, dtype=torch.int64, device=device)
        all_of_them = [torch.empty_like(own) for _ in range(self._world)]
        self._wait(lambda: distributed.all_gather(all_of_them, own, group=self._group, async_op=True))
        return all_of_them

    def _wait(self, start: Callable[[], distributed.Work | None]) -> None:
        """Do it, or say that a rank is missing."""
        try:
            work = start()
            if work is not None:
                work.wait(timedelta(seconds=self._timeout))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise DistributedError(
                f"rank {self._rank} of {self._world} lost the others: one has failed (its own message says why), or "
                f"took more than timeout={self._timeout:g} s. Start all of them again. ({reason})"
            ) from None


def _weights(local: AbstractFeatures) -> dict[str, Tensor]:
    """The selected weights by name, on the CPU."""
    return {name: weight.cpu() for name, weight in local.backend.weights().items()}


def _by_rank(values: Iterable[Any]) -> str:
    return ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
