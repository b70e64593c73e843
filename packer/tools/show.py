"""`python -m packer show`: a plan, or a real batch, as a picture and in the terminal."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from packer.batch import PackedBatch
from packer.config import PackerConfig
from packer.logical_stream import Need
from packer.plan.drop import BetaDrop
from packer.plan.fill import fill_leftover
from packer.plan.image import plan_image
from packer.plan.place import Placer
from packer.plan.show import plan_text
from packer.plan.simulate import laion_sizes
from packer.plan.types import ImagePlan, ImageSize, SequencePlan
from packer.stream import PackedStream
from packer.tally import tally_text
from packer.tools.sources import Shards, read_size_list


@dataclass(frozen=True)
class Show:
    """Show a plan of image sizes, or one real batch of shards."""

    shards: Shards = ()
    """Tar shards a batch is read from; none: a plan of sizes is shown, without pixels."""
    sizes: Path | None = None
    """A size list to plan: .tsv or .csv with height and width, or a .npy of shape (n, 2); None
    draws sizes from the fit to LAION-400M."""
    sequences: int = 8
    """B, sequences of the plan or the batch."""
    batch: int = 0
    """Which batch of the shards is shown, from 0."""
    shuffle: bool = False
    """Whether the shards and samples (within 1,024) or a list's sizes come in shuffled order."""
    need: Need = None
    """What a sample must have."""
    config: Annotated[PackerConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: PackerConfig(
            seq_len=512, max_tokens=256, token_drop=BetaDrop(0.25, 0.4)
        )
    )
    """What is done to every image."""
    out: Path = Path("runs/packer/show.png")
    """Where the picture goes."""

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.batch < 0:
            raise ValueError(
                "sequences must be at least 1 and batch at least 0; got "
                f"{self.sequences} and {self.batch}."
            )
        if self.shards and self.sizes is not None:
            raise ValueError("show reads a size list or shards; got both. Leave one out.")

    def run(self) -> int:
        """Print the sequences and draw the picture."""
        from packer.report import batch_text, draw_batch, draw_plan  # matplotlib takes a second

        if self.shards:
            batch = self.read_batch()
            print(batch_text(batch, width=48))
            print("\n" + tally_text(batch.stats))
            path = draw_batch(batch, self.out, max_sequences=self.sequences)
        else:
            sequences = list(islice(self.plan(), self.sequences))
            print(plan_text(sequences, self.config.seq_len, width=48))
            path = draw_plan(sequences, self.config.seq_len, self.out, max_sequences=self.sequences)
        print(f"\npicture: {path}")
        return 0

    def read_batch(self) -> PackedBatch:
        """Read the batch asked for.

        Raises:
            ValueError: If the shards hold fewer batches.
        """
        stream = PackedStream(
            list(self.shards),
            self.config,
            sequences_per_batch=self.sequences,
            need=self.need,
            epochs=1,
            num_streams=1,
            shuffle_shards=self.shuffle,
            shuffle_window=1024 if self.shuffle else 1,
            rank=0,
            world_size=1,
        )
        count = 0
        for count, batch in enumerate(stream, start=1):
            if count > self.batch:
                return batch
        raise ValueError(f"batch must be below {count}, the batches there are; got {self.batch}.")

    def plan(self) -> Iterator[SequencePlan]:
        """Plan the sizes and yield the sequences they fill; drawn sizes never end."""
        config = self.config
        apart = config.separate_patch_sizes
        placers = {
            size: Placer[ImagePlan](
                config.seq_len, placement=config.placement, max_images=config.max_images_per_seq
            )
            for size in apart or (0,)
        }
        for index, size in enumerate(self._sizes()):
            image = plan_image(f"image {index}", size, config, images_seen=index)
            placer = placers[image.patch_size if apart else 0]
            yield from map(self._complete, placer.push(image.num_kept, image))
        for placer in placers.values():
            yield from map(self._complete, placer.flush())

    def _complete(self, images: list[ImagePlan]) -> SequencePlan:
        sequence = tuple(images)
        if self.config.fill_leftover:
            return fill_leftover(sequence, self.config.seq_len)
        return sequence

    def _sizes(self) -> Iterator[ImageSize]:
        if self.sizes is not None:
            sizes = read_size_list(self.sizes).sizes
            order = np.arange(len(sizes))
            if self.shuffle:
                order = np.random.default_rng(self.config.seed).permutation(len(sizes))
            yield from (ImageSize(*size) for size in sizes[order].tolist())
            return
        seed = self.config.seed
        while True:
            yield from (ImageSize(*size) for size in laion_sizes(1000, seed).tolist())
            seed += 1
