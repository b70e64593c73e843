"""packer.plan.scale: an epoch planned for all ranks is what PackedStream gives, and loses none."""

import json
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packer.config import PackerConfig
from packer.decode import read_size
from packer.logical_stream import LogicalStream, StreamSource
from packer.plan.deal import reader_streams, stream_shards
from packer.plan.drop import ConstantDrop
from packer.plan.image import plan_image
from packer.plan.place import Placement, Strategy
from packer.plan.scale import PlannedBatch, PlannedRun, PlannedShards, draw_shards
from packer.stream import PackedStream
from tests.helpers.samples import image_samples, make_shards

CONFIG = PackerConfig(
    patch_size=8, seq_len=32, token_drop=ConstantDrop(0.3), placement=Placement(window=6), seed=5
)


def shards_of(samples: list[int], seq_len: int = 32, seed: int = 0) -> PlannedShards:
    """Make shards with these numbers of samples, of 1 to ``seq_len`` tokens."""
    bounds = np.concatenate([[0], np.cumsum(np.array(samples, np.int64))])
    lengths = np.random.default_rng(seed).integers(1, seq_len + 1, int(bounds[-1]))
    return PlannedShards(lengths.astype(np.int32), bounds)


def ids(batch: PlannedBatch | None) -> list[int]:
    return [] if batch is None else batch.samples.tolist()


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], PlannedShards, list[str]]:
    """Seven shards, what the plan knows of them, and the samples' keys."""
    folder: Path = tmp_path_factory.mktemp("scale")
    samples = image_samples(68)
    paths = make_shards(folder, samples, 10)
    keys = [f"s-{i // 10:05d}.tar/{sample['key']}" for i, sample in enumerate(samples)]
    lengths = [
        plan_image(key, read_size(sample["image"]).size, CONFIG).num_kept
        for key, sample in zip(keys, samples, strict=True)
    ]
    bounds = np.array([0, 10, 20, 30, 40, 50, 60, 68])
    return paths, PlannedShards(np.array(lengths, np.int32), bounds), keys


@pytest.mark.parametrize(("num_ranks", "num_streams"), [(1, 3), (2, 4), (3, 4), (2, 2), (2, 20)])
def test_the_plan_is_what_a_packed_stream_gives(
    tars: tuple[list[str], PlannedShards, list[str]], num_ranks: int, num_streams: int
) -> None:
    """Batch for batch, of every rank; with 20 streams the shards are shared sample by sample."""
    paths, shards, keys = tars
    run = PlannedRun(
        shards, CONFIG, num_ranks=num_ranks, num_streams=num_streams, sequences_per_batch=2
    )
    planned = [[ids(batch) for batch in step] for step in run.steps()]
    for rank in range(num_ranks):
        stream = PackedStream(
            paths,
            CONFIG,
            sequences_per_batch=2,
            need=None,
            epochs=1,
            shuffle_window=1,
            num_streams=num_streams,
            rank=rank,
            world_size=num_ranks,
        )
        real = [list(batch.keys) for batch in stream if batch.keys]
        mine = [[keys[i] for i in step[rank]] for step in planned if step[rank]]
        assert mine == real


@given(
    num_shards=st.integers(1, 30),
    num_streams=st.integers(1, 40),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_shards_are_dealt_as_a_logical_stream_reads_them(
    num_shards: int, num_streams: int, seed: int, epoch: int, shuffle: bool
) -> None:
    config = PackerConfig(seed=seed)
    dealt = []
    for number in range(num_streams):
        order = stream_shards(
            num_shards, number, num_streams, seed=seed, epoch=epoch, shuffle=shuffle
        )
        source = StreamSource(
            shards=tuple(f"{i}.tar" for i in range(num_shards)),
            config=config,
            sequences_per_batch=1,
            tokenizer=None,
            transform=None,
            need=None,
            epochs=None,
            shuffle_shards=shuffle,
            shuffle_window=1,
            size_index=False,
            fingerprint=0,
        )
        stream = LogicalStream(source, number, num_streams)
        stream.epoch = epoch
        assert order == stream._shard_order()
        dealt.append(order)
    if num_shards >= num_streams:
        assert sorted(chain(*dealt)) == list(range(num_shards))
    readers = [reader_streams(reader, 3, num_streams) for reader in range(3)]
    assert sorted(chain(*readers)) == list(range(num_streams))


@given(
    samples=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    num_streams=st.integers(1, 8),
    stop=st.integers(0, 12),
    strategy=st.sampled_from(("exact", "best_fit", "first_fit", "next_fit")),
)
def test_a_stopped_epoch_goes_on_with_other_ranks_and_loses_nothing(
    samples: list[int], ranks: tuple[int, int], num_streams: int, stop: int, strategy: Strategy
) -> None:
    """Stream by stream the batches are those of a run that never stopped."""
    shards = shards_of(samples)
    config = PackerConfig(
        seq_len=32, placement=Placement(strategy, window=5, max_age=9, open_sequences=3)
    )
    common = {"num_streams": num_streams, "sequences_per_batch": 2}
    before = PlannedRun(shards, config, num_ranks=ranks[0], **common)
    seen = [batch for step in islice(before.steps(), stop) for batch in step if batch]
    states = json.loads(json.dumps(before.states()))
    after = PlannedRun(shards, config, num_ranks=ranks[1], states=states, **common)
    seen += [batch for step in after.steps() for batch in step if batch]
    assert sorted(chain.from_iterable(map(ids, seen))) == list(range(shards.num_samples))
    whole = PlannedRun(shards, config, num_ranks=ranks[1], **common)
    never_stopped = [batch for step in whole.steps() for batch in step if batch]
    assert sorted(map(ids, seen)) == sorted(map(ids, never_stopped))
    for batch in seen:
        tokens = np.add.reduceat(shards.lengths[batch.samples], batch.bounds[:-1])
        assert tokens.max() <= 32


def test_drawn_shards_have_the_sizes_asked_for() -> None:
    shards = draw_shards(200, PackerConfig(), mean_samples=50, spread=0.2, num_empty=7)
    samples = np.diff(shards.bounds)
    assert (shards.num_shards, shards.num_samples) == (200, len(shards.lengths))
    assert (samples == 0).sum() == 7
    assert samples[samples > 0].mean() == pytest.approx(50, abs=3)
    assert samples[samples > 0].std() == pytest.approx(10, abs=2)
    assert 1 <= shards.lengths.min() <= shards.lengths.max() <= 1024
