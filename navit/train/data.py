"""What a run trains on: an endless series of batches and a position in it that can be stored."""

import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader

from navit.train.config import TrainConfig
from navit.train.ranks import World
from navit.train.stops import from_main
from packer.assemble import assemble
from packer.batch import BatchStats, PackedBatch
from packer.captions import CaptionTokenizer
from packer.dataset import PackedDataset
from packer.folder import ImageFolder
from packer.logical_stream import Need
from packer.pack import Transform
from packer.stream import LoaderState, PackedStream
from packer.transforms import ColorJitter, Compose, RandomFlip


@runtime_checkable
class TrainData(Protocol):
    """Batches without end, in the same order whatever was prefetched when the run stopped."""

    def __iter__(self) -> Iterator[PackedBatch]:
        """Yield batches from the present position on."""

    def update(self, batch: PackedBatch) -> None:
        """Take note that ``batch``, the first one yielded and not yet noted, was trained on."""

    def to_dict(self) -> dict[str, Any]:
        """Return this rank's position, JSON-ready."""

    def merged(self, positions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Join the positions of all ranks into one from which any number of ranks goes on."""


class StreamData:
    """Tar shards, through `PackedStream`."""

    def __init__(
        self,
        config: TrainConfig,
        shards: Sequence[str],
        world: World,
        *,
        need: Need,
        tokenizer: CaptionTokenizer | None,
        stored: Mapping[str, Any] | None,
    ) -> None:
        self.state = LoaderState.from_dict(stored) if stored else LoaderState()
        stream = PackedStream(
            shards,
            config.packer,
            sequences_per_batch=config.sequences_per_batch,
            tokenizer=tokenizer,
            transform=make_transform(config),
            need=need,
            shuffle_window=config.shuffle_window,
            num_streams=config.num_streams,
            rank=world.rank,
            world_size=world.size,
            state=self.state,
        )
        self.loader: DataLoader[PackedBatch] = DataLoader(stream, **_loading(config, world.device))

    def __iter__(self) -> Iterator[PackedBatch]:
        """Yield batches from the state on."""
        return iter(self.loader)

    def update(self, batch: PackedBatch) -> None:
        """Move the state past a batch."""
        self.state.update(batch)

    def to_dict(self) -> dict[str, Any]:
        """Return the states of the streams."""
        return self.state.to_dict()

    def merged(self, positions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Join the states of all ranks."""
        return LoaderState.merge([LoaderState.from_dict(state) for state in positions]).to_dict()


class FolderData:
    """A folder with one subfolder a class, through `PackedDataset`, epoch after epoch.

    On W ranks a step takes W batches of the epoch's plan. A position is the number of batches all
    ranks have taken of it, so another number of ranks goes on within the same plan, each image once
    an epoch; the next epoch is dealt to the new number.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: ImageFolder,
        world: World,
        *,
        stored: Mapping[str, Any] | None,
        progress: bool = True,
    ) -> None:
        self.config, self.world = config, world
        max_pixels = config.packer.max_pixels
        # Read once: ranks that saw different files would plan different epochs.
        usable, self._sizes, skipped = from_main(
            world, lambda: folder.with_sizes(max_pixels=max_pixels, progress=progress)
        )
        self.images = usable
        self._refused = BatchStats(samples_read=sum(skipped.values()), skipped=skipped)
        self.epoch, self.index, self.dealt = 0, 0, world.size
        if stored:
            if stored["images"] != len(usable):
                raise ValueError(
                    f"{folder.root} must hold the {stored['images']} usable images the run began "
                    f"with; it holds {len(usable)}. Restore it, or start a new run."
                )
            self.epoch, self.index, self.dealt = (
                stored[name] for name in ("epoch", "index", "ranks")
            )

    def __iter__(self) -> Iterator[PackedBatch]:
        """Yield this rank's batches from the present position on, epoch after epoch.

        Files left out because of their headers are counted in the first batch of the run.
        """
        epoch, index, dealt = self.epoch, self.index, self.dealt
        dataset = self._planned_for(dealt)
        first = self.world.is_main and (epoch, index) == (0, 0)
        while True:
            dataset.set_epoch(epoch)
            used, ranks = dataset.used_batches, self.world.size
            for batch in self._rest_of_epoch(dataset, index):
                index = min(index + ranks, used)
                state = {"epoch": epoch, "index": index, "ranks": dealt}
                if index == used:
                    state = {"epoch": epoch + 1, "index": 0, "ranks": ranks}
                stats = batch.stats + self._refused if first else batch.stats
                first = False
                yield replace(batch, stats=stats, state=state)
            epoch, index = epoch + 1, 0
            if dealt != ranks:
                dealt, dataset = ranks, self._planned_for(ranks)

    def _rest_of_epoch(self, dataset: PackedDataset, index: int) -> Iterator[PackedBatch]:
        """Yield this rank's batches from place ``index`` of the plan on; every rank as many."""
        ranks = self.world.size
        places = range(index + self.world.rank, dataset.used_batches, ranks)
        steps = -(-(dataset.used_batches - index) // ranks)
        if places:
            yield from DataLoader(
                dataset, sampler=places, **_loading(self.config, self.world.device)
            )
        for _ in range(steps - len(places)):  # only in an epoch begun on another number of ranks
            packer = self.config.packer
            yield assemble(
                [[] for _ in range(self.config.sequences_per_batch)],
                seq_len=packer.seq_len,
                patch_size=packer.patch_size,
                max_images_per_seq=packer.max_images_per_seq,
                tokenizer=None,
                max_text_tokens=packer.max_text_tokens,
            )

    def _planned_for(self, ranks: int) -> PackedDataset:
        return PackedDataset(
            self.images,
            self._sizes,
            self.config.packer,
            sequences_per_batch=self.config.sequences_per_batch,
            keys=self.images.keys,
            transform=make_transform(self.config),
            world_size=ranks,
        )

    def update(self, batch: PackedBatch) -> None:
        """Move past a batch."""
        assert batch.state is not None, "batches of a folder carry their position"
        self.epoch, self.index, self.dealt = (
            batch.state[name] for name in ("epoch", "index", "ranks")
        )

    def to_dict(self) -> dict[str, Any]:
        """Return epoch, batches taken of its plan by all ranks, and ranks it was dealt to."""
        position = {"epoch": self.epoch, "index": self.index, "ranks": self.dealt}
        return {**position, "images": len(self.images)}

    def merged(self, positions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return any one of them: all ranks are at the same step."""
        assert all(position == positions[0] for position in positions), "ranks are in step"
        return dict(positions[0])


def image_data(
    config: TrainConfig,
    shards: Sequence[str],
    folder: ImageFolder | None,
    world: World,
    *,
    need: Need,
    stored: Mapping[str, Any] | None,
) -> TrainData:
    """Stream the images of shards, or plan a folder's epochs where there is one."""
    if folder is not None:
        return FolderData(config, folder, world, stored=stored)
    return StreamData(config, shards, world, need=need, tokenizer=None, stored=stored)


def make_transform(config: TrainConfig) -> Transform | None:
    """Return the augmentation of a run."""
    steps: list[Transform] = []
    if config.flip:
        steps.append(RandomFlip(config.flip))
    if config.color_jitter:
        amount = config.color_jitter
        steps.append(ColorJitter(amount, amount, amount))
    return Compose(steps) if steps else None


def _loading(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    return {
        "batch_size": None,
        "num_workers": config.workers,
        "pin_memory": device.type == "cuda",
        "prefetch_factor": 4 if config.workers else None,
        "worker_init_fn": _ignore_sigterm if config.workers else None,
        # Its own, or each start of a pass would draw from the generator that stochastic depth uses,
        # and a resumed run, which starts one more, would go on with other draws.
        "generator": torch.Generator(),
    }


def _ignore_sigterm(worker: int) -> None:
    """Let the training process decide: `timeout` and schedulers send SIGTERM to the whole group."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
