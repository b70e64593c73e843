"""Pillow, contained: its exceptions, warnings, plugins and colour modes.

Exceptions on bad data become `SkipSample`, warnings about single files are silenced, and Pillow's
own size limit is replaced by the one `packer.decode` is asked for.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from threading import Lock

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError, _imaging

from packer.errors import SkipSample

# Formats of web images. A closed list, because Pillow otherwise tries every plugin it has, and
# among these is one that runs Ghostscript on whatever starts like PostScript.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000")


class _Quiet:
    """Silences Pillow's warnings and sets its size limit while any thread is inside.

    Warning filters and ``Image.MAX_IMAGE_PIXELS`` belong to the process, so the first thread in
    saves them and the last one out restores them. Of several limits the highest holds.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._filters = warnings.catch_warnings()
        self._limit_before: int | None = None

    @contextmanager
    def __call__(self, max_pixels: int | None) -> Iterator[None]:
        self._enter(max_pixels)
        try:
            yield
        finally:
            self._leave()

    def _enter(self, max_pixels: int | None) -> None:
        # Pillow refuses what is above twice its limit.
        limit = None if max_pixels is None else (max_pixels + 1) // 2
        with self._lock:
            if self._inside == 0:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")
                self._limit_before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, limit
            elif Image.MAX_IMAGE_PIXELS is not None:
                higher = None if limit is None else max(limit, Image.MAX_IMAGE_PIXELS)
                Image.MAX_IMAGE_PIXELS = higher
            self._inside += 1

    def _leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                Image.MAX_IMAGE_PIXELS = self._limit_before
                self._filters.__exit__(None, None, None)


_quiet = _Quiet()


@contextmanager
def reading(max_pixels: int | None = None) -> Iterator[None]:
    """Turn what Pillow raises on bad data into `SkipSample`; let every other error pass.

    Args:
        max_pixels: Pixels an image may have (``"too_many_pixels"``); None sets no limit. Some
            plugins allocate a frame while they open a file, before its size can be asked for.
    """
    try:
        with _quiet(max_pixels):
            yield
    except (SkipSample, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise SkipSample("too_many_pixels", str(error).partition(",")[0]) from error
    except Exception as error:
        if not raised_in_pillow(error):
            raise
        raise SkipSample("decode_error", f"{type(error).__name__}: {error}") from error


def raised_in_pillow(error: Exception) -> bool:
    """Whether an exception passed through Pillow's code, so that the data is at fault."""
    # Plugins raise nearly everything (OSError, SyntaxError, struct.error, IndexError, ...), so the
    # place tells data errors from ours better than the type does.
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "PIL":
            return True
        frame = frame.tb_next
    return False


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def open_image(data: bytes) -> Image.Image:
    """Open encoded bytes without decoding them.

    Raises:
        SkipSample: ``"decode_error"`` if they are no image of a known format.
    """
    try:
        return Image.open(BytesIO(data), formats=_formats())
    except UnidentifiedImageError as error:  # whose message shows the buffer, not the data
        start = f"{len(data)} bytes that start with {data[:16]!r}"
        raise SkipSample("decode_error", f"no image of a known format: {start}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: transparency on white, more than 8 bits scaled to 8."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_8_bits(image)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":  # premultiplied; Pillow converts it to its plain twin only
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    matted = Image.new("RGB", rgba.size, (255, 255, 255))
    matted.paste(rgba, mask=rgba.getchannel("A"))
    return matted


def rgb_pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Copy the pixels of a loaded RGB image out in one piece: uint8 (H, W, 3), read-only.

    `numpy.asarray` gets them from Pillow in pieces of 64 KB, which are then joined: a second copy
    of everything, 3 % of the time from bytes to patches.
    """
    width, height = image.size
    encoder = _imaging.raw_encoder("RGB", "RGB")
    encoder.setimage(image.im, (0, 0, width, height))
    _, _, data = encoder.encode(3 * width * height)
    return np.frombuffer(data, np.uint8).reshape(height, width, 3)


def _to_8_bits(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Scale 16-bit, 32-bit and floating-point grey to 8 bits without clipping.

    Whole numbers within 16 bits keep their high byte, as Pillow does with 16-bit colour. Wider ones
    are scaled from their own range, floating-point ones from [0, 1], [0, 255] or [0, 65535],
    whichever is the first that holds them all, else from their own range. Infinities count as the
    largest or smallest finite value, NaN as 0.
    """
    values = np.asarray(image)
    if image.mode == "F":
        values = values.astype(np.float64)
        finite = values[np.isfinite(values)]
        ends = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
        values = np.nan_to_num(values, neginf=ends[0], posinf=ends[1])
    low, high = values.min(), values.max()
    scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    full = next((scale for scale in scales if low >= 0 and high <= scale), None)
    if full is None:
        offset, full = float(low), float(high) - float(low)
        grey = np.rint((values - offset) * (255 / (full or 1.0)))
    elif image.mode == "F":
        grey = np.rint(values * (255 / full))
    else:
        grey = values.astype(np.uint16) >> 8
        key = image.info.get("transparency")
        if isinstance(key, int):
            grey[values == key] = 255  # a colour key is transparent, hence white
    return grey.astype(np.uint8)
