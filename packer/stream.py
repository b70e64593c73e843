"""`PackedStream`: tar shards -> packed batches, with a state that resumes anywhere.

The shards are dealt to logical streams, fixed for a run. A batch comes from one stream, and carries
the stream's state after it: the position of the reader and the (epoch, shard, offset) of every
sample that waits, never its bytes. Storing the states of the batches that were trained on, and
nothing else, resumes exactly whatever a `DataLoader` had prefetched.
"""

from binascii import crc32
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

from packer.assemble import assemble
from packer.batch import PackedBatch
from packer.captions import CaptionTokenizer
from packer.config import PackerConfig
from packer.loader_state import LoaderState
from packer.logical_stream import LogicalStream, Need, StreamSource
from packer.pack import Transform
from packer.plan.deal import reader_streams
from packer.shards import expand_shards
from packer.source import is_remote, shard_name

__all__ = ["LoaderState", "PackedStream"]


class PackedStream(IterableDataset[PackedBatch]):
    """Packed batches from tar shards: ``DataLoader(stream, batch_size=None, num_workers=...)``.

    Every batch has the same B and L, and with ``config.patch_mixing`` "uniform" one patch size.
    Without ``epochs`` the stream never ends and there is no barrier between epochs: images still
    waiting for a place carry over. The batches of a stream depend neither on the number of workers
    nor on that of ranks; where ranks x workers divides the number of streams, the order of all
    batches does not either (in a finite pass: until a stream ends).

    Args:
        shards: Tar shards: a path, a brace range (``pairs-{000..099}.tar``), an http(s) URL, a
            ``pipe:`` command, or a list of these (`packer.shards.expand_shards`). A URL or command
            that fails is counted, and fatal only after ``config.max_failures_in_row``; to resume,
            it is read on to where it was.
        config: What is done to every image.
        sequences_per_batch: B.
        tokenizer: Turns captions into ``batch.captions``.
        transform: ``transform(uint8 (H, W, 3), torch.Generator) -> same shape``, after the resize.
        need: "caption" or "label": a sample without it is skipped and counted, and "caption" leaves
            labels out; "image": both are left out; None needs neither and takes what is there.
        epochs: Passes over the data, after which what waits is flushed; None never ends. On
            several ranks a finite stream may give them different numbers of batches
            (`packer.lockstep.in_step` evens them out).
        shuffle_shards: Whether each epoch reads the shards in another order.
        shuffle_window: Samples among which the next one is drawn; 1 keeps the shards' order.
        size_index: Whether image sizes are taken from an index beside each local shard
            (`packer.size_index`), which the first stream that reads all of a shard stores. Batches
            are the same with and without.
        num_streams: Logical streams; None means ranks x max(workers, 1) at the first start.
        rank: This process's rank; None asks torch.distributed.
        world_size: Number of ranks; None asks torch.distributed.
        state: Continue after the batches this state has seen: that of this rank, or, on another
            number of ranks, `LoaderState.merge` of those of all ranks.

    Raises:
        ValueError: If a setting is out of range, a shard does not exist, or the state belongs to
            other shards or another rank; while iterating, if a sample the state needs has changed.
        TooManyFailures: While iterating, after ``config.max_failures_in_row`` skipped samples.
        RuntimeError: While iterating without end, if an epoch holds no sample for a stream.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        config: PackerConfig,
        *,
        sequences_per_batch: int,
        tokenizer: CaptionTokenizer | None = None,
        transform: Transform | None = None,
        need: Need = "caption",
        epochs: int | None = None,
        shuffle_shards: bool = True,
        shuffle_window: int = 1,
        size_index: bool = False,
        num_streams: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        state: LoaderState | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("epochs", epochs), ("num_streams", num_streams)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or None; got {value}.")
        for name, value in (
            ("sequences_per_batch", sequences_per_batch),
            ("shuffle_window", shuffle_window),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")
        paths = tuple(expand_shards(shards))
        # What a position in the stream depends on; a state taken on something else is refused.
        sizes = [
            (shard_name(path), -1 if is_remote(path) else Path(path).stat().st_size)
            for path in paths
        ]
        described: list[Any] = [sizes, config.seed, shuffle_shards, shuffle_window]
        if config.separate_patch_sizes:  # what waits in a lane of its own fits no common one
            described.append(config.separate_patch_sizes)
        self.source = StreamSource(
            shards=paths,
            config=config,
            sequences_per_batch=sequences_per_batch,
            tokenizer=tokenizer,
            transform=transform,
            need=need,
            epochs=epochs,
            shuffle_shards=shuffle_shards,
            shuffle_window=shuffle_window,
            size_index=size_index,
            fingerprint=crc32(repr(described).encode()),
        )
        self.num_streams = num_streams
        self.rank, self.world_size = _place_among_ranks(rank, world_size)
        # A copy: the caller goes on updating its own while this stream, perhaps, is read again.
        self.state = LoaderState() if state is None else replace(state, streams={**state.streams})
        self._check_state()

    def _check_state(self) -> None:
        """Take the number of streams from the state, and refuse a state of another run."""
        state = self.state
        if state.ranks and (state.rank, state.ranks) != (self.rank, self.world_size):
            raise ValueError(
                f"the state is that of rank {state.rank} of {state.ranks}; this is rank "
                f"{self.rank} of {self.world_size}. Give each rank its own, or to all of them "
                "what LoaderState.merge makes of the states of all ranks."
            )
        if state.num_streams:
            if self.num_streams not in (None, state.num_streams):
                raise ValueError(
                    f"num_streams is fixed for a run: the state has {state.num_streams}; got "
                    f"{self.num_streams}. Leave it out to continue."
                )
            self.num_streams = state.num_streams
        if self.source.epochs is None and (self.num_streams or self.world_size) < self.world_size:
            raise ValueError(
                f"an endless stream needs num_streams of at least the number of ranks "
                f"({self.world_size}), else a rank has no data; got {self.num_streams}."
            )
        for number, stream in state.streams.items():
            if stream["source"] != self.source.fingerprint:
                raise ValueError(
                    f"the state of stream {number} was taken on other shards, or with another seed "
                    "or shuffle setting. Give the shards and settings of the run to continue, or "
                    "start without a state."
                )

    def __iter__(self) -> Iterator[PackedBatch]:
        """Yield the batches of this worker's streams, in turn."""
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        num_streams = self.num_streams or self.world_size * workers
        workers = min(workers, max(num_streams // self.world_size, 1))
        if number >= workers:
            return
        # A DataLoader takes batch t from worker t mod workers, and counts from 0 again after a
        # resume, so the worker that gives the next batch is always the first. Where the readers
        # divide the streams, batch t of this rank is global batch before + t * ranks + rank, of
        # that stream. Modulo the ranks no t matters: each rank keeps its streams.
        readers = self.world_size * workers
        next_batch = (self.state.batches + number) * self.world_size + self.rank
        first = (self.state.before + next_batch) % readers
        streams = [
            LogicalStream(self.source, s, num_streams, self.state.streams.get(s))
            for s in reader_streams(first, readers, num_streams)
        ]
        running = {stream: iter(stream) for stream in streams}
        while running:
            stream = min(running, key=lambda stream: (stream.batches, stream.number))
            batch = next(running[stream], None)
            if batch is None:
                del running[stream]
            else:
                yield self._of_this_rank(batch)

    def empty_batch(self) -> PackedBatch:
        """Build a batch of this stream's B and L without images, which no stream has given.

        A rank whose streams have ended takes it while others go on (`packer.lockstep.in_step`);
        `LoaderState.update` counts it, and no stream moves.
        """
        config = self.source.config
        batch = assemble(
            [[] for _ in range(self.source.sequences_per_batch)],
            seq_len=config.seq_len,
            patch_size=config.patch_size,
            max_images_per_seq=config.max_images_per_seq,
            tokenizer=self.source.tokenizer,
            max_text_tokens=config.max_text_tokens,
        )
        state = {"stream": None, "num_streams": self.num_streams or 0}
        return self._of_this_rank(replace(batch, state=state))

    def _of_this_rank(self, batch: PackedBatch) -> PackedBatch:
        state = {**(batch.state or {}), "rank": self.rank, "ranks": self.world_size}
        return replace(batch, state=state)


def _place_among_ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    active = torch.distributed.is_available() and torch.distributed.is_initialized()
    if world_size is None:
        world_size = torch.distributed.get_world_size() if active else 1
    if rank is None:
        rank = torch.distributed.get_rank() if active else 0
    if not 0 <= rank < world_size:
        raise ValueError(f"need 0 <= rank < world_size; got rank={rank}, world_size={world_size}.")
    return rank, world_size
