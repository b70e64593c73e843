import io
import logging
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from packer.batch import BatchStats, PackedBatch
from packer.captions import CaptionTokenizer
from packer.collate import PackingCollator
from packer.config import PackerConfig
from packer.dataset import PackedDataset
from packer.errors import SkipSample, TooManyFailures
from packer.plan.balance import attention_cost, imbalance
from packer.plan.drop import BetaDrop, ConstantDrop, NoDrop, ScheduledDrop
from packer.plan.resize import RandomCrop, UniformSide
from packer.transforms import RandomFlip
from tests.helpers.samples import (
    BROKEN,
    assert_same,
    assert_same_batches,
    cut_png,
    image_samples,
    noise,
    png,
    sizes_of,
    unpack,
)

P = 8
TOKENIZER = CaptionTokenizer.train(["picture number 1"] * 3, vocab_size=300)


SAMPLES = image_samples(60, unit=P)
SIZES = sizes_of(SAMPLES)
KEYS = [sample["key"] for sample in SAMPLES]


def config(**options: Any) -> PackerConfig:
    return PackerConfig(**{"patch_size": P, "seq_len": 40, "token_drop": BetaDrop()} | options)


def packed(
    samples: Any = None, sizes: Any = None, options: dict[str, Any] | None = None, **others: Any
) -> PackedDataset:
    return PackedDataset(
        SAMPLES if samples is None else samples,
        SIZES if sizes is None else sizes,
        config(**options or {}),
        **{"sequences_per_batch": 3} | others,
    )


def every(dataset: PackedDataset) -> list[PackedBatch]:
    batches = [dataset[i] for i in range(len(dataset))]
    for batch in batches:
        batch.check()
    return batches


def total(batches: Sequence[PackedBatch]) -> BatchStats:
    return sum((batch.stats for batch in batches), BatchStats())


def keys_in(batches: Sequence[PackedBatch]) -> list[str]:
    return sorted(key for batch in batches for key in batch.keys)


def test_batches_of_a_step_lie_side_by_side_and_the_unused_steps_are_the_last() -> None:
    dataset = packed(world_size=2)
    assert len(dataset) % 2 == 0
    for epoch in range(4):
        dataset.set_epoch(epoch)
        images = [batch.num_images for batch in every(dataset)]
        assert all(images[: dataset.used_batches])
        assert not any(images[dataset.used_batches :])
        assert dataset.used_batches % 2 == 0


def test_the_length_never_changes_and_little_of_it_is_spare() -> None:
    dataset = packed()
    lengths, used = [], []
    for epoch in range(12):
        dataset.set_epoch(epoch)
        lengths.append(len(dataset))
        used.append(dataset.used_batches)
    assert len(set(lengths)) == 1
    assert max(used) <= lengths[0] <= max(used) + 2


def test_a_batch_waits_for_a_plan_that_is_being_written() -> None:
    dataset = packed()
    expected = dataset.plan_of(0)
    dataset._header[0] += 1  # as at the start of a write
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(dataset.plan_of, 0)
        with pytest.raises(TimeoutError):
            waiting.result(0.05)
        dataset._header[0] += 1
        assert waiting.result(10) == expected


def test_a_plan_that_is_never_finished_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packer.dataset._PATIENCE", 3)
    dataset = packed()
    dataset._header[0] += 1
    with pytest.raises(RuntimeError, match="set_epoch must finish"):
        dataset[0]


def test_the_number_of_ranks_is_that_of_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packed().world_size == 1
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    assert packed().world_size == 3
    assert packed(world_size=2).world_size == 2


def test_a_copy_is_as_good_as_the_original() -> None:
    dataset = packed(tokenizer=TOKENIZER, transform=RandomFlip())
    dataset.set_epoch(2)
    assert_same_batches(every(pickle.loads(pickle.dumps(dataset))), every(dataset))


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"token_drop": NoDrop()},
        {"crop": RandomCrop(), "resolution": UniformSide(16, 48), "max_images_per_seq": 4},
    ],
    ids=str,
)
def test_every_image_is_as_the_collator_gives_it_for_the_same_key(
    options: dict[str, Any], epoch: int
) -> None:
    dataset = packed(options=options, keys=KEYS, transform=RandomFlip())
    dataset.set_epoch(epoch)
    collator = PackingCollator(config(**options), transform=RandomFlip())
    collator.set_epoch(epoch)
    alone = unpack(collator(SAMPLES))
    found = {key: image for batch in every(dataset) for key, image in unpack(batch).items()}
    assert sorted(found) == sorted(alone)
    for key, image in found.items():
        assert image.grid == alone[key].grid
        assert torch.equal(image.positions, alone[key].positions)
        assert torch.equal(image.patches, alone[key].patches)


def test_captions_and_labels_stay_with_their_image() -> None:
    for batch in every(packed(keys=KEYS, tokenizer=TOKENIZER)):
        assert batch.texts is None or batch.labels is not None
        if batch.num_images:
            assert batch.texts == tuple(f"picture number {int(key)}" for key in batch.keys)
            assert batch.labels is not None
            assert batch.labels.tolist() == [int(key) for key in batch.keys]
            assert batch.captions is not None
            assert batch.captions.image_index.tolist() == list(range(batch.num_images))


def test_the_plan_of_a_batch_is_what_the_batch_holds() -> None:
    dataset = packed(world_size=2)
    dataset.set_epoch(1)
    for index, batch in enumerate(every(dataset)):
        plan = dataset.plan_of(index)
        assert len(plan) == 3
        images = [image for sequence in plan for image in sequence]
        assert batch.keys == tuple(image.key for image in images)
        assert batch.stats.tokens == sum(image.num_kept for image in images)
        assert [len(sequence) for sequence in plan] == (batch.image_index >= 0).sum(1).tolist()
        found = unpack(batch)
        for image in images:
            assert found[image.key].grid == image.grid


def test_planning_reads_no_image() -> None:
    class Unread(Dataset[Any]):
        def __len__(self) -> int:
            return 60

        def __getitem__(self, index: int) -> Any:
            raise AssertionError("read")

    dataset = packed(Unread())
    dataset.set_epoch(1)
    assert len(dataset.plan_of(0)) == 3
    with pytest.raises(AssertionError, match="read"):
        dataset[0]


def test_attention_cost_is_even_over_ranks() -> None:
    sizes = np.random.default_rng(0).integers(16, 300, (1200, 2))
    options = {"seq_len": 512, "max_tokens": 400}
    costs = {}
    for world_size in (1, 4):
        dataset = packed(sizes, sizes, options, world_size=world_size, sequences_per_batch=4)
        per_batch = [
            sum(attention_cost([image.num_kept for image in s]) for s in dataset.plan_of(i))
            for i in range(dataset.used_batches - 2 * world_size)
        ]
        costs[world_size] = np.array(per_batch[: len(per_batch) // 4 * 4]).reshape(-1, 4)
    assert imbalance(costs[1]) > 0.005
    assert imbalance(costs[4]) < 0.25 * imbalance(costs[1])


# Bad data


def test_broken_images_are_skipped_with_their_captions_and_counted() -> None:
    samples: list[Any] = [dict(sample) for sample in SAMPLES]
    samples[3]["image"], samples[10]["image"], samples[17] = BROKEN, cut_png(), None
    sizes = SIZES.copy()
    sizes[10] = 32, 32
    batches = every(packed(samples, sizes, keys=KEYS, tokenizer=TOKENIZER))
    good = [key for i, key in enumerate(KEYS) if i not in (3, 10, 17)]
    assert keys_in(batches) == good
    assert sorted(text for batch in batches for text in batch.texts or ()) == sorted(
        f"picture number {int(key)}" for key in good
    )
    stats = total(batches)
    assert stats.skipped == {"decode_error": 2, "missing_image": 1}
    assert (stats.samples_read, stats.images) == (60, 57)


def test_files_are_read_when_their_batch_is_due_and_may_be_missing(tmp_path: Path) -> None:
    paths = [tmp_path / f"{sample['key']}.png" for sample in SAMPLES]
    dataset = packed([(path, int(path.stem)) for path in paths])
    for path, sample in zip(paths, SAMPLES, strict=True):
        if path.stem != "020":
            path.write_bytes(sample["image"])
    batches = every(dataset)
    assert total(batches).skipped == {"missing_image": 1}
    labels = [label for batch in batches if batch.labels is not None for label in batch.labels]
    assert sorted(int(label) for label in labels) == [i for i in range(60) if i != 20]


def test_a_dataset_may_skip_an_item_itself() -> None:
    class Picky(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            if index == 5:
                raise SkipSample("not_wanted", "by the data set")
            return super().__getitem__(index)

    batches = every(packed(Picky(SAMPLES)))
    assert total(batches).skipped == {"not_wanted": 1}
    assert len(keys_in(batches)) == 59


def test_an_image_of_another_size_than_planned_is_skipped_and_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sizes = SIZES.copy()
    sizes[7] = 8, 400
    with caplog.at_level(logging.WARNING, "packer"):
        batches = every(packed(sizes=sizes))
    assert total(batches).skipped == {"size_mismatch": 1}
    assert total(batches).samples_read == 60
    assert "7" not in keys_in(batches)
    height, width = SIZES[7].tolist()
    assert f"image 7 is {height} x {width}; sizes[7] says 8 x 400" in caplog.text


def test_sizes_in_the_wrong_order_stop_the_run() -> None:
    landscape = [(png(P, 3 * P, i), i) for i in range(20)]
    with pytest.raises(TooManyFailures, match=r"size_mismatch: image \d+ is 8 x 24; .* 24 x 8"):
        every(packed(landscape, [(24, 8)] * 20, {"max_failures_in_row": 5}))


def test_sizes_are_those_after_exif_orientation() -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(2 * P, 3 * P)).save(buffer, "PNG", exif=exif)
    rotated = [{"image": buffer.getvalue()}]
    assert total(every(packed(rotated, [(3 * P, 2 * P)]))).images == 1
    assert total(every(packed(rotated, [(2 * P, 3 * P)]))).skipped == {"size_mismatch": 1}


def test_images_refused_by_their_size_take_no_place_and_are_counted_once_an_epoch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sizes = SIZES.copy()
    sizes[4], sizes[9], sizes[11] = (2000, 2000), (8, 800), (8, 900)
    with caplog.at_level(logging.WARNING, "packer"):
        dataset = packed(sizes=sizes, options={"max_pixels": 10**6, "max_aspect_ratio": 50})
    assert "skipped 2 of 60 images in every epoch: aspect_ratio" in caplog.text
    for epoch in range(2):
        dataset.set_epoch(epoch)
        batches = every(dataset)
        stats = total(batches)
        assert stats.skipped == {"too_many_pixels": 1, "aspect_ratio": 2}
        assert (stats.samples_read, stats.images) == (60, 57)
        assert keys_in(batches) == sorted(str(i) for i in range(60) if i not in (4, 9, 11))
    limits = config(max_pixels=10**6, max_aspect_ratio=50)
    reread = PackingCollator(limits)([{"image": png(8, 800)}])
    assert reread.stats.skipped == {"aspect_ratio": 1}


def test_images_without_room_are_counted_in_the_last_batch_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("packer.plan.epoch.EpochPlanner.num_steps", lambda *_: 2)
    with caplog.at_level(logging.WARNING, "packer"):
        dataset = packed()
    batches = every(dataset)
    stats = total(batches)
    assert stats.skipped == {"no_room": 60 - stats.images}
    assert 0 < stats.images < 60
    assert stats.samples_read == 60
    assert batches[-1].stats.skipped == stats.skipped
    assert f"skipped {60 - stats.images} of 60 images in epoch 0: no_room" in caplog.text
    dataset.set_epoch(1)
    assert keys_in(every(dataset)) != keys_in(batches)


def test_leftovers_are_filled_where_the_configuration_asks_for_it() -> None:
    options = {"token_drop": ConstantDrop(0.5)}
    plain, filled = (
        total(every(packed(options=options | {"fill_leftover": fill}))) for fill in (False, True)
    )
    assert plain.tokens_filled == 0
    assert filled.tokens == plain.tokens + filled.tokens_filled > plain.tokens
    assert filled.images == plain.images == 60


def test_a_schedule_moves_the_rate_within_the_length_of_every_epoch() -> None:
    schedule = ScheduledDrop(midpoint=180, tau=-30)
    dataset = packed(options={"token_drop": schedule, "max_tokens": 25})
    kept = []
    for epoch in range(8):
        dataset.set_epoch(epoch)
        stats = total(every(dataset))
        assert stats.images == 60
        kept.append(stats.tokens / stats.tokens_before_drop)
    assert kept == sorted(kept)
    assert kept[0] < 0.35
    assert kept[-1] > 0.75


# Arguments


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"sizes": SIZES[:-1]}, "one row for each .* got 59 for 60"),
        ({"sizes": SIZES[:, 0]}, r"sizes must be integers \(n, 2\).*\(60,\)"),
        ({"sizes": SIZES.astype(float)}, r"sizes must be integers .* float64"),
        ({"sizes": [(8, 8)] * 59 + [(8, 0)]}, r"sizes must be positive; got \(8, 0\) for image 59"),
        ({"samples": [], "sizes": np.zeros((0, 2), int)}, "got 0 for 0 images"),
        ({"samples": Endless()}, "must be map-style"),
        ({"keys": KEYS[:-1]}, "keys must have one entry for each of the 60 images; got 59"),
        ({"sequences_per_batch": 0}, "sequences_per_batch must be at least 1"),
        ({"world_size": 0}, "world_size must be at least 1"),
        ({"width": 0}, "width must be at least 1"),
        ({"options": {"max_pixels": 63}}, "all 60 are refused: {'too_many_pixels': 60}"),
    ],
)
def test_wrong_arguments_are_named_at_construction(arguments: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        packed(**arguments)


def test_keys_given_must_be_those_of_the_samples() -> None:
    assert keys_in(every(packed(keys=KEYS))) == KEYS
    assert keys_in(every(packed([(s["image"], 1) for s in SAMPLES], keys=KEYS))) == KEYS
    with pytest.raises(ValueError, match=r"keys\[\d+\] must be the key of dataset\[\d+\]"):
        every(packed(keys=KEYS[::-1]))


def test_an_index_or_epoch_out_of_range_is_an_error() -> None:
    dataset = packed()
    for index in (-1, len(dataset)):
        with pytest.raises(IndexError, match="must be in"):
            dataset[index]
        with pytest.raises(IndexError, match="must be in"):
            dataset.plan_of(index)
    assert_same(list(dataset)[-1], dataset[len(dataset) - 1])
    with pytest.raises(ValueError, match="epoch must be at least 0"):
        dataset.set_epoch(-1)


def test_ranks_batches_and_order_decide_where_an_image_lies_never_what_is_in_it() -> None:
    sizes = [tuple(size) for size in SIZES.tolist()]
    first, *others = [
        {key: image for batch in every(dataset) for key, image in unpack(batch).items()}
        for dataset in (
            packed(sizes=sizes, options={"max_tokens": 25}),
            packed(options={"max_tokens": 25}, world_size=4, sequences_per_batch=1),
            packed(options={"max_tokens": 25, "seq_len": 100}, shuffle=False),
        )
    ]
    assert len(first) == 60
    for other in others:
        assert other.keys() == first.keys()
        for key, image in first.items():
            assert torch.equal(image.patches, other[key].patches)
            assert torch.equal(image.positions, other[key].positions)
