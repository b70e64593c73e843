"""How well a masked predictor tells the colours of corrupted patches."""

from collections.abc import Iterable

import torch
from tqdm import tqdm

from navit.evaluate.encode import evaluating, inference
from navit.evaluate.run import Evaluation
from navit.model.corrupt import COLOURS
from navit.model.masked import MaskedPredictor
from packer.batch import BatchStats, PackedBatch

EVALUATION_SEED = 0
"""Every evaluation corrupts the same patches."""


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
    bar = tqdm(batches, desc="predicting", unit="batch", leave=False, disable=not progress)
    with evaluating(model), inference(device, autocast_dtype):
        for batch in bar:
            stats = stats + batch.stats
            if batch.num_images:
                found = model.predict(batch.to(device), EVALUATION_SEED)
                best = found.logits.topk(max(hits)).indices == found.colours[:, None]
                for k in hits:
                    hits[k] += int(best[:, :k].sum())
                counts += torch.bincount(found.colours.cpu(), minlength=COLOURS)
                loss += float(found.losses().sum())
    asked = int(counts.sum())
    if not asked:
        raise ValueError(
            f"the validation data must hold images with corrupted patches; {stats.samples_read} "
            f"samples were read and skipped: {dict(stats.skipped)}. Check the shards or the folder."
        )
    metrics = {f"masked_accuracy@{k}": hits[k] / asked for k in hits}
    metrics["chance/masked_accuracy@1"] = int(counts.max()) / asked
    return Evaluation({**metrics, "masked_loss": loss / stats.images}, stats)
