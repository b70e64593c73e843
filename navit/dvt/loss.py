"""The loss of a dynamic transformer: every exit is trained, all with equal weight."""

from collections.abc import Sequence

import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor

from navit.label_loss import LabelLoss, label_loss


def exits_loss(
    logits: Sequence[Float[Tensor, "N C"]],
    labels: Int64[Tensor, " N"] | Float[Tensor, "N targets"],
    *,
    kind: LabelLoss = "softmax",
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """Return the sum over exits of the mean classification loss; arguments as for `label_loss`.

    Raises:
        ValueError: If there is no exit, or the labels are not of the logits' number of classes.

    Source: DVT (arXiv:2105.15075), section 3.1 "Training".
    """
    if not logits:
        raise ValueError("There must be logits of at least one exit; got none.")
    total = label_loss(logits[0], labels, kind=kind, group=group)
    for found in logits[1:]:
        total = total + label_loss(found, labels, kind=kind, group=group)
    return total
