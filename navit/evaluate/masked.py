"""How well a masked predictor tells the colours of corrupted patches."""

from collections.abc import Iterable

import numpy as np
import torch
from tqdm import tqdm

from navit.evaluate.classify import hits_at
from navit.evaluate.encode import evaluating, inference
from navit.evaluate.run import Evaluation, MaskedExample
from navit.model.corrupt import COLOURS
from navit.model.masked import MaskedOutput, MaskedPredictor
from packer.batch import BatchStats, PackedBatch

EVALUATION_SEED = 0
"""Every evaluation corrupts the same patches."""
EXAMPLES = 6
"""Images shown, the first ones."""
_GREY = 127


def evaluate_masked(
    model: MaskedPredictor,
    batches: Iterable[PackedBatch],
    *,
    device: torch.device,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Evaluation:
    """Predict the corrupted patches of every image of a pass once.

    Args:
        model: The model, on ``device``.
        batches: Images; their labels and captions are not read.
        device: Where the model runs.
        autocast_dtype: Precision of the matrix products; None leaves autocast off.
        progress: Whether to show a progress bar.

    Returns:
        ``masked_accuracy@1`` and ``@5``: share of the corrupted patches whose colour class is the
        best, or among the five best; ``chance/masked_accuracy@1``: that of always answering the
        most frequent class; ``masked_loss``: the mean over images, as trained on.

    Raises:
        ValueError: If no patch of any image is corrupted.
    """
    stats = BatchStats()
    hits, loss = {1: 0, 5: 0}, 0.0
    counts = torch.zeros(COLOURS, dtype=torch.int64)
    examples: list[MaskedExample] = []
    bar = tqdm(batches, desc="predicting", unit="batch", leave=False, disable=not progress)
    with evaluating(model), inference(device, autocast_dtype):
        for batch in bar:
            stats = stats + batch.stats
            if batch.num_images:
                found = model.predict(batch.to(device), EVALUATION_SEED)
                logits, colours = found.logits.float().cpu(), found.colours.cpu()
                for k in hits:
                    hits[k] += int(hits_at(logits, colours, k).sum())
                counts += torch.bincount(colours, minlength=COLOURS)
                loss += float(found.losses().sum())
                for image in range(min(batch.num_images, EXAMPLES - len(examples))):
                    examples.append(show_image(batch, found, image))
    asked = int(counts.sum())
    if not asked:
        raise ValueError(
            f"the validation data must hold images with corrupted patches; of {stats.samples_read} "
            f"samples {stats.images} were used, and skipped: {dict(stats.skipped)}. Check the "
            "shards or the folder."
        )
    metrics = {f"masked_accuracy@{k}": hits[k] / asked for k in hits}
    metrics["chance/masked_accuracy@1"] = int(counts.max()) / asked
    metrics["masked_loss"] = loss / stats.images
    return Evaluation(metrics, stats, examples=tuple(examples))


def show_image(batch: PackedBatch, found: MaskedOutput, image: int) -> MaskedExample:
    """Put an image of a batch together again: as it was, corrupted, and as it was predicted."""
    row, slot = (batch.image_index == image).nonzero()[0].tolist()
    sizes = batch.patch_sizes
    side = batch.patch_size if sizes is None else int(sizes[row, slot])
    inside = (batch.segment_ids[row] == slot + 1).nonzero().squeeze(1)
    mine = found.image.cpu() == image
    hidden = dict(
        zip(
            found.places.cpu()[mine].tolist(),
            found.logits.argmax(1).cpu()[mine].tolist(),
            strict=True,
        )
    )
    rows, cols = batch.grid_sizes[row, slot].tolist()
    shown = np.full((3, rows, cols, side, side, 3), 255, dtype=np.uint8)
    for place in inside.tolist():
        at = (slice(None), *batch.position_ids[row, place].tolist())
        values = batch.patches[row, place, : 3 * side**2].view(side, side, 3)
        shown[at] = values.numpy()
        colour = hidden.get(row * batch.seq_len + place)
        if colour is not None:
            shown[(1, *at[1:])] = _GREY
            shown[(2, *at[1:])] = class_colour(colour)
    whole = shown.swapaxes(2, 3).reshape(3, rows * side, cols * side, 3)
    return MaskedExample(*whole)


def class_colour(number: int) -> tuple[int, int, int]:
    """Return the middle of a class of colours, as (red, green, blue)."""
    red, green, blue = number >> 6, number >> 3 & 7, number & 7
    return 32 * red + 16, 32 * green + 16, 32 * blue + 16
