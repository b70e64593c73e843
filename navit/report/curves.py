"""Curves of several runs in one plot, as SVG text that needs no script and no font of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

import numpy as np

from navit.report.looks import Look, short, write
from navit.report.runs import AXES, Axis, Floats

WIDTH, HEIGHT = 460, 250
_RIGHT, _TOP, _BOTTOM = 20, 10, 40
_LETTER = 7.2  # pixels, of the labels beside the plot
_BLEED = 5  # around the plot, so that dots on its edge are whole
_MAX_POINTS = 300  # of a drawn line; twice that for raw values, which keep their extremes
_LOG_FROM = 50.0  # ratio of the largest to the smallest value


@dataclass(frozen=True)
class Line:
    """One run's values in a plot."""

    run: int
    """Number of the run: its colour."""
    name: str
    """The run's name."""
    steps: Floats
    """Rising optimizer steps: float64 (N,)."""
    xs: Floats
    """Their positions on the axis: float64 (N,)."""
    ys: Floats
    """Finite values: float64 (N,)."""


@dataclass(frozen=True)
class Scale:
    """Values of an axis -> pixels of the picture."""

    low: float
    """Value at `start`."""
    high: float
    """Value at `end`; above `low`."""
    start: float
    """Pixel of `low`."""
    end: float
    """Pixel of `high`."""
    log: bool = False
    """Whether equal distances are equal ratios."""

    def __call__(self, values: Floats) -> Floats:
        """Return the pixels of values."""
        low, high = self.low, self.high
        if self.log:
            low, high, values = log10(low), log10(high), np.log10(np.maximum(values, 1e-300))
        return self.start + (values - low) / (high - low) * (self.end - self.start)

    def at(self, value: float) -> float:
        """Return the pixel of one value."""
        return float(self(np.array([value]))[0])

    def ticks(self, count: int) -> list[float]:
        """Return round values between the ends, about ``count``."""
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, count)


def draw_curves(
    lines: Sequence[Line],
    look: Look,
    axis: Axis,
    *,
    dots: bool = False,
    references: Mapping[str, float] | None = None,
) -> str:
    """Draw one quantity of several runs against steps, images, tokens or hours.

    Args:
        lines: A line for each run that has values; at least one point in all.
        look: Title, unit and kind of axis of the quantity.
        axis: What the lines' positions are.
        dots: Whether points are marked, as where they are few.
        references: Values to compare with, drawn dotted across the plot, by name.

    Returns:
        An ``<svg>`` whose colours are the page's CSS classes.

    Raises:
        ValueError: If no line has a point.
    """
    drawn = [line for line in lines if len(line.xs)]
    if not drawn:
        raise ValueError("a plot needs at least one line with a point; got none.")
    references = references or {}
    factor, x_title = _x_unit(axis, max(float(line.xs[-1]) for line in drawn))
    x_high = max(float(line.xs[-1]) for line in drawn) * factor
    up = _y_scale(drawn, look, references, whole=dots)
    labels = {value: short(value, look.unit) for value in up.ticks(5)}
    left = 18 + _LETTER * max(map(len, labels.values()), default=0)
    across = Scale(0.0, x_high or 1.0, left, WIDTH - _RIGHT)
    parts = [_grid(across, up, labels, x_title)]
    plot = [_reference(name, up.at(value), left) for name, value in references.items()]
    for line in drawn:
        plot.append(_line(line, across, up, look, factor, dots=dots or len(line.xs) < 3))
    parts.append(_clipped("".join(plot), left))
    said = ", ".join(f"{line.name} ends at {write(line.ys[-1], look.unit)}" for line in drawn)
    label = escape(f"{look.title} against {AXES[axis]}: {said}", quote=True)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def smooth(values: Floats) -> Floats:
    """Average over a centred triangle of a fortieth of the run to either side, cut at the ends."""
    reach = min(max(1, len(values) // 40), (len(values) - 1) // 2)
    window = np.bartlett(2 * reach + 3)[1:-1]
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def thin(xs: Floats, ys: Floats, count: int) -> tuple[Floats, Floats]:
    """Keep the smallest and largest value of each of ``count`` equal parts, in their order."""
    if len(xs) <= 2 * count:
        return xs, ys
    kept = {0, len(xs) - 1}
    for part in np.array_split(np.arange(len(xs)), count):
        kept |= {int(part[np.argmin(ys[part])]), int(part[np.argmax(ys[part])])}
    index = sorted(kept)
    return xs[index], ys[index]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return multiples of 1, 2, 2.5 or 5 times a power of ten between two values."""
    rough = (high - low) / max(count, 1)
    power = 10.0 ** floor(log10(rough))
    step = next(power * part for part in (1, 2, 2.5, 5, 10) if power * part >= rough * 0.999)
    first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
    return [
        round(i * step, 12) if abs(i * step) < 1e6 else i * step for i in range(first, last + 1)
    ]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten between two positive values, with their 2 and 5 where they are few."""
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    parts = (1.0, 2.0, 5.0) if log10(high / low) < 2.5 else (1.0,)
    found = [part * 10.0**power for power in powers for part in parts]
    found = [value for value in found if low <= value <= high]
    return found[:: max(1, len(found) // 6)]


def _x_unit(axis: Axis, highest: float) -> tuple[float, str]:
    """Choose the unit of time by the longest run; other amounts keep theirs."""
    if axis != "hours":
        return 1.0, AXES[axis]
    if highest < 1 / 30:
        return 3600.0, "seconds of steps"
    return (60.0, "minutes of steps") if highest < 2 else (1.0, AXES[axis])


def _y_scale(
    lines: Sequence[Line], look: Look, references: Mapping[str, float], *, whole: bool
) -> Scale:
    values = np.concatenate([line.ys for line in lines])
    low, high = float(values.min()), float(values.max())
    if not whole and look.smooth_from is not None and len(values) >= 100:
        # The start of training is steep and a spike is tall: neither may flatten the rest.
        high = max(float(np.quantile(line.ys, 0.995)) for line in lines)
    bottom, top = HEIGHT - _BOTTOM, _TOP
    if look.may_be_log and not look.from_zero and 0 < low * _LOG_FROM < high:
        return Scale(low / 1.1, high * 1.1, bottom, top, log=True)
    high = max([high, *references.values()])
    if look.from_zero or look.unit == "share":
        low, nothing = min(low, 0.0), 0.01 if look.unit == "share" else 1.0
        span = max(high, 0.0) - low or nothing
        return Scale(1.06 * low, low + 1.06 * span, bottom, top)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return Scale(low - margin, high + margin, bottom, top)


def _grid(across: Scale, up: Scale, labels: Mapping[float, str], x_title: str) -> str:
    left, right, bottom = across.start, across.end, up.start
    parts = []
    for value, label in labels.items():
        y = up.at(value)
        parts.append(f'<line x1="{left:.1f}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 7:.1f}" y="{y + 4:.1f}" class="end">{label}</text>')
    for value in across.ticks(5):
        x = across.at(value)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{up.end}" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" class="mid">{short(value)}</text>')
    middle = (left + right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 5}" class="mid">{escape(x_title)}</text>')
    return f'<g class="grid">{"".join(parts)}</g>'


def _line(line: Line, across: Scale, up: Scale, look: Look, factor: float, *, dots: bool) -> str:
    xs = line.xs * factor
    parts = []
    if look.smooth_from is not None and len(xs) >= look.smooth_from and not dots:
        parts.append(_path(*thin(xs, line.ys, _MAX_POINTS), across, up, "raw"))
        parts.append(_path(*thin(xs, smooth(line.ys), _MAX_POINTS // 2), across, up, "curve"))
    else:
        parts.append(_path(*thin(xs, line.ys, _MAX_POINTS), across, up, "curve"))
    if dots and len(xs) <= _MAX_POINTS:
        for x, y, step, value in zip(across(xs), up(line.ys), line.steps, line.ys, strict=True):
            said = escape(f"{line.name}, step {int(step):,}: {write(float(value), look.unit)}")
            place = f'cx="{x:.1f}" cy="{y:.1f}"'
            parts.append(f'<circle {place} r="3"><title>{said}</title></circle>')
    return f'<g class="run-{line.run}">{"".join(parts)}</g>'


def _path(xs: Floats, ys: Floats, across: Scale, up: Scale, kind: str) -> str:
    # Far outside the plot is as good as a little: browsers lose precision at large coordinates.
    down = np.clip(up(ys), _TOP - HEIGHT, 2 * HEIGHT)
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across(xs), down, strict=True))
    return f'<polyline class="{kind}" points="{points}"/>'


def _reference(name: str, y: float, left: float) -> str:
    right = WIDTH - _RIGHT
    line = f'<line x1="{left:.1f}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
    label = f'<text x="{right}" y="{y - 5:.1f}" class="end">{escape(name)}</text>'
    return f'<g class="reference">{line}{label}</g>'


def _clipped(content: str, left: float) -> str:
    """Cut what leaves the plot, for instance the first steps' loss."""
    x, y = left - _BLEED, _TOP - _BLEED
    width, height = WIDTH - left - _RIGHT + 2 * _BLEED, HEIGHT - _TOP - _BOTTOM + 2 * _BLEED
    box = f'x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}"'
    return f'<svg {box} viewBox="{x:.1f} {y} {width:.1f} {height}">{content}</svg>'
