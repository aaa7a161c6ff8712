"""Processes ("ranks") that share the rows of some features, and what they tell each other.

`Alone` is one process with all rows, to which all of this is nothing; `Group` are those of torch.distributed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, final

import torch
from torch import Tensor, distributed

from gpntk.errors import DistributedError, InputError
from gpntk.io import checksum

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
# Dimensions of a message, at most.
_DIMS = 3
# Digits of a checksum that fit an integer, in which those of all ranks are added.
_DIGITS = 15


class AbstractRanks(ABC):
    """Which of the processes this is, and sums over all of them.

    Args:
        rank: The number of this process, from 0.
        count: How many there are.
    """

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count

    @abstractmethod
    def total(self, local: Tensor) -> Tensor:
        """The sum over all ranks of what each has; the memory of ``local`` may be used for it."""

    @abstractmethod
    def gather(self, values: list[int], device: torch.device) -> list[list[int]]:
        """The integers that each rank has, by rank."""

    @final
    def first(self, local: Tensor) -> Tensor:
        """What the first rank has."""
        return self.total(local.clone() if self.rank == 0 else torch.zeros_like(local))

    @final
    def number(self, local: Tensor, start: int = 0) -> int:
        """A number that is the same on all ranks, and for the same data only: the sum of their checksums.

        Args:
            local: The part of the data that this rank has.
            start: Where it stands among all.
        """
        digest = int(checksum({"": local.cpu()}, str(start))[:_DIGITS], 16)
        return int(self.total(torch.tensor(digest, device=local.device)))

    @final
    def generators(
        self, generator: torch.Generator | None, device: torch.device
    ) -> tuple[torch.Generator | None, torch.Generator | None]:
        """Generators on ``device`` for what all ranks must draw alike, and for what each draws for its own rows."""
        if self.count == 1:
            return generator, generator
        # One draw on each rank, whatever the number of its rows: generators that were alike stay alike.
        where = device if generator is None else generator.device
        seed = int(self.first(torch.randint(2**62, (), generator=generator, device=where)))
        seeds = torch.Generator("cpu").manual_seed(seed)
        # Rank r takes draw number r + 1.
        drawn = torch.randint(2**62, (self.count + 1,), generator=seeds, device="cpu").tolist()
        alike, own = torch.Generator(device), torch.Generator(device)
        return alike.manual_seed(drawn[0]), own.manual_seed(drawn[self.rank + 1])


@final
class Alone(AbstractRanks):
    """One process that has all rows."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def total(self, local: Tensor) -> Tensor:
        return local

    def gather(self, values: list[int], device: torch.device) -> list[list[int]]:  # noqa: ARG002
        return [values]


@final
class Group(AbstractRanks):
    """The processes of a group of torch.distributed; see `gpntk.inference.ShardedFeatures`.

    Args:
        device: Where messages are made.
        group: The process group; None for all processes.
        timeout: Seconds to wait for the others.
    """

    def __init__(self, device: torch.device, group: distributed.ProcessGroup | None, timeout: float) -> None:
        if not distributed.is_initialized():
            raise DistributedError(
                "there is no process group: start the script with torchrun, and call "
                "torch.distributed.init_process_group first."
            )
        if not timeout > 0:
            raise InputError(f"timeout={timeout}: give a positive number of seconds.")
        self._device, self._group, self._timeout = device, group, timeout
        super().__init__(distributed.get_rank(group), distributed.get_world_size(group))

    def total(self, local: Tensor) -> Tensor:
        here, device = local.detach().to(self._device).contiguous(), local.device
        self._agree(here)
        self._wait(lambda: distributed.all_reduce(here, group=self._group, async_op=True))
        return here.to(device)

    def gather(self, values: list[int], device: torch.device) -> list[list[int]]:
        own = torch.tensor(values, dtype=torch.int64, device=device)
        all_of_them = [torch.empty_like(own) for _ in range(self.count)]
        self._wait(lambda: distributed.all_gather(all_of_them, own, group=self._group, async_op=True))
        return torch.stack(all_of_them).tolist()

    def _agree(self, tensor: Tensor) -> None:
        """Refuse messages of different shapes before they are sent: gloo ends the process that gets one."""
        shape = [-1] * (_DIMS - tensor.dim()) + list(tensor.shape)
        headers = self.gather([*shape, DTYPES.index(tensor.dtype)], tensor.device)
        if all(header == headers[0] for header in headers):
            return
        told = [
            f"{str(DTYPES[dtype]).removeprefix('torch.')} {[size for size in sizes if size >= 0]}"
            for *sizes, dtype in headers
        ]
        raise DistributedError(
            f"ranks want sums of different shapes: {by_rank(told)}. All ranks must make the same calls in the same "
            "order, with as many columns, test points and prior variances."
        )

    def _wait(self, start: Callable[[], distributed.Work | None]) -> None:
        """Do it, or say that a rank is missing."""
        try:
            work = start()
            if work is not None:
                work.wait(timedelta(seconds=self._timeout))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise DistributedError(
                f"rank {self.rank} of {self.count} lost the others: one has failed (its own message says why), or "
                f"took more than timeout={self._timeout:g} s. Start all of them again. ({reason})"
            ) from None


def by_rank(values: Iterable[Any]) -> str:
    """What each rank has, in words."""
    return ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
