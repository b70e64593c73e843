"""One logical stream: a reader's position in the shards, a shuffle window, an engine."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

from packer.batch import PackedBatch
from packer.captions import CaptionTokenizer
from packer.config import PackerConfig
from packer.errors import NOTED_CAUSES, SkipSample
from packer.pack import PackEngine, PendingImage, Transform, plan_sample
from packer.plan.deal import deals_shards, stream_shards
from packer.plan.draws import keyed_draws
from packer.sample import Sample, as_sample
from packer.shards import Problem, RawSample, iter_shard, read_samples_at, sample_from_raw
from packer.size_index import Header, SizeSource
from packer.source import shown

Ref = tuple[int, int, int]
"""Where a sample is: (epoch, shard, byte offset in the shard)."""

Place = tuple[int, int]
"""Where a sample's bytes are: (shard, byte offset in the shard)."""

Need = Literal["caption", "label", "image"] | None


@dataclass(frozen=True, slots=True)
class Waiting:
    """A sample in the shuffle window: read, and not yet planned."""

    ref: Ref
    raw: RawSample
    header: Header | None
    """What a size index says of its image; None leaves the header to be read."""


@dataclass(frozen=True)
class StreamSource:
    """What all logical streams of a `PackedStream` share; its arguments say what each means."""

    shards: tuple[str, ...]
    """Paths, URLs and commands of the shards."""
    config: PackerConfig
    """What is done to every image."""
    sequences_per_batch: int
    """B."""
    tokenizer: CaptionTokenizer | None
    """Turns captions into tokens."""
    transform: Transform | None
    """Keyed pixel transform after the resize."""
    need: Need
    """What a sample must have; with "caption" labels are left out, with "image" captions too."""
    epochs: int | None
    """Passes over the data; None never ends."""
    shuffle_shards: bool
    """Whether each epoch reads the shards in another order."""
    shuffle_window: int
    """Samples among which the next one is drawn."""
    size_index: bool
    """Whether sizes are taken from the indices beside the shards, and stored there."""
    fingerprint: int
    """CRC-32 of what positions depend on: the shards in order, the seed, the shuffling."""


class LogicalStream:
    """One stream: its reader's position, its shuffle window and its engine."""

    def __init__(
        self,
        source: StreamSource,
        number: int,
        num_streams: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.source, self.number, self.num_streams = source, number, num_streams
        self._initial = state
        self.engine = PackEngine(
            source.config,
            sequences_per_batch=source.sequences_per_batch,
            tokenizer=source.tokenizer,
            transform=source.transform,
        )
        state = state or {}
        self.batches: int = state.get("batches", 0)
        """Batches given since the start of the run."""
        self.epoch: int = state.get("epoch", 0)
        self.turn: int = state.get("turn", 0)
        """Shards of this epoch read to their end."""
        self.offset: int = state.get("offset", -1)
        """Offset of the last sample read in the current shard; -1 before its first."""
        self.index: int = state.get("index", 0)
        """Samples of the current shard read so far, those of other streams included."""
        self.draws: int = state.get("draws", 0)
        """Samples drawn from the window."""
        self.window: list[Waiting] = []

    def __iter__(self) -> Iterator[PackedBatch]:
        self._restore_pending()
        for batch in self._batches():
            self.batches += 1
            yield replace(batch, state=self.snapshot())

    def _batches(self) -> Iterator[PackedBatch]:
        yield from self.engine.batches()  # one image may have completed several
        for item, images_seen in self._shuffled():
            self._plan(item, images_seen)
            yield from self.engine.batches()
        yield from self.engine.finish()

    def _plan(self, item: Waiting, images_seen: int) -> None:
        skip = self.engine.reader.skip_unread
        try:
            sample = self._sample(item.raw, self._problem)
        except SkipSample as error:
            skip(error, item.raw.key)
            return
        if isinstance(item.header, SkipSample):
            skip(item.header, item.raw.key)
            return
        self.engine.add(
            sample, epoch=item.ref[0], images_seen=images_seen, ref=item.ref, info=item.header
        )

    def _sample(self, raw: RawSample, on_problem: Problem | None = None) -> Sample:
        fields = sample_from_raw(
            raw, config=self.source.config, need=self.source.need, on_problem=on_problem
        )
        return as_sample(fields)

    def snapshot(self) -> dict[str, Any]:
        """Describe the stream in integers, JSON-ready; lanes follow one another without a mark."""
        lanes = self.engine.lanes.values()
        return {
            "stream": self.number,
            "num_streams": self.num_streams,
            "source": self.source.fingerprint,
            "batches": self.batches,
            "epoch": self.epoch,
            "turn": self.turn,
            "offset": self.offset,
            "index": self.index,
            "draws": self.draws,
            "window": [list(item.ref) for item in self.window],
            "ready": [
                [[*image.ref, image.images_seen, image.plan.num_kept] for image in sequence]
                for lane in lanes
                for sequence in lane.ready
            ],
            "placer": [
                [*image.ref, image.images_seen, *place]
                for lane in lanes
                for image, *place in lane.placer.snapshot()
            ],
        }

    def _restore_pending(self) -> None:
        """Read the samples that wait again, and plan those that were planned."""
        state = self._initial
        if state is None:
            return
        rows = [*state["window"], *state["placer"], *chain.from_iterable(state["ready"])]
        raws = self._read_again({(row[1], row[2]) for row in rows})
        self.window = [Waiting(_as_ref(row), raws[row[1], row[2]], None) for row in state["window"]]
        for sequence in state["ready"]:
            images = [self._plan_again(row, raws) for row in sequence]
            self.engine.lane_of(images[0]).ready.append(images)
        waiting = [(self._plan_again(row, raws), *row[4:]) for row in state["placer"]]
        for lane in self.engine.lanes.values():
            lane.placer.restore(row for row in waiting if self.engine.lane_of(row[0]) is lane)

    def _read_again(self, places: Collection[Place]) -> dict[Place, RawSample]:
        """Read the samples at (shard, offset); each shard is opened once."""
        by_shard: dict[int, list[int]] = {}
        for shard, offset in sorted(places):
            by_shard.setdefault(shard, []).append(offset)
        raws: dict[Place, RawSample] = {}
        for shard, offsets in by_shard.items():
            path = self.source.shards[shard]
            try:
                found = read_samples_at(path, offsets)
            except (OSError, ValueError) as error:
                raise _changed(f"a sample of {shown(path)}", str(error)) from error
            raws |= {(shard, offset): raw for offset, raw in found.items()}
        return raws

    def _plan_again(self, row: Sequence[int], raws: Mapping[Place, RawSample]) -> PendingImage:
        """Plan an image of a row (epoch, shard, offset, images seen, length, ...) again."""
        ref, images_seen, length = _as_ref(row), row[3], row[4]
        raw = raws[ref[1:]]
        config = self.source.config
        try:
            sample = self._sample(raw)
            image = plan_sample(sample, config, epoch=ref[0], images_seen=images_seen, ref=ref)
        except SkipSample as error:
            raise _changed(raw.key, str(error)) from error
        if image.plan.num_kept != length:
            raise _changed(raw.key, f"it had {length} tokens and now has {image.plan.num_kept}")
        return image

    def _shuffled(self) -> Iterator[tuple[Waiting, int]]:
        """Draw the next sample from a window of those read, with the images the run has seen."""
        for item in self._read():
            self.window.append(item)
            if len(self.window) >= self.source.shuffle_window:
                yield self._draw()
        while self.window:
            yield self._draw()

    def _draw(self) -> tuple[Waiting, int]:
        key = f"window of stream {self.number}"
        choice = keyed_draws(self.source.config.seed, self.draws, key).spare % len(self.window)
        images_seen = self.draws * self.num_streams  # as if all streams were as far as this one
        self.draws += 1
        self.window[choice], self.window[-1] = self.window[-1], self.window[choice]
        return self.window.pop(), images_seen

    def _read(self) -> Iterator[Waiting]:
        """Read samples on from the current position, epoch after epoch."""
        while self.source.epochs is None or self.epoch < self.source.epochs:
            order = self._shard_order()
            resumed = self.offset >= 0 or self.turn > 0
            found = False
            while self.turn < len(order):
                for item in self._read_shard(order[self.turn]):
                    found = True
                    yield item
                self.turn, self.offset, self.index = self.turn + 1, -1, 0
            if not found and not resumed and self.source.epochs is None:
                raise RuntimeError(
                    f"stream {self.number} of {self.num_streams} found no sample in a whole epoch "
                    f"of {len(order)} shards. Check the shards, or use fewer streams."
                )
            self.epoch, self.turn = self.epoch + 1, 0

    def _read_shard(self, shard: int) -> Iterator[Waiting]:
        path, after = self.source.shards[shard], self.offset
        sizes = None
        if self.source.size_index:
            sizes = SizeSource(path, record=self._deals_shards() and after < 0)

        def on_problem(cause: str, detail: str) -> None:
            if sizes is not None and cause == "missing_shard":
                sizes.give_up()
            if self._is_my_turn():  # streams that share a shard meet a defect each: one counts it
                self._problem(cause, detail)

        for raw in iter_shard(path, start_offset=max(after, 0), on_problem=on_problem):
            if raw.offset == after:
                continue  # read before the state was taken
            mine = self._is_my_turn()
            self.offset, self.index = raw.offset, self.index + 1
            if mine:
                header = None if sizes is None else sizes.header(raw)
                yield Waiting((self.epoch, shard, raw.offset), raw, header)
        if sizes is not None:
            sizes.finish()

    def _is_my_turn(self) -> bool:
        """Whether what comes next in the current shard is this stream's."""
        return self._deals_shards() or self.index % self.num_streams == self.number

    def _deals_shards(self) -> bool:
        return deals_shards(len(self.source.shards), self.num_streams)

    def _shard_order(self) -> list[int]:
        return stream_shards(
            len(self.source.shards),
            self.number,
            self.num_streams,
            seed=self.source.config.seed,
            epoch=self.epoch,
            shuffle=self.source.shuffle_shards,
        )

    def _problem(self, cause: str, detail: str) -> None:
        """Count a defect of a shard: a lost sample or shard as skipped, anything else as noted."""
        if cause in NOTED_CAUSES:
            self.engine.reader.note(cause, detail)
        else:
            self.engine.reader.skip_unread(SkipSample(cause, detail), "")


def _as_ref(row: Sequence[int]) -> Ref:
    epoch, shard, offset = row[:3]
    return epoch, shard, offset


def _changed(what: str, found: str) -> ValueError:
    return ValueError(
        f"{what} waited for its place when the state was taken and must be as it was; "
        f"{found.rstrip('.')}. Restore shard and settings, or start without a state."
    )
