import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from packer.assemble import PlacedImage, assemble
from packer.batch import BatchStats, PackedBatch
from packer.captions import CaptionTokenizer
from packer.plan.types import Grid, ImagePlan, ImageSize
from tests.helpers.samples import assert_same, unpack

P = 2
TOKENIZER = CaptionTokenizer.train(["one two three"] * 3, vocab_size=300)


def placed(key: str, rows: int, cols: int, kept: int, **options: Any) -> PlacedImage:
    seed = sum(key.encode())
    patches = torch.randint(
        1, 256, (kept, 3 * P * P), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    plan = ImagePlan(
        key, ImageSize(rows * P, cols * P), None, Grid(rows, cols), P, kept, seed, seed, seed
    )
    return PlacedImage(plan=plan, patches=patches, **options)


def build(sequences: list[list[PlacedImage]], **options: Any) -> PackedBatch:
    batch = assemble(sequences, **{"seq_len": 16, "patch_size": P} | options)
    batch.check()
    return batch


@st.composite
def sequences(draw: st.DrawFn) -> list[list[PlacedImage]]:
    result: list[list[PlacedImage]] = []
    count = 0
    for _ in range(draw(st.integers(0, 3))):
        row, room = [], 16
        while room and draw(st.booleans()):
            rows, cols = draw(st.integers(1, 4)), draw(st.integers(1, 4))
            kept = draw(st.integers(1, min(room, rows * cols)))
            row.append(placed(f"k{count}", rows, cols, kept, caption=f"c {count}", label=count))
            room -= kept
            count += 1
        result.append(row)
    order = draw(st.permutations(range(count)))
    return [
        [replace(image, order=order[image.label]) for image in row]  # type: ignore[index]
        for row in result
    ]


@given(sequences=sequences(), data=st.data())
def test_a_batch_of_mixed_patch_sizes_is_as_wide_as_the_largest(
    sequences: list[list[PlacedImage]], data: st.DataObject
) -> None:
    mixed = []
    for row in sequences:
        sizes = [data.draw(st.sampled_from([P, 3, 5])) for _ in row]
        mixed.append(
            [
                replace(
                    image,
                    plan=image.plan._replace(patch_size=size),
                    patches=torch.full((image.plan.num_kept, 3 * size**2), 7 + size).byte(),
                )
                for image, size in zip(row, sizes, strict=True)
            ]
        )
    batch = build(mixed)  # it checks every invariant, the zeros behind smaller patches too
    expected = {image.plan.key: image.plan.patch_size for row in mixed for image in row}
    largest = max(expected.values(), default=P)
    assert batch.patch_size == largest
    assert batch.patches.shape[2] == 3 * largest**2
    if len(set(expected.values())) < 2:
        assert batch.patch_sizes is None
        return
    assert batch.patch_sizes is not None
    for key, size in expected.items():
        image = batch.keys.index(key)
        assert batch.patch_sizes[batch.image_index == image].tolist() == [size]
        assert batch.segment_patch_sizes[batch.segment_images.index(image)] == size
        assert bool((unpack(batch)[key].patches[:, : 3 * size**2] == 7 + size).all())
    derived = replace(batch, segment_patch_sizes=())
    assert derived.segment_patch_sizes == batch.segment_patch_sizes
    assert_same(pickle.loads(pickle.dumps(batch)), batch)


@given(sequences=sequences())
def test_every_token_is_in_its_place(sequences: list[list[PlacedImage]]) -> None:
    batch = build(sequences, tokenizer=TOKENIZER)
    everyone = sorted((image for row in sequences for image in row), key=lambda i: i.order)
    assert batch.keys == tuple(image.plan.key for image in everyone)
    assert batch.patches.shape == (len(sequences), 16, 3 * P * P)
    found = unpack(batch)
    for image in everyone:
        mine = found[image.plan.key]
        assert mine.grid == image.plan.grid
        assert torch.equal(mine.patches, image.patches)
        flat = mine.positions[:, 0] * image.plan.grid.cols + mine.positions[:, 1]
        assert bool((flat.diff() > 0).all())
        assert int(flat.max()) < image.plan.grid.num_tokens
    # Segments, one by one from the sequences.
    lengths, owners = [], []
    for row in sequences:
        for image in row:
            lengths.append(image.plan.num_kept)
            owners.append(everyone.index(image))
        if sum(image.plan.num_kept for image in row) < 16:
            lengths.append(16 - sum(image.plan.num_kept for image in row))
            owners.append(-1)
    assert batch.segment_lengths == tuple(lengths)
    assert batch.segment_images == tuple(owners)
    assert batch.stats == BatchStats(
        images=len(everyone),
        tokens=sum(image.plan.num_kept for image in everyone),
        tokens_before_drop=sum(image.plan.grid.num_tokens for image in everyone),
        places=16 * len(sequences),
    )
    if everyone:
        assert batch.texts == tuple(image.caption for image in everyone)
        assert batch.labels is not None
        assert batch.labels.tolist() == [image.label for image in everyone]
        assert batch.captions is not None
        assert batch.captions.image_index.tolist() == list(range(len(everyone)))


@given(sequences=sequences(), data=st.data())
def test_a_broken_image_leaves_no_trace(
    sequences: list[list[PlacedImage]], data: st.DataObject
) -> None:
    broken = {image.plan.key for row in sequences for image in row if data.draw(st.booleans())}
    damaged = [
        [replace(i, patches=None) if i.plan.key in broken else i for i in row] for row in sequences
    ]
    left = [[image for image in row if image.plan.key not in broken] for row in sequences]
    slots = 20
    batch = build(damaged, tokenizer=TOKENIZER, max_images_per_seq=slots)
    empty = not any(left)
    # Without any image nothing but the others' kind of caption and label is known.
    ignore = ("texts", "labels") if empty else ()
    assert_same(batch, build(left, tokenizer=TOKENIZER, max_images_per_seq=slots), ignore=ignore)
    if empty and broken:
        assert batch.texts == ()
        assert batch.labels is not None
        assert batch.labels.shape == (0,)


def test_no_sequence_and_no_image_are_legal() -> None:
    assert build([]).patches.shape == (0, 16, 12)
    batch = build([[], []], tokenizer=TOKENIZER)
    assert (batch.num_images, batch.segment_lengths, batch.image_index.shape) == (
        0,
        (16, 16),
        (2, 0),
    )
    assert batch.captions is not None
    assert batch.captions.segment_lengths == ()


def test_equal_order_means_placement_order() -> None:
    batch = build([[placed("b", 1, 1, 1), placed("a", 1, 2, 2)], [placed("c", 1, 1, 1)]])
    assert batch.keys == ("b", "a", "c")


def test_slots_are_the_most_images_or_e_max() -> None:
    row = [placed("a", 1, 1, 1), placed("b", 1, 1, 1)]
    assert build([row, []]).grid_sizes.shape == (2, 2, 2)
    batch = build([row, []], max_images_per_seq=5)
    assert batch.image_index.tolist() == [[0, 1, -1, -1, -1], [-1] * 5]


def test_labels_are_indices_or_vectors_and_never_mixed() -> None:
    def labels(*values: Any) -> torch.Tensor | None:
        return build([[placed(f"k{i}", 1, 1, 1, label=v) for i, v in enumerate(values)]]).labels

    index, vector = labels(3, 1), labels((0.5, 1.0), (0.0, 2.0))
    assert index is not None
    assert vector is not None
    assert (index.dtype, index.tolist()) == (torch.int64, [3, 1])
    assert (vector.dtype, vector.tolist()) == (torch.float32, [[0.5, 1.0], [0.0, 2.0]])
    assert labels(None, None) is None
    with pytest.raises(ValueError, match="'k1' has none"):
        labels(1, None)
    for mixed in ((1, (0.5,)), ((0.5,), (0.5, 1.0))):
        with pytest.raises(ValueError, match="all be class indices or all be vectors"):
            labels(*mixed)


def test_a_missing_caption_among_captions_is_empty_text() -> None:
    batch = build(
        [[placed("a", 1, 1, 1, caption="one"), placed("b", 1, 1, 1)]], tokenizer=TOKENIZER
    )
    assert batch.texts == ("one", "")
    assert build([[placed("a", 1, 1, 1)]], tokenizer=TOKENIZER).captions is None


def test_captions_are_cut_to_the_limit_and_end_with_the_end_token() -> None:
    batch = build(
        [[placed("a", 1, 1, 1, caption="one two three one two")]],
        tokenizer=TOKENIZER,
        max_text_tokens=3,
    )
    assert batch.captions is not None
    assert batch.captions.segment_lengths == (3,)
    assert batch.captions.ids[-1] == TOKENIZER.end_id


def test_given_counts_are_added() -> None:
    batch = build([[placed("a", 1, 1, 1)]], stats=BatchStats(samples_read=3, skipped={"x": 2}))
    assert (batch.stats.samples_read, batch.stats.images) == (3, 1)
    assert batch.stats.skipped == {"x": 2}


class Assembled(Dataset[tuple[bool, torch.Tensor]]):
    """Says whether a batch's patches are in shared memory before anyone moves them there."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[bool, torch.Tensor]:
        batch = build([[placed("a", 2, 3, 5)], []])
        return batch.patches.is_shared(), batch.patches


def test_a_workers_batch_is_made_in_the_memory_it_shares() -> None:
    shared, patches = next(iter(DataLoader(Assembled(), batch_size=None, num_workers=1)))
    alone, expected = Assembled()[0]
    assert (shared, alone) == (True, False)
    assert torch.equal(patches, expected)
    assert not build([], seq_len=4).patches.numel()
