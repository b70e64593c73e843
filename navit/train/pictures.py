"""Pictures of a run: its losses and validation results, and what retrieval finds."""

import json
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from navit.evaluate.run import MaskedExample

_RIGHT, _WRONG, _NEUTRAL = "#1f9d3a", "#d03a32", "#7a808a"
_SHOWN_METRICS = ("recall@1", "accuracy", "accuracy@1")
_BASELINES = ("shape_accuracy@1",)
"""Drawn dashed: what is reached without looking at a pixel."""

Records = Iterable[Mapping[str, Any]]


def draw_loss(metrics: Path | str | Records, path: Path | str, *, title: str = "Training") -> Path:
    """Draw the training loss, the validation results and the learning rate over the steps.

    Args:
        metrics: The run's ``metrics.jsonl``, or its records. A training record has "step" and
            "loss", and "lr" where known; a record with ``"event": "eval"`` has "step" and results
            in [0, 1], of which recall@1 and top-1 accuracies are drawn. Of two records of a step
            the later one counts, as a resumed run writes steps again.
        path: Written as PNG (or what its suffix says); its folder is created.
        title: Heading of the picture.

    Returns:
        ``path``.

    Raises:
        ValueError: If no training record is found.
    """
    records = _read(Path(metrics)) if isinstance(metrics, str | Path) else list(metrics)
    steps = {int(r["step"]): r for r in records if "loss" in r and r.get("event") != "eval"}
    if not steps:
        raise ValueError(
            f'metrics must hold at least one record with "step" and "loss"; got {len(records)} '
            "records without one. Draw the picture after the first logged step."
        )
    evaluations = {int(r["step"]): r for r in records if r.get("event") == "eval" and "step" in r}
    results = _results(evaluations)
    rates = {step: float(r["lr"]) for step, r in sorted(steps.items()) if "lr" in r}

    heights = [4.0] + [3.0] * bool(results) + [1.0] * bool(rates)
    figure = Figure(figsize=(9, 1.1 + 0.95 * sum(heights)), layout="constrained")
    panels = list(
        figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    )
    _draw_losses(panels[0], {step: float(r["loss"]) for step, r in sorted(steps.items())})
    if results:
        _draw_results(panels[1], results)
    if rates:
        panels[-1].plot(list(rates), list(rates.values()), color=_NEUTRAL, linewidth=1.2)
        panels[-1].set_ylabel("learning rate")
        panels[-1].set_ylim(bottom=0)
        panels[-1].ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("step")
    figure.align_ylabels(panels)
    figure.suptitle(title, weight="bold")
    return _save(figure, path)


def draw_retrieval(
    images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    texts: Sequence[str],
    similarity: Float[Tensor, "T N"],
    path: Path | str,
    *,
    image_texts: Sequence[str] | None = None,
    num_queries: int = 8,
    top: int = 5,
) -> Path:
    """Draw captions with their nearest images: the right one framed green, wrong ones red.

    The queries are spread evenly over the captions, not chosen by their result. Where the right
    image is not among the nearest, it is shown last.

    Args:
        images: N images, uint8 RGB (height, width, 3), each of its own size.
        texts: T captions.
        similarity: Of every caption with every image; larger is nearer.
        path: Written as PNG (or what its suffix says); its folder is created.
        image_texts: Caption of each image; one with the query's caption is right. None: T = N
            and image i belongs to caption i. Given, the images count as a selection from a larger
            set, and no rank or recall is stated.
        num_queries: Captions shown.
        top: Images shown per caption.

    Returns:
        ``path``.

    Raises:
        ValueError: If the numbers disagree or are zero, a count is not positive, or a caption has
            no image.
    """
    selected, image_texts = image_texts is not None, texts if image_texts is None else image_texts
    if similarity.shape != (len(texts), len(images)) or len(image_texts) != len(images):
        raise ValueError(
            "similarity must be (texts, images), and every image have a caption; got "
            f"{tuple(similarity.shape)} for {len(texts)} texts, {len(images)} images and "
            f"{len(image_texts)} captions of images. Without image_texts, give one text an image."
        )
    if min(num_queries, top, len(texts)) < 1:
        raise ValueError(
            "num_queries, top and the number of texts must be at least 1; got "
            f"{num_queries}, {top} and {len(texts)}."
        )
    scores = similarity.detach().float().cpu()
    right = _same_text(texts, image_texts)
    if not right.any(1).all():
        lost = texts[int((~right.any(1)).nonzero()[0, 0])]
        raise ValueError(f"every caption must have an image among image_texts; {lost!r} has none.")
    # A wrong image that ties with the right one stands before it: no tie is a hit.
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    ranks = ((scores >= best) & ~right).sum(1)
    queries = torch.linspace(0, len(texts) - 1, min(num_queries, len(texts))).round().int().tolist()
    top = min(top, len(images))
    missed = any(ranks[query] >= top for query in queries)

    columns = top + missed
    figure = Figure(figsize=(3.1 + 1.75 * columns, 0.9 + 1.85 * len(queries)))
    edge, head = 0.15 / figure.get_figwidth(), 0.9 / figure.get_figheight()
    grid = GridSpec(
        len(queries),
        columns + 1,
        figure=figure,
        width_ratios=[1.7, *[1.0] * columns],
        left=edge,
        right=1 - edge,
        top=1 - head,
        bottom=0.02,
        wspace=0.12,
        hspace=0.32,
    )
    for row, query in enumerate(queries):
        rank = int(ranks[query])
        found = f"right image at rank {rank + 1}" if rank else "right image first"
        if selected and rank >= top:
            found = f"right image not among the first {top}"
        colour = _WRONG if rank else _RIGHT
        _draw_caption(figure.add_subplot(grid[row, 0]), texts[query], found, colour)
        order = sorted(range(len(images)), key=lambda i: (-scores[query, i], right[query, i]))
        shown = [(image, place) for place, image in enumerate(order[:top])]
        if rank >= top:
            shown.append((order[rank], rank))
        for column, (image, place) in enumerate(shown):
            axes = figure.add_subplot(grid[row, 1 + (column if place < top else top)])
            colour = _RIGHT if right[query, image] else _WRONG
            title = "right:" if selected and place >= top else f"{place + 1}:"
            _draw_image(axes, images[image], f"{title}  {scores[query, image]:.2f}", colour)
    heading = "Captions and their nearest images"
    if not selected:
        hits = 100 * float((ranks == 0).float().mean())
        heading += f": recall@1 {hits:.1f} % of {len(texts)}"
    legend = "green: the right image; red: a wrong one; number: similarity"
    height = figure.get_figheight()
    figure.text(edge, 1 - 0.3 / height, heading, size=14, weight="bold", va="center")
    figure.text(edge, 1 - 0.58 / height, legend, size=9, color="0.35", va="center")
    return _save(figure, path)


def draw_masked(examples: Sequence[MaskedExample], path: Path | str) -> Path:
    """Draw images, their corrupted patches in grey, and the colours predicted in their place.

    Args:
        examples: One or more.
        path: Written as PNG (or what its suffix says); its folder is created.

    Returns:
        ``path``.
    """
    figure = Figure(figsize=(1.8 * len(examples), 5.8), layout="constrained")
    panels = figure.subplots(3, len(examples), squeeze=False)
    for column, example in zip(panels.T, examples, strict=True):
        shown = (example.image, example.corrupted, example.predicted)
        for axes, pixels in zip(column, shown, strict=True):
            axes.imshow(pixels)
            axes.set(xticks=[], yticks=[])
    for axes, title in zip(panels[:, 0], ("image", "corrupted", "predicted"), strict=True):
        axes.set_ylabel(title)
    figure.suptitle("Masked patches and the mean colours predicted for them")
    return _save(figure, path)


def _read(path: Path) -> list[Mapping[str, Any]]:
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # the line a killed run was writing
    return [record for record in records if isinstance(record, dict)]


def _results(evaluations: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Collect the drawn metrics by name, each as step -> share in [0, 1]."""
    results: dict[str, dict[int, float]] = {}
    for step, record in sorted(evaluations.items()):
        for name, value in record.items():
            shown = name.endswith(_SHOWN_METRICS) and not name.startswith("chance/")
            if shown and isinstance(value, int | float) and isfinite(value):
                results.setdefault(name, {})[step] = float(value)
    return results


def _draw_losses(axes: Axes, losses: dict[int, float]) -> None:
    steps = np.array(list(losses))
    values = np.array(list(losses.values()))
    finite = np.isfinite(values)
    few = "." if finite.sum() < 60 else None
    axes.plot(steps[finite], values[finite], color="C0", alpha=0.35, linewidth=0.8, marker=few)
    if finite.any():
        smooth = _smooth(values[finite])
        axes.plot(steps[finite], smooth, color="C0", linewidth=2, label="training loss, smoothed")
        # The start of training is steep and a spike is tall: neither may flatten the rest.
        high, low = np.quantile(values[finite], 0.995), values[finite].min()
        margin = 0.06 * (high - low) + 1e-3 * max(abs(high), abs(low), 1e-3)
        axes.set_ylim(low - margin, high + margin)
        note = f"{smooth[-1]:.3g}"
        axes.annotate(note, (steps[finite][-1], smooth[-1]), (5, 5), textcoords="offset points")
    if not finite.all():
        lost = steps[~finite]
        bottom = axes.get_xaxis_transform()
        axes.plot(lost, 0 * lost + 0.02, "x", color=_WRONG, transform=bottom, label="not finite")
    axes.set_ylabel("training loss")
    axes.legend(frameon=False, loc="upper right")


def _smooth(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Average over a centred triangle of a fortieth of the run to either side, cut at the ends."""
    reach = min(max(1, len(values) // 40), (len(values) - 1) // 2)
    window = np.bartlett(2 * reach + 3)[1:-1]
    weight = np.convolve(np.ones_like(values), window, "same")
    return np.convolve(values, window, "same") / weight


def _draw_results(axes: Axes, results: dict[str, dict[int, float]]) -> None:
    for name, points in results.items():
        last = next(reversed(points.values()))
        label = f"{name.replace('_', '-')}: {100 * last:.1f} %"
        look: dict[str, Any] = (
            {"linestyle": "--", "color": _NEUTRAL} if name.endswith(_BASELINES) else {}
        )
        axes.plot(
            list(points), list(points.values()), marker="o", markersize=4, label=label, **look
        )
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    # A third of the height above the highest point is the legend's, so that it hides no line.
    axes.set_ylim(0, 1.55 * max(max(points.values()) for points in results.values()) + 0.01)
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= 1])
    axes.set_ylabel("validation")
    axes.legend(
        title="last value", alignment="left", ncols=2, fontsize=9, frameon=False, loc="upper left"
    )


def _same_text(texts: Sequence[str], image_texts: Sequence[str]) -> Bool[Tensor, "T N"]:
    number: dict[str, int] = {}
    ids = [number.setdefault(text, len(number)) for text in [*texts, *image_texts]]
    return torch.tensor(ids[: len(texts)])[:, None] == torch.tensor(ids[len(texts) :])


def _draw_caption(axes: Axes, text: str, found: str, colour: str) -> None:
    axes.set_axis_off()
    short = textwrap.shorten(text, 170, placeholder=" ...")
    lines = textwrap.wrap(short, 30)
    wrapped = "\n".join(lines[:7]).replace("$", r"\$")  # $...$ would be set as mathematics
    axes.text(0.0, 0.98, wrapped, size=9.5, va="top", transform=axes.transAxes, linespacing=1.25)
    axes.text(0.0, 0.0, found, size=8.5, color=colour, weight="bold", transform=axes.transAxes)


def _draw_image(axes: Axes, image: npt.NDArray[np.uint8], title: str, colour: str) -> None:
    axes.imshow(image)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=3.5)
    axes.set_title(title, size=8.5, color=colour, pad=5)


def _save(figure: Figure, path: Path | str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # A caption in a script the font lacks is drawn with boxes; the picture is worth having.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, dpi=130, facecolor="white")
    return path
