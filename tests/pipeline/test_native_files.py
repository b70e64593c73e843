"""205 files of original size as they are found, through the whole path of a collator."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, ImageStat

from packer.batch import BatchStats, PackedBatch
from packer.collate import PackingCollator
from packer.config import PackerConfig
from tests.helpers.samples import unpack

NATIVE = Path(__file__).parents[2].parent / "shared" / "data" / "native"
MANIFEST = NATIVE / "manifest.tsv"
P, BUDGET, PER_BATCH = 16, 64, 16

pytestmark = pytest.mark.skipif(
    not MANIFEST.exists(), reason="shared/data/native is not beside this folder"
)


def rows() -> Iterator[dict[str, str]]:
    with MANIFEST.open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file, delimiter="\t")


@pytest.fixture(scope="module")
def batches() -> list[PackedBatch]:
    """All files, 16 a batch, beside their own neighbours."""
    collate = PackingCollator(PackerConfig(patch_size=P, seq_len=256, max_tokens=BUDGET))
    samples = [
        {"key": row["file"], "image": (NATIVE / row["file"]).read_bytes(), "caption": row["file"]}
        for row in rows()
    ]
    return [collate(samples[i : i + PER_BATCH]) for i in range(0, len(samples), PER_BATCH)]


def test_files_come_through_or_are_counted_as_the_manifest_says(
    batches: list[PackedBatch],
) -> None:
    expected = {row["file"]: row["expect"] for row in rows()}
    stats = sum((batch.stats for batch in batches), BatchStats())
    kept = [key for batch in batches for key in batch.keys]

    for batch in batches:
        batch.check()
        assert batch.texts == batch.keys
    assert kept == [file for file, expect in expected.items() if expect == "ok"]
    assert stats.images + sum(stats.skipped.values()) == stats.samples_read == len(expected)
    # 65536 x 65536 is as unreadable as it is too large; the limit on pixels comes first.
    too_many = [row["file"] for row in rows() if int(row["width"] or 0) > 16384]
    failed = [
        file for file, expect in expected.items() if expect == "fail" and file not in too_many
    ]
    assert stats.skipped == {"decode_error": len(failed), "too_many_pixels": len(too_many)}
    assert {file for file, expect in expected.items() if expect == "big"} <= set(too_many)


def test_a_kept_file_has_the_grid_of_its_size_and_the_colours_of_its_picture(
    batches: list[PackedBatch],
) -> None:
    """Mean colour against Pillow's own conversion; sizes against the manifest."""
    sizes = {row["file"]: row for row in rows()}
    found = {key: image for batch in batches for key, image in unpack(batch).items()}
    for file, image in found.items():
        height, width = int(sizes[file]["height"]), int(sizes[file]["width"])
        if sizes[file]["exif_orientation"] in ("5", "6", "7", "8"):
            height, width = width, height  # the manifest has them as stored
        grid_rows, grid_cols = image.grid
        assert 1 <= grid_rows * grid_cols <= BUDGET
        if height * width >= BUDGET * P * P:
            # The budget is used but for the rounding of the sides, and the shape is kept.
            side = math.sqrt(BUDGET * height / width)
            assert side - 1 < grid_rows <= max(side, 1)
        else:
            assert (grid_rows, grid_cols) == (max(height // P, 1), max(width // P, 1))
        mine = image.patches.reshape(-1, 3).double().mean(0).numpy()
        np.testing.assert_allclose(mine, mean_colour(NATIVE / file), atol=6, err_msg=file)


def mean_colour(path: Path) -> list[float]:
    """Average an image over white in RGB, by Pillow alone."""
    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened)
        if upright.mode.startswith("I"):
            return [np.asarray(upright).mean() / 256] * 3
        rgba = upright.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return ImageStat.Stat(Image.alpha_composite(white, rgba)).mean[:3]
