"""Results of runs -> pictures: quality over compute, over images, over tokens at evaluation."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from benchmarks.experiments.arms import Experiment
from benchmarks.experiments.run import ArmResult, Point
from benchmarks.experiments.summary import AXES

_GRID = 200  # places at which the mean curve over seeds is read


def draw(experiment: Experiment, data: str, results: Sequence[ArmResult], path: Path) -> Path:
    """Draw an experiment on one data set.

    Left quality over compute, in the middle over images seen: thin lines are seeds, the thick one
    their mean. Right the finished models at several token budgets: mean, and bars from the lowest
    to the highest seed; or at several patch sizes.

    Args:
        experiment: Its arms.
        data: Name of the data set.
        results: Results of that data set, of any arms; at least one of the experiment's.
        path: Written as what its suffix says; its folder is created.
    """
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    compute, images, budgets = figure.subplots(1, 3, sharey=True)
    for number, arm in enumerate(experiment.arms):
        runs = [result for result in results if result.arm == arm.name]
        if not runs:
            continue
        colour = f"C{number}"
        _draw_curves(compute, runs, lambda point: point.flops / 1e12, colour)
        _draw_curves(images, runs, lambda point: point.images / 1000, colour)
        found = np.array([[run.at(budget) for budget in arm.budgets] for run in runs])
        mean = found.mean(0)
        budgets.errorbar(
            arm.budgets,
            mean,
            yerr=[mean - found.min(0), found.max(0) - mean],
            color=colour,
            marker="o",
            markersize=4,
            capsize=2,
            label=arm.what,
        )
    seen, label = {max(arm.train_tokens for arm in experiment.arms)}, "largest image in training"
    if experiment.axis == "patch size":
        seen = {size for arm in experiment.arms for size in arm.patch_sizes}
        label = "sizes in training"
    for place in sorted(seen):
        budgets.axvline(place, color="#7a808a", linestyle=":", zorder=0, label=label)
        label = "_"  # named once
    for axes in (compute, images):
        axes.locator_params(axis="x", nbins=5)
    compute.set_xlabel("training compute, TFLOPs")
    images.set_xlabel("images seen, thousands")
    budgets.set_xlabel(f"{AXES[experiment.axis]} at evaluation")
    budgets.set_xscale("log")
    ticks = sorted({budget for arm in experiment.arms for budget in arm.budgets})
    budgets.xaxis.set_major_locator(FixedLocator(ticks))
    budgets.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    budgets.xaxis.set_minor_locator(NullLocator())
    seeds = {result.seed for result in results}
    metric = next(result.metric for result in results)
    compute.set_ylabel(metric)
    for axes in (compute, images, budgets):
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"({experiment.letter}) {experiment.title}: {data}, {len(seeds)} seed(s)", weight="bold"
    )
    handles, labels = budgets.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white")
    return path


def _draw_curves(
    axes: Axes, runs: Sequence[ArmResult], place: Callable[[Point], float], colour: str
) -> None:
    curves = [
        ([0.0, *(place(point) for point in run.points)], [0.0, *(p.quality for p in run.points)])
        for run in runs
    ]
    for xs, ys in curves:
        axes.plot(xs, ys, color=colour, alpha=0.3 if len(curves) > 1 else 1.0, linewidth=1)
    if len(curves) > 1:
        common = np.linspace(0, min(xs[-1] for xs, _ in curves), _GRID)
        mean = np.mean([np.interp(common, xs, ys) for xs, ys in curves], axis=0)
        axes.plot(common, mean, color=colour, linewidth=2)
