"""Pictures of an analysis: filters, positions, attention distance, alignment."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from navit.analyze.filters import Filters
from navit.analyze.positions import position_similarity, spread_places
from navit.analyze.results import Alignment, Distances
from navit.model import NaViT

_GAP = 1  # cells between the maps of a mosaic


def draw_filters(found: Filters, path: Path) -> Path:
    """Draw principal components as RGB filters, each scaled about grey by its largest value."""
    count, side = len(found.filters), found.filters.shape[1]
    cols = min(count, 7)
    rows = -(-count // cols)
    width, height = 1.25 * cols + 0.3, 1.5 * rows + 0.7
    figure = Figure(figsize=(width, height))
    panels = figure.subplots(
        rows,
        cols,
        squeeze=False,
        gridspec_kw={
            "left": 0.15 / width,
            "right": 1 - 0.15 / width,
            "top": 1 - 0.85 / height,
            "bottom": 0.1 / height,
            "hspace": 0.25,
            "wspace": 0.06,
        },
    )
    for axes in panels.flat:
        axes.set_axis_off()
    for number, (axes, pattern) in enumerate(zip(panels.flat, found.filters, strict=False)):
        axes.imshow((0.5 + 0.5 * pattern / pattern.abs().max().clamp(min=1e-12)).numpy())
        axes.set_title(f"{number + 1}: {100 * float(found.shares[number]):.1f} %", size=8.5, pad=3)
    total = 100 * float(found.shares.sum())
    figure.suptitle(
        f"Patch embedding: the first {count} principal components of its {side} x {side} filters\n"
        f"with their share of the weights' variance, together {total:.0f} %. Grey is 0.",
        size=10,
        y=1 - 0.1 / height,
    )
    return save(figure, path)


def draw_positions(tower: NaViT, grids: Sequence[tuple[int, int]], path: Path) -> Path:
    """Draw, for each grid, maps of how alike one place's position embedding is to all others'."""
    mosaics = [_mosaic(tower, grid) for grid in grids]
    low = min(float(np.nanmin(mosaic)) for mosaic in mosaics)
    # Of equal area, so that a tall grid is as legible as a wide one; in inches.
    unit, left, gap, head, foot = 3.9, 0.65, 0.45, 0.8, 0.6
    ratios = [(mosaic.shape[1] / mosaic.shape[0]) ** 0.5 for mosaic in mosaics]
    tall = unit / min(ratios)
    width = left + unit * sum(ratios) + gap * len(grids) + 0.8
    height = head + tall + foot
    figure = Figure(figsize=(width, height))
    panels, x = [], left
    for ratio in ratios:
        place = (x, height - head - unit / ratio, unit * ratio, unit / ratio)
        panels.append(_axes_at(figure, place))
        x += unit * ratio + gap
    colours = colormaps["viridis"].with_extremes(bad="white")
    for axes, grid, mosaic in zip(panels, grids, mosaics, strict=True):
        shown = axes.imshow(mosaic, cmap=colours, vmin=min(low, 0.0), vmax=1.0)
        places = spread_places(grid)
        for which, side, chosen in zip("yx", grid, places, strict=True):
            ticks = [index * (side + _GAP) + (side - 1) / 2 for index in range(len(chosen))]
            axes.set(**{f"{which}ticks": ticks, f"{which}ticklabels": chosen})
        axes.tick_params(length=0, labelsize=8)
        axes.spines[:].set_visible(False)
        axes.set_title(f"grid of {grid[0]} x {grid[1]} patches", size=10)
        axes.set_xlabel("column of the place")
    panels[0].set_ylabel("row of the place")
    bar = _axes_at(figure, (x - 0.2, foot + 0.1 * tall, 0.18, 0.8 * tall))
    figure.colorbar(shown, cax=bar, label="cosine similarity")
    figure.text(
        left / width,
        1 - 0.25 / height,
        "Position embeddings: similarity of one place (one map each) with every place of the grid",
        size=12,
        va="center",
    )
    return save(figure, path)


def _axes_at(figure: Figure, place: tuple[float, float, float, float]) -> Axes:
    """Add axes at (left, bottom, width, height), in inches."""
    width, height = figure.get_size_inches()
    x, y, w, h = place
    added: Axes = figure.add_axes((x / width, y / height, w / width, h / height))
    return added


def _mosaic(tower: NaViT, grid: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Lay the maps of some places out as those lie in the grid, NaN between them."""
    rows, cols = spread_places(grid)
    maps = position_similarity(tower, grid, [(row, col) for row in rows for col in cols])
    padded = torch.nn.functional.pad(maps, (0, _GAP, 0, _GAP), value=torch.nan)
    height, width = padded.shape[1:]
    laid = padded.view(len(rows), len(cols), height, width).transpose(1, 2)
    mosaic: npt.NDArray[np.float32] = laid.reshape(len(rows) * height, -1)[:-_GAP, :-_GAP].numpy()
    return mosaic


def draw_distances(found: Distances, path: Path) -> Path:
    """Draw mean attention distance by layer, a dot a head, beside that of uniform attention."""
    means = found.describe()
    panels = [
        ("mean distance in pixels", means["pixels"], means["uniform_pixels"]),
        ("share of the diagonal", means["share_of_diagonal"], means["uniform_share_of_diagonal"]),
    ]
    if np.any(means["attention_on_added_tokens"]):
        panels.append(("on class token and registers", means["attention_on_added_tokens"], None))
    figure = Figure(figsize=(4.6 * len(panels), 4.0), layout="constrained")
    for index, (axes, (label, values, uniform)) in enumerate(
        zip(figure.subplots(1, len(panels)), panels, strict=True)
    ):
        _draw_heads(axes, np.asarray(values), uniform)
        axes.set(xlabel="layer", ylabel=label)
        if index:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    images = means["images"]
    figure.suptitle(
        f"Attention distance by layer and head: mean over the patches of {images} "
        f"image{'s' * (images != 1)}",
        size=11,
    )
    return save(figure, path)


def _draw_heads(axes: Axes, values: npt.NDArray[np.float64], uniform: float | None) -> None:
    depth, heads = values.shape
    colours = colormaps["viridis"](np.linspace(0.0, 0.92, heads))
    for head in range(heads):
        named = f"head {head + 1}" if heads <= 4 else None
        axes.scatter(
            range(1, depth + 1), values[:, head], s=34, color=colours[head], alpha=0.85, label=named
        )
    axes.plot(range(1, depth + 1), values.mean(1), color="0.5", linewidth=1, label="mean of heads")
    if uniform is not None:
        axes.axhline(uniform, color="0.3", linestyle="--", linewidth=1, label="uniform attention")
    axes.set_ylim(0, 1.3 * max(float(values.max()), uniform or 0.0) + 1e-6)
    axes.set_xlim(0.5, depth + 0.5)
    axes.set_xticks(range(1, depth + 1, -(-depth // 12)))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8.5, ncols=2, loc="upper left")


def draw_alignment(found: Alignment, path: Path) -> Path:
    """Draw CKA between the layers of the model's own view and those of each view."""
    results = list(found.results())
    kinds, cols = list(found.pairs), len(found.views)
    own = found.views[0]
    figure = Figure(figsize=(4.1 * cols + 0.9, 4.1 * len(kinds) + 0.7), layout="constrained")
    panels = figure.subplots(len(kinds), cols, squeeze=False)
    for axes, (kind, name, values) in zip(panels.flat, results, strict=True):
        shown = axes.imshow(values.numpy(), vmin=0, vmax=1, cmap="magma", origin="lower")
        _write_values(axes, values)
        labels = ["emb.", *map(str, range(1, len(values) - 1)), "pooled"]
        step = -(-len(labels) // 14)
        last = len(labels) - 1
        # Of many labels the one before the last is left out, for room.
        ticks = [*range(0, last - (last > 9), step), last]
        names = [labels[tick] for tick in ticks]
        axes.set(xticks=ticks, xticklabels=names, yticks=ticks, yticklabels=names)
        axes.tick_params(labelsize=8)
        axes.set_title(f"{kind}: {own.name} and {name}", size=9)
        axes.set_xlabel(f"layer, {name}")
        axes.set_ylabel(f"layer, {own.name}")
    figure.colorbar(shown, ax=panels, label="linear CKA", shrink=0.85, pad=0.01)
    title = f"Similarity of layers between resolutions: linear CKA over {found.images} images"
    if "class token" in kinds:
        title += "\n(white: before the first block the class token is the same for all images)"
    figure.suptitle(title, size=11)
    return save(figure, path)


def _write_values(axes: Axes, values: Float[Tensor, "A B"]) -> None:
    if len(values) > 9:
        return
    for row, line in enumerate(values.tolist()):
        for col, value in enumerate(line):
            colour = "black" if value > 0.6 else "white"
            text = f"{value:.2f}" if value == value else "-"
            axes.text(col, row, text, ha="center", va="center", size=7.5, color=colour)


def save(figure: Figure, path: Path) -> Path:
    """Write a picture as PNG, or what its suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white")
    return path
