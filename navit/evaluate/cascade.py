"""What a cascade is worth: accuracy against mean tokens and against measured images/s.

Thresholds are solved on one half of the labelled images and reported on the other. Beside the
cascade stand each budget alone, exit fractions fixed without labels, and random routing.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from navit.cascade import (
    BudgetSearch,
    CascadeStats,
    CascadeThresholds,
    GeometricExits,
    RandomRouting,
    Stage,
    StageOutcomes,
)
from navit.evaluate.bootstrap import paired_bootstrap
from navit.evaluate.cascade_answers import (
    AnswerTable,
    CascadeSettings,
    StageAnswers,
    ask_every_stage,
    make_cascade,
    make_stages,
)
from navit.evaluate.cascade_data import LabelledImages, half_of
from navit.evaluate.cascade_report import CascadePoint, CascadeReport
from navit.evaluate.source import Subject

POINTS = 5
"""Mean costs a cascade is measured at where none are given."""


def evaluate_cascade(
    subject: Subject, images: LabelledImages, settings: CascadeSettings
) -> CascadeReport:
    """Run every stage over all images, solve thresholds on one half, measure on the other.

    Args:
        subject: The model.
        images: Labelled images.
        settings: Which cascades are measured.

    Raises:
        ValueError: If a half has no usable image, or a wanted mean cost is below the first stage's.
    """
    stages = make_stages(subject, images, settings)
    answers = ask_every_stage(subject, images, settings, stages)
    halves = np.array([half_of(key, settings.seed) for key in answers.keys])
    if len(set(halves.tolist())) < 2:
        raise ValueError(
            f"each half must have labelled images; {len(halves)} could be used. Give more."
        )
    solving, rest = answers.select(halves == 0), answers.select(halves == 1)
    wanted = wanted_means(solving.tokens, settings.shares)
    singles = [_alone(rest, k) for k in range(len(stages))]
    found: list[CascadePoint] = []
    done: set[tuple[float, ...]] = set()
    for mean in wanted:
        found.append(_routed("exit fractions", rest, _fixed(solving.tokens, mean), settings.seed))
        searched = BudgetSearch(mean).solve(solving.tokens)
        if searched.values in done:  # more tokens than the best thresholds need
            continue
        done.add(searched.values)
        run = _measure(subject, images, settings, stages, searched)
        found += [
            _routed("cascade", rest, searched, settings.seed, run),
            _random(rest, searched, settings.seed),
        ]
    return CascadeReport(
        set_name=images.set_name,
        num_classes=images.num_classes,
        budgets=settings.budgets,
        patch_sizes=tuple(stage.packing.patch_size for stage in stages),
        solving_images=len(solving.keys),
        images=len(rest.keys),
        points=(*singles, *found),
        stats=answers.stats[0].stages[0],
        skipped=dict(images.skipped),
    )


def wanted_means(outcomes: StageOutcomes, shares: Sequence[float]) -> tuple[float, ...]:
    """Return mean costs that are shares of the last stage's alone; without any, evenly spread."""
    least = float(outcomes.cost[0].mean())
    most = float(_alone_cost(outcomes, outcomes.num_stages - 1).mean())
    if shares:
        return tuple(share * most for share in shares)
    return tuple(np.linspace(least, most, POINTS + 2)[1:-1].tolist())


def _measure(
    subject: Subject,
    images: LabelledImages,
    settings: CascadeSettings,
    stages: Sequence[Stage],
    thresholds: CascadeThresholds,
) -> tuple[AnswerTable, CascadeStats]:
    """Run the cascade itself over the half it was not solved on."""
    cascade = make_cascade(subject, settings, stages, thresholds)
    run = cascade.run(images.half(images.samples(subject.packing), 1, settings.seed))
    title = f"cascade, {thresholds.mean_cost:.1f} mean tokens"
    return AnswerTable.of(run, title, progress=settings.progress), run.stats


def _fixed(outcomes: StageOutcomes, mean: float) -> CascadeThresholds:
    return GeometricExits.for_cost(outcomes, mean).solve(outcomes)


def _alone_cost(outcomes: StageOutcomes, stage: int) -> npt.NDArray[np.float64]:
    """Cost of each image where a stage sees all: also those it would not be run again on."""
    cost = outcomes.cost[: stage + 1]
    last = np.argmax(np.cumsum(cost > 0, axis=0) == (cost > 0).sum(0), axis=0)
    return np.asarray(cost[last, np.arange(cost.shape[1])])


def _alone(answers: StageAnswers, stage: int) -> CascadePoint:
    right = answers.tokens.correct[stage].astype(np.float64)
    stats = answers.stats[stage]
    shares = [0.0] * answers.tokens.num_stages
    shares[stage] = 1.0
    return CascadePoint(
        method="one budget",
        accuracy=float(right.mean()),
        standard_error=_error(right),
        mean_tokens=float(_alone_cost(answers.tokens, stage).mean()),
        mean_flops=float(_alone_cost(answers.flops, stage).mean()),
        exit_fractions=tuple(shares),
        images_per_second=stats.images_per_second,
        model_images_per_second=stats.model_images_per_second,
    )


def _routed(
    method: str,
    answers: StageAnswers,
    thresholds: CascadeThresholds,
    seed: int,
    measured: tuple[AnswerTable, CascadeStats] | None = None,
) -> CascadePoint:
    outcomes = answers.tokens
    stages = outcomes.route(thresholds.values)
    right, spent = outcomes.correct_at(stages).astype(np.float64), outcomes.spent_at(stages)
    shares = outcomes.exit_fractions(stages)
    point = CascadePoint(
        method=method,
        accuracy=float(right.mean()),
        standard_error=_error(right),
        mean_tokens=float(spent.mean()),
        mean_flops=float(answers.flops.spent_at(stages).mean()),
        exit_fractions=shares,
        thresholds=thresholds,
        over_last=paired_bootstrap(right, outcomes.correct[-1].astype(np.float64), seed=seed),
        over_random=paired_bootstrap(right, RandomRouting.of(outcomes, shares).correct, seed=seed),
    )
    if measured is None:
        return point
    # What really ran counts; it differs from the table where rounding decides at a threshold.
    table, stats = measured
    usable = table.stages >= 0
    return replace(
        point,
        accuracy=float(table.correct[usable].mean()),
        mean_tokens=float(table.tokens[usable].mean()),
        images_per_second=stats.images_per_second,
        model_images_per_second=stats.model_images_per_second,
    )


def _random(answers: StageAnswers, thresholds: CascadeThresholds, seed: int) -> CascadePoint:
    """Route at random with the exit fractions that the thresholds give on these images."""
    outcomes = answers.tokens
    shares = outcomes.exit_fractions(outcomes.route(thresholds.values))
    routed = RandomRouting.of(outcomes, shares)
    return CascadePoint(
        method="random routing",
        accuracy=float(routed.correct.mean()),
        standard_error=_error(routed.correct),
        mean_tokens=float(routed.spent.mean()),
        mean_flops=float(RandomRouting.of(answers.flops, shares).spent.mean()),
        exit_fractions=shares,
        over_last=paired_bootstrap(
            routed.correct, outcomes.correct[-1].astype(np.float64), seed=seed
        ),
    )


def _error(values: npt.NDArray[np.float64]) -> float:
    return float(values.std() / len(values) ** 0.5)
