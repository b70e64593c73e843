"""Simulation: sizes as the LAION-400M fit says, lengths as the plan gives them, honest reports."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import bench_place
from packer.config import PackerConfig
from packer.plan.drop import BetaDrop, ConstantDrop
from packer.plan.resize import NormalSide, RandomCrop, UniformSide, plan_resize
from packer.plan.simulate import laion_lengths, laion_sizes, placement_report, plan_resize_many
from packer.plan.types import ImageSize
from tests.reference import placement as reference


@given(
    seed=st.integers(0, 999),
    patch_size=st.integers(1, 40),
    max_tokens=st.integers(1, 20_000),
    enlarge=st.booleans(),
)
@settings(deadline=None, max_examples=20)
def test_grids_of_many_equal_grids_of_one(
    seed: int, patch_size: int, max_tokens: int, enlarge: bool
) -> None:
    """3,000 sizes an example, from one pixel to banners of 60,000; budgets shared and own."""
    rng = np.random.default_rng(seed)
    heights, widths = np.exp(rng.uniform(0, 11, (2, 150))).astype(np.int64)
    budgets = rng.integers(1, max_tokens + 1, 150)
    policy = "allow_enlarge" if enlarge else "shrink_only"

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
        assert one == reference.grid(height, width, patch_size, budget, enlarge)


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


def test_image_counts_hardly_correlate_and_delay_ignores_length() -> None:
    lengths = laion_lengths(40_000, PackerConfig(seq_len=1024), beta=(5, 5))
    report = placement_report(lengths, 1024)
    assert abs(report.images_autocorrelation) <= 0.05
    assert abs(report.delay_length_correlation) <= 0.1
    assert report.delay_max <= 512 + 128


def test_the_benchmark_runs() -> None:
    rows = bench_place.run(quick=True)
    assert {row["strategy"] for row in rows} >= {"exact", "best_fit", "first_fit", "next_fit"}
    assert any("speed" in row for row in rows)
