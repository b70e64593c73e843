"""What an evaluation found: as tables for the terminal and as JSON."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from navit.evaluate.cascade_report import CascadeReport, format_cascade
from navit.evaluate.results import BudgetResult
from navit.serialize import to_plain
from packer.tally import tally_text

_LABEL = 40  # columns
_COLUMNS = 8  # results beside one another: 112 columns

_METHODS = (
    ("prompt", "caption prompts"),
    ("linear", "linear probe"),
    ("knn", "nearest neighbours"),
    ("shape", "shape alone"),
)
"""Ways to tell classes apart: how their metrics begin, and what they are called."""


@dataclass(frozen=True)
class Report:
    """Everything an evaluation found and what it was made with."""

    results: tuple[BudgetResult, ...]
    """One a token budget, rising; of several patch sizes one a size, rising, in each budget."""
    model: Mapping[str, Any]
    """What was evaluated."""
    data: Mapping[str, Any]
    """On what."""
    settings: Mapping[str, Any]
    """How."""
    versions: Mapping[str, str]
    """Of the libraries that numbers depend on."""
    notes: tuple[str, ...] = ()
    """What a reader must know."""
    cascade: CascadeReport | None = None
    """What a cascade over token budgets is worth; None where none was asked for."""

    def to_json(self) -> dict[str, Any]:
        """Turn it into JSON values; ``results`` has one object a budget and patch size."""
        return {
            "model": dict(self.model),
            "data": dict(self.data),
            "settings": dict(self.settings),
            "notes": list(self.notes),
            "results": [_result_json(result) for result in self.results],
            "cascade": None if self.cascade is None else self.cascade.to_json(),
            "versions": dict(self.versions),
        }


def _result_json(result: BudgetResult) -> dict[str, Any]:
    stats, train = result.stats, result.train_stats
    return {
        "patch_size": result.patch_size,
        "max_tokens": result.max_tokens,
        "mean_tokens": round(result.mean_tokens, 3),
        "images": stats.images,
        "captions": result.captions,
        "classes": to_plain(dict(result.classes)),
        "seconds": round(result.seconds, 4),
        "model_seconds": round(result.model_seconds, 4),
        "images_per_second": round(result.images_per_second, 3),
        "model_images_per_second": round(result.model_images_per_second, 3),
        "padding": round(stats.padding, 6),
        "metrics": result.metrics,
        "stats": to_plain(stats),
        "train_stats": None if train is None else to_plain(train),
        "notes": list(result.notes),
    }


def format_report(report: Report) -> str:
    """Lay out the results: one in full, and, of several, what each costs.

    In full is the largest budget, at the model's own patch size or else at the largest.
    """
    own = report.model.get("patch_size")
    last = ([r for r in report.results if r.patch_size == own] or report.results)[-1]
    title = f"{last.stats.images:,} images"
    if last.captions:
        title = f"{last.stats.images:,} images, {last.captions:,} captions"
    limit = f"at most {last.max_tokens} tokens an image ({last.mean_tokens:.1f} on average)"
    if len({result.patch_size for result in report.results}) > 1 or last.patch_size != own:
        limit += f", patches of {last.patch_size} pixels"
    parts = [limit]
    parts.append(format_metrics(last.metrics, title=title, classes=last.classes))
    if len(report.results) > 1:
        parts.append(format_budgets(report.results))
    else:
        parts.append(
            f"{'images/s':<{_LABEL}}{last.images_per_second:>8,.1f}\n"
            f"{'  of the image tower alone':<{_LABEL}}{last.model_images_per_second:>8,.1f}"
        )
    parts.append(tally_text(last.stats))
    if report.cascade is not None:
        parts.append(format_cascade(report.cascade))
    notes = [*report.notes, *last.notes]
    if notes:
        parts.append("\n".join(f"note: {note}" for note in notes))
    return "\n\n".join(parts)


def format_metrics(
    metrics: Mapping[str, float],
    *,
    title: str,
    classes: Mapping[str, Mapping[str, int]] | None = None,
) -> str:
    """Lay out metrics as a table, shares in percent.

    Args:
        metrics: Shares by name.
        title: What the pass was over.
        classes: By set: numbers of classes, images and training images.

    Returns:
        Lines of at most 80 columns.
    """
    return "\n".join(_metric_lines(metrics, title, classes or {}))


def _metric_lines(
    metrics: Mapping[str, float], title: str, classes: Mapping[str, Mapping[str, int]]
) -> Iterator[str]:
    if "text_to_image/recall@1" in metrics:
        yield _row(f"retrieval over {title}", ("R@1", "R@5", "R@10"))
        for name, prefix in (
            ("image to text", "image_to_text"),
            ("  chance", "chance/image_to_text"),
            ("text to image", "text_to_image"),
            ("  chance", "chance/text_to_image"),
        ):
            yield _row(name, [_share(metrics[f"{prefix}/recall@{k}"]) for k in (1, 5, 10)])
    if "accuracy@1" in metrics:
        yield _row(f"classification of {title}", ("top 1", "top 5", "classes"))
        yield _row("the model's own classes", _of_classes(metrics, "", ""))
        yield _row("  chance", [_share(metrics["chance/accuracy@1"]), "", ""])
    if "masked_accuracy@1" in metrics:
        yield _row(f"masked patches, {title}", ("top 1", "top 5"))
        yield _row("colours told", [_share(metrics[f"masked_accuracy@{k}"]) for k in (1, 5)])
        yield _row("  the most frequent", [_share(metrics["chance/masked_accuracy@1"]), ""])
    for name in set_names(metrics):
        counts = classes.get(name, {})
        heading = f"{name}, {counts['classes']} classes" if counts else name
        yield _row(heading, ("top 1", "top 5", "classes"))
        for method, called in _methods_of(metrics, name):
            yield _row(f"  {called}", _of_classes(metrics, f"{name}/", f"{method}_"))


def _of_classes(metrics: Mapping[str, float], prefix: str, method: str) -> list[str]:
    names = [f"{prefix}{method}{part}" for part in ("accuracy@1", "accuracy@5", "class_recall")]
    shown = [_share(metrics[name]) if name in metrics else "-" for name in names]
    spread = metrics.get(f"{prefix}{method}std")
    return shown if spread is None else [*shown, f"  +- {100 * spread:.1f}"]


def format_budgets(results: Sequence[BudgetResult]) -> str:
    """Lay out what each token budget and patch size costs and gives: one column each.

    Returns:
        Lines; of several budgets at several patch sizes, and where there are more columns than fit
        beside one another, blocks of them.
    """
    sizes = [result.patch_size for result in results]
    groups: list[Sequence[BudgetResult]] = [results]
    if 1 < len(set(sizes)) < len(sizes):
        groups = [list(group) for _, group in groupby(results, lambda result: result.max_tokens)]
    blocks = [
        group[start : start + _COLUMNS]
        for group in groups
        for start in range(0, len(group), _COLUMNS)
    ]
    return "\n\n".join("\n".join(_budget_lines(block, results)) for block in blocks)


def _budget_lines(results: Sequence[BudgetResult], every: Sequence[BudgetResult]) -> Iterator[str]:
    if len({result.patch_size for result in every}) > 1:
        yield _row("patch size in pixels", [f"{result.patch_size}" for result in results])
    yield _row("token budget", [f"{result.max_tokens}" for result in results])
    for name, values in (
        ("tokens an image", [f"{result.mean_tokens:.1f}" for result in results]),
        ("images/s", [f"{result.images_per_second:,.1f}" for result in results]),
        (
            "  of the image tower alone",
            [f"{result.model_images_per_second:,.1f}" for result in results],
        ),
    ):
        yield _row(name, values)
    for group, members in headline_metrics([result.metrics for result in every]).items():
        yield group
        for metric, called in members.items():
            yield _row(f"  {called}", [_share(result.metrics.get(metric)) for result in results])


def headline_metrics(
    all_metrics: Sequence[Mapping[str, float]],
) -> dict[str, dict[str, str]]:
    """Name the metrics that summarise results, in groups: retrieval, then each set of classes.

    Args:
        all_metrics: The metrics of every budget; what one of them has is named.

    Returns:
        By group: the metrics' names, and what each is called.
    """
    joined = {name: value for metrics in all_metrics for name, value in metrics.items()}
    groups = {
        "retrieval": {
            "image_to_text/recall@1": "image to text R@1",
            "text_to_image/recall@1": "text to image R@1",
        },
        "the model's own classes": {"accuracy@1": "top 1"},
    }
    for name in set_names(joined):
        methods = _methods_of(joined, name)
        groups[name] = {f"{name}/{method}_accuracy@1": called for method, called in methods}
    shown = {
        group: {metric: called for metric, called in members.items() if metric in joined}
        for group, members in groups.items()
    }
    return {group: members for group, members in shown.items() if members}


def set_names(metrics: Mapping[str, float]) -> list[str]:
    """Return the sets of classes that metrics are of, in their order."""
    named = [name.rpartition("/")[0] for name in metrics if name.endswith("_accuracy@1")]
    return [name for name in dict.fromkeys(named) if name not in ("", "chance")]


def _methods_of(metrics: Mapping[str, float], name: str) -> list[tuple[str, str]]:
    ending = "_shot_accuracy@1"
    shots = sorted(
        int(metric.removeprefix(f"{name}/").removesuffix(ending))
        for metric in metrics
        if metric.startswith(f"{name}/") and metric.endswith(ending)
    )
    few = [(f"{k}_shot", f"{k}-shot") for k in shots]
    methods = [*_METHODS[:1], *few, *_METHODS[1:]]
    return [pair for pair in methods if f"{name}/{pair[0]}_accuracy@1" in metrics]


def _row(name: str, cells: Sequence[str]) -> str:
    if len(name) > _LABEL - 1:
        name = name[: _LABEL - 4] + "..."
    return f"{name:<{_LABEL}}" + "".join(f"{cell:>9}" for cell in cells)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
