"""Tables for the terminal."""

from collections.abc import Sequence


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Lay out cells in columns: the first ``left`` to the left, numbers to the right.

    Args:
        head: Heading of each column; a line break makes the heading two lines.
        rows: Cells of each row.
        left: Columns set to the left.
    """
    heads = [name.split("\n") for name in head]
    depth = max(map(len, heads))
    lines = [[""] * (depth - len(parts)) + parts for parts in heads]
    table = [*zip(*lines, strict=True), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if i < left else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )


def percent(share: float, digits: int = 2) -> str:
    """Write a share in percent without its sign; what is not 0 is not shown as 0."""
    text = f"{100 * share:.{digits}f}"
    return text if float(text) or not share else f"{100 * share:.0e}".replace("e-0", "e-")
