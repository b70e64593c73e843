"""The search behind `navit.cascade.BudgetSearch`: accuracy under a bound on the mean cost."""

from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from navit.cascade.outcomes import NEVER, StageOutcomes

_GRID_POINTS = 2000  # thresholds before the last that are tried together
_ROUNDS = 4


class _Found(NamedTuple):
    """Thresholds with what they come to: better ones compare as larger."""

    correct: float
    saved: float
    """The cost with its sign turned: of equals, the cheapest."""
    thresholds: tuple[float, ...]


def best_thresholds(
    outcomes: StageOutcomes, mean_cost: float, starts: Iterable[Sequence[float]]
) -> tuple[float, ...]:
    """Find thresholds of high accuracy whose mean cost does not exceed a bound.

    Args:
        outcomes: The solving set.
        mean_cost: The bound, at least the first stage's mean cost.
        starts: Thresholds to begin at, within the bound or not; the result is at least as accurate
            on the solving set as each of those within it.

    Returns:
        K - 1 thresholds.
    """
    if outcomes.num_stages == 1:
        return ()
    last = outcomes.num_stages - 2
    tried = {tuple(start)[:last] for start in starts} | set(_grid(outcomes, last))
    best: _Found | None = None
    for prefix in sorted(tried):
        found = _sweep(outcomes, (*prefix, 0.0), last, mean_cost)
        if found is not None and (best is None or found > best):
            best = found
    # Letting every image leave at the first stage is within any bound that is affordable.
    assert best is not None, "the grid holds the threshold 0"
    for _ in range(_ROUNDS if last else 0):
        before = best
        for stage in range(last + 1):
            found = _sweep(outcomes, best.thresholds, stage, mean_cost)
            if found is not None:
                best = max(best, found)
        if best == before:
            break
    return best.thresholds


def _grid(outcomes: StageOutcomes, count: int) -> Iterable[tuple[float, ...]]:
    """Yield combinations of so many thresholds: quantiles of each stage's confidences, and ends."""
    if not count:
        return [()]
    points = max(3, min(101, int(_GRID_POINTS ** (1 / count))))
    shares = np.linspace(0, 1, points)
    columns = [
        (0.0, NEVER, *np.quantile(confidence, shares, method="nearest").tolist())
        for confidence in outcomes.confidence[:count]
    ]
    return product(*columns)


def _sweep(
    outcomes: StageOutcomes, thresholds: Sequence[float], stage: int, mean_cost: float
) -> _Found | None:
    """Set one threshold to its best value, the others held; None where none is within the bound.

    Every value that can make a difference is tried: images are sorted by confidence, and for each
    number of them that leaves here the totals follow from two running sums.
    """
    values = list(thresholds)
    reached = outcomes.route([*values[:stage], 0.0, *values[stage + 1 :]]) == stage
    later = outcomes.route([*values[:stage], NEVER, *values[stage + 1 :]])
    right, spent = outcomes.correct_at(later), outcomes.spent_at(later)
    here = np.flatnonzero(reached)
    here = here[np.argsort(-outcomes.confidence[stage, here], kind="stable")]
    confidence = outcomes.confidence[stage, here]
    gained = outcomes.correct[stage, here].astype(np.int64) - right[here]
    saved = spent[here] - outcomes.spent[stage, here]
    correct = int(right.sum()) + np.concatenate([[0], np.cumsum(gained)])
    cost = (float(spent.sum()) - np.concatenate([[0.0], np.cumsum(saved)])) / outcomes.num_images
    # Images of equal confidence leave together: only where it falls can a threshold lie.
    possible = np.concatenate([[True], confidence[:-1] > confidence[1:], [True]])[: len(here) + 1]
    rounding = 1e-12 * max(mean_cost, 1.0)
    usable = np.flatnonzero(possible & (cost <= mean_cost + rounding))
    if not len(usable):
        return None
    order = np.lexsort((cost[usable], -correct[usable]))
    leaving = int(usable[order[0]])
    value = NEVER if leaving == 0 else 0.0 if leaving == len(here) else confidence[leaving - 1]
    values[stage] = float(value)
    return _Found(float(correct[leaving]), -float(cost[leaving]), tuple(values))
