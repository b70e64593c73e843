"""What Pillow would do on its own with files that ask for more than they are."""

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from packer.collate import PackingCollator
from packer.config import PackerConfig
from packer.decode import decode_rgb, image_crc, read_size
from packer.errors import SkipSample
from packer.pillow import reading
from tests.helpers.damage import gif, tiled_tiff


@pytest.fixture
def no_large_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no image of more than a million pixels be made."""
    for name in ("fill", "new"):
        make = getattr(Image.core, name)

        def checked(mode: str, size: tuple[int, int], *colour: Any, make: Any = make) -> Any:
            assert size[0] * size[1] <= 10**6, "memory was asked for"
            return make(mode, size, *colour)

        monkeypatch.setattr(Image.core, name, checked)


@pytest.mark.usefixtures("no_large_image")
@pytest.mark.parametrize("disposal", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("screen", "frame"), [((8, 8), (65535, 65535)), ((65535, 65535), (8, 8)), ((8, 8), (8, 60000))]
)
def test_a_gif_that_claims_too_many_pixels_is_refused_before_a_frame_is_made(
    screen: tuple[int, int], frame: tuple[int, int], disposal: int
) -> None:
    """Pillow fills the first frame's extent while it opens the file: 4 GB for 43 bytes."""
    with pytest.raises(SkipSample) as caught:
        read_size(gif(screen, frame, disposal), max_pixels=400_000)
    assert caught.value.cause == "too_many_pixels"


def test_a_tiff_whose_tiles_are_too_large_is_refused() -> None:
    """Whole tiles are decoded: 0.9 GB for an image of 8 x 8 in a file of 0.9 MB."""
    tile = zlib.compress(bytes([7]) * 256)
    small = tiled_tiff(8, 16, tile)
    assert decode_rgb(small, read_size(small, max_pixels=256)).unique().tolist() == [7]
    with pytest.raises(SkipSample, match=r"too_many_pixels: a tile of 30000 x 30000"):
        read_size(tiled_tiff(8, 30_000, tile))
    plain = BytesIO()
    Image.new("L", (8, 8)).save(plain, "TIFF")
    assert read_size(plain.getvalue(), max_pixels=64).size == (8, 8)


@pytest.mark.parametrize("limit", [1, 2, 7, 8, 99, 100])
def test_an_image_of_exactly_the_limit_passes(limit: int) -> None:
    buffer = BytesIO()
    Image.fromarray(np.zeros((1, limit), np.uint8)).save(buffer, "GIF")
    assert read_size(buffer.getvalue(), max_pixels=limit).size == (1, limit)
    if limit > 1:
        with pytest.raises(SkipSample, match="too_many_pixels"):
            read_size(buffer.getvalue(), max_pixels=limit - 1)


def test_of_several_limits_at_once_the_highest_holds() -> None:
    before = Image.MAX_IMAGE_PIXELS
    assert before is not None
    with reading(100):
        assert Image.MAX_IMAGE_PIXELS == 50
        with reading(60):
            assert Image.MAX_IMAGE_PIXELS == 50
        with reading(1000):
            assert Image.MAX_IMAGE_PIXELS == 500
        with reading():
            assert Image.MAX_IMAGE_PIXELS is None
            with reading(100):
                assert Image.MAX_IMAGE_PIXELS is None
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.usefixtures("no_large_image")
def test_a_header_that_belies_a_known_size_is_refused_before_it_is_decoded() -> None:
    """Sizes may come from an index instead of the header; the file may have changed since."""
    buffer = BytesIO()
    Image.new("L", (20, 20)).save(buffer, "PNG")
    known = read_size(buffer.getvalue())
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header
    changed = start + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + buffer.getvalue()[33:]
    with pytest.raises(SkipSample, match="too_many_pixels"):
        decode_rgb(changed, known)


@pytest.mark.usefixtures("no_large_image")
def test_a_pil_image_without_key_is_not_decoded_for_one_where_it_is_too_large() -> None:
    data = BytesIO()
    Image.new("L", (1000, 1000)).save(data, "PNG")
    opened = Image.open(data)
    collate = PackingCollator(PackerConfig(max_pixels=999_999))
    assert collate([(opened, 1)]).stats.skipped == {"too_many_pixels": 1}
    assert image_crc(opened, max_pixels=1_000_000) == image_crc(opened)
    with pytest.raises(SkipSample, match="too_many_pixels"):
        image_crc(opened, max_pixels=999_999)
