"""A run that stops goes on with any number of ranks and workers: nothing lost, nothing twice."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, zip_longest
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packer import stream as stream_module
from packer.batch import PackedBatch
from packer.config import PackerConfig
from packer.plan.drop import BetaDrop, ScheduledDrop
from packer.plan.place import Placement
from packer.stream import LoaderState, PackedStream
from tests.helpers.samples import assert_same_batches, image_samples, make_shards

P = 4
COUNT = 48
KEYS = Counter(f"s-{i // 4:05d}.tar/{i:03d}" for i in range(COUNT))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """48 samples in 12 shards."""
    return make_shards(tmp_path_factory.mktemp("ranks"), image_samples(COUNT, unit=P), 4)


def open_stream(shards: list[str], **options: Any) -> PackedStream:
    config = PackerConfig(
        patch_size=P,
        seq_len=25,
        placement=Placement("exact", window=4, max_age=20),
        token_drop=options.pop("token_drop", BetaDrop(0.3, 0.6)),
    )
    return PackedStream(shards, config, **{"sequences_per_batch": 1, "shuffle_window": 3} | options)


def read(stream: PackedStream, workers: int) -> Iterator[PackedBatch]:
    """Read a stream as a `DataLoader` with so many workers does, in one process."""
    if workers == 0:
        yield from stream
        return
    running = {number: iter(stream) for number in range(workers)}
    while running:
        for number in list(running):
            with pytest.MonkeyPatch.context() as patch:
                worker = SimpleNamespace(id=number, num_workers=workers)
                patch.setattr(stream_module, "get_worker_info", lambda worker=worker: worker)
                batch = next(running[number], None)
            if batch is None:
                del running[number]
            else:
                yield batch


def of_no_rank(batch: PackedBatch) -> PackedBatch:
    """Take away who read the batch, which is all that may differ between numbers of ranks."""
    return replace(batch, state={**(batch.state or {}), "rank": 0, "ranks": 1})


def run(
    shards: list[str],
    ranks: int,
    workers: int,
    stops: list[int | None],
    state: LoaderState | None = None,
    **options: Any,
) -> tuple[list[list[PackedBatch]], LoaderState]:
    """Let each rank consume batches, all of them where its stop is None, and merge the states."""
    batches, states = [], []
    for rank in range(ranks):
        stream = open_stream(shards, rank=rank, world_size=ranks, state=state, **options)
        mine = LoaderState.from_dict(stream.state.to_dict())
        batches.append([])
        for batch in islice(read(stream, workers), stops[rank]):
            mine.update(batch)
            batches[-1].append(of_no_rank(batch))
        states.append(LoaderState.from_dict(json.loads(json.dumps(mine.to_dict()))))
    return batches, LoaderState.merge(states)


def keys(batches: list[list[PackedBatch]]) -> Counter[str]:
    return Counter(key for mine in batches for batch in mine for key in batch.keys)


def in_turn(batches: list[list[PackedBatch]]) -> list[PackedBatch]:
    """List the batches of all ranks in the order of steps."""
    return [batch for step in zip_longest(*batches) for batch in step if batch is not None]


@pytest.mark.parametrize(
    ("ranks", "num_streams"),
    [(ranks, streams) for streams in (4, 6, 12) for ranks in (1, 2, 3, 4) if streams % ranks == 0],
)
def test_a_run_goes_on_in_its_order_with_another_number_of_ranks(
    shards: list[str], ranks: int, num_streams: int
) -> None:
    options = {"num_streams": num_streams}
    [whole], _ = run(shards, 1, 0, [20], **options)
    steps = 9 // ranks
    first, state = run(shards, ranks, 0, [steps] * ranks, **options)
    assert_same_batches(in_turn(first), whole[: steps * ranks])
    for now, workers in ((1, 0), (1, 2), (2, 2), (3, 1)):
        if num_streams % (now * workers or now) == 0:
            more = (20 - steps * ranks) // now
            rest, _ = run(shards, now, workers, [more] * now, state)
            assert_same_batches(in_turn(rest), whole[steps * ranks :][: more * now])


@pytest.mark.parametrize("num_streams", [4, 6, 12])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_pass_that_stops_has_every_sample_once(
    shards: list[str], ranks: int, num_streams: int
) -> None:
    options = {"epochs": 1}
    first, state = run(shards, ranks, 0, [3] * ranks, num_streams=num_streams, **options)
    assert keys(first)
    for now in (1, 2, 3):
        rest, _ = run(shards, now, 2, [None] * now, state, **options)
        assert keys(first) + keys(rest) == KEYS


segments = st.lists(
    st.tuples(st.integers(1, 4), st.integers(0, 3), st.lists(st.integers(0, 5), min_size=4)),
    min_size=1,
    max_size=3,
)


@settings(max_examples=10)
@given(segments=segments, num_streams=st.integers(1, 13), last=st.integers(1, 5))
def test_whatever_ranks_workers_and_stops_every_sample_comes_once(
    shards: list[str],
    segments: list[tuple[int, int, list[int]]],
    num_streams: int,
    last: int,
) -> None:
    """Ranks need not even be in step, nor have a stream: there may be fewer streams than ranks."""
    options = {"epochs": 1, "num_streams": num_streams}
    state, found = None, Counter[str]()
    for ranks, workers, stops in segments:
        batches, state = run(shards, ranks, workers, [*stops], state, **options)
        found += keys(batches)
    batches, state = run(shards, last, 1, [None] * last, state, **options)
    assert found + keys(batches) == KEYS
    assert keys(run(shards, 2, 1, [None] * 2, state, **options)[0]) == Counter()


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_ranks_resume_their_own_states_after_any_batch(shards: list[str], workers: int) -> None:
    options: dict[str, Any] = {"num_streams": 4, "rank": 1, "world_size": 2}
    whole = list(islice(read(open_stream(shards, **options), workers), 8))
    for stop in range(8):
        state = LoaderState()
        for batch in whole[:stop]:
            state.update(batch)
        stored = LoaderState.from_dict(json.loads(json.dumps(state.to_dict())))
        rest = read(open_stream(shards, **options, state=stored), workers)
        assert_same_batches(islice(rest, 8 - stop), whole[stop:])


def test_a_stream_counts_the_images_of_the_whole_run(
    shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, list[int]] = {}
    add = stream_module.LogicalStream._plan

    def noted(stream: Any, item: Any, images_seen: int) -> None:
        seen.setdefault(stream.number, []).append(images_seen)
        add(stream, item, images_seen)

    monkeypatch.setattr(stream_module.LogicalStream, "_plan", noted)
    for workers in (0, 2):
        seen.clear()
        for _ in read(open_stream(shards, num_streams=3, epochs=1), workers):
            pass
        assert sorted(seen) == [0, 1, 2]
        assert all(counts == [3 * i for i in range(16)] for counts in seen.values())


@pytest.mark.parametrize("stop", [2, 9])
def test_a_schedule_goes_on_where_it_was(shards: list[str], stop: int) -> None:
    """What waits is planned again with the count it was planned with, not with today's."""
    options = {"num_streams": 2, "token_drop": ScheduledDrop(40, 10, maximum=0.9)}
    [whole], _ = run(shards, 1, 0, [20], **options)
    first, state = run(shards, 1, 0, [stop], **options)
    rest, _ = run(shards, 2, 1, [(20 - stop) // 2] * 2, state, **options)
    assert_same_batches(in_turn([*first]) + in_turn(rest), whole[: stop + (20 - stop) // 2 * 2])
    kept = [batch.stats.tokens / batch.stats.tokens_before_drop for batch in whole]
    assert sum(kept[:5]) > 1.5 * sum(kept[-5:]), "the schedule must move, or this shows nothing"
    waiting = [row[3] for stream in state.streams.values() for row in stream["placer"]]
    assert len(set(waiting)) > 1
