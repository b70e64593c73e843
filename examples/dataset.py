"""An epoch planned at once from known sizes: the same number of batches and the same work a rank.

Both ranks run in this one process; with ``torchrun`` each has a loader like one of these, and
`PackedDataset` and `DistributedSampler` find the number of ranks themselves.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, DistributedSampler

from packer import BatchStats, BetaDrop, PackedBatch, PackerConfig
from packer.dataset import PackedDataset
from packer.plan.balance import attention_cost, imbalance

RANKS = 2


def run(dataset: Sequence[Any], sizes: Any, epochs: int = 2) -> list[list[list[PackedBatch]]]:
    """Return the batches of every rank in every epoch: ``[epoch][rank]`` is a list of batches."""
    config = PackerConfig(patch_size=16, seq_len=256, max_tokens=128, token_drop=BetaDrop())
    packed = PackedDataset(dataset, sizes, config, sequences_per_batch=4, world_size=RANKS)
    loaders = [
        DataLoader(
            packed,
            batch_size=None,  # an item is a batch
            num_workers=1,
            persistent_workers=True,
            sampler=DistributedSampler(packed, RANKS, rank, shuffle=False),
        )
        for rank in range(RANKS)
    ]
    seen = []
    for epoch in range(epochs):
        packed.set_epoch(epoch)  # another order, other tokens; running workers follow
        seen.append([list(loader) for loader in loaders])
    return seen


def segments(batch: PackedBatch) -> list[tuple[int, int]]:
    """Return (length, image) of every segment."""
    return list(zip(batch.segment_lengths, batch.segment_images, strict=True))


def describe(ranks: list[list[PackedBatch]]) -> str:
    """Summarise one epoch; steps that it did not need are left out."""
    steps = [step for step in zip(*ranks, strict=True) if any(b.num_images for b in step)]
    stats = sum((batch.stats for step in steps for batch in step), BatchStats())
    # Segments of image -1 are padded tails.
    costs = [
        [attention_cost([n for n, i in segments(batch) if i >= 0]) for batch in step]
        for step in steps
    ]
    return (
        f"{stats.images} images in {len(steps)} steps of {RANKS} ranks, "
        f"padding {stats.padding:.2%}, imbalance {imbalance(np.array(costs)):.2%}"
    )


if __name__ == "__main__":
    sizes = [(64 + 7 * i % 250, 320 - 5 * i % 230) for i in range(500)]  # heights and widths
    images = [Image.new("RGB", (width, height)) for height, width in sizes]
    dataset = [(image, f"caption {i}") for i, image in enumerate(images)]
    for epoch, ranks in enumerate(run(dataset, sizes)):
        print(f"epoch {epoch}: {describe(ranks)}")
