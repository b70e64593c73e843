"""One logical stream: a reader's position in the shards, a shuffle window, an engine."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from packer.batch import PackedBatch
from packer.captions import CaptionTokenizer
from packer.config import PackerConfig
from packer.errors import NOTED_CAUSES, SkipSample
from packer.pack import PackEngine, PendingImage, Transform, plan_sample
from packer.plan.draws import keyed_draws
from packer.sample import Sample, as_sample
from packer.shards import Problem, RawSample, iter_shard, read_sample_at, sample_from_raw

Ref = tuple[int, int, int]
"""Where a sample is: (epoch, shard, byte offset in the shard)."""

Need = Literal["caption", "label"] | None


@dataclass(frozen=True)
class StreamSource:
    """What all logical streams of a `PackedStream` share; its arguments say what each means."""

    shards: tuple[str, ...]
    """Paths of the shards."""
    config: PackerConfig
    """What is done to every image."""
    sequences_per_batch: int
    """B."""
    tokenizer: CaptionTokenizer | None
    """Turns captions into tokens."""
    transform: Transform | None
    """Keyed pixel transform after the resize."""
    need: Need
    """What a sample must have; with "caption" labels are left out."""
    epochs: int | None
    """Passes over the data; None never ends."""
    shuffle_shards: bool
    """Whether each epoch reads the shards in another order."""
    shuffle_window: int
    """Samples among which the next one is drawn."""
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
        self.window: list[tuple[Ref, RawSample]] = []

    def __iter__(self) -> Iterator[PackedBatch]:
        self._restore_pending()
        for batch in self._batches():
            self.batches += 1
            yield replace(batch, state=self.snapshot())

    def _batches(self) -> Iterator[PackedBatch]:
        yield from self.engine.batches()  # one image may have completed several
        for ref, raw in self._shuffled():
            try:
                sample = self._sample(raw, self._problem)
            except SkipSample as error:
                self.engine.reader.skip_unread(error, raw.key)
                continue
            self.engine.add(sample, epoch=ref[0], ref=ref)
            yield from self.engine.batches()
        yield from self.engine.finish()

    def _sample(self, raw: RawSample, on_problem: Problem | None = None) -> Sample:
        fields = sample_from_raw(
            raw, config=self.source.config, need=self.source.need, on_problem=on_problem
        )
        return as_sample(fields)

    def snapshot(self) -> dict[str, Any]:
        """Describe the stream in integers, JSON-ready."""
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
            "window": [list(ref) for ref, _ in self.window],
            "ready": [
                [[list(image.ref), image.plan.num_kept] for image in sequence]
                for sequence in self.engine.ready
            ],
            "placer": [
                [list(image.ref), *place] for image, *place in self.engine.placer.snapshot()
            ],
        }

    def _restore_pending(self) -> None:
        """Read the samples that wait again, and plan those that were planned."""
        state = self._initial
        if state is None:
            return
        for value in state["window"]:
            ref = _as_ref(value)
            self.window.append((ref, self._read_again(ref)))
        self.engine.ready = [
            [self._plan_again(_as_ref(ref), length) for ref, length in sequence]
            for sequence in state["ready"]
        ]
        self.engine.placer.restore(
            (self._plan_again(_as_ref(ref), length), length, *place)
            for ref, length, *place in state["placer"]
        )

    def _read_again(self, ref: Ref) -> RawSample:
        _, shard, offset = ref
        path = self.source.shards[shard]
        try:
            return read_sample_at(path, offset)
        except (OSError, ValueError) as error:
            raise _changed(f"the sample at byte {offset} of {path}", str(error)) from error

    def _plan_again(self, ref: Ref, length: int) -> PendingImage:
        raw = self._read_again(ref)
        try:
            image = plan_sample(self._sample(raw), self.source.config, epoch=ref[0], ref=ref)
        except SkipSample as error:
            raise _changed(raw.key, str(error)) from error
        if image.plan.num_kept != length:
            raise _changed(raw.key, f"it had {length} tokens and now has {image.plan.num_kept}")
        return image

    def _shuffled(self) -> Iterator[tuple[Ref, RawSample]]:
        """Draw the next sample from a window of those read, keyed by the number of draws."""
        for item in self._read():
            self.window.append(item)
            if len(self.window) >= self.source.shuffle_window:
                yield self._draw()
        while self.window:
            yield self._draw()

    def _draw(self) -> tuple[Ref, RawSample]:
        key = f"window of stream {self.number}"
        choice = keyed_draws(self.source.config.seed, self.draws, key).spare % len(self.window)
        self.draws += 1
        self.window[choice], self.window[-1] = self.window[-1], self.window[choice]
        return self.window.pop()

    def _read(self) -> Iterator[tuple[Ref, RawSample]]:
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

    def _read_shard(self, shard: int) -> Iterator[tuple[Ref, RawSample]]:
        path = self.source.shards[shard]
        after = self.offset
        for raw in iter_shard(path, start_offset=max(after, 0), on_problem=self._shard_problem):
            if raw.offset == after:
                continue  # read before the state was taken
            mine = self._is_my_turn()
            self.offset, self.index = raw.offset, self.index + 1
            if mine:
                yield (self.epoch, shard, raw.offset), raw

    def _is_my_turn(self) -> bool:
        """Whether what comes next in the current shard is this stream's."""
        return self._deals_shards() or self.index % self.num_streams == self.number

    def _deals_shards(self) -> bool:
        """Whether streams own whole shards; with fewer shards than streams they share them."""
        return len(self.source.shards) >= self.num_streams

    def _shard_order(self) -> list[int]:
        order = list(range(len(self.source.shards)))
        if self.source.shuffle_shards:
            seed = self.source.config.seed
            order.sort(key=lambda shard: keyed_draws(seed, self.epoch, f"shard {shard}").spare)
        return order[self.number :: self.num_streams] if self._deals_shards() else order

    def _shard_problem(self, cause: str, detail: str) -> None:
        if self._is_my_turn():  # streams that share a shard meet the same defect: one counts it
            self._problem(cause, detail)

    def _problem(self, cause: str, detail: str) -> None:
        """Count a defect of a shard: a lost sample or shard as skipped, anything else as noted."""
        if cause in NOTED_CAUSES:
            self.engine.reader.note(cause, detail)
        else:
            self.engine.reader.skip_unread(SkipSample(cause, detail), "")


def _as_ref(value: Sequence[int]) -> Ref:
    epoch, shard, offset = value
    return epoch, shard, offset


def _changed(what: str, found: str) -> ValueError:
    return ValueError(
        f"{what} waited for its place when the state was taken and must be as it was: {found}. "
        "Restore the shard and the packer's settings, or start without a state."
    )
