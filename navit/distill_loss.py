"""Losses of distillation: how far a student's distributions are from its teacher's.

Of classes, a row of logits is a distribution; of image-text pairs each image has one over all texts
and each text one over all images. The similarities of pairs are computed tile by tile, twice in the
forward and once in the backward pass, in memory beyond the gradients of O(chunk_size^2 + N), as in
`navit.loss`.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from navit.label_loss import LabelLoss, mean_over_ranks
from navit.loss_tiles import Gradients, Ranks, RunningLogSumExp, Tile, Tiles, tile_side

Divergence = Literal["forward", "reverse"]
"""KL(teacher || student), or KL(student || teacher)."""


def label_distillation(
    logits: Float[Tensor, "N C"],
    teacher_logits: Float[Tensor, "N_teacher C_teacher"],
    *,
    kl: Divergence = "forward",
    kind: LabelLoss = "softmax",
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """Return the mean divergence between class distributions of N images, in float32 or better.

    Args:
        logits: The student's.
        teacher_logits: The teacher's, of the same shape; no gradient reaches them.
        kl: "forward": KL(teacher || student); "reverse": KL(student || teacher).
        kind: "softmax": one distribution over the C classes; "sigmoid": the sum over classes of
            the divergences between "is it" and "is it not".
        temperature: T: both logits are divided by it and the loss multiplied by its square, which
            keeps the size of the gradients (arXiv:1503.02531, section 2).
        group: Ranks that share the loss, as in `navit.label_loss.label_loss`.

    Returns:
        The mean over all images of all ranks, with gradients scaled as those of `label_loss`; 0,
        connected to the logits, for no image.

    Raises:
        ValueError: If the logits differ in shape, or a setting is out of range.

    Source: FlexiViT (arXiv:2212.08013), on knowledge distillation: the paper prints the reverse,
    its authors' code minimises the forward.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature}.")
    if logits.ndim != 2 or logits.shape != teacher_logits.shape:
        raise ValueError(
            "student and teacher must have logits of the same images and classes; got "
            f"{tuple(logits.shape)} and {tuple(teacher_logits.shape)}."
        )
    with torch.autocast(logits.device.type, enabled=False):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        student, teacher = (
            _log_chances(x.to(dtype) / temperature, kind) for x in (logits, teacher_logits.detach())
        )
        p, q = (teacher, student) if kl == "forward" else (student, teacher)
        total = (p.exp() * (p - q)).sum() * temperature**2
        return mean_over_ranks(total, len(logits), group)


def _log_chances(logits: Tensor, kind: LabelLoss) -> Tensor:
    """Return log-probabilities whose last axis is a distribution."""
    if kind == "softmax":
        return logits.log_softmax(-1)
    return F.logsigmoid(torch.stack([logits, -logits], -1))


def contrastive_distillation(
    image: Float[Tensor, "N D"],
    text: Float[Tensor, "N D"],
    logit_scale: Float[Tensor, ""],
    teacher_image: Float[Tensor, "N_teacher K"],
    teacher_text: Float[Tensor, "N_teacher K"],
    teacher_scale: Float[Tensor, ""],
    *,
    kl: Divergence = "forward",
    chunk_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """Return the mean divergence between similarity distributions of N pairs.

    The value is the mean over pairs of (the divergence between the image's distributions over all
    texts + that between the text's over all images) / 2, each a softmax of
    ``scale * image @ text.T``.

    Args:
        image: The student's image vectors, normalised by the caller.
        text: Its text vectors; row i belongs to row i of ``image``.
        logit_scale: Its multiplier itself, not the logarithm.
        teacher_image: The teacher's image vectors of the same pairs; their size may differ. No
            gradient reaches the teacher.
        teacher_text: Its text vectors.
        teacher_scale: Its multiplier.
        kl: "forward": KL(teacher || student); "reverse": KL(student || teacher).
        chunk_size: Side of a tile of scores, as in `navit.loss.contrastive_loss`.
        group: Ranks that share the loss, as in `navit.loss.contrastive_loss`. Distributions are
            over the texts, or images, of all ranks.

    Returns:
        The mean over all pairs of all ranks, equal on every rank; 0 where there is no pair, still
        connected to the graph. Gradients are scaled as those of `contrastive_loss`.

    Raises:
        ValueError: If shapes do not fit each other, or a setting is out of range.

    Source: FlexiViT (arXiv:2212.08013) does so with class distributions; those of similarities are
    ours.
    """
    counts = [len(x) for x in (image, text, teacher_image, teacher_text)]
    if len(set(counts)) != 1:
        raise ValueError(f"all vectors must be of the same pairs; got {counts} of them.")
    loss: Tensor = _PairDivergence.apply(  # type: ignore[no-untyped-call]
        image,
        text,
        logit_scale,
        teacher_image.detach(),
        teacher_text.detach(),
        teacher_scale.detach(),
        kl,
        tile_side(chunk_size, image.device),
        Ranks(group, image),
    )
    return loss


class _Pass:
    """One walk over the scores of student and teacher, tile by tile, in step."""

    def __init__(self, tensors: tuple[Tensor, ...], chunk_size: int, ranks: Ranks) -> None:
        image, text, scale, teacher_image, teacher_text, teacher_scale = tensors
        self.student = Tiles(image, text, scale, None, chunk_size, ranks)
        self.teacher = Tiles(teacher_image, teacher_text, teacher_scale, None, chunk_size, ranks)
        # One type for both, the better: a tile of theirs enters a tile of ours.
        both = torch.promote_types(self.student.dtype, self.teacher.dtype)
        self.student.dtype = self.teacher.dtype = both

    def __iter__(self) -> Any:
        return zip(self.student, self.teacher, strict=True)


class _Norms:
    """Log-sum-exp of each row and column of one model's scores."""

    def __init__(self, tiles: Tiles) -> None:
        self.tiles = tiles
        self.of_rows = RunningLogSumExp(len(tiles.image), tiles)
        self.of_columns = RunningLogSumExp(len(tiles.columns), tiles)

    def add(self, tile: Tile) -> None:
        self.of_rows.add(tile.rows, tile.scores, dim=1, out=tile.spare)
        self.of_columns.add(tile.columns, tile.scores, dim=0, out=tile.spare)

    def result(self) -> tuple[Tensor, Tensor]:
        columns = self.tiles.ranks.merge(self.of_columns)
        return self.of_rows.result(), columns.result()


class _PairDivergence(torch.autograd.Function):
    """Saves vectors, scales and statistics of length N; nothing of N x N."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        teacher_image: Tensor,
        teacher_text: Tensor,
        teacher_scale: Tensor,
        kl: Divergence,
        chunk_size: int,
        ranks: Ranks,
    ) -> Tensor:
        columns, teacher_columns = ranks.gather(text), ranks.gather(teacher_text)
        tensors = (image, columns, logit_scale, teacher_image, teacher_columns, teacher_scale)
        with torch.autocast(image.device.type, enabled=False):
            walk = _Pass(tensors, chunk_size, ranks)
            norms = [_Norms(walk.student), _Norms(walk.teacher)]
            for tiles in walk:
                for norm, tile in zip(norms, tiles, strict=True):
                    norm.add(tile)
            (rows, cols), (teacher_rows, teacher_cols) = (norm.result() for norm in norms)
            of_rows = walk.student.zeros(len(image))
            of_columns = walk.student.zeros(len(columns))
            for tile, other in walk:
                terms = _terms(tile, other, rows[tile.rows, None], teacher_rows[tile.rows, None])
                of_rows[tile.rows] += _divergence(*terms, kl).sum(1)
                terms = _terms(tile, other, cols[tile.columns], teacher_cols[tile.columns])
                of_columns[tile.columns] += _divergence(*terms, kl).sum(0)
            ranks.sum_(of_columns)
            total = ranks.sum_(of_rows.sum() + of_columns[ranks.own].sum())
            loss = total / (2 * max(len(columns), 1))
        statistics = (rows, cols, teacher_rows, teacher_cols, of_rows, of_columns)
        ctx.save_for_backward(*tensors, *statistics)
        ctx.kl, ctx.chunk_size, ctx.ranks = kl, chunk_size, ranks
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        tensors, statistics = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        rows, cols, teacher_rows, teacher_cols, of_rows, of_columns = statistics
        with torch.autocast(tensors[0].device.type, enabled=False):
            walk = _Pass(tensors, ctx.chunk_size, ctx.ranks)
            grads = Gradients(walk.student, ctx.needs_input_grad)
            for tile, other in walk:
                terms = _terms(tile, other, rows[tile.rows, None], teacher_rows[tile.rows, None])
                grad = _slope(*terms, of_rows[tile.rows, None], ctx.kl)
                terms = _terms(tile, other, cols[tile.columns], teacher_cols[tile.columns])
                grad += _slope(*terms, of_columns[tile.columns], ctx.kl)
                grads.add(tile, grad)
            factor = grad_loss / (2 * max(len(tensors[1]), 1))
            return *grads.result(factor), *[None] * 6


def _terms(
    tile: Tile, other: Tile, norm: Tensor, other_norm: Tensor
) -> tuple[Float[Tensor, "R C"], Float[Tensor, "R C"]]:
    """Return the log-probabilities of student and teacher, in the tiles' second buffers."""
    student = torch.sub(tile.scores, norm, out=tile.spare)
    return student, torch.sub(other.scores, other_norm, out=other.spare)


def _divergence(student: Tensor, teacher: Tensor, kl: Divergence) -> Tensor:
    """Return what each entry adds to its distribution's divergence."""
    p, q = (teacher, student) if kl == "forward" else (student, teacher)
    return p.exp().mul_(p - q)


def _slope(student: Tensor, teacher: Tensor, total: Tensor, kl: Divergence) -> Tensor:
    """Return the derivative of a distribution's divergence by each of the student's scores."""
    if kl == "forward":
        return student.exp().sub_(teacher.exp())
    return student.exp().mul_(student - teacher - total)
