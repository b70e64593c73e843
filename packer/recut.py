"""The images of a packed batch cut into patches of another size."""

from dataclasses import replace

import torch
from torch import Tensor

from packer.assemble import PlacedImage, assemble
from packer.batch import PackedBatch
from packer.patchify import cut_patches, resize_uint8
from packer.plan.place import pack_lengths
from packer.plan.resize import plan_resize
from packer.plan.types import Grid, ImagePlan, ImageSize


def recut(batch: PackedBatch, patch_size: int, *, max_tokens: int | None = None) -> PackedBatch:
    """Return the same images in patches of another size, as a teacher may need them.

    Each image is put together from its patches. Where its sides are no multiples of the new size,
    or where it has more than ``max_tokens`` patches of it, it is resized as a new image would be
    (`packer.plan.resize.plan_resize`); else its pixels stay what they are.

    Args:
        batch: On the CPU, every token kept.
        patch_size: Side of a patch in pixels.
        max_tokens: Token budget of an image; None sets no limit.

    Returns:
        A batch of the same images in the same order, with their keys, texts, captions, labels and
        the batch's counts. Its sequences are as long as the batch's, or as its longest image. The
        batch itself where all its images have that patch size.

    Raises:
        ValueError: If an image has lost tokens, or a number is not positive.
    """
    if patch_size < 1 or (max_tokens is not None and max_tokens < 1):
        raise ValueError(
            f"patch_size and max_tokens must be positive; got {patch_size} and {max_tokens}."
        )
    if batch.patch_sizes is None and batch.patch_size == patch_size and max_tokens is None:
        return batch
    images = [
        _placed(pixels, key, patch_size, max_tokens)
        for pixels, key in zip(join_images(batch), batch.keys, strict=True)
    ]
    lengths = [image.plan.num_kept for image in images]
    seq_len = max([batch.seq_len, *lengths])
    rows = pack_lengths(lengths, seq_len, strategy="best_fit")
    ordered = [replace(image, order=order) for order, image in enumerate(images)]
    cut = assemble(
        [[ordered[i] for i in row] for row in rows] or [[]], seq_len=seq_len, patch_size=patch_size
    )
    return replace(
        cut,
        texts=batch.texts,
        captions=batch.captions,
        labels=batch.labels,
        stats=batch.stats,
        state=batch.state,
    )


def join_images(batch: PackedBatch) -> list[Tensor]:
    """Put the images of a batch together again: uint8 (height, width, 3), in the keys' order.

    Raises:
        ValueError: If an image has lost tokens.
    """
    sizes = batch.segment_patch_sizes or (batch.patch_size,) * len(batch.segment_lengths)
    parts = batch.patches.flatten(0, 1).split_with_sizes(list(batch.segment_lengths))
    found: list[Tensor] = [torch.empty(0)] * batch.num_images
    segments = zip(batch.segment_images, batch.segment_grids, sizes, parts, strict=True)
    for image, (rows, cols), side, patches in segments:
        if image < 0:
            continue
        if len(patches) != rows * cols:
            raise ValueError(
                f"an image can be put together only where every patch was kept; "
                f"{batch.keys[image]!r} has {len(patches)} of {rows * cols}. Pack with NoDrop(), "
                "or take a model that takes the batch's own patches."
            )
        tiles = patches[:, : 3 * side**2].reshape(rows, cols, side, side, 3)
        found[image] = tiles.permute(0, 2, 1, 3, 4).reshape(rows * side, cols * side, 3)
    return found


def _placed(pixels: Tensor, key: str, patch_size: int, max_tokens: int | None) -> PlacedImage:
    height, width = pixels.shape[:2]
    size = ImageSize(height, width)
    whole = max(height // patch_size, 1) * max(width // patch_size, 1)
    budget = whole if max_tokens is None else max_tokens
    grid = plan_resize(size, patch_size=patch_size, max_tokens=budget)
    resized = resize_uint8(pixels, grid.rows * patch_size, grid.cols * patch_size)
    patches = cut_patches(resized, patch_size)
    return PlacedImage(_plan(key, size, grid, patch_size), patches)


def _plan(key: str, size: ImageSize, grid: Grid, patch_size: int) -> ImagePlan:
    return ImagePlan(
        key=key,
        size=size,
        box=None,
        grid=grid,
        patch_size=patch_size,
        num_kept=grid.num_tokens,
        kept_draw=0,
        augment_draw=0,
        caption_draw=0,
    )
