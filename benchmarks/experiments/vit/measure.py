"""What a tower or a classifier is worth on the test images."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int64
from torch import Tensor

from navit.evaluate.classify import evaluate_classifier, image_pass
from navit.evaluate.encode import EncodedImages, encode_images
from navit.evaluate.probes import FewShot, ProbeConfig
from navit.model import NaViT
from navit.model.classifier import Classifier
from navit.model.corrupt import COLOURS, colour_classes
from navit.train.config import TrainConfig
from navit.train.setup import resolve_autocast, resolve_device
from packer.batch import PackedBatch
from packer.demo.scene import FILLS

SHOTS = 10
TOLD: dict[str, Callable[[Int64[Tensor, " N"]], Int64[Tensor, " N"]]] = {
    "colour and fill": lambda labels: labels,
    "colour": lambda labels: labels // len(FILLS),
    "fill": lambda labels: labels % len(FILLS),
}
"""What a probe is asked for, from the label of an image."""


@dataclass(frozen=True)
class Data:
    """Shards."""

    train: tuple[str, ...]
    """To train on, and to take the probes' examples from."""
    test: tuple[str, ...]
    """To measure on."""


def probe(model: NaViT | None, config: TrainConfig, data: Data) -> dict[str, float]:
    """Return accuracies of 10-shot probes on vectors of a tower, or on colour histograms.

    The images a probe is given are the same for every model and seed.
    """
    examples, tests = (_vectors(model, config, shards) for shards in (data.train, data.test))
    found = {}
    for told, of in TOLD.items():
        vectors = examples.vectors["vector"]
        few = FewShot(vectors.shape[1], ProbeConfig(shots=(SHOTS,)))
        few.add(vectors, of(examples.labels), examples.keys)
        metrics = few.metrics(tests.vectors["vector"], of(tests.labels))
        found[told] = metrics[f"{SHOTS}_shot_accuracy@1"]
    return found


def classify(model: Classifier, config: TrainConfig, data: Data, budget: int) -> dict[str, float]:
    """Return the accuracy of a classifier at a token budget."""
    device = resolve_device(config)
    packing = replace(config.packer, max_tokens=budget)
    batches = image_pass(data.test, packing, config.sequences_per_batch)
    found = evaluate_classifier(
        model.to(device),
        batches,
        device=device,
        autocast_dtype=resolve_autocast(config, device),
        progress=False,
    )
    return {"place": found.metrics["accuracy@1"]}


def _vectors(model: NaViT | None, config: TrainConfig, shards: tuple[str, ...]) -> EncodedImages:
    device = resolve_device(config)

    def encode(batch: PackedBatch) -> dict[str, Tensor]:
        return {"vector": histograms(batch) if model is None else model(batch).pooled}

    return EncodedImages.join(
        list(
            encode_images(
                torch.nn.Identity() if model is None else model.to(device),
                encode,
                image_pass(shards, config.packer, config.sequences_per_batch),
                device,
                None if model is None else resolve_autocast(config, device),
                progress=False,
            )
        )
    )


def histograms(batch: PackedBatch) -> Tensor:
    """Return how often each of the 512 colour classes is the mean of a patch: (N, 512) shares."""
    colours = colour_classes(batch.patches.flatten(0, 1), batch.patch_size**2)
    found = torch.zeros(batch.num_images, COLOURS)
    parts = colours.cpu().split_with_sizes(list(batch.segment_lengths))
    for part, image in zip(parts, batch.segment_images, strict=True):
        if image >= 0:
            found[image] = torch.bincount(part, minlength=COLOURS) / len(part)
    return found
