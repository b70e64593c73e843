"""The tiles of a score matrix that never exists: statistics, gradients, exchange between ranks."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

CPU_TILE, GPU_TILE = 512, 4096
"""Sides of a tile where none is given. On an H200 tiles of 512 took fourteen times the time of
tiles of 4,096; larger ones gained little for their memory."""


def tile_side(chunk_size: int | None, device: torch.device) -> int:
    """Return the side of a tile: ``chunk_size``, or where it is None that of the device.

    Raises:
        ValueError: If it is not positive.
    """
    if chunk_size is None:
        return CPU_TILE if device.type == "cpu" else GPU_TILE
    if isinstance(chunk_size, bool) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive number of pairs; got {chunk_size}.")
    return chunk_size


@dataclass(frozen=True, slots=True)
class Tile:
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


class Tiles:
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
        ranks: "Ranks",
    ) -> None:
        self.dtype = torch.promote_types(
            torch.promote_types(image.dtype, columns.dtype), torch.float32
        )
        self.image, self.columns, self.ids = image, columns, ids
        self.logit_scale = logit_scale
        self.chunk_size, self.ranks = chunk_size, ranks

    def __iter__(self) -> Iterator[Tile]:
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
                tile = Tile(row_range, column_range, image, text, scores, spare, shift)
                if self.ids is not None:
                    scores.masked_fill_(self._same_caption(tile, self.ids), -torch.inf)
                yield tile

    def zeros(self, *shape: int) -> Tensor:
        """Make zeros in the dtype of the scores."""
        return torch.zeros(shape, dtype=self.dtype, device=self.image.device)

    def _same_caption(self, tile: Tile, ids: Int64[Tensor, " M"]) -> Bool[Tensor, "R C"]:
        same = ids[self.ranks.own][tile.rows, None] == ids[tile.columns]
        tile.pairs(same).fill_(False)
        return same


class RunningLogSumExp:
    """log(sum(exp(score))) per row or column, from tiles that arrive in any order.

    Keeps the maximum seen and the sum relative to it: log(exp(x).sum()) alone overflows in
    float32 above 88.7 and a learned scale reaches 100.
    """

    def __init__(self, count: int, tiles: Tiles) -> None:
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


class Gradients:
    """Gathers d(loss)/d(features, scale) from d(loss)/d(scores), tile by tile."""

    def __init__(self, tiles: Tiles, needed: tuple[bool, ...]) -> None:
        self.tiles, self.needed = tiles, needed
        image, text, scale = needed[:3]
        # d(scale) is <features, their gradient>: either side serves, one must be there.
        self.image = tiles.zeros(*tiles.image.shape) if image or (scale and not text) else None
        self.text = tiles.zeros(*tiles.columns.shape) if text else None

    def add(self, tile: Tile, grad: Float[Tensor, "R C"]) -> None:
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


class Ranks:
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

    def merge(self, stats: RunningLogSumExp) -> RunningLogSumExp:
        """Combine every rank's statistics of the same columns."""
        if self.size > 1:
            maximum = stats.maximum.clone()
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=self.group)
            stats.raise_maximum(slice(None), maximum)
            self.sum_(stats.total)
        return stats


def _ranges(count: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]
