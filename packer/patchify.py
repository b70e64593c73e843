"""Pixels and a plan in, kept patches out: decode, resize, transform, cut and select.

Pixels stay uint8 from the file to the device. One thread, 640 x 480 photographs, 256 tokens:
`python -m benchmarks image_path` compares this with a plain Pillow chain.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from packer.decode import ImageInfo, decode_rgb
from packer.plan.drop import kept_indices
from packer.plan.types import ImagePlan

Transform = Callable[[Tensor, torch.Generator], Tensor]
"""Keyed augmentation after the resize: uint8 (H, W, 3) and a generator in, the same shape out."""


def resize_uint8(
    pixels: UInt8[Tensor, "H W 3"],
    height: int,
    width: int,
    resample: Literal["bicubic", "bilinear"] = "bicubic",
) -> UInt8[Tensor, "height width 3"]:
    """Resize with torch's antialiased kernels for bytes.

    Args:
        pixels: RGB image.
        height: New height in pixels.
        width: New width in pixels.
        resample: The kernel.

    Returns:
        The resized image, contiguous; ``pixels`` itself where the size already matches, so that an
        image of the right size is never resampled.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    # Adding the batch axis first gives the exact strides of channels_last, for which torch has a
    # kernel that reads and writes interleaved channels (a third faster than permuting first).
    image = pixels[None].permute(0, 3, 1, 2)
    resized = F.interpolate(image, (height, width), mode=resample, antialias=True)
    return resized[0].permute(1, 2, 0).contiguous()


def cut_patches(
    pixels: UInt8[Tensor, "H W 3"], patch_size: int, kept: npt.NDArray[np.int64] | None = None
) -> UInt8[Tensor, "n P"]:
    """Cut an image into square patches and select some of them.

    Args:
        pixels: RGB image whose sides are multiples of ``patch_size``.
        patch_size: Side of a patch in pixels.
        kept: Indices into the row-major grid of patches; None for all.

    Returns:
        One row per patch: values in (patch row, patch column, channel) order.

    Raises:
        ValueError: If a side is no multiple of ``patch_size``.
    """
    height, width = pixels.shape[:2]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"the sides must be multiples of patch_size ({patch_size}); got {height} x {width} "
            "pixels. Resize the image to its grid first."
        )
    rows, cols = height // patch_size, width // patch_size
    # One row of a patch (3 * patch_size bytes) is moved as a single opaque element.
    pieces = pixels.contiguous().numpy().reshape(rows, patch_size, cols, 3 * patch_size)
    pieces = pieces.view(f"V{3 * patch_size}")[..., 0].transpose(0, 2, 1)
    chosen = pieces if kept is None else pieces[kept // cols, kept % cols]
    flat = np.ascontiguousarray(chosen).view(np.uint8)
    return torch.from_numpy(flat.reshape(-1, 3 * patch_size * patch_size))


def image_patches(
    image: object,
    info: ImageInfo,
    plan: ImagePlan,
    *,
    decode: Literal["reduced", "full"] = "reduced",
    resample: Literal["bicubic", "bilinear"] = "bicubic",
    keep_truncated: bool = False,
    transform: Transform | None = None,
) -> UInt8[Tensor, "kept P"]:
    """Execute one image's plan: decode at the size needed, resize, transform, cut and select.

    Args:
        image: Encoded bytes, PIL image, or uint8 array or tensor.
        info: What `packer.decode.read_size` returned for this image.
        plan: What to do.
        decode: ``"reduced"`` or ``"full"``, see `packer.decode.decode_rgb`.
        resample: Kernel of the resize.
        keep_truncated: Keep an image whose end is missing.
        transform: Called on the resized image with a generator seeded by the plan.

    Returns:
        The ``plan.num_kept`` kept patches, in grid order.

    Raises:
        SkipSample: If the data cannot be decoded.
        ValueError: If ``transform`` changes the shape or dtype.
    """
    height, width = plan.grid.rows * plan.patch_size, plan.grid.cols * plan.patch_size
    pixels = decode_rgb(
        image,
        info,
        grid_pixels=(height, width),
        box=plan.box,
        mode=decode,
        keep_truncated=keep_truncated,
    )
    pixels = resize_uint8(pixels, height, width, resample)
    if transform is not None:
        generator = torch.Generator().manual_seed(plan.augment_draw % 2**63)
        pixels = _checked(transform(pixels, generator), pixels, transform)
    all_kept = plan.num_kept == plan.grid.num_tokens
    kept = None if all_kept else kept_indices(plan.grid.num_tokens, plan.num_kept, plan.kept_draw)
    return cut_patches(pixels, plan.patch_size, kept)


def _checked(result: Any, pixels: Tensor, transform: Transform) -> Tensor:
    """Return a transform's result, or say how it breaks the contract."""
    if isinstance(result, Tensor) and (result.dtype, result.shape) == (pixels.dtype, pixels.shape):
        return result
    found = (
        f"{result.dtype} {tuple(result.shape)}"
        if isinstance(result, Tensor)
        else type(result).__name__
    )
    raise ValueError(
        f"a transform must return a uint8 tensor of the shape it was given, {tuple(pixels.shape)}; "
        f"{transform!r} returned {found}. Crops and resizes belong to PackerConfig."
    )
