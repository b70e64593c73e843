"""`python -m packer check`: what a stream would skip of these shards, and why."""

import logging
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import chain
from operator import add
from typing import Literal, NamedTuple

from packer.batch import BatchStats
from packer.config import PackerConfig
from packer.errors import CAUSES, NOTED_CAUSES, SkipSample
from packer.logical_stream import Need
from packer.pack import SampleReader
from packer.sample import as_sample
from packer.shards import expand_shards, iter_shard, sample_from_raw
from packer.tally import tally_text
from packer.tools.sources import Shards, map_shards

_WIDTH = 100  # columns a finding may take


class Finding(NamedTuple):
    """One skipped sample, or one defect."""

    cause: str
    """Name that is counted."""
    where: str
    """Key of the sample; empty where the detail names the place."""
    detail: str
    """What was found."""


class ShardCheck(NamedTuple):
    """What reading one shard to its end showed."""

    shard: str
    """Path, URL or command."""
    stats: BatchStats
    """Samples read and kept; skipped and noted by cause."""
    findings: tuple[Finding, ...]
    """The first of each cause, in order."""


@dataclass(frozen=True)
class Check:
    """Read every shard as a stream would: what would be skipped, and why."""

    shards: Shards
    """Tar shards: files, folders, brace ranges, glob patterns, URLs."""
    decode: bool = False
    """Also decode every image; without it only the headers are read."""
    need: Need = "caption"
    """What a sample must have, as in training. None needs neither caption nor label, but a batch
    that holds captions leaves out the images without one, which only its run can know."""
    first: int = 3
    """Samples named for each cause."""
    workers: int | None = None
    """Processes that read; None takes all cores where there is much to read."""
    max_pixels: int = PackerConfig.max_pixels
    """Larger images are skipped, as the run's `PackerConfig` says."""
    max_aspect_ratio: float | None = None
    """Images whose long side is more than this many short sides are skipped; None: no limit."""
    keep_truncated: bool = False
    """Whether a truncated image is kept with its missing part grey instead of skipped."""
    missing_caption: Literal["skip", "keep"] = "skip"
    """Whether an image without a caption is skipped, where `need` is "caption"."""

    def run(self) -> int:
        """Print the table and the first of each cause; 1 if anything would be skipped, else 0."""
        if self.first < 0:
            raise ValueError(f"first must not be negative; got {self.first}.")
        shards = expand_shards(self.shards)
        config = PackerConfig(
            max_pixels=self.max_pixels,
            max_aspect_ratio=self.max_aspect_ratio,
            keep_truncated=self.keep_truncated,
            missing_caption=self.missing_caption,
        )
        check = partial(
            check_shard, config=config, need=self.need, decode=self.decode, first=self.first
        )
        checks = list(map_shards(check, shards, workers=self.workers, what="Checking"))
        print(checks_text(checks, decoded=self.decode, first=self.first))
        return 1 if any(check.stats.skipped for check in checks) else 0


def check_shard(
    shard: str, *, config: PackerConfig, need: Need, decode: bool, first: int = 3
) -> ShardCheck:
    """Read a shard to its end as a stream does, however much of it is broken.

    Args:
        shard: Path, URL or command.
        config: What a run would do to every image.
        need: What a sample must have.
        decode: Whether every image is decoded, resized and cut too.
        first: Findings kept of each cause.
    """
    reader = SampleReader(replace(config, max_failures_in_row=2**62))

    def on_problem(cause: str, detail: str) -> None:
        if cause in NOTED_CAUSES:
            reader.note(cause, detail)
        else:
            reader.skip_unread(SkipSample(cause, detail), "")

    with _log_of_the_packer() as findings:
        for raw in iter_shard(shard, on_problem=on_problem):
            try:
                fields = sample_from_raw(raw, config=config, need=need, on_problem=on_problem)
                sample = as_sample(fields)
            except SkipSample as error:
                reader.skip_unread(error, raw.key)
                continue
            image = reader.read(sample)
            if decode and image is not None:
                reader.patches(image, None)
    stats = reader.take_stats()
    kept = stats.samples_read - sum(stats.skipped.values())
    return ShardCheck(shard, replace(stats, images=kept), tuple(_first(findings, first)))


def checks_text(checks: list[ShardCheck], *, decoded: bool, first: int) -> str:
    """Lay out what was found: totals, and the first samples of each cause by shard and key."""
    total = reduce(add, (check.stats for check in checks), BatchStats())
    clean = sum(not (check.stats.skipped or check.stats.noted) for check in checks)
    how = "every image decoded" if decoded else "headers only; --decode decodes every image"
    lines = [f"{len(checks):,} shard(s) read, {clean:,} of them without a defect ({how})", ""]
    lines.append(tally_text(total))
    findings = list(_first(chain.from_iterable(check.findings for check in checks), first))
    counts = {**total.skipped, **total.noted}
    known = [cause for cause in CAUSES if cause in counts]
    for cause in known + sorted(set(counts) - set(known)):
        named = [finding for finding in findings if finding.cause == cause]
        if named:
            some = "" if len(named) == counts[cause] else f", the first {len(named)}"
            lines += ["", f"{cause}: {counts[cause]:,}{some}"]
            lines += [_wrapped(finding) for finding in named]
    return "\n".join(lines)


def _wrapped(finding: Finding) -> str:
    text = ": ".join(part for part in (finding.where, finding.detail) if part)
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent="  ",
        subsequent_indent="      ",
        max_lines=2,
        placeholder=" ...",
        break_on_hyphens=False,
    )


def _first(findings: Iterable[Finding], count: int) -> Iterator[Finding]:
    """Yield the first ``count`` findings of each cause."""
    seen: dict[str, int] = {}
    for finding in findings:
        seen[finding.cause] = seen.get(finding.cause, 0) + 1
        if seen[finding.cause] <= count:
            yield finding


@contextmanager
def _log_of_the_packer() -> Iterator[list[Finding]]:
    """Collect what the reader logs, so that the tool names samples exactly as a run's log does."""
    findings: list[Finding] = []
    handler = logging.Handler()

    def emit(record: logging.LogRecord) -> None:
        args = record.args if isinstance(record.args, tuple) else ()
        where, cause, detail = map(str, args if len(args) == 3 else ("", *args))
        findings.append(Finding(cause, "" if where == "a sample" else where, detail))

    handler.emit = emit  # type: ignore[method-assign]
    logger = logging.getLogger("packer")
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield findings
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
