"""Runs side by side as tables: what they reached, what it cost, where their settings differ."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from navit.report.looks import (
    NONE,
    Look,
    is_headline,
    is_reference,
    look_of,
    short,
    write,
    write_hours,
)
from navit.report.runs import Axis, Floats, Run, Series
from packer.errors import CAUSES

_OWN = frozenset({"run", "resume"})
"""Settings that name a run and do not make it another one."""
_COUNT = {
    "images": "Images seen",
    "tokens": "Kept tokens",
    "flops": "Model FLOPs",
    "hours": "Time of steps",
}


@dataclass(frozen=True)
class Row:
    """One row of a table: a cell for each run."""

    title: str
    """What is compared."""
    cells: tuple[str, ...]
    """A text for each run."""
    best: frozenset[int] = frozenset()
    """Columns of the best value, where one is better than another."""
    remark: str = ""
    """What the row means, where its title does not say it."""


def summary_rows(runs: Sequence[Run]) -> list[Row]:
    """Compare what the runs are, reached and cost."""
    rows = [
        Row("Steps", tuple(_steps(run) for run in runs)),
        _row("Parameters", [run.parameters for run in runs]),
        *(_total(runs, axis) for axis in ("images", "tokens", "flops", "hours")),
    ]
    for name in ordered_results(runs):
        if not is_headline(name):
            continue
        look = look_of(name)
        series = [run.evals.get(name) for run in runs]
        rows.append(_row(f"{look.title}, last", [_last(s) for s in series], look))
        best = [best_of(s, look) for s in series]
        cells = tuple(
            NONE if found is None else f"{write(found[1], look.unit)} at {found[0]:,}"
            for found in best
        )
        values = [None if found is None else found[1] for found in best]
        rows.append(Row(f"{look.title}, best at step", cells, _best(values, look)))
    losses = [_tail_mean(run.train.get("loss")) for run in runs]
    remark = "mean of the last twentieth of the steps; other settings can make losses incomparable"
    rows.append(_row("Training loss, end", losses, remark=remark))
    for name in ordered_rates(runs):
        look = look_of(name)
        medians = [_median(run.rates.get(name)) for run in runs]
        rows.append(_row(look.title, medians, look))
    rows.append(_row("Bad steps", [float(len(run.bad_steps)) for run in runs], remark=_BAD))
    return [row for row in rows if any(cell != NONE for cell in row.cells)]


_BAD = "loss or gradient norm not finite: counted, no step taken"


def ordered_rates(runs: Sequence[Run]) -> list[str]:
    """Return the names of all rates in the order they were first written in."""
    return list(dict.fromkeys(name for run in runs for name in run.rates))


def ordered_results(runs: Sequence[Run]) -> list[str]:
    """Return the names of all results that are no mere reference, headlines first."""
    names = dict.fromkeys(name for run in runs for name in run.evals if not is_reference(name))
    return sorted(names, key=lambda name: not is_headline(name))


def best_of(series: Series | None, look: Look) -> tuple[int, float] | None:
    """Return step and value of the best evaluation, the first of equals."""
    if series is None or not len(series.values):
        return None
    values = -series.values if look.better == "low" else series.values
    index = int(np.argmax(values))
    return int(series.steps[index]), float(series.values[index])


def difference_rows(runs: Sequence[Run]) -> list[Row]:
    """Return the settings in which the runs differ; none where one run or no configuration."""
    with_config = [run for run in runs if run.config]
    return [
        row
        for row in setting_rows(runs)
        if len({c for c, run in zip(row.cells, runs, strict=True) if run.config}) > 1
        and len(with_config) > 1
    ]


def setting_rows(runs: Sequence[Run]) -> list[Row]:
    """Return every setting of every run; a dash where a run does not have it.

    A setting that did not exist when a run was made has its default, which did not change what the
    run did.
    """
    flat = [flatten(_completed(run.config)) for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    ordered = _in_place(list(names))
    return [Row(name, tuple(settings.get(name, NONE) for settings in flat)) for name in ordered]


def _completed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    from navit.train.resume import with_defaults  # imports torch, which takes a second

    try:
        return with_defaults(config) if config else config
    except (KeyError, TypeError, ValueError):  # of another version, or none of ours
        return config


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Write a configuration as dotted names and texts; a choice's name stands under its own."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        path = f"{prefix}{name}"
        if path in _OWN or name == "type":
            continue
        if isinstance(value, Mapping):
            if isinstance(value.get("type"), str):
                flat[path] = value["type"]
            flat |= flatten(value, f"{path}.")
        elif isinstance(value, list):
            flat[path] = ", ".join(map(_text, value)) or "none"
        else:
            flat[path] = _text(value)
    return flat


@dataclass(frozen=True)
class Goal:
    """A quality, and what each run needed to reach it."""

    value: float
    """The value reached or passed."""
    why: str
    """Where the value comes from."""
    costs: tuple[Mapping[Axis, float] | None, ...]
    """By run, the amounts at the first evaluation there; None where it never was."""


def goals(runs: Sequence[Run], name: str) -> list[Goal]:
    """Ask what each run needed for the qualities that runs ended with, and for parts of the best.

    An amount is that of the first evaluation at or beyond the value, so that it is known no better
    than evaluations are frequent.
    """
    look = look_of(name)
    reached = {
        run.name: found[1]
        for run in runs
        if (found := best_of(run.evals.get(name), look)) is not None
    }
    if not reached:
        return []
    pick: Callable[..., float] = min if look.better == "low" else max
    top = pick(reached.values())
    wanted = {value: f"best of {label}" for label, value in reached.items()}
    if look.better == "high":
        for part in (0.9, 0.75, 0.5):
            wanted.setdefault(part * top, f"{part:.0%} of the best")
    return [
        Goal(value, why, tuple(_cost_of(run, name, value, look) for run in runs))
        for value, why in sorted(wanted.items(), reverse=look.better != "low")
    ]


def skipped_rows(runs: Sequence[Run]) -> list[Row]:
    """Count by cause what was left out, and what was kept in spite of a defect."""
    rows = []
    for kind, remark in (("skipped", "skipped"), ("noted", "kept, noted")):
        counts = [_counts(run, kind) for run in runs]
        names = dict.fromkeys(name for found in counts if found for name in found)
        for name in sorted(names, key=lambda n: (list(CAUSES).index(n) if n in CAUSES else 99, n)):
            cells = tuple(NONE if c is None else f"{c.get(name, 0):,}" for c in counts)
            meaning = CAUSES.get(name, "")
            rows.append(Row(name, cells, remark=f"{remark}: {meaning}".rstrip(": ")))
    return rows


def stats_rows(runs: Sequence[Run]) -> list[Row]:
    """Compare the counts of samples and tokens."""
    rows = []
    for title, name in (("Samples read", "samples_read"), ("Images packed", "images")):
        rows.append(_row(title, [_count(run, name) for run in runs]))
    skipped = [_counts(run, "skipped") for run in runs]
    rows.append(_row("Skipped", [None if c is None else float(sum(c.values())) for c in skipped]))
    for title, part, whole in (
        ("Padding", "tokens", "places"),
        ("Tokens dropped", "tokens", "tokens_before_drop"),
    ):
        shares = [_left_out(_count(run, part), _count(run, whole)) for run in runs]
        rows.append(_row(title, shares, Look(title, "share")))
    rows.append(Row("Counted until step", tuple(write(run.stats_step) for run in runs)))
    return [row for row in rows if any(cell != NONE for cell in row.cells)]


def _row(
    title: str, values: Sequence[float | None], look: Look | None = None, remark: str = ""
) -> Row:
    look = Look(title) if look is None else look
    cells = tuple(write(value, look.unit) for value in values)
    return Row(title, cells, _best(values, look), remark)


def _best(values: Sequence[float | None], look: Look) -> frozenset[int]:
    """Return the columns of the best value, if runs differ in it."""
    known = {i: value for i, value in enumerate(values) if value is not None}
    if not look.better or len(set(known.values())) < 2:
        return frozenset()
    top = (min if look.better == "low" else max)(known.values())
    return frozenset(i for i, value in known.items() if value == top)


def _steps(run: Run) -> str:
    planned = run.planned_steps
    whole = planned is None or run.last_step >= planned
    return f"{run.last_step:,}" if whole else f"{run.last_step:,} of {planned:,}"


def _total(runs: Sequence[Run], axis: Axis) -> Row:
    totals = [run.progress.total(axis) for run in runs]
    if axis == "hours":
        remark = "data waiting included; evaluations and checkpoints left out"
        return Row(_COUNT[axis], tuple(map(write_hours, totals)), remark=remark)
    if axis == "flops":
        cells = tuple(NONE if total is None else f"{short(total)}FLOP" for total in totals)
        return Row(_COUNT[axis], cells, remark="without recomputation")
    whole = [None if total is None else float(round(total)) for total in totals]
    return _row(_COUNT[axis], whole)


def _last(series: Series | None) -> float | None:
    return series.last if series is not None and len(series.values) else None


def _median(series: Series | None) -> float | None:
    return float(np.median(series.values)) if series is not None and len(series.values) else None


def _tail_mean(series: Series | None) -> float | None:
    if series is None or not len(series.values):
        return None
    return float(series.values[-max(1, len(series.values) // 20) :].mean())


def _cost_of(run: Run, name: str, value: float, look: Look) -> Mapping[Axis, float] | None:
    series = run.evals.get(name)
    if series is None:
        return None
    there = series.values <= value if look.better == "low" else series.values >= value
    if not there.any():
        return None
    step: Floats = series.steps[[int(np.argmax(there))]]
    amounts = {axis: run.progress.at(axis, step) for axis in run.progress.amounts}
    return {axis: float(amount[0]) for axis, amount in amounts.items() if amount is not None}


def _counts(run: Run, kind: str) -> Mapping[str, int] | None:
    found = run.stats.get(kind)
    return found if isinstance(found, Mapping) else None


def _count(run: Run, name: str) -> float | None:
    value = run.stats.get(name)
    return float(value) if isinstance(value, int) else None


def _left_out(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else 1 - part / whole


def _in_place(names: list[str]) -> list[str]:
    """Order dotted names so that the parts of a setting stand below it, in the first order."""
    order = {name: place for place, name in enumerate(names)}

    def place(name: str) -> list[int]:
        parts = name.split(".")
        heads = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return [order.get(head, order[name]) for head in heads]

    return sorted(names, key=place)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
