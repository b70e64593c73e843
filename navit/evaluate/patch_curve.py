"""Quality against patch size: one model at several, as a picture."""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from navit.evaluate.curve import draw_metrics, label_costs
from navit.evaluate.report import headline_metrics
from navit.evaluate.results import BudgetResult

_LINES: dict[str, Any] = {
    "solid": "-",
    "dashed": "--",
    "dotted": ":",
    "dash-dotted": "-.",
    "long-dashed": (0, (9, 3)),
    "sparse": (0, (1, 5)),
}


def draw_patch_curve(results: Sequence[BudgetResult], path: Path, own: int) -> Path:
    """Draw the quality of one model over the size of its patches, a point a size.

    A row of panels for retrieval and for each set of classes: on the left over the patch size, on
    the right over the mean number of tokens an image, which is what a size costs. Where several
    token budgets were asked for, a line on the left is a budget, and on the right a patch size.

    Args:
        results: One a patch size and, where budgets were asked for, budget; at least one.
        path: Written as PNG, or what its suffix says; its folder is created.
        own: The model's own patch size in pixels, marked.

    Returns:
        ``path``.

    Raises:
        ValueError: If there is no share to draw.

    Source: FlexiViT (arXiv:2212.08013), figures 1 and 3.
    """
    groups = headline_metrics([result.metrics for result in results])
    if not groups:
        raise ValueError("results must hold a recall or an accuracy to draw; got none.")
    by_budget, by_size = _lines(results, own)
    figure = Figure(figsize=(11, 1.0 + 3.0 * len(groups)), layout="constrained")
    rows = figure.subplots(len(groups), 2, squeeze=False, sharey="row")
    for (group, members), (left, right) in zip(groups.items(), rows, strict=True):
        _draw_panel(left, by_budget, members, lambda result: float(result.patch_size or own))
        _draw_panel(right, by_size, members, lambda result: result.mean_tokens)
        sizes = sorted({float(result.patch_size or own) for result in results})
        label_costs(left, sizes, [f"{size:.0f}" for size in sizes], 0.045)
        tokens = [result.mean_tokens for result in results]
        label_costs(right, tokens, [f"{count:.0f}" for count in tokens], 0.07)
        left.axvline(own, color="#b7bcc4", linewidth=1, zorder=0)
        left.set_ylabel(group)
        right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    if len(by_budget) > 1:
        rows[0][0].set_title(f"token budget: {_named(by_budget)}", fontsize=9)
        rows[0][1].set_title(f"patch size: {_named(by_size)}", fontsize=9)
    rows[-1][0].set_xlabel(f"patch size in pixels (the model's own, {own}, marked)")
    rows[-1][1].set_xlabel("mean tokens an image")
    figure.suptitle("One model at several patch sizes", weight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white")
    return path


Lines = Mapping[int, Sequence[BudgetResult]]


def _lines(results: Sequence[BudgetResult], own: int) -> tuple[Lines, Lines]:
    """Return results by token budget and by patch size; of one budget all together in both."""
    sizes = sorted({result.patch_size or own for result in results})
    if len(sizes) == len(results):  # each size had a budget of its own
        return {0: results}, {0: results}
    budgets = sorted({result.max_tokens for result in results})
    return (
        {budget: [r for r in results if r.max_tokens == budget] for budget in budgets},
        {size: [r for r in results if (r.patch_size or own) == size] for size in sizes},
    )


def _draw_panel(
    axes: Axes,
    lines: Lines,
    members: Mapping[str, str],
    cost: Callable[[BudgetResult], float],
) -> None:
    looks = list(_LINES.values())
    for index, results in enumerate(lines.values()):
        costs = [cost(result) for result in results]
        if index == 0:
            draw_metrics(axes, costs, results, members)
            continue
        # Width and height do not depend on how an image is cut.
        seeing = [metric for metric in members if not metric.endswith("/shape_accuracy@1")]
        unnamed = {metric: f"_{members[metric]}" for metric in seeing}
        look = {"linestyle": looks[index % len(looks)], "alpha": 0.8}
        draw_metrics(axes, costs, results, unnamed, look)


def _named(lines: Lines) -> str:
    return ", ".join(f"{name} {look}" for look, name in zip(cycle(_LINES), lines, strict=False))
