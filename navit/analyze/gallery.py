"""Attention rollout drawn over images of native aspect, in rows of equal height."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from navit.analyze.pictures import save
from navit.analyze.results import Rollout

_WIDTH, _ROW, _GAP, _HEAD, _FOOT = 12.0, 1.75, 0.12, 0.5, 0.8  # inches
_NAME = 0.28  # inches above a row, for its images' names


def draw_rollouts(rollouts: Sequence[Rollout], path: Path) -> Path:
    """Draw each image beside its attention rollout, laid over the image in grey.

    Colours are shares in units of what each patch would have if all had the same, on one scale for
    all images that leaves out the extreme hundredth at either end.

    Args:
        rollouts: At least one.
        path: Written as PNG, or what its suffix says.
    """
    relative = [r.shares.numpy() * r.shares.numel() for r in rollouts]
    low, high = np.quantile(np.concatenate([x.ravel() for x in relative]), [0.01, 0.99])
    norm = Normalize(float(low), float(max(high, low + 1e-3)))
    lines = _lines([2 * r.pixels.shape[1] / r.pixels.shape[0] for r in rollouts])
    heights = [min(_ROW, _row_height(line, rollouts)) for line in lines]
    height = _HEAD + sum(heights) + (_NAME + _GAP) * len(lines) + _FOOT
    figure = Figure(figsize=(_WIDTH, height))
    top = height - _HEAD
    for line, tall in zip(lines, heights, strict=True):
        left = _GAP
        for index in line:
            image = rollouts[index].pixels
            wide = tall * image.shape[1] / image.shape[0]
            _draw_pair(figure, rollouts[index], relative[index], norm, (left, top, wide, tall))
            left += 2 * wide + 2.5 * _GAP
        top -= tall + _NAME + _GAP
    figure.text(
        _GAP / _WIDTH,
        1 - 0.28 / height,
        "Attention rollout: where an image's vector comes from",
        size=14,
        weight="bold",
        va="center",
    )
    bar = figure.add_axes((0.3, 0.45 / height, 0.4, 0.14 / height))
    figure.colorbar(
        ScalarMappable(norm, colormaps["inferno"]), cax=bar, orientation="horizontal"
    ).set_label("share of the image's vector by patch; 1: what uniform shares would be", size=9)
    bar.tick_params(labelsize=8)
    return save(figure, path)


def _draw_pair(
    figure: Figure,
    rollout: Rollout,
    relative: np.ndarray,
    norm: Normalize,
    place: tuple[float, float, float, float],
) -> None:
    left, top, wide, tall = place
    total = figure.get_figheight()
    height, width = rollout.pixels.shape[:2]
    extent = (0, width, height, 0)
    for number in range(2):
        x = left + number * (wide + 0.3 * _GAP)
        axes = figure.add_axes(
            (x / _WIDTH, (top - _NAME - tall) / total, wide / _WIDTH, tall / total)
        )
        axes.set_axis_off()
        if number == 0:
            axes.imshow(rollout.pixels.numpy(), extent=extent, aspect="auto")
            name = _shortened(rollout.key, int(2 * wide * 11))
            axes.set_title(name, size=8, loc="left", pad=3)
            continue
        grey = rollout.pixels.float().mean(2).numpy()
        axes.imshow(grey, extent=extent, cmap="gray", vmin=0, vmax=255, aspect="auto")
        axes.imshow(relative, extent=extent, cmap="inferno", norm=norm, alpha=0.62, aspect="auto")


def _lines(widths: Sequence[float]) -> list[list[int]]:
    """Place pairs, given as widths in heights, each in the first line that has room for it."""
    lines: list[list[int]] = []
    used: list[float] = []
    for index, width in enumerate(widths):
        wide = min(width * _ROW, _WIDTH - 4.5 * _GAP) + 2.5 * _GAP
        line = next((i for i, taken in enumerate(used) if taken + wide <= _WIDTH), len(lines))
        if line == len(lines):
            lines.append([])
            used.append(_GAP)
        lines[line].append(index)
        used[line] += wide
    return lines


def _row_height(line: Sequence[int], rollouts: Sequence[Rollout]) -> float:
    """Return the height at which a line fills the width."""
    ratio = sum(2 * rollouts[i].pixels.shape[1] / rollouts[i].pixels.shape[0] for i in line)
    return (_WIDTH - 2 * _GAP - 2.5 * _GAP * len(line)) / ratio


def _shortened(name: str, most: int) -> str:
    name = name.replace("$", r"\$")
    return name if len(name) <= most else "..." + name[-max(most - 3, 4) :]
