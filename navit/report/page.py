"""The page: one HTML file that needs no network, no script and nothing beside it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from itertools import chain
from typing import Literal

from navit.report.compare import (
    Goal,
    difference_rows,
    goals,
    ordered_rates,
    ordered_results,
    setting_rows,
    skipped_rows,
    stats_rows,
    summary_rows,
)
from navit.report.curves import Line, draw_curves
from navit.report.looks import (
    HIDDEN,
    NONE,
    is_headline,
    look_of,
    references_of,
    short,
    write,
    write_hours,
)
from navit.report.parts import chip, notes, pictures, table
from navit.report.runs import AXES, Axis, Run, Series
from navit.report.style import style_sheet

Kind = Literal["train", "rates", "evals"]


def build_page(
    runs: Sequence[Run], *, title: str, about: str = "", show_pictures: bool = True
) -> str:
    """Lay out a comparison of runs.

    Args:
        runs: At least one, with different names.
        title: Heading of the page.
        about: A line below it.
        show_pictures: Whether the drawings of packed batches and retrieval are put in; without
            them a page has some tens of kilobytes a run.

    Returns:
        The HTML text. Everything that comes from a run is escaped.
    """
    comparison = table("Comparison", runs, summary_rows(runs), caption=_BEST)
    sections = [
        notes(runs),
        f'<div class="pair"><div>{comparison}</div><div>{_differences(runs)}</div></div>',
        _curves(runs),
        _cost(runs),
        pictures("Packed batches", runs, "packing", _PACKING) if show_pictures else "",
        pictures("Retrieval examples", runs, "retrieval", _RETRIEVAL) if show_pictures else "",
        pictures("Masked patches", runs, "masked", _MASKED) if show_pictures else "",
        table("Samples", runs, [*stats_rows(runs), *skipped_rows(runs)], caption=_SAMPLES),
        _settings(runs),
    ]
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style_sheet(len(runs))}</style></head><body>"
    )
    many = ' class="many"' if len(runs) > _MANY else ""
    line = f'<p class="quiet">{escape(about)}</p>' if about else ""
    return "".join(
        [
            head,
            _switches(runs),
            f"<header><h1>{escape(title)}</h1>{line}</header>",
            _bar(runs),
            f"<main{many}>{''.join(sections)}</main>",
            f"<footer>{escape(_FOOTER)}</footer></body></html>\n",
        ]
    )


_MANY = 4  # runs; with more the unsmoothed values are drawn fainter
_BEST = (
    "Rates are medians of the readings. Bold: the best value of a row, where one way is better; no "
    "test of significance."
)
_PACKING = (
    "The first batch of each run: every image in its sequence, dropped patches dark, above it its "
    "kept / all tokens; the bar below a sequence is its token places, padding grey."
)
_RETRIEVAL = (
    "Captions of the validation set, spread evenly and not chosen by their result, with the images "
    "nearest to them at the end of each run."
)
_MASKED = (
    "The first images of the validation set: as they are, with their corrupted patches in grey, "
    "and with the mean colours predicted for those at the end of each run."
)
_SAMPLES = "Shares are of all token places (padding) and of all tokens (dropped)."
_FOOTER = "Made by navit report from the run folders alone."
_UNITS: dict[Axis, Callable[[float], str]] = {
    "step": lambda value: f"{value:,.0f}",
    "images": lambda value: f"{value:,.0f}",
    "tokens": lambda value: f"{value:,.0f}",
    "flops": lambda value: f"{short(value)}FLOP",
    "hours": write_hours,
}


def _switches(runs: Sequence[Run]) -> str:
    """Return the inputs that the style sheet asks; their labels are in the bar."""
    axes = _axes(runs)
    radios = (
        f'<input class="switch" type="radio" name="by" id="by-{axis}"{" checked" * (i == 0)}>'
        for i, axis in enumerate(axes)
    )
    boxes = (
        f'<input class="switch" type="checkbox" id="show-run-{i}" checked>'
        for i in range(len(runs))
    )
    return "".join(chain(radios, boxes))


def _bar(runs: Sequence[Run]) -> str:
    names = "".join(
        f'<label for="show-run-{i}" class="run-{i}">{chip(i)}{escape(run.name)}</label>'
        for i, run in enumerate(runs)
    )
    axes = "".join(f'<label for="by-{axis}">{AXES[axis]}</label>' for axis in _axes(runs))
    by = f'<div class="by"><span class="quiet">curves by</span>{axes}</div>'
    return f"<nav><div>{names}</div>{by if len(_axes(runs)) > 1 else ''}</nav>"


def _axes(runs: Sequence[Run]) -> list[Axis]:
    """Return the axes that some run has."""
    return [axis for axis in AXES if any(axis in run.progress.amounts for run in runs)] or ["step"]


def _differences(runs: Sequence[Run]) -> str:
    if len(runs) < 2:
        return ""
    rows = difference_rows(runs)
    if not rows:
        return "<h2>Settings that differ</h2><p>None, as far as the configurations are there.</p>"
    return table("Settings that differ", runs, rows)


def _settings(runs: Sequence[Run]) -> str:
    rows = setting_rows(runs)
    if not rows:
        return ""
    return f"<details><summary>All settings</summary>{table('', runs, rows)}</details>"


def _curves(runs: Sequence[Run]) -> str:
    results = ordered_results(runs)
    recorded = list(dict.fromkeys(name for run in runs for name in run.train if name not in HIDDEN))
    cards = [
        *(_card("train", name, runs) for name in recorded if name == "loss"),
        *(_card("evals", name, runs) for name in results if is_headline(name)),
        *(_card("rates", name, runs) for name in ordered_rates(runs)),
        *(_card("train", name, runs) for name in recorded if name != "loss"),
    ]
    if not any(cards):
        return "<h2>Curves</h2><p>There are none: no run has a record yet.</p>"
    text = f'<h2>Curves</h2><p class="quiet">{_CURVES}</p><div class="cards">{"".join(cards)}</div>'
    more = "".join(_card("evals", name, runs) for name in results if not is_headline(name))
    if more:
        text += f'<details><summary>More results</summary><div class="cards">{more}</div></details>'
    return text


_CURVES = (
    "Thin: as recorded; thick: averaged over a fortieth of the run to either side. Spikes may "
    "leave a plot. Below each plot the last values. Dotted: what is reached without learning, or "
    "without a look at a pixel. Hours are those of training steps, waiting for data included, "
    "evaluations left out."
)


def _card(kind: Kind, name: str, runs: Sequence[Run]) -> str:
    """Draw one quantity of all runs, once for each axis, with the last values as its legend."""
    found = [
        (i, run, recorded[name])
        for i, run in enumerate(runs)
        if name in (recorded := _recorded(run, kind))
    ]
    if not found:
        return ""
    look = look_of(name)
    references: dict[str, float] = {}
    for _, run, _ in found if kind == "evals" else ():
        for other, what in references_of(name, run.evals).items():
            references.setdefault(what, run.evals[other].last)
    plots = []
    for axis in _axes(runs):
        lines = list(_lines(found, axis))
        missing = "<p class='quiet'>Not known for these runs.</p>"
        drawn = (
            draw_curves(lines, look, axis, dots=kind == "evals", references=references)
            if lines
            else missing
        )
        plots.append(f'<div class="plot axis-{axis}">{drawn}</div>')
    legend = "".join(
        f'<li class="run-{i}">{chip(i)}{escape(run.name)} {write(series.last, look.unit)}</li>'
        for i, run, series in found
    )
    return (
        f'<section class="card"><h3>{escape(look.title)}</h3>{"".join(plots)}'
        f'<ul class="legend">{legend}</ul></section>'
    )


def _recorded(run: Run, kind: Kind) -> Mapping[str, Series]:
    return {"train": run.train, "rates": run.rates, "evals": run.evals}[kind]


def _lines(found: Sequence[tuple[int, Run, Series]], axis: Axis) -> Iterator[Line]:
    for i, run, series in found:
        xs = run.progress.at(axis, series.steps)
        if xs is not None and len(xs):
            yield Line(i, run.name, series.steps, xs, series.values)


def _cost(runs: Sequence[Run]) -> str:
    """Lay out, for each headline result, what every run needed to get there."""
    tables = [_cost_table(runs, name) for name in ordered_results(runs) if is_headline(name)]
    if not any(tables):
        return "<h2>Cost of quality</h2><p>Not known: no run has an evaluation.</p>"
    shown = "".join(f"<div>{text}</div>" for text in tables)
    return f'<h2>Cost of quality</h2><p class="quiet">{_COST}</p><div class="pair">{shown}</div>'


_COST = (
    "What a run had spent, in the unit chosen above, at its first evaluation at or beyond a "
    "quality: no finer than its evaluations are frequent. Times: relative to the cheapest run. A "
    "dash: not reached."
)


def _cost_table(runs: Sequence[Run], name: str) -> str:
    look = look_of(name)
    rows = goals(runs, name)
    if not rows:
        return ""
    axes = _axes(runs)
    names = "".join(
        f'<th class="run-{i}" scope="col">{chip(i)}{escape(run.name)}</th>'
        for i, run in enumerate(runs)
    )
    body = "".join(
        f'<tr><th scope="row">{write(goal.value, look.unit)}<small>{escape(goal.why)}</small></th>'
        f"{_cost_cells(goal, axes)}</tr>"
        for goal in rows
    )
    return (
        f'<h3>{escape(look.title)}</h3><div class="scroll"><table><thead><tr><th scope="col">at '
        f"least</th>{names}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cost_cells(goal: Goal, axes: Sequence[Axis]) -> str:
    """Return a cell for each run that holds every amount; the chosen axis shows one of them."""
    cells = []
    for i, cost in enumerate(goal.costs):
        amounts = []
        for axis in axes:
            known = [other[axis] for other in goal.costs if other is not None and axis in other]
            text = NONE
            if cost is not None and axis in cost:
                text = _UNITS[axis](cost[axis])
                if cost[axis] > min(known) > 0:
                    text += f" <small>{cost[axis] / min(known):.2f} times</small>"
            amounts.append(f'<span class="axis-{axis}">{text}</span>')
        cells.append(f'<td class="run-{i}">{"".join(amounts)}</td>')
    return "".join(cells)
