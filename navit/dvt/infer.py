"""A trained `DVT` at test time: a stage packs only the images that no stage before was sure of.

`DVT.exits` wants every image packed for every stage; here an image that leaves early is never
decoded at the sizes it does not need, and what goes on is packed anew, densely.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from navit.dvt.collate import StagedCollator
from navit.dvt.embedded import EmbeddedStage, embed_stage
from navit.dvt.model import DVT, Carried, DVTExits, places_of
from navit.dvt.resample import Counts, Grid
from navit.model.transfer import to_device
from packer.errors import SkipSample
from packer.sample import Sample, as_sample


@torch.inference_mode()
def classify(
    model: DVT, samples: Sequence[Any], collate: StagedCollator, thresholds: Sequence[float]
) -> DVTExits:
    """Classify samples, letting each leave at the first stage that is sure of it.

    All samples go through a stage together, so between stages the undecided ones' tokens are held,
    with relationship reuse their attention logits too: (layers x heads) x tokens^2 values each.
    Call it with as many at a time as there is memory for.

    Args:
        model: In evaluation mode, on its device.
        samples: N samples, see `packer.sample.as_sample`; keys must differ.
        collate: Packs for each of K stages.
        thresholds: K - 1 values; an image leaves where its largest probability reaches its
            stage's. The last stage keeps what it gets.

    Returns:
        Where each sample left and with what, in their order. One that cannot be read has stage -1
        and logits of NaN; one that breaks only at a later stage keeps the answer it had.

    Raises:
        ValueError: If there is not one threshold less than stages, more stages than the model has,
            or two samples share a key.
    """
    if len(collate.stages) > model.config.num_stages:
        raise ValueError(
            f"the model has {model.config.num_stages} stages, and as many budgets at most can be "
            f"packed; got {len(collate.stages)}."
        )
    if len(thresholds) != len(collate.stages) - 1:
        raise ValueError(
            f"There must be one threshold less than stages; got {len(thresholds)} for "
            f"{len(collate.stages)}."
        )
    read = [_read(sample, collate.stages[0].config.max_pixels) for sample in samples]
    run = _Run(model, read)
    waiting: list[tuple[Counts, Carried | None]] = [(np.arange(len(samples)), None)]
    for k, pack in enumerate(collate.stages):
        places = np.concatenate([images for images, _ in waiting] or [np.arange(0)])
        batch = pack([read[i] for i in places.tolist()])
        if not batch.num_images:
            break
        present = np.asarray([run.place[key] for key in batch.keys], dtype=np.int64)
        tower = model.tower(k)
        stage = _spread(embed_stage(tower, batch.to(run.device)), present, len(samples))
        threshold = (*thresholds, 0.0)[k]
        waiting = [
            left
            for images, carried in waiting
            for part in run.parts(stage, present, images, carried)
            if (left := run.answer(k, stage, *part, threshold))
        ]
        if not waiting or k == len(thresholds):
            break
    return DVTExits(run.logits, to_device(run.stages, run.device))


class _Run:
    """Answers so far, and how images are run."""

    def __init__(self, model: DVT, samples: Sequence[Sample | None]) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.logits = torch.full(
            (len(samples), model.config.num_classes), torch.nan, device=self.device
        )
        self.stages = np.full(len(samples), -1, dtype=np.int64)
        self.place: dict[str, int] = {}
        for i, sample in enumerate(samples):
            if sample is not None and self.place.setdefault(sample.key, i) != i:
                raise ValueError(
                    "the keys of samples must differ, to know whose answer is whose; got "
                    f"{sample.key!r} twice. Give each its own key."
                )

    def parts(
        self, stage: EmbeddedStage, present: Counts, images: Counts, carried: Carried | None
    ) -> Iterator[tuple[Counts, Carried | None]]:
        """Split images that wait together into those that can be run together."""
        images = images[np.isin(images, present)]  # some broke at this stage alone
        if not self.model.config.relation_reuse:
            yield from [(images, carried)] if len(images) else []
            return
        vision = self.model.config.vision
        most = self.model.config.max_logits // (vision.depth * vision.num_heads)
        buckets: dict[Grid, list[int]] = {}
        for image in images.tolist():
            buckets.setdefault(stage.grids[image], []).append(image)
        for (rows, cols), bucket in buckets.items():
            size = max(1, most // (vision.num_prefix + rows * cols) ** 2)
            for start in range(0, len(bucket), size):
                part = np.asarray(bucket[start : start + size])
                yield part, _of(carried, part)

    def answer(
        self,
        k: int,
        stage: EmbeddedStage,
        images: Counts,
        carried: Carried | None,
        threshold: float,
    ) -> tuple[Counts, Carried] | None:
        """Run images through a stage, note their answers; return those that are not sure."""
        answers, handed = self.model.run_stage(k, stage, images, carried)
        self.logits[to_device(images, self.device)] = answers.to(self.logits.dtype)
        self.stages[images] = k
        sure: Tensor = answers.softmax(-1).amax(-1) >= threshold
        left = images[~sure.cpu().numpy()]  # NaN goes on
        selected = _of(handed, left)
        return (left, selected) if len(left) and selected is not None else None


def _read(sample: Any, max_pixels: int) -> Sample | None:
    """Read a sample's file and key once for all stages; None, which packing counts, if it fails."""
    try:
        return as_sample(sample, max_pixels=max_pixels)
    except SkipSample:
        return None


def _of(carried: Carried | None, images: Counts) -> Carried | None:
    return None if carried is None else carried.select(places_of(carried.images, images))


def _spread(stage: EmbeddedStage, present: Counts, count: int) -> EmbeddedStage:
    """Number a stage's images as the samples are; those it has not have no token."""
    starts = np.zeros(count, dtype=np.int64)
    starts[present] = stage.starts
    grids: list[Grid] = [(0, 0)] * count
    for place, grid in zip(present.tolist(), stage.grids, strict=True):
        grids[place] = grid
    return EmbeddedStage(stage.x, starts, tuple(grids), stage.backend)
