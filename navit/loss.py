"""Contrastive losses over image and text vectors: exact, tiled, recomputed in the backward pass.

The (N, N) matrix of scores never exists. Both passes walk over tiles of ``chunk_size`` rows by
``chunk_size`` columns in two buffers that are written in place; the forward pass keeps statistics
of length N, the backward pass computes each tile again. One tile serves rows and columns, so the
whole costs four matrix products of N * N * D where the usual two-matmul loss costs six, and the
memory beyond the gradients is O(chunk_size^2 + N).

Scores, statistics and accumulated gradients are float32 for bfloat16, float16 and float32
features and float64 for float64 features, with autocast disabled: at a scale of 100 a bfloat16
score would be off by half a unit. NaN and inf are propagated.

Rows are this rank's images, columns the texts of all ranks. `_Ranks` is the only code that
communicates; without a group it does nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable


def contrastive_loss(
    image: Float[Tensor, "N D"],
    text: Float[Tensor, "N D"],
    logit_scale: Float[Tensor, ""],
    *,
    chunk_size: int = 512,
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
        chunk_size: Side of a tile of scores. Changes time and memory, not the result. 512 keeps
            both float32 buffers in a 2 MiB cache; a GPU prefers 2048 or more.
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
    _check(image, text, chunk_size)
    if text_ids is not None and text_ids.shape != image.shape[:1]:
        raise ValueError(
            f"text_ids must hold one id per pair, shape ({len(image)},); "
            f"got {tuple(text_ids.shape)}."
        )
    loss: Tensor = _SoftmaxLoss.apply(  # type: ignore[no-untyped-call]
        image, text, logit_scale, text_ids, chunk_size, _Ranks(group, image)
    )
    return loss


def sigmoid_loss(
    image: Float[Tensor, "N D"],
    text: Float[Tensor, "N D"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""],
    *,
    chunk_size: int = 512,
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
    _check(image, text, chunk_size)
    loss: Tensor = _SigmoidLoss.apply(  # type: ignore[no-untyped-call]
        image, text, logit_scale, logit_bias, chunk_size, _Ranks(group, image)
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
        ranks: "_Ranks",
    ) -> Tensor:
        columns = ranks.gather(text)
        ids = None if text_ids is None else ranks.gather(text_ids)
        with torch.autocast(image.device.type, enabled=False):
            tiles = _Tiles(image, columns, logit_scale, ids, chunk_size, ranks)
            row_stats = _RunningLogSumExp(len(image), tiles)
            column_stats = _RunningLogSumExp(len(columns), tiles)
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
            tiles = _Tiles(image, columns, logit_scale, ids, ctx.chunk_size, ctx.ranks)
            grads = _Gradients(tiles, ctx.needs_input_grad)
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
        ranks: "_Ranks",
    ) -> Tensor:
        columns = ranks.gather(text)
        with torch.autocast(image.device.type, enabled=False):
            tiles = _Tiles(image, columns, logit_scale, None, chunk_size, ranks)
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
            tiles = _Tiles(image, columns, logit_scale, None, ctx.chunk_size, ctx.ranks)
            grads = _Gradients(tiles, ctx.needs_input_grad)
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


@dataclass(frozen=True, slots=True)
class _Tile:
    """R rows by C columns of the scores. Overwrite the two buffers, never the features."""

    rows: slice
    columns: slice
    image: Float[Tensor, "R D"]
    text: Float[Tensor, "C D"]
    scores: Float[Tensor, "R C"]
    spare: Float[Tensor, "R C"]
    """A second buffer, content undefined."""
    shift: int
    """Column of the tile in which its first row's own text stands; outside it for most tiles."""

    def pairs(self, matrix: Shaped[Tensor, "R C"]) -> Shaped[Tensor, " K"]:
        """View those entries of ``matrix`` that belong to the K pairs inside this tile."""
        return matrix.diagonal(self.shift)

    @property
    def paired_rows(self) -> slice:
        """Rows of the K pairs inside this tile."""
        first = self.rows.start + max(-self.shift, 0)
        return slice(first, first + len(self.pairs(self.scores)))


class _Tiles:
    """All tiles of ``logit_scale * image @ columns.T``, computed one after another, rows outside.

    Every tile uses the same two buffers: take what you need before asking for the next.
    """

    def __init__(
        self,
        image: Float[Tensor, "N D"],
        columns: Float[Tensor, "M D"],
        logit_scale: Float[Tensor, ""],
        ids: Int64[Tensor, " M"] | None,
        chunk_size: int,
        ranks: "_Ranks",
    ) -> None:
        self.dtype = torch.promote_types(
            torch.promote_types(image.dtype, columns.dtype), torch.float32
        )
        self.image, self.columns, self.ids = image, columns, ids
        self.logit_scale = logit_scale
        self.chunk_size, self.ranks = chunk_size, ranks

    def __iter__(self) -> Iterator[_Tile]:
        columns = self.columns.to(self.dtype)
        largest = min(len(self.image), self.chunk_size) * min(len(columns), self.chunk_size)
        buffers = self.zeros(2, largest)
        for row_range in _ranges(len(self.image), self.chunk_size):
            image = self.image[row_range].to(self.dtype)
            scaled = image * self.logit_scale.to(self.dtype)
            for column_range in _ranges(len(columns), self.chunk_size):
                text = columns[column_range]
                shape = (len(image), len(text))
                scores, spare = buffers[:, : len(image) * len(text)].view(2, *shape).unbind()
                torch.mm(scaled, text.T, out=scores)
                shift = self.ranks.own.start + row_range.start - column_range.start
                tile = _Tile(row_range, column_range, image, text, scores, spare, shift)
                if self.ids is not None:
                    scores.masked_fill_(self._same_caption(tile, self.ids), -torch.inf)
                yield tile

    def zeros(self, *shape: int) -> Tensor:
        """Make zeros in the dtype of the scores."""
        return torch.zeros(shape, dtype=self.dtype, device=self.image.device)

    def _same_caption(self, tile: _Tile, ids: Int64[Tensor, " M"]) -> Bool[Tensor, "R C"]:
        same = ids[self.ranks.own][tile.rows, None] == ids[tile.columns]
        tile.pairs(same).fill_(False)
        return same


class _RunningLogSumExp:
    """log(sum(exp(score))) per row or column, from tiles that arrive in any order.

    Keeps the maximum seen and the sum relative to it: log(exp(x).sum()) alone overflows in
    float32 above 88.7 and a learned scale reaches 100.
    """

    def __init__(self, count: int, tiles: _Tiles) -> None:
        # The lowest finite number: scores of -inf (left out) then add exp(-inf) = 0, never NaN.
        self.maximum = tiles.zeros(count).fill_(torch.finfo(tiles.dtype).min)
        self.total = tiles.zeros(count)

    def add(
        self,
        part: slice,
        scores: Float[Tensor, "R C"],
        *,
        dim: int,
        out: Float[Tensor, "R C"],
    ) -> None:
        """Add ``scores`` summed along ``dim`` to the entries ``part``; overwrites ``out``."""
        self.raise_maximum(part, torch.maximum(self.maximum[part], scores.amax(dim)))
        torch.sub(scores, self.maximum[part].unsqueeze(dim), out=out).exp_()
        self.total[part] += out.sum(dim)

    def raise_maximum(self, part: slice, maximum: Float[Tensor, " K"]) -> None:
        """Express the entries ``part`` relative to a new ``maximum``."""
        self.total[part] *= torch.exp(self.maximum[part] - maximum)
        self.maximum[part] = maximum

    def result(self) -> Float[Tensor, " K"]:
        """Return the log-sum-exp of everything added."""
        return self.maximum + self.total.log()


class _Gradients:
    """Gathers d(loss)/d(features, scale) from d(loss)/d(scores), tile by tile."""

    def __init__(self, tiles: _Tiles, needed: tuple[bool, ...]) -> None:
        self.tiles, self.needed = tiles, needed
        image, text, scale = needed[:3]
        # d(scale) is <features, their gradient>: either side serves, one must be there.
        self.image = tiles.zeros(*tiles.image.shape) if image or (scale and not text) else None
        self.text = tiles.zeros(*tiles.columns.shape) if text else None

    def add(self, tile: _Tile, grad: Float[Tensor, "R C"]) -> None:
        """Add one tile's part; ``grad`` is d(loss)/d(scores) up to the factor of `result`."""
        if self.image is not None:
            self.image[tile.rows].addmm_(grad, tile.text)
        if self.text is not None:
            self.text[tile.columns].addmm_(grad.T, tile.image)

    def result(
        self, factor: Float[Tensor, ""]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of image, own text and scale; sums texts' over the ranks."""
        image, columns, scale = self.tiles.image, self.tiles.columns, self.tiles.logit_scale
        factor = factor.to(self.tiles.dtype) * self.tiles.ranks.size
        grad_image = grad_text = grad_scale = None
        if self.needed[2]:
            grad_scale = (self._inner() * factor).to(scale.dtype)
        if self.image is not None and self.needed[0]:
            grad_image = self.image.mul_(factor * scale).to(image.dtype)
        if self.text is not None:
            summed = self.tiles.ranks.sum_(self.text.mul_(factor * scale))
            grad_text = summed[self.tiles.ranks.own].to(columns.dtype)
        return grad_image, grad_text, grad_scale

    def _inner(self) -> Float[Tensor, ""]:
        """<features, their gradient before scaling>, in parts so that nothing large is made."""
        sides = ((self.tiles.image, self.image), (self.tiles.columns, self.text))
        features, grad = next((side, grad) for side, grad in sides if grad is not None)
        total = self.tiles.zeros()
        for part in _ranges(len(grad), self.tiles.chunk_size):
            total += (features[part].to(grad.dtype) * grad[part]).sum()
        return total


class _Ranks:
    """The ranks that share a loss: who holds which pairs, and what they exchange.

    Every method is a collective: each rank calls it, also one that has no pair.
    """

    def __init__(self, group: dist.ProcessGroup | None, vectors: Float[Tensor, "N D"]) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.counts = [len(vectors)]
        if self.size > 1:
            count = torch.tensor([len(vectors)], device=vectors.device)
            counts = [torch.empty_like(count) for _ in range(self.size)]
            dist.all_gather(counts, count, group=group)
            self.counts = torch.cat(counts).tolist()
        first = sum(self.counts[: dist.get_rank(group)]) if self.size > 1 else 0
        self.own = slice(first, first + len(vectors))
        """This rank's pairs among the columns."""

    def gather(self, values: Shaped[Tensor, "N ..."]) -> Shaped[Tensor, "M ..."]:
        """Concatenate the values of all ranks, in rank order."""
        if self.size == 1:
            return values
        # Equal sizes, because gloo refuses to gather uneven ones.
        padded = values.new_zeros(max(self.counts), *values.shape[1:])
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in self.counts]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])

    def sum_(self, values: Tensor) -> Tensor:
        """Replace values by their sum over the ranks."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def merge(self, stats: _RunningLogSumExp) -> _RunningLogSumExp:
        """Combine every rank's statistics of the same columns."""
        if self.size > 1:
            maximum = stats.maximum.clone()
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=self.group)
            stats.raise_maximum(slice(None), maximum)
            self.sum_(stats.total)
        return stats


def _ranges(count: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def _check(image: Tensor, text: Tensor, chunk_size: int) -> None:
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(
            "image and text must hold one vector per pair, the same shape (N, D); "
            f"got {tuple(image.shape)} and {tuple(text.shape)}."
        )
    if isinstance(chunk_size, bool) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive number of pairs; got {chunk_size}.")
