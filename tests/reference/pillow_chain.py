"""The plain image path: open, convert, bicubic resize to the grid, float32, normalise, patches.

What a straightforward data loader does with Pillow and numpy; imports nothing of ours.
"""

from io import BytesIO
from math import isqrt

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

Array = npt.NDArray[np.float32]


def grid_pixels(width: int, height: int, patch_size: int, max_tokens: int) -> tuple[int, int]:
    """Return (height, width) in pixels: whole patches, at most ``max_tokens``, never enlarged."""
    rows, cols = max(height // patch_size, 1), max(width // patch_size, 1)
    if rows * cols > max_tokens:
        rows = min(max(isqrt(max_tokens * height // width), 1), max_tokens)
        cols = min(max(isqrt(max_tokens * width // height), 1), max_tokens)
    return rows * patch_size, cols * patch_size


def resized(data: bytes, patch_size: int, max_tokens: int) -> npt.NDArray[np.uint8]:
    """Decode in full, apply EXIF, convert to RGB and resize: uint8 (H, W, 3)."""
    with Image.open(BytesIO(data)) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    height, width = grid_pixels(*image.size, patch_size, max_tokens)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def patches(data: bytes, patch_size: int, max_tokens: int) -> Array:
    """Return float32 (n, patch_size * patch_size * 3) in [-1, 1], (row, column, channel) order."""
    values = (resized(data, patch_size, max_tokens).astype(np.float32) / 255 - 0.5) / 0.5
    rows, cols = values.shape[0] // patch_size, values.shape[1] // patch_size
    cut = values.reshape(rows, patch_size, cols, patch_size, 3).transpose(0, 2, 1, 3, 4)
    found: Array = cut.reshape(rows * cols, -1).astype(np.float32, copy=False)
    return found
