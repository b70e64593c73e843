"""Run a model over a finite stream of batches; read what the shards say about their samples."""

import json
import logging
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from navit.evaluate.prompts import EncodeTexts
from packer.batch import PackedBatch, PackedText
from packer.captions import CaptionTokenizer, pack_text

logger = logging.getLogger(__name__)


@runtime_checkable
class ImageTextModel(Protocol):
    """What evaluation asks of a model; `navit.CLIP` has it."""

    def modules(self) -> Iterator[nn.Module]:
        """Yield the module and all below it."""

    def encode_image(self, batch: PackedBatch, *, normalize: bool = True) -> Tensor:
        """Return one vector per image, (N, D)."""

    def encode_text(self, captions: PackedText, *, normalize: bool = True) -> Tensor:
        """Return one vector per caption, (M, D)."""


@dataclass(frozen=True, kw_only=True)
class EncodedPairs:
    """Vectors of N images and of their captions, float32 on the CPU; row i belongs to image i."""

    image: Float[Tensor, "N D"]
    """One vector of norm 1 per image."""
    text: Float[Tensor, "N D"]
    """One vector of norm 1 per caption."""
    keys: tuple[str, ...]
    """Key of each image."""
    texts: tuple[str, ...]
    """Caption of each image; equal captions are hits of one another."""


def encode_pairs(
    model: ImageTextModel,
    batches: Iterable[PackedBatch],
    device: torch.device | str,
    autocast_dtype: torch.dtype | None = None,
    *,
    progress: bool = True,
) -> EncodedPairs:
    """Encode the images and captions of all batches.

    Args:
        model: The model, already on `device`. It runs in evaluation mode; the mode each of its
            modules had is restored.
        batches: A finite pass, one caption per image; batches without images are passed over.
        device: Where the model runs.
        autocast_dtype: Precision of the matrix products; None leaves autocast off.
        progress: Whether to show a progress bar.

    Returns:
        All pairs in the order of the batches.

    Raises:
        ValueError: If a batch has no captions, or not one caption per image.
    """
    images: list[Tensor] = []
    texts: list[Tensor] = []
    keys: list[str] = []
    captions: list[str] = []
    bar = tqdm(batches, desc="encoding", unit="batch", leave=False, disable=not progress)
    with evaluating(model), inference(device, autocast_dtype):
        for batch in bar:
            if not batch.num_images:
                continue
            packed, written = _captions(batch)
            on_device = batch.to(device)
            images.append(model.encode_image(on_device, normalize=True).float().cpu())
            vectors = model.encode_text(packed.to(device), normalize=True).float().cpu()
            texts.append(vectors[packed.image_index.cpu().argsort()])
            keys += batch.keys
            captions += written
    empty = torch.zeros(0, 0)
    return EncodedPairs(
        image=torch.cat(images) if images else empty,
        text=torch.cat(texts) if texts else empty,
        keys=tuple(keys),
        texts=tuple(captions),
    )


def text_encoder(
    model: ImageTextModel,
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


def read_metadata(shard_paths: Sequence[str | Path]) -> dict[str, dict[str, Any]]:
    """Read the json member of every sample of local tar shards.

    Args:
        shard_paths: The shards; braces already expanded.

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


def _captions(batch: PackedBatch) -> tuple[PackedText, tuple[str, ...]]:
    """Return the batch's captions as tokens and as written, checked to be one per image."""
    if batch.captions is None or batch.texts is None:
        raise ValueError(
            f"batches must hold captions as texts and tokens to be evaluated; the batch of "
            f"{batch.keys[0]!r} has none. Give its loader a tokenizer and data with captions."
        )
    found = sorted(batch.captions.image_index.tolist())
    if found != list(range(batch.num_images)):
        raise ValueError(
            f"batches must hold one caption per image; got captions of images {found} beside "
            f"{batch.num_images} images."
        )
    return batch.captions, batch.texts


@contextmanager
def evaluating(model: ImageTextModel | nn.Module) -> Iterator[None]:
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
