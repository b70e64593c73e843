import random
from math import isqrt, sqrt
from statistics import fmean
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    get_image_size_for_max_num_patches,
)

from packer.plan.draws import keyed_draws
from packer.plan.resize import (
    FixedSide,
    Native,
    NoCrop,
    NormalArea,
    NormalSide,
    RandomCrop,
    ResizePolicy,
    Resolution,
    UniformArea,
    UniformSide,
    budget_from_side,
    plan_resize,
)
from packer.plan.types import Box, Grid, ImageSize

sides = st.integers(1, 6000)
budgets = st.integers(1, 4096)


@given(sides, sides, st.integers(1, 64), budgets, st.sampled_from(get_args(ResizePolicy)))
def test_the_grid_stays_within_the_budget_and_keeps_a_patch_a_side(
    height: int, width: int, patch_size: int, max_tokens: int, policy: ResizePolicy
) -> None:
    grid = plan_resize(
        ImageSize(height, width), patch_size=patch_size, max_tokens=max_tokens, policy=policy
    )

    assert grid.rows >= 1
    assert grid.cols >= 1
    assert grid.num_tokens <= max_tokens


@given(st.integers(64, 4000), st.integers(64, 4000), budgets)
def test_the_aspect_ratio_holds_to_within_one_patch_a_side(
    height: int, width: int, max_tokens: int
) -> None:
    """Against the real-valued grid of equal area: each side is its floor, at least 1."""
    grid = plan_resize(ImageSize(height, width), patch_size=16, max_tokens=max_tokens)

    scale = min(1.0, sqrt(max_tokens * 256 / (height * width)))
    if grid.rows > 1 and grid.cols > 1:
        assert height * scale / 16 - 1 - 1e-9 <= grid.rows <= height * scale / 16 + 1e-9 or (
            grid == Grid(height // 16, width // 16)
        )
        assert width * scale / 16 - 1 - 1e-9 <= grid.cols


@pytest.mark.parametrize(
    ("size", "max_tokens", "expected"),
    [
        ((224, 224), 1024, (14, 14)),
        ((225, 239), 1024, (14, 14)),
        ((480, 640), 1024, (27, 36)),
        ((480, 640), 256, (13, 18)),
        ((3000, 1), 256, (187, 1)),
        ((1, 30000), 256, (1, 256)),
        ((5, 5), 256, (1, 1)),
    ],
)
def test_literal_grids_at_patch_16(
    size: tuple[int, int], max_tokens: int, expected: tuple[int, int]
) -> None:
    assert plan_resize(ImageSize(*size), patch_size=16, max_tokens=max_tokens) == expected


def test_a_small_image_is_enlarged_only_when_asked() -> None:
    size = ImageSize(32, 64)

    assert plan_resize(size, patch_size=16, max_tokens=200) == (2, 4)
    assert plan_resize(size, patch_size=16, max_tokens=200, policy="allow_enlarge") == (10, 20)


@pytest.mark.parametrize("bad", [{"size": ImageSize(0, 4)}, {"patch_size": 0}, {"max_tokens": 0}])
def test_sizes_that_are_not_positive_are_refused(bad: dict[str, object]) -> None:
    arguments = {"size": ImageSize(9, 9), "patch_size": 16, "max_tokens": 4, **bad}

    with pytest.raises(ValueError, match="must be positive; got"):
        plan_resize(arguments.pop("size"), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("resolution", "low", "high", "mean"),
    [
        (FixedSide(224), 224, 224, 224),
        (UniformSide(64, 256), 64, 256, 160),
        # E[u] of N(-0.5, 1) truncated to [-1, 1] is -0.1437: -0.5 + (phi(-.5) - phi(1.5)) / mass.
        (NormalSide(64, 256), 64, 256, 64 + (1 - 0.1437) / 2 * 192),
        # The mean of sqrt(a) for a uniform on [64^2, 256^2]: 2/3 (256^3 - 64^3) / (256^2 - 64^2).
        (UniformArea(64, 256), 64, 256, 179.2),
    ],
)
def test_drawn_sides_have_the_distributions_range_and_mean(
    resolution: Resolution, low: float, high: float, mean: float
) -> None:
    drawn = [resolution.side(keyed_draws(0, 0, str(i)).resolution) for i in range(20_000)]

    assert min(drawn) >= low
    assert max(drawn) <= high
    assert fmean(drawn) == pytest.approx(mean, abs=1.5)


def test_drawn_areas_have_the_distributions_mean() -> None:
    for resolution, mean in (
        (UniformArea(64, 256), (64**2 + 256**2) / 2),
        (NormalArea(64, 256), 64**2 + (1 - 0.1437) / 2 * (256**2 - 64**2)),
        (NormalArea(64, 256, mean=0.0, std=50.0), (64**2 + 256**2) / 2),
    ):
        areas = [resolution.side(keyed_draws(0, 0, str(i)).resolution) ** 2 for i in range(20_000)]
        assert 64**2 - 1e-6 <= min(areas) < 64**2 + 500
        assert 256**2 - 500 < max(areas) <= 256**2 + 1e-6
        assert fmean(areas) == pytest.approx(mean, rel=0.02)


def test_filling_the_budget_gives_the_grids_of_hugging_faces_naflex() -> None:
    """Equal for every size: 3,000 random ones, strips and enlargements beyond 100 included."""
    rng = random.Random(7)
    for _ in range(3_000):
        height, width = (int(2 ** rng.uniform(0, 13)) for _ in range(2))
        patch_size = rng.choice([14, 16, 32])
        max_tokens = rng.choice([16, 64, 256, 576, 1024, 4096])
        expected = get_image_size_for_max_num_patches(height, width, patch_size, max_tokens)

        grid = plan_resize(
            ImageSize(height, width),
            patch_size=patch_size,
            max_tokens=max_tokens,
            policy="fill_budget",
        )

        assert (grid.rows * patch_size, grid.cols * patch_size) == expected, (height, width)


def test_a_side_is_that_of_the_square_of_equal_area() -> None:
    budget = budget_from_side(224, 16, 1024)
    grid = plan_resize(ImageSize(1000, 2000), patch_size=16, max_tokens=budget)

    assert budget == 14 * 14
    assert grid == (isqrt(98), isqrt(392))
    assert budget_from_side(Native().side(0), 16, 1024) == 1024
    assert budget_from_side(4, 16, 1024) == 1


@given(sides, sides, st.floats(0.01, 1), st.floats(1, 3), st.integers(0, 2**64 - 1))
def test_a_random_crop_lies_inside_and_covers_its_share(
    height: int, width: int, min_area: float, change: float, draw: int
) -> None:
    box = RandomCrop(min_area, change).box(ImageSize(height, width), draw)

    assert box.top >= 0
    assert box.left >= 0
    assert 1 <= box.height <= height - box.top
    assert 1 <= box.width <= width - box.left
    # Rounding to whole pixels costs at most half a pixel a side.
    assert (box.height + 0.5) * (box.width + 0.5) >= min_area * height * width * 0.999


@given(st.integers(200, 4000), st.integers(200, 4000), st.integers(0, 2**64 - 1))
def test_a_random_crop_changes_the_aspect_ratio_by_at_most_its_factor(
    height: int, width: int, draw: int
) -> None:
    box = RandomCrop(0.3, 1.25).box(ImageSize(height, width), draw)

    change = (box.height / box.width) / (height / width)
    assert 1 / 1.28 < change < 1.28


def test_no_crop_is_the_whole_image_and_a_full_crop_too() -> None:
    assert NoCrop().box(ImageSize(10, 20), 7) is None
    assert RandomCrop(1.0, 1.0).box(ImageSize(10, 20), 7) == Box(0, 0, 10, 20)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FixedSide(0),
        lambda: UniformSide(256, 64),
        lambda: NormalSide(0, 64),
        lambda: NormalSide(64, 128, std=0),
        lambda: UniformArea(256, 64),
        lambda: NormalArea(64, 128, std=-1),
        lambda: RandomCrop(0),
        lambda: RandomCrop(0.5, 0.9),
    ],
)
def test_settings_out_of_range_are_refused_with_what_was_found(make: object) -> None:
    with pytest.raises(ValueError, match="got"):
        make()  # type: ignore[operator]
