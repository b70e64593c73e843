"""Pictures of packing: what one batch holds, for the eye and for the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, combinations, groupby
from math import ceil, log
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from packer.batch import PackedBatch
from packer.plan.drop import kept_indices
from packer.plan.types import SequencePlan

_DROPPED, _DROPPED_LINE, _PADDING = (36, 40, 50), (78, 86, 104), "#b9bec6"
_COLOURS = [colormaps["tab10"](i) for i in (0, 1, 2, 3, 4, 5, 6, 8, 9)]  # without its grey
_WIDTH, _TITLE, _LEGEND = 14.0, 0.85, 0.45  # inches
_FONT = 7.0  # points
_ASPECT = 1.5  # width / height the layout aims at
_PLANNED_SIDE = 8  # pixels of a patch that has no picture
_BATCH_LEGEND = "above each image its kept / all tokens; the bar is a sequence's token places"
_PLAN_LEGEND = "above each grid its kept / all tokens; the bar is a sequence's token places"
_SIZE_LEGEND = "; p: side of its patches in pixels"
_LEAST_PATCHES = 44  # across the picture; fewer would be drawn needlessly large


@dataclass(frozen=True)
class _Tile:
    """One image of a sequence: its kept patches in place, and how many there are."""

    pixels: npt.NDArray[np.uint8]
    rows: int
    cols: int
    num_kept: int
    patch_size: int | None = None
    """Named above the image where sizes differ."""


@dataclass(frozen=True)
class _Row:
    """One sequence: its images, and the lengths of its segments (image slot or 0, tokens)."""

    index: int
    tiles: list[_Tile]
    segments: list[tuple[int, int]]


def draw_batch(batch: PackedBatch, path: Path | str, *, max_sequences: int = 8) -> Path:
    """Draw a packed batch: every image in its sequence, dropped patches missing, padding grey.

    An image stands in the grid it was resized to, its kept patches at their (row, col) and dark
    hatching where a patch was dropped, under "kept/all" token counts. The bar below each sequence
    is its L token places, one colour per image, padding grey. Patches are drawn equally large, as
    each is a token; where their sizes differ, an image's follows its counts ("p16").

    Args:
        batch: On any device.
        path: Written as PNG (or what its suffix says); its folder is created.
        max_sequences: Sequences drawn, from the first on; the title counts all of them.

    Returns:
        ``path``.

    Raises:
        ValueError: If the batch has no token place, or ``max_sequences`` is not positive.
    """
    if max_sequences < 1:
        raise ValueError(f"max_sequences must be at least 1; got {max_sequences}.")
    if not batch.segment_ids.numel():
        raise ValueError(
            "the batch to draw must have token places; got "
            f"{tuple(batch.segment_ids.shape)} (B, L). Draw a batch with at least one sequence."
        )
    sheet = _Sheet(_rows(batch, max_sequences), batch.seq_len, len(batch.segment_ids))
    legend = _BATCH_LEGEND + ("" if batch.patch_sizes is None else _SIZE_LEGEND)
    return _save(sheet.draw(_summary(batch), legend), path)


def draw_plan(
    sequences: Sequence[SequencePlan], seq_len: int, path: Path | str, *, max_sequences: int = 8
) -> Path:
    """Draw planned sequences as `draw_batch` draws a batch, flat colours for the missing pixels.

    Args:
        sequences: The images of each sequence, in its order.
        seq_len: L, token places of a sequence.
        path: Written as PNG (or what its suffix says); its folder is created.
        max_sequences: Sequences drawn, from the first on; the title counts all of them.

    Returns:
        ``path``.

    Raises:
        ValueError: If there is no sequence, or ``max_sequences`` is not positive.
    """
    if max_sequences < 1 or not sequences:
        raise ValueError(
            f"a picture needs at least one sequence; got {len(sequences)}, max_sequences="
            f"{max_sequences}."
        )
    images = [image for sequence in sequences for image in sequence]
    several = len({image.patch_size for image in images}) > 1
    rows = [
        _planned_row(index, sequence, seq_len, several=several)
        for index, sequence in enumerate(sequences[:max_sequences])
    ]
    title = _summary_text(
        len(images), len(sequences), seq_len, sum(image.num_kept for image in images)
    )
    legend = _PLAN_LEGEND + (_SIZE_LEGEND if several else "")
    return _save(_Sheet(rows, seq_len, len(sequences)).draw(title, legend), path)


def batch_text(batch: PackedBatch, *, width: int = 64) -> str:
    """Render a packed batch for the terminal: one line per sequence.

    Args:
        batch: On any device.
        width: Characters the L token places of a sequence are drawn with.

    Returns:
        A heading and a line per sequence: blocks as long as the images' tokens, dots for
        padding, the share of places filled, and the token counts.
    """
    lines = [_summary(batch)]
    for index, ids in enumerate(batch.segment_ids.tolist()):
        segments = _runs(ids)
        ends = [round(end * width / len(ids)) for end in accumulate(n for _, n in segments)]
        bar, start = "", 0
        for (slot, _), end in zip(segments, ends, strict=True):
            bar += ("█▒"[(slot - 1) % 2] if slot else "·") * (end - start)
            start = end
        counts = [str(n) for slot, n in segments if slot]
        text = " ".join(counts[:12]) + (f" ... ({len(counts)} images)" if len(counts) > 12 else "")
        fill = 100 * sum(n for slot, n in segments if slot) / max(len(ids), 1)
        lines.append(f"{index:4d} {bar} {fill:6.2f} %  {text or 'empty'}")
    return "\n".join(lines)


class _Sheet:
    """A figure in units of patches; sequences run down its columns."""

    def __init__(self, rows: list[_Row], seq_len: int, num_sequences: int) -> None:
        self.rows, self.layout = rows, _layout(rows)
        self.seq_len, self.num_sequences = seq_len, num_sequences
        self.width, self.points, self.label = (
            self.layout.width,
            self.layout.points,
            self.layout.label,
        )

    def draw(self, title: str, legend: str) -> Figure:
        parts = self.layout.parts(self.rows)
        height = max(sum(self.layout.height(row) for row in part) for part in parts)
        inches = height * self.points / 72
        figure = Figure(figsize=(_WIDTH, inches + _TITLE + _LEGEND))
        axes = figure.add_axes(
            (0.02, _LEGEND / figure.get_figheight(), 0.96, inches / figure.get_figheight())
        )
        axes.set_axis_off()
        for i, part in enumerate(parts):
            top = 0.0
            for row in part:
                self._draw_row(axes, row, i * (self.width + self.layout.gap), top)
                top += self.layout.height(row)
        axes.set(xlim=(0, self.layout.total), ylim=(height, 0))
        self._draw_text(figure, title, legend)
        return figure

    def _draw_row(self, axes: Axes, row: _Row, left: float, top: float) -> None:
        tokens, places = sum(n for slot, n in row.segments if slot), self.seq_len
        padding = f"{places - tokens} padding" if places > tokens else "no padding"
        count = f"{len(row.tiles)} image" + ("s" if len(row.tiles) != 1 else "")
        room = self.width * self.points / (0.54 * (_FONT + 1))  # characters
        headings = (
            f"sequence {row.index}: {count}, {tokens} of {places} places, {padding}",
            f"sequence {row.index}: {count}, {padding}",
            f"{row.index}: {tokens}/{places}",
        )
        heading = next((text for text in headings if len(text) <= room), headings[-1])
        self._text(axes, left, top + 0.5 * self.label, heading, size=_FONT + 1, ha="left")
        top, slot = top + 1.3 * self.label, 0
        for shelf in _shelves(row.tiles, self.width):
            x = left
            for tile in shelf:
                self._draw_tile(axes, tile, _COLOURS[slot % len(_COLOURS)], x, top)
                x, slot = x + tile.cols + 1, slot + 1
            top += max(tile.rows for tile in shelf) + 1.2 * self.label
        self._draw_bar(axes, row, left, top + 0.25 * self.label)

    def _draw_tile(self, axes: Axes, tile: _Tile, colour: Any, x: float, y: float) -> None:
        y += self.label
        extent = (x, x + tile.cols, y + tile.rows, y)
        axes.imshow(tile.pixels, extent=extent, aspect="auto", interpolation_stage="rgba")
        edge: dict[str, Any] = {"edgecolor": colour, "linewidth": 1.6}
        axes.add_patch(Rectangle((x, y), tile.cols, tile.rows, fill=False, **edge))
        count = f"{tile.num_kept}/{tile.rows * tile.cols}"
        texts = [count, str(tile.num_kept)]
        if tile.patch_size is not None:
            texts = [f"{text} p{tile.patch_size}" for text in texts] + [f"p{tile.patch_size}"]
        for text in texts:
            if len(text) * 0.6 * _FONT <= (tile.cols + 0.8) * self.points:
                self._text(axes, x, y - 0.5 * self.label, text, color=colour, ha="left")
                break

    def _draw_bar(self, axes: Axes, row: _Row, left: float, top: float) -> None:
        cell, height, start = self.width / self.seq_len, 1.3 * self.label, 0
        for slot, length in row.segments:
            x, extent = left + start * cell, length * cell
            look: dict[str, Any] = {"facecolor": _PADDING, "hatch": "////", "edgecolor": "white"}
            if slot:
                look = {"facecolor": _COLOURS[(slot - 1) % len(_COLOURS)], "edgecolor": "white"}
            axes.add_patch(Rectangle((x, top), extent, height, linewidth=0.8, **look))
            if (len(str(length)) + 1) * 0.6 * _FONT <= extent * self.points:
                colour = "white" if slot else "black"
                centre = (x + extent / 2, top + 0.53 * height)
                box = {"facecolor": _PADDING, "edgecolor": "none", "pad": 0.8} if not slot else None
                self._text(axes, *centre, str(length), color=colour, ha="center", bbox=box)
            start += length
        if cell * self.points >= 4:  # single places are told apart only where they are visible
            at = left + cell * np.arange(1, self.seq_len)
            axes.vlines(at, top, top + height, colors="white", linewidths=0.3)

    def _text(self, axes: Axes, x: float, y: float, text: str, **look: Any) -> None:
        axes.text(x, y, text, **{"size": _FONT, "va": "center", **look})

    def _draw_text(self, figure: Figure, title: str, legend: str) -> None:
        height = figure.get_figheight()
        figure.text(0.02, 1 - 0.3 / height, title, size=14, weight="bold", va="center")
        shown, total = len(self.rows), self.num_sequences
        part = f"the first {shown} of {total} sequences" if shown < total else "all sequences"
        text = f"{part}; {legend}"
        figure.text(0.02, 1 - 0.6 / height, text, size=9, color="0.35", va="center")
        axes = figure.add_axes((0.02, 0.0, 0.96, _LEGEND / height))
        axes.set(xlim=(0, _WIDTH), ylim=(0, _LEGEND))
        axes.set_axis_off()
        axes.imshow(_hatching(16), extent=(0.0, 0.18, 0.12, 0.30), aspect="auto")
        grey: dict[str, Any] = {
            "facecolor": _PADDING,
            "hatch": "////",
            "edgecolor": "white",
            "linewidth": 0,
        }
        axes.add_patch(Rectangle((1.6, 0.12), 0.4, 0.18, **grey))
        axes.text(0.26, 0.21, "dropped patch", size=9, va="center")
        axes.text(2.08, 0.21, "padding", size=9, va="center")


def _rows(batch: PackedBatch, count: int) -> list[_Row]:
    rows = []
    patches, positions = (
        batch.patches[:count].cpu().numpy(),
        batch.position_ids[:count].cpu().numpy(),
    )
    grids, ids = batch.grid_sizes[:count].tolist(), batch.segment_ids[:count].cpu().numpy()
    sizes = None if batch.patch_sizes is None else batch.patch_sizes.tolist()
    for b in range(len(ids)):
        segments = _runs(ids[b].tolist())
        tiles = []
        for slot, _ in segments:
            if slot:
                mine = ids[b] == slot
                side = batch.patch_size if sizes is None else sizes[b][slot - 1]
                tile = _tile(patches[b][mine], positions[b][mine], grids[b][slot - 1], side)
                tiles.append(tile if sizes is None else replace(tile, patch_size=side))
        rows.append(_Row(b, tiles, segments))
    return rows


def _planned_row(index: int, sequence: SequencePlan, seq_len: int, *, several: bool) -> _Row:
    tiles = []
    for slot, image in enumerate(sequence):
        rows, cols = image.grid
        kept = kept_indices(image.grid.num_tokens, image.num_kept, image.kept_draw)
        positions = np.stack(np.divmod(kept, cols), axis=1).astype(np.int32)
        # Two shades of the image's colour, so that single patches are seen.
        light = 0.55 + 0.12 * (positions.sum(axis=1) % 2)
        colour = np.array(_COLOURS[slot % len(_COLOURS)][:3])
        shades = 255 * (1 - light[:, None] * (1 - colour))
        patches = np.tile(shades.astype(np.uint8), (1, _PLANNED_SIDE**2))
        tile = _tile(patches, positions, [rows, cols], _PLANNED_SIDE)
        tiles.append(replace(tile, patch_size=image.patch_size) if several else tile)
    lengths = [image.num_kept for image in sequence]
    padding = seq_len - sum(lengths)
    segments = [*enumerate(lengths, start=1), *([(0, padding)] if padding else [])]
    return _Row(index, tiles, segments)


def _tile(
    patches: npt.NDArray[np.uint8], positions: npt.NDArray[np.int32], grid: list[int], side: int
) -> _Tile:
    rows, cols = grid
    canvas = np.empty((rows, cols, side, side, 3), np.uint8)
    canvas[:] = _hatching(side)
    kept = patches[:, : side * side * 3].reshape(-1, side, side, 3)
    canvas[positions[:, 0], positions[:, 1]] = kept
    pixels = canvas.transpose(0, 2, 1, 3, 4).reshape(rows * side, cols * side, 3)
    return _Tile(pixels, rows, cols, len(patches))


def _hatching(side: int) -> npt.NDArray[np.uint8]:
    """Draw a missing patch: dark, with diagonal lines that continue into the next one."""
    step = max(side // 2, 2)
    diagonal = (np.arange(side)[:, None] + np.arange(side)) % step < max(1, step // 5)
    return np.where(diagonal[..., None], _DROPPED_LINE, _DROPPED).astype(np.uint8)


def _runs(ids: list[int]) -> list[tuple[int, int]]:
    return [(slot, len(list(group))) for slot, group in groupby(ids)]


def _shelves(tiles: list[_Tile], width: int) -> list[list[_Tile]]:
    """Break a sequence's images into lines of at most ``width`` patches."""
    shelves: list[list[_Tile]] = []
    used = 0.0
    for tile in tiles:
        if not shelves or used + 1 + tile.cols > width:
            shelves.append([])
            used = -1.0
        shelves[-1].append(tile)
        used += 1 + tile.cols
    return shelves


def _layout(rows: list[_Row]) -> "_Layout":
    """Choose columns and their width so that the picture comes nearest to `_ASPECT`."""
    widest = max((tile.cols for row in rows for tile in row.tiles), default=1)
    whole = max(sum(tile.cols + 1 for tile in row.tiles) for row in rows)
    choices = []
    for columns in range(1, min(len(rows), 4) + 1):
        for lines in range(1, 9):
            width = max(widest, ceil(whole / lines), _LEAST_PATCHES // columns)
            choice = _Layout(columns, width)
            parts = choice.parts(rows)
            height = max(sum(choice.height(row) for row in part) for part in parts)
            if len(parts) == columns:
                choices.append((abs(log(choice.total / height / _ASPECT)), columns, width))
    _, columns, width = min(choices)
    return _Layout(columns, width)


@dataclass(frozen=True)
class _Layout:
    """Where sequences go, in patches: down one column, then down the next."""

    columns: int
    width: int

    @property
    def gap(self) -> float:
        return 0.05 * self.width + 1

    @property
    def total(self) -> float:
        return self.columns * self.width + (self.columns - 1) * self.gap

    @property
    def points(self) -> float:
        """Size of a patch in points."""
        return _WIDTH * 0.96 * 72 / self.total

    @property
    def label(self) -> float:
        """Height of a line of text."""
        return 1.35 * _FONT / self.points

    def height(self, row: _Row) -> float:
        """Height of a sequence: heading, labelled images, bar and the space to the next one."""
        shelves = _shelves(row.tiles, self.width)
        images = sum(max(tile.rows for tile in shelf) + 1.2 * self.label for shelf in shelves)
        return images + 4.6 * self.label

    def parts(self, rows: list[_Row]) -> list[list[_Row]]:
        """Deal the sequences in order to `columns` columns or fewer, the highest kept low."""
        heights = [self.height(row) for row in rows]
        limits = sorted(sum(heights[i:j]) for i, j in combinations(range(len(rows) + 1), 2))
        for limit in limits:
            parts: list[list[_Row]] = []
            used = limit
            for row, height in zip(rows, heights, strict=True):
                if used + height > limit * (1 + 1e-9):
                    parts.append([])
                    used = 0.0
                parts[-1].append(row)
                used += height
            if limit >= max(heights) and len(parts) <= self.columns:
                return parts
        return [rows]


def _summary(batch: PackedBatch) -> str:
    count, places = batch.segment_ids.shape
    return _summary_text(batch.num_images, count, places, int((batch.segment_ids > 0).sum()))


def _summary_text(num_images: int, count: int, places: int, tokens: int) -> str:
    padding = 100 * (1 - tokens / max(count * places, 1))
    images = f"{num_images} image" + ("s" if num_images != 1 else "")
    sequences = f"{count} sequence" + ("s" if count != 1 else "")
    return f"{images} in {sequences} of {places} tokens, {padding:.2f} % padding"


def _save(figure: Figure, path: Path | str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")
    return path
