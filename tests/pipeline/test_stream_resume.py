"""A run that stops after any batch and resumes gives the batches of one that never stopped."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from packer.batch import PackedBatch
from packer.captions import CaptionTokenizer
from packer.config import PackerConfig
from packer.plan.drop import BetaDrop
from packer.plan.place import Placement
from packer.plan.resize import RandomCrop
from packer.shards import write_shards
from packer.stream import LoaderState, PackedStream
from packer.transforms import Compose, RandomFlip
from tests.helpers.samples import (
    assert_same_batches,
    cut_png,
    drain,
    image_samples,
    make_shards,
    png,
)

P = 8
TOKENIZER = CaptionTokenizer.train(["picture number 1"] * 3, vocab_size=300)
PLACEMENTS = {
    "exact": Placement("exact", window=12, max_age=60),
    "first_fit": Placement("first_fit", open_sequences=4),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """37 samples in 4 shards, some of them broken in every way."""
    samples: list[dict[str, Any]] = image_samples(37, unit=P)
    for i in (4, 12, 30):
        samples[i]["image"] = cut_png(2 * P, P)
    samples[7]["image"] = b"BM no bitmap"
    samples[20]["caption"] = None
    return make_shards(tmp_path_factory.mktemp("shards"), samples, 10)


def config(placement: str = "exact", **options: Any) -> PackerConfig:
    return PackerConfig(
        **{
            "patch_size": P,
            "seq_len": 32,
            "placement": PLACEMENTS[placement],
            "token_drop": BetaDrop(0.3, 0.6),
            "crop": RandomCrop(0.6),
        }
        | options
    )


def open_stream(shards: Sequence[str], settings: PackerConfig, **options: Any) -> PackedStream:
    return PackedStream(
        shards,
        settings,
        **{
            "sequences_per_batch": 2,
            "tokenizer": TOKENIZER,
            "transform": Compose([RandomFlip()]),
        }
        | options,
    )


def load(stream: PackedStream, workers: int, limit: int | None = None) -> list[PackedBatch]:
    return drain(DataLoader(stream, batch_size=None, num_workers=workers), limit)


def state_after(batches: Sequence[PackedBatch]) -> LoaderState:
    """Consume batches, and store and load the state as a checkpoint does."""
    state = LoaderState()
    for batch in batches:
        state.update(batch)
    return LoaderState.from_dict(json.loads(json.dumps(state.to_dict())))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("num_streams", [1, 3, 6])
@pytest.mark.parametrize("epochs", [1, None])
def test_resuming_after_any_batch_is_bit_identical(
    shards: list[str], placement: str, num_streams: int, epochs: int | None
) -> None:
    settings = config(placement)
    options = {"num_streams": num_streams, "shuffle_window": 5, "epochs": epochs}
    whole = load(open_stream(shards, settings, **options), 0, 9)
    if epochs is None:
        waiting = [batch.state["placer"] for batch in whole if batch.state]
        assert max(map(len, waiting)) > 4, "images must wait, or this shows nothing"
    for stop in range(len(whole) + 1):
        stream = open_stream(shards, settings, **options, state=state_after(whole[:stop]))
        assert_same_batches(load(stream, 0, 9 - stop), whole[stop:])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("workers", "num_streams"), [(1, 1), (1, 3), (2, 2), (2, 3), (2, 4), (4, 4)]
)
@pytest.mark.parametrize("epochs", [1, None])
def test_resuming_with_workers_is_bit_identical_whatever_was_prefetched(
    shards: list[str], workers: int, num_streams: int, epochs: int | None
) -> None:
    options = {"num_streams": num_streams, "shuffle_window": 5, "epochs": epochs}
    whole = load(open_stream(shards, config(), **options), workers, 12)
    for stop in (1, 6, 9):
        stream = open_stream(shards, config(), **options, state=state_after(whole[:stop]))
        assert_same_batches(load(stream, workers, 12 - stop), whole[stop:])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_run_may_resume_with_another_number_of_workers(shards: list[str]) -> None:
    whole = load(open_stream(shards, config(), num_streams=2), 2, 12)
    for workers in (0, 1, 2, 3):
        stream = open_stream(shards, config(), state=state_after(whole[:5]))
        assert_same_batches(load(stream, workers, 7), whole[5:])


def test_every_rank_resumes_its_own_batches(shards: list[str]) -> None:
    for rank in range(2):
        options = {"num_streams": 4, "rank": rank, "world_size": 2}
        whole = load(open_stream(shards, config(), **options), 0, 10)
        stream = open_stream(shards, config(), **options, state=state_after(whole[:3]))
        assert_same_batches(load(stream, 0, 7), whole[3:])


def test_a_run_may_stop_and_resume_again_and_again(shards: list[str]) -> None:
    whole = load(open_stream(shards, config(), num_streams=2, shuffle_window=5), 0, 12)
    state = LoaderState()
    batches: list[PackedBatch] = []
    while len(batches) < 12:
        stream = open_stream(shards, config(), num_streams=2, shuffle_window=5, state=state)
        for batch in load(stream, 0, 3):
            state.update(batch)
            batches.append(batch)
        state = LoaderState.from_dict(json.loads(json.dumps(state.to_dict())))
    assert_same_batches(batches, whole)


def test_updating_the_given_state_does_not_move_the_stream(shards: list[str]) -> None:
    state = state_after(load(open_stream(shards, config(), num_streams=2), 0, 2))
    stream = open_stream(shards, config(), state=state)
    first = []
    for batch in islice(stream, 6):
        state.update(batch)
        first.append(batch)
    assert_same_batches(islice(stream, 6), first)


def test_a_finished_pass_has_nothing_left(shards: list[str]) -> None:
    whole = load(open_stream(shards, config(), num_streams=3, epochs=1), 0)
    stream = open_stream(shards, config(), epochs=1, state=state_after(whole))
    assert load(stream, 0) == []


def test_sequences_completed_by_one_image_are_separate_steps(tmp_path: Path) -> None:
    # A full image closes the open sequence and its own: two batches after one sample.
    sizes = [(P, P), (6 * P, 8 * P)] * 4
    samples = [{"image": png(*size, i), "caption": "a"} for i, size in enumerate(sizes)]
    shards = make_shards(tmp_path, samples, 40)
    settings = PackerConfig(patch_size=P, seq_len=48, placement=Placement("next_fit"))
    options = {"sequences_per_batch": 1, "epochs": 1}
    whole = load(open_stream(shards, settings, **options), 0)
    assert [batch.stats.samples_read for batch in whole] == [2, 0] * 4
    for stop in range(len(whole)):
        stream = open_stream(shards, settings, **options, state=state_after(whole[:stop]))
        assert_same_batches(load(stream, 0), whole[stop:])


def test_the_state_stays_small_at_the_default_window(tmp_path: Path) -> None:
    tiny = [png(height, width) for height in (16, 32) for width in (16, 48, 64)]
    samples = ({"image": tiny[i % len(tiny)], "caption": "a"} for i in range(6000))
    shards = write_shards(samples, tmp_path, samples_per_shard=3000)
    stream = PackedStream(
        shards, PackerConfig(token_drop=BetaDrop()), sequences_per_batch=4, shuffle_window=1024
    )
    state = state_after(list(islice(stream, 2)))
    stored = state.to_dict()
    [mine] = stored["streams"]
    assert len(mine["window"]) == 1023
    assert len(mine["placer"]) > 200
    assert len(json.dumps(stored)) < 64 * 1024
    # Late in a long run over large shards the same rows have longer numbers.
    late = [99, 99_999, 9_999_999_999, 99_999_999_999]
    mine["window"] = [late[:3]] * len(mine["window"])
    mine["placer"] = [[*late, *row[4:]] for row in mine["placer"]]
    mine["ready"] = [[[*late, row[4]] for row in sequence] for sequence in mine["ready"]]
    assert len(json.dumps(stored)) < 64 * 1024


# States that do not fit


def test_a_state_of_other_shards_or_shuffling_is_refused(shards: list[str]) -> None:
    state = state_after(load(open_stream(shards, config()), 0, 2))
    for arguments, options in (
        ((shards[:3], config()), {}),
        ((shards[::-1], config()), {}),
        ((shards, config(seed=1)), {}),
        ((shards, config()), {"shuffle_window": 2}),
        ((shards, config()), {"shuffle_shards": False}),
    ):
        with pytest.raises(ValueError, match="was taken on other shards, or with another seed"):
            open_stream(*arguments, **options, state=state)


def test_the_number_of_streams_is_fixed_for_a_run(shards: list[str]) -> None:
    state = state_after(load(open_stream(shards, config(), num_streams=2), 0, 2))
    assert open_stream(shards, config(), state=state).num_streams == 2
    assert open_stream(shards, config(), num_streams=2, state=state).num_streams == 2
    with pytest.raises(ValueError, match="the state has 2; got 3"):
        open_stream(shards, config(), num_streams=3, state=state)


def test_a_shard_that_changed_since_is_refused(tmp_path: Path) -> None:
    samples = image_samples(30, unit=P)
    shards = make_shards(tmp_path, samples, 30)
    stream = open_stream(shards, config(), shuffle_window=4)
    state = state_after(load(stream, 0, 2))
    original = Path(shards[0]).read_bytes()

    # Other bytes of another size: found at construction.
    make_shards(tmp_path, samples[5:], 30)
    with pytest.raises(ValueError, match="was taken on other shards"):
        open_stream(shards, config(), shuffle_window=4, state=state)

    # Of the same size, with the pending samples gone: found when they are read again.
    Path(shards[0]).write_bytes(b"\0" * len(original))
    resumed = open_stream(shards, config(), shuffle_window=4, state=state)
    with pytest.raises(ValueError, match=r"waited for its place .* must be as it was"):
        load(resumed, 0, 1)

    # Gone after construction, in a worker.
    Path(shards[0]).unlink()
    with pytest.raises(ValueError, match=r"waited for its place .* No such file"):
        load(resumed, 1, 1)


@pytest.mark.parametrize(
    "change",
    [{"token_drop": BetaDrop(0.5, 0.8)}, {"patch_size": 4}, {"max_aspect_ratio": 1.0}],
)
def test_settings_that_change_what_waits_are_refused(
    shards: list[str], change: dict[str, Any]
) -> None:
    state = state_after(load(open_stream(shards, config()), 0, 3))
    stream = open_stream(shards, replace(config(), **change), state=state)
    with pytest.raises(ValueError, match=r"waited for its place .* Restore shard and settings"):
        load(stream, 0, 1)


def test_another_placement_is_refused(shards: list[str]) -> None:
    state = state_after(load(open_stream(shards, config("exact")), 0, 2))
    stream = open_stream(shards, config("first_fit"), state=state)
    with pytest.raises(ValueError, match="Give the settings of the snapshot"):
        load(stream, 0, 1)
