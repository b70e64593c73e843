"""`LoaderState`: whose it is, and what can be merged."""

import json
from typing import Any

import pytest

from packer.batch import PackedBatch
from packer.collate import PackingCollator
from packer.config import PackerConfig
from packer.loader_state import LoaderState
from packer.plan.place import Placement
from packer.stream import PackedStream
from tests.helpers.samples import image_samples, make_shards, png

P = 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_shards(tmp_path_factory.mktemp("state"), image_samples(24, unit=P), 4)


def open_stream(shards: list[str], **options: Any) -> PackedStream:
    config = PackerConfig(patch_size=P, seq_len=32, placement=Placement("exact", window=3))
    return PackedStream(shards, config, **{"sequences_per_batch": 1, "num_streams": 6} | options)


def states(shards: list[str], ranks: int, steps: int, **options: Any) -> list[LoaderState]:
    """Let each rank consume so many batches."""
    found = []
    for rank in range(ranks):
        state = LoaderState()
        batches = iter(open_stream(shards, rank=rank, world_size=ranks, **options))
        for _ in range(steps):
            state.update(next(batches))
        found.append(state)
    return found


def test_a_loader_state_counts_and_travels_through_json(shards: list[str]) -> None:
    [state] = states(shards, 1, 8)
    assert (state.num_streams, state.batches, state.before) == (6, 8, 0)
    assert (state.rank, state.ranks) == (0, 1)
    assert {s: stream["batches"] for s, stream in state.streams.items()} == {
        0: 2, 1: 2, 2: 1, 3: 1, 4: 1, 5: 1
    }  # fmt: skip
    assert LoaderState.from_dict(json.loads(json.dumps(state.to_dict()))) == state
    assert LoaderState.from_dict(LoaderState().to_dict()) == LoaderState()


def test_a_loader_state_takes_batches_of_one_ranks_stream_alone(shards: list[str]) -> None:
    batch = PackingCollator(PackerConfig(patch_size=P))([(png(P, P), "a")])
    with pytest.raises(ValueError, match="a batch of a PackedStream"):
        LoaderState().update(batch)
    state, _ = states(shards, 2, 1)
    other: PackedBatch = next(iter(open_stream(shards, rank=1, world_size=2)))
    with pytest.raises(ValueError, match="that of rank 0 of 2 got a batch of rank 1 of 2"):
        state.update(other)


def test_an_empty_batch_is_counted_and_moves_no_stream(shards: list[str]) -> None:
    stream = open_stream(shards, rank=1, world_size=2, num_streams=None)
    batch = stream.empty_batch()
    batch.check()
    assert (batch.num_images, batch.patches.shape) == (0, (1, 32, 3 * P * P))
    state = LoaderState()
    state.update(batch)
    assert (state.batches, state.streams, state.num_streams) == (1, {}, 0)
    assert (state.rank, state.ranks) == (1, 2)


def test_merging_takes_the_newest_state_of_every_stream(shards: list[str]) -> None:
    merged = LoaderState.merge(states(shards, 3, 4))
    assert (merged.num_streams, merged.batches, merged.before, merged.ranks) == (6, 0, 12, 0)
    assert {s: stream["batches"] for s, stream in merged.streams.items()} == dict.fromkeys(
        range(6), 2
    )
    later = states(shards, 2, 4, state=merged, num_streams=None)
    resumed = [LoaderState.from_dict(merged.to_dict()) for _ in later]
    for mine, state in zip(resumed, later, strict=True):
        mine.streams |= state.streams
        mine.batches, mine.rank, mine.ranks = state.batches, state.rank, state.ranks
    for order in (resumed, resumed[::-1]):
        again = LoaderState.merge(order)
        assert (again.before, again.batches) == (20, 0)
        assert sum(stream["batches"] for stream in again.streams.values()) == 20
    assert LoaderState.merge([merged]) == merged
    assert LoaderState.merge([LoaderState()] * 3) == LoaderState()


def test_a_state_that_is_missing_or_of_another_run_is_refused(shards: list[str]) -> None:
    first, second, third = states(shards, 3, 2)
    other = states(shards, 3, 2, num_streams=3)[1]
    continued = states(shards, 3, 2, state=LoaderState.merge([first, second, third]))[1]
    continued.before = 6
    for given, message in (
        ([], "the state of each rank, once"),
        ([first, second], "the states of all 3 ranks; got 2"),
        ([first, second, second], r"once; got those of the ranks \[0, 1, 1\]"),
        ([first, other, third], r"the states of one run; got states of \[3, 6\] streams"),
        ([first, continued, third], r"merged after \[0, 6\] batches"),
    ):
        with pytest.raises(ValueError, match=message):
            LoaderState.merge(given)


def test_a_rank_goes_on_from_its_own_state_or_a_merged_one(shards: list[str]) -> None:
    first, second = states(shards, 2, 3)
    for state, rank, ranks in ((first, 1, 2), (second, 0, 1), (first, 0, 3)):
        with pytest.raises(ValueError, match=r"that of rank \d of 2; this is rank .*\.merge"):
            open_stream(shards, state=state, rank=rank, world_size=ranks)
    for rank in range(3):
        open_stream(shards, state=LoaderState.merge([first, second]), rank=rank, world_size=3)
    [alone] = states(shards, 1, 3)
    with pytest.raises(ValueError, match="that of rank 0 of 1; this is rank 0 of 2"):
        open_stream(shards, state=alone, rank=0, world_size=2)
    open_stream(shards, state=LoaderState.merge([alone]), rank=0, world_size=2)
