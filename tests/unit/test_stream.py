import io
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from packer.batch import BatchStats, PackedBatch
from packer.captions import CaptionTokenizer
from packer.collate import PackingCollator
from packer.config import PackerConfig
from packer.errors import TooManyFailures
from packer.plan.drop import BetaDrop
from packer.plan.place import Placement
from packer.stream import PackedStream
from tests.helpers.samples import (
    assert_same,
    assert_same_batches,
    cut_png,
    drain,
    image_samples,
    make_shards,
    naive_patches,
    noise,
    png,
    unpack,
)

P = 8
COUNT = 47
TOKENIZER = CaptionTokenizer.train(["picture number 1"] * 3, vocab_size=300)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """47 samples in 5 shards."""
    return make_shards(tmp_path_factory.mktemp("shards"), image_samples(COUNT, unit=P), 10)


def config(**options: Any) -> PackerConfig:
    placement = Placement("exact", window=6, max_age=12)
    return PackerConfig(**{"patch_size": P, "seq_len": 64, "placement": placement} | options)


def open_stream(
    shards: Sequence[str] | str, settings: PackerConfig | None = None, **options: Any
) -> PackedStream:
    options = {"sequences_per_batch": 2, "tokenizer": TOKENIZER} | options
    return PackedStream(shards, settings or config(), **options)


def load(stream: PackedStream, workers: int = 0, limit: int | None = None) -> list[PackedBatch]:
    batches = drain(DataLoader(stream, batch_size=None, num_workers=workers), limit)
    for batch in batches:
        batch.check()
        assert batch.patches.shape == (2, 64, 3 * P * P)
    return batches


def keys(batches: Iterable[PackedBatch]) -> list[str]:
    return [key.rpartition("/")[2] for batch in batches for key in batch.keys]


def total(batches: Iterable[PackedBatch]) -> BatchStats:
    return sum((batch.stats for batch in batches), BatchStats())


ALL = [f"{i:03d}" for i in range(COUNT)]


@pytest.mark.parametrize("num_streams", [1, 2, 3, 7])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_finite_pass_gives_every_sample_exactly_once(
    shards: list[str], num_streams: int, workers: int
) -> None:
    stream = open_stream(shards, epochs=1, num_streams=num_streams, shuffle_window=4)
    batches = load(stream, workers)
    assert sorted(keys(batches)) == ALL
    stats = total(batches)
    assert (stats.samples_read, stats.images, stats.skipped) == (COUNT, COUNT, {})
    for batch in batches:
        assert batch.texts == tuple(f"picture number {int(key)}" for key in keys([batch]))
        index = batch.image_index[batch.image_index >= 0].tolist()
        assert index == list(range(batch.num_images)), "placement order"
        for key, image in unpack(batch).items():
            pixels = noise(image.grid[0] * P, image.grid[1] * P, int(key[-3:]))
            assert torch.equal(image.patches, naive_patches(pixels, image.positions, P))


def test_keys_name_the_shard(shards: list[str]) -> None:
    found = {key for batch in load(open_stream(shards, epochs=1)) for key in batch.keys}
    assert found == {f"s-{i // 10:05d}.tar/{i:03d}" for i in range(COUNT)}


@pytest.mark.parametrize("strategy", ["exact", "first_fit"])
def test_the_order_does_not_depend_on_the_number_of_workers(
    shards: list[str], strategy: Any
) -> None:
    settings = config(placement=Placement(strategy, window=6, max_age=12, open_sequences=3))
    runs = [
        load(open_stream(shards, settings, num_streams=2, shuffle_window=5), workers, 30)
        for workers in (0, 1, 2)
    ]
    assert_same_batches(runs[0], runs[1])
    assert_same_batches(runs[0], runs[2])
    assert [batch.state["stream"] for batch in runs[0] if batch.state] == [0, 1] * 15


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_by_default_every_worker_has_a_stream(shards: list[str]) -> None:
    for workers in (0, 1, 3):
        [batch] = load(open_stream(shards), workers, 1)
        assert batch.state is not None
        assert batch.state["num_streams"] == max(workers, 1)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_beyond_the_streams_stay_idle(shards: list[str]) -> None:
    runs = [load(open_stream(shards, num_streams=2), workers, 8) for workers in (0, 3)]
    assert_same_batches(*runs)


@pytest.mark.parametrize("num_streams", [None, 4, 6])
def test_ranks_share_the_samples_out(shards: list[str], num_streams: int | None) -> None:
    found: Counter[str] = Counter()
    for rank in range(2):
        stream = open_stream(shards, epochs=1, rank=rank, world_size=2, num_streams=num_streams)
        found += Counter(keys(load(stream)))
    assert found == Counter(ALL)


def test_global_batch_g_comes_from_stream_g_modulo_the_streams(shards: list[str]) -> None:
    one_rank = load(open_stream(shards, num_streams=4), 0, 24)
    for rank in range(2):
        mine = load(open_stream(shards, num_streams=4, rank=rank, world_size=2), 2, 12)
        for batch, other in zip(mine, one_rank[rank::2], strict=True):
            assert_same(batch, other, ignore=["state"])
            assert batch.state == {**(other.state or {}), "rank": rank, "ranks": 2}


def test_an_endless_stream_crosses_epochs_without_a_barrier(shards: list[str]) -> None:
    batches = load(open_stream(shards, config(token_drop=BetaDrop(0.3, 0.6))), limit=60)
    found = Counter(keys(batches))
    assert set(found) == set(ALL)
    assert max(found.values()) - min(found.values()) <= 2
    assert all(batch.stats.padding < 0.2 for batch in batches), "no batch is flushed part empty"
    # Another epoch, other tokens.
    first = next(image for b in batches for key, image in unpack(b).items() if key.endswith("/000"))
    later = [image for b in batches for key, image in unpack(b).items() if key.endswith("/000")]
    assert any(not torch.equal(first.positions, image.positions) for image in later[1:])


def test_epochs_bound_the_stream_and_reshuffle_it(shards: list[str]) -> None:
    found = keys(load(open_stream(shards, epochs=2)))
    assert Counter(found) == Counter({key: 2 for key in ALL})
    assert len(total(load(open_stream(shards, epochs=2))).skipped) == 0


def test_a_stream_can_be_read_again(shards: list[str]) -> None:
    stream = open_stream(shards, epochs=1, shuffle_window=3)
    assert_same_batches(stream, stream)


def test_shuffling_changes_the_order_and_the_seed_changes_it_again(shards: list[str]) -> None:
    def order(settings: PackerConfig | None = None, **options: Any) -> list[str]:
        return keys(load(open_stream(shards, settings, epochs=1, **options)))

    next_fit = Placement("next_fit")
    plain = order(config(placement=next_fit), shuffle_shards=False)
    assert plain == ALL
    by_shard = order(config(placement=next_fit))
    assert by_shard != plain
    assert [by_shard.index(key) for key in ("000", "001", "002")] == list(
        range(by_shard.index("000"), by_shard.index("000") + 3)
    )
    by_window = order(config(placement=next_fit), shuffle_shards=False, shuffle_window=8)
    assert by_window != plain
    # A sample comes out at most window - 1 places early.
    assert all(int(key) - place < 8 for place, key in enumerate(by_window))
    assert order(config(placement=next_fit, seed=1)) != by_shard


def test_what_it_does_to_an_image_is_what_a_collator_does(shards: list[str]) -> None:
    settings = config(token_drop=BetaDrop(0.3, 0.6))
    streamed = {
        key: image
        for batch in load(open_stream(shards, settings, epochs=1))
        for key, image in unpack(batch).items()
    }
    for i, sample in enumerate(image_samples(COUNT, unit=P)):
        sample["key"] = f"s-{i // 10:05d}.tar/{i:03d}"
        [(key, image)] = unpack(PackingCollator(settings)([sample])).items()
        assert image.grid == streamed[key].grid
        assert torch.equal(image.positions, streamed[key].positions)
        assert torch.equal(image.patches, streamed[key].patches)


# Bad input


def damaged(folder: Path, **changes: Any) -> list[str]:
    """Two shards of 10 samples; change i replaces fields of sample i."""
    samples = image_samples(20, unit=P)
    for name, change in changes.items():
        samples[int(name[1:])] |= change
    return make_shards(folder, samples, 10)


def test_broken_images_go_with_their_captions_and_are_counted(tmp_path: Path) -> None:
    broken = {"image": cut_png(P, P)}
    shards = damaged(tmp_path, _3=broken, _15=broken, _16={"image": b"BM no bitmap"})
    batches = load(open_stream(shards, epochs=1))
    assert sorted(keys(batches)) == [f"{i:03d}" for i in range(20) if i not in (3, 15, 16)]
    assert [text for b in batches for text in b.texts or ()] == [
        f"picture number {int(key)}" for key in keys(batches)
    ]
    assert total(batches).skipped == {"decode_error": 3}
    assert total(batches).samples_read == 20


def test_missing_captions_are_skipped_or_kept(tmp_path: Path) -> None:
    shards = damaged(tmp_path, _3={"caption": None}, _4={"caption": " "})
    batches = load(open_stream(shards, epochs=1))
    assert total(batches).skipped == {"missing_caption": 2}
    assert len(keys(batches)) == 18
    kept = load(open_stream(shards, config(missing_caption="keep"), epochs=1))
    assert total(kept).skipped == {}
    texts = dict(zip(keys(kept), [text for b in kept for text in b.texts or ()], strict=True))
    assert (texts["003"], texts["004"], texts["005"]) == ("", "", "picture number 5")


def test_labels_are_read_where_they_are_needed(tmp_path: Path) -> None:
    shards = damaged(tmp_path, _3={"label": None})
    batches = load(open_stream(shards, need="label", epochs=1))
    assert total(batches).skipped == {"missing_label": 1}
    for batch in batches:
        if batch.num_images:
            assert batch.labels is not None
            assert batch.labels.tolist() == [int(key) for key in keys([batch])]


def test_a_caption_that_is_not_utf8_is_noted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("a.png", png(P, P)), ("a.txt", b"caf\xe9")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    [batch] = load(open_stream(str(tmp_path / "a.tar"), epochs=1))
    assert batch.texts == ("caf\ufffd",)
    assert (batch.stats.noted, batch.stats.skipped) == ({"caption_replaced": 1}, {})


@pytest.mark.parametrize("num_streams", [1, 2, 5])
def test_a_cut_shard_gives_what_lies_before_the_cut_and_counts_once(
    tmp_path: Path, num_streams: int
) -> None:
    shards = damaged(tmp_path)
    whole = Path(shards[0]).read_bytes()
    with tarfile.open(shards[0]) as tar:
        cut = tar.getmember("006.png")
    Path(shards[0]).write_bytes(whole[: cut.offset_data + 10])
    batches = load(open_stream(shards, epochs=1, num_streams=num_streams))
    assert sorted(keys(batches)) == [f"{i:03d}" for i in range(20) if not 6 <= i < 10]
    assert total(batches).skipped == {"truncated_shard": 1}


def test_a_shard_that_vanishes_is_counted(shards: list[str], tmp_path: Path) -> None:
    mine = damaged(tmp_path)
    stream = open_stream(mine, epochs=1)
    Path(mine[0]).unlink()
    batches = load(stream)
    assert sorted(keys(batches)) == [f"{i:03d}" for i in range(10, 20)]
    assert total(batches).skipped == {"missing_shard": 1}


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_missing_shards_in_a_row_are_fatal(tmp_path: Path, workers: int) -> None:
    shards = make_shards(tmp_path, image_samples(8, unit=P), 1)
    stream = open_stream(shards, config(max_failures_in_row=4))
    for path in shards:
        Path(path).unlink()
    with pytest.raises(TooManyFailures, match=r"fewer than 4 samples.*missing_shard: .*s-0000"):
        load(stream, workers)


def test_a_stream_without_a_sample_says_so(tmp_path: Path) -> None:
    samples = [{"image": png(8 * P, 8 * P), "caption": "a"}]
    stream = open_stream(make_shards(tmp_path, samples, 1), num_streams=2)
    with pytest.raises(RuntimeError, match="stream 1 of 2 found no sample in a whole epoch"):
        load(stream)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequences_per_batch": 0}, "sequences_per_batch must be at least 1"),
        ({"shuffle_window": 0}, "shuffle_window must be at least 1"),
        ({"epochs": 0}, "epochs must be at least 1, or None"),
        ({"num_streams": 0}, "num_streams must be at least 1, or None"),
        ({"rank": 2, "world_size": 2}, "0 <= rank < world_size"),
        ({"rank": 0, "world_size": 2, "num_streams": 1}, "at least the number of ranks"),
    ],
)
def test_wrong_settings_are_refused_at_construction(
    shards: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_stream(shards, **options)


def test_shards_that_do_not_exist_are_refused_at_construction(tmp_path: Path) -> None:
    for spec in (str(tmp_path / "no.tar"), str(tmp_path / "s-{00000..00002}.tar"), []):
        with pytest.raises(ValueError, match="shard"):
            open_stream(spec)
