"""`navit report`: run folders in, one HTML page out."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import tyro

from navit.report.page import build_page
from navit.report.read import read_runs
from navit.report.runs import Run


@dataclass(frozen=True)
class ReportCommand:
    """Compare runs on one page: curves, cost, packed batches, retrieval, skipped samples."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, finished or not."""
    out: Path = Path("report.html")
    """The page: one file that needs nothing beside it, no network and no script."""
    labels: tuple[str, ...] = ()
    """A name for each run; none: the ends of the folders' paths that tell them apart."""
    title: str = ""
    """Heading of the page; empty names the runs."""
    pictures: bool = True
    """Whether packed batches and retrieval examples are put in, some 0.5 MB a run."""


def run_report(command: ReportCommand) -> tuple[Path, list[Run]]:
    """Read the runs and write the page; a page that was there is replaced at once.

    Returns:
        The page's path, and the runs as they were read.

    Raises:
        ValueError: If no run is named, one is named twice, or the labels do not fit.
        FileNotFoundError: If a folder does not exist or holds no run.
        OSError: If the page cannot be written.
    """
    runs = read_runs(command.runs, command.labels)
    about = f"{len(runs)} run{'s' if len(runs) > 1 else ''}, read on {date.today().isoformat()}"
    title = command.title or _title(runs)
    page = build_page(runs, title=title, about=about, show_pictures=command.pictures)
    command.out.parent.mkdir(parents=True, exist_ok=True)
    partial = command.out.with_name(f".{command.out.name}.{os.getpid()}")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(command.out)
    finally:
        partial.unlink(missing_ok=True)
    return command.out, runs


def format_report(path: Path, runs: Sequence[Run]) -> str:
    """Say what was written, and what the page lacks."""
    lines = [f"{run.name}: {note}" for run in runs for note in run.notes]
    count = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    return "\n".join([*lines, f"{path}  {path.stat().st_size / 1e6:.1f} MB, {count}"])


def _title(runs: Sequence[Run]) -> str:
    names = [run.name for run in runs]
    if len(names) > 4:
        return f"{len(names)} runs compared"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
