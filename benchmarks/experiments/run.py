"""One arm with one seed: trained to its budget, evaluated at several, written down."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiments.arms import Arm, arm_config
from benchmarks.experiments.budget import Plan, plan_run, read_samples, with_text
from benchmarks.experiments.data import DataSet
from navit.evaluate.budgets import BudgetEvaluator
from navit.evaluate.data import read_image_set
from navit.evaluate.results import Settings
from navit.evaluate.source import Subject
from navit.report.read import read_run
from navit.serialize import to_plain
from navit.train.checkpoint import has_checkpoint
from navit.train.config import TrainConfig
from navit.train.loop import Trainer
from navit.train.restore import load_trained
from navit.train.setup import resolve_autocast, resolve_device
from packer.captions import CaptionTokenizer

RESULT, START = "arm.json", "model"


class Stopped(RuntimeError):
    """A run was asked to stop before its last step."""


@dataclass(frozen=True)
class Point:
    """One evaluation along the way."""

    step: int
    """Optimizer steps done."""
    flops: float
    """Operations spent, forward and backward, counted from the batches."""
    images: float
    """Images seen."""
    quality: float
    """The data set's metric, at the training budget."""


@dataclass(frozen=True)
class ArmResult:
    """What a run came to."""

    data: str
    """Name of the data set."""
    arm: str
    """Name of the arm."""
    seed: int
    """Its seed."""
    metric: str
    """What `quality` is."""
    planned_flops: float
    """Operations expected of all steps."""
    seconds: float
    """Of the training steps, waiting for data included."""
    points: tuple[Point, ...]
    """Evaluations with the averaged weights, the last one at the end."""
    budgets: Mapping[int, Mapping[str, float]]
    """By token budget, or patch size, every metric of the finished model and ``mean_tokens``."""

    @property
    def quality(self) -> float:
        """Quality at the end, at the training budget."""
        return self.points[-1].quality

    def at(self, budget: int) -> float:
        """Return the quality at a token budget or patch size."""
        return self.budgets[budget][self.metric]

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "ArmResult":
        """Read what `run_arm` wrote."""
        points = tuple(Point(**point) for point in found["points"])
        budgets = {int(budget): metrics for budget, metrics in found["budgets"].items()}
        return cls(**{**found, "points": points, "budgets": budgets})


def run_name(data: DataSet, arm: str, seed: int) -> str:
    """Name a run, and its folder."""
    return f"{data.name}-{arm}-{seed}"


def plan_arm(
    arm: Arm, data: DataSet, budget: float, seed: int, runs: Path
) -> tuple[TrainConfig, Plan]:
    """Return an arm's run within a budget of operations; squares are made where it needs them.

    Args:
        arm: The arm.
        data: What it is trained on.
        budget: Operations of the run, forward and backward; a teacher's, or those spent before
            on what it starts from, are not counted.
        seed: Its seed.
        runs: Where runs lie, those that others start from among them.
    """
    if arm.sampling == "square":
        data = data.squashed(round(arm.side))
    path = data.tokenizer()
    tokenizer = CaptionTokenizer.from_file(path)
    first = arm_config(arm, data.scale, images=1, steps=1, seed=seed)
    samples = read_samples(data.train, tokenizer, first.packer.max_text_tokens)
    plan = plan_run(with_text(first, tokenizer), arm, data.scale, samples, budget)
    config = arm_config(arm, data.scale, images=plan.images, steps=plan.steps, seed=seed)
    if arm.start is not None:
        start = runs / run_name(data, arm.start, seed) / START
        config = replace(config, init=start, teacher=start if arm.taught else None)
    return replace(config, shards=data.train, val=data.val, tokenizer=path), plan


def finished(folder: Path, config: TrainConfig) -> ArmResult | None:
    """Return the stored result of a run; None where it has not ended.

    Raises:
        ValueError: If the folder holds a run with other settings.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    if not agrees(found["config"], to_plain(config)):
        raise ValueError(
            f"{path} must be of this run; it was made with other settings (budget, data or "
            "definition of the arm). Give another --folder, or remove that run."
        )
    return ArmResult.from_json(found["result"])


def agrees(stored: Any, given: Any) -> bool:
    """Whether settings are those stored; ones that did not exist then are passed over.

    So is the side of a loss's tile, whose default was another once: it changes time alone.
    """
    if isinstance(stored, Mapping) and isinstance(given, Mapping):
        names = stored.keys() - {"loss_chunk"}
        return all(name in given and agrees(stored[name], given[name]) for name in names)
    return bool(stored == given)


def run_arm(
    arm: Arm,
    data: DataSet,
    config: TrainConfig,
    plan: Plan,
    folder: Path,
    *,
    keep_model: bool = False,
    keep_weights: bool = False,
    progress: bool = True,
) -> ArmResult:
    """Train an arm, or go on with it where it was interrupted, and evaluate it.

    Args:
        arm: The arm.
        data: Its data set.
        config: What `plan_arm` returned.
        plan: The same.
        folder: The run folder.
        keep_model: Whether the model is kept beside the run, as other arms' start.
        keep_weights: Whether the last checkpoint stays when all is measured.
        progress: Whether a progress bar is shown.

    Raises:
        Stopped: If SIGTERM ended the run before its last step; its checkpoint is written.
    """
    begun = has_checkpoint(folder)
    result = Trainer(replace(config, run=folder, resume=begun), folder).train(progress=progress)
    if result.step < config.steps:
        raise Stopped(f"{folder} was stopped at step {result.step} of {config.steps}.")
    found = ArmResult(
        data=data.name,
        arm=arm.name,
        seed=config.seed,
        metric=data.metric,
        planned_flops=plan.flops,
        **_curve(folder, data.metric),
        budgets=_at_budgets(arm, config, data, folder),
    )
    if keep_model:
        load_trained(folder).model.save_pretrained(folder / START)
    stored = {"config": to_plain(config), "result": asdict(found)}
    part = folder / f"{RESULT}.part"
    part.write_text(json.dumps(stored, indent=2) + "\n")
    os.replace(part, folder / RESULT)
    if not keep_weights:
        shutil.rmtree(folder / "checkpoints")
    return found


def _curve(folder: Path, metric: str) -> dict[str, Any]:
    """Read the evaluations of a run and what had been spent at each."""
    run = read_run(folder, folder.name)
    if metric not in run.evals:
        raise ValueError(
            f"the validation shards must allow {metric}; the run in {folder} has "
            f"{sorted(run.evals)}. Check the shards."
        )
    series = run.evals[metric]
    spent: dict[str, np.ndarray] = {}
    for axis in ("flops", "images", "hours"):
        at = run.progress.at(axis, series.steps)
        assert at is not None, "every run writes its rates at its last step"
        spent[axis] = at
    rows = zip(series.steps, spent["flops"], spent["images"], series.values, strict=True)
    points = tuple(Point(int(step), float(f), float(n), float(q)) for step, f, n, q in rows)
    return {"points": points, "seconds": float(3600 * spent["hours"][-1])}


def _at_budgets(
    arm: Arm, config: TrainConfig, data: DataSet, folder: Path
) -> dict[int, dict[str, float]]:
    """Evaluate the averaged weights on whole images at each of the arm's budgets, or patch sizes.

    At another patch size images keep their resolution.
    """
    trained = load_trained(folder)
    device = resolve_device(config)
    subject = Subject(
        trained.model.to(device),
        config.packer,
        device,
        resolve_autocast(config, device),
        trained.tokenizer,
    )
    settings = Settings(
        metrics=("retrieval", "prompts", "shape"),
        sequences_per_batch=config.sequences_per_batch,
        progress=False,
    )
    # The squares' JSON keeps the native sizes, which the shape-only baseline reads.
    val = read_image_set(config.val, kind="pairs")
    train = read_image_set(config.shards, kind="pairs")
    evaluator = BudgetEvaluator(subject, val, train, settings)
    found = {}
    for budget in arm.budgets:
        if arm.patch_sizes:
            result = evaluator.evaluate(patch_size=budget)
        else:
            result = evaluator.evaluate(budget)
        chance = {f"{name}/chance": 1 / n["classes"] for name, n in result.classes.items()}
        found[budget] = {**result.metrics, **chance, "mean_tokens": result.mean_tokens}
    return found
