"""Contrastive losses over image and text vectors: exact, tiled, recomputed in the backward pass.

The (N, N) matrix of scores never exists. Both passes walk over tiles of ``chunk_size`` rows by
``chunk_size`` columns in two buffers that are written in place; the forward pass keeps statistics
of length N, the backward pass computes each tile again. One tile serves rows and columns, so the
whole costs four matrix products of N * N * D where the usual two-matmul loss costs six, and the
memory beyond the gradients is O(chunk_size^2 + N).

Scores, statistics and accumulated gradients are float32 for bfloat16, float16 and float32
features and float64 for float64 features, with autocast disabled: at a scale of 100 a bfloat16
score would be off by half a unit. NaN and inf are propagated.

Rows are this rank's images, columns the texts of all ranks. `Ranks` is the only code that
communicates; without a group it does nothing.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from navit.loss_tiles import Gradients, Ranks, RunningLogSumExp, Tiles, tile_side


def contrastive_loss(
    image: Float[Tensor, "N D"],
    text: Float[Tensor, "N D"],
    logit_scale: Float[Tensor, ""],
    *,
    chunk_size: int | None = None,
    text_ids: Int64[Tensor, " N"] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """Symmetric softmax loss of CLIP: every image finds its text among all texts, and back.

    The value is the mean over pairs of (cross-entropy of the pair's row + that of its column) / 2
    in the matrix of scores ``logit_scale * image @ text.T``.

    Args:
        image: Image vectors, normalised by the caller; row i belongs to row i of ``text``.
        text: Text vectors, normalised by the caller.
        logit_scale: The multiplier itself (inverse temperature), not its logarithm.
        chunk_size: Side of a tile of scores. Changes time and memory, not the result. None is 512
            on a CPU, where both float32 buffers then stay in a 2 MiB cache, and 4096 on a GPU.
        text_ids: Equal ids mark identical captions. Another pair's identical caption is no
            negative: its score is left out of the softmax of both row and column.
        group: Ranks that share the loss; None for this process alone. Numbers of pairs may
            differ between ranks and may be 0. Every rank of the group must call.

    Returns:
        The mean over all pairs of all ranks, equal on every rank; 0 where there is no pair, still
        connected to the graph. Each rank's gradients are world_size times its share of the global
        gradient, so that the averaging of DDP and FSDP makes them exact. First derivatives only.

    Raises:
        ValueError: If shapes do not fit each other or ``chunk_size`` is not positive.

    Source: CLIP (arXiv:2103.00020), figure 3; NaViT (arXiv:2307.06304), section 2.3 "Contrastive
    loss", computes it from chunks with accumulated softmax statistics. Tiling rows and columns at
    once and leaving identical captions out are our choices.
    """
    chunk_size = tile_side(chunk_size, image.device)
    _check(image, text)
    if text_ids is not None and text_ids.shape != image.shape[:1]:
        raise ValueError(
            f"text_ids must hold one id per pair, shape ({len(image)},); "
            f"got {tuple(text_ids.shape)}."
        )
    loss: Tensor = _SoftmaxLoss.apply(  # type: ignore[no-untyped-call]
        image, text, logit_scale, text_ids, chunk_size, Ranks(group, image)
    )
    return loss


def sigmoid_loss(
    image: Float[Tensor, "N D"],
    text: Float[Tensor, "N D"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""],
    *,
    chunk_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """Pairwise sigmoid loss of SigLIP: every (image, text) is a match or not, judged alone.

    The value is ``-sum_ij log sigmoid(z_ij * (logit_scale * x_i . y_j + logit_bias)) / N`` with
    z = 1 for the N pairs and -1 elsewhere.

    Args:
        image: Image vectors, normalised by the caller; row i belongs to row i of ``text``.
        text: Text vectors, normalised by the caller.
        logit_scale: The multiplier itself, not its logarithm.
        logit_bias: Added to every score; SigLIP starts it at -10.
        chunk_size: Side of a tile of scores, as in `contrastive_loss`.
        group: Ranks that share the loss, as in `contrastive_loss`.

    Returns:
        The sum over all images and all texts of all ranks, divided by the number of pairs; equal
        on every rank, gradients scaled as in `contrastive_loss`.

    Raises:
        ValueError: If shapes do not fit each other or ``chunk_size`` is not positive.

    Source: SigLIP (arXiv:2303.15343), section 3.2 and algorithm 1.
    """
    chunk_size = tile_side(chunk_size, image.device)
    _check(image, text)
    loss: Tensor = _SigmoidLoss.apply(  # type: ignore[no-untyped-call]
        image, text, logit_scale, logit_bias, chunk_size, Ranks(group, image)
    )
    return loss


class _SoftmaxLoss(torch.autograd.Function):
    """Saves features, scale, ids and one log-sum-exp per row and per column; nothing of N x N."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        text_ids: Tensor | None,
        chunk_size: int,
        ranks: Ranks,
    ) -> Tensor:
        columns = ranks.gather(text)
        ids = None if text_ids is None else ranks.gather(text_ids)
        with torch.autocast(image.device.type, enabled=False):
            tiles = Tiles(image, columns, logit_scale, ids, chunk_size, ranks)
            row_stats = RunningLogSumExp(len(image), tiles)
            column_stats = RunningLogSumExp(len(columns), tiles)
            positive = tiles.zeros(len(image))
            for tile in tiles:
                positive[tile.paired_rows] = tile.pairs(tile.scores)
                row_stats.add(tile.rows, tile.scores, dim=1, out=tile.spare)
                column_stats.add(tile.columns, tile.scores, dim=0, out=tile.scores)
            row_lse, column_lse = row_stats.result(), ranks.merge(column_stats).result()
            total = ((row_lse - positive) + (column_lse[ranks.own] - positive)).sum()
            loss = ranks.sum_(total) / (2 * max(len(columns), 1))
        ctx.save_for_backward(image, columns, logit_scale, ids, row_lse, column_lse)
        ctx.chunk_size, ctx.ranks = chunk_size, ranks
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        image, columns, logit_scale, ids, row_lse, column_lse = ctx.saved_tensors
        with torch.autocast(image.device.type, enabled=False):
            tiles = Tiles(image, columns, logit_scale, ids, ctx.chunk_size, ctx.ranks)
            grads = Gradients(tiles, ctx.needs_input_grad)
            for tile in tiles:
                grad = torch.sub(tile.scores, row_lse[tile.rows, None], out=tile.spare).exp_()
                grad += tile.scores.sub_(column_lse[tile.columns]).exp_()
                # Inside the tile: a saturated pair gives exactly 1 + 1 - 2 = 0.
                tile.pairs(grad).sub_(2)
                grads.add(tile, grad)
            return *grads.result(grad_loss / (2 * max(len(columns), 1))), None, None, None


class _SigmoidLoss(torch.autograd.Function):
    """Saves features, scale and bias; every score is judged alone, so there are no statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        chunk_size: int,
        ranks: Ranks,
    ) -> Tensor:
        columns = ranks.gather(text)
        with torch.autocast(image.device.type, enabled=False):
            tiles = Tiles(image, columns, logit_scale, None, chunk_size, ranks)
            total = tiles.zeros()
            for tile in tiles:
                tile.scores.add_(logit_bias)
                tile.pairs(tile.scores).neg_()
                # -log sigmoid(-x) = softplus(x); the default threshold costs float64 digits.
                total += F.softplus(tile.scores, threshold=40).sum()
            loss = ranks.sum_(total) / max(len(columns), 1)
        ctx.save_for_backward(image, columns, logit_scale, logit_bias)
        ctx.chunk_size, ctx.ranks = chunk_size, ranks
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        image, columns, logit_scale, logit_bias = ctx.saved_tensors
        with torch.autocast(image.device.type, enabled=False):
            tiles = Tiles(image, columns, logit_scale, None, ctx.chunk_size, ctx.ranks)
            grads = Gradients(tiles, ctx.needs_input_grad)
            total = tiles.zeros()
            for tile in tiles:
                grad = tile.scores.add_(logit_bias)
                # A pair's derivative is -sigmoid(-x); sigmoid(x) - 1 would round it away.
                tile.pairs(grad).neg_()
                grad.sigmoid_()
                tile.pairs(grad).neg_()
                total += grad.sum()
                grads.add(tile, grad)
            factor = grad_loss / max(len(columns), 1)
            grad_bias = (total * factor * ctx.ranks.size).to(logit_bias.dtype)
            return *grads.result(factor), grad_bias, None, None


def _check(image: Tensor, text: Tensor) -> None:
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(
            "image and text must hold one vector per pair, the same shape (N, D); "
            f"got {tuple(image.shape)} and {tuple(text.shape)}."
        )
