"""Losses of distillation: how far a student's answers are from a teacher's.

Source: FlexiViT (arXiv:2212.08013), section 3.3 "Knowledge distillation"; Hinton et al.
(arXiv:1503.02531), section 2.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from navit.label_loss import LabelLoss, mean_over_ranks
from navit.loss_tiles import Ranks

Divergence = Literal["forward", "reverse"]


def label_distillation(
    student: Float[Tensor, "N C"],
    teacher: Float[Tensor, "N classes"],
    *,
    kl: Divergence = "forward",
    kind: LabelLoss = "softmax",
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """Return the mean divergence of class distributions over N images, in float32 or better.

    Args:
        student: Its class logits.
        teacher: The teacher's; they get no gradient.
        kl: "forward": KL(teacher || student); "reverse": KL(student || teacher).
        kind: "softmax": of distributions over classes; "sigmoid": the sum over classes of the
            divergences of yes and no.
        temperature: Divides both logits. The loss is multiplied by its square, so that gradients
            keep their size.
        group: Ranks that share the loss, as in `navit.label_loss.label_loss`.

    Returns:
        The mean over all images of all ranks, with values and gradients as in `label_loss`; 0 where
        the two agree.

    Raises:
        ValueError: If the two are not of one shape, or the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature}.")
    if student.shape != teacher.shape:
        raise ValueError(
            "student and teacher must have logits of the same images and classes; got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    with torch.autocast(student.device.type, enabled=False):
        own, taught = (_precise(x) / temperature for x in (student, teacher.detach()))
        own, taught = _log_probabilities(own, kind), _log_probabilities(taught, kind)
        total = _divergence(own, taught, kl).sum() * temperature**2
        return mean_over_ranks(total, len(student), group)


def contrastive_distillation(
    image: Float[Tensor, "N D"],
    text: Float[Tensor, "N D"],
    logit_scale: Float[Tensor, ""],
    teacher_image: Float[Tensor, "M E"],
    teacher_text: Float[Tensor, "M E"],
    teacher_scale: Float[Tensor, ""],
    *,
    kl: Divergence = "forward",
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """Return how far a student's softmax over all texts and over all images is from a teacher's.

    The value is the mean over pairs of (divergence of an image's distribution over all texts + that
    of its text's over all images) / 2, at each model's own multiplier. Memory is some ten matrices
    of N times all pairs: unlike the losses in `navit.loss` it is not tiled.

    Args:
        image: The student's image vectors, normalised; row i belongs to row i of ``text``.
        text: Its text vectors, normalised.
        logit_scale: Its multiplier itself.
        teacher_image: The teacher's image vectors, normalised, of any width; no gradient.
        teacher_text: Its text vectors.
        teacher_scale: Its multiplier.
        kl: "forward": KL(teacher || student); "reverse": KL(student || teacher).
        group: Ranks that share the loss, as in `navit.loss.contrastive_loss`.

    Returns:
        The mean over all pairs of all ranks, with values and gradients as in `contrastive_loss`; 0
        where the two agree.

    Raises:
        ValueError: If the numbers of vectors differ.
    """
    counts = [len(x) for x in (image, text, teacher_image, teacher_text)]
    if len(set(counts)) != 1:
        raise ValueError(f"all vectors must be of the same pairs; got {counts} of them.")
    ranks = Ranks(group, image)
    with torch.autocast(image.device.type, enabled=False):
        own = [_precise(x) for x in (image, text)]
        taught = [_precise(x.detach()) for x in (teacher_image, teacher_text)]
        total = own[0].new_zeros(())
        for rows, columns in ((0, 1), (1, 0)):
            others: Tensor = _Gathered.apply(own[columns], ranks)  # type: ignore[no-untyped-call]
            scores = logit_scale * (own[rows] @ others.T)
            wanted = teacher_scale.detach() * (taught[rows] @ ranks.gather(taught[columns]).T)
            logs = scores.log_softmax(1), wanted.to(scores.dtype).log_softmax(1)
            total = total + _divergence(*logs, kl).sum() / 2
        return mean_over_ranks(total, len(image), group)


def _log_probabilities(logits: Tensor, kind: LabelLoss) -> Tensor:
    """Return those of the classes; by sigmoid each class is a distribution over yes and no."""
    if kind == "softmax":
        return logits.log_softmax(1)
    return torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)])


def _divergence(student: Tensor, teacher: Tensor, kl: Divergence) -> Tensor:
    """Return the terms of a divergence from logarithms of probabilities."""
    weights = teacher if kl == "forward" else student
    terms = weights.exp() * (teacher - student)
    return terms if kl == "forward" else -terms


def _precise(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


class _Gathered(torch.autograd.Function):
    """The vectors of all ranks; a rank's get the gradients that all ranks have for them."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.gather(own).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total = ctx.ranks.sum_(grad.contiguous().clone())
        return total[ctx.ranks.own], None
