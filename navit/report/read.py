"""Run folders -> `Run`. Unfinished and damaged ones are read as far as they go.

Nothing here needs the run's data, its weights or its devices: only ``config.json``,
``metrics.jsonl``, ``result.json``, the counts in the newest checkpoint's ``state.json``, and the
pictures.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from navit.report.runs import PICTURES, Axis, Floats, Progress, Run, Series

_SPENT: tuple[Axis, ...] = ("tokens", "flops")
"""Amounts whose rates a log may have."""
_WITH_HOURS: tuple[Axis, ...] = ("hours", *_SPENT)


def read_runs(folders: Sequence[Path], labels: Sequence[str] = ()) -> list[Run]:
    """Read run folders.

    Args:
        folders: One folder a run.
        labels: A name for each; none: the shortest ends of the paths that tell them apart.

    Raises:
        ValueError: If there is no folder, one is named twice, or the labels are not as many or
            not unique.
        FileNotFoundError: If a folder does not exist or holds no run.
    """
    if not folders:
        raise ValueError(
            "at least one run folder must be given; got none. Name one: runs/demo-001."
        )
    whole = [folder.resolve() for folder in folders]
    if len(set(whole)) < len(whole):
        twice = next(path for path in whole if whole.count(path) > 1)
        raise ValueError(f"a run must be named once; {twice} is named {whole.count(twice)} times.")
    if labels and (len(labels) != len(folders) or len(set(labels)) < len(labels)):
        raise ValueError(
            f"labels must be one a run, all different; got {len(labels)} ({', '.join(labels)}) for "
            f"{len(folders)} runs."
        )
    names = labels or short_names(whole)
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_run(folder: Path, name: str) -> Run:
    """Read one run folder as far as it goes; what is missing or damaged becomes a note.

    Raises:
        FileNotFoundError: If the folder does not exist, or holds neither ``metrics.jsonl`` nor
            ``config.json``.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"a run must be a folder; {folder} is none. Check the name.")
    if not any((folder / file).exists() for file in ("metrics.jsonl", "config.json")):
        inside = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
        hint = f" Name the runs in it: {inside[0]} ..." if inside else " Check the name."
        raise FileNotFoundError(
            f"a run folder must hold metrics.jsonl or config.json; {folder} holds neither.{hint}"
        )
    notes: list[str] = []
    config = _read_object(folder / "config.json", notes, why="settings and size are unknown")
    records = _read_records(folder / "metrics.jsonl", notes)
    stats, stats_step = _read_stats(folder, notes)
    by_event = {
        event: [record for record in records if record.get("event") == event]
        for event in ("train", "rates", "eval", "bad_loss")
    }
    run = Run(
        name=name,
        folder=folder,
        config=config,
        train=_series(by_event["train"]),
        rates=_series(by_event["rates"]),
        evals=_series(by_event["eval"]),
        bad_steps=tuple(sorted({int(record["step"]) for record in by_event["bad_loss"]})),
        stats=stats,
        stats_step=stats_step,
        parameters=count_parameters(config),
        progress=_progress(records),
        pictures={
            kind: folder / file for kind, file in PICTURES.items() if (folder / file).is_file()
        },
    )
    return _with_notes(run, notes)


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that tell all of them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = [str(Path(*path.parts[-depth:])) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def count_parameters(config: Mapping[str, Any]) -> int | None:
    """Count the weights of the model a ``config.json`` describes, without making them.

    Returns:
        None where the configuration is another version's or says nothing of a model.
    """
    import torch

    from navit.model.classifier import Classifier, ClassifierConfig
    from navit.model.clip import CLIP
    from navit.model.config import CLIPConfig
    from navit.serialize import from_plain

    try:
        shape = from_plain(CLIPConfig, config["model"])
        with torch.device("meta"):
            if config.get("task") == "classify":
                classes = ClassifierConfig(
                    shape.vision,
                    int(config["num_classes"]),
                    representation_size=config.get("representation_size"),
                )
                return sum(weight.numel() for weight in Classifier(classes).parameters())
            return sum(weight.numel() for weight in CLIP(shape).parameters())
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _read_object(path: Path, notes: list[str], *, why: str) -> dict[str, Any]:
    """Read a JSON object; {} and a note where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{path.name} is missing: {why}.")
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read ({error}): {why}.")
        return {}
    if not isinstance(found, dict):
        notes.append(f"{path.name} holds no JSON object: {why}.")
        return {}
    return found


def _read_records(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Read the records with a step; cut or foreign lines are counted."""
    if not path.exists():
        notes.append("metrics.jsonl is missing: there are no curves.")
        return []
    records, lost = [], 0
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            lost += 1
            continue
        if isinstance(record, dict) and _is_number(record.get("step")):
            records.append(record)
        else:
            lost += 1
    if lost:
        lines = "1 line" if lost == 1 else f"{lost} lines"
        notes.append(
            f"{lines} of metrics.jsonl could not be read and {'is' if lost == 1 else 'are'} left "
            "out (a kill cuts the last one)."
        )
    if not records:
        notes.append("metrics.jsonl holds no record: there are no curves.")
    return records


def _read_stats(folder: Path, notes: list[str]) -> tuple[dict[str, Any], int | None]:
    """Return the counts of the end, else those of the newest checkpoint that can be read."""
    sources = [folder / "result.json"]
    sources += sorted((folder / "checkpoints").glob("step-*/state.json"), reverse=True)
    for path in sources:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            stats, step = found["stats"], int(found["step"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(stats, dict):
            return stats, step
    notes.append("neither result.json nor a checkpoint has counts: what was skipped is unknown.")
    return {}, None


def _series(records: Iterable[Mapping[str, Any]]) -> dict[str, Series]:
    """Collect every number by name; of two records of a step the later one counts."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record.items():
            if name not in ("event", "step") and _is_number(value):
                found.setdefault(name, {})[int(record["step"])] = float(value)
    return {
        name: Series(np.array(sorted(points), float), np.array([points[s] for s in sorted(points)]))
        for name, points in found.items()
    }


def _progress(records: Sequence[Mapping[str, Any]]) -> Progress:
    """Add up images step by step, and hours, tokens and FLOPs from the rates between readings.

    A reading holds for the steps since the one before it, so that hours are those of training steps
    with their waiting for data; evaluations and checkpoints are not in them. Steps after the last
    reading count at its rates.
    """
    images: dict[int, float] = {}
    rates: dict[int, list[float]] = {}
    last = 0
    for record in records:
        step = int(record["step"])
        last = max(last, step)
        if record.get("event") == "bad_loss" and isinstance(record.get("keys"), list):
            images[step] = len(record["keys"])  # read and paid for, though no step was taken
        elif record.get("event") == "train" and _is_number(record.get("images")):
            images[step] = float(record["images"])
        elif record.get("event") == "rates":
            speed = record.get("images_per_second")
            if _is_number(speed) and speed > 0:
                others = (record.get(f"{name}_per_second") for name in _SPENT)
                spent_an_image = [value / speed if _is_number(value) else 0.0 for value in others]
                rates[step] = [1 / speed / 3600, *spent_an_image]
    steps = np.arange(last + 1, dtype=float)
    amounts: dict[Axis, Floats] = {"step": steps}
    if images:
        seen = np.array([images.get(step, 0.0) for step in range(last + 1)])
        amounts["images"] = np.cumsum(seen)
        if rates:
            read = np.array(sorted(rates), float)
            which = np.searchsorted(read, steps).clip(max=len(read) - 1)
            per_image = np.array([rates[int(step)] for step in read])[which]
            for axis, spent in zip(_WITH_HOURS, per_image.T, strict=True):
                if spent.any():
                    amounts[axis] = np.cumsum(seen * spent)
    return Progress(steps, amounts)


def _with_notes(run: Run, notes: list[str]) -> Run:
    """Say what the page will lack."""
    planned = run.planned_steps
    if run.train and planned is not None and run.last_step < planned:
        notes.append(f"not finished: step {run.last_step:,} of {planned:,}.")
    if run.train and not run.evals:
        notes.append("there is no evaluation.")
    if run.train and "hours" not in run.progress.amounts:
        notes.append("there are no rates yet: hours and tokens are unknown.")
    for kind, file in PICTURES.items():
        task = {"retrieval": "contrastive", "masked": "masked"}.get(kind)
        wanted = task is None or run.config.get("task", "contrastive") == task
        if wanted and kind not in run.pictures:
            why = "" if task is None else " (drawn when a run with validation shards ends)"
            notes.append(f"{file} is missing{why}.")
    if run.config and run.parameters is None:
        notes.append("config.json is of another version: the number of parameters is unknown.")
    return replace(run, notes=tuple(notes))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
