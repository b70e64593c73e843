"""Accuracy of a classifier on labelled tar shards or a folder."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from navit.evaluate.encode import evaluating, inference
from navit.evaluate.run import Evaluation, evaluation_packing
from navit.model.classifier import Classifier
from packer.batch import BatchStats, PackedBatch
from packer.config import PackerConfig
from packer.dataset import PackedDataset
from packer.folder import ImageFolder, is_flat_folder, is_image_folder
from packer.shards import expand_shards
from packer.stream import PackedStream

TOP = (1, 5)


def image_pass(
    source: Sequence[str],
    config: PackerConfig,
    sequences_per_batch: int,
    *,
    need: Literal["label", "image"] = "label",
    classes: Sequence[str] | None = None,
) -> Iterable[PackedBatch]:
    """Return one pass over images, in packed batches.

    Args:
        source: Tar shards, or one folder with one subfolder a class; without labels any folder.
        config: Packing of the training run; cropping, dropping and resolution sampling are off.
        sequences_per_batch: B.
        need: "label" skips images of shards without one, "image" reads none.
        classes: Names of a folder's classes, in the order of their labels; None: its subfolders,
            sorted.
    """
    packing = evaluation_packing(config)
    if (
        len(source) == 1
        and need == "image"
        and (is_flat_folder(source[0]) or is_image_folder(source[0]))
    ):
        return folder_pass(ImageFolder.unlabelled(source[0]), packing, sequences_per_batch)
    if len(source) == 1 and is_image_folder(source[0]):
        return folder_pass(ImageFolder.read(source[0], classes), packing, sequences_per_batch)
    return PackedStream(
        expand_shards(source),
        packing,
        sequences_per_batch=sequences_per_batch,
        need=need,
        epochs=1,
        shuffle_shards=False,
        rank=0,  # all images, also where this is one rank of a training run
        world_size=1,
    )


def folder_pass(
    folder: ImageFolder, packing: PackerConfig, sequences_per_batch: int
) -> Iterator[PackedBatch]:
    """Yield one pass over a folder's images; what is skipped is counted in the last batch."""
    usable, sizes, skipped = folder.with_sizes(max_pixels=packing.max_pixels, progress=False)
    if len(usable):
        dataset = PackedDataset(
            usable,
            sizes,
            packing,
            sequences_per_batch=sequences_per_batch,
            keys=usable.keys,
            shuffle=False,
            world_size=1,
        )
        for index in range(dataset.used_batches - 1):
            yield dataset[index]
        last = dataset[dataset.used_batches - 1]
        counts = BatchStats(samples_read=sum(skipped.values()), skipped=skipped)
        yield replace(last, stats=last.stats + counts)


def evaluate_classifier(
    model: Classifier,
    batches: Iterable[PackedBatch],
    *,
    device: torch.device,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Evaluation:
    """Classify every image of a pass once.

    Args:
        model: The model, on ``device``.
        batches: Labelled images, see `image_pass`.
        device: Where the model runs.
        autocast_dtype: Precision of the matrix products; None leaves autocast off.
        progress: Whether to show a progress bar.

    Returns:
        ``accuracy@1`` and ``accuracy@5`` (as far as there are classes), ``chance/accuracy@1``,
        ``loss``; for multi-label targets a hit is any of the image's classes.

    Raises:
        ValueError: If there is no labelled image.
    """
    stats = BatchStats()
    hits = dict.fromkeys(TOP, 0)
    bar = tqdm(batches, desc="classifying", unit="batch", leave=False, disable=not progress)
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
            f"the validation data hold no usable labelled image; {stats.samples_read} samples "
            f"were read and skipped: {dict(stats.skipped)}. Check the shards or the folder."
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
