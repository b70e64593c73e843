"""Every stage's answers to the same labelled images: what thresholds are solved on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from navit.cascade import (
    Answer,
    Cascade,
    CascadeStats,
    CascadeThresholds,
    Stage,
    StageOutcomes,
    budget_stages,
    stage_flops,
)
from navit.evaluate.accuracy import class_ranks
from navit.evaluate.cascade_data import LabelledImages
from navit.evaluate.source import Subject
from packer.plan.types import ImagePlan

_WARM_UP = 64  # images: the first call of a kernel would count as its speed


@dataclass(frozen=True)
class CascadeSettings:
    """Which cascades are measured."""

    budgets: tuple[int, ...]
    """Token budget of each stage, rising; at least two."""
    patch_sizes: tuple[int, ...] = ()
    """Patch size of each stage in pixels; empty: the model's own at every stage."""
    shares: tuple[float, ...] = ()
    """Wanted mean tokens of an image, as shares of what the last budget alone takes, each measured;
    empty: some, spread evenly from what the first budget alone takes."""
    sequences_per_batch: int = 8
    """B of every stage."""
    seed: int = 0
    """Seed of the split into halves and of the bootstrap."""
    progress: bool = True
    """Whether to show a progress bar."""

    def __post_init__(self) -> None:
        if len(self.budgets) < 2 or any(budget < 1 for budget in self.budgets):
            raise ValueError(
                f"a cascade needs two token budgets or more, all positive; got {self.budgets}."
            )
        if self.patch_sizes and len(self.patch_sizes) != len(self.budgets):
            raise ValueError(
                f"there must be a patch size for each of the {len(self.budgets)} budgets; got "
                f"{len(self.patch_sizes)}."
            )
        if any(not 0 < share < float("inf") for share in self.shares):
            raise ValueError(f"shares of the last budget must be positive; got {self.shares}.")


@dataclass(frozen=True, eq=False)
class StageAnswers:
    """Every stage's answers to the same N images."""

    keys: tuple[str, ...]
    """Key of each image."""
    tokens: StageOutcomes
    """Confidences and right answers, with costs in tokens."""
    flops: StageOutcomes
    """The same with costs in operations."""
    stats: tuple[CascadeStats, ...]
    """Counts and times of each stage's pass over all images."""

    def select(self, images: npt.NDArray[np.bool_]) -> "StageAnswers":
        """Keep some of the images."""
        keys = tuple(key for key, kept in zip(self.keys, images.tolist(), strict=True) if kept)
        return replace(
            self, keys=keys, tokens=self.tokens.select(images), flops=self.flops.select(images)
        )


def make_stages(
    subject: Subject, images: LabelledImages, settings: CascadeSettings
) -> tuple[Stage, ...]:
    """Return the stages: one network at several budgets, or at several patch sizes too."""
    vectors = None if images.vectors is None else images.vectors.to(subject.device)
    if not settings.patch_sizes:
        return budget_stages(subject.model, subject.packing, settings.budgets, classes=vectors)
    stages: list[Stage] = []
    for size, budget in zip(settings.patch_sizes, settings.budgets, strict=True):
        own = subject.at_patch_size(size)
        stages += budget_stages(own.model, own.packing, [budget], classes=vectors)
    return tuple(stages)


def ask_every_stage(
    subject: Subject,
    images: LabelledImages,
    settings: CascadeSettings,
    stages: Sequence[Stage],
) -> StageAnswers:
    """Run every stage over all images, each alone; images that one cannot read are left out."""
    tables: list[AnswerTable] = []
    stats: list[CascadeStats] = []
    for stage in stages:
        cascade = make_cascade(subject, settings, [stage])
        _warm_up(cascade, images)
        run = cascade.run(images.samples(subject.packing))
        title = f"{stage.packing.image_budget} tokens of {stage.packing.patch_size} pixels"
        tables.append(AnswerTable.of(run, title, progress=settings.progress))
        stats.append(run.stats)
    usable = np.all([table.stages >= 0 for table in tables], axis=0)
    if not usable.any():
        read = stats[0].stages[0]
        raise ValueError(
            f"the validation data hold no usable labelled image; {read.samples_read} were read and "
            f"skipped: {dict(read.skipped)}. Check the shards."
        )
    tokens = np.stack([table.tokens for table in tables])
    again = np.zeros(tokens.shape, np.bool_)
    for k in range(1, len(stages)):
        if stages[k - 1].repeats(stages[k]):
            again[k] = [a == b for a, b in zip(tables[k].plans, tables[k - 1].plans, strict=True)]
    ran = np.where(again, 0, tokens)[:, usable]
    outcomes = StageOutcomes(
        np.stack([table.confidence for table in tables])[:, usable],
        np.stack([table.correct for table in tables])[:, usable],
        ran.astype(np.float64),
    )
    flops = [stage_flops(stage, row) for stage, row in zip(stages, ran, strict=True)]
    keys = zip(tables[0].keys, usable.tolist(), strict=True)
    return StageAnswers(
        tuple(key for key, kept in keys if kept),
        outcomes,
        replace(outcomes, cost=np.stack(flops).astype(np.float64)),
        tuple(stats),
    )


@dataclass(frozen=True, eq=False)
class AnswerTable:
    """A pass's answers to N images as columns."""

    keys: list[str]
    """Key of each image."""
    stages: npt.NDArray[np.int64]
    """(N,) stage each left at; -1 for one that could not be read."""
    confidence: npt.NDArray[np.float64]
    """(N,) largest probability."""
    correct: npt.NDArray[np.bool_]
    """(N,) whether its class is first."""
    tokens: npt.NDArray[np.int64]
    """(N,) tokens spent on it."""
    plans: list[ImagePlan | None]
    """What was done to it at its last stage."""

    @classmethod
    def of(cls, answers: Iterable[Answer], title: str, *, progress: bool) -> "AnswerTable":
        """Run a pass to its end.

        Args:
            answers: The pass; every image has a label.
            title: What the progress bar says.
            progress: Whether there is one.
        """
        rows: list[Answer] = []
        correct: list[bool] = []
        waiting: list[Answer] = []
        bar = tqdm(answers, desc=title, unit=" images", leave=False, disable=not progress)
        for answer in bar:
            waiting.append(answer)
            rows.append(answer._replace(logits=None))  # of a million images they need not stay
            if len(waiting) == 1024:
                correct += _are_right(waiting)
                waiting = []
        correct += _are_right(waiting)
        return cls(
            [row.key for row in rows],
            np.array([row.stage for row in rows], np.int64),
            np.array([row.confidence for row in rows], np.float64),
            np.array(correct, np.bool_),
            np.array([sum(row.tokens) for row in rows], np.int64),
            [row.plan for row in rows],
        )


def _are_right(answers: Sequence[Answer]) -> list[bool]:
    """Whether each image's class is first; a tie is not, as everywhere."""
    known = [answer for answer in answers if answer.logits is not None]
    if not known:
        return [False] * len(answers)
    logits: list[Tensor] = [answer.logits for answer in known if answer.logits is not None]
    classes = torch.tensor([answer.label for answer in known], dtype=torch.int64)
    first = iter((class_ranks(torch.stack(logits), classes) == 0).tolist())
    return [answer.logits is not None and next(first) for answer in answers]


def make_cascade(
    subject: Subject,
    settings: CascadeSettings,
    stages: Sequence[Stage],
    thresholds: CascadeThresholds | tuple[float, ...] = (),
) -> Cascade:
    """Return the cascade of some stages, on the model's device and in its precision."""
    return Cascade(
        stages,
        thresholds,
        sequences_per_batch=settings.sequences_per_batch,
        device=subject.device,
        autocast_dtype=subject.autocast_dtype,
    )


def _warm_up(cascade: Cascade, images: LabelledImages) -> None:
    first = zip(images.samples(cascade.stages[0].packing), range(_WARM_UP), strict=False)
    cascade(sample for sample, _ in first)
