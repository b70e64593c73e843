"""Results of both experiments -> tables of means over seeds, and a picture of every run."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.experiments.summary import Spread
from benchmarks.experiments.vit.run import Name, Result

TITLES: dict[Name, str] = {
    "masked": "10-shot probe of the pooled vectors",
    "resolution": "accuracy of the classifier at twice the resolution",
}
BASELINES: dict[Name, str] = {"masked": "random weights", "resolution": "not interpolated"}
"""Arms that the differences are to."""


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
    baseline = {run.seed: run.accuracy for run in arms.get(BASELINES[name], [])}
    seeds = max(len(runs) for runs in arms.values())
    lines = [
        f"{TITLES[name][:1].upper()}{TITLES[name][1:]}, mean ± standard deviation over {seeds} "
        f"seed(s), and the difference to {BASELINES[name]}, paired by seed.",
        "",
        "| arm | steps | accuracy | difference |",
        "| --- | --- | --- | --- |",
    ]
    for arm, runs in arms.items():
        accuracy = Spread.of([run.accuracy for run in runs]).text(".1%")
        pairs = [run.accuracy - baseline[run.seed] for run in runs if run.seed in baseline]
        gain = "" if arm == BASELINES[name] else Spread.of(pairs).text("+.1%")
        lines.append(f"| {arm} | {runs[0].steps} | {accuracy} | {gain} |")
    return "\n".join(lines)


def draw(results: Sequence[Result], path: Path) -> Path:
    """Draw every run as a point, one line a seed."""
    names = [name for name in TITLES if by_arm(results, name)]
    figure = Figure(figsize=(5.6 * len(names), 4.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        arms = by_arm(results, name)
        for number, seed in enumerate(sorted({run.seed for runs in arms.values() for run in runs})):
            found = [[r.accuracy for r in runs if r.seed == seed] for runs in arms.values()]
            places = [place for place, values in enumerate(found) if values]
            values = [values[0] for values in found if values]
            axes.plot(places, values, "o", color=f"C{number}", label=f"seed {seed}")
        axes.set_xticks(range(len(arms)), [arm.replace(", ", ",\n") for arm in arms], rotation=20)
        axes.set_xlim(-0.5, len(arms) - 0.5)
        axes.set_title(TITLES[name])
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    return path
