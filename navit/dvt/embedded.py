"""A stage's packed batch, checked and embedded: where each image's tokens are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from navit.dvt.resample import Counts, Grid
from navit.model.attention import order_by_length
from navit.model.config import AttentionBackend
from navit.model.transfer import to_device
from navit.model.vision import NaViT, gather_positions, plan_tokens
from packer.batch import PackedBatch


@dataclass(frozen=True, eq=False)
class EmbeddedStage:
    """The T tokens of N images at one stage, before the first block."""

    x: Float[Tensor, "T D"]
    """Tokens, image by image, each row by row."""
    starts: Counts
    """(N,) place of each image's first token."""
    grids: tuple[Grid, ...]
    """Grid of each image."""
    backend: AttentionBackend
    """Attention backend of the batch."""

    @property
    def lengths(self) -> Counts:
        """(N,) tokens of each image."""
        return np.asarray([rows * cols for rows, cols in self.grids], dtype=np.int64)

    def of(self, images: Counts) -> Float[Tensor, "t D"]:
        """Return the tokens of some images, one image after another."""
        index = token_places(self.starts[images], self.lengths[images])
        if len(index) == len(self.x) and bool((np.diff(index) == 1).all()):
            return self.x
        return self.x.index_select(0, to_device(index, self.x.device))


def token_places(starts: Counts, lengths: Counts) -> Counts:
    """Return the places of the tokens of images that start at ``starts``."""
    shift = starts - (np.cumsum(lengths) - lengths)
    places: Counts = np.repeat(shift, lengths) + np.arange(int(lengths.sum()))
    return places


def embed_stage(tower: NaViT, batch: PackedBatch) -> EmbeddedStage:
    """Embed patches and positions, as `NaViT.forward` does.

    Raises:
        ValueError: If tokens of an image were dropped, or the patches do not fit the tower.
    """
    tower.patch_embed.check_patches(batch)
    plan = plan_tokens(batch, tower.config, dtype=tower.norm.weight.dtype)
    grids = batch_grids(batch)
    segments = np.asarray(batch.segment_images, dtype=np.int64)
    lengths, order, _ = order_by_length(batch.segment_lengths, (segments >= 0).tolist())
    starts = np.zeros(batch.num_images, dtype=np.int64)
    for image, length, start in zip(
        segments[order].tolist(), lengths, np.cumsum([0, *lengths]).tolist(), strict=False
    ):
        rows, cols = grids[image]
        if length != rows * cols:
            raise ValueError(
                "Stages that reuse each other's tokens need every token of an image; image "
                f"{batch.keys[image]!r} has {length} of {rows} x {cols}. Set token_drop=NoDrop()."
            )
        starts[image] = start
    positions, sizes = gather_positions(batch, plan)
    x = tower.embed_patches(batch, plan) + tower.pos_embed(positions, sizes)
    return EmbeddedStage(x, starts, grids, plan.attention.backend)


def batch_grids(batch: PackedBatch) -> tuple[Grid, ...]:
    """Return (rows, cols) of each image, in the order of the batch's keys."""
    found = dict(zip(batch.segment_images, batch.segment_grids, strict=True))
    return tuple(found[image] for image in range(batch.num_images))


def check_stages(batches: Sequence[PackedBatch], num_stages: int) -> None:
    """Refuse batches that are not the same images, cheapest stage first.

    Raises:
        ValueError: If there is none, or more than stages, or their keys differ.
    """
    if not 1 <= len(batches) <= num_stages:
        raise ValueError(
            f"There must be a batch for each of the first stages, 1 to {num_stages}; got "
            f"{len(batches)}."
        )
    for number, batch in enumerate(batches[1:], 2):
        if batch.keys != batches[0].keys:
            raise ValueError(
                "The batches of all stages must hold the same images in the same order; the keys "
                f"of stage {number} differ from the first stage's. Pack one list of samples for "
                "every stage (StagedCollator)."
            )


def make_parts(
    stages: Sequence[EmbeddedStage], *, bucketed: bool, prefix: int, max_pairs: int
) -> list[Counts]:
    """Deal the images to parts that go through all stages one part after another.

    Args:
        stages: The stages of a batch.
        bucketed: Whether a part's images must have the same grid at each stage; else all are one.
        prefix: Tokens added to each image's own.
        max_pairs: Most token pairs of a bucketed part's images together, at its largest stage; an
            image that has more is a part by itself.

    Returns:
        The images of each part; together every image once.
    """
    count = len(stages[0].grids)
    if not bucketed:
        return [np.arange(count)]
    buckets: dict[tuple[Grid, ...], list[int]] = {}
    for image, grids in enumerate(zip(*(stage.grids for stage in stages), strict=True)):
        buckets.setdefault(grids, []).append(image)
    parts = []
    for grids, images in buckets.items():
        longest = prefix + max(rows * cols for rows, cols in grids)
        size = max(1, max_pairs // longest**2)
        parts += [np.asarray(images[i : i + size]) for i in range(0, len(images), size)]
    return parts
