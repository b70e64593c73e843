"""Run a model over a finite stream of batches; read what the shards say about their samples."""

import json
import logging
import tarfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from tqdm import tqdm

from navit.evaluate.prompts import EncodeTexts
from packer.batch import BatchStats, PackedBatch, PackedText
from packer.captions import CaptionTokenizer, pack_text

logger = logging.getLogger(__name__)


EncodeImages = Callable[[PackedBatch], Mapping[str, Tensor]]
"""A batch of N images -> vectors by name, one of each name per image: (N, D) each."""


@runtime_checkable
class TextModel(Protocol):
    """What evaluation asks of a model's text side; `navit.CLIP` has it."""

    def modules(self) -> Iterator[nn.Module]:
        """Yield the module and all below it."""

    def encode_text(self, captions: PackedText, *, normalize: bool = True) -> Tensor:
        """Return one vector per caption, (M, D)."""


@dataclass(frozen=True, kw_only=True)
class EncodedPairs:
    """Vectors of N images and of a caption of each, float32 on the CPU; row i is of image i."""

    image: Float[Tensor, "N D"]
    """One vector of norm 1 per image."""
    text: Float[Tensor, "N D"]
    """One vector of norm 1 per caption."""
    keys: tuple[str, ...]
    """Key of each image."""
    texts: tuple[str, ...]
    """Caption of each image, the first one where there are several; equal captions are hits of one
    another."""


@dataclass(frozen=True, kw_only=True)
class EncodedImages:
    """Vectors of N images, in the order of the batches, with what came with the images."""

    vectors: Mapping[str, Tensor]
    """By name, float32 (N, D) on the CPU; empty where there were no images."""
    keys: tuple[str, ...] = ()
    """Key of each image."""
    texts: tuple[str, ...] = ()
    """Text of each image; "" where it has none."""
    labels: Int64[Tensor, " N"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """Label of each image; -1 where it has none."""
    stats: BatchStats = field(default_factory=BatchStats)
    """Counts of images, tokens and skipped samples."""
    seconds: float = 0.0
    """Time it took, reading and decoding included."""
    model_seconds: float = 0.0
    """Of this, the model's."""

    @classmethod
    def join(cls, parts: Sequence["EncodedImages"]) -> "EncodedImages":
        """Put parts together, in their order."""
        filled = [part for part in parts if part.keys]
        names = filled[0].vectors if filled else {}
        return cls(
            vectors={name: torch.cat([part.vectors[name] for part in filled]) for name in names},
            keys=tuple(key for part in filled for key in part.keys),
            texts=tuple(text for part in filled for text in part.texts),
            labels=torch.cat([torch.zeros(0, dtype=torch.int64), *(p.labels for p in filled)]),
            stats=sum((part.stats for part in parts), BatchStats()),
            seconds=sum(part.seconds for part in parts),
            model_seconds=sum(part.model_seconds for part in parts),
        )


def encode_images(
    model: nn.Module,
    encode: EncodeImages,
    batches: Iterable[PackedBatch],
    device: torch.device | str,
    autocast_dtype: torch.dtype | None = None,
    *,
    chunk_size: int = 4096,
    progress: bool = True,
    title: str = "encoding",
) -> Iterator[EncodedImages]:
    """Encode the images of all batches.

    Args:
        model: Switched to evaluation mode while a batch is encoded; the mode each of its modules
            had is restored.
        encode: Turns a batch on ``device`` into vectors with that model.
        batches: A finite pass.
        device: Where the model runs.
        autocast_dtype: Precision of the matrix products; None leaves autocast off.
        chunk_size: Images handed over at a time, at least.
        progress: Whether to show a progress bar.
        title: What the bar says.

    Yields:
        The images in the order of the batches, in parts of ``chunk_size`` and a rest, which is
        given even where it is empty: it then has the counts of what was skipped.

    Raises:
        ValueError: If labels are not class indices.
    """
    waiting: list[EncodedImages] = []
    bar = tqdm(desc=title, unit=" images", leave=False, disable=not progress)
    iterator = iter(batches)
    with bar:
        while True:
            started = time.perf_counter()
            batch = next(iterator, None)
            read = time.perf_counter()
            if batch is None:
                break
            vectors: dict[str, Tensor] = {}
            if batch.num_images:
                with evaluating(model), inference(device, autocast_dtype):
                    found = encode(batch.to(device))
                    vectors = {name: value.float().cpu() for name, value in found.items()}
            done = time.perf_counter()
            waiting.append(_of_batch(batch, vectors, done - started, done - read))
            bar.update(batch.num_images)
            if sum(len(part.keys) for part in waiting) >= chunk_size:
                yield EncodedImages.join(waiting)
                waiting = []
    yield EncodedImages.join(waiting)


def _of_batch(
    batch: PackedBatch, vectors: Mapping[str, Tensor], seconds: float, model_seconds: float
) -> EncodedImages:
    labels = batch.labels
    if labels is None:
        labels = torch.full((batch.num_images,), -1)
    if labels.ndim != 1:
        raise ValueError(
            f"labels must be class indices, one an image; got {labels.shape[1]} targets an image."
        )
    return EncodedImages(
        vectors=vectors,
        keys=tuple(batch.keys),
        texts=tuple(batch.texts) if batch.texts is not None else ("",) * batch.num_images,
        labels=labels,
        stats=batch.stats,
        seconds=seconds,
        model_seconds=model_seconds,
    )


def text_encoder(
    model: TextModel,
    tokenizer: CaptionTokenizer,
    max_tokens: int,
    device: torch.device | str,
    autocast_dtype: torch.dtype | None = None,
    *,
    batch_size: int = 512,
) -> EncodeTexts:
    """Make the function that `navit.evaluate.prompts` encodes its prompts with.

    Args:
        model: The model, already on `device`.
        tokenizer: The tokenizer it was trained with.
        max_tokens: Tokens kept per text, the end token included.
        device: Where the model runs.
        autocast_dtype: Precision of the matrix products; None leaves autocast off.
        batch_size: Texts encoded at a time.

    Returns:
        A function from M texts to M normalised vectors, float32 on the CPU; at least one text.
    """

    def encode(texts: list[str]) -> Tensor:
        chunks = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
        with evaluating(model), inference(device, autocast_dtype):
            vectors = [
                model.encode_text(
                    pack_text(tokenizer.encode(chunk, max_tokens)).to(device), normalize=True
                )
                for chunk in chunks
            ]
        return torch.cat([part.float().cpu() for part in vectors])

    return encode


def read_metadata(
    shard_paths: Sequence[str | Path], *, keep: Collection[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Read the json member of every sample of local tar shards.

    Args:
        shard_paths: The shards; braces already expanded.
        keep: Fields that are kept, where memory counts; None keeps all.

    Returns:
        The json objects under ``<shard file name>/<member key>``, the keys of a stream. Samples
        without json, or with json that is no object, are absent. A cut shard gives the samples
        before the cut and a warning in the log.

    Raises:
        FileNotFoundError: If a shard does not exist.
    """
    metadata: dict[str, dict[str, Any]] = {}
    for path in map(Path, shard_paths):
        with path.open("rb") as file:
            try:
                with tarfile.open(fileobj=file, mode="r|*") as tar:
                    for member, content in _json_members(tar):
                        fields = _parse(content, f"{path.name}/{member}")
                        if fields is not None:
                            if keep is not None:
                                fields = {n: v for n, v in fields.items() if n in keep}
                            metadata[f"{path.name}/{member}"] = fields
            except (tarfile.TarError, EOFError, OSError) as error:
                logger.warning("%s: reading metadata stopped early: %s", path.name, error)
    return metadata


def _json_members(tar: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in tar:
        # Keys as packer.shards splits them: at the last dot, any case, no hidden files.
        key, _, extension = member.name.removeprefix("./").rpartition(".")
        hidden = member.name.rpartition("/")[2].startswith(".")
        if member.isfile() and extension.lower() == "json" and not hidden:
            file = tar.extractfile(member)
            assert file is not None  # a regular file has content
            yield key, file.read()


def _parse(content: bytes, key: str) -> dict[str, Any] | None:
    try:
        fields = json.loads(content)
    except ValueError as error:
        logger.warning("%s: json not readable: %s", key, error)
        return None
    return fields if isinstance(fields, dict) else None


@contextmanager
def evaluating(model: TextModel | nn.Module) -> Iterator[None]:
    """Switch to evaluation mode; afterwards each module is back in the mode it was in."""
    before = [(module, module.training) for module in model.modules()]
    for module, _ in before:
        module.training = False
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def inference(device: torch.device | str, dtype: torch.dtype | None) -> Iterator[None]:
    """Run without gradients, under autocast where a type is given."""
    kind = torch.device(device).type
    with torch.inference_mode(), torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
        yield
