"""Kept patches in their places -> `PackedBatch`; the only place that builds `cu_seqlens`."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor
from torch.utils.data import get_worker_info

from packer.batch import BatchStats, PackedBatch
from packer.captions import CaptionTokenizer, pack_text
from packer.plan.drop import kept_indices
from packer.plan.types import ImagePlan

if TYPE_CHECKING:
    from packer.sample import Label


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """One image in its place: its plan, its pixels and its text."""

    plan: ImagePlan
    patches: UInt8[Tensor, "n P"] | None
    """uint8 (num_kept, patch_size * patch_size * 3), or None for an image that failed to decode."""
    caption: str | None = None
    label: "Label | None" = None
    order: int = 0
    """Rank in the order of keys, captions, labels and pooled vectors; where ranks are equal,
    placement decides."""
    num_filled: int = 0
    """Of the plan's tokens, those kept beyond the number drawn, to fill the sequence."""


def assemble(
    sequences: Sequence[Sequence[PlacedImage]],
    *,
    seq_len: int,
    patch_size: int,
    max_images_per_seq: int | None = None,
    tokenizer: CaptionTokenizer | None = None,
    max_text_tokens: int = 24,
    stats: BatchStats | None = None,
) -> PackedBatch:
    """Build the batch; images without patches are removed and their tokens join the padded tail.

    Args:
        sequences: B sequences of images, in their order in the sequence.
        seq_len: L, token places per sequence.
        patch_size: Side of a patch in pixels of a batch without images; else their plans say it.
        max_images_per_seq: E; None takes the largest number of images in a sequence.
        tokenizer: Turns captions into `PackedBatch.captions`; None leaves them as `texts` alone.
        max_text_tokens: Caption tokens kept, the end token included.
        stats: Counts of the samples read and skipped; image and token counts are filled in here.

    Raises:
        ValueError: If only some images of the batch carry a label, or labels differ in kind.
    """
    rows = [[image for image in sequence if image.patches is not None] for sequence in sequences]
    images = sorted((image for row in rows for image in row), key=lambda image: image.order)
    rank = {id(image): index for index, image in enumerate(images)}
    # A batch that loses all its images still has captions, or labels, of the kind the data has.
    everyone = [image for sequence in sequences for image in sequence]
    slots = max_images_per_seq or max(map(len, rows), default=0)
    num_rows = len(rows)
    sizes = {image.plan.patch_size for image in images}
    patch_size = max(sizes, default=patch_size)
    mixed = len(sizes) > 1
    patches = _zero_bytes(num_rows, seq_len, patch_size * patch_size * 3)
    # Copied through numpy: torch's copy is parallel, and its threads would wait for each other.
    places = patches.numpy()
    segment_ids = np.zeros((num_rows, seq_len), np.int32)
    position_ids = np.zeros((num_rows, seq_len, 2), np.int32)
    grid_sizes = np.zeros((num_rows, slots, 2), np.int32)
    image_index = np.full((num_rows, slots), -1, np.int64)
    patch_sizes = np.zeros((num_rows, slots), np.int32)
    lengths: list[int] = []
    segment_images: list[int] = []
    segment_patch_sizes: list[int] = []
    segment_grids: list[tuple[int, int]] = []
    for b, row in enumerate(rows):
        start = 0
        for slot, image in enumerate(row):
            plan = image.plan
            stop = start + plan.num_kept
            assert image.patches is not None
            places[b, start:stop, : 3 * plan.patch_size**2] = image.patches.numpy()
            segment_ids[b, start:stop] = slot + 1
            kept = kept_indices(plan.grid.num_tokens, plan.num_kept, plan.kept_draw)
            position_ids[b, start:stop, 0], position_ids[b, start:stop, 1] = divmod(
                kept, plan.grid.cols
            )
            grid_sizes[b, slot] = plan.grid
            image_index[b, slot] = rank[id(image)]
            lengths.append(plan.num_kept)
            segment_images.append(rank[id(image)])
            patch_sizes[b, slot] = plan.patch_size
            segment_patch_sizes.append(plan.patch_size)
            segment_grids.append((plan.grid.rows, plan.grid.cols))
            start = stop
        if start < seq_len:
            lengths.append(seq_len - start)
            segment_images.append(-1)
            segment_patch_sizes.append(0)
            segment_grids.append((0, 0))
    captioned = any(image.caption is not None for image in everyone)
    texts = tuple(image.caption or "" for image in images) if captioned else None
    captions = None
    if tokenizer is not None and (texts is not None or not images):
        captions = pack_text(tokenizer.encode(texts or (), max_text_tokens))
    counts = BatchStats(
        images=len(images),
        tokens=sum(image.plan.num_kept for image in images),
        tokens_before_drop=sum(image.plan.grid.num_tokens for image in images),
        tokens_filled=sum(image.num_filled for image in images),
        places=num_rows * seq_len,
    )
    return PackedBatch(
        patches=patches,
        patch_size=patch_size,
        segment_ids=torch.from_numpy(segment_ids),
        position_ids=torch.from_numpy(position_ids),
        grid_sizes=torch.from_numpy(grid_sizes),
        image_index=torch.from_numpy(image_index),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        segment_lengths=tuple(lengths),
        segment_images=tuple(segment_images),
        patch_sizes=torch.from_numpy(patch_sizes) if mixed else None,
        segment_patch_sizes=tuple(segment_patch_sizes) if mixed else (),
        segment_grids=tuple(segment_grids),
        keys=tuple(image.plan.key for image in images),
        texts=texts,
        captions=captions,
        labels=_stack_labels(images, everyone),
        stats=counts if stats is None else stats + counts,
    )


def _zero_bytes(*shape: int) -> UInt8[Tensor, "B L P"]:
    """Make zeros; in a `DataLoader` worker in the memory it shares with the consumer.

    The worker would copy them there otherwise, which costs 4 % of the loader's time.
    """
    if get_worker_info() is None or not prod(shape):
        return torch.zeros(shape, dtype=torch.uint8)
    # As torch's own collate function does; new shared memory is zero.
    shared: torch.UntypedStorage = torch.UntypedStorage._new_shared(  # type: ignore[no-untyped-call]
        prod(shape)
    )
    return torch.empty(0, dtype=torch.uint8).set_(shared).view(shape)


def _stack_labels(
    images: Sequence[PlacedImage], everyone: Sequence[PlacedImage]
) -> Int64[Tensor, " N"] | Float32[Tensor, "N C"] | None:
    """Stack the labels of the images; everyone, the broken images included, has the same kind."""
    if all(image.label is None for image in everyone):
        return None
    widths: set[int | None] = set()
    for image in everyone:
        if image.label is None:
            raise ValueError(
                f"either every image of a batch has a label or none has; {image.plan.key!r} has "
                "none. Give it a label or leave labels out."
            )
        widths.add(None if isinstance(image.label, int) else len(image.label))
    if len(widths) != 1:
        kinds = sorted("index" if width is None else f"vector of {width}" for width in widths)
        raise ValueError(
            "labels of a batch must all be class indices or all be vectors of one length; got "
            f"{', '.join(kinds)}."
        )
    labels = [image.label for image in images]
    width = widths.pop()
    if width is None:
        return torch.tensor(labels, dtype=torch.int64)
    return torch.tensor(labels, dtype=torch.float32).reshape(len(labels), width)
