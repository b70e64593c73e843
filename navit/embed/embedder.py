"""`Embedder`: a model that is given images and returns one vector each, in their order."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from navit.embed.config import EmbedConfig
from navit.embed.parts import Failure, Item, OnError, Part, check_images, load_parts, pack_chunk
from navit.embed.results import NOT_FINITE, ChunkVectors, Embeddings, Fetched, count, join
from navit.embed.source import Loaded, load_source
from navit.evaluate.encode import evaluating, inference
from navit.model import CLIP, NaViT
from packer.batch import BatchStats, PackedBatch

logger = logging.getLogger("navit")

_CHUNK = 256  # images a process takes at a time where `embed_images` reads in several


class Embedder:
    """A model that is given images and returns vectors: the library behind `navit embed`.

    Args:
        model: A `NaViT`, a `CLIP` (whose image side is used), a classifier of ours (whose image
            tower is used), or a checkpoint: a run folder, weights as ``save_pretrained`` of ours or
            of Hugging Face writes them, or a hub id. A model given as an object is not moved, and
            each of its modules is back in its mode afterwards; one that is loaded is float32.
        config: How images become vectors.
        averaged: Of a run, whether to take the running average of the weights.

    Raises:
        ValueError: If the model is of another kind, cannot be run here, or is on another device
            than ``config.device`` names.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        config: EmbedConfig | None = None,
        *,
        averaged: bool = True,
    ) -> None:
        self.config = config or EmbedConfig()
        given = isinstance(model, nn.Module)
        source = (
            Loaded(model) if isinstance(model, nn.Module) else load_source(model, averaged=averaged)
        )
        self.model = source.model
        self.device = _resolve_device(self.model, self.config.device, given=given)
        if not given:
            self.model.to(self.device, torch.float32)
        self._tower = _image_side(self.model)
        vision = self._tower.vision if isinstance(self._tower, CLIP) else self._tower
        self.packing = self.config.packing(
            vision.config, trained=source.packing, stated_tokens=source.max_tokens
        )
        self.batch_tokens = max(self.config.batch_tokens, self.packing.seq_len)
        self.dtype = self.config.autocast_dtype(self.device)
        self.dim = self._probe()
        """D: size of a vector."""

    def describe(self) -> str:
        """Say in a line what is done, for people to check."""
        packing = self.packing
        kind = type(self.model).__name__
        precision = "fp32" if self.dtype is None else "bf16"
        scaled = ", length 1" if self.config.normalize else ""
        return (
            f"{kind}, {self.dim} values an image{scaled}; {self.device}, {precision}; patch "
            f"{packing.patch_size}, at most {packing.image_budget} tokens, {packing.resize}, "
            f"decode {packing.decode}, {packing.resample}"
        )

    def encode(self, batch: PackedBatch) -> Float[Tensor, "N D"]:
        """Embed a packed batch: float32 on the model's device, in the order of its keys."""
        with evaluating(self.model), inference(self.device, self.dtype):
            batch = batch.to(self.device, non_blocking=True)
            tower = self._tower
            vectors = tower.encode_image(batch) if isinstance(tower, CLIP) else tower(batch).pooled
            vectors = vectors.float()
            return F.normalize(vectors, dim=-1) if self.config.normalize else vectors

    def embed(
        self,
        images: Iterable[Any],
        *,
        on_error: OnError = "raise",
        on_part: Callable[[Part], None] | None = None,
    ) -> Embeddings:
        """Embed images of any number, in order; a generator is read as it is needed.

        Args:
            images: PIL images, uint8 arrays or tensors (H, W, 3) or (H, W), encoded bytes, paths;
                or samples and pairs as in `packer.sample.as_sample`, of which the image is used.
            on_error: What happens to an image that cannot be read: "raise", or a row of "nan" and
                an entry in `Embeddings.failures`.
            on_part: Called with each packed part when it is embedded, for progress.

        Raises:
            ValueError: With ``on_error="raise"`` for the first image found that cannot be read; if
                an item is nothing an image can be, or ``images`` is a single image.
        """
        check_images(images, on_error)
        stats = BatchStats()

        def watch(part: Part) -> None:
            nonlocal stats
            stats = count(stats, part)
            for failure in part.failures:
                _report(_in_input(failure, part.chunk), on_error)
            if on_part is not None:
                on_part(part)

        found = list(self.run(self._parts_of(images), on_part=watch))
        rows = [chunk.number * _CHUNK + index for chunk in found for index in chunk.indices]
        failures = [_in_input(f, chunk.number) for chunk in found for f in chunk.failures]
        for failure in failures:
            if failure.cause == NOT_FINITE:  # those of the model are not in the parts
                _report(failure, on_error)
                stats = stats + BatchStats(skipped={NOT_FINITE: 1})
        vectors = torch.full((len(rows) + len(failures), self.dim), torch.nan)
        if rows:
            vectors[torch.tensor(rows)] = torch.cat([chunk.vectors for chunk in found])
        return Embeddings(vectors, tuple(failures), stats)

    def run(
        self,
        parts: Iterable[Part],
        *,
        first: int = 0,
        on_part: Callable[[Part], None] | None = None,
    ) -> Iterator[ChunkVectors]:
        """Embed parts and join them to chunks.

        Args:
            parts: The parts of the chunks ``first``, ``first + 1``, ...; those of one chunk in
                their order, those of several mixed in any way.
            first: Number of the first chunk.
            on_part: Called with each part when it is embedded.

        Yields:
            The chunks in the order of their numbers.
        """
        open_chunks: dict[int, list[Fetched]] = {}
        complete: set[int] = set()
        following = first
        for fetched in self._fetch(parts):
            part = fetched.part
            if on_part is not None:
                on_part(part)
            # Without the pixels, which a generator of many images would pile up.
            kept = fetched._replace(part=replace(part, batch=None))
            open_chunks.setdefault(part.chunk, []).append(kept)
            if part.is_last:
                complete.add(part.chunk)
            while following in complete:
                yield join(following, open_chunks.pop(following), self.dim)
                following += 1

    def _parts_of(self, images: Iterable[Any]) -> Iterable[Part]:
        workers = self.config.workers or 0
        if not workers:
            items = (Item(str(index), image) for index, image in enumerate(images))
            return pack_chunk(0, items, self.packing, batch_tokens=self.batch_tokens)
        if not isinstance(images, Sized) or not hasattr(images, "__getitem__"):
            raise ValueError(
                "images that several processes read must be a sequence, such as a list of paths "
                f"or a dataset; got {type(images).__name__}. Give a list, or workers=0."
            )
        total = len(images)
        starts = range(0, total, _CHUNK)
        chunks = [SequenceChunk(images, start, min(start + _CHUNK, total)) for start in starts]
        return load_parts(
            chunks,
            self.packing,
            batch_tokens=self.batch_tokens,
            workers=workers,
            pin_memory=self.device.type == "cuda",
        )

    def _fetch(self, parts: Iterable[Part]) -> Iterator[Fetched]:
        """Embed parts; a device computes one while the vectors of the last are fetched.

        The end of a chunk waits for nothing, so that the chunk can be stored at once.
        """
        waiting: Fetched | None = None
        for part in parts:
            launched = self._launch(part)
            if waiting is not None:
                yield waiting.wait()
            waiting = None
            if launched.event is None:
                yield launched
            else:
                waiting = launched
        if waiting is not None:
            yield waiting.wait()

    def _launch(self, part: Part) -> Fetched:
        if part.batch is None:
            return Fetched(part, torch.zeros(0, self.dim), None)
        vectors = self.encode(part.batch)
        if self.device.type != "cuda":
            return Fetched(part, vectors.cpu(), None)
        host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
        host.copy_(vectors, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return Fetched(part, host, event)

    def _probe(self) -> int:
        """Embed one black image: what cannot run here says so before a million files are read."""
        side = self.packing.patch_size
        black = Item("", np.zeros((side, side, 3), np.uint8))
        part = next(pack_chunk(0, [black], self.packing, batch_tokens=1))
        assert part.batch is not None
        return int(self.encode(part.batch).shape[1])


class SequenceChunk(NamedTuple):
    """A slice of a sequence; its items are read where they are decoded."""

    images: Any
    """The whole sequence."""
    start: int
    """First item."""
    stop: int
    """Item after the last."""

    def read(self) -> Iterator[Item]:
        """Yield the items under their numbers."""
        for index in range(self.start, self.stop):
            yield Item(str(index), self.images[index])


def _in_input(failure: Failure, chunk: int) -> Failure:
    return replace(failure, index=chunk * _CHUNK + failure.index)


def _report(failure: Failure, on_error: OnError) -> None:
    found = f"image {failure.index}: {failure.cause}: {failure.detail}"
    if on_error == "raise":
        raise ValueError(
            f"every image must be one that can be embedded; {found}. Give on_error='nan' for a row "
            "of NaN in its place."
        )
    logger.warning("no vector for %s", found)


def _image_side(model: nn.Module) -> NaViT | CLIP:
    """Return what embeds images: the model itself, or the image tower of a classifier."""
    tower = model if isinstance(model, NaViT | CLIP) else getattr(model, "vision", None)
    if not isinstance(tower, NaViT | CLIP):
        raise ValueError(
            f"the model must be a NaViT, a CLIP, or have a NaViT as 'vision'; got "
            f"{type(model).__name__}."
        )
    return tower


def _resolve_device(model: nn.Module, name: str, *, given: bool) -> torch.device:
    at = next(model.parameters()).device
    if name == "auto":
        return at if given else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if given and (device.type != at.type or device.index not in (None, at.index)):
        raise ValueError(
            f"the model must be on the device named ({device}); it is on {at}. Move it with "
            f"model.to({name!r}), or leave device='auto'."
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} needs CUDA, which is not available. Give device='cpu'.")
    return device
