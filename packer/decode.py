"""Encoded bytes, PIL images, arrays or tensors in; sizes and RGB pixels out.

With `packer.pillow` the only user of PIL for samples. Sizes come from headers alone, and the limit
on pixels is checked before a pixel is decoded.
"""

import zlib
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from packer.errors import SkipSample
from packer.pillow import open_image, raised_in_pillow, reading, rgb_pixels, to_rgb
from packer.plan.types import Box, ImageSize

_ORIENTATION_TAG = 0x0112
_TILE_WIDTH_TAG, _TILE_LENGTH_TAG = 322, 323
_JPEG_SCAN, _JPEG_LOSSLESS_FRAMES = 0xDA, frozenset({0xC3, 0xC7, 0xCB, 0xCF})  # second bytes
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = frozenset({5, 6, 7, 8})
_FLIPS_STORED_ROWS = frozenset({3, 4, 6, 7})
_FLIPS_STORED_COLS = frozenset({2, 3, 7, 8})


class ImageInfo(NamedTuple):
    """What the header says about an image: enough to plan it and to decode it alike later."""

    size: ImageSize
    """Height and width in pixels, after EXIF orientation."""
    orientation: int
    """EXIF orientation still to be applied to the stored pixels, 1 (upright) to 8."""


def read_size(image: object, *, max_pixels: int = 178_000_000) -> ImageInfo:
    """Read an image's size without decoding it.

    Args:
        image: Encoded bytes, a PIL image, or a uint8 array or tensor (H, W, 3) or (H, W).
        max_pixels: Largest pixel count that is accepted.

    Returns:
        Size after EXIF orientation, and the orientation. EXIF is read from the header alone: a PNG
        may carry it behind its pixels, where it is ignored.

    Raises:
        SkipSample: ``"decode_error"`` if the bytes are no image Pillow can read,
            ``"too_many_pixels"`` if the image exceeds ``max_pixels``.
        ValueError: If ``image`` is of another type, dtype or shape.
    """
    if isinstance(image, np.ndarray | Tensor):
        height, width = _check_array(image).shape[:2]
        info = ImageInfo(ImageSize(height, width), 1)
    else:
        with reading(max_pixels):
            opened = image if isinstance(image, Image.Image) else open_image(_as_bytes(image))
            info = _describe(opened)
            _check_tile(opened, max_pixels)
    check_pixels(info.size, max_pixels)
    return info


def check_pixels(size: ImageSize, max_pixels: int) -> None:
    """Refuse an image without pixels (``decode_error``) or with more than ``max_pixels``.

    Raises:
        SkipSample: ``"decode_error"`` or ``"too_many_pixels"``.
    """
    height, width = size
    if min(height, width) < 1:
        raise SkipSample("decode_error", f"the image has {height} x {width} pixels")
    if height * width > max_pixels:
        raise SkipSample("too_many_pixels", f"{height} x {width}; max_pixels is {max_pixels}")


def decode_rgb(
    image: object,
    info: ImageInfo,
    *,
    grid_pixels: tuple[int, int] | None = None,
    box: Box | None = None,
    mode: Literal["reduced", "full"] = "reduced",
    keep_truncated: bool = False,
) -> UInt8[Tensor, "H W 3"]:
    """Decode an image, or a box of it, to RGB.

    Grey, palette, CMYK and 1-bit images are converted, transparency is laid on white, more than 8
    bits are scaled to 8 (not clipped), animations give their first frame, EXIF is applied.

    Args:
        image: As for `read_size`.
        info: What `read_size` returned for this image.
        grid_pixels: (height, width) in pixels the result will be resized to; used by ``"reduced"``.
        box: Crop in native pixels after EXIF orientation; None for the whole image.
        mode: ``"reduced"`` lets a JPEG be decoded at 1/2, 1/4 or 1/8 while both sides of the result
            stay at least twice ``grid_pixels``; ``"full"`` always decodes every pixel.
        keep_truncated: Keep an image whose end is missing. The missing part of a JPEG is grey, of
            other formats black.

    Returns:
        uint8 (H, W, 3), contiguous. Without reduction H and W are those of the box; with it they
        are smaller by a common factor, rounded.

    Raises:
        SkipSample: ``"decode_error"`` if Pillow cannot decode the data.
        ValueError: As for `read_size`.
    """
    if isinstance(image, np.ndarray | Tensor):
        return _crop_array(_check_array(image), box)
    stored = _stored_box(info, box)
    with reading(info.size.height * info.size.width):
        if isinstance(image, Image.Image):
            # Never drafted: that would change the caller's image.
            opened, scale = image, 1
        else:
            # A JPEG's decoder fills what is missing before the end marker with grey; bytes after
            # the end of a whole image are ignored.
            data = _as_bytes(image)
            opened = open_image(data + b"\xff\xd9" if keep_truncated and _is_jpeg(data) else data)
            reducible = mode == "reduced" and not _is_lossless_jpeg(data)
            scale = _draft(opened, info, stored, grid_pixels) if reducible else 1
        _load(opened, info, scale, keep_truncated=keep_truncated)
        edges = _scaled(stored, scale, opened.size)
        if edges != (0, 0, *opened.size):
            opened = opened.crop(edges)
        rgb = to_rgb(opened)
        if info.orientation in _TRANSPOSE:
            rgb = rgb.transpose(_TRANSPOSE[info.orientation])
        # DLPack shares the array's memory; from_numpy would warn that it is read-only.
        return from_dlpack(rgb_pixels(rgb))


def image_crc(image: object, *, max_pixels: int | None = None) -> str:
    """Return the key of a sample that has none: CRC-32 of its bytes, or of its pixels.

    Args:
        image: As for `read_size`.
        max_pixels: Largest pixel count of a PIL image, which may have to be decoded for it; None
            sets no limit.

    Raises:
        SkipSample: If a PIL image cannot be decoded, or is too large for it.
        ValueError: As for `read_size`.
    """
    if isinstance(image, np.ndarray | Tensor):
        data: Any = np.ascontiguousarray(_check_array(image))
    elif isinstance(image, Image.Image):
        with reading(max_pixels):
            if max_pixels is not None:
                check_pixels(_describe(image).size, max_pixels)
            data = image.tobytes()
    else:
        data = _as_bytes(image)
    return f"{zlib.crc32(data):08x}"


def _describe(opened: Image.Image) -> ImageInfo:
    orientation = _orientation(opened)
    width, height = opened.size
    if orientation in _SWAPS_SIDES:
        width, height = height, width
    return ImageInfo(ImageSize(height, width), orientation)


def _orientation(opened: Image.Image) -> int:
    if opened.format == "TIFF":
        return 1  # Pillow applies it itself, in the size and in the pixels
    try:
        # The base class's method: PngImageFile.getexif decodes the image to look behind its pixels.
        value = Image.Image.getexif(opened).get(_ORIENTATION_TAG)
    except Exception as error:
        if not raised_in_pillow(error):
            raise
        return 1  # damaged EXIF is no reason to lose the picture
    return value if isinstance(value, int) and value in _TRANSPOSE else 1


def _check_tile(opened: Image.Image, max_pixels: int) -> None:
    """Refuse a TIFF whose tiles are too large: they are decoded whole, however small the image."""
    tags = getattr(opened, "tag_v2", {})
    width, height = tags.get(_TILE_WIDTH_TAG), tags.get(_TILE_LENGTH_TAG)
    if isinstance(width, int) and isinstance(height, int) and width * height > max_pixels:
        raise SkipSample("too_many_pixels", f"a tile of {height} x {width}")


def _load(opened: Image.Image, info: ImageInfo, scale: int, *, keep_truncated: bool) -> None:
    try:
        opened.load()
    except OSError as error:
        if not keep_truncated or "truncated" not in str(error):
            raise
        # What was decoded before the end is in the image; without tiles Pillow takes it as loaded.
        opened.tile = []  # type: ignore[attr-defined]
        opened.load()
    height, width = info.size
    if info.orientation in _SWAPS_SIDES:
        height, width = width, height
    expected = (-(-width // scale), -(-height // scale))
    if opened.size != expected:
        raise SkipSample(
            "decode_error", f"decoded to {opened.size}, where the header says {expected}"
        )


# Geometry: boxes are (left, top, right, bottom) as in Pillow, in stored pixels

_Edges = tuple[int, int, int, int]


def _stored_box(info: ImageInfo, box: Box | None) -> _Edges:
    """Map a box after EXIF orientation to the pixels as they are stored."""
    height, width = info.size
    top, left, box_height, box_width = box if box is not None else Box(0, 0, height, width)
    rows, cols = (top, top + box_height), (left, left + box_width)
    if info.orientation in _SWAPS_SIDES:
        height, width, rows, cols = width, height, cols, rows
    if info.orientation in _FLIPS_STORED_ROWS:
        rows = height - rows[1], height - rows[0]
    if info.orientation in _FLIPS_STORED_COLS:
        cols = width - cols[1], width - cols[0]
    return cols[0], rows[0], cols[1], rows[1]


def _draft(
    opened: Image.Image, info: ImageInfo, stored: _Edges, grid_pixels: tuple[int, int] | None
) -> int:
    """Let a JPEG be decoded at 1/8, 1/4 or 1/2 where that is enough; return 8, 4, 2 or 1."""
    if grid_pixels is None:
        return 1
    target_height, target_width = grid_pixels
    if info.orientation in _SWAPS_SIDES:
        target_height, target_width = target_width, target_height
    left, top, right, bottom = stored
    for scale in (8, 4, 2):
        # Just above the target instead of twice would move the 99th percentile by 20 levels.
        if (bottom - top) // scale >= 2 * target_height and (right - left) // scale >= (
            2 * target_width
        ):
            width, height = opened.size
            # Pillow picks the largest of 8, 4, 2, 1 not above either side's quotient: this one.
            drafted = opened.draft(None, (width // scale, height // scale))
            return scale if drafted is not None else 1
    return 1


def _scaled(stored: _Edges, scale: int, size: tuple[int, int]) -> _Edges:
    """Scale a box to the reduced image: edges to the nearest pixel, at least one pixel a side."""
    left, top, right, bottom = ((2 * edge + scale) // (2 * scale) for edge in stored)
    return left, top, min(max(right, left + 1), size[0]), min(max(bottom, top + 1), size[1])


# Arguments


def _as_bytes(image: object) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, bytearray | memoryview):
        return bytes(image)
    raise ValueError(
        "an image must be encoded bytes, a PIL image, or a uint8 array or tensor (H, W, 3) or "
        f"(H, W); got {type(image).__name__}. Read a file's bytes with Path(...).read_bytes()."
    )


def _is_jpeg(data: bytes) -> bool:
    return data.startswith(b"\xff\xd8\xff")


def _is_lossless_jpeg(data: bytes) -> bool:
    """Whether the frame header is that of a lossless JPEG, which cannot be decoded reduced."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != _JPEG_SCAN:
        if data[at + 1] in _JPEG_LOSSLESS_FRAMES:
            return True
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return False


def _check_array(image: npt.NDArray[Any] | Tensor) -> npt.NDArray[np.uint8]:
    shape = tuple(image.shape)
    grey = len(shape) == 2
    if str(image.dtype).removeprefix("torch.") != "uint8" or not (
        grey or (len(shape) == 3 and shape[2] == 3)
    ):
        raise ValueError(
            "an array or tensor image must be uint8 of shape (H, W, 3) or (H, W); got "
            f"{image.dtype} {shape}. Scale to 0..255 and cast; permute(1, 2, 0) turns (3, H, W) "
            "into (H, W, 3)."
        )
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
    return np.broadcast_to(array[..., None], (*shape, 3)) if grey else array


def _crop_array(array: npt.NDArray[np.uint8], box: Box | None) -> UInt8[Tensor, "H W 3"]:
    if box is not None:
        array = array[box.top : box.top + box.height, box.left : box.left + box.width]
    # A copy, so that a transform working in place never writes into the caller's image.
    return torch.from_numpy(np.array(array, order="C"))
