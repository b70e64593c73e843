"""One pass of a cascade over images: lines of waiting images, batches, answers in input order."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from navit.cascade.stage import Stage, max_probability
from navit.embed.parts import read_image
from navit.evaluate.encode import evaluating, inference
from packer.assemble import PlacedImage, assemble
from packer.batch import BatchStats
from packer.decode import ImageInfo
from packer.errors import SkipSample
from packer.pack import PendingImage, SampleReader
from packer.plan.place import Placer
from packer.plan.types import ImagePlan
from packer.sample import Label, Sample


class Answer(NamedTuple):
    """What a cascade says of one image."""

    place: int
    """Where it is in the input, from 0."""
    key: str
    """Its key; its place where it has none, or cannot be read."""
    label: Label | None
    """Its label, where it has one."""
    stage: int
    """The stage it left at, from 0; -1 where it could not be read."""
    logits: Tensor | None
    """(C,) class logits of that stage, on the CPU; None where it could not be read."""
    confidence: float
    """Largest probability."""
    tokens: tuple[int, ...]
    """Tokens it had at each of the K stages; 0 where it was not run."""
    plan: ImagePlan | None
    """Size, grid and patch size at the last stage it was run at."""


@dataclass(frozen=True)
class CascadeStats:
    """Counts and times of a pass."""

    stages: tuple[BatchStats, ...]
    """Images, tokens, padding and skipped samples of each stage."""
    read_seconds: float = 0.0
    """Waiting for the source of the images."""
    pack_seconds: float = 0.0
    """Decoding, resizing and packing."""
    model_seconds: float = 0.0
    """The networks."""

    @property
    def images(self) -> int:
        """Images the first stage has seen."""
        return self.stages[0].images

    @property
    def images_per_second(self) -> float:
        """Images/s, decoding and packing included, waiting for their source not."""
        return self.images / max(self.pack_seconds + self.model_seconds, 1e-9)

    @property
    def model_images_per_second(self) -> float:
        """Images/s of the networks alone."""
        return self.images / max(self.model_seconds, 1e-9)


@dataclass(slots=True)
class _Image:
    """An image on its way; it keeps its source until it leaves."""

    index: int
    key: str
    tokens: list[int]
    sample: Sample | None = None
    label: Label | None = None
    info: ImageInfo | None = None
    plan: ImagePlan | None = None
    stage: int = -1
    waits_at: int = 0
    logits: Tensor | None = None
    confidence: float = 0.0
    left: bool = False

    def leave(self) -> None:
        self.left, self.sample = True, None

    def answer(self) -> Answer:
        return Answer(
            self.index,
            self.key,
            self.label,
            self.stage,
            self.logits,
            self.confidence,
            tuple(self.tokens),
            self.plan,
        )


@dataclass
class _Line:
    """What waits for one stage: decoded images in the placer, whole sequences for a batch."""

    stage: Stage
    placer: Placer[tuple[_Image, PlacedImage]]
    reader: SampleReader
    ready: list[list[tuple[_Image, PlacedImage]]] = field(default_factory=list)
    stats: BatchStats = field(default_factory=BatchStats)

    @classmethod
    def of(cls, stage: Stage) -> "_Line":
        packing = stage.packing
        placer: Placer[tuple[_Image, PlacedImage]] = Placer(
            packing.seq_len, placement=packing.placement, max_images=packing.max_images_per_seq
        )
        return cls(stage, placer, SampleReader(packing))

    def plan(self, image: _Image) -> PendingImage | None:
        assert image.sample is not None
        pending = self.reader.read(image.sample, info=image.info)
        if pending is not None:
            image.info = pending.info
        return pending

    def push(self, image: _Image, pending: PendingImage) -> bool:
        """Decode and place an image; False where it is broken."""
        patches = self.reader.patches(pending, None)
        if patches is None:
            return False
        image.plan = pending.plan
        placed = PlacedImage(pending.plan, patches, order=image.index)
        self.ready += self.placer.push(pending.plan.num_kept, (image, placed))
        return True


class CascadeRun(Iterator[Answer]):
    """The answers of one pass, in input order; made by `Cascade.run`.

    What waits is bounded: for each stage the placement's window and a batch, and no more than
    ``max_held`` answers that wait for an earlier image.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        thresholds: Sequence[float],
        samples: Iterable[Any],
        *,
        sequences_per_batch: int,
        device: torch.device,
        autocast_dtype: torch.dtype | None,
        max_held: int,
    ) -> None:
        self._lines = [_Line.of(stage) for stage in stages]
        self._thresholds = (*thresholds, 0.0)
        self._source = iter(samples)
        self._rows, self._max_held = sequences_per_batch, max_held
        self._device, self._dtype = device, autocast_dtype
        self._held: deque[_Image] = deque()
        self._count = 0
        self._ended = False
        self._read_seconds = self._pack_seconds = self._model_seconds = 0.0

    @property
    def stats(self) -> CascadeStats:
        """Counts and times so far; complete when the pass has ended."""
        return CascadeStats(
            tuple(line.stats for line in self._lines),
            self._read_seconds,
            self._pack_seconds,
            self._model_seconds,
        )

    def __next__(self) -> Answer:
        """Return the next image's answer, reading as many images as that takes."""
        while not (self._held and self._held[0].left):
            if self._ended:
                raise StopIteration
            self._step()
        return self._held.popleft().answer()

    def _step(self) -> None:
        """Read one image, run the batches that are full; at the end all that waits."""
        start = time.perf_counter()
        try:
            value = next(self._source)
        except StopIteration:
            self._ended = True
        read = time.perf_counter()
        self._read_seconds += read - start
        busy = self._model_seconds
        if self._ended:
            self._work(0, flush=True)
            for line in self._lines:
                line.stats = line.stats + line.reader.take_stats()
        else:
            self._enter(value)
            self._work(0)
            while len(self._held) > self._max_held and not self._held[0].left:
                self._work(self._held[0].waits_at, flush=True)
        spent = time.perf_counter() - read
        self._pack_seconds += spent - (self._model_seconds - busy)

    def _enter(self, value: Any) -> None:
        image = _Image(self._count, str(self._count), [0] * len(self._lines))
        self._count += 1
        self._held.append(image)
        first = self._lines[0]
        try:
            sample = read_image(value, image.key)
        except SkipSample as error:
            first.reader.skip_unread(error, image.key)
            image.leave()
            return
        image.key, image.label = sample.key, sample.label
        image.sample = Sample(sample.key, sample.image)
        pending = first.plan(image)
        if pending is None or not first.push(image, pending):
            image.leave()

    def _work(self, first: int, *, flush: bool = False) -> None:
        """Run the batches of a stage and of those after it, which get what it sends on."""
        for number in range(first, len(self._lines)):
            line = self._lines[number]
            if flush:
                line.ready += line.placer.flush()
            while len(line.ready) >= (1 if flush else self._rows):
                self._run_batch(number)

    def _run_batch(self, number: int) -> None:
        line = self._lines[number]
        rows, line.ready = line.ready[: self._rows], line.ready[self._rows :]
        packing = line.stage.packing
        batch = assemble(
            [[placed for _, placed in row] for row in rows],
            seq_len=packing.seq_len,
            patch_size=packing.patch_size,
            max_images_per_seq=packing.max_images_per_seq,
            stats=line.reader.take_stats(),
        )
        line.stats = line.stats + batch.stats
        start = time.perf_counter()
        with evaluating(line.stage.model), inference(self._device, self._dtype):
            logits = line.stage.logits(batch.to(self._device))
            confidence = max_probability(logits).cpu()
            logits = logits.cpu()
        self._model_seconds += time.perf_counter() - start
        images = sorted((image for row in rows for image, _ in row), key=lambda x: x.index)
        for image, scores, sure in zip(images, logits, confidence.tolist(), strict=True):
            assert image.plan is not None
            image.logits, image.confidence, image.stage = scores, sure, number
            image.tokens[number] = image.plan.num_kept
            self._send_on(image)

    def _send_on(self, image: _Image) -> None:
        """Let an image leave, or wait for the next stage that sees it otherwise."""
        while image.confidence < self._thresholds[image.stage]:
            number = image.stage + 1
            line, before = self._lines[number], self._lines[number - 1]
            pending = line.plan(image)
            same = pending is not None and pending.plan == image.plan
            if same and before.stage.repeats(line.stage):  # the same pixels: the same answer
                image.stage = number
                continue
            # One that breaks only here keeps the answer it has.
            if pending is None or not line.push(image, pending):
                break
            image.waits_at = number
            return
        image.leave()
