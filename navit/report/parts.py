"""Building blocks of the page: tables with a column a run, and pictures put into the file."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from io import BytesIO
from pathlib import Path

from PIL import Image

from navit.report.compare import Row
from navit.report.runs import PICTURES, Run

_LONG = 28  # characters; longer cells are broken into lines
_QUALITY = 82  # of WebP: a third of the PNG's bytes, letters still sharp


def chip(number: int) -> str:
    """Return a run's colour, and dashes where colours repeat, as a small picture."""
    return (
        f'<svg class="chip run-{number}" viewBox="0 0 26 11" aria-hidden="true">'
        '<line x1="0" x2="26" y1="5.5" y2="5.5"/></svg>'
    )


def table(heading: str, runs: Sequence[Run], rows: Sequence[Row], *, caption: str = "") -> str:
    """Lay out rows with a column for each run; nothing where there is no row."""
    if not rows:
        return ""
    names = "".join(
        f'<th class="run-{i}" scope="col">{chip(i)}{escape(run.name)}</th>'
        for i, run in enumerate(runs)
    )
    body = "".join(map(_row, rows))
    title = f"<h2>{escape(heading)}</h2>" if heading else ""
    below = f'<p class="quiet">{escape(caption)}</p>' if caption else ""
    return (
        f'{title}<div class="scroll"><table><thead><tr><th scope="col"></th>{names}'
        f"</tr></thead><tbody>{body}</tbody></table></div>{below}"
    )


def notes(runs: Sequence[Run]) -> str:
    """List what is missing or damaged, runs that lack the same together."""
    by_text: dict[str, list[str]] = {}
    for run in runs:
        for note in run.notes:
            by_text.setdefault(note, []).append(run.name)
    items = []
    for note, names in by_text.items():
        who = "all runs" if len(names) == len(runs) > 1 else ", ".join(names)
        items.append(f"<li><b>{escape(who)}</b>: {escape(note)}</li>")
    return f'<ul class="notes quiet">{"".join(items)}</ul>' if items else ""


def pictures(heading: str, runs: Sequence[Run], kind: str, about: str) -> str:
    """Show one kind of drawing of every run; runs without it are named, all without it are not."""
    if not any(kind in run.pictures for run in runs):
        return ""
    figures = []
    for i, run in enumerate(runs):
        path = run.pictures.get(kind)
        source = embed_picture(path) if path is not None else None
        shown = f'<p class="quiet">{PICTURES[kind]} is not there.</p>'
        if source is not None:
            alt = escape(f"{heading} of {run.name}", quote=True)
            shown = f'<img src="{source}" alt="{alt}" loading="lazy">'
        name = f"<figcaption>{chip(i)}{escape(run.name)}</figcaption>"
        figures.append(f'<figure class="run-{i}">{name}{shown}</figure>')
    return (
        f'<h2>{escape(heading)}</h2><p class="quiet">{escape(about)}</p>'
        f'<div class="pictures">{"".join(figures)}</div>'
    )


def embed_picture(path: Path) -> str | None:
    """Return a picture as a ``data:`` address, or None where it cannot be read."""
    try:
        with Image.open(path) as image:
            buffer = BytesIO()
            image.convert("RGB").save(buffer, "WEBP", quality=_QUALITY, method=4)
    except OSError:
        return None
    return f"data:image/webp;base64,{b64encode(buffer.getvalue()).decode()}"


def _row(row: Row) -> str:
    cells = "".join(
        f'<td class="run-{i}{" best" * (i in row.best)}{" long" * (len(cell) > _LONG)}">'
        f"{escape(cell)}</td>"
        for i, cell in enumerate(row.cells)
    )
    remark = f"<small>{escape(row.remark)}</small>" if row.remark else ""
    return f'<tr><th scope="row">{escape(row.title)}{remark}</th>{cells}</tr>'
