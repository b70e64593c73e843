"""packer.report: the pictures of a batch show what the batch holds."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from packer.batch import PackedBatch
from packer.report import batch_text, draw_batch

Sides = tuple[int, int, int]
"""(rows, cols, kept) of an image."""


def make_batch(sequences: list[list[Sides]], seq_len: int, patch_size: int = 4) -> PackedBatch:
    """Pack random pixels; every image's pixels are one colour, unlike its neighbours'."""
    rng, count = random.Random(0), len(sequences)
    slots = max((len(images) for images in sequences), default=0)
    patches = torch.zeros(count, seq_len, patch_size**2 * 3, dtype=torch.uint8)
    segment_ids = torch.zeros(count, seq_len, dtype=torch.int32)
    position_ids = torch.zeros(count, seq_len, 2, dtype=torch.int32)
    grid_sizes = torch.zeros(count, slots, 2, dtype=torch.int32)
    image_index = torch.full((count, slots), -1, dtype=torch.int64)
    lengths, total = [], 0
    for b, images in enumerate(sequences):
        start = 0
        for e, (rows, cols, kept) in enumerate(images):
            here = slice(start, start + kept)
            places = sorted(rng.sample(range(rows * cols), kept))
            patches[b, here] = 10 + total % 200
            segment_ids[b, here] = e + 1
            position_ids[b, here] = torch.tensor([divmod(place, cols) for place in places]).int()
            grid_sizes[b, e] = torch.tensor([rows, cols])
            image_index[b, e] = total
            start, total = start + kept, total + 1
            lengths.append(kept)
        lengths += [seq_len - start] if start < seq_len else []
    batch = PackedBatch(
        patches=patches,
        patch_size=patch_size,
        segment_ids=segment_ids,
        position_ids=position_ids,
        grid_sizes=grid_sizes,
        image_index=image_index,
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        segment_lengths=tuple(lengths),
        keys=tuple(str(i) for i in range(total)),
    )
    batch.check()
    return batch


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures in the order they were saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def remember(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures


def words(figure: Figure) -> list[str]:
    texts = [text.get_text() for text in figure.texts]
    return texts + [text.get_text() for axes in figure.axes for text in axes.texts]


def test_kept_patches_stand_at_their_positions_and_dropped_ones_are_missing(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    batch = make_batch([[(5, 8, 23), (3, 4, 9)]], seq_len=40)
    draw_batch(batch, tmp_path / "packing.png")
    pictures = [np.asarray(image.get_array()) for image in drawn[0].axes[0].images]
    assert [picture.shape for picture in pictures] == [(20, 32, 3), (12, 16, 3)]
    for slot, picture in enumerate(pictures, start=1):
        cells = picture.reshape(picture.shape[0] // 4, 4, -1, 4, 3).transpose(0, 2, 1, 3, 4)
        mine = batch.segment_ids[0] == slot
        colour = int(batch.patches[0][mine][0, 0])
        kept = {tuple(place) for place in np.argwhere((cells == colour).all((2, 3, 4))).tolist()}
        assert kept == {tuple(place) for place in batch.position_ids[0][mine].tolist()}


def test_patches_smaller_than_the_largest_are_unpadded_first(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    batch = make_batch([[(2, 3, 6)]], seq_len=6, patch_size=4)
    small = torch.arange(12, dtype=torch.uint8)
    patches = torch.zeros_like(batch.patches)
    patches[..., :12] = small  # one 2 x 2 RGB patch, padded to 4 x 4
    fields = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    fields |= {"patches": patches, "patch_sizes": torch.full((1, 1), 2, dtype=torch.int32)}
    draw_batch(PackedBatch(**fields), tmp_path / "packing.png")
    picture = np.asarray(drawn[0].axes[0].images[0].get_array())
    np.testing.assert_array_equal(picture, np.tile(small.view(2, 2, 3).numpy(), (2, 3, 1)))


def test_titles_count_the_whole_batch_and_padding(tmp_path: Path, drawn: list[Figure]) -> None:
    batch = make_batch([[(4, 4, 16), (2, 5, 7)], [(3, 3, 9)], []], seq_len=25)
    draw_batch(batch, tmp_path / "packing.png", max_sequences=2)
    said = "\n".join(words(drawn[0]))
    assert "3 images in 3 sequences of 25 tokens, 57.33 % padding" in said
    assert "the first 2 of 3 sequences" in said
    assert {"16/16", "7/10", "9/9"} <= set(words(drawn[0]))


@pytest.mark.parametrize(
    ("sequences", "seq_len"),
    [
        ([[(30, 30, 700)]], 1024),
        ([[(1, 60, 40), (60, 1, 60)]] * 3, 128),
        ([[(1, 1, 1)] * 40] * 9, 40),
        ([[(2, 2, 3)], []], 4),
        ([[]], 1),
    ],
    ids=["one large", "extreme aspect ratios", "single patches", "an empty sequence", "no image"],
)
def test_every_shape_of_batch_makes_a_legible_page(
    sequences: list[list[Sides]], seq_len: int, tmp_path: Path
) -> None:
    path = draw_batch(make_batch(sequences, seq_len), tmp_path / "new" / "packing.png")
    with Image.open(path) as picture:
        assert 0.3 < picture.width / picture.height < 8


def test_images_are_drawn_side_by_side_without_overlap(tmp_path: Path, drawn: list[Figure]) -> None:
    rng = random.Random(1)
    sequences = [
        [(rng.randint(1, 9), rng.randint(1, 9), 1) for _ in range(rng.randint(1, 20))]
        for _ in range(6)
    ]
    draw_batch(make_batch(sequences, seq_len=20), tmp_path / "packing.png")
    axes = drawn[0].axes[0]
    boxes = [image.get_extent() for image in axes.images]
    assert len(boxes) == sum(len(images) for images in sequences)
    for i, (left, right, bottom, top) in enumerate(boxes):
        assert axes.get_xlim()[0] <= left
        assert right <= axes.get_xlim()[1] + 1e-6
        for other in boxes[:i]:
            apart = right <= other[0] or other[1] <= left or bottom <= other[3] or other[2] <= top
            assert apart


@settings(max_examples=50, deadline=None)
@given(data=st.data(), width=st.integers(1, 80), seq_len=st.integers(1, 70))
def test_a_line_of_text_is_as_long_as_asked_and_splits_at_the_images(
    data: st.DataObject, width: int, seq_len: int
) -> None:
    kept = data.draw(st.lists(st.integers(1, 12), max_size=6))
    while sum(kept) > seq_len:
        kept.pop()
    line = batch_text(make_batch([[(1, n, n) for n in kept]], seq_len), width=width).split("\n")[1]
    assert line[4] == " "
    bar = line[5 : 5 + width]
    ends = [round(sum(kept[: i + 1]) * width / seq_len) for i in range(len(kept))]
    expected = "".join(
        "█▒"[i % 2] * (end - start)
        for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    )
    assert bar == expected.ljust(width, "·")
    assert f"{100 * sum(kept) / seq_len:.2f} %" in line


def test_text_names_token_counts_and_totals() -> None:
    text = batch_text(make_batch([[(2, 2, 4), (1, 3, 2)], []], seq_len=8), width=8)
    assert text.split("\n") == [
        "2 images in 2 sequences of 8 tokens, 62.50 % padding",
        "   0 ████▒▒··  75.00 %  4 2",
        "   1 ········   0.00 %  empty",
    ]


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got \(0, 8\)"):
        draw_batch(make_batch([], seq_len=8), tmp_path / "packing.png")
    with pytest.raises(ValueError, match=r"max_sequences must be at least 1; got 0"):
        draw_batch(make_batch([[]], seq_len=8), tmp_path / "packing.png", max_sequences=0)
