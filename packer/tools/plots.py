"""Pictures of the tools: one PNG each, drawn without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

if TYPE_CHECKING:
    from packer.tools.simulate import Simulate, Simulated

_COLOURS = [colormaps["tab10"](i) for i in (0, 1, 2, 4, 5, 6, 8, 9)]
_TICKS = (
    (2.5, (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)),
    (8.0, (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)),
    (1000.0, (1.0, 2.0, 5.0)),
)
"""Ratio of an axis's limits -> parts of a decade that get a number."""
_FLOOR = 1e-5  # percent; the lower end of the padding axis


def draw_simulation(
    found: Sequence["Simulated"], path: Path, *, title: str, simulate: "Simulate"
) -> Path:
    """Draw padding, lengths, images per sequence and the balance between ranks.

    Args:
        found: A line for each L and strategy.
        path: Written as PNG (or what its suffix says); its folder is created.
        title: Heading of the picture.
        simulate: The settings, for B and the model's width.

    Returns:
        ``path``.
    """
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    panels = figure.subplots(2, 2)
    first = [line for line in found if line.strategy == found[0].strategy]
    _draw_padding(panels[0, 0], found)
    _draw_lengths(panels[0, 1], first)
    _draw_counts(panels[1, 0], first)
    _draw_balance(panels[1, 1], first, simulate)
    figure.suptitle(title, weight="bold", size=11, wrap=True)
    return _save(figure, path)


def _draw_padding(axes: Axes, found: Sequence["Simulated"]) -> None:
    seq_lens = list(dict.fromkeys(line.placed.seq_len for line in found))
    strategies = list(dict.fromkeys(line.strategy for line in found))
    width = 0.8 / len(strategies)
    for i, strategy in enumerate(strategies):
        lines = [line for line in found if line.strategy == strategy]
        at = np.arange(len(seq_lens)) + (i - (len(strategies) - 1) / 2) * width
        shown = [max(100 * line.report.padding, _FLOOR) for line in lines]
        axes.bar(at, shown, width * 0.92, color=_COLOURS[i], label=strategy)
        for x, y, line in zip(at, shown, lines, strict=True):
            share = 100 * line.report.padding
            label = f"{share:.1g}" if share < 0.01 else f"{share:.2g}"
            axes.annotate(label, (x, y), (0, 2), textcoords="offset points", ha="center", size=7)
    for i, seq_len in enumerate(seq_lens):
        bound = next(line.report.bound for line in found if line.placed.seq_len == seq_len)
        label = "lower bound" if i == 0 else ""  # one line stands for all in the legend
        y = max(100 * bound, _FLOOR)
        axes.hlines(y, i - 0.45, i + 0.45, colors="black", linestyles=":", label=label)
    axes.set_yscale("log")
    axes.set_ylim(_FLOOR * 0.8, max(100 * max(line.report.padding for line in found) * 30, 1))
    axes.set_xticks(range(len(seq_lens)), [f"L = {seq_len}" for seq_len in seq_lens])
    axes.set_ylabel("padding, % of token places")
    axes.set_title("Padding by strategy", size=10)
    axes.legend(frameon=False, ncols=3, fontsize=8, loc="upper center")
    _tidy(axes)


def _draw_lengths(axes: Axes, first: Sequence["Simulated"]) -> None:
    shortest = min(int(line.placed.lengths.min()) for line in first)
    longest = max(int(line.placed.lengths.max()) for line in first)
    edges = np.unique(np.rint(np.geomspace(shortest, longest + 1, 60))) - 0.5
    for i, line in enumerate(first):
        lengths = line.placed.lengths
        # Per decade, not per bin: whole numbers fill narrow bins unevenly.
        share = np.histogram(lengths, edges)[0] / len(lengths) / np.diff(np.log10(edges))
        mean, median = lengths.mean(), np.median(lengths)
        label = f"L = {line.placed.seq_len}: mean {mean:.0f}, median {median:.0f}"
        axes.stairs(100 * share, edges, color=_COLOURS[i], linewidth=1.4, label=label)
    _log_axis(axes, axes.xaxis)
    axes.set_xlabel("kept tokens of an image")
    axes.set_ylabel("% of images per decade")
    axes.set_title("Lengths after resize and drop", size=10)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    _tidy(axes)


def _draw_counts(axes: Axes, first: Sequence["Simulated"]) -> None:
    for i, line in enumerate(first):
        counts = line.placed.counts
        share = np.bincount(counts) / len(counts)
        label = f"L = {line.placed.seq_len}: mean {counts.mean():.2f}, max {counts.max()}"
        x = np.arange(1, len(share))
        axes.plot(x, 100 * share[1:], color=_COLOURS[i], marker="o", markersize=2.5, label=label)
    _log_axis(axes, axes.xaxis, whole=True)
    axes.set_xlabel("images in a sequence")
    axes.set_ylabel("% of sequences")
    axes.set_ylim(bottom=0)
    axes.set_title(f"Images per sequence, {first[0].strategy}", size=10)
    axes.legend(frameon=False, fontsize=8, loc="best")
    _tidy(axes)


def _draw_balance(axes: Axes, first: Sequence["Simulated"], simulate: "Simulate") -> None:
    batch = simulate.sequences_per_batch
    for i, line in enumerate(first):
        ranks, means = [], []
        for num_ranks in (2, 4, 8, 16, 32, 64, 128, 256):
            steps = line.placed.imbalance(
                num_ranks=num_ranks, sequences_per_batch=batch, width=simulate.width
            )
            if len(steps) >= 5:  # fewer say little about the mean
                ranks.append(num_ranks)
                means.append(100 * steps.mean())
        label = f"L = {line.placed.seq_len}"
        axes.plot(ranks, means, color=_COLOURS[i], marker="o", markersize=3.5, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"ranks, each with its own stream, {batch} sequences a step")
    axes.set_ylabel("slowest rank above the mean, %")
    axes.set_title(f"Imbalance of n² + 6 D n, D = {simulate.width}, {first[0].strategy}", size=10)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    _tidy(axes)


def draw_stats(
    values: Mapping[str, npt.NDArray[Any]],
    sizes: npt.NDArray[np.integer[Any]],
    path: Path,
    *,
    title: str,
    linear: Sequence[str] = (),
) -> Path:
    """Draw a histogram of each quantity, its median marked, and how widths and heights go together.

    Args:
        values: Name with its unit -> (n,) positive values; empty ones are left out.
        sizes: (n, 2) heights and widths in pixels.
        path: Written as PNG (or what its suffix says); its folder is created.
        title: Heading of the picture.
        linear: Quantities whose axis is not logarithmic.

    Returns:
        ``path``.
    """
    shown = {name: column for name, column in values.items() if len(column)}
    columns = 3 if len(shown) < 7 else 4
    rows = -(-(len(shown) + 1) // columns)
    figure = Figure(figsize=(3.5 * columns, 2.9 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    _draw_sizes(panels[0], sizes)
    for axes, (name, column) in zip(panels[1:], shown.items(), strict=False):
        _draw_histogram(axes, name, column, log=name not in linear)
    for axes in panels[len(shown) + 1 :]:
        axes.set_axis_off()
    figure.suptitle(title, weight="bold", size=11, wrap=True)
    return _save(figure, path)


def _draw_sizes(axes: Axes, sizes: npt.NDArray[np.integer[Any]]) -> None:
    edges = np.geomspace(max(sizes.min() * 0.9, 0.5), sizes.max() * 1.1, 60)
    counts, _, _ = np.histogram2d(sizes[:, 1], sizes[:, 0], bins=(edges, edges))
    shares = np.ma.masked_equal(100 * counts.T / len(sizes), 0)
    mesh = axes.pcolormesh(edges, edges, shares, cmap="viridis_r", norm=LogNorm(), rasterized=True)
    axes.plot(edges[[0, -1]], edges[[0, -1]], color="black", linewidth=0.6, linestyle=":")
    bar = axes.figure.colorbar(mesh, ax=axes)
    bar.set_label("% of images in a cell", size=8)
    bar.ax.tick_params(labelsize=7)
    for axis in (axes.xaxis, axes.yaxis):
        _log_axis(axes, axis)
    axes.set_xlabel("width (pixels)")
    axes.set_ylabel("height (pixels)")
    axes.set_title("all sizes; dotted: squares", size=9)
    axes.grid(alpha=0.25)


def _draw_histogram(axes: Axes, name: str, values: npt.NDArray[Any], *, log: bool) -> None:
    low, high = float(values.min()), float(values.max())
    whole = values.dtype.kind in "iu"
    if log:
        edges = np.geomspace(low, max(high + whole, low * 1.01), 41)
        edges = np.unique(np.rint(edges)) - 0.5 if whole else edges
    else:
        step = max(1, int(np.ceil((high - low + 1) / 50)))
        edges = np.arange(np.floor(low) - 0.5, high + step + 0.5, step)
    share = np.histogram(values, edges)[0] / len(values)
    axes.stairs(100 * share, edges, fill=True, color=_COLOURS[0], alpha=0.75)
    median = float(np.median(values))
    axes.axvline(median, color="black", linewidth=1, linestyle="--")
    text = f"{median:,.0f}" if whole or median >= 100 else f"{median:.3g}"
    axes.set_title(f"median {text}", size=9)
    if log:
        _log_axis(axes, axes.xaxis)
    axes.set_xlabel(name)
    axes.set_ylabel("% in a bin")
    _tidy(axes)


def _log_axis(axes: Axes, axis: Axis, *, whole: bool = False) -> None:
    scale, limits = (
        (axes.set_xscale, axes.get_xlim) if axis is axes.xaxis else (axes.set_yscale, axes.get_ylim)
    )
    scale("log")
    low, high = limits()
    # The fewer decades, the more of their parts need a number; more would overlap.
    parts = next((parts for ratio, parts in _TICKS if high / low < ratio), (1.0,))
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    step = max(1, len(decades) // 6)
    ticks = [part * 10.0**decade for decade in decades[::step] for part in parts]
    ticks = [tick for tick in ticks if low <= tick <= high and (tick % 1 == 0 or not whole)]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(_short_number))
    axis.set_minor_formatter(NullFormatter())


def _short_number(value: float, _: Any = None) -> str:
    for limit, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{sign}"
    return f"{value:g}"


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white")
    return path
