"""The ranks of a run: who this process is, and the few values it exchanges with the others."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a collective waits for the slowest rank before it fails: longer than an evaluation or a
checkpoint that one rank makes while the others wait."""


@dataclass(frozen=True)
class World:
    """The processes that train one model together; alone without torchrun.

    `sum`, `any`, `barrier`, `broadcast` and `gather` are collectives: every rank calls them, in the
    same order. They exchange small host values, and never wait for the device.
    """

    rank: int
    """This process, from 0."""
    size: int
    """Number of processes."""
    local_rank: int
    """This process among those of its machine, from 0."""
    device: torch.device
    """Where this process computes: with several ranks on CUDA, the device of its local rank."""
    group: dist.ProcessGroup | None
    """All ranks, for the collectives of losses; None for a process alone."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes what only one may write."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum each value over the ranks, in float64: integers up to 2 ** 53 stay exact.

        Args:
            values: As many on every rank.
        """
        total = torch.tensor(values, dtype=torch.float64)
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        found: list[float] = total.tolist()
        return found

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; the answer is the same on all."""
        return self.sum([flag])[0] > 0

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        # Not dist.barrier, which on CUDA takes NCCL and occupies the device while it waits.
        self.sum([0])

    def broadcast(self, value: T, *, source: int = 0) -> T:
        """Return the value that rank ``source`` has; it must be picklable.

        Args:
            value: Read on rank ``source`` alone.
            source: The rank that gives.
        """
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=source, group=self.group, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in rank order, on every rank; they must be picklable."""
        if self.group is None:
            return [value]
        found: list[T] = [value] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found


def alone(device: torch.device) -> World:
    """Return the world of one process."""
    return World(rank=0, size=1, local_rank=0, device=device, group=None)


@contextmanager
def join_world(device: torch.device, *, timeout: timedelta = TIMEOUT) -> Iterator[World]:
    """Join the ranks that torchrun started, and leave them at the end, but not after an error.

    Reads torchrun's ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``. Without them, or with one process,
    nothing is initialised. Tensors on the CPU go through gloo, those on CUDA through NCCL.

    Args:
        device: The device of the run; with several ranks ``cuda`` becomes that of the local rank.
        timeout: How long a collective waits for the slowest rank before it raises.

    Raises:
        ValueError: If there are more ranks on this machine than CUDA devices.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield alone(device)
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                "each rank of a machine needs a CUDA device of its own; got local rank "
                f"{local_rank} on a machine with {torch.cuda.device_count()}. Start fewer with "
                "torchrun --nproc-per-node, or train on the CPU with --device cpu."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timeout)
    yield World(dist.get_rank(), size, local_rank, device, dist.group.WORLD)
    # Reached without an error alone: after one, leaving would wait for what other ranks still
    # exchange, where ending lets torchrun end them.
    dist.destroy_process_group()
