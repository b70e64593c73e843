"""Evaluate an image-text model on tar shards: retrieval, caption prompts, shape-only baseline."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from navit.evaluate.encode import EncodedPairs, encode_pairs, read_metadata, text_encoder
from navit.evaluate.prompts import evaluate_prompts
from navit.evaluate.retrieval import retrieval_chance, retrieval_metrics
from navit.evaluate.shape_baseline import shape_baselines
from navit.model import CLIP
from packer.batch import BatchStats, PackedBatch
from packer.captions import CaptionTokenizer
from packer.config import PackerConfig
from packer.plan.drop import NoDrop
from packer.plan.resize import Native, NoCrop
from packer.shards import expand_shards
from packer.stream import PackedStream


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    metrics: dict[str, float]
    """Shares in [0, 1] by name: ``text_to_image/recall@1``, ``<set>/prompt_accuracy@1``, ..."""
    stats: BatchStats
    """Counts of images, tokens and skipped samples over the whole pass."""
    pairs: EncodedPairs | None = None
    """The vectors the metrics were computed from; None for a classifier."""


def evaluation_packing(config: PackerConfig) -> PackerConfig:
    """Return the packing of an evaluation: whole images, every token, within the token budget."""
    return replace(config, resolution=Native(), crop=NoCrop(), token_drop=NoDrop())


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
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the shards hold no pair.
    """
    paths = expand_shards(shards)
    stream = PackedStream(
        paths,
        evaluation_packing(config),
        sequences_per_batch=sequences_per_batch,
        tokenizer=tokenizer,
        epochs=1,
        shuffle_shards=False,
    )
    counted = [BatchStats()]

    def batches() -> Iterator[PackedBatch]:
        for batch in stream:
            counted[0] = counted[0] + batch.stats
            yield batch

    pairs = encode_pairs(model, batches(), device, autocast_dtype, progress=progress)
    stats = counted[0]
    if not pairs.keys:
        raise ValueError(
            f"the validation shards hold no usable image-text pair; {stats.samples_read} samples "
            f"were read and skipped: {dict(stats.skipped)}. Check the shards."
        )
    index = torch.arange(len(pairs.keys))
    metrics = retrieval_metrics(pairs.image, pairs.text, index, pairs.texts)
    chance = retrieval_chance(len(index), index, pairs.texts)
    metrics |= {f"chance/{name}": value for name, value in chance.items()}
    metadata = read_metadata(paths)
    encode_texts = text_encoder(model, tokenizer, config.max_text_tokens, device, autocast_dtype)
    metrics |= evaluate_prompts(pairs.image, pairs.keys, metadata, encode_texts)
    if train_metadata is not None:
        metrics |= shape_baselines(train_metadata, metadata)
    return Evaluation(metrics=metrics, pairs=pairs, stats=stats)
