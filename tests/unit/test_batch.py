import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from packer.batch import BatchStats, PackedBatch, PackedText
from tests.helpers.batches import pack_images, random_images, random_text
from tests.helpers.samples import assert_same


def make() -> PackedBatch:
    batch = pack_images(random_images(7, seed=1), patch_size=4, seq_len=32)
    assert batch.segment_images[1] >= 0, "two images must share the first sequence"
    assert -1 in batch.segment_images
    return replace(
        batch,
        texts=tuple("abcdefg"),
        labels=torch.arange(7),
        captions=random_text([3, 1, 2, 4, 1, 1, 2], vocab_size=9, seed=0),
        patch_sizes=torch.where(batch.image_index >= 0, 4, 0).int(),
    )


def set_at(name: str, where: tuple[Any, ...], value: Any) -> Callable[[PackedBatch], PackedBatch]:
    def change(batch: PackedBatch) -> PackedBatch:
        tensor = getattr(batch, name).clone()
        tensor[where] = value
        return replace(batch, **{name: tensor})

    return change


def change_text(**changes: Any) -> Callable[[PackedBatch], PackedBatch]:
    return lambda batch: replace(batch, captions=replace(batch.captions, **changes))


def at_padding(name: str) -> Callable[[PackedBatch], PackedBatch]:
    def change(batch: PackedBatch) -> PackedBatch:
        b, token = (batch.segment_ids == 0).nonzero()[-1].tolist()
        return set_at(name, (b, token, 0), 1)(batch)

    return change


def merge_segments(batch: PackedBatch) -> PackedBatch:
    first, second, *rest = batch.segment_lengths
    lengths = (first + second, *rest)
    images = (batch.segment_images[0], *batch.segment_images[2:])
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return replace(batch, segment_lengths=lengths, segment_images=images, cu_seqlens=bounds)


def swap_ids(batch: PackedBatch) -> PackedBatch:
    ids = batch.segment_ids
    swapped = torch.where(ids == 1, 2, torch.where(ids == 2, 1, ids))
    return replace(batch, segment_ids=swapped)


def padding_in_front(batch: PackedBatch) -> PackedBatch:
    ids = batch.segment_ids.clone()
    ids[-1] = ids[-1].flip(0)
    return replace(batch, segment_ids=ids)


BROKEN: dict[str, tuple[Callable[[PackedBatch], PackedBatch], str]] = {
    "cu_seqlens": (set_at("cu_seqlens", (1,), 1), "cu_seqlens disagrees"),
    "too few segments": (
        lambda b: replace(
            b,
            segment_lengths=b.segment_lengths[:-1],
            segment_images=b.segment_images[:-1],
            cu_seqlens=b.cu_seqlens[:-1],
        ),
        r"cover all B \* L",
    ),
    "empty segment": (
        lambda b: replace(
            b,
            segment_lengths=(0, *b.segment_lengths),
            segment_images=(0, *b.segment_images),
            cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int32), b.cu_seqlens]),
        ),
        "at least one token",
    ),
    "merged segments": (merge_segments, "disagree with segment_lengths"),
    "ids out of order": (swap_ids, "number the images"),
    "padding in front": (padding_in_front, "number the images"),
    "slot without tokens": (set_at("image_index", (-1, -1), 6), "number the images"),
    "image twice": (
        lambda b: replace(
            b,
            image_index=b.image_index.masked_fill(b.image_index == 3, 2),
            segment_images=tuple(2 if i == 3 else i for i in b.segment_images),
        ),
        "one slot",
    ),
    "image out of range": (
        lambda b: replace(
            b,
            image_index=b.image_index.masked_fill(b.image_index == 3, 9),
            segment_images=tuple(9 if i == 3 else i for i in b.segment_images),
        ),
        "one slot",
    ),
    "segment_images": (
        lambda b: replace(b, segment_images=(*b.segment_images[1:], b.segment_images[0])),
        "segment_images disagrees",
    ),
    "segment_images too short": (
        lambda b: replace(b, segment_images=b.segment_images[1:]),
        "segment_images disagrees",
    ),
    "pixels in padding": (at_padding("patches"), "patches must be 0"),
    "position in padding": (at_padding("position_ids"), "position_ids must be 0"),
    "position beyond the grid": (set_at("position_ids", (0, 0, 1), 99), "outside"),
    "position below 0": (set_at("position_ids", (0, 0, 0), -1), "outside"),
    "grid of an image": (set_at("grid_sizes", (0, 0, 1), 0), "grid_sizes must be positive"),
    "grid of an empty slot": (set_at("grid_sizes", (-1, -1, 0), 2), "grid_sizes must be 0"),
    "patch_size": (lambda b: replace(b, patch_size=5), r"3 \* patch_size"),
    "patch_sizes": (set_at("patch_sizes", (0, 0), 5), "patch_sizes"),
    "patch size of an image": (set_at("patch_sizes", (0, 0), 0), "between 1 and patch_size"),
    "patch size of an empty slot": (set_at("patch_sizes", (-1, -1), 4), "0 in empty slots"),
    "segment_patch_sizes": (
        lambda b: replace(b, segment_patch_sizes=(*b.segment_patch_sizes[1:], 4)),
        "segment_patch_sizes disagrees",
    ),
    "segment_patch_sizes of one size": (
        lambda b: replace(b, patch_sizes=None),
        "segment_patch_sizes needs patch_sizes",
    ),
    "pixels behind a smaller patch": (
        lambda b: replace(
            b,
            patch_sizes=b.patch_sizes.index_put(
                (torch.tensor(0), torch.tensor(0)), torch.tensor(2, dtype=torch.int32)
            ),
            segment_patch_sizes=(),
        ),
        "followed by zeros",
    ),
    "texts": (lambda b: replace(b, texts=b.texts[1:]), "texts must have one entry"),
    "labels": (lambda b: replace(b, labels=b.labels[1:]), "labels must have one entry"),
    "caption of no image": (change_text(image_index=torch.arange(1, 8)), "name images"),
    "caption index": (change_text(image_index=torch.arange(6)), "M long"),
    "caption bounds": (
        change_text(cu_seqlens=torch.arange(8, dtype=torch.int32)),
        "captions.cu_seqlens",
    ),
    "caption tokens": (change_text(ids=torch.zeros(3, dtype=torch.int64)), "cover all caption"),
    "empty caption": (change_text(segment_lengths=(4, 0, 2, 4, 1, 1, 2)), "caption must hold"),
}


def test_a_sound_batch_passes_its_check() -> None:
    make().check()


@pytest.mark.parametrize("name", BROKEN)
def test_every_broken_invariant_is_named(name: str) -> None:
    breaks, message = BROKEN[name]
    broken = breaks(make())
    with pytest.raises(AssertionError, match=message):
        broken.check()


@given(seed=st.integers(0, 10**6), count=st.integers(0, 8))
def test_segment_images_follow_from_the_tensors(seed: int, count: int) -> None:
    batch = pack_images(random_images(count, seed=seed), patch_size=4, seq_len=40)
    assert replace(batch, segment_images=()).segment_images == batch.segment_images


def test_a_batch_without_images_is_legal() -> None:
    batch = pack_images([], patch_size=4, seq_len=8)
    batch.check()
    assert (batch.num_images, batch.max_seqlen, batch.seq_len) == (0, 0, 8)


def test_sizes_are_read_off_the_batch() -> None:
    batch = make()
    assert batch.num_images == 7
    assert batch.seq_len == 32
    assert batch.max_seqlen == max(batch.segment_lengths)


def test_to_moves_every_tensor_and_nothing_else() -> None:
    batch = make()
    moved = batch.to("meta")
    for old, new in ((batch, moved), (batch.captions, moved.captions)):
        for item in fields(old):  # type: ignore[arg-type]
            before, after = getattr(old, item.name), getattr(new, item.name)
            if isinstance(before, Tensor):
                assert after.device.type == "meta", item.name
            elif not isinstance(before, PackedText):
                assert after is before or after == before, item.name
    assert_same(batch, batch.to("cpu", non_blocking=True))


def test_pin_memory_pins_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    # Pinning needs an accelerator; what is tested is that no tensor is forgotten.
    pinned: list[int] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    batch = make()
    assert_same(batch.pin_memory(), batch)
    owned = [getattr(batch, item.name) for item in fields(batch)]
    owned += [getattr(batch.captions, item.name) for item in fields(PackedText)]
    assert sorted(pinned) == sorted(t.data_ptr() for t in owned if isinstance(t, Tensor))


counts = st.integers(0, 10**9)
causes = st.dictionaries(st.sampled_from(["decode_error", "missing_caption"]), counts)
stats = st.builds(
    BatchStats,
    samples_read=counts,
    images=counts,
    tokens=counts,
    tokens_before_drop=counts,
    places=counts,
    skipped=causes,
    noted=causes,
)


@given(a=stats, b=stats, c=stats)
def test_counts_add_up_in_any_grouping(a: BatchStats, b: BatchStats, c: BatchStats) -> None:
    assert (a + b) + c == a + (b + c)
    assert a + b == b + a
    assert a + BatchStats() == a
    assert (a + b).images == a.images + b.images
    assert sum((a + b).skipped.values()) == sum(a.skipped.values()) + sum(b.skipped.values())


def test_padding_is_the_share_of_empty_places() -> None:
    assert BatchStats().padding == 0
    assert BatchStats(tokens=3, places=4).padding == 0.25


def test_a_pickled_batch_is_the_same_and_holds_small_tensors_by_value() -> None:
    batch = make()
    large = torch.zeros(*batch.patches.shape[:2], 1 << 14, dtype=torch.uint8)

    assert_same(batch, pickle.loads(pickle.dumps(batch)))
    rebuild, (_, parts) = replace(batch, patches=large).__reduce__()

    assert parts["patches"] is large, "in a worker it goes through shared memory"
    assert isinstance(parts["segment_ids"], np.ndarray)
    assert torch.equal(rebuild(PackedBatch, parts).segment_ids, batch.segment_ids)
