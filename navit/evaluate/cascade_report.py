"""What the measurement of a cascade found: as a table for the terminal and as JSON."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from navit.cascade import CascadeThresholds
from navit.evaluate.bootstrap import Interval
from navit.serialize import to_plain
from packer.batch import BatchStats

METHODS = ("one budget", "cascade", "exit fractions", "random routing")
"""What is compared, in the order of tables and legends."""


@dataclass(frozen=True)
class CascadePoint:
    """One way to answer the images of the reporting half."""

    method: str
    """Of `METHODS`."""
    accuracy: float
    """Share of the images answered right."""
    standard_error: float
    """Of the accuracy."""
    mean_tokens: float
    """Tokens spent on an image, over all stages."""
    mean_flops: float
    """Operations spent on an image, over all stages."""
    exit_fractions: tuple[float, ...]
    """Share of the images that leaves at each stage."""
    thresholds: CascadeThresholds | None = None
    """What decides where an image leaves, with what it came to on the solving half."""
    images_per_second: float | None = None
    """Measured, decoding and packing included, reading of files not; None where it was not run."""
    model_images_per_second: float | None = None
    """Measured, the networks alone."""
    over_last: Interval | None = None
    """Accuracy above that of the last budget alone, on the same images: paired bootstrap, 95 %."""
    over_random: Interval | None = None
    """Accuracy above random routing with the same exit fractions, likewise."""


@dataclass(frozen=True)
class CascadeReport:
    """Everything the measurement of a cascade found."""

    set_name: str
    """Name of the set of classes."""
    num_classes: int
    """C."""
    budgets: tuple[int, ...]
    """Token budget of each stage."""
    patch_sizes: tuple[int, ...]
    """Patch size of each stage in pixels."""
    solving_images: int
    """Images that thresholds were solved on."""
    images: int
    """Other images, that all figures are of."""
    points: tuple[CascadePoint, ...]
    """One a method and cost."""
    stats: BatchStats
    """Counts of the first stage's pass over all images."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Samples lost before the first stage, by cause."""

    def of(self, method: str) -> tuple[CascadePoint, ...]:
        """Return a method's points, as they rise in tokens."""
        found = (point for point in self.points if point.method == method)
        return tuple(sorted(found, key=lambda point: point.mean_tokens))

    def to_json(self) -> dict[str, Any]:
        """Turn it into JSON values."""
        plain: dict[str, Any] = to_plain(self)
        return plain


def format_cascade(report: CascadeReport) -> str:
    """Lay out the points: accuracy, costs and speed of each, one a line."""
    return "\n".join(_lines(report))


def _lines(report: CascadeReport) -> Iterator[str]:
    budgets = " -> ".join(str(budget) for budget in report.budgets)
    sizes = set(report.patch_sizes)
    patches = "" if len(sizes) == 1 else f" of {' -> '.join(map(str, report.patch_sizes))} pixels"
    yield f"cascade {budgets} tokens{patches}: {report.set_name}, {report.num_classes} classes"
    yield f"thresholds of {report.solving_images:,} images, figures of {report.images:,} others"
    yield ""
    yield (
        f"{'':<16}{'tokens':>7}{'MFLOP':>9}{'top 1':>9}{'images/s':>10}{'network':>9}  "
        "leave at each stage   points over the last budget, 95 %"
    )
    for method in METHODS:
        for number, point in enumerate(report.of(method)):
            yield _line(method if not number else "", point)


def _line(title: str, point: CascadePoint) -> str:
    exits = " ".join(f"{100 * share:.0f}" for share in point.exit_fractions)
    text = (
        f"{title:<16}{point.mean_tokens:>7.1f}{point.mean_flops / 1e6:>9,.1f}"
        f"{100 * point.accuracy:>7.1f} %{_speed(point.images_per_second):>10}"
        f"{_speed(point.model_images_per_second):>9}  {exits + ' %':<20}"
    )
    if point.over_last is not None:
        mean, low, high = (
            100 * value
            for value in (point.over_last.mean, point.over_last.low, point.over_last.high)
        )
        text += f"  {mean:+.1f} ({low:+.1f} .. {high:+.1f})"
    return text.rstrip()


def _speed(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
