"""The cost-quality curve of a cascade beside single passes and random routing, as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from navit.evaluate.cascade_report import METHODS, CascadePoint, CascadeReport

_LOOKS: dict[str, Mapping[str, Any]] = {
    "one budget": {"color": "#444b55", "marker": "s"},
    "cascade": {"color": "C0", "marker": "o"},
    "exit fractions": {"color": "C1", "marker": "^", "linestyle": "--"},
    "random routing": {"color": "#9aa1ab", "marker": "v", "linestyle": ":"},
}
_CALLED = {
    "one budget": "each budget alone",
    "cascade": "cascade, thresholds searched",
    "exit fractions": "cascade, exits proportional to q^k",
    "random routing": "random routing, the same exits",
}


def draw_cascade(report: CascadeReport, path: Path) -> Path:
    """Draw accuracy over what an image costs: mean tokens on the left, time on this machine right.

    Bars are standard errors. On the right, random routing stands at the speed of the cascade whose
    exits it shares; fixed exit fractions were not run.

    Args:
        report: What was measured.
        path: Written as PNG, or what its suffix says; its folder is created.

    Returns:
        ``path``.
    """
    figure = Figure(figsize=(11, 4.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    speeds = {point.exit_fractions: point.images_per_second for point in report.of("cascade")}
    for method in METHODS:
        points = report.of(method)
        if not points:
            continue
        _draw(left, [point.mean_tokens for point in points], points, method)
        times = [point.images_per_second for point in points]
        if method == "random routing":
            times = [speeds.get(point.exit_fractions) for point in points]
        if all(times):
            _draw(right, [1000 / value for value in times if value], points, method)
    left.set_xlabel("mean tokens an image")
    right.set_xlabel("milliseconds an image, decoding and packing included")
    left.set_ylabel(f"top 1 of {report.num_classes} classes ({report.set_name})")
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.margins(x=0.08)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for point, budget in zip(report.of("one budget"), report.budgets, strict=False):
        left.annotate(
            f"at most {budget}",
            (point.mean_tokens, point.accuracy),
            (-6, 8),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="#444b55",
        )
    handles = left.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    budgets = " -> ".join(str(budget) for budget in report.budgets)
    figure.suptitle(f"A cascade of {budgets} tokens, {report.images:,} images", weight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white")
    return path


def _draw(axes: Axes, costs: list[float], points: tuple[CascadePoint, ...], method: str) -> None:
    order = sorted(range(len(costs)), key=lambda index: costs[index])
    axes.errorbar(
        [costs[index] for index in order],
        [points[index].accuracy for index in order],
        yerr=[points[index].standard_error for index in order],
        label=_CALLED[method],
        **{"markersize": 5, "capsize": 2, "linewidth": 1.3, **_LOOKS[method]},
    )
