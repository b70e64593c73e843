"""`PackingCollator`: plug packing into a `DataLoader` one already has."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from packer.batch import PackedBatch
from packer.captions import CaptionTokenizer
from packer.config import PackerConfig
from packer.pack import SampleReader, build_batch
from packer.plan.place import pack_lengths


class PackingCollator:
    """Pack the samples of one mini-batch: ``DataLoader(..., collate_fn=PackingCollator(config))``.

    Keys, captions, labels and pooled vectors come in the samples' order; a sample that cannot be
    decoded is left out of all of them and counted in ``batch.stats.skipped``. As few sequences are
    used as the placement strategy needs, so B varies and the last sequence may be part empty.

    Args:
        config: What is done to every image.
        tokenizer: Turns captions into ``batch.captions``.
        transform: ``transform(uint8 (H, W, 3), torch.Generator) -> same shape``, applied after the
            resize; its generator is keyed by the sample.

    Raises:
        ValueError: If ``config`` wants several patch sizes in batches of one size ("uniform").
    """

    def __init__(
        self,
        config: PackerConfig,
        *,
        tokenizer: CaptionTokenizer | None = None,
        transform: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    ) -> None:
        if config.separate_patch_sizes:
            raise ValueError(
                'PackingCollator needs patch_mixing="mixed", as it makes one batch of all samples; '
                f'got "uniform" with the patch sizes {config.separate_patch_sizes}. Mix them, or '
                "take PackedStream or packer.pack for batches of one size."
            )
        self.config = config
        self.tokenizer = tokenizer
        self.transform = transform
        self._reader = SampleReader(config)
        # Shared memory, so that set_epoch reaches workers that are already running.
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]
        self._images_seen = torch.zeros((), dtype=torch.int64)
        self._images_seen.share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Draw other crops, resolutions and tokens from now on, in running workers too."""
        self._epoch.fill_(epoch)

    def set_progress(self, images_seen: int) -> None:
        """Tell schedules (`ScheduledDrop`) how many images the run has seen, in workers too."""
        self._images_seen.fill_(images_seen)

    def __call__(self, samples: Sequence[Any]) -> PackedBatch:
        """Pack samples (mappings or pairs, see `packer.sample.as_sample`) into one batch."""
        epoch = int(self._epoch.item())
        seen = int(self._images_seen.item())
        read = (
            self._reader.read(sample, epoch=epoch, images_seen=seen, order=i)
            for i, sample in enumerate(samples)
        )
        images = [image for image in read if image is not None]
        sequences = pack_lengths(
            [image.plan.num_kept for image in images],
            self.config.seq_len,
            max_images=self.config.max_images_per_seq,
            **asdict(self.config.placement),
        )
        return build_batch(
            [[images[i] for i in sequence] for sequence in sequences] or [[]],
            self.config,
            self._reader,
            tokenizer=self.tokenizer,
            transform=self.transform,
        )
