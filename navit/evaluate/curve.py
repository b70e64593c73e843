"""The cost-quality curve: one model at several token budgets, as a picture."""

from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator, PercentFormatter

from navit.evaluate.report import headline_metrics
from navit.evaluate.results import BudgetResult

_LOOKS: dict[str, Mapping[str, Any]] = {
    "image_to_text/recall@1": {"color": "C0"},
    "text_to_image/recall@1": {"color": "C1"},
    "accuracy@1": {"color": "C0"},
    "prompt": {"color": "C0"},
    "linear": {"color": "C3"},
    "knn": {"color": "C2"},
    "shape": {"color": "#7a808a", "linestyle": "--", "marker": ""},
}
_SHOT_SHADES = ("#e3b6f0", "#c47fdc", "#9a4fb8", "#6b2c87")
_NARROW = 0.15  # of the axis: labels closer than this would write over each other


def draw_curve(results: Sequence[BudgetResult], path: Path) -> Path:
    """Draw the quality of one model over what it costs, a point a token budget.

    A row of panels for retrieval and for each set of classes. On the left the cost is the mean
    number of tokens an image, which no machine changes; on the right the image tower's time an
    image on this machine. Bars are the standard deviation over few-shot draws; shape alone, which
    sees no pixel, is dashed.

    Args:
        results: One a budget, at least one.
        path: Written as PNG, or what its suffix says; its folder is created.

    Returns:
        ``path``.

    Raises:
        ValueError: If there is no share to draw.
    """
    groups = headline_metrics([result.metrics for result in results])
    if not groups:
        raise ValueError("results must hold a recall or an accuracy to draw; got none.")
    figure = Figure(figsize=(11, 0.8 + 3.0 * len(groups)), layout="constrained")
    rows = figure.subplots(len(groups), 2, squeeze=False, sharey="row")
    tokens = [result.mean_tokens for result in results]
    times = [1000 / max(result.model_images_per_second, 1e-9) for result in results]
    for (group, members), (left, right) in zip(groups.items(), rows, strict=True):
        for axes, cost in ((left, tokens), (right, times)):
            draw_metrics(axes, cost, results, members)
        budgets = [
            f"{cost:.0f}\n(of {r.max_tokens})" for cost, r in zip(tokens, results, strict=True)
        ]
        label_costs(left, tokens, budgets)
        label_costs(right, times, [f"{cost:.3g}" for cost in times])
        left.set_ylabel(group)
        right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    rows[-1][0].set_xlabel("mean tokens an image (of the token budget)")
    rows[-1][1].set_xlabel("image tower, milliseconds an image")
    figure.suptitle("One model at several token budgets", weight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white")
    return path


def draw_metrics(
    axes: Axes,
    cost: Sequence[float],
    results: Sequence[BudgetResult],
    members: Mapping[str, str],
    changes: Mapping[str, Any] | None = None,
) -> None:
    """Draw a line a metric over what the results cost, on a logarithmic axis.

    Args:
        axes: Where.
        cost: Of each result.
        results: What is drawn.
        members: Which metrics, and what each is called in the legend; from an underscore on, it has
            no place there.
        changes: Of the lines' looks.
    """
    axes.set_autoscaley_on(True)  # off where lines were drawn before: the limit below does that
    shots = [metric for metric in members if metric.endswith("_shot_accuracy@1")]
    for metric, called in members.items():
        method = metric.rpartition("/")[2].removesuffix("_accuracy@1")
        look = dict(_LOOKS.get(metric, _LOOKS.get(method, {})))
        errors = None
        if metric in shots:
            look["color"] = _SHOT_SHADES[min(shots.index(metric), len(_SHOT_SHADES) - 1)]
            spread = metric.removesuffix("accuracy@1") + "std"
            errors = [result.metrics.get(spread, 0.0) for result in results]
        values = [result.metrics.get(metric, float("nan")) for result in results]
        look = {"marker": "o", "markersize": 4, "capsize": 2, **look, **(changes or {})}
        axes.errorbar(cost, values, yerr=errors, label=called, **look)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def label_costs(
    axes: Axes, costs: Sequence[float], labels: Sequence[str], narrow: float = _NARROW
) -> None:
    """Put a tick at every cost, and write it where there is room.

    Args:
        axes: Where.
        costs: The places.
        labels: What is written at each.
        narrow: Share of the axis that a label takes.
    """
    order = sorted(range(len(costs)), key=lambda index: costs[index])
    places = [log(max(cost, 1e-9)) for cost in costs]
    narrow = narrow * (max(places) - min(places))
    shown: dict[int, str] = {}
    last = float("inf")
    for index in reversed(order):  # the largest budget is the one that must be readable
        if not shown or last - places[index] >= narrow > 0:
            shown[index], last = labels[index], places[index]
    axes.xaxis.set_major_locator(FixedLocator([costs[index] for index in order]))
    axes.xaxis.set_major_formatter(FixedFormatter([shown.get(index, "") for index in order]))
    axes.xaxis.set_minor_locator(NullLocator())
