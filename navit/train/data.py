"""What a run trains on: an endless series of batches and a position in it that can be stored."""

import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader

from navit.train.config import TrainConfig
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
        """Take note that ``batch``, the latest one yielded, has been trained on."""

    def to_dict(self) -> dict[str, Any]:
        """Return the position, JSON-ready."""


class StreamData:
    """Tar shards, through `PackedStream`."""

    def __init__(
        self,
        config: TrainConfig,
        shards: Sequence[str],
        device: torch.device,
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
            state=self.state,
        )
        self.loader: DataLoader[PackedBatch] = DataLoader(stream, **_loading(config, device))

    def __iter__(self) -> Iterator[PackedBatch]:
        """Yield batches from the state on."""
        return iter(self.loader)

    def update(self, batch: PackedBatch) -> None:
        """Move the state past a batch."""
        self.state.update(batch)

    def to_dict(self) -> dict[str, Any]:
        """Return the states of the streams."""
        return self.state.to_dict()


class FolderData:
    """A folder with one subfolder a class, through `PackedDataset`, epoch after epoch."""

    def __init__(
        self,
        config: TrainConfig,
        folder: ImageFolder,
        device: torch.device,
        *,
        stored: Mapping[str, Any] | None,
        progress: bool = True,
    ) -> None:
        self.config, self.device = config, device
        usable, sizes, skipped = folder.with_sizes(
            max_pixels=config.packer.max_pixels, progress=progress
        )
        self._refused = BatchStats(samples_read=sum(skipped.values()), skipped=skipped)
        self.dataset = PackedDataset(
            usable,
            sizes,
            config.packer,
            sequences_per_batch=config.sequences_per_batch,
            keys=usable.keys,
            transform=make_transform(config),
        )
        self.epoch, self.index = 0, 0
        if stored:
            if stored["images"] != len(usable):
                raise ValueError(
                    f"{folder.root} must hold the {stored['images']} usable images the run began "
                    f"with; it holds {len(usable)}. Restore it, or start a new run."
                )
            self.epoch, self.index = stored["epoch"], stored["index"]

    def __iter__(self) -> Iterator[PackedBatch]:
        """Yield batches from the present position on, epoch after epoch.

        Files left out because of their headers are counted in the first batch of the run.
        """
        while True:
            self.dataset.set_epoch(self.epoch)
            places = range(self.index, self.dataset.used_batches)
            loader = DataLoader(self.dataset, sampler=places, **_loading(self.config, self.device))
            for place, batch in zip(places, loader, strict=True):
                is_first = self.epoch == place == 0
                yield replace(batch, stats=batch.stats + self._refused) if is_first else batch
            self.epoch, self.index = self.epoch + 1, 0

    def update(self, batch: PackedBatch) -> None:
        """Move past a batch."""
        self.index += 1

    def to_dict(self) -> dict[str, Any]:
        """Return epoch and place in it."""
        return {"epoch": self.epoch, "index": self.index, "images": len(self.dataset.dataset)}


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
    }


def _ignore_sigterm(worker: int) -> None:
    """Let the training process decide: `timeout` and schedulers send SIGTERM to the whole group."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
