"""What became of a run's samples, as a table for the terminal: kept, skipped and noted by cause."""

from collections.abc import Iterator, Mapping

from packer.batch import BatchStats
from packer.errors import CAUSES

_LABEL = 20  # columns: the longest cause, indented


def tally_text(stats: BatchStats) -> str:
    """Lay out the counts of a run, at most 80 columns wide.

    Shares are of the samples read, padding is of all token places, and what dropping left out is of
    the tokens before it. Rows that say nothing are left out: waiting images where there are none,
    padding where nothing was packed.

    Args:
        stats: The sum over the run's batches.

    Returns:
        One row a line: name, count, share in percent, and for a cause what it means.
    """
    return "\n".join(_rows(stats))


def _rows(stats: BatchStats) -> Iterator[str]:
    read = stats.samples_read
    num_skipped, num_noted = sum(stats.skipped.values()), sum(stats.noted.values())
    waiting = read - stats.images - num_skipped
    yield _row("samples read", read)
    yield _row("images kept", stats.images, read)
    if waiting > 0:
        yield _row("images waiting", waiting, read, "read, not yet in a batch")
    yield _row("skipped", num_skipped, read)
    yield from _causes(stats.skipped, read)
    if num_noted:
        yield _row("noted", num_noted, read, "defects that cost no sample")
        yield from _causes(stats.noted, read)
    if stats.places:
        yield _row("padding", stats.places - stats.tokens, stats.places, "of all token places")
    if stats.tokens_before_drop:
        dropped = stats.tokens_before_drop - stats.tokens
        yield _row("tokens dropped", dropped, stats.tokens_before_drop, "of the images' tokens")
    if stats.tokens_filled:
        yield _row("tokens filled", stats.tokens_filled, stats.tokens, "kept to fill sequences")


def _causes(counts: Mapping[str, int], read: int) -> Iterator[str]:
    known = list(CAUSES)
    for cause in sorted(counts, key=lambda c: (known.index(c) if c in CAUSES else len(known), c)):
        if counts[cause]:
            yield _row(f"  {cause}", counts[cause], read, CAUSES.get(cause, ""))


def _row(label: str, count: int, whole: int = 0, explanation: str = "") -> str:
    share = _percent(count / whole) if whole else ""
    return f"{label:<{_LABEL}}{count:>14,} {share:>9}  {explanation}".rstrip()


def _percent(share: float) -> str:
    return "<0.001 %" if 0 < share < 5e-6 else f"{share:.3%}".replace("%", " %")
