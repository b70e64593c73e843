import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from packer.decode import ImageInfo, decode_rgb, image_crc, read_size
from packer.errors import SkipSample
from packer.plan.types import Box, ImageSize


def pixels(height: int, width: int, *channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def smooth(height: int, width: int, seed: int = 0) -> Image.Image:
    coarse = Image.fromarray(pixels(5, 7, 3, seed=seed))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: Any, **options: Any) -> np.ndarray:
    return decode_rgb(data, read_size(data), **options).numpy()


def exif(orientation: Any) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def png_with_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 99))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_a_lossless_rgb_image_decodes_to_its_pixels(kind: str) -> None:
    expected = pixels(7, 5, 3)
    data = encode(Image.fromarray(expected), kind)
    assert read_size(data) == ImageInfo(ImageSize(7, 5), 1)
    np.testing.assert_array_equal(decoded(data), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("box", [None, Box(1, 2, 4, 3)])
def test_exif_orientation_is_applied_before_size_and_box(
    kind: str, orientation: int, box: Box | None
) -> None:
    stored = Image.fromarray(pixels(6, 9, 3))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(stored, kind, exif=exif(orientation), **options)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(data))))

    assert read_size(data).size == upright.shape[:2]
    top, left, height, width = box or (0, 0, *upright.shape[:2])
    expected = upright[top : top + height, left : left + width]
    np.testing.assert_array_equal(decoded(data, box=box), expected)
    if orientation == 6:  # written out once, independent of Pillow: a quarter turn clockwise
        np.testing.assert_array_equal(upright, np.rot90(np.asarray(stored), -1))


@settings(max_examples=25, deadline=None)
@given(
    orientation=st.integers(1, 8),
    height=st.integers(200, 260),
    width=st.integers(200, 260),
    shares=st.tuples(*[st.floats(0, 1)] * 4),
    target=st.tuples(st.integers(1, 20), st.integers(1, 20)),
)
def test_a_reduced_box_shows_the_same_as_the_full_one(
    orientation: int,
    height: int,
    width: int,
    shares: tuple[float, float, float, float],
    target: tuple[int, int],
) -> None:
    rows, cols = np.mgrid[:height, :width]
    ramps = np.stack([rows * 255 / height, cols * 255 / width, 255 - rows * 255 / height], -1)
    data = encode(Image.fromarray(ramps.astype(np.uint8)), "JPEG", exif=exif(orientation))
    info = read_size(data)
    sides = [max(40, round(s * side)) for s, side in zip(shares[:2], info.size, strict=True)]
    rest = [side - part for side, part in zip(info.size, sides, strict=True)]
    box = Box(round(shares[2] * rest[0]), round(shares[3] * rest[1]), *sides)

    full = decode_rgb(data, info, grid_pixels=target, box=box, mode="full")
    reduced = decode_rgb(data, info, grid_pixels=target, box=box, mode="reduced")

    assert tuple(full.shape) == (*sides, 3)
    if reduced.shape != full.shape:
        assert all(side >= 2 * t for side, t in zip(reduced.shape[:2], target, strict=True))
    resize = [Image.fromarray(x.numpy()).resize(target[::-1]) for x in (full, reduced)]
    difference = np.abs(np.subtract(*[np.asarray(x, dtype=np.int16) for x in resize]))
    # Edges move by half a reduced pixel at most: 4 native pixels on a ramp of 1.3 levels a pixel.
    assert difference.max() <= 4 * 1.3 + 6


@pytest.mark.parametrize(
    ("target", "scale"), [(60, 1), (50, 2), (26, 2), (25, 4), (13, 4), (12, 8)]
)
def test_a_jpeg_is_reduced_only_down_to_twice_the_target(target: int, scale: int) -> None:
    data = encode(smooth(201, 300), "JPEG")
    info = read_size(data)
    reduced = decode_rgb(data, info, grid_pixels=(target, target))
    assert reduced.shape[0] == (201 + scale // 2) // scale
    assert min(reduced.shape[:2]) >= 2 * target or scale == 1
    assert decode_rgb(data, info, grid_pixels=(target, target), mode="full").shape == (201, 300, 3)
    assert decode_rgb(data, info).shape == (201, 300, 3)


def test_transparency_is_matted_on_white() -> None:
    rgba = pixels(8, 8, 4)
    color, alpha = rgba[..., :3].astype(float), rgba[..., 3:] / 255
    expected = color * alpha + 255 * (1 - alpha)
    for data in (
        encode(Image.fromarray(rgba)),
        encode(Image.fromarray(rgba), "WEBP", lossless=True, exact=True),
        Image.fromarray(rgba),
    ):
        np.testing.assert_allclose(decoded(data), expected, atol=1)
    grey_alpha = Image.merge("LA", [Image.fromarray(rgba[..., i]) for i in (0, 3)])
    np.testing.assert_allclose(decoded(encode(grey_alpha)), expected[..., :1].repeat(3, 2), atol=1)


def test_colour_keys_and_transparent_palette_entries_turn_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    expected = [[[10, 20, 30], [255, 255, 255]]]
    assert decoded(encode(palette, transparency=1)).tolist() == expected
    assert decoded(encode(palette, transparency=b"\xff\x00")).tolist() == expected
    assert decoded(encode(palette, "GIF", transparency=1)).tolist() == expected
    assert decoded(encode(palette)).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    rgb = palette.convert("RGB")
    assert decoded(encode(rgb, transparency=(200, 100, 50))).tolist() == expected
    deep = Image.fromarray(np.array([[0, 65535]], dtype=np.uint16))
    assert decoded(encode(deep, transparency=0)).tolist() == [[[255] * 3, [255] * 3]]


def test_one_bit_grey_and_cmyk_images_become_rgb() -> None:
    bits = pixels(9, 9) > 127
    np.testing.assert_array_equal(
        decoded(encode(Image.fromarray(bits))), np.repeat(bits[..., None] * np.uint8(255), 3, 2)
    )
    grey = pixels(9, 9)
    np.testing.assert_array_equal(
        decoded(encode(Image.fromarray(grey))), np.repeat(grey[..., None], 3, 2)
    )
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = decoded(encode(cmyk, "JPEG"))
    assert red.shape == (16, 16, 3)
    np.testing.assert_allclose(red, np.broadcast_to([255, 0, 0], red.shape), atol=15)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind: str) -> None:
    ramp = np.arange(256, dtype=np.uint16)[None] * 257
    expected = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, 2)
    np.testing.assert_array_equal(decoded(encode(Image.fromarray(ramp), kind)), expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 32896, 65535]], np.int32), [0, 128, 255]),
        (np.array([[-100, -20, 100]], np.int32), [0, 102, 255]),
        (np.array([[0, 2**30, 2**31 - 1]], np.int32), [0, 128, 255]),
        (np.array([[0.0, 0.2, 1.0]], np.float32), [0, 51, 255]),
        (np.array([[0.0, 51.0, 200.0]], np.float32), [0, 51, 200]),
        (np.array([[0.0, 13107.0, 65535.0]], np.float32), [0, 51, 255]),
        (np.array([[-1.0, 0.0, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[np.nan, 0.2, 1.0]], np.float32), [0, 51, 255]),
        (np.array([[-3.0, -3.0, -3.0]], np.float32), [0, 0, 0]),
        (np.array([[np.inf, 0.2, 1.0]], np.float32), [255, 51, 255]),
        (np.array([[-np.inf, -1.0, 1.0]], np.float32), [0, 0, 255]),
        (np.array([[np.inf, np.nan, -np.inf]], np.float32), [0, 0, 0]),
    ],
)
def test_wide_grey_is_scaled_to_8_bits(values: np.ndarray, expected: list[int]) -> None:
    data = encode(Image.fromarray(values), "TIFF")
    assert decoded(data)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    frames = [Image.new("RGB", (8, 6), color) for color in colors]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert read_size(data).size == (6, 8)
    assert (decoded(data) == colors[0]).all()


BROKEN = {
    "zero bytes": b"",
    "HTML": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "text": b"\xef\xbb\xbfnot an image",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    "JPEG magic alone": b"\xff\xd8\xff",
    "PNG magic alone": b"\x89PNG\r\n\x1a\n",
    "truncated header": encode(smooth(20, 30), "JPEG")[:100],
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_image_is_a_decode_error(name: str) -> None:
    with pytest.raises(SkipSample) as caught:
        read_size(BROKEN[name])
    assert caught.value.cause == "decode_error"
    assert caught.value.detail


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_truncated_image_is_a_decode_error(kind: str, share: float) -> None:
    data = encode(Image.fromarray(pixels(64, 64, 3)), kind)
    with pytest.raises(SkipSample, match="decode_error"):
        decoded(data[: int(len(data) * share)])


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"]),
    at=st.floats(0, 1),
    change=st.integers(1, 255),
    cut=st.booleans(),
)
def test_damaged_bytes_give_pixels_or_a_skip_and_nothing_else(
    kind: str, at: float, change: int, cut: bool
) -> None:
    data = bytearray(encode(smooth(20, 30), kind))
    position = min(int(at * len(data)), len(data) - 1)
    data[position] ^= change
    try:
        info = read_size(bytes(data[:position] if cut else data), max_pixels=10**6)
        rgb = decode_rgb(bytes(data), info, grid_pixels=(5, 5))
    except SkipSample:
        return
    assert rgb.shape[2] == 3


@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_jpeg_can_be_kept_with_its_end_grey(progressive: bool) -> None:
    data = encode(Image.fromarray(pixels(128, 64, 3)), "JPEG", progressive=progressive)
    whole = decoded(data)
    kept = decoded(data[: len(data) // 2], keep_truncated=True)
    assert kept.shape == whole.shape
    if not progressive:
        np.testing.assert_array_equal(kept[:32], whole[:32])
        assert np.ptp(kept[-8:]) == 0
        assert 0 < kept[-1, 0, 0] < 255
    np.testing.assert_array_equal(decoded(data, keep_truncated=True), whole)


def test_a_truncated_png_can_be_kept_with_its_end_black() -> None:
    expected = pixels(64, 64, 3)
    data = encode(Image.fromarray(expected))
    kept = decoded(data[: len(data) // 2], keep_truncated=True)
    np.testing.assert_array_equal(kept[:16], expected[:16])
    assert not kept[-8:].any()
    with pytest.raises(SkipSample, match="decode_error"):
        decode_rgb(b"\x89PNG\r\n\x1a\n", ImageInfo(ImageSize(4, 4), 1), keep_truncated=True)


def test_too_many_pixels_are_seen_in_the_header_and_never_decoded() -> None:
    data = png_with_size(60_000, 60_000)
    with pytest.raises(SkipSample, match="too_many_pixels"):
        read_size(data)
    assert read_size(data, max_pixels=10**10).size == (60_000, 60_000)
    small = encode(smooth(10, 10))
    assert read_size(small, max_pixels=100).size == (10, 10)
    for image in (small, smooth(10, 10), pixels(10, 10, 3)):
        with pytest.raises(SkipSample, match="too_many_pixels"):
            read_size(image, max_pixels=99)


def test_pillows_limit_and_warnings_are_as_before_afterwards() -> None:
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        read_size(png_with_size(12_000, 12_000))  # above the size Pillow warns about
        with pytest.raises(SkipSample):
            read_size(b"")
    assert not seen
    assert limit == Image.MAX_IMAGE_PIXELS
    assert warnings.filters == filters
    with pytest.raises(Image.DecompressionBombWarning):
        Image.open(BytesIO(png_with_size(12_000, 12_000)))


def test_a_strip_of_one_pixel_decodes() -> None:
    strip = pixels(1, 3000, 3)
    np.testing.assert_array_equal(decoded(encode(Image.fromarray(strip))), strip)


def test_damaged_exif_loses_the_orientation_and_not_the_picture() -> None:
    for tags in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", exif(9)):
        data = encode(smooth(10, 20), "JPEG", exif=tags)
        assert read_size(data) == ImageInfo(ImageSize(10, 20), 1)
        assert decoded(data).shape == (10, 20, 3)


def test_reading_a_pngs_size_does_not_decode_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(smooth(10, 20), exif=exif(6))
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", None)
    assert read_size(data) == ImageInfo(ImageSize(20, 10), 6)


def test_pil_images_arrays_and_tensors_pass_and_stay_unchanged() -> None:
    array = pixels(12, 10, 3)
    box = Box(2, 3, 5, 6)
    read_only = array.copy()
    read_only.flags.writeable = False
    for image in (
        array,
        read_only,
        array[::-1][::-1],
        torch.from_numpy(array),
        torch.from_numpy(array.transpose(2, 0, 1).copy()).permute(1, 2, 0),
        Image.fromarray(array),
    ):
        info = read_size(image)
        assert info == ImageInfo(ImageSize(12, 10), 1)
        whole = decode_rgb(image, info)
        assert whole.is_contiguous()
        np.testing.assert_array_equal(whole.numpy(), array)
        np.testing.assert_array_equal(decode_rgb(image, info, box=box), array[2:7, 3:9])
        whole.zero_()
        np.testing.assert_array_equal(np.asarray(image), array)
    grey = array[..., 0]
    for image in (grey, torch.from_numpy(grey.copy())):
        np.testing.assert_array_equal(decoded(image), grey[..., None].repeat(3, 2))


def test_a_pil_images_orientation_is_applied_and_the_image_not_drafted() -> None:
    data = encode(smooth(80, 120), "JPEG", exif=exif(6))
    image = Image.open(BytesIO(data))
    info = read_size(image)
    assert info == read_size(data)
    rgb = decode_rgb(image, info, grid_pixels=(8, 8))
    np.testing.assert_array_equal(rgb.numpy(), decoded(data, mode="full"))
    assert image.size == (120, 80)
    tiff = Image.open(BytesIO(encode(smooth(8, 12), "TIFF", exif=exif(6))))
    tiff.load()
    assert read_size(tiff) == ImageInfo(ImageSize(12, 8), 1)
    assert decode_rgb(tiff, read_size(tiff)).shape == (12, 8, 3)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 1), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        torch.zeros(4, 4, 3),
        torch.zeros(3, 4, 4, dtype=torch.uint8),
        "photo.jpg",
        None,
    ],
)
def test_an_image_of_another_kind_is_an_error_of_the_user(image: object) -> None:
    for function in (read_size, image_crc):
        with pytest.raises(ValueError, match="uint8"):
            function(image)


def test_an_error_of_ours_is_not_taken_for_a_broken_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise IndexError("a bug")

    monkeypatch.setattr("packer.decode.to_rgb", broken)
    with pytest.raises(IndexError, match="a bug"):
        decoded(encode(smooth(4, 4)))


def test_a_header_that_belies_the_pixels_is_a_decode_error() -> None:
    data = encode(smooth(10, 20))
    with pytest.raises(SkipSample, match="header"):
        decode_rgb(data, ImageInfo(ImageSize(20, 20), 1))


def lossless_jpeg(height: int, width: int) -> bytes:
    """Write a grey image of level 128 as JPEG's lossless process does: each difference is 0."""
    frame = struct.pack(">HBHHBBBB", 11, 8, height, width, 1, 1, 0x11, 0)
    table = struct.pack(">HB16BB", 20, 0, 1, *[0] * 15, 0)  # one code, "0", for no difference
    scan = struct.pack(">HBBBBBB", 8, 1, 1, 0, 1, 0, 0)
    data = bytes(-(-height * width // 8))
    return (
        b"\xff\xd8\xff\xc3" + frame + b"\xff\xc4" + table + b"\xff\xda" + scan + data + b"\xff\xd9"
    )


def test_a_lossless_jpeg_is_decoded_in_full_because_it_cannot_be_reduced() -> None:
    data = lossless_jpeg(64, 48)
    info = read_size(data)
    assert info.size == (64, 48)
    rgb = decode_rgb(data, info, grid_pixels=(8, 8), mode="reduced")
    assert rgb.shape == (64, 48, 3)
    assert rgb.unique().tolist() == [128]


def test_image_crc_is_that_of_bytes_or_pixels() -> None:
    array = pixels(4, 6, 3)
    expected = f"{zlib.crc32(array.tobytes()):08x}"
    for image in (array, torch.from_numpy(array), Image.fromarray(array), array.tobytes()):
        assert image_crc(image) == expected
    assert image_crc(memoryview(b"abc")) == image_crc(bytearray(b"abc")) == "352441c2"
    with pytest.raises(SkipSample, match="decode_error"):
        image_crc(Image.open(BytesIO(encode(Image.fromarray(pixels(64, 64, 3)))[:2000])))


def test_threads_leave_pillow_as_it_was() -> None:
    data = [encode(smooth(60 + i, 80), "JPEG") for i in range(8)] * 8
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        shapes = list(pool.map(lambda item: decoded(item).shape, data))
    assert shapes == [(60 + i, 80, 3) for i in range(8)] * 8
    assert (Image.MAX_IMAGE_PIXELS, warnings.filters) == (limit, filters)
