"""A whole epoch over many shards, ranks and streams, by planning only.

The shards are dealt to logical streams and the streams to ranks as `packer.stream.PackedStream`
does it; samples are lengths, so that ten million of them take seconds a rank and no file exists.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from packer.config import PackerConfig
from packer.plan.deal import deals_shards, reader_streams, stream_shards
from packer.plan.many import Int64Array, plan_lengths
from packer.plan.place import make_engine
from packer.plan.simulate import laion_sizes

_READ_AHEAD = 64  # samples read at a time; batches do not depend on it


@dataclass(frozen=True)
class PlannedShards:
    """Shards of which nothing is known but the kept tokens of every sample."""

    lengths: npt.NDArray[np.int32]
    """int32 (N,) kept tokens of the samples, shard after shard; a sample's index is its id."""
    bounds: Int64Array
    """int64 (shards + 1,) where each shard starts, and the end of the last."""

    @property
    def num_shards(self) -> int:
        """Number of shards, empty ones included."""
        return len(self.bounds) - 1

    @property
    def num_samples(self) -> int:
        """N, samples of all shards."""
        return len(self.lengths)


def draw_shards(
    num_shards: int,
    config: PackerConfig,
    *,
    mean_samples: int = 1000,
    spread: float = 0.2,
    num_empty: int = 0,
    seed: int = 0,
) -> PlannedShards:
    """Draw shards of LAION-like images.

    Args:
        num_shards: Shards, the empty ones included.
        config: What is done to every image.
        mean_samples: Mean samples of a shard that is not empty.
        spread: Standard deviation of a shard's samples, as a share of the mean.
        num_empty: Shards without a sample, spread over the others at random.
        seed: Seed of every draw.
    """
    rng = np.random.default_rng([seed, 2])  # not the stream of the sizes
    drawn = rng.normal(mean_samples, spread * mean_samples, num_shards)
    samples = np.maximum(np.rint(drawn), 1).astype(np.int64)
    samples[rng.permutation(num_shards)[:num_empty]] = 0
    bounds = np.concatenate([[0], np.cumsum(samples)])
    sizes = laion_sizes(int(bounds[-1]), seed)
    return PlannedShards(plan_lengths(sizes, config, rng), bounds)


class PlannedBatch(NamedTuple):
    """The samples of a batch's sequences."""

    samples: Int64Array
    """int64 (n,) ids, sequence after sequence."""
    bounds: Int64Array
    """int64 (sequences + 1,) where each sequence starts, and the end of the last."""


class PlannedStream:
    """The plan of one logical stream: a position in its samples and the placement's window."""

    def __init__(
        self,
        shards: PlannedShards,
        config: PackerConfig,
        number: int,
        num_streams: int,
        *,
        epoch: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.number = number
        self.samples = _stream_samples(shards, config, number, num_streams, epoch)
        """int64 ids of the stream's samples, in the order they are read."""
        self._lengths = shards.lengths
        self._engine = make_engine(config.seq_len, config.placement, config.max_images_per_seq)
        self._flushed = False
        self.batches = 0
        """Batches given since the start of the epoch."""
        self.ready: list[list[int]] = []
        """Complete sequences, of positions in `samples`."""
        if state is not None:
            self.batches = state["batches"]
            self.ready = [list(sequence) for sequence in state["ready"]]
            # The engine's stamps count pushes, which are the positions in `samples`.
            self._engine.now = state["position"]
            lengths = self._lengths[self.samples]
            rows = [(stamp, int(lengths[stamp]), place) for stamp, place in state["waiting"]]
            self._engine.load(rows)

    def next_batch(self, sequences_per_batch: int) -> PlannedBatch | None:
        """Return the next sequences; fewer at the end, None after it."""
        while len(self.ready) < sequences_per_batch and self._engine.now < len(self.samples):
            start = self._engine.now
            chunk = self._lengths[self.samples[start : start + _READ_AHEAD]]
            self.ready += self._engine.extend(chunk.tolist())
        if len(self.ready) < sequences_per_batch and not self._flushed:
            self.ready += self._engine.flush()
            self._flushed = True
        if not self.ready:
            return None
        given, self.ready = self.ready[:sequences_per_batch], self.ready[sequences_per_batch:]
        self.batches += 1
        bounds = np.cumsum([0, *map(len, given)])
        flat = np.fromiter(chain.from_iterable(given), np.int64, bounds[-1])
        return PlannedBatch(self.samples[flat], bounds)

    def state(self) -> dict[str, Any]:
        """Describe the stream in integers, JSON-ready: what `state` of a new one continues from."""
        return {
            "stream": self.number,
            "batches": self.batches,
            "position": self._engine.now,
            "waiting": [[stamp, place] for stamp, _, place in self._engine.rows()],
            "ready": [list(sequence) for sequence in self.ready],
        }


class PlannedRun:
    """One epoch of all ranks, step by step.

    Args:
        shards: The data.
        config: Read for the seed, `seq_len`, the placement and `max_images_per_seq`.
        num_ranks: Ranks, each with one reader.
        num_streams: Logical streams, fixed for the run.
        sequences_per_batch: B, sequences a rank takes each step.
        epoch: Passes over the data completed before this one.
        states: States of the streams to continue from, of a run with any number of ranks.
    """

    def __init__(
        self,
        shards: PlannedShards,
        config: PackerConfig,
        *,
        num_ranks: int,
        num_streams: int,
        sequences_per_batch: int,
        epoch: int = 0,
        states: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.sequences_per_batch = sequences_per_batch
        by_stream = {state["stream"]: state for state in states}
        self.ranks = [
            [
                PlannedStream(
                    shards, config, number, num_streams, epoch=epoch, state=by_stream.get(number)
                )
                for number in reader_streams(rank, num_ranks, num_streams)
            ]
            for rank in range(num_ranks)
        ]
        """The streams each rank serves, by turns."""
        self._running = [list(streams) for streams in self.ranks]

    def steps(self) -> Iterator[list[PlannedBatch | None]]:
        """Yield, for each step, the batch of every rank; None for a rank that has ended."""
        while True:
            step = [self._next(running) for running in self._running]
            if all(batch is None for batch in step):
                return
            yield step

    def states(self) -> list[dict[str, Any]]:
        """Return the states of all streams, merged from the ranks."""
        return [stream.state() for stream in chain.from_iterable(self.ranks)]

    def _next(self, running: list[PlannedStream]) -> PlannedBatch | None:
        """Take a batch from the rank's stream that has given fewest, as `PackedStream` does."""
        while running:
            stream = min(running, key=lambda stream: (stream.batches, stream.number))
            batch = stream.next_batch(self.sequences_per_batch)
            if batch is not None:
                return batch
            running.remove(stream)
        return None


def _stream_samples(
    shards: PlannedShards, config: PackerConfig, number: int, num_streams: int, epoch: int
) -> Int64Array:
    order = stream_shards(
        shards.num_shards, number, num_streams, seed=config.seed, epoch=epoch, shuffle=True
    )
    spans = [np.arange(shards.bounds[shard], shards.bounds[shard + 1]) for shard in order]
    if not deals_shards(shards.num_shards, num_streams):
        spans = [span[number::num_streams] for span in spans]
    return np.concatenate(spans) if spans else np.empty(0, np.int64)
