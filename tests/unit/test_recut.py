"""Images of a batch in patches of another size."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packer import ConstantDrop, PackerConfig, PackingCollator, RandomPatchSize
from packer.batch import PackedBatch
from packer.recut import join_images, recut
from tests.helpers.batches import pack_images, random_text


def pictures(sides: list[tuple[int, int]], unit: int, seed: int = 0) -> list[dict[str, object]]:
    random = np.random.default_rng(seed)
    return [
        {
            "image": random.integers(0, 256, (h * unit, w * unit, 3), dtype=np.uint8),
            "key": f"image {i}",
            "label": i,
        }
        for i, (h, w) in enumerate(sides)
    ]


def packed(samples: list[dict[str, object]], **changes: object) -> PackedBatch:
    return PackingCollator(PackerConfig(**{"seq_len": 400, **changes}))(samples)  # type: ignore[arg-type]


def patches_of(batch: PackedBatch) -> list[torch.Tensor]:
    """Patches of each image, in the order of the keys."""
    parts = batch.patches.flatten(0, 1).split_with_sizes(list(batch.segment_lengths))
    found = dict(zip(batch.segment_images, parts, strict=True))
    return [found[image] for image in range(batch.num_images)]


@settings(deadline=None, max_examples=25)
@given(
    sides=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=5),
    old=st.sampled_from([4, 6, 12]),
    new=st.sampled_from([3, 4, 6, 12]),
)
def test_where_sides_divide_it_is_the_image_packed_at_that_size(
    sides: list[tuple[int, int]], old: int, new: int
) -> None:
    samples = pictures(sides, 12)
    cut = recut(packed(samples, patch_size=old), new)
    cut.check()
    expected = packed(samples, patch_size=new)
    assert cut.keys == expected.keys
    assert torch.equal(cut.labels, expected.labels)
    for ours, theirs in zip(patches_of(cut), patches_of(expected), strict=True):
        assert torch.equal(ours, theirs)


def test_other_images_are_resized_to_whole_patches() -> None:
    samples = pictures([(2, 3), (1, 1)], 8)
    cut = recut(packed(samples, patch_size=8), 5)
    cut.check()
    grids = {tuple(grid) for grid in cut.segment_grids} - {(0, 0)}
    assert grids == {(3, 4), (1, 1)}
    (small,) = (x for x in join_images(cut) if x.shape == (5, 5, 3))
    assert small.float().mean() == pytest.approx(float(samples[1]["image"].mean()), abs=12)  # type: ignore[attr-defined]


def test_a_budget_is_kept_and_a_longer_image_gets_its_sequence() -> None:
    batch = packed(pictures([(4, 4)], 8), patch_size=8, seq_len=16)
    assert recut(batch, 4).seq_len == 64
    few = recut(batch, 4, max_tokens=20)
    few.check()
    assert few.max_seqlen <= 20


def test_images_of_mixed_patch_sizes_are_all_cut_alike() -> None:
    samples = pictures([(2, 2), (3, 1), (2, 4), (1, 1), (4, 4)], 12)
    mixed = packed(samples, patch_sizes=RandomPatchSize((4, 6, 12)))
    assert mixed.patch_sizes is not None
    text = random_text([2, 1, 3, 1, 2], vocab_size=9, seed=0)
    captions = tuple(f"caption {i}" for i in range(5))
    cut = recut(replace(mixed, texts=captions, captions=text), 6)
    assert (cut.texts, cut.captions, cut.stats) == (captions, text, mixed.stats)
    assert cut.patch_sizes is None
    for ours, theirs in zip(
        patches_of(cut), patches_of(packed(samples, patch_size=6)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_what_needs_no_cut_is_left_alone() -> None:
    batch = packed(pictures([(2, 2)], 8), patch_size=8)
    assert recut(batch, 8) is batch
    empty = replace(pack_images([], patch_size=4), texts=())
    assert recut(empty, 8).num_images == 0


def test_an_image_with_lost_tokens_is_refused_by_key() -> None:
    batch = packed(pictures([(3, 3)], 8), patch_size=8, token_drop=ConstantDrop(0.5))
    with pytest.raises(ValueError, match=r"'image 0' has 5 of 9\. Pack with NoDrop"):
        recut(batch, 4)
    for wrong in ({"patch_size": 0}, {"patch_size": 4, "max_tokens": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            recut(batch, **wrong)
