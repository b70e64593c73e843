"""`navit analyze`: a checkpoint, and images if there are any, to pictures and an analysis.json."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn

from navit.analyze.filters import filter_components, patch_weights
from navit.analyze.images import make_views, read_items
from navit.analyze.positions import grids_of, position_similarity
from navit.analyze.results import Alignment, Findings, look_at
from navit.embed.config import EmbedConfig
from navit.embed.source import load_source
from navit.model import NaViT
from packer.config import PackerConfig


@dataclass(frozen=True)
class AnalyzeCommand:
    """Look inside a model: filters, positions, attention distance and rollout, layers compared."""

    checkpoint: tyro.conf.Positional[str]
    """A run folder or one of its checkpoints; a folder of weights, saved here or by Hugging Face's
    transformers (SigLIP 2, SigLIP, CLIP); a FlexiViT's .npz; or a hub id."""
    images: tuple[str, ...] = ()
    """Folders of images, image files, tar shards, and text files with one path a line; without
    any, only the weights are looked at: filters and positions."""
    folder: Path = Path("analysis")
    """Where pictures and analysis.json are written."""
    max_images: int = 128
    """Images looked at, spread evenly over the inputs."""
    rollout_images: int = 12
    """Of these, images whose attention rollout is drawn."""
    max_tokens: int | None = None
    """Token budget of one image; None: what the model was trained with."""
    budgets: tuple[int, ...] = ()
    """Other token budgets whose layers are compared with those at `max_tokens`; a quarter of it
    where none is given."""
    patch_sizes: tuple[int, ...] = ()
    """Other patch sizes, in pixels, whose layers are compared, of a model with a patch_buffer;
    twice its own where none is given."""
    raw_weights: bool = False
    """Use a run's weights of the last step and not their running average."""
    device: str = "auto"
    """"auto": CUDA where there is one."""

    def __post_init__(self) -> None:
        for name, least in (("max_images", 1), ("rollout_images", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be at least {least}; got {value!r}.")


@dataclass(frozen=True)
class AnalyzeResult:
    """What a call found and wrote."""

    rows: tuple[tuple[str, str, Path], ...]
    """Name, finding in a few words, and picture of each analysis."""
    notes: tuple[str, ...]
    """What was left out, and why."""
    path: Path
    """analysis.json."""


def run_analyze(command: AnalyzeCommand) -> AnalyzeResult:
    """Analyse a checkpoint.

    Raises:
        ValueError: If a setting or input is wrong.
        FileNotFoundError: If the checkpoint or an input does not exist.
        ConnectionError: If a hub id cannot be resolved.
    """
    # What was asked for is checked before anything is computed or written.
    items = read_items(command.images, command.max_images) if command.images else None
    tower, packing = _load(command)
    views = make_views(tower, packing, command.budgets, command.patch_sizes)
    found: dict[str, Any] = {
        "checkpoint": command.checkpoint,
        "patch_size": packing.patch_size,
        "patch_buffer": tower.config.patch_buffer,
        "max_tokens": packing.image_budget,
    }
    writer = _Writer(command.folder, found)
    _look_at_weights(tower, packing, writer)
    if items is not None:
        seen = look_at(items, views, rollouts=command.rollout_images)
        _write_findings(seen, writer)
    else:
        writer.notes.append("no --images: attention and the similarity of layers are left out")
    path = command.folder / "analysis.json"
    path.write_text(json.dumps(_finite(found), indent=2) + "\n", encoding="utf-8")
    return AnalyzeResult(tuple(writer.rows), tuple(writer.notes), path)


def format_result(result: AnalyzeResult) -> str:
    """Lay out what was found, for the terminal."""
    first = max((len(name) for name, _, _ in result.rows), default=0)
    second = max((len(finding) for _, finding, _ in result.rows), default=0)
    lines = [f"{name:<{first}}  {finding:<{second}}  {path}" for name, finding, path in result.rows]
    lines += [f"note: {note}" for note in result.notes]
    return "\n".join([*lines, f"numbers: {result.path}"])


class _Writer:
    """Collects pictures, numbers and notes of one call."""

    def __init__(self, folder: Path, found: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.found = folder, found
        self.rows: list[tuple[str, str, Path]] = []
        self.notes: list[str] = []

    def add(self, name: str, finding: str, numbers: Any, draw: Callable[[Path], Path]) -> None:
        self.found[name] = numbers
        file = self.folder / f"{name}.png"
        self.rows.append((name.replace("_", " "), finding, draw(file)))


def _load(command: AnalyzeCommand) -> tuple[NaViT, PackerConfig]:
    source = load_source(command.checkpoint, averaged=not command.raw_weights)
    tower = _image_tower(source.model)
    budget = command.max_tokens
    own = EmbedConfig(max_tokens=budget, batch_tokens=max(EmbedConfig.batch_tokens, budget or 1))
    packing = own.packing(tower.config, trained=source.packing, stated_tokens=source.max_tokens)
    device = command.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"device {device!r} needs CUDA, which is not available. Give --device cpu."
        )
    return tower.to(device, torch.float32).eval(), packing


def _image_tower(model: nn.Module) -> NaViT:
    tower = model if isinstance(model, NaViT) else getattr(model, "vision", None)
    if not isinstance(tower, NaViT):
        raise ValueError(
            f"the model must be a NaViT or have one as 'vision'; got {type(model).__name__}."
        )
    return tower


def _look_at_weights(tower: NaViT, packing: PackerConfig, writer: _Writer) -> None:
    from navit.analyze.pictures import draw_filters, draw_positions  # matplotlib takes a second

    weight = patch_weights(tower)
    if weight is None:
        writer.notes.append("a convolutional stem has no patch filters: none are drawn")
    else:
        filters = filter_components(weight)
        total = 100 * float(filters.shares.sum())
        writer.add(
            "filters",
            f"{len(filters.shares)} components, {total:.0f} % of the variance",
            {"shares": filters.shares.tolist(), "side": filters.filters.shape[1]},
            lambda path: draw_filters(filters, path),
        )
    grids = grids_of(packing.image_budget)
    writer.add(
        "positions",
        f"{tower.config.pos_embed}; grids " + ", ".join(f"{r} x {c}" for r, c in grids),
        [_describe_positions(tower, grid) for grid in grids],
        lambda path: draw_positions(tower, grids, path),
    )


def _describe_positions(tower: NaViT, grid: tuple[int, int]) -> dict[str, Any]:
    """Return the similarities of the grid's centre with the places of its column and its row."""
    centre = (grid[0] // 2, grid[1] // 2)
    similar = position_similarity(tower, grid, [centre])[0]
    return {
        "grid": grid,
        "centre": centre,
        "along_column": similar[:, centre[1]].tolist(),
        "along_row": similar[centre[0]].tolist(),
    }


def _write_findings(seen: Findings, writer: _Writer) -> None:
    from navit.analyze.gallery import draw_rollouts
    from navit.analyze.pictures import draw_distances

    writer.found["failures"] = [{"key": key, "cause": cause} for key, cause in seen.failures]
    if seen.failures:
        writer.notes.append(f"{_counted(len(seen.failures))} could not be read; see analysis.json")
    if not seen.distances.pixels:
        writer.notes.append("no image could be read: only the weights were looked at")
        return
    distance = seen.distances.describe()
    layers = [sum(heads) / len(heads) for heads in distance["pixels"]]
    writer.add(
        "attention_distance",
        f"first layer {layers[0]:.0f} px, last {layers[-1]:.0f} px, uniform "
        f"{distance['uniform_pixels']:.0f} px",
        distance,
        lambda path: draw_distances(seen.distances, path),
    )
    if seen.rollouts:
        rollouts = [
            {"key": r.key, "shares": r.shares.tolist(), "on_added_tokens": r.on_added}
            for r in seen.rollouts
        ]
        writer.add(
            "rollout",
            _counted(len(rollouts)),
            rollouts,
            lambda path: draw_rollouts(seen.rollouts, path),
        )
    assert seen.alignment is not None
    _write_alignment(seen.alignment, writer)


def _write_alignment(alignment: Alignment, writer: _Writer) -> None:
    from navit.analyze.pictures import draw_alignment

    if not alignment.pairs:
        writer.notes.append("similarity of layers needs at least 4 images: it is left out")
        return
    results = [
        {"vectors": kind, "between": [alignment.views[0].name, name], "cka": values.tolist()}
        for kind, name, values in alignment.results()
    ]
    last = [f"{result['cka'][-1][-1]:.2f}" for result in results[1 : len(alignment.views)]]
    writer.add(
        "layer_similarity",
        f"pooled vectors, {alignment.views[0].name} and others: {', '.join(last) or '-'}",
        results,
        lambda path: draw_alignment(alignment, path),
    )


def _finite(value: Any) -> Any:
    """Replace NaN, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _counted(images: int) -> str:
    return f"{images} image{'s' * (images != 1)}"
