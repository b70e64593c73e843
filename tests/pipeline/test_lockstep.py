"""In a finite pass all ranks take the same number of steps, whatever each has to give."""

import pickle
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DataLoader

from packer.batch import PackedBatch
from packer.config import PackerConfig
from packer.lockstep import in_step
from packer.stream import LoaderState, PackedStream
from tests.helpers.samples import assert_same_batches, image_samples, make_shards

P = 8
COUNT = 20


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """20 samples in 5 shards."""
    return make_shards(tmp_path_factory.mktemp("step"), image_samples(COUNT, unit=P), 4)


def open_stream(shards: list[str], **options: Any) -> PackedStream:
    config = PackerConfig(patch_size=P, seq_len=32)
    return PackedStream(shards, config, **{"sequences_per_batch": 1, "epochs": 1} | options)


def test_without_other_ranks_nothing_changes(shards: list[str]) -> None:
    stream = open_stream(shards)
    assert_same_batches(in_step(stream, empty=stream.empty_batch()), stream)


def rank_in_step(
    rank: int, world_size: int, folder: str, shards: list[str], num_streams: int, workers: int
) -> None:
    """Read a pass in step, then fail in one on rank 1 alone; store what the rank has seen."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    stream = open_stream(shards, num_streams=num_streams)
    loader = DataLoader(stream, batch_size=None, num_workers=workers)
    state = LoaderState()
    seen = []
    for batch in in_step(loader, empty=stream.empty_batch()):
        batch.check()
        state.update(batch)
        seen.append((batch.keys, tuple(batch.patches.shape)))

    def failing() -> Iterator[PackedBatch]:
        yield from [stream.empty_batch()] * 2
        if rank == 1:
            raise OSError("this rank's disk is gone")
        yield from [stream.empty_batch()] * 2

    message, steps = "", 0
    try:
        for _ in in_step(failing(), empty=stream.empty_batch()):
            steps += 1
    except (OSError, RuntimeError) as error:
        message = str(error)
    found = {"seen": seen, "state": state.to_dict(), "message": message, "steps": steps}
    Path(folder, f"rank-{rank}").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("ranks", "num_streams", "workers"),
    [(3, 2, 0), pytest.param(2, 3, 2, marks=pytest.mark.slow)],
)
def test_every_rank_takes_the_same_number_of_steps(
    shards: list[str], tmp_path: Path, ranks: int, num_streams: int, workers: int
) -> None:
    """With two streams the third of three ranks has none, and gives empty batches alone."""
    arguments = (ranks, str(tmp_path), shards, num_streams, workers)
    mp.spawn(rank_in_step, arguments, nprocs=ranks)
    found = [pickle.loads((tmp_path / f"rank-{rank}").read_bytes()) for rank in range(ranks)]

    [steps] = {len(rank["seen"]) for rank in found}
    alone = [
        list(open_stream(shards, num_streams=num_streams, rank=rank, world_size=ranks))
        for rank in range(ranks)
    ]
    assert steps == max(map(len, alone))
    assert len({len(batches) for batches in alone}) > 1, "the ranks must differ, else it is easy"
    for rank, batches in zip(found, alone, strict=True):
        keys = [batch.keys for batch in batches]
        assert [seen for seen, _ in rank["seen"]] == keys + [()] * (steps - len(keys))
        assert {shape for _, shape in rank["seen"]} == {(1, 32, 3 * P * P)}
    assert sorted(key for rank in found for keys, _ in rank["seen"] for key in keys) == [
        f"s-{i // 4:05d}.tar/{i:03d}" for i in range(COUNT)
    ]

    # Empty batches are steps too, so the ranks' states agree and are merged.
    states = [LoaderState.from_dict(rank["state"]) for rank in found]
    assert {state.batches for state in states} == {steps}
    assert LoaderState.merge(states).before == sum(map(len, alone))

    assert [rank["steps"] for rank in found] == [2] * ranks
    assert [rank["message"] for rank in found] == [
        "this rank's disk is gone"
        if rank == 1
        else "another rank could not read its next batch, so no rank can go on; its own message "
        "says why."
        for rank in range(ranks)
    ]
