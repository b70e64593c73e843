"""Evaluate an image-text model on tar shards: retrieval, caption prompts, shape-only baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from navit.evaluate.captions import Captions, encode_unique, pair_metrics
from navit.evaluate.encode import (
    EncodedImages,
    EncodedPairs,
    encode_images,
    read_metadata,
    text_encoder,
)
from navit.evaluate.prompts import DEFAULT_TEMPLATES, evaluate_prompts
from navit.evaluate.shape_baseline import shape_baselines
from navit.model import CLIP
from packer.batch import BatchStats, PackedBatch
from packer.captions import CaptionTokenizer
from packer.config import PackerConfig
from packer.plan.drop import NoDrop
from packer.plan.patch_size import OnePatchSize
from packer.plan.resize import Native, NoCrop
from packer.shards import expand_shards
from packer.stream import PackedStream


@dataclass(frozen=True)
class MaskedExample:
    """An image, and the colours predicted for its corrupted patches."""

    image: UInt8[np.ndarray, "H W 3"]
    """What the model was to see."""
    corrupted: UInt8[np.ndarray, "H W 3"]
    """Corrupted patches in grey."""
    predicted: UInt8[np.ndarray, "H W 3"]
    """In their place the colours predicted."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    metrics: dict[str, float]
    """Shares in [0, 1] by name: ``text_to_image/recall@1``, ``<set>/prompt_accuracy@1``, ..."""
    stats: BatchStats
    """Counts of images, tokens and skipped samples over the whole pass."""
    pairs: EncodedPairs | None = None
    """The vectors the metrics were computed from; None for a classifier."""
    examples: tuple[MaskedExample, ...] = ()
    """Of masked prediction: a few images and what was predicted of them."""


def evaluation_packing(config: PackerConfig) -> PackerConfig:
    """Return the packing of an evaluation: whole images, every token, within the token budget.

    Of a run that draws patch sizes it is `patch_size`.
    """
    return replace(
        config,
        resolution=Native(),
        crop=NoCrop(),
        token_drop=NoDrop(),
        patch_sizes=OnePatchSize(),
    )


def evaluate_clip(
    model: CLIP,
    tokenizer: CaptionTokenizer,
    shards: str | Path | Sequence[str | Path],
    config: PackerConfig,
    *,
    sequences_per_batch: int,
    device: torch.device,
    autocast_dtype: torch.dtype | None = None,
    train_metadata: Mapping[str, Mapping[str, Any]] | None = None,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    progress: bool = True,
) -> Evaluation:
    """Encode every pair of the shards once and compute all metrics they allow.

    Args:
        model: The model, on ``device``.
        tokenizer: The tokenizer it was trained with.
        shards: Validation shards: a path, a brace range, or a list of these.
        config: Packing of the training run; cropping, dropping and resolution sampling are off.
        sequences_per_batch: B of the pass.
        device: Where the model runs.
        autocast_dtype: Precision of the matrix products; None leaves autocast off.
        train_metadata: Json of the training samples, for the shape-only baseline; None leaves the
            baseline out.
        templates: Prompts of the caption-prompt accuracy.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the shards hold no pair.
    """
    paths = expand_shards(shards)
    stream = PackedStream(
        paths,
        evaluation_packing(config),
        sequences_per_batch=sequences_per_batch,
        epochs=1,
        shuffle_shards=False,
        rank=0,  # all images, also where this is one rank of a training run
        world_size=1,
    )

    def encode(batch: PackedBatch) -> dict[str, Tensor]:
        return {"embedding": model.encode_image(batch, normalize=True)}

    found = EncodedImages.join(
        list(encode_images(model, encode, stream, device, autocast_dtype, progress=progress))
    )
    if not found.keys:
        raise ValueError(
            f"the validation shards hold no usable image-text pair; {found.stats.samples_read} "
            f"samples were read and skipped: {dict(found.stats.skipped)}. Check the shards."
        )
    image, metadata = found.vectors["embedding"], read_metadata(paths)
    encode_texts = text_encoder(model, tokenizer, config.max_text_tokens, device, autocast_dtype)
    captions = Captions.of([(text,) for text in found.texts])
    text = encode_unique(encode_texts, captions.texts)
    metrics = pair_metrics(image, text, captions)
    metrics |= evaluate_prompts(image, found.keys, metadata, encode_texts, templates=templates)
    if train_metadata is not None:
        metrics |= shape_baselines(train_metadata, metadata)
    pairs = EncodedPairs(image=image, text=text, keys=found.keys, texts=captions.texts)
    return Evaluation(metrics=metrics, pairs=pairs, stats=found.stats)
