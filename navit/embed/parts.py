"""Chunks of images -> packed parts, in this process or in those of a `DataLoader`.

A chunk is packed apart, so its batches, and with them its vectors to the last bit, depend on its
own images alone: not on the number of processes, nor on where a run was stopped and continued.
"""

import multiprocessing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from packer.assemble import PlacedImage, assemble
from packer.batch import PackedBatch
from packer.config import PackerConfig
from packer.errors import SkipSample
from packer.pack import plan_sample
from packer.patchify import image_patches
from packer.plan.place import Placer
from packer.sample import Sample, as_sample

OnError = Literal["raise", "nan"]
"""What `navit.embed_images` does with an image that cannot be read."""


class Item(NamedTuple):
    """One image of a chunk."""

    key: str
    """What it is called in the output."""
    image: Any
    """Whatever `read_image` takes, or the `SkipSample` it was lost to."""


@dataclass(frozen=True, order=True)
class Failure:
    """An image that has no vector."""

    index: int
    """Its place in its chunk, from 0; for `navit.embed_images`, in the input."""
    key: str
    """What it is called."""
    cause: str
    """Short name that is counted, such as ``"decode_error"``."""
    detail: str
    """What was found."""


@dataclass(frozen=True)
class Part:
    """A packed batch with what is known of its images."""

    chunk: int
    """Number of the chunk."""
    batch: PackedBatch | None
    """Its images in the order of `indices`; None at the end of a chunk, or where it is let go."""
    indices: tuple[int, ...]
    """Place of each image of the batch in its chunk."""
    keys: tuple[str, ...]
    """Key of each image of the batch."""
    failures: tuple[Failure, ...]
    """Images that failed since the previous part."""
    is_last: bool = False
    """Whether the chunk ends here."""

    def pin_memory(self) -> "Part":
        """Copy the pixels to page-locked memory (called by `DataLoader(pin_memory=True)`)."""
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())


@runtime_checkable
class Chunk(Protocol):
    """Consecutive inputs that are packed apart."""

    def read(self) -> Iterator[Item]:
        """Yield the images, in order; what cannot be read comes as `SkipSample`."""


def read_image(value: Any, key: str) -> Sample:
    """Take an image of any kind: as in `packer.sample.as_sample`, or alone, or a path as a string.

    Raises:
        SkipSample: If there is no image, or its file cannot be read.
        ValueError: If it is nothing an image can be.
    """
    if isinstance(value, Sample):
        return value
    is_file = isinstance(value, Mapping) and bool(value) and set(value) <= {"bytes", "path"}
    is_sample = isinstance(value, Mapping) and not is_file
    is_pair = isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)
    if is_sample or is_pair:
        return as_sample(value, key=key)
    image = Path(value) if isinstance(value, str) else value
    return as_sample({"image": image, "key": key})


def check_images(images: Any, on_error: OnError) -> None:
    """Refuse a single image, which is often a sequence too, of rows or bytes.

    Raises:
        ValueError: If ``images`` is no collection of images, or ``on_error`` is unknown.
    """
    if on_error not in get_args(OnError):
        raise ValueError(f"on_error must be 'raise' or 'nan'; got {on_error!r}.")
    many = isinstance(images, Iterable) and not isinstance(images, str | bytes | Mapping)
    if isinstance(images, np.ndarray | Tensor):  # (H, W, 3) would be H grey images
        many = images.ndim == 4
    if not many:
        what = type(images).__name__
        shape = f" {tuple(images.shape)}" if isinstance(images, np.ndarray | Tensor) else ""
        raise ValueError(
            f"images must be several, such as a list; got {what}{shape}. Put a single image into a "
            "list; an array of several must have the shape (N, H, W, 3)."
        )


def pack_chunk(
    number: int, items: Iterable[Item], packing: PackerConfig, *, batch_tokens: int
) -> Iterator[Part]:
    """Pack a chunk's images, reading no further ahead than the placement's window and a batch.

    An image is decoded when it is read: what waits is its patches, which `max_tokens` bounds, and
    not its file, which nothing bounds.

    Args:
        number: Number of the chunk, for the parts.
        items: Its images.
        packing: What is done to every image.
        batch_tokens: Token places of a batch; at least one sequence.

    Yields:
        A part for each batch, and one without a batch at the end.

    Raises:
        ValueError: If an item is nothing an image can be.
    """
    placer: Placer[tuple[int, str, PlacedImage]] = Placer(
        packing.seq_len, placement=packing.placement
    )
    ready: list[list[tuple[int, str, PlacedImage]]] = []
    failures: list[Failure] = []
    rows = max(batch_tokens // packing.seq_len, 1)

    def build() -> Part:
        images = [image for sequence in ready[:rows] for image in sequence]
        batch = assemble(
            [[placed for _, _, placed in sequence] for sequence in ready[:rows]],
            seq_len=packing.seq_len,
            patch_size=packing.patch_size,
        )
        del ready[:rows]
        indices, keys = tuple(i for i, _, _ in images), tuple(key for _, key, _ in images)
        part = Part(number, batch, indices, keys, tuple(failures))
        failures.clear()
        return part

    for index, item in enumerate(items):
        try:
            placed = _decode(index, item, packing)
        except SkipSample as error:
            failures.append(Failure(index, item.key, error.cause, error.detail))
            continue
        ready += placer.push(placed.plan.num_kept, (index, item.key, placed))
        while len(ready) >= rows:
            yield build()
    ready += placer.flush()
    while ready:
        yield build()
    yield Part(number, None, (), (), tuple(failures), is_last=True)


def _decode(index: int, item: Item, packing: PackerConfig) -> PlacedImage:
    if isinstance(item.image, SkipSample):
        raise item.image
    sample = read_image(item.image, str(index))
    image = plan_sample(sample, packing)
    patches = image_patches(
        sample.image,
        image.info,
        image.plan,
        decode=packing.decode,
        resample=packing.resample,
        keep_truncated=packing.keep_truncated,
    )
    return PlacedImage(image.plan, patches)


class ChunkParts(IterableDataset[Part]):
    """The parts of a list of chunks; each process takes the next chunk that none has taken.

    Args:
        chunks: All chunks of the run.
        packing: What is done to every image.
        batch_tokens: Token places of a batch.
        first: Number of the first chunk that is read.
    """

    def __init__(
        self, chunks: Sequence[Chunk], packing: PackerConfig, *, batch_tokens: int, first: int = 0
    ) -> None:
        self._chunks, self._packing, self._batch_tokens = chunks, packing, batch_tokens
        self._next = multiprocessing.Value("q", first)

    def _take(self) -> int:
        with self._next.get_lock():
            number: int = self._next.value
            self._next.value = number + 1
        return number

    def __iter__(self) -> Iterator[Part]:
        while (number := self._take()) < len(self._chunks):
            items = self._chunks[number].read()
            yield from pack_chunk(number, items, self._packing, batch_tokens=self._batch_tokens)


def load_parts(
    chunks: Sequence[Chunk],
    packing: PackerConfig,
    *,
    batch_tokens: int,
    workers: int,
    first: int = 0,
    pin_memory: bool = False,
) -> Iterable[Part]:
    """Read, decode and pack chunks in worker processes.

    The parts of one chunk come in their order, those of several chunks mixed: a process that is
    slow holds no other one up.
    """
    parts = ChunkParts(chunks, packing, batch_tokens=batch_tokens, first=first)
    workers = min(workers, len(chunks) - first)
    if workers < 1:
        return parts
    return DataLoader(
        parts,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        in_order=False,
        worker_init_fn=_quiet_worker,
    )


def _quiet_worker(worker: int) -> None:
    """Leave Ctrl-C to the main process, and decode on one thread: the others decode too."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
