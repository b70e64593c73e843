"""Thresholds of a cascade: solved for exits or a mean cost, against brute force."""

import json
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navit.cascade import (
    AlphaFraction,
    BudgetSearch,
    CascadeThresholds,
    ExitFractions,
    GeometricExits,
    RandomRouting,
    StageOutcomes,
    ThresholdRule,
    expected_cost,
)
from navit.cascade.outcomes import NEVER


def synthetic(
    images: int, stages: int, seed: int, *, even: bool = False, grain: int | None = None
) -> StageOutcomes:
    """Draw stages that get better and dearer, whose confidence says something of being right."""
    rng = np.random.default_rng(seed)
    hard = rng.uniform(size=images)
    sure, right = [], []
    for k in range(stages):
        chance = np.clip(1.1 - hard / (0.6 + 0.3 * k), 0.05, 1)
        right.append(rng.uniform(size=images) < chance)
        sure.append(np.clip(chance + rng.normal(0, 0.1, images), 0, 1))
    confidence = np.stack(sure)
    if grain is not None:  # many images are equally sure
        confidence = np.round(confidence * grain) / grain
    cost = np.array([4.0**k for k in range(stages)])[:, None] * np.ones(images)
    if not even:
        cost = cost * rng.uniform(0.5, 1.5, (stages, images))
    return StageOutcomes(confidence, np.stack(right), cost)


def by_hand(outcomes: StageOutcomes, thresholds: tuple[float, ...]) -> tuple[float, float]:
    """Accuracy and mean cost by a loop over images."""
    right = spent = 0.0
    tables = (outcomes.confidence, outcomes.correct, outcomes.cost)
    for sure, correct, cost in zip(*(table.T.tolist() for table in tables), strict=True):
        for k in range(len(sure)):
            spent += cost[k]
            if k == len(thresholds) or sure[k] >= thresholds[k]:
                right += correct[k]
                break
    return right / outcomes.num_images, spent / outcomes.num_images


RULES: list[tuple[ThresholdRule, tuple[float, ...]]] = [
    (ExitFractions((0.5, 0.2, 0.3)), (0.5, 0.2, 0.3)),
    (ExitFractions((0.0, 0.4, 0.6)), (0.0, 0.4, 0.6)),
    (GeometricExits(0.5), (4 / 7, 2 / 7, 1 / 7)),
    (GeometricExits(2.0), (1 / 7, 2 / 7, 4 / 7)),
    (AlphaFraction((0.6, 0.25)), (0.4, 0.35, 0.25)),
]


@pytest.mark.parametrize(("rule", "wanted"), RULES)
def test_exit_fractions_hold_on_images_that_were_not_solved_on(
    rule: ThresholdRule, wanted: tuple[float, ...]
) -> None:
    solving, held_out = synthetic(8000, 3, 0), synthetic(8000, 3, 1)

    solved = rule.solve(solving)

    assert solved.exit_fractions == pytest.approx(wanted, abs=1 / 8000)
    found = held_out.exit_fractions(held_out.route(solved.values))
    assert found == pytest.approx(wanted, abs=0.02)


@settings(max_examples=30)
@given(
    images=st.integers(1, 60),
    stages=st.integers(1, 4),
    seed=st.integers(0, 999),
    grain=st.sampled_from([None, 4]),
    shares=st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
def test_each_stage_lets_its_most_confident_images_leave(
    images: int, stages: int, seed: int, grain: int | None, shares: list[float]
) -> None:
    outcomes = synthetic(images, stages, seed, grain=grain)
    weights = np.array(shares[:stages]) + 1e-9
    fractions = tuple((weights / weights.sum()).tolist())

    solved = ExitFractions(fractions).solve(outcomes)

    assert (solved.accuracy, solved.mean_cost) == pytest.approx(by_hand(outcomes, solved.values))
    gone = np.zeros(images, bool)
    for k, stage in enumerate(solved.values):
        leaves = (outcomes.confidence[k] >= stage) & ~gone
        stays = ~leaves & ~gone
        if leaves.any() and stays.any():
            assert outcomes.confidence[k, leaves].min() > outcomes.confidence[k, stays].max()
        gone |= leaves
        wanted = round(sum(fractions[: k + 1]) * images)
        assert gone.sum() >= wanted
        if grain is None and len(set(outcomes.confidence[k])) == images:
            assert gone.sum() == max(wanted, int((gone & ~leaves).sum()))


@settings(max_examples=12)
@given(
    images=st.integers(1, 20),
    stages=st.integers(1, 3),
    seed=st.integers(0, 999),
    share=st.floats(0, 1.2),
    grain=st.sampled_from([None, 3]),
)
def test_the_budget_search_is_within_the_budget_and_beats_every_fixed_fraction(
    images: int, stages: int, seed: int, share: float, grain: int | None
) -> None:
    outcomes = synthetic(images, stages, seed, grain=grain)
    least, most = outcomes.spent[0].mean(), outcomes.spent[-1].mean()
    budget = float(least + share * (most - least))

    solved = BudgetSearch(budget).solve(outcomes)

    accuracy, cost = by_hand(outcomes, solved.values)
    assert cost <= budget + 1e-9
    assert (solved.accuracy, solved.mean_cost) == pytest.approx((accuracy, cost))
    for q in (*(step / 20 for step in range(1, 40)), 10.0):
        fixed = GeometricExits(q).solve(outcomes)
        if fixed.mean_cost <= budget:
            assert solved.accuracy >= fixed.accuracy - 1e-12
    fixed = GeometricExits.for_cost(outcomes, budget).solve(outcomes)
    assert fixed.mean_cost <= budget + 1e-9
    if stages == 2:  # the exact optimum: every threshold that can make a difference
        tried = [by_hand(outcomes, (t,)) for t in (0.0, NEVER, *outcomes.confidence[0])]
        best = max(right for right, spent in tried if spent <= budget + 1e-9)
        assert accuracy == pytest.approx(best)


@pytest.mark.parametrize("seed", range(3))
def test_of_three_stages_the_search_comes_near_the_best_of_all_pairs_of_thresholds(
    seed: int,
) -> None:
    outcomes = synthetic(30, 3, seed)
    budget = 6.0
    cuts = [(0.0, NEVER, *row) for row in outcomes.confidence[:2]]
    tried = [by_hand(outcomes, pair) for pair in product(*cuts)]
    best = max(right for right, spent in tried if spent <= budget)

    assert BudgetSearch(budget).solve(outcomes).accuracy >= best - 1 / 30 - 1e-9


@settings(max_examples=30)
@given(seed=st.integers(0, 999), stages=st.integers(1, 4), q=st.floats(0.05, 20))
def test_random_routing_costs_what_the_cascade_costs_and_averages_over_images(
    seed: int, stages: int, q: float
) -> None:
    outcomes = synthetic(40, stages, seed, even=True)
    solved = GeometricExits(q).solve(outcomes)

    random = RandomRouting.of(outcomes, solved.exit_fractions)

    assert random.spent.mean() == pytest.approx(solved.mean_cost)
    costs = outcomes.cost[:, 0].tolist()
    assert expected_cost(solved.exit_fractions, costs) == pytest.approx(solved.mean_cost)
    by_stage = outcomes.correct.mean(1)
    assert random.correct.mean() == pytest.approx(float(np.dot(solved.exit_fractions, by_stage)))


def test_a_threshold_of_0_keeps_all_and_one_above_1_none() -> None:
    outcomes = synthetic(50, 3, 0)
    assert set(outcomes.route((0.0, 0.5))) == {0}
    assert set(outcomes.route((NEVER, 0.0))) == {1}
    assert set(outcomes.route((NEVER, 1.5))) == {2}
    assert AlphaFraction((0.0, 0.0)).solve(outcomes).values == (0.0, 0.0)
    assert AlphaFraction((1.0, 1.0)).solve(outcomes).values == (NEVER, NEVER)


def test_a_confidence_that_is_not_a_number_is_none() -> None:
    outcomes = StageOutcomes(np.array([[np.nan, 0.9]] * 2), np.ones((2, 2), bool), np.ones((2, 2)))
    assert outcomes.route((0.1,)).tolist() == [1, 0]
    assert outcomes.route((0.0,)).tolist() == [0, 0]


def test_thresholds_come_back_from_json_as_they_were() -> None:
    solved = BudgetSearch(4.0).solve(synthetic(200, 3, 0))

    stored = json.loads(json.dumps(solved.to_json(), allow_nan=False))

    assert CascadeThresholds.from_json(stored) == solved
    stored["values"] = [-1, 0.5]
    with pytest.raises(ValueError, match="at least 0"):
        CascadeThresholds.from_json(stored)


def test_what_cannot_be_is_refused() -> None:
    outcomes = synthetic(10, 2, 0)
    least = outcomes.cost[0].mean()
    for wrong, told in (
        (lambda: BudgetSearch(least * 0.9).solve(outcomes), "at least that of the first stage"),
        (lambda: GeometricExits.for_cost(outcomes, least * 0.9), "first stage"),
        (lambda: ExitFractions((0.5, 0.3, 0.2)).solve(outcomes), "each of the 2 stages; got 3"),
        (lambda: ExitFractions((0.5, 0.6)), "sum to 1"),
        (lambda: AlphaFraction((0.3, 0.5)), "none larger"),
        (lambda: AlphaFraction((1.5,)), "none larger"),
        (lambda: GeometricExits(0.0), "positive"),
        (lambda: outcomes.route((0.1, 0.2)), "one fewer"),
        (lambda: RandomRouting.of(outcomes, (1.0,)), "one entry a stage"),
        (lambda: expected_cost((1.0,), (1.0, 2.0)), "one cost a stage"),
        (lambda: StageOutcomes(np.ones((2, 3)), np.ones((2, 3), bool), np.ones((1, 3))), "of each"),
        (
            lambda: StageOutcomes(np.full((1, 1), 3.0), np.ones((1, 1), bool), np.ones((1, 1))),
            "not logits",
        ),
        (
            lambda: StageOutcomes(np.ones((1, 1)), np.ones((1, 1), bool), -np.ones((1, 1))),
            "not negative",
        ),
    ):
        with pytest.raises(ValueError, match=told):
            wrong()
