"""`PackedDataset`: a data set of known sizes -> packed batches, an epoch planned at once."""

import logging
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from time import sleep
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import Dataset

from packer.batch import BatchStats, PackedBatch
from packer.captions import CaptionTokenizer
from packer.config import PackerConfig
from packer.decode import read_size
from packer.errors import SkipSample
from packer.pack import PendingImage, SampleReader, Transform, build_batch
from packer.plan.epoch import EpochPlanner, PlacedEpoch
from packer.plan.image import plan_image
from packer.plan.types import BatchPlan, ImageSize
from packer.sample import Sample, as_sample

logger = logging.getLogger("packer")

_PATIENCE = 60_000  # milliseconds a worker waits for a plan that is being written


class _Part(NamedTuple):
    """The part of an epoch's plan that one batch needs."""

    epoch: int
    sequences: list[list[tuple[int, int]]]
    """(image, its place in the epoch's order) for each image of each sequence."""
    left_out: int


class PackedDataset(Dataset[PackedBatch]):
    """Packed batches from a map-style data set whose image sizes are known.

    An item is a batch; the loader only fetches it:

        packed = PackedDataset(dataset, sizes, config, sequences_per_batch=8)
        loader = DataLoader(packed, batch_size=None, num_workers=4, persistent_workers=True)
        for epoch in range(epochs):
            packed.set_epoch(epoch)
            for batch in loader: ...

    On W ranks add ``sampler=DistributedSampler(packed, shuffle=False)``. Batches g W to g W + W - 1
    are then global step g, one a rank. Its sequences are dealt out so that the ranks' attention
    cost is even (`packer.plan.balance`).

    An epoch is planned from sizes and keys alone, without reading an image, and holds every image
    exactly once. All its batches have the same B and L. Its length is the same in every epoch,
    because samplers store it: where epochs need different numbers of sequences there is room for
    the longest to be expected, and the steps that an epoch does not need, its last ones, are empty
    (N = 0) on every rank. `used_batches` says where they begin, so that
    ``islice(loader, packed.used_batches // world_size)`` leaves them out. The images of an epoch
    that needs still more are left out of this epoch, logged and counted as skipped (``no_room``).

    Items keep no state, so that to resume is to go on at another index: after k steps
    ``sampler=range(k * world_size + rank, len(packed), world_size)``.

    Args:
        dataset: Gives ``dataset[i]`` for i in ``range(len(dataset))``, each item in one of the
            forms of `packer.sample.as_sample`. It may raise `SkipSample` for an item that cannot be
            used; its other errors stop the run.
        sizes: Height and width in pixels of each image, after EXIF orientation: (n, 2) integers.
            `packer.decode.read_size` reads them from headers. An image found to have another size
            is skipped and counted (``size_mismatch``).
        config: What is done to every image. Images it refuses by their size take no place; they are
            counted in the epoch's last batch.
        sequences_per_batch: B.
        keys: Key of each image, which determines its draws; None takes its index. With None the
            samples' own keys are not used; otherwise they must be these.
        tokenizer: Turns captions into ``batch.captions``.
        transform: ``transform(uint8 (H, W, 3), torch.Generator) -> same shape``, after the resize.
        shuffle: Whether each epoch packs the images in an order of its own; else in that of the
            data set.
        world_size: W, ranks that work in step; None asks torch.distributed.
        width: The model's width, which weighs linear against quadratic cost when sequences are
            dealt out to ranks.

    Raises:
        ValueError: If a setting is out of range, ``sizes`` or ``keys`` do not fit the data set, or
            no image can be used; for an item, if a sample is none or has another key than given.
        TooManyFailures: For an item, after ``config.max_failures_in_row`` skipped samples.
        IndexError: For an index out of range.
    """

    def __init__(
        self,
        dataset: Any,
        sizes: Any,
        config: PackerConfig,
        *,
        sequences_per_batch: int,
        keys: Sequence[str] | None = None,
        tokenizer: CaptionTokenizer | None = None,
        transform: Transform | None = None,
        shuffle: bool = True,
        world_size: int | None = None,
        width: int = 384,
    ) -> None:
        if world_size is None:
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            world_size = torch.distributed.get_world_size() if distributed else 1
        for name, value in (
            ("sequences_per_batch", sequences_per_batch),
            ("world_size", world_size),
            ("width", width),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")
        self.dataset, self.config, self.world_size = dataset, config, world_size
        self.sequences_per_batch = sequences_per_batch
        self.tokenizer, self.transform = tokenizer, transform
        if config.separate_patch_sizes:
            raise ValueError(
                'PackedDataset needs patch_mixing="mixed", as ranks share steps whose sequences '
                f'have any patch size; got "uniform" with the sizes {config.separate_patch_sizes}. '
                "Mix them, or take PackedStream or packer.pack for batches of one size."
            )
        checked = _checked_sizes(sizes, dataset)
        if keys is not None and len(keys) != len(checked):
            raise ValueError(
                f"keys must have one entry for each of the {len(checked)} images; got {len(keys)}."
            )
        images, self._refused = _usable(checked, config)
        self._planner = EpochPlanner(
            checked, images, keys, config, shuffle, world_size, sequences_per_batch, width
        )
        self._reader = SampleReader(config)
        first = self._planner.place(0)
        self._num_steps = self._planner.num_steps(first)
        # Shared memory, so that set_epoch reaches workers that are already running.
        self._order = _shared(len(images))
        self._placed = _shared(len(images))
        self._bounds = _shared(self._num_steps * world_size * sequences_per_batch + 1)
        self._header = _shared(4)  # number of writes, odd while one is going on; epoch; used; lost
        self._write(0, first)

    def __len__(self) -> int:
        """Return the number of batches of all ranks in an epoch, a multiple of ``world_size``."""
        return self._num_steps * self.world_size

    @property
    def epoch(self) -> int:
        """The epoch that is planned."""
        return int(self._header[1])

    @property
    def used_batches(self) -> int:
        """Batches that hold this epoch's images; those from here to the end are empty."""
        return int(self._header[2]) * self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Plan another epoch, in workers that are already running too.

        Call it between two passes over the loader, on every rank: batches fetched by a pass that is
        under way would be of the new epoch.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0; got {epoch}.")
        if epoch != self.epoch:
            self._write(epoch, self._planner.place(epoch))

    def plan_of(self, index: int) -> BatchPlan:
        """Return the plan of a batch, without reading an image of it.

        It is what the batch holds if no image is broken; `PackerConfig.fill_leftover` may keep more
        tokens.
        """
        part = self._read_plan(self._checked_index(index))
        return tuple(
            tuple(
                plan_image(
                    self._planner.key(image),
                    self._size(image),
                    self.config,
                    epoch=part.epoch,
                    images_seen=self._planner.images_seen(part.epoch, place),
                )
                for image, place in sequence
            )
            for sequence in part.sequences
        )

    def __getitem__(self, index: int) -> PackedBatch:
        """Read, decode and assemble one batch."""
        index = self._checked_index(index)
        part = self._read_plan(index)
        batch = build_batch(
            [list(self._pending(sequence, part.epoch)) for sequence in part.sequences],
            self.config,
            self._reader,
            tokenizer=self.tokenizer,
            transform=self.transform,
        )
        if index < len(self) - 1:
            return batch
        # What has no place is counted in the last batch, so that an epoch's counts are complete.
        lost = self._refused | ({"no_room": part.left_out} if part.left_out else {})
        counts = BatchStats(samples_read=sum(lost.values()), skipped=lost)
        return replace(batch, stats=batch.stats + counts)

    def _pending(self, sequence: list[tuple[int, int]], epoch: int) -> Iterator[PendingImage]:
        """Read the images of one sequence; those that cannot be used are skipped and counted."""
        for image, place in sequence:
            key = self._planner.key(image)
            try:
                sample = self._sample(image, key)
                info = read_size(sample.image, max_pixels=self.config.max_pixels)
                if info.size != self._size(image):
                    found, planned = (
                        f"{s.height} x {s.width}" for s in (info.size, self._size(image))
                    )
                    raise SkipSample(
                        "size_mismatch", f"image {image} is {found}; sizes[{image}] says {planned}"
                    )
            except SkipSample as error:
                self._reader.skip_unread(error, key)
                continue
            pending = self._reader.read(
                sample,
                epoch=epoch,
                images_seen=self._planner.images_seen(epoch, place),
                ref=(image,),
                info=info,
            )
            if pending is not None:
                yield pending

    def _sample(self, image: int, key: str) -> Sample:
        sample = as_sample(self.dataset[image], key=key)
        if self._planner.keys is not None and sample.key != key:
            raise ValueError(
                f"keys[{image}] must be the key of dataset[{image}] ({sample.key!r}); got {key!r}. "
                "Give the keys in the order of the data set."
            )
        return replace(sample, key=key)

    def _size(self, image: int) -> ImageSize:
        height, width = self._planner.sizes[image].tolist()
        return ImageSize(height, width)

    def _checked_index(self, index: int) -> int:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"a batch index must be in [0, {len(self)}); got {index}.")
        return index

    def _write(self, epoch: int, placed: PlacedEpoch) -> None:
        plan = self._planner.deal(placed, self._num_steps)
        if plan.left_out:
            logger.warning(
                "skipped %d of %d images in epoch %d: no_room in %d batches",
                plan.left_out,
                len(plan.order),
                epoch,
                len(self),
            )
        self._header[0] += 1
        for shared, values in (
            (self._order, plan.order),
            (self._placed, plan.placed),
            (self._bounds, plan.bounds),
        ):
            shared.copy_(torch.from_numpy(values))
        self._header[1:] = torch.tensor([epoch, plan.used_steps, plan.left_out])
        self._header[0] += 1

    def _read_plan(self, index: int) -> _Part:
        """Copy a batch's part of the plan, all of one epoch.

        A pass that was left early may still have batches in work while `set_epoch` writes.
        """
        first = index * self.sequences_per_batch
        for _ in range(_PATIENCE):
            version = int(self._header[0])
            bounds = self._bounds[first : first + self.sequences_per_batch + 1].tolist()
            places = self._placed[bounds[0] : bounds[-1]]
            images = self._order[places].tolist()
            _, epoch, _, left_out = self._header.tolist()
            if version % 2 == 0 and version == int(self._header[0]):
                break
            sleep(0.001)
        else:
            raise RuntimeError("set_epoch must finish in another process; it did not in a minute.")
        pairs = list(zip(images, places.tolist(), strict=True))
        edges = [bound - bounds[0] for bound in bounds]
        sequences = [pairs[a:b] for a, b in pairwise(edges)]
        return _Part(epoch, sequences, left_out)


def _shared(length: int) -> Tensor:
    tensor = torch.zeros(length, dtype=torch.int64)
    tensor.share_memory_()  # type: ignore[no-untyped-call]
    return tensor


def _checked_sizes(sizes: Any, dataset: Any) -> npt.NDArray[np.int64]:
    """Return the sizes as int64 (n, 2), or say what is wrong with them."""
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            "dataset must be map-style, with __len__ and __getitem__; got "
            f"{type(dataset).__name__}. Pack an iterable with packer.pack."
        )
    array = np.asarray(sizes)
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iu":
        raise ValueError(
            "sizes must be integers (n, 2), the height and width of each image; got "
            f"{array.dtype} {array.shape}."
        )
    if len(array) != len(dataset) or not len(array):
        raise ValueError(
            f"sizes must have one row for each of the data set's images; got {len(array)} for "
            f"{len(dataset)} images."
        )
    wrong = np.flatnonzero((array < 1).any(axis=1))
    if wrong.size:
        raise ValueError(
            f"sizes must be positive; got {tuple(array[wrong[0]].tolist())} for image {wrong[0]}. "
            "Leave out images that have no size."
        )
    return array.astype(np.int64)


def _usable(
    sizes: npt.NDArray[np.int64], config: PackerConfig
) -> tuple[npt.NDArray[np.int64], dict[str, int]]:
    """Return the images the configuration accepts by their sizes, and counts of the others."""
    too_many = sizes.prod(axis=1) > config.max_pixels
    limit = config.max_aspect_ratio
    stretched = np.zeros(len(sizes), bool)
    if limit is not None:
        stretched = ~too_many & (sizes.max(axis=1) > limit * sizes.min(axis=1))
    refused = Counter(
        {"too_many_pixels": int(too_many.sum()), "aspect_ratio": int(stretched.sum())}
    )
    refused = +refused
    images = np.flatnonzero(~(too_many | stretched))
    if not images.size:
        raise ValueError(
            f"at least one image must be usable; all {len(sizes)} are refused: {dict(refused)}. "
            "Raise max_pixels or max_aspect_ratio."
        )
    for cause, count in refused.items():
        logger.warning("skipped %d of %d images in every epoch: %s", count, len(sizes), cause)
    return images, dict(refused)
