"""Losses of classification: softmax over classes, or one sigmoid a class."""

from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

LabelLoss = Literal["softmax", "sigmoid"]


def label_loss(
    logits: Float[Tensor, "N C"],
    labels: Int64[Tensor, " N"] | Float[Tensor, "N targets"],
    *,
    kind: LabelLoss = "softmax",
) -> Float[Tensor, ""]:
    """Return the mean classification loss over N images, in float32 or better.

    Args:
        logits: Scores of C classes.
        labels: Class indices, or one target in [0, 1] per class.
        kind: "softmax": cross entropy, over vectors that should sum to 1; "sigmoid": the sum over
            classes of binary cross entropies.

    Returns:
        The loss; 0, connected to the logits, for no image.

    Raises:
        ValueError: If labels are not of the logits' number of classes.

    Source: NaViT (arXiv:2307.06304), section 3: JFT pretraining with a sigmoid loss, after
    arXiv:2006.07159.
    """
    count, classes = logits.shape
    _check(labels, count, classes)
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if not count:
            return logits.sum()
        targets = labels
        if labels.ndim == 2:
            targets = labels.to(logits.dtype)
        if kind == "softmax":
            return F.cross_entropy(logits, targets)
        if labels.ndim == 1:
            targets = F.one_hot(labels, classes).to(logits.dtype)
        total = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        return total / count


def _check(labels: Tensor, count: int, classes: int) -> None:
    if labels.shape not in ((count,), (count, classes)):
        raise ValueError(
            f"labels must be indices ({count},) or targets ({count}, {classes}); got "
            f"{tuple(labels.shape)}. Set the model's num_classes to the number of targets."
        )
    # Read on the host alone: on a device the check would wait for it, and cross entropy checks.
    if labels.ndim == 1 and labels.device.type == "cpu" and count:
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise ValueError(
                f"class indices must be in [0, {classes}); got {low if low < 0 else high}. Set "
                "num_classes to the number of classes of the data."
            )
