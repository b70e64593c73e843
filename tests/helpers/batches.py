"""Packed batches of random images, for tests and benchmarks of the model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from packer.batch import PackedBatch, PackedText


@dataclass(frozen=True)
class RandomImage:
    """The kept patches of one image of random pixels."""

    patches: Tensor
    """uint8 (n, P)."""
    positions: Tensor
    """int32 (n, 2)."""
    grid: tuple[int, int]
    """(rows, cols) before dropping."""

    @property
    def patch_size(self) -> int:
        """Side of its patches in pixels."""
        return round(math.sqrt(self.patches.shape[1] / 3))


def random_image(
    rows: int, cols: int, *, patch_size: int, keep: float = 1.0, generator: torch.Generator
) -> RandomImage:
    """Draw an image of rows x cols patches and keep a random share of them, at least one."""
    kept = max(1, round(keep * rows * cols))
    index = torch.randperm(rows * cols, generator=generator)[:kept].sort().values
    shape = (kept, 3 * patch_size**2)
    return RandomImage(
        patches=torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
        positions=torch.stack([index // cols, index % cols], dim=1).int(),
        grid=(rows, cols),
    )


def random_images(
    count: int,
    *,
    seed: int,
    patch_size: int | Sequence[int] = 4,
    max_side: int = 5,
    drop: bool = True,
) -> list[RandomImage]:
    """Draw images with sides of 1 to max_side patches and, with drop, random shares kept.

    Of several patch sizes each image gets one at random.
    """
    generator = torch.Generator().manual_seed(seed)
    images = []
    for _ in range(count):
        rows, cols = torch.randint(1, max_side + 1, (2,), generator=generator).tolist()
        keep = float(torch.rand((), generator=generator)) if drop else 1.0
        size = patch_size
        if not isinstance(size, int):
            size = size[int(torch.randint(len(size), (), generator=generator))]
        images.append(random_image(rows, cols, patch_size=size, keep=keep, generator=generator))
    return images


def pack_images(
    images: Sequence[RandomImage],
    *,
    patch_size: int | None = None,
    seq_len: int | None = None,
    order: Sequence[int] | None = None,
    captions: PackedText | None = None,
) -> PackedBatch:
    """Place images into sequences, next fit, in the order given (default: their own).

    The i-th image stays the i-th of the batch wherever it is placed. Their patch sizes may differ;
    the largest is the batch's.
    """
    sizes = [image.patch_size for image in images]
    patch_size = patch_size or max(sizes)
    order = range(len(images)) if order is None else order
    longest = max((len(image.patches) for image in images), default=1)
    seq_len = longest if seq_len is None else seq_len
    rows: list[list[int]] = []
    for i in order:
        used = sum(len(images[j].patches) for j in rows[-1]) if rows else seq_len
        if used + len(images[i].patches) > seq_len:
            rows.append([])
        rows[-1].append(i)
    shape, slots = (len(rows), seq_len), max(map(len, rows), default=0)
    patches = torch.zeros(*shape, 3 * patch_size**2, dtype=torch.uint8)
    segment_ids, positions = (
        torch.zeros(shape, dtype=torch.int32),
        torch.zeros(*shape, 2, dtype=torch.int32),
    )
    grids = torch.zeros(len(rows), slots, 2, dtype=torch.int32)
    index = torch.full((len(rows), slots), -1)
    patch_sizes = torch.zeros(len(rows), slots, dtype=torch.int32)
    lengths: list[int] = []
    segment_images: list[int] = []
    for b, row in enumerate(rows):
        start = 0
        for slot, i in enumerate(row):
            stop = start + len(images[i].patches)
            patches[b, start:stop, : images[i].patches.shape[1]] = images[i].patches
            positions[b, start:stop] = images[i].positions
            patch_sizes[b, slot] = sizes[i]
            segment_ids[b, start:stop] = slot + 1
            grids[b, slot], index[b, slot] = torch.tensor(images[i].grid), i
            lengths.append(stop - start)
            segment_images.append(i)
            start = stop
        if start < seq_len:
            lengths.append(seq_len - start)
            segment_images.append(-1)
    batch = PackedBatch(
        patches=patches,
        patch_size=patch_size,
        patch_sizes=None if set(sizes) <= {patch_size} else patch_sizes,
        segment_ids=segment_ids,
        position_ids=positions,
        grid_sizes=grids,
        image_index=index,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        segment_lengths=tuple(lengths),
        segment_images=tuple(segment_images),
        keys=tuple(f"image-{i}" for i in range(len(images))),
        captions=captions,
    )
    batch.check()
    return batch


def with_garbage_in_padding(batch: PackedBatch) -> PackedBatch:
    """Fill the padding with bright pixels and positions, which `PackedBatch.check` would refuse."""
    padding = batch.segment_ids == 0
    return replace(
        batch,
        patches=batch.patches.masked_fill(padding[..., None], 201),
        position_ids=batch.position_ids.masked_fill(padding[..., None], 1_000_003),
    )


def random_text(lengths: Sequence[int], *, vocab_size: int, seed: int) -> PackedText:
    """Draw captions of the lengths given, the i-th for the i-th image."""
    generator = torch.Generator().manual_seed(seed)
    return PackedText(
        ids=torch.randint(0, vocab_size, (sum(lengths),), generator=generator),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        segment_lengths=tuple(lengths),
        image_index=torch.arange(len(lengths)),
    )
