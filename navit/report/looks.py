"""How quantities are called, written and drawn: titles, units, which way is better."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import floor, isfinite, log10
from typing import Literal

Unit = Literal["", "share", "bytes"]


@dataclass(frozen=True)
class Look:
    """How one quantity is shown."""

    title: str
    """Heading of its curve and its row."""
    unit: Unit = ""
    """"share": in percent; "bytes": in MiB or GiB."""
    smooth_from: int | None = 60
    """Points from which on a smoothed curve lies over the values, which are then drawn thin; None:
    what is smooth by itself."""
    from_zero: bool = False
    """Whether the axis starts at 0."""
    may_be_log: bool = True
    """Whether positive values over a wide range get a logarithmic axis."""
    better: Literal["high", "low", ""] = ""
    """Which way is better, where that is clear."""


_KNOWN = {
    "loss": Look("Training loss", smooth_from=10, may_be_log=False, better="low"),
    "lr": Look("Learning rate", smooth_from=None, from_zero=True),
    "gradient_norm": Look("Gradient norm before clipping", smooth_from=10),
    "logit_scale": Look("Multiplier of the similarities", smooth_from=None),
    "images_per_second": Look("Images/s", from_zero=True, better="high"),
    "tokens_per_second": Look("Kept tokens/s", from_zero=True, better="high"),
    "flops_per_second": Look("Model FLOP/s", from_zero=True, better="high"),
    "padding": Look("Padding", "share", from_zero=True, better="low"),
    "data_wait": Look("Waiting for data", "share", from_zero=True, better="low"),
    "drop_rate": Look("Tokens dropped", "share", from_zero=True),
    "rss_mib": Look("Resident memory, MiB", from_zero=True, better="low"),
    "cuda_mib": Look("CUDA memory, MiB", from_zero=True, better="low"),
    "mfu": Look("Model FLOPs utilization", "share", from_zero=True, better="high"),
}
NONE = "\u2013"
"""Stands in a table where there is no value."""
HIDDEN = frozenset({"images"})
"""Recorded at every step, but shown as a total and as an axis, not as a curve."""
HEADLINE = ("recall@1", "accuracy", "accuracy@1")
"""Ends of the names of results that are shown first."""
_BASELINES = ("shape_accuracy@1", "shape_accuracy@5")
_SHARES = ("recall@", "accuracy", "precision", "map@", "padding", "data_wait", "drop_rate", "mfu")


def look_of(name: str) -> Look:
    """Return how a quantity is shown; of an unknown name it is guessed."""
    if name in _KNOWN:
        return _KNOWN[name]
    title = name.replace("_", " ").replace("/", ": ")
    title = title[:1].upper() + title[1:]
    lower = name.lower()
    if any(part in lower for part in ("memory", "bytes")) and not lower.endswith(("gib", "mib")):
        return Look(title, "bytes", from_zero=True)
    if any(part in lower for part in _SHARES):
        return Look(title, "share", from_zero=True, better="high")
    return Look(title, better="low" if lower.endswith(("loss", "rank", "error")) else "")


def is_reference(name: str) -> bool:
    """Whether a result is a line to compare with: chance, or what shape alone reaches."""
    return name.startswith("chance/") or name.endswith(_BASELINES)


def references_of(name: str, names: Iterable[str]) -> dict[str, str]:
    """Return the results a result is compared with, by name, and what they are called."""
    shape = name.replace("prompt_accuracy", "shape_accuracy")
    candidates = {f"chance/{name}": "chance", shape: "shape alone"}
    return {other: what for other, what in candidates.items() if other in names and other != name}


def is_headline(name: str) -> bool:
    """Whether a result is among those shown first."""
    return name.endswith(HEADLINE) and not is_reference(name)


def write(value: float | None, unit: Unit = "") -> str:
    """Write a value for a table, or a dash where there is none."""
    if value is None or not isfinite(value):
        return NONE
    if unit == "share":
        percent = 100 * value
        return f"{percent:.1f} %" if percent >= 1 else f"{percent:.3g} %".replace("e-0", "e-")
    if unit == "bytes":
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    return _plain(value)


def short(value: float, unit: Unit = "") -> str:
    """Write a value for an axis: few characters, thousands as k and millions as M."""
    if unit == "share":
        return f"{100 * value:.6g} %"
    if unit == "bytes":
        return f"{value / 2**30:.4g} GiB" if value >= 2**30 else f"{value / 2**20:.4g} MiB"
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g} {letter}"
    if value and abs(value) < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-")
    return f"{value:,.6g}"


def write_hours(hours: float | None) -> str:
    """Write a time so that it can be read: seconds, minutes or hours."""
    if hours is None or not isfinite(hours):
        return NONE
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.1f} min" if hours < 1 else f"{hours:,.2f} h"


def _plain(value: float) -> str:
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-3:
        return f"{value:.2e}".replace("e-0", "e-")
    return f"{value:.{max(0, 3 - floor(log10(size)))}f}"
