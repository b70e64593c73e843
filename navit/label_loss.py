"""Losses of classification: softmax over classes, or one sigmoid a class."""

from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

LabelLoss = Literal["softmax", "sigmoid"]


def label_loss(
    logits: Float[Tensor, "N C"],
    labels: Int64[Tensor, " N"] | Float[Tensor, "N targets"],
    *,
    kind: LabelLoss = "softmax",
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """Return the mean classification loss over N images, in float32 or better.

    Args:
        logits: Scores of C classes.
        labels: Class indices, or one target in [0, 1] per class.
        kind: "softmax": cross entropy, over vectors that should sum to 1; "sigmoid": the sum over
            classes of binary cross entropies.
        group: Ranks that share the loss; None for this process alone. Numbers of images may differ
            between ranks and may be 0. Every rank of the group must call.

    Returns:
        The mean over all images of all ranks, equal on every rank; 0, connected to the logits, for
        no image. Each rank's gradients are world_size times its share of the global gradient, so
        that the averaging of DDP and FSDP makes them exact.

    Raises:
        ValueError: If labels are not of the logits' number of classes.

    Source: NaViT (arXiv:2307.06304), section 3: JFT pretraining with a sigmoid loss, after
    arXiv:2006.07159.
    """
    count, classes = logits.shape
    _check(labels, count, classes)
    with torch.autocast(logits.device.type, enabled=False):
        total = _total(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, kind)
        return mean_over_ranks(total, count, group)


def mean_over_ranks(
    total: Float[Tensor, ""], count: int, group: dist.ProcessGroup | None
) -> Float[Tensor, ""]:
    """Divide the sum of the ranks' totals by that of their counts; 0 where nobody has any.

    Gradients are scaled as `label_loss` says.
    """
    if group is None:
        return total / max(count, 1)
    mean: Tensor = _GlobalMean.apply(total, count, group)  # type: ignore[no-untyped-call]
    return mean


def _total(logits: Tensor, labels: Tensor, kind: LabelLoss) -> Tensor:
    """Sum the losses of all images."""
    count, classes = logits.shape
    if not count:
        return logits.sum()
    targets = labels.to(logits.dtype) if labels.ndim == 2 else labels
    if kind == "softmax":
        return F.cross_entropy(logits, targets, reduction="sum")
    if labels.ndim == 1:
        targets = F.one_hot(labels, classes).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")


class _GlobalMean(torch.autograd.Function):
    """The sum over ranks of their totals, divided by that of their counts."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
        both = torch.stack([total, total.new_tensor(count)])
        dist.all_reduce(both, group=group)
        images = both[1].clamp(min=1)
        ctx.save_for_backward(dist.get_world_size(group) / images)
        return both[0] / images

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = ctx.saved_tensors
        return grad_mean * factor, None, None


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
