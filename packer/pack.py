"""`pack`: samples in, packed batches out; collator, dataset and stream stand on what is here."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from packer.assemble import PlacedImage, assemble
from packer.batch import BatchStats, PackedBatch
from packer.captions import CaptionTokenizer
from packer.config import PackerConfig
from packer.decode import ImageInfo, check_pixels, read_size
from packer.errors import SkipSample, TooManyFailures
from packer.patchify import image_patches
from packer.plan.fill import fill_leftover
from packer.plan.image import plan_image
from packer.plan.place import Placer
from packer.plan.types import ImagePlan, SequencePlan
from packer.sample import Sample, as_sample

Transform = Callable[[Tensor, torch.Generator], Tensor]
logger = logging.getLogger("packer")


@dataclass(frozen=True, slots=True)
class PendingImage:
    """A planned image waiting for its place; its bytes are still encoded."""

    plan: ImagePlan
    info: ImageInfo
    sample: Sample
    ref: tuple[int, ...] = ()
    """Where a stream finds the sample again: (epoch, shard, offset)."""
    order: int = 0
    """Rank among the batch's images; where ranks are equal, placement decides."""
    images_seen: int = 0
    """Images the run had seen when this one was planned; with the key it makes the plan again."""


def plan_sample(
    sample: Sample,
    config: PackerConfig,
    *,
    epoch: int = 0,
    images_seen: int = 0,
    ref: tuple[int, ...] = (),
    order: int = 0,
    info: ImageInfo | None = None,
) -> PendingImage:
    """Plan a sample's image from its size.

    Args:
        sample: What is to be packed.
        config: What is done to it.
        epoch: Passes over the data before this one.
        images_seen: Images the whole run has seen before this one; only schedules read it.
        ref: Where a stream finds the sample again.
        order: Rank among the batch's images.
        info: Size and orientation where they are known; None reads the image's header.

    Raises:
        SkipSample: If the header cannot be read, or the image is one the configuration refuses.
    """
    if info is None:
        info = read_size(sample.image, max_pixels=config.max_pixels)
    else:
        check_pixels(info.size, config.max_pixels)
    limit = config.max_aspect_ratio
    if limit is not None and max(info.size) > limit * min(info.size):
        raise SkipSample("aspect_ratio", f"{info.size} is beyond {limit}:1")
    plan = plan_image(sample.key, info.size, config, epoch=epoch, images_seen=images_seen)
    return PendingImage(plan, info, sample, ref, order, images_seen)


class SampleReader:
    """Plans samples and keeps count of what was read and skipped.

    A broken sample is skipped with its caption, counted by cause and logged; too many of them
    without a good one between are fatal. Errors in the caller's data types are never skipped.
    """

    def __init__(self, config: PackerConfig) -> None:
        self.config = config
        self._samples_read = 0
        self._skipped: Counter[str] = Counter()
        self._noted: Counter[str] = Counter()
        # Images are decoded long after they are read, many at a time: a good one of one stage says
        # nothing about those that failed in the other.
        self._failed_reads = 0
        self._failed_decodes = 0

    def read(
        self,
        value: Any,
        *,
        epoch: int = 0,
        images_seen: int = 0,
        ref: tuple[int, ...] = (),
        order: int = 0,
        info: ImageInfo | None = None,
    ) -> PendingImage | None:
        """Plan one sample, with the arguments of `plan_sample`; None if it is skipped.

        Raises:
            TooManyFailures: After ``config.max_failures_in_row`` samples in a row that cannot be
                read, or as many that cannot be decoded.
        """
        sample: Sample | None = None
        try:
            sample = as_sample(value, max_pixels=self.config.max_pixels)
            image = plan_sample(
                sample,
                self.config,
                epoch=epoch,
                images_seen=images_seen,
                ref=ref,
                order=order,
                info=info,
            )
        except SkipSample as error:
            self.skip_unread(error, "" if sample is None else sample.key)
            return None
        self._samples_read += 1
        self._failed_reads = 0
        return image

    def skip_unread(self, error: SkipSample, key: str) -> None:
        """Count and log a sample that was lost before it could be planned.

        Raises:
            TooManyFailures: If it is one too many in a row.
        """
        self._samples_read += 1
        self._failed_reads += 1
        self._skip(error, key, self._failed_reads)

    def patches(
        self, image: PendingImage, transform: Transform | None, *, need_caption: bool = False
    ) -> Tensor | None:
        """Decode, resize and cut one image: uint8 (num_kept, P); None if it must be skipped.

        Raises:
            TooManyFailures: If it is one too many in a row.
        """
        try:
            caption = image.sample.caption(image.plan.caption_draw)
            if (
                need_caption
                and self.config.missing_caption == "skip"
                and not (caption or "").strip()
            ):
                raise SkipSample("missing_caption", "others of its batch have one")
            patches = image_patches(
                image.sample.image,
                image.info,
                image.plan,
                decode=self.config.decode,
                resample=self.config.resample,
                keep_truncated=self.config.keep_truncated,
                transform=transform,
            )
        except SkipSample as error:
            self._failed_decodes += 1
            self._skip(error, image.plan.key, self._failed_decodes)
            return None
        self._failed_decodes = 0
        return patches

    def _skip(self, error: SkipSample, key: str, in_row: int) -> None:
        self._skipped[error.cause] += 1
        logger.warning("skipped %s: %s: %s", key or "a sample", error.cause, error.detail)
        if in_row >= self.config.max_failures_in_row:
            raise TooManyFailures(
                f"fewer than {self.config.max_failures_in_row} samples in a row may be skipped; "
                f"the latest is {key or 'a sample'} ({error.cause}: {error.detail}). Check the "
                "data, or raise max_failures_in_row."
            ) from error

    def note(self, cause: str, detail: str) -> None:
        """Count and log a defect that did not cost the sample."""
        self._noted[cause] += 1
        logger.warning("noted %s: %s", cause, detail)

    @property
    def has_counts(self) -> bool:
        """Whether samples were skipped or noted since `take_stats`."""
        return bool(self._skipped or self._noted)

    def take_stats(self) -> BatchStats:
        """Return the counts since the last call."""
        stats = BatchStats(
            samples_read=self._samples_read, skipped=dict(self._skipped), noted=dict(self._noted)
        )
        self._samples_read = 0
        self._skipped.clear()
        self._noted.clear()
        return stats


def build_batch(
    sequences: Sequence[Sequence[PendingImage]],
    config: PackerConfig,
    reader: SampleReader,
    *,
    tokenizer: CaptionTokenizer | None = None,
    transform: Transform | None = None,
) -> PackedBatch:
    """Execute a plan: decode every image of the sequences and assemble the batch.

    Where some images of the batch have a caption, those without one are skipped and counted, or
    kept with "" (`PackerConfig.missing_caption`).
    """
    captioned = any(image.sample.captions for sequence in sequences for image in sequence)
    placed = [
        [
            PlacedImage(
                plan=plan,
                patches=reader.patches(
                    replace(image, plan=plan), transform, need_caption=captioned
                ),
                caption=image.sample.caption(plan.caption_draw),
                label=image.sample.label,
                order=image.order,
                num_filled=plan.num_kept - image.plan.num_kept,
            )
            for image, plan in zip(sequence, _plans(sequence, config), strict=True)
        ]
        for sequence in sequences
    ]
    return assemble(
        placed,
        seq_len=config.seq_len,
        patch_size=config.patch_size,
        max_images_per_seq=config.max_images_per_seq,
        tokenizer=tokenizer,
        max_text_tokens=config.max_text_tokens,
        stats=reader.take_stats(),
    )


def _plans(sequence: Sequence[PendingImage], config: PackerConfig) -> SequencePlan:
    """Return the plans to execute; what waits keeps the drawn lengths, which a state can repeat."""
    plans = tuple(image.plan for image in sequence)
    return fill_leftover(plans, config.seq_len) if config.fill_leftover else plans


@dataclass
class Lane:
    """Images that may share a batch: those that wait for a place, and whole sequences."""

    placer: Placer[PendingImage]
    """Places the images."""
    ready: list[list[PendingImage]] = field(default_factory=list)
    """Complete sequences that wait to be a batch."""


class PackEngine:
    """The streaming engine: planned images wait in a placer, whole sequences wait to be a batch.

    Where a batch has one patch size ("uniform"), images of each size wait in a lane of their own.

    Args:
        config: What is done to every image.
        sequences_per_batch: B.
        tokenizer: Turns captions into ``batch.captions``.
        transform: Keyed pixel transform after the resize.
    """

    def __init__(
        self,
        config: PackerConfig,
        *,
        sequences_per_batch: int,
        tokenizer: CaptionTokenizer | None = None,
        transform: Transform | None = None,
    ) -> None:
        if sequences_per_batch < 1:
            raise ValueError(f"sequences_per_batch must be at least 1; got {sequences_per_batch}.")
        self.config = config
        self.sequences_per_batch = sequences_per_batch
        self.reader = SampleReader(config)
        self.lanes = {
            size: Lane(
                Placer(
                    config.seq_len,
                    placement=config.placement,
                    max_images=config.max_images_per_seq,
                )
            )
            for size in config.separate_patch_sizes or (0,)
        }
        """By the patch size of their images; one lane, 0, where any may share a batch."""
        self._tokenizer = tokenizer
        self._transform = transform

    def add(
        self,
        value: Any,
        *,
        epoch: int = 0,
        images_seen: int = 0,
        ref: tuple[int, ...] = (),
        info: ImageInfo | None = None,
    ) -> None:
        """Plan one sample (see `plan_sample`) and place it; one that is skipped is counted."""
        image = self.reader.read(value, epoch=epoch, images_seen=images_seen, ref=ref, info=info)
        if image is not None:
            lane = self.lane_of(image)
            lane.ready += lane.placer.push(image.plan.num_kept, image)

    def lane_of(self, image: PendingImage) -> Lane:
        """Return where an image waits: with those it may share a batch with."""
        return self.lanes[image.plan.patch_size if self.config.separate_patch_sizes else 0]

    def batches(self) -> Iterator[PackedBatch]:
        """Yield batches of B whole sequences while there are enough."""
        for lane in self.lanes.values():
            while len(lane.ready) >= self.sequences_per_batch:
                yield self._build(lane)

    def finish(self) -> Iterator[PackedBatch]:
        """Place everything that waits and yield it; empty sequences fill each lane's last batch.

        Samples skipped since are counted in a batch without images.
        """
        for lane in self.lanes.values():
            lane.ready += lane.placer.flush()
        # Whole batches of all lanes first: the order in which a stream resumed here gives them.
        yield from self.batches()
        for lane in self.lanes.values():
            if lane.ready:
                yield self._build(lane)
        while self.reader.has_counts:
            yield self._build(next(iter(self.lanes.values())))

    def _build(self, lane: Lane) -> PackedBatch:
        size = self.sequences_per_batch
        sequences, lane.ready = lane.ready[:size], lane.ready[size:]
        missing = size - len(sequences)
        return build_batch(
            [*sequences, *([] for _ in range(missing))],
            self.config,
            self.reader,
            tokenizer=self._tokenizer,
            transform=self._transform,
        )


def pack(
    samples: Iterable[Any],
    config: PackerConfig,
    *,
    sequences_per_batch: int,
    tokenizer: CaptionTokenizer | None = None,
    transform: Transform | None = None,
    epoch: int = 0,
    images_seen: int = 0,
) -> Iterator[PackedBatch]:
    """Pack any iterable of samples into batches of ``sequences_per_batch`` dense sequences.

    Args:
        samples: Mappings with ``image`` and any of ``caption``, ``label``, ``key``; or pairs.
        config: What is done to every image.
        sequences_per_batch: B; the last batch is filled up with empty sequences.
        tokenizer: Turns captions into ``batch.captions``.
        transform: ``transform(uint8 (H, W, 3), torch.Generator) -> same shape``, after the resize.
        epoch: Passes over the data before this one; other epochs draw other crops and tokens.
        images_seen: Images the run has seen before these; schedules (`ScheduledDrop`) go on there.

    Returns:
        Batches in placement order. Every sample is in exactly one batch or counted as skipped.
        Samples skipped after the last image are counted in a final batch without images.

    Raises:
        ValueError: At once if a setting is out of range; on the way if a sample is none.
        TooManyFailures: After ``config.max_failures_in_row`` skipped samples in a row.
    """
    engine = PackEngine(
        config,
        sequences_per_batch=sequences_per_batch,
        tokenizer=tokenizer,
        transform=transform,
    )
    return _run(engine, samples, epoch, images_seen)


def _run(
    engine: PackEngine, samples: Iterable[Any], epoch: int, images_seen: int
) -> Iterator[PackedBatch]:
    for seen, sample in enumerate(samples, images_seen):
        engine.add(sample, epoch=epoch, images_seen=seen)
        yield from engine.batches()
    yield from engine.finish()
