"""Paired timing: A and B alternate in one process on the same inputs, beside an A/A run.

A ratio from two separate runs compares two states of the machine; the median of ratios of
neighbouring runs compares the two programs. A ratio inside the A/A range is "no difference".
"""

import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch

from benchmarks import peers


@dataclass(frozen=True)
class Paired:
    """Median of paired time ratios A / B with its 10-90 % range, and the same for A / A."""

    ratio: float
    low: float
    high: float
    aa_ratio: float
    aa_low: float
    aa_high: float
    seconds_a: float
    seconds_b: float
    pairs: int

    def __str__(self) -> str:
        """Render ratio and ranges for a table."""
        return (
            f"{self.ratio:.3f} ({self.low:.3f}..{self.high:.3f}; "
            f"A/A {self.aa_ratio:.3f}, {self.aa_low:.3f}..{self.aa_high:.3f})"
        )


def paired_ratio(
    a: Callable[[], Any],
    b: Callable[[], Any],
    *,
    pairs: int = 10,
    warmup: int = 1,
    self_timed: bool = False,
) -> Paired:
    """Time ``a`` against ``b`` in the order A B B A, then ``a`` against itself the same way.

    Args:
        a: The program under test.
        b: The program it is compared with.
        pairs: Ratios taken; rounded up to an even number.
        warmup: Untimed calls of each before the first timing.
        self_timed: Whether ``a`` and ``b`` return the seconds that count, since they start
            processes first.

    Returns:
        The time ratio A / B (below 1: A is faster) and its A/A control.
    """
    for _ in range(warmup):
        a()
        b()
    seconds = _returned if self_timed else _seconds
    ratios, times_a, times_b = _alternate(a, b, pairs, seconds)
    control, _, _ = _alternate(a, a, pairs, seconds)
    return Paired(*spread(ratios), *spread(control), median(times_a), median(times_b), len(ratios))


def environment() -> dict[str, Any]:
    """Describe where a result was measured: command, commit, versions, device, threads, date."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "commit": commit or "unknown",
        "date": date.today().isoformat(),
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "numpy", "pillow", "xformers")},
        "peers": peers.versions(),
    }


def as_row(value: Any) -> Any:
    """Turn a `Paired` into a JSON-ready mapping; pass everything else through."""
    return asdict(value) if isinstance(value, Paired) else value


def store(folder: Path, theme: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows with their environment to ``<date>_<device>_<theme>.json`` and return its path."""
    described = environment()
    device = "-".join(described["device"].lower().split())
    path = folder / f"{described['date']}_{device}_{theme}.json"
    folder.mkdir(parents=True, exist_ok=True)
    plain = [{name: as_row(value) for name, value in row.items()} for row in rows]
    path.write_text(json.dumps({"environment": described, "rows": plain}, indent=2) + "\n")
    return path


def _alternate(
    a: Callable[[], Any],
    b: Callable[[], Any],
    pairs: int,
    seconds: Callable[[Callable[[], Any]], float],
) -> tuple[list[float], list[float], list[float]]:
    times_a: list[float] = []
    times_b: list[float] = []
    for _ in range((pairs + 1) // 2):
        times_a.append(seconds(a))
        times_b.append(seconds(b))
        times_b.append(seconds(b))
        times_a.append(seconds(a))
    return [x / y for x, y in zip(times_a, times_b, strict=True)], times_a, times_b


def _seconds(function: Callable[[], object]) -> float:
    wait()  # what was started before is not part of it
    start = perf_counter()
    function()
    wait()
    return perf_counter() - start


def wait() -> None:
    """Wait until a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _returned(function: Callable[[], float]) -> float:
    return function()


def spread(ratios: list[float]) -> tuple[float, float, float]:
    """Return median and 10-90 % range."""
    deciles = quantiles(ratios, n=10, method="inclusive") if len(ratios) > 1 else ratios * 9
    return median(ratios), deciles[0], deciles[-1]


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} {torch.get_num_threads()} threads"
    return platform.processor() or platform.machine()
