import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from packer.batch import PackedBatch
from packer.captions import CaptionTokenizer
from packer.collate import PackingCollator
from packer.config import PackerConfig
from packer.errors import TooManyFailures
from packer.plan.drop import BetaDrop, ConstantDrop, ScheduledDrop
from packer.plan.place import Placement
from tests.helpers.samples import (
    BROKEN,
    assert_same,
    assert_same_batches,
    cut_png,
    drain,
    image_samples,
    naive_patches,
    noise,
    png,
    unpack,
)

P = 8
TOKENIZER = CaptionTokenizer.train(["picture number 1"] * 3, vocab_size=300)


class Items(Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


def config(**options: Any) -> PackerConfig:
    return PackerConfig(**{"patch_size": P, "seq_len": 64} | options)


def load(
    items: list[Any], workers: int = 0, batch_size: int = 8, **options: Any
) -> list[PackedBatch]:
    collator = PackingCollator(config(**options), tokenizer=TOKENIZER)
    loader = DataLoader(
        Items(items), batch_size=batch_size, num_workers=workers, collate_fn=collator
    )
    batches = drain(loader)
    for batch in batches:
        batch.check()
        assert batch.state is None
    return batches


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataloader_keeps_the_order_and_leaves_broken_samples_out(workers: int) -> None:
    items: list[Any] = image_samples(20, unit=P)
    items[3]["image"], items[10]["image"], items[17] = BROKEN, cut_png(), None
    batches = load(items, workers)
    good = [i for i in range(20) if i not in (3, 10, 17)]
    assert [key for batch in batches for key in batch.keys] == [f"{i:03d}" for i in good]
    assert [text for batch in batches for text in batch.texts or ()] == [
        f"picture number {i}" for i in good
    ]
    assert torch.cat([b.labels for b in batches if b.labels is not None]).tolist() == good
    assert [batch.stats.skipped for batch in batches] == [
        {"decode_error": 1},
        {"decode_error": 1},
        {"missing_image": 1},
    ]
    assert [batch.stats.samples_read for batch in batches] == [8, 8, 4]
    for batch in batches:
        assert batch.captions is not None
        assert batch.captions.image_index.tolist() == list(range(batch.num_images))
        for key, image in unpack(batch).items():
            pixels = noise(image.grid[0] * P, image.grid[1] * P, int(key))
            assert torch.equal(image.patches, naive_patches(pixels, image.positions, P))
    assert_same_batches(batches, load(items, 0))


def test_every_form_of_image_gives_the_same_batch() -> None:
    pixels = noise(2 * P, 3 * P)
    forms = [png(2 * P, 3 * P), pixels, torch.from_numpy(pixels), Image.fromarray(pixels)]
    samples = [{"key": "k", "image": form, "caption": "a"} for form in forms]
    first, *others = [PackingCollator(config())([sample]) for sample in samples]
    for other in others:
        assert_same(first, other)


def test_pairs_are_image_and_caption_or_label() -> None:
    images = [png(P, P, i) for i in range(3)]
    captioned = PackingCollator(config())([(image, "text") for image in images])
    labelled = PackingCollator(config())([(image, i) for i, image in enumerate(images)])
    multi = PackingCollator(config())([(image, np.eye(3)[i]) for i, image in enumerate(images)])
    assert (captioned.texts, captioned.labels) == (("text",) * 3, None)
    assert labelled.texts is None
    assert labelled.labels is not None
    assert labelled.labels.tolist() == [0, 1, 2]
    assert multi.labels is not None
    assert torch.equal(multi.labels, torch.eye(3))
    with pytest.raises(ValueError, match="either every image of a batch has a label or none"):
        PackingCollator(config())([(images[0], "text"), (images[1], 3)])


@pytest.mark.parametrize("samples", [[], [None, None], [(BROKEN, 1)], [(cut_png(), 1)] * 3])
def test_a_batch_without_a_usable_sample_is_empty_and_counted(samples: list[Any]) -> None:
    batch = PackingCollator(config(), tokenizer=TOKENIZER)(samples)
    batch.check()
    assert (batch.num_images, batch.keys, len(batch.patches)) == (0, (), 1)
    assert sum(batch.stats.skipped.values()) == len(samples)


@settings(max_examples=20)
@given(
    count=st.integers(0, 20),
    strategy=st.sampled_from(["exact", "best_fit", "first_fit", "next_fit"]),
    limit=st.sampled_from([None, 1, 3]),
    broken=st.sets(st.integers(0, 19)),
)
def test_order_never_depends_on_placement(
    count: int, strategy: Any, limit: int | None, broken: set[int]
) -> None:
    samples = image_samples(count, unit=P)
    for i in broken & set(range(count)):
        samples[i]["image"] = cut_png()
    batch = PackingCollator(
        config(placement=Placement(strategy, window=4), max_images_per_seq=limit)
    )(samples)
    batch.check()
    assert list(batch.keys) == [f"{i:03d}" for i in range(count) if i not in broken]
    assert batch.stats.padding == 1 - batch.stats.tokens / (64 * len(batch.patches))
    if limit is not None:
        assert batch.image_index.shape[1] == limit


def test_as_few_sequences_are_used_as_the_tokens_need() -> None:
    samples = [(png(4 * P, 4 * P, i), i) for i in range(9)]
    assert len(PackingCollator(config())(samples).patches) == 3


def test_a_call_leaves_nothing_behind() -> None:
    collator = PackingCollator(config(token_drop=ConstantDrop(0.5)))
    samples = image_samples(6, unit=P)
    first = collator(samples)
    collator([None, *image_samples(4, seed=3)])
    assert_same(first, collator(samples))


def test_epochs_draw_other_tokens() -> None:
    collator = PackingCollator(config(token_drop=ConstantDrop(0.5)))
    samples = image_samples(6, unit=P)
    first = collator(samples)
    collator.set_epoch(1)
    assert not torch.equal(first.position_ids, collator(samples).position_ids)
    collator.set_epoch(0)
    assert_same(first, collator(samples))


def test_set_epoch_reaches_workers_that_are_running() -> None:
    samples = image_samples(8, unit=P)
    settings = config(token_drop=BetaDrop(0.4, 0.7))
    collator = PackingCollator(settings)
    loader = DataLoader(
        Items(samples), batch_size=4, num_workers=2, collate_fn=collator, persistent_workers=True
    )
    expected = PackingCollator(settings)
    for epoch in (0, 1, 5):
        collator.set_epoch(epoch)
        expected.set_epoch(epoch)
        assert_same_batches(loader, [expected(samples[:4]), expected(samples[4:])])


def test_set_progress_moves_a_schedule_in_workers_that_are_running() -> None:
    samples = image_samples(8, unit=P)
    settings = config(token_drop=ScheduledDrop(1000, -100, 0.2, 0.8))
    collator, expected = PackingCollator(settings), PackingCollator(settings)
    loader = DataLoader(
        Items(samples), batch_size=4, num_workers=2, collate_fn=collator, persistent_workers=True
    )
    tokens = []
    for images_seen in (0, 1000, 10_000):
        collator.set_progress(images_seen)
        expected.set_progress(images_seen)
        batches = drain(loader)
        assert_same_batches(batches, [expected(samples[:4]), expected(samples[4:])])
        tokens.append(sum(batch.stats.tokens for batch in batches))
    assert tokens[0] < tokens[1] < tokens[2]


def test_a_collator_travels_to_spawned_workers() -> None:
    collator = PackingCollator(config(token_drop=BetaDrop()), tokenizer=TOKENIZER)
    collator.set_epoch(3)
    samples = image_samples(4, unit=P)
    assert_same(pickle.loads(pickle.dumps(collator))(samples), collator(samples))


def test_too_many_failures_in_a_row_are_fatal_across_batches() -> None:
    items: list[Any] = [*image_samples(4, unit=P), *[None] * 5]
    with pytest.raises(TooManyFailures, match="missing_image"):
        load(items, batch_size=3, max_failures_in_row=5)
    assert len(load(items, batch_size=3, max_failures_in_row=6)) == 3


def test_the_exception_of_a_worker_surfaces_with_its_message() -> None:
    items: list[Any] = [*image_samples(3), {"picture": 1}]
    with pytest.raises(ValueError, match="Rename the image column to 'image'"):
        load(items, workers=1)
    with pytest.raises(TooManyFailures, match="fewer than 2 samples in a row"):
        load([None] * 4, workers=1, max_failures_in_row=2)


@pytest.mark.parametrize("empty", [None, "", "  "])
def test_a_sample_without_caption_beside_captioned_ones_is_skipped_or_kept_as_set(
    empty: str | None,
) -> None:
    image = torch.zeros(16, 16, 3, dtype=torch.uint8)
    samples = [{"key": key, "image": image, "caption": key} for key in "abc"]
    samples[1]["caption"] = empty

    skipped = PackingCollator(PackerConfig(seq_len=8))(samples)
    kept = PackingCollator(PackerConfig(seq_len=8, missing_caption="keep"))(samples)

    assert skipped.keys == skipped.texts == ("a", "c")
    assert skipped.stats.skipped == {"missing_caption": 1}
    assert kept.keys == ("a", "b", "c")
    assert kept.texts is not None
    assert kept.texts[1].strip() == ""
