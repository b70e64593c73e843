"""Results of runs -> tables: mean and deviation over seeds, paired differences, equal quality."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan, sqrt
from statistics import fmean

from benchmarks.experiments.arms import Arm, Axis, Experiment
from benchmarks.experiments.run import ArmResult, Point

AXES: Mapping[Axis, str] = {
    "tokens": "token budget of an image",
    "patch size": "side of a patch in pixels",
}
"""What the finished models are evaluated at."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds."""

    mean: float
    """NaN without values."""
    std: float
    """Of the sample (n - 1); NaN for fewer than two values."""
    count: int
    """Seeds."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise values, one a seed."""
        if not values:
            return cls(nan, nan, 0)
        mean = fmean(values)
        if len(values) < 2:
            return cls(mean, nan, len(values))
        return cls(
            mean, sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)), len(values)
        )

    def text(self, form: str) -> str:
        """Render as ``mean ± std`` with a format of numbers, such as ``.1%``."""
        if not self.count:
            return "-"
        spread = "" if isnan(self.std) else f" ± {self.std:{form.lstrip('+')}}"
        return format(self.mean, form) + spread


@dataclass(frozen=True)
class Row:
    """One arm on one data set."""

    arm: Arm
    """The arm."""
    quality: Spread
    """At the end, at its training budget."""
    best_budget: int
    """Token budget, or patch size, of highest mean quality, chosen on the same images."""
    best: Spread
    """Quality there."""
    images: Spread
    """Images seen."""
    flops: Spread
    """Operations spent."""
    minutes: Spread
    """Of the training steps, waiting for data included."""
    difference: Spread
    """Quality minus the baseline's of the same seed; no seeds for the baseline itself."""
    image_ratio: Spread
    """Images seen over the baseline's of the same seed."""
    compute_ratio: Spread
    """Operations of the baseline's whole run over those from which on this arm has its final
    quality (`compute_to`); above 1: it took less. Of the seeds that reached it."""
    reached: int
    """Seeds that reached it."""


def compute_to(points: Sequence[Point], quality: float) -> float | None:
    """Return the operations from which on a curve stays at or above a quality.

    The curve is linear between neighbouring evaluations and starts at quality 0 without
    computation. A peak that is lost again does not count: with a few hundred validation images
    noise alone has peaks. The learning rate is still falling along the way, so what a run of that
    length would have reached lies above the curve: the figure is an upper bound of the compute.

    Args:
        points: Evaluations in their order.
        quality: To reach.

    Returns:
        None if the last evaluation is below it.
    """
    curve = [(0.0, 0.0), *((point.flops, point.quality) for point in points)]
    if curve[-1][1] < quality:
        return None
    below = [index for index, (_, found) in enumerate(curve) if found < quality]
    if not below:
        return 0.0
    (flops, before), (after_flops, after) = curve[below[-1]], curve[below[-1] + 1]
    return flops + (quality - before) / (after - before) * (after_flops - flops)


def summarise(experiment: Experiment, results: Sequence[ArmResult]) -> list[Row]:
    """Summarise an experiment on one data set; arms without a result are left out.

    Args:
        experiment: Its arms, the first of which is the baseline.
        results: Results of one data set, of any arms.
    """
    by_arm: dict[str, dict[int, ArmResult]] = {}
    for result in results:
        by_arm.setdefault(result.arm, {})[result.seed] = result
    baseline = by_arm.get(experiment.arms[0].name, {})
    return [
        _row(arm, by_arm[arm.name], baseline if arm is not experiment.arms[0] else {})
        for arm in experiment.arms
        if arm.name in by_arm
    ]


def _row(arm: Arm, own: Mapping[int, ArmResult], baseline: Mapping[int, ArmResult]) -> Row:
    runs = list(own.values())
    budgets = {budget: Spread.of([run.at(budget) for run in runs]) for budget in arm.budgets}
    best = max(budgets, key=lambda budget: budgets[budget].mean)
    pairs = [(own[seed], baseline[seed]) for seed in sorted(own.keys() & baseline.keys())]
    reached = [(compute_to(a.points, b.quality), b.points[-1].flops) for a, b in pairs]
    ratios = [whole / spent for spent, whole in reached if spent]
    return Row(
        arm=arm,
        quality=Spread.of([run.quality for run in runs]),
        best_budget=best,
        best=budgets[best],
        images=Spread.of([run.points[-1].images for run in runs]),
        flops=Spread.of([run.points[-1].flops for run in runs]),
        minutes=Spread.of([run.seconds / 60 for run in runs]),
        difference=Spread.of([a.quality - b.quality for a, b in pairs]),
        image_ratio=Spread.of([a.points[-1].images / b.points[-1].images for a, b in pairs]),
        compute_ratio=Spread.of(ratios),
        reached=len(ratios),
    )


def format_table(experiment: Experiment, data: str, results: Sequence[ArmResult]) -> str:
    """Lay out an experiment on one data set as a Markdown table with what must be known of it."""
    rows = summarise(experiment, results)
    names = {row.arm.name for row in rows}
    used = [result for result in results if result.arm in names]
    first = used[0]
    unit = "tokens" if experiment.axis == "tokens" else "px"
    lines = [
        f"### ({experiment.letter}) {experiment.title}: {data}",
        "",
        f"Quality is {first.metric}; {_baselines(first)}. Mean ± standard deviation over "
        f"{max(row.quality.count for row in rows)} seed(s); differences are paired by seed, to "
        f'"{rows[0].arm.what}".',
        "",
        "| arm | quality | difference | at its best budget | images seen | FLOPs | minutes | less "
        "compute "
        "to equal quality | images ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        equal = row.compute_ratio.text(".2f")
        if row.difference.count:
            equal += f" ({row.reached} of {row.difference.count} reached)"
        lines.append(
            f"| {row.arm.what} | {row.quality.text('.1%')} | {row.difference.text('+.1%')} | "
            f"{row.best.text('.1%')} ({row.best_budget} {unit}) | {row.images.text(',.0f')} | "
            f"{row.flops.text('.3g')} | {row.minutes.text('.1f')} | {equal} | "
            f"{row.image_ratio.text('.2f')} |"
        )
    budgets = sorted({budget for row in rows for budget in row.arm.budgets})
    lines += ["", f"Quality by {AXES[experiment.axis]} at evaluation:", ""]
    lines.append("| arm | " + " | ".join(map(str, budgets)) + " |")
    lines.append("| --- |" + " --- |" * len(budgets))
    for row in rows:
        runs = [run for run in used if run.arm == row.arm.name]
        cells = [
            Spread.of([run.at(budget) for run in runs if budget in run.budgets]).text(".1%")
            for budget in budgets
        ]
        lines.append(f"| {row.arm.what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _baselines(result: ArmResult) -> str:
    """Say what chance and the images' shapes alone reach."""
    metrics = next(iter(result.budgets.values()))
    group, _, _ = result.metric.rpartition("/")
    told = []
    # By name: retrieval has chance/<metric>, classes have <set>/shape_accuracy@1.
    chance = metrics.get(f"chance/{result.metric}", metrics.get(f"{group}/chance"))
    shape = metrics.get(f"{group}/shape_accuracy@1")
    if chance is not None:
        told.append(f"chance {chance:.1%}")
    if shape is not None:
        told.append(f"shape alone {shape:.1%}")
    return ", ".join(told) or "no baseline is known for it"
