import random
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from packer.batch import BatchStats, PackedBatch
from packer.captions import CaptionTokenizer
from packer.config import PackerConfig
from packer.errors import TooManyFailures
from packer.pack import pack
from packer.plan.drop import BetaDrop, ConstantDrop
from packer.plan.place import Placement
from packer.plan.resize import RandomCrop, UniformSide
from packer.transforms import ColorJitter, Compose, RandomFlip
from tests.helpers.samples import BROKEN, cut_png, image_samples, naive_patches, noise, png, unpack

P = 8
STRATEGIES = ("exact", "best_fit", "first_fit", "next_fit")
TOKENIZER = CaptionTokenizer.train(["picture number 1"] * 3, vocab_size=300)


def run(samples: Iterable[Any], **options: Any) -> list[PackedBatch]:
    settings = {"patch_size": P, "seq_len": 64}
    keywords: dict[str, Any] = {"sequences_per_batch": 2}
    for name, value in options.items():
        (
            keywords
            if name in ("transform", "tokenizer", "epoch", "sequences_per_batch")
            else settings
        )[name] = value
    batches = list(pack(samples, PackerConfig(**settings), **keywords))
    for batch in batches:
        batch.check()
        assert batch.patches.shape == (
            keywords["sequences_per_batch"],
            settings["seq_len"],
            3 * P * P,
        )
    return batches


def total(batches: Iterable[PackedBatch]) -> BatchStats:
    return sum((batch.stats for batch in batches), BatchStats())


@settings(max_examples=20)
@given(
    kinds=st.lists(st.sampled_from(["good", "good", "broken", "cut", "none"]), max_size=30),
    strategy=st.sampled_from(STRATEGIES),
    window=st.integers(1, 8),
    limit=st.sampled_from([None, 1, 3]),
    per_batch=st.integers(1, 3),
)
def test_every_sample_is_in_one_batch_or_counted(
    kinds: list[str], strategy: Any, window: int, limit: int | None, per_batch: int
) -> None:
    samples: list[Any] = image_samples(len(kinds), unit=P)
    for i, kind in enumerate(kinds):
        if kind == "none":
            samples[i] = None
        elif kind != "good":
            samples[i]["image"] = BROKEN if kind == "broken" else cut_png(P, 2 * P)
    batches = run(
        samples,
        placement=Placement(strategy, window=window, max_age=2 * window, open_sequences=window),
        max_images_per_seq=limit,
        sequences_per_batch=per_batch,
    )
    keys = [key for batch in batches for key in batch.keys]
    good = [i for i, kind in enumerate(kinds) if kind == "good"]
    assert sorted(keys) == [f"{i:03d}" for i in good]
    stats = total(batches)
    assert (stats.samples_read, stats.images) == (len(kinds), len(good))
    assert stats.skipped.get("missing_image", 0) == kinds.count("none")
    assert stats.skipped.get("decode_error", 0) == kinds.count("broken") + kinds.count("cut")
    assert stats.places == len(batches) * per_batch * 64
    assert stats.tokens == sum(int((batch.segment_ids > 0).sum()) for batch in batches)
    for batch in batches:
        # In placement order, and everything that belongs to an image went with it.
        index = batch.image_index[batch.image_index >= 0].tolist()
        assert index == list(range(batch.num_images))
        if batch.num_images:
            assert batch.labels is not None
            assert [f"{label:03d}" for label in batch.labels.tolist()] == list(batch.keys)
            assert batch.texts == tuple(f"picture number {int(key)}" for key in batch.keys)


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_patches_are_the_pixels_at_their_positions(drop: float) -> None:
    samples = image_samples(20, unit=P)
    batches = run(samples, token_drop=ConstantDrop(drop))
    found = {key: image for batch in batches for key, image in unpack(batch).items()}
    for i, sample in enumerate(samples):
        mine = found[sample["key"]]
        rows, cols = mine.grid
        pixels = noise(rows * P, cols * P, i)
        assert png(rows * P, cols * P, i) == sample["image"], "the grid is the image's own"
        assert len(mine.positions) == max(1, rows * cols - int(drop * rows * cols))
        assert len({tuple(position) for position in mine.positions.tolist()}) == len(mine.positions)
        assert torch.equal(mine.patches, naive_patches(pixels, mine.positions, P))


def test_resized_and_cropped_patches_are_those_of_pillow() -> None:
    rng = np.random.default_rng(0)
    smooth = {}
    for i in range(8):
        height, width = rng.integers(60, 200, 2).tolist()
        coarse = rng.integers(40, 216, (5, 5, 3), dtype=np.uint8)
        smooth[str(i)] = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    samples = [{"key": key, "image": image} for key, image in smooth.items()]
    config = {"crop": RandomCrop(0.4), "max_tokens": 30, "token_drop": BetaDrop(0.3, 0.6)}
    from packer.plan.image import plan_image
    from packer.plan.types import ImageSize

    for batch in run(samples, **config):
        for key, image in unpack(batch).items():
            size = ImageSize(smooth[key].height, smooth[key].width)
            box = plan_image(key, size, PackerConfig(patch_size=P, seq_len=64, **config)).box
            assert box is not None
            edges = (box.left, box.top, box.left + box.width, box.top + box.height)
            rows, cols = image.grid
            resized = smooth[key].crop(edges).resize((cols * P, rows * P), Image.Resampling.BICUBIC)
            expected = naive_patches(np.asarray(resized), image.positions, P)
            assert int((expected.int() - image.patches.int()).abs().max()) <= 1


def shuffled(samples: list[Any]) -> list[Any]:
    return random.Random(1).sample(samples, len(samples))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_image_is_treated_the_same_in_any_company(strategy: Any) -> None:
    samples = image_samples(24, unit=P)
    for sample in samples:
        sample["caption"] = [f"{sample['key']} a", f"{sample['key']} b", f"{sample['key']} c"]
    options = {
        "crop": RandomCrop(0.5),
        "resolution": UniformSide(16, 60),
        "token_drop": BetaDrop(0.3, 0.6),
        "transform": Compose([RandomFlip(), ColorJitter()]),
    }

    def everything(batches: Iterable[PackedBatch]) -> dict[str, Any]:
        result = {}
        for batch in batches:
            assert batch.texts is not None or not batch.num_images
            for key, text in zip(batch.keys, batch.texts or (), strict=True):
                grid, positions, patches = unpack(batch)[key]
                result[key] = (grid, positions.tolist(), patches.tolist(), text)
        return result

    alone: dict[str, Any] = {}
    for sample in samples:
        alone |= everything(run([sample], **options))
    together = run(shuffled(samples), placement=Placement(strategy, window=5), **options)
    assert everything(together) == alone
    assert len({text[-1] for *_, text in alone.values()}) == 3, "each caption is drawn by some key"
    next_epoch = everything(run(samples, epoch=1, **options))
    assert sum(next_epoch[key] == alone[key] for key in alone) == 0
    other_seed = everything(run(samples, seed=1, **options))
    assert sum(other_seed[key] == alone[key] for key in alone) == 0


def test_captions_are_tokens_of_their_images() -> None:
    for batch in run(image_samples(20, unit=P), tokenizer=TOKENIZER):
        assert batch.captions is not None
        assert batch.captions.image_index.tolist() == list(range(batch.num_images))
        for text, ids in zip(
            batch.texts or (), batch.captions.ids.split(batch.captions.segment_lengths), strict=True
        ):
            assert TOKENIZER.decode(ids.tolist()) == f" {text}"


def test_the_last_batch_is_filled_with_empty_sequences() -> None:
    [batch] = run([{"key": "a", "image": png(P, P)}], sequences_per_batch=3)
    assert batch.segment_lengths == (1, 63, 64, 64)
    assert batch.image_index.tolist() == [[0], [-1], [-1]]


def test_nothing_in_gives_nothing_out() -> None:
    assert run([]) == []


def test_samples_skipped_at_the_end_are_counted_in_an_empty_batch() -> None:
    samples = [{"image": png(8 * P, 8 * P)}] * 2 + [None, BROKEN_SAMPLE]
    [first, rest] = run(samples, placement=Placement("next_fit"))
    assert (first.num_images, rest.num_images) == (2, 0)
    assert rest.stats.skipped == {"missing_image": 1, "decode_error": 1}


BROKEN_SAMPLE = {"key": "broken", "image": BROKEN}


def test_a_batch_that_loses_all_its_images_keeps_their_kind() -> None:
    samples = [{"image": cut_png(), "caption": "a", "label": (0.5, 1.0)}] * 3
    [batch] = run(samples, tokenizer=TOKENIZER)
    assert (batch.num_images, batch.texts, batch.stats.skipped) == (0, (), {"decode_error": 3})
    assert batch.labels is not None
    assert batch.labels.shape == (0, 2)
    assert batch.captions is not None
    assert batch.captions.segment_lengths == ()


def test_limits_of_the_configuration_skip_and_count() -> None:
    samples = [(png(P, 4 * P), 0), (png(4 * P, 4 * P), 1), (png(P, P), 2)]
    batches = run(samples, max_aspect_ratio=2, max_pixels=900)
    assert total(batches).skipped == {"aspect_ratio": 1, "too_many_pixels": 1}
    assert [batch.labels.tolist() for batch in batches if batch.labels is not None] == [[2]]


def failing(pattern: str) -> Iterator[Any]:
    """One sample a letter: good, broken header, cut pixels."""
    for letter in pattern:
        image = {"g": png(2 * P, 2 * P), "b": BROKEN, "c": cut_png(2 * P, 2 * P)}[letter]
        yield {"image": image, "caption": "a"}


@pytest.mark.parametrize("pattern", ["gb" * 40, "gc" * 40, "bb" + "gbb" * 20, "ccg" * 20])
def test_scattered_failures_never_stop_a_run(pattern: str) -> None:
    # Images are decoded long after they were read: the good ones must count while they wait.
    stats = total(run(failing(pattern), max_failures_in_row=3))
    assert stats.images == pattern.count("g")
    assert sum(stats.skipped.values()) == len(pattern) - pattern.count("g")


@pytest.mark.parametrize("pattern", ["gbbbg", "g" * 40 + "bbb", "g" + "c" * 50])
def test_failures_in_a_row_stop_the_run(pattern: str) -> None:
    with pytest.raises(TooManyFailures, match=r"fewer than 3 samples.*decode_error") as error:
        run(failing(pattern), max_failures_in_row=3)
    assert error.value.__cause__ is not None


def test_wrong_settings_are_refused_before_any_sample_is_read() -> None:
    with pytest.raises(ValueError, match="sequences_per_batch must be at least 1"):
        pack(iter(()), PackerConfig(), sequences_per_batch=0)


def test_mistakes_of_the_caller_are_not_skipped() -> None:
    for sample in ({"img": b""}, {"image": 3}, {"image": noise(4, 4).astype(np.float32)}):
        with pytest.raises(ValueError, match="must"):
            run([sample])

    def wrong(pixels: Tensor, generator: torch.Generator) -> Tensor:
        return pixels[:1]

    with pytest.raises(ValueError, match="must return a uint8 tensor"):
        run([(png(2 * P, 2 * P), 1)], transform=wrong)


def test_no_image_waits_longer_than_the_age_limit_allows() -> None:
    pulled = 0

    def samples() -> Iterator[Any]:
        nonlocal pulled
        for sample in image_samples(400, unit=P):
            pulled += 1
            yield sample

    config = PackerConfig(
        patch_size=P, seq_len=64, placement=Placement("exact", window=16, max_age=40)
    )
    for batch in pack(samples(), config, sequences_per_batch=1):
        assert all(pulled - int(key) <= 40 + 16 + 2 for key in batch.keys)


def test_batches_come_as_soon_as_they_are_full() -> None:
    reads: list[int] = []

    def samples() -> Iterator[Any]:
        for i in range(6):
            reads.append(i)
            yield (png(8 * P, 8 * P, i), i)

    config = PackerConfig(patch_size=P, seq_len=64, placement=Placement("next_fit"))
    seen = [len(reads) for _ in pack(samples(), config, sequences_per_batch=2)]
    assert seen == [2, 4, 6]
    assert all(a < b for a, b in pairwise(seen))
