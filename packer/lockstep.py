"""Ranks in step: a finite pass that gives every rank the same number of batches."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

from packer.batch import PackedBatch

_ENDED, _GOES_ON, _FAILED = range(3)


def in_step(
    batches: Iterable[PackedBatch],
    *,
    empty: PackedBatch,
    group: "dist.ProcessGroup | None" = None,
) -> Iterator[PackedBatch]:
    """Yield a rank's batches, then empty ones until every rank has come to its end.

    A rank that stopped earlier would leave the others waiting in the collectives of their step.
    One flag is exchanged before each batch, in the process that iterates, so this goes around a
    `DataLoader` and not into it. Without torch.distributed the batches come as they are.

    Args:
        batches: This rank's batches, perhaps none.
        empty: What a rank that has ended gives: `PackedStream.empty_batch`.
        group: The ranks that step together; None means all.

    Raises:
        RuntimeError: If another rank could not read its next batch. Without this the others would
            wait for it until the collective times out.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        yield from batches
        return
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    flag = torch.zeros((), dtype=torch.int32, device=device)
    source = iter(batches)
    while True:
        try:
            batch = next(source, None)
        except Exception:
            _exchange(flag, _FAILED, group)
            raise
        state = _exchange(flag, _ENDED if batch is None else _GOES_ON, group)
        if state == _FAILED:
            raise RuntimeError(
                "another rank could not read its next batch, so no rank can go on; its own message "
                "says why."
            )
        if state == _ENDED:
            return
        yield empty if batch is None else batch


def _exchange(flag: torch.Tensor, value: int, group: "dist.ProcessGroup | None") -> int:
    """Return the highest value of all ranks."""
    flag.fill_(value)
    dist.all_reduce(flag, dist.ReduceOp.MAX, group)
    return int(flag)
