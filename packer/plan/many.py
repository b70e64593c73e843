"""Plans of many images at once: the vectorised twins of `resize`, `drop` and the crop.

A million images take seconds. Grids equal those of `plan_resize`; what is drawn has the same
distribution, from a generator instead of each image's keyed draws.
"""

from statistics import NormalDist
from typing import Any, assert_never

import numpy as np
import numpy.typing as npt

from packer.config import PackerConfig
from packer.plan.drop import (
    BetaDrop,
    ConstantDrop,
    NoDrop,
    ResolutionDrop,
    ScheduledDrop,
    TokenDrop,
)
from packer.plan.patch_size import OnePatchSize, RandomPatchSize, ScheduledPatchSize
from packer.plan.resize import (
    Crop,
    FixedSide,
    Native,
    NoCrop,
    NormalArea,
    NormalSide,
    ResizePolicy,
    Resolution,
    UniformArea,
    UniformSide,
)

Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

_BINS = 4096  # of a tabulated distribution function; the error is below a thousandth of a bin


def plan_lengths(
    sizes: npt.NDArray[np.integer[Any]],
    config: PackerConfig,
    rng: np.random.Generator,
    *,
    beta: tuple[int | float, int | float] | None = None,
    images_seen: int = 0,
) -> npt.NDArray[np.int32]:
    """Push image sizes through the configuration's crop, resolution, resize and token drop.

    Limits that skip images (`max_pixels`, `max_aspect_ratio`) are not applied.

    Args:
        sizes: (n, 2) heights and widths in pixels, at least 1.
        config: Only `seq_len` and the settings of the plan are read.
        rng: Source of every draw; `config.seed` is not used.
        beta: (a, b) of a Beta distribution that replaces `config.token_drop`, unscaled.
        images_seen: Images the run has seen before the first of these; schedules count on from it.

    Returns:
        int32 (n,) kept tokens of each image, between 1 and `config.seq_len`.
    """
    return plan_patches(sizes, config, rng, beta=beta, images_seen=images_seen)[0]


def plan_patches(
    sizes: npt.NDArray[np.integer[Any]],
    config: PackerConfig,
    rng: np.random.Generator,
    *,
    beta: tuple[int | float, int | float] | None = None,
    images_seen: int = 0,
) -> tuple[npt.NDArray[np.int32], Int64Array]:
    """Plan lengths as `plan_lengths` does, and say which patch size each image has.

    Returns:
        int32 (n,) kept tokens, and int64 (n,) sides of a patch in pixels.
    """
    shown = crop_many(sizes.astype(np.int64), config.crop, rng)
    sides = sides_many(config.resolution, len(shown), rng)
    patch_sizes: int | Int64Array = config.patch_size
    if not isinstance(config.patch_sizes, OnePatchSize):
        uniforms = rng.random(len(shown))
        seen = images_seen + np.arange(len(shown))
        patch_sizes = patch_sizes_many(config, uniforms, shown, sides, seen)
    rows, cols = plan_resize_many(
        shown[:, 0],
        shown[:, 1],
        patch_size=patch_sizes,
        max_tokens=budgets_many(sides, patch_sizes, config.image_budget),
        policy=config.resize,
    )
    tokens = rows * cols
    if beta is not None:
        rates = rng.beta(*beta, len(tokens))
    else:
        rates = drop_rates(config.token_drop, tokens, rng, images_seen=images_seen)
    kept: Int64Array = np.maximum(tokens - np.floor(rates * tokens).astype(np.int64), 1)
    return kept.astype(np.int32), np.broadcast_to(np.asarray(patch_sizes, np.int64), kept.shape)


def plan_resize_many(
    heights: Int64Array,
    widths: Int64Array,
    *,
    patch_size: int | Int64Array,
    max_tokens: int | Int64Array,
    policy: ResizePolicy = "shrink_only",
) -> tuple[Int64Array, Int64Array]:
    """Choose patch grids as `packer.plan.resize.plan_resize` does, for many images at once.

    Args:
        heights: int64 (n,) pixels, at least 1.
        widths: int64 (n,) pixels, at least 1.
        patch_size: Side of a patch in pixels, one for all or int64 (n,).
        max_tokens: Token budget before dropping, one for all or int64 (n,).
        policy: See `plan_resize`.

    Returns:
        int64 (n,) rows and int64 (n,) columns.

    Raises:
        ValueError: If a side, a budget or `patch_size` is not positive.
    """
    budget = np.broadcast_to(np.asarray(max_tokens, dtype=np.int64), heights.shape)
    patches = np.asarray(patch_size)
    if any((values < 1).any() for values in (heights, widths, patches, budget)):
        raise ValueError(
            "heights, widths, patch_size and max_tokens must be positive; got minima "
            f"{heights.min()}, {widths.min()}, {patches.min()}, {budget.min()}."
        )
    if policy == "fill_budget":
        return _fill_budget_many(heights, widths, patch_size, budget)
    rows, cols = np.maximum(heights // patch_size, 1), np.maximum(widths // patch_size, 1)
    resized = np.ones(len(rows), bool) if policy == "allow_enlarge" else rows * cols > budget
    fitted_rows = np.clip(_isqrt(budget * heights // widths), 1, budget)
    fitted_cols = np.clip(_isqrt(budget * widths // heights), 1, budget)
    return np.where(resized, fitted_rows, rows), np.where(resized, fitted_cols, cols)


def crop_many(sizes: Int64Array, crop: Crop, rng: np.random.Generator) -> Int64Array:
    """Draw the sizes of crops: int64 (n, 2) heights and widths in, the same out."""
    if isinstance(crop, NoCrop):
        return sizes
    n = len(sizes)
    area = rng.uniform(crop.min_area, 1.0, n)
    change = np.log(crop.max_aspect_change)
    stretch = np.exp(rng.uniform(-change, change, n) / 2)
    shares = np.sqrt(area)[:, None] * np.stack([stretch, 1 / stretch], axis=1)
    over = shares > 1
    shares = np.where(over[:, ::-1], area[:, None], shares)  # a side cut off gives to the other
    shares[over] = 1
    return np.clip(np.rint(sizes * shares), 1, sizes).astype(np.int64)


def drop_rates(
    drop: TokenDrop, tokens: Int64Array, rng: np.random.Generator, *, images_seen: int = 0
) -> FloatArray:
    """Draw the share of tokens dropped of each image.

    Args:
        drop: Distribution of the rates.
        tokens: int64 (n,) tokens before dropping, in order of arrival.
        rng: Source of the draws.
        images_seen: Images the run has seen before the first of these.

    Returns:
        float64 (n,) rates in [0, 1).
    """
    n = len(tokens)
    if isinstance(drop, NoDrop):
        return np.zeros(n)
    if isinstance(drop, ConstantDrop):
        return np.full(n, drop.drop_rate)
    if isinstance(drop, BetaDrop):
        return _scaled_beta(np.full(n, drop.mean), drop.maximum, rng)
    if isinstance(drop, ResolutionDrop):
        place = (tokens - drop.min_tokens) / (drop.max_tokens - drop.min_tokens)
        mean = drop.low + (drop.high - drop.low) * np.clip(place, 0, 1)
        lowest = np.maximum(-2.0, -mean / drop.std)  # in standard deviations; a rate of at least 0
        rates: FloatArray = mean + drop.std * _truncated_normals(rng, n, 0.0, 1.0, lowest, 2.0)
        return np.maximum(rates, 0)
    if isinstance(drop, ScheduledDrop):
        x = (images_seen + np.arange(n) - drop.midpoint) / drop.tau
        means = drop.low + (drop.high - drop.low) * (1 + np.tanh(x / 2)) / 2  # the sigmoid of x
        return means if drop.maximum is None else _scaled_beta(means, drop.maximum, rng)
    assert_never(drop)


def sides_many(resolution: Resolution, n: int, rng: np.random.Generator) -> FloatArray | None:
    """Draw the sides of n images: float64 (n,) pixels of the square of equal area; None: native."""
    if isinstance(resolution, Native):
        return None
    if isinstance(resolution, FixedSide):
        return np.full(n, resolution.px)
    if isinstance(resolution, UniformSide | UniformArea):
        share = rng.random(n)
    elif isinstance(resolution, NormalSide | NormalArea):
        normal = _truncated_normals(rng, n, resolution.mean, resolution.std, -1.0, 1.0)
        share = (normal + 1) / 2
    else:
        assert_never(resolution)
    low, high = resolution.low, resolution.high
    if isinstance(resolution, UniformArea | NormalArea):
        return np.sqrt(low * low + share * (high * high - low * low))
    return low + share * (high - low)


def patch_sizes_many(
    config: PackerConfig,
    uniforms: FloatArray,
    sizes: Int64Array,
    sides: FloatArray | None,
    images_seen: Int64Array,
) -> Int64Array:
    """Choose patch sizes as ``config.patch_sizes.choose`` does, in the same floats.

    Args:
        config: Its patch sizes are drawn.
        uniforms: float64 (n,) draws in [0, 1).
        sizes: int64 (n, 2) heights and widths in pixels, after the crop.
        sides: float64 (n,) sides of the squares of the drawn areas in pixels; None: native.
        images_seen: int64 (n,) images the run has seen before each.

    Returns:
        int64 (n,) sides of a patch in pixels.
    """
    drawn = config.patch_sizes
    assert not isinstance(drawn, OnePatchSize)
    candidates = np.array(drawn.sizes, np.int64)
    up_to = _shares_up_to(drawn, images_seen)
    total = up_to[:, -1:]
    first = np.zeros(len(sizes), np.int64)
    if drawn.within_budget:
        fits = np.stack([_fits(config, int(p), sizes, sides) for p in candidates], axis=1)
        first = np.where(fits.any(axis=1), fits.argmax(axis=1), len(candidates) - 1)
    below = np.take_along_axis(np.pad(up_to, ((0, 0), (1, 0))), first[:, None], axis=1)
    points = below + uniforms[:, None] * (total - below)
    last = (up_to < total).sum(axis=1)
    chosen: Int64Array = candidates[np.minimum((up_to <= points).sum(axis=1), last)]
    return chosen


def budgets_many(
    sides: FloatArray | None, patch_sizes: int | Int64Array, max_tokens: int
) -> int | Int64Array:
    """Return the token budgets that `packer.plan.resize.budget_from_side` gives, for many images.

    Args:
        sides: float64 (n,) sides of the squares of the drawn areas in pixels; None: native.
        patch_sizes: Side of a patch in pixels, one for all or int64 (n,).
        max_tokens: Token budget of an image.
    """
    if sides is None:
        return max_tokens
    areas: Int64Array = (sides * sides / patch_sizes**2).astype(np.int64)
    return np.clip(areas, 1, max_tokens)


def _shares_up_to(
    drawn: RandomPatchSize | ScheduledPatchSize, images_seen: Int64Array
) -> FloatArray:
    """Return (n, sizes), or one row for all: for each size the share of it and all smaller ones."""
    if isinstance(drawn, RandomPatchSize):
        return np.cumsum([drawn.shares()], axis=1)
    t = np.minimum(images_seen / drawn.images, 1.0)[:, None]
    first, last = np.array(drawn.shares(0)), np.array(drawn.shares(drawn.images))
    return np.cumsum((1 - t) * first + t * last, axis=1)


def _fits(
    config: PackerConfig, patch_size: int, sizes: Int64Array, sides: FloatArray | None
) -> npt.NDArray[np.bool_]:
    """Say of which images the resolution fits the budget, as `first_fitting` does."""
    native: npt.NDArray[np.bool_] = (
        np.maximum(sizes // patch_size, 1).prod(axis=1) <= config.image_budget
    )
    if sides is None:
        return native
    drawn = (sides * sides / patch_size**2).astype(np.int64) <= config.image_budget
    return drawn | native if config.resize == "shrink_only" else drawn


def _fill_budget_many(
    heights: Int64Array, widths: Int64Array, patch_size: int | Int64Array, budget: Int64Array
) -> tuple[Int64Array, Int64Array]:
    """Repeat the bisection of `plan_resize` step by step, in the same floats."""

    def rounded_up(sides: Int64Array, scale: FloatArray) -> Int64Array:
        return np.maximum(np.ceil(sides * scale / patch_size), 1).astype(np.int64)

    low, high = np.full(heights.shape, 1e-6), np.full(heights.shape, 100.0)
    while (high - low >= 1e-5).any():  # all intervals are of one width, so all end at once
        scale = (low + high) / 2
        fits = rounded_up(heights, scale) * rounded_up(widths, scale) <= budget
        low, high = np.where(fits, scale, low), np.where(fits, high, scale)
    rows, cols = rounded_up(heights, low), rounded_up(widths, low)
    return np.minimum(rows, budget), np.minimum(cols, np.maximum(budget // rows, 1))


def _scaled_beta(means: FloatArray, maximum: float, rng: np.random.Generator) -> FloatArray:
    """Draw ``u * maximum`` as `packer.plan.drop` does: u ~ Beta of mean ``means / maximum``."""
    u_mean = means / maximum
    return rng.beta(7 / 3 * u_mean, 7 / 3 * (1 - u_mean)) * maximum


def _truncated_normals(
    rng: np.random.Generator,
    n: int,
    mean: float,
    std: float,
    low: float | FloatArray,
    high: float,
) -> FloatArray:
    """Draw normal(mean, std) variates truncated to [low, high], ``low`` one for all or (n,)."""
    points = np.linspace(np.min(low), high, _BINS + 1) if n else np.array([0.0])
    normal = NormalDist(mean, std)
    cdf = np.array([normal.cdf(point) for point in points.tolist()])
    below = np.interp(low, points, cdf)
    drawn: FloatArray = np.interp(below + rng.random(n) * (cdf[-1] - below), cdf, points)
    return drawn


def _isqrt(values: Int64Array) -> Int64Array:
    """Integer square root; exact, as floats round only in the last place below 2**52."""
    roots: Int64Array = np.sqrt(values).astype(np.int64)
    roots -= roots * roots > values
    roots += (roots + 1) * (roots + 1) <= values
    return roots
