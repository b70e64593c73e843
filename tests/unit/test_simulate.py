"""Simulation: sizes as the LAION-400M fit says, lengths as the plan gives them, honest reports."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packer.config import PackerConfig
from packer.plan.draws import keyed_draws
from packer.plan.drop import BetaDrop, ConstantDrop, NoDrop, ResolutionDrop, ScheduledDrop
from packer.plan.many import crop_many, drop_rates, plan_lengths, plan_resize_many, sides_many
from packer.plan.place import Placement, Placer, Strategy
from packer.plan.resize import (
    FixedSide,
    Native,
    NormalArea,
    NormalSide,
    RandomCrop,
    ResizePolicy,
    UniformArea,
    UniformSide,
    plan_resize,
)
from packer.plan.simulate import laion_lengths, laion_sizes, place_lengths, placement_report
from packer.plan.types import ImageSize
from tests.reference import placement as reference

POLICIES: tuple[ResizePolicy, ...] = ("shrink_only", "allow_enlarge", "fill_budget")
STRATEGIES: tuple[Strategy, ...] = ("exact", "best_fit", "first_fit", "next_fit")


@given(
    seed=st.integers(0, 999),
    patch_size=st.integers(1, 40),
    max_tokens=st.integers(1, 20_000),
    policy=st.sampled_from(POLICIES),
)
@settings(deadline=None, max_examples=30)
def test_grids_of_many_equal_grids_of_one(
    seed: int, patch_size: int, max_tokens: int, policy: ResizePolicy
) -> None:
    """150 sizes an example, from one pixel to banners of 60,000, each with a budget of its own."""
    rng = np.random.default_rng(seed)
    heights, widths = np.exp(rng.uniform(0, 11, (2, 150))).astype(np.int64)
    budgets = rng.integers(1, max_tokens + 1, 150)

    rows, cols = plan_resize_many(
        heights, widths, patch_size=patch_size, max_tokens=budgets, policy=policy
    )

    for index, (height, width, budget) in enumerate(
        zip(heights.tolist(), widths.tolist(), budgets.tolist(), strict=True)
    ):
        one = plan_resize(
            ImageSize(height, width), patch_size=patch_size, max_tokens=budget, policy=policy
        )
        assert (rows[index], cols[index]) == one
        if policy != "fill_budget":
            enlarge = policy == "allow_enlarge"
            assert one == reference.grid(height, width, patch_size, budget, enlarge)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest difference of two empirical distribution functions."""
    points = np.concatenate([a, b])
    a, b = np.sort(a), np.sort(b)
    below = [np.searchsorted(x, points, side="right") / len(x) for x in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


DRAWS = [keyed_draws(0, 0, f"image {i}") for i in range(4000)]
ALIKE = 0.035  # two samples of 4,000 and 40,000 of one distribution: beyond it once in 3,000


@pytest.mark.parametrize(
    "resolution",
    [
        FixedSide(100.0),
        UniformSide(64.0, 384.0),
        NormalSide(64.0, 384.0),
        NormalSide(64.0, 384.0, mean=2.0, std=0.3),
        UniformArea(64.0, 384.0),
        NormalArea(64.0, 384.0, mean=0.3, std=0.4),
    ],
    ids=repr,
)
def test_sides_of_many_are_distributed_like_those_of_one(
    resolution: FixedSide | UniformSide | NormalSide | UniformArea | NormalArea,
) -> None:
    many = sides_many(resolution, 40_000, np.random.default_rng(0))
    assert many is not None
    one = np.array([resolution.side(draws.resolution) for draws in DRAWS])
    assert distance(many, one) < ALIKE
    assert sides_many(Native(), 5, np.random.default_rng(0)) is None


@pytest.mark.parametrize(
    "drop",
    [
        NoDrop(),
        ConstantDrop(0.3),
        BetaDrop(0.25, 0.4),
        ResolutionDrop(0.1, 0.5),
        ResolutionDrop(0.01, 0.3, std=0.05),
        ScheduledDrop(midpoint=5000.0, tau=-800.0),
        ScheduledDrop(midpoint=5000.0, tau=800.0, maximum=0.9),
    ],
    ids=repr,
)
def test_drop_rates_of_many_are_distributed_like_those_of_one(
    drop: NoDrop | ConstantDrop | BetaDrop | ResolutionDrop | ScheduledDrop,
) -> None:
    """Over lengths from 1 to 2,000, and over images seen from 3,000 on."""
    tokens = np.random.default_rng(1).integers(1, 2000, len(DRAWS))
    one = np.array(
        [
            drop.rate(count, draws.drop_rate, 3000 + i)
            for i, (count, draws) in enumerate(zip(tokens.tolist(), DRAWS, strict=True))
        ]
    )
    many = np.stack(
        [
            drop_rates(drop, tokens, np.random.default_rng(seed), images_seen=3000)
            for seed in range(10)
        ]
    )
    assert distance(many.ravel(), one) < ALIKE
    # Also image by image: what depends on length or images seen is right for each of them.
    third = len(tokens) // 3
    for part in (np.argsort(tokens)[:third], np.argsort(tokens)[-third:], np.arange(third)):
        assert many[:, part].mean() == pytest.approx(one[part].mean(), abs=0.015)
    assert many.min() >= 0
    assert many.max() < 1
    assert len(drop_rates(drop, tokens[:0], np.random.default_rng(0))) == 0


def test_crops_of_many_are_distributed_like_those_of_one() -> None:
    crop = RandomCrop(0.3, 2.0)
    sizes = np.exp(np.random.default_rng(2).uniform(0, 7, (len(DRAWS), 2))).astype(np.int64)
    one = [
        crop.box(ImageSize(height, width), draws.crop)
        for (height, width), draws in zip(sizes.tolist(), DRAWS, strict=True)
    ]
    many = crop_many(np.tile(sizes, (10, 1)), crop, np.random.default_rng(0))
    assert many.min() >= 1
    assert (many <= np.tile(sizes, (10, 1))).all()
    for side in (0, 1):
        shares = many[:, side] / np.tile(sizes[:, side], 10)
        assert distance(shares, np.array([box[2 + side] for box in one]) / sizes[:, side]) < ALIKE
    areas = many.prod(axis=1) / np.tile(sizes.prod(axis=1), 10)
    assert distance(areas, np.array([b.height * b.width for b in one]) / sizes.prod(1)) < ALIKE


def test_a_schedule_counts_on_from_the_images_a_run_has_seen() -> None:
    config = PackerConfig(token_drop=ScheduledDrop(midpoint=10_000.0, tau=-500.0))
    sizes = np.full((100, 2), 320)
    early, late = (
        plan_lengths(sizes, config, np.random.default_rng(0), images_seen=seen)
        for seen in (0, 50_000)
    )
    assert set(early.tolist()) == {81}  # just under 80 % of 400 tokens dropped, then 20 %
    assert set(late.tolist()) == {320}


def test_squares_and_their_neighbours_have_exact_roots() -> None:
    """Where a rounded float root would be one off."""
    roots = np.array([3, 1000, 2**25, 2**26 - 1])
    budgets = np.concatenate([roots**2 - 1, roots**2, roots**2 + 1])
    sides = np.full(len(budgets), 7)
    rows, _ = plan_resize_many(
        sides, sides, patch_size=1, max_tokens=budgets, policy="allow_enlarge"
    )
    np.testing.assert_array_equal(rows, np.concatenate([roots - 1, roots, roots]))


def test_sizes_are_those_of_laion() -> None:
    sizes = laion_sizes(50_000)
    tokens = (sizes[:, 0] // 16) * (sizes[:, 1] // 16)
    assert sizes.dtype == np.int32
    assert np.log(sizes.min(axis=1)).mean() == pytest.approx(5.564, abs=0.02)
    assert np.median(tokens) == pytest.approx(340, rel=0.1)
    assert (tokens > 1024).mean() == pytest.approx(0.21, abs=0.02)
    assert (sizes[:, 0] < sizes[:, 1]).mean() == pytest.approx(0.5, abs=0.02)
    np.testing.assert_array_equal(sizes, laion_sizes(50_000))
    assert (sizes != laion_sizes(50_000, seed=1)).any()


def test_lengths_follow_the_configuration() -> None:
    n = 4000
    plain = laion_lengths(n, PackerConfig(seq_len=1024, max_tokens=512))
    assert plain.dtype == np.int32
    assert plain.min() >= 1
    assert plain.max() <= 512
    half = laion_lengths(
        n, PackerConfig(seq_len=1024, max_tokens=512, token_drop=ConstantDrop(0.5))
    )
    np.testing.assert_array_equal(half, np.maximum(plain - plain // 2, 1))
    beta = laion_lengths(
        n, PackerConfig(seq_len=1024, max_tokens=512, token_drop=BetaDrop(0.25, 0.4))
    )
    assert (beta / plain).mean() == pytest.approx(0.75, abs=0.01)
    assert (beta / plain).min() >= 0.6
    symmetric = laion_lengths(n, PackerConfig(seq_len=1024, max_tokens=512), beta=(5, 5))
    assert (symmetric / plain).mean() == pytest.approx(0.5, abs=0.02)
    cropped = laion_lengths(n, PackerConfig(seq_len=1024, max_tokens=512, crop=RandomCrop(0.5)))
    assert 0.5 < cropped.sum() / plain.sum() < 1


@pytest.mark.parametrize("resolution", [UniformSide(64.0, 256.0), NormalSide(64.0, 256.0)])
def test_sampled_sides_bound_the_lengths(resolution: UniformSide | NormalSide) -> None:
    lengths = laion_lengths(
        3000, PackerConfig(seq_len=256, resolution=resolution, resize="allow_enlarge")
    )
    assert lengths.min() <= 16
    assert 200 < lengths.max() <= 256


def test_a_report_counts_what_happened() -> None:
    """Two sequences of (6 + 4) and one of 5, by next fit; the middle pair waits one push."""
    report = placement_report([6, 4, 6, 4, 5], 10, strategy="next_fit")
    assert (report.num_images, report.num_sequences) == (5, 3)
    assert report.padding == pytest.approx(5 / 30)
    assert report.bound == pytest.approx(5 / 30)
    assert report.images_per_sequence == pytest.approx(5 / 3)
    assert report.images_per_sequence_max == 2
    assert report.delay == pytest.approx(2 / 5)
    assert report.delay_max == 1
    assert report.lengths_per_second > 0


def test_the_bound_counts_the_image_limit_and_constants_do_not_correlate() -> None:
    report = placement_report([2] * 10, 10, max_images=2)
    assert report.num_sequences == 5
    assert report.bound == pytest.approx(1 - 20 / 50)
    assert report.images_autocorrelation == 0
    assert report.delay_length_correlation == 0
    with pytest.raises(ValueError, match="at least one length"):
        placement_report([], 10)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=200),
    strategy=st.sampled_from(STRATEGIES),
    max_images=st.none() | st.integers(1, 6),
    window=st.integers(1, 20),
)
def test_delays_are_those_of_images_pushed_one_by_one(
    lengths: list[int], strategy: Strategy, max_images: int | None, window: int
) -> None:
    options = {"window": window, "max_age": 30, "open_sequences": 3}
    placed = place_lengths(lengths, 40, strategy=strategy, max_images=max_images, **options)

    placer = Placer[int](40, placement=Placement(strategy, **options), max_images=max_images)
    order, delays = [], {}
    for now, length in enumerate(lengths):
        for sequence in placer.push(length, now):
            order.append(sequence)
            delays.update({index: now - index for index in sequence})
    for sequence in placer.flush():
        order.append(sequence)
        delays.update({index: len(lengths) - 1 - index for index in sequence})

    assert placed.delays.tolist() == [delays[index] for index in range(len(lengths))]
    assert placed.order.tolist() == [index for sequence in order for index in sequence]
    assert placed.counts.tolist() == [len(sequence) for sequence in order]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=120),
    num_ranks=st.integers(1, 4),
    batch=st.integers(1, 3),
)
def test_imbalance_is_how_far_the_slowest_rank_is_above_the_mean(
    lengths: list[int], num_ranks: int, batch: int
) -> None:
    placed = place_lengths(lengths, 40, strategy="next_fit")
    found = placed.imbalance(num_ranks=num_ranks, sequences_per_batch=batch, width=8)

    costs, start = [], 0
    for count in placed.counts.tolist():
        images = placed.order[start : start + count].tolist()
        costs.append(sum(lengths[i] ** 2 + 6 * 8 * lengths[i] for i in images))
        start += count
    assert placed.costs(8).tolist() == costs
    steps = len(costs) // (num_ranks * batch)
    expected = []
    for step in range(steps):
        at = [(rank * steps + step) * batch for rank in range(num_ranks)]
        ranks = [sum(costs[i : i + batch]) for i in at]
        expected.append(max(ranks) / (sum(ranks) / num_ranks) - 1)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_slots_and_what_the_papers_rule_drops_are_counted() -> None:
    """Sequences of 4, 4 and 2 images: at E = 3 two images would be dropped, one slot be empty."""
    placed = place_lengths([1] * 10, 4, strategy="next_fit")
    assert placed.counts.tolist() == [4, 4, 2]
    assert [placed.overflow(limit) for limit in (1, 3, 4)] == [7, 2, 0]
    assert placed.report().slots_unused == pytest.approx(2 / 12)
    limited = place_lengths([1] * 10, 4, strategy="next_fit", max_images=3)
    assert limited.report().slots_unused == pytest.approx(2 / 12)


def test_image_counts_hardly_correlate_and_delay_ignores_length() -> None:
    lengths = laion_lengths(40_000, PackerConfig(seq_len=1024), beta=(5, 5))
    report = placement_report(lengths, 1024)
    assert abs(report.images_autocorrelation) <= 0.05
    assert abs(report.delay_length_correlation) <= 0.1
    assert report.delay_max <= 512 + 128
