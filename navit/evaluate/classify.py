"""Accuracy of a classifier on labelled tar shards."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from navit.evaluate.encode import evaluating, inference
from navit.evaluate.run import Evaluation, evaluation_packing
from navit.model.classifier import Classifier
from packer.batch import BatchStats
from packer.config import PackerConfig
from packer.shards import expand_shards
from packer.stream import PackedStream

TOP = (1, 5)


def evaluate_classifier(
    model: Classifier,
    shards: str | Path | Sequence[str | Path],
    config: PackerConfig,
    *,
    sequences_per_batch: int,
    device: torch.device,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Evaluation:
    """Classify every labelled image of the shards once.

    Args:
        model: The model, on ``device``.
        shards: Validation shards: a path, a brace range, or a list of these.
        config: Packing of the training run; cropping, dropping and resolution sampling are off.
        sequences_per_batch: B of the pass.
        device: Where the model runs.
        autocast_dtype: Precision of the matrix products; None leaves autocast off.
        progress: Whether to show a progress bar.

    Returns:
        ``accuracy@1`` and ``accuracy@5`` (as far as there are classes), ``chance/accuracy@1``,
        ``loss``; for multi-label targets a hit is any of the image's classes.

    Raises:
        ValueError: If the shards hold no labelled image.
    """
    stream = PackedStream(
        expand_shards(shards),
        evaluation_packing(config),
        sequences_per_batch=sequences_per_batch,
        need="label",
        epochs=1,
        shuffle_shards=False,
    )
    stats = BatchStats()
    hits = dict.fromkeys(TOP, 0)
    bar = tqdm(stream, desc="classifying", unit="batch", leave=False, disable=not progress)
    with evaluating(model), inference(device, autocast_dtype):
        for batch in bar:
            stats = stats + batch.stats
            if batch.num_images:
                assert batch.labels is not None, "the stream needs labels"
                logits = model(batch.to(device)).float().cpu()
                for k in TOP:
                    hits[k] += int(hits_at(logits, batch.labels, k).sum())
    if not stats.images:
        raise ValueError(
            f"the validation shards hold no usable labelled image; {stats.samples_read} samples "
            f"were read and skipped: {dict(stats.skipped)}. Check the shards."
        )
    classes = model.config.num_classes
    metrics = {f"accuracy@{k}": hits[k] / stats.images for k in TOP if k <= classes}
    return Evaluation({**metrics, "chance/accuracy@1": 1 / classes}, stats)


def hits_at(logits: Float[Tensor, "N C"], labels: Tensor, k: int) -> Tensor:
    """Whether one of each image's classes is among its k best: bool (N,).

    A class that only ties with the k-th best is not counted: a constant classifier must not hit.
    """
    targets = labels[:, None] == torch.arange(logits.shape[1]) if labels.ndim == 1 else labels > 0
    best = logits.masked_fill(~targets, -torch.inf).amax(1)
    # Other classes that are at least as good stand before it.
    before = ((logits >= best[:, None]) & ~targets).sum(1)
    return (before < k) & targets.any(1)
