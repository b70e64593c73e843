from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packer.config import PackerConfig
from packer.plan.balance import (
    attention_cost,
    attention_costs,
    balance,
    balance_steps,
    imbalance,
)
from packer.plan.place import pack_lengths
from packer.plan.simulate import laion_lengths


def best_maximum(costs: list[int], ranks: int, per_rank: int) -> int:
    """Try every way to deal the sequences out: the smallest possible cost of the costliest rank."""
    if ranks == 1:
        return sum(costs)
    # The first sequence belongs to some rank, and ranks are alike: call it the first rank's.
    best = sum(costs)
    for others in combinations(range(1, len(costs)), per_rank - 1):
        chosen = {0, *others}
        mine = sum(costs[i] for i in chosen)
        rest = [cost for i, cost in enumerate(costs) if i not in chosen]
        best = min(best, max(mine, best_maximum(rest, ranks - 1, per_rank)))
    return best


shapes = st.tuples(st.integers(1, 5), st.integers(1, 4))


def laion_costs(seq_len: int, images: int) -> np.ndarray:
    """Costs of packed sequences of LAION-like images, in the order of placement."""
    lengths = laion_lengths(images, PackerConfig(seq_len=seq_len), beta=(5, 5))
    sequences = pack_lengths(lengths, seq_len)
    return np.array([attention_cost(lengths[sequence]) for sequence in sequences])


@given(shape=shapes, data=st.data())
def test_every_sequence_goes_to_one_rank_and_every_rank_has_as_many(
    shape: tuple[int, int], data: st.DataObject
) -> None:
    ranks, per_rank = shape
    total = ranks * per_rank
    costs = data.draw(st.lists(st.integers(0, 10**9), min_size=total, max_size=total))
    dealt = balance(costs, ranks, per_rank)
    assert dealt.shape == (ranks, per_rank)
    assert sorted(dealt.flatten().tolist()) == list(range(total))
    assert all(row == sorted(row) for row in dealt.tolist())
    assert np.array_equal(dealt, balance(costs, ranks, per_rank))


@given(shape=shapes, data=st.data())
def test_the_costliest_rank_is_never_worse_off_than_in_order(
    shape: tuple[int, int], data: st.DataObject
) -> None:
    ranks, per_rank = shape
    total = ranks * per_rank
    costs = np.array(data.draw(st.lists(st.integers(0, 30), min_size=total, max_size=total)))
    in_order = costs.reshape(ranks, per_rank).sum(axis=1).max()
    assert costs[balance(costs, ranks, per_rank)].sum(axis=1).max() <= in_order


def test_an_even_order_that_greedy_and_swaps_miss_is_kept() -> None:
    """Largest first ends with 11 and 9, and no single swap makes them even."""
    costs = [5, 5, 0, 0, 3, 1, 3, 3]
    assert np.array(costs)[balance(costs, 2, 4)].sum(axis=1).tolist() == [10, 10]


@given(
    shape=st.sampled_from([(2, 2), (2, 3), (2, 4), (3, 2), (3, 3), (4, 2), (8, 1)]),
    data=st.data(),
)
def test_the_costliest_rank_is_within_a_third_of_the_optimum(
    shape: tuple[int, int], data: st.DataObject
) -> None:
    ranks, per_rank = shape
    total = ranks * per_rank
    costs = data.draw(st.lists(st.integers(0, 50), min_size=total, max_size=total))
    largest = np.array(costs)[balance(costs, ranks, per_rank)].sum(axis=1).max()
    assert best_maximum(costs, ranks, per_rank) <= largest
    assert 3 * largest <= 4 * best_maximum(costs, ranks, per_rank)


def test_on_packed_images_the_optimum_is_missed_by_less_than_a_hundredth() -> None:
    costs = laion_costs(1024, 2000)
    ratios = []
    for start in range(0, 400, 8):
        step = costs[start : start + 8]
        largest = step[balance(step, 4, 2)].sum(axis=1).max()
        ratios.append(largest / best_maximum(step.tolist(), 4, 2))
    assert len(ratios) == 50
    assert min(ratios) == 1
    assert max(ratios) < 1.01


@pytest.mark.parametrize(("seq_len", "before", "after"), [(1024, 0.02, 0.001), (4096, 0.08, 0.004)])
def test_balancing_evens_out_real_steps(seq_len: int, before: float, after: float) -> None:
    costs = laion_costs(seq_len, 60_000)
    costs = costs[: len(costs) // 32 * 32].reshape(-1, 32)
    dealt = balance_steps(costs, 8, 4)
    by_rank = np.take_along_axis(costs, dealt.reshape(-1, 32), axis=1).reshape(dealt.shape)
    assert imbalance(costs.reshape(-1, 8, 4).sum(axis=2)) > before
    assert imbalance(by_rank.sum(axis=2)) < after


def test_many_steps_are_balanced_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = np.random.default_rng(0).integers(0, 1000, (50, 12))
    alone = np.stack([balance(step, 4, 3) for step in costs])
    assert np.array_equal(balance_steps(costs, 4, 3), alone)
    monkeypatch.setattr("packer.plan.balance._CHUNK", 100)
    assert np.array_equal(balance_steps(costs, 4, 3), alone)
    assert balance_steps(costs[:0], 4, 3).shape == (0, 4, 3)


@given(
    sequences=st.lists(st.lists(st.integers(1, 9000), max_size=6), min_size=1, max_size=6),
    width=st.integers(1, 2000),
)
def test_cost_is_the_sum_over_images_of_squares_and_linear_terms(
    sequences: list[list[int]], width: int
) -> None:
    plain = [sum(n * n + 6 * width * n for n in sequence) for sequence in sequences]
    assert [attention_cost(sequence, width) for sequence in sequences] == plain
    flat = np.array([n for sequence in sequences for n in sequence], np.int32)
    bounds = np.cumsum([0, *map(len, sequences)])
    assert attention_costs(flat, bounds, width).tolist() == plain


def test_imbalance_is_the_mean_excess_of_the_costliest_rank() -> None:
    assert imbalance(np.array([[1, 3], [2, 2]])) == 0.25
    assert imbalance(np.array([[0, 0], [1, 3]])) == 0.25
    assert imbalance(np.zeros((3, 2), np.int64)) == 0
    assert imbalance(np.zeros((0, 2), np.int64)) == 0


@pytest.mark.parametrize(
    ("costs", "ranks", "per_rank", "match"),
    [
        ([1, 2, 3], 2, 2, r"must have ranks \* per_rank \(4\) costs"),
        ([1, -2], 2, 1, "at least 0"),
        ([], 0, 1, "must be at least 1"),
        ([1], 1, 0, "must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(costs: list[int], ranks: int, per_rank: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        balance(costs, ranks, per_rank)
    with pytest.raises(ValueError, match="width must be positive"):
        attention_cost([1], width=0)
