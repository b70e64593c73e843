"""Results of both experiments -> tables of means over seeds, and a picture of every run."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.experiments.summary import Spread
from benchmarks.experiments.vit.run import Name, Result

TITLES: dict[Name, str] = {
    "masked": "10-shot probe of pooled vectors",
    "resolution": "accuracy of classifiers of 36 and 144 tokens an image",
}
BASELINES: dict[Name, tuple[str, tuple[str, ...]]] = {
    "masked": ("random weights", ("masked prediction",)),
    "resolution": ("144, new positions", ("144, interpolated", "144, table as it was")),
}
"""The arm that differences are to, and those that are compared with it."""


def by_arm(results: Sequence[Result], name: Name) -> dict[str, list[Result]]:
    """Sort the results of an experiment by arm, in the order they came in."""
    found: dict[str, list[Result]] = {}
    for result in results:
        if result.experiment == name:
            found.setdefault(result.arm, []).append(result)
    return found


def format_tables(results: Sequence[Result]) -> str:
    """Lay the results out as Markdown: mean and deviation, and the difference paired by seed."""
    return "\n\n".join(_table(name, arms) for name in TITLES if (arms := by_arm(results, name)))


def _table(name: Name, arms: dict[str, list[Result]]) -> str:
    baseline, compared = BASELINES[name]
    told = list(next(iter(arms.values()))[0].accuracy)
    seeds = max(len(runs) for runs in arms.values())
    lines = [
        f"{TITLES[name][:1].upper()}{TITLES[name][1:]}: mean ± standard deviation over {seeds} "
        f"seed(s) of weights and order, on the same images; below it the difference to "
        f'"{baseline}", paired by seed.',
        "",
        f"| arm | steps | {' | '.join(told)} |",
        "| --- | --- |" + " --- |" * len(told),
    ]
    plain = {run.seed: run.accuracy for run in arms.get(baseline, [])}
    for arm, runs in arms.items():
        cells = []
        for what in told:
            cell = Spread.of([run.accuracy[what] for run in runs]).text(".1%")
            pairs = [r.accuracy[what] - plain[r.seed][what] for r in runs if r.seed in plain]
            if arm in compared and pairs:
                cell += f"<br>{Spread.of(pairs).text('+.1%')}"
            cells.append(cell)
        lines.append(f"| {arm} | {runs[0].steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: Sequence[Result], path: Path) -> Path:
    """Draw every run as a point, one colour a seed."""
    panels = [
        (name, what, arms)
        for name in TITLES
        if (arms := by_arm(results, name))
        for what in next(iter(arms.values()))[0].accuracy
    ]
    figure = Figure(figsize=(4.2 * len(panels), 4.4), layout="constrained")
    for axes, (name, what, arms) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for number, seed in enumerate(sorted({run.seed for runs in arms.values() for run in runs})):
            found = [[r.accuracy[what] for r in runs if r.seed == seed] for runs in arms.values()]
            places = [place for place, values in enumerate(found) if values]
            values = [values[0] for values in found if values]
            axes.plot(places, values, "o", color=f"C{number}", label=f"seed {seed}")
        axes.set_xticks(range(len(arms)), list(arms), rotation=30, ha="right")
        axes.set_xlim(-0.5, len(arms) - 0.5)
        axes.set_title(f"{name}: {what}", size=10)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    return path
