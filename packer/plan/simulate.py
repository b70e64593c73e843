"""Planning at scale on sizes alone: lengths like a web data set's, and how they fill sequences.

A million images take seconds and no pixel is touched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from packer.config import PackerConfig
from packer.plan.drop import BetaDrop, ConstantDrop, NoDrop
from packer.plan.place import Placement, Placer, Strategy, pack_lengths
from packer.plan.resize import Native, NoCrop, ResizePolicy
from packer.plan.types import ImageSize

Int64Array = npt.NDArray[np.int64]


def laion_sizes(n: int, seed: int = 0) -> npt.NDArray[np.int32]:
    """Draw image sizes like those of LAION-400M.

    The short side is lognormal(5.564, 0.685) pixels, long / short is exp|N(0, 0.32)|, both
    orientations are equally likely. At patch 16 the median is 340 tokens; 21 % exceed 1,024.

    Args:
        n: Number of images.
        seed: Equal seeds give equal sizes, and a larger n another set.

    Returns:
        int32 (n, 2) heights and widths in pixels, at least 1.
    """
    rng = np.random.default_rng(seed)
    short = np.exp(rng.normal(5.564, 0.685, n))
    long = short * np.exp(np.abs(rng.normal(0.0, 0.32, n)))
    pixels = np.maximum(np.rint(np.stack([short, long], axis=1)), 1)
    sides: npt.NDArray[np.int32] = pixels.astype(np.int32)
    portrait = rng.random(n) < 0.5
    sides[portrait] = sides[portrait, ::-1]
    return sides


def laion_lengths(
    n: int,
    config: PackerConfig,
    seed: int = 0,
    *,
    beta: tuple[int | float, int | float] | None = None,
) -> npt.NDArray[np.int32]:
    """Push LAION-like sizes through the configuration's crop, resolution, resize and token drop.

    The draws are of the configuration's distributions but not those of any sample key. Limits
    that skip images (`max_pixels`, `max_aspect_ratio`) are not applied.

    Args:
        n: Number of images.
        config: Only `seq_len` and the settings of the plan are read.
        seed: Seed of sizes and draws; `config.seed` is not used.
        beta: (a, b) of a Beta distribution that replaces `config.token_drop`, unscaled. (5, 5)
            is what placement is compared on; no `BetaDrop` is that narrow, as its a + b is 7/3.

    Returns:
        int32 (n,) kept tokens of each image, between 1 and `config.seq_len`.
    """
    rng = np.random.default_rng([seed, 1])  # not the stream of the sizes
    sizes = _crop(laion_sizes(n, seed).astype(np.int64), config, rng)
    budgets = _budgets(config, rng, n)
    rows, cols = plan_resize_many(
        sizes[:, 0],
        sizes[:, 1],
        patch_size=config.patch_size,
        max_tokens=budgets,
        policy=config.resize,
    )
    tokens = rows * cols
    rates = rng.beta(*beta, n) if beta is not None else _drop_rates(config, rng, tokens)
    kept: Int64Array = np.maximum(tokens - np.floor(rates * tokens).astype(np.int64), 1)
    return kept.astype(np.int32)


def plan_resize_many(
    heights: Int64Array,
    widths: Int64Array,
    *,
    patch_size: int,
    max_tokens: int | Int64Array,
    policy: ResizePolicy = "shrink_only",
) -> tuple[Int64Array, Int64Array]:
    """Choose patch grids as `packer.plan.resize.plan_resize` does, for many images at once.

    Args:
        heights: int64 (n,) pixels, at least 1.
        widths: int64 (n,) pixels, at least 1.
        patch_size: Side of a patch in pixels.
        max_tokens: Token budget before dropping, one for all or int64 (n,).
        policy: See `plan_resize`.

    Returns:
        int64 (n,) rows and int64 (n,) columns.

    Raises:
        ValueError: If a side, a budget or `patch_size` is not positive.
    """
    budget = np.broadcast_to(np.asarray(max_tokens, dtype=np.int64), heights.shape)
    if patch_size < 1 or any((values < 1).any() for values in (heights, widths, budget)):
        raise ValueError(
            "heights, widths, patch_size and max_tokens must be positive; got minima "
            f"{heights.min()}, {widths.min()}, {patch_size}, {budget.min()}."
        )
    rows, cols = np.maximum(heights // patch_size, 1), np.maximum(widths // patch_size, 1)
    resized = np.ones(len(rows), bool) if policy == "allow_enlarge" else rows * cols > budget
    fitted_rows = np.clip(_isqrt(budget * heights // widths), 1, budget)
    fitted_cols = np.clip(_isqrt(budget * widths // heights), 1, budget)
    return np.where(resized, fitted_rows, rows), np.where(resized, fitted_cols, cols)


@dataclass(frozen=True)
class PlacementReport:
    """How well a placement filled sequences, what it made images wait, and how fast it was."""

    num_images: int
    num_sequences: int
    padding: float
    """Share of token places left empty, in [0, 1)."""
    bound: float
    """Padding of ceil(tokens / L) sequences (or images / E if more): no placement has less."""
    images_per_sequence: float
    """Mean."""
    images_per_sequence_max: int
    images_autocorrelation: float
    """Correlation of the image counts of neighbouring sequences."""
    delay: float
    """Mean number of images pushed between an image's arrival and its sequence's completion."""
    delay_max: int
    delay_length_correlation: float
    """Correlation of an image's delay with its length."""
    lengths_per_second: float
    """Images placed per second by `pack_lengths` on one core."""


def placement_report(
    lengths: Sequence[int] | npt.NDArray[np.integer[Any]],
    seq_len: int,
    *,
    strategy: Strategy = "exact",
    max_images: int | None = None,
    **options: int,
) -> PlacementReport:
    """Place images of known lengths and measure the result; arguments as for `pack_lengths`.

    Raises:
        ValueError: If there are no lengths, or one of them or a setting is wrong.
    """
    sizes = np.asarray(lengths)
    if not sizes.size:
        raise ValueError("placement_report needs at least one length; got none.")
    start = perf_counter()
    pack_lengths(sizes, seq_len, strategy=strategy, max_images=max_images, **options)
    seconds = perf_counter() - start

    placer = Placer[int](seq_len, placement=Placement(strategy, **options), max_images=max_images)
    counts: list[int] = []
    delays = np.zeros(len(sizes))
    for now, length in enumerate(sizes.tolist()):
        for sequence in placer.push(length, now):
            counts.append(len(sequence))
            for index in sequence:
                delays[index] = now - index
    for sequence in placer.flush():
        counts.append(len(sequence))
        for index in sequence:
            delays[index] = len(sizes) - 1 - index

    tokens = int(sizes.sum())
    least = max(-(-tokens // seq_len), -(-len(sizes) // (max_images or len(sizes))))
    return PlacementReport(
        num_images=len(sizes),
        num_sequences=len(counts),
        padding=1 - tokens / (seq_len * len(counts)),
        bound=1 - tokens / (seq_len * least),
        images_per_sequence=len(sizes) / len(counts),
        images_per_sequence_max=max(counts),
        images_autocorrelation=_correlation(np.array(counts[:-1]), np.array(counts[1:])),
        delay=float(delays.mean()),
        delay_max=int(delays.max()),
        delay_length_correlation=_correlation(delays, sizes),
        lengths_per_second=len(sizes) / seconds,
    )


def _crop(sizes: Int64Array, config: PackerConfig, rng: np.random.Generator) -> Int64Array:
    if isinstance(config.crop, NoCrop):
        return sizes
    boxes = [
        config.crop.box(ImageSize(height, width), draw)
        for (height, width), draw in zip(sizes.tolist(), _draws(rng, len(sizes)), strict=True)
    ]
    return np.array([(box.height, box.width) for box in boxes], dtype=np.int64).reshape(-1, 2)


def _budgets(config: PackerConfig, rng: np.random.Generator, n: int) -> Int64Array:
    """Draw token budgets as `packer.plan.resize.budget_from_side` gives them."""
    if isinstance(config.resolution, Native):
        return np.full(n, config.image_budget, dtype=np.int64)
    sides = np.array([config.resolution.side(draw) for draw in _draws(rng, n)])
    areas: Int64Array = (sides * sides / config.patch_size**2).astype(np.int64)
    return np.clip(areas, 1, config.image_budget)


def _drop_rates(
    config: PackerConfig, rng: np.random.Generator, tokens: Int64Array
) -> npt.NDArray[np.float64]:
    drop = config.token_drop
    if isinstance(drop, NoDrop | ConstantDrop):
        return np.full(len(tokens), drop.rate(1, 0))
    if isinstance(drop, BetaDrop):
        # Its keyed draws seed one generator an image, which takes 10 s a million.
        u_mean = drop.mean / drop.maximum
        return rng.beta(7 / 3 * u_mean, 7 / 3 * (1 - u_mean), len(tokens)) * drop.maximum
    draws = _draws(rng, len(tokens))
    return np.array([drop.rate(n, draw) for n, draw in zip(tokens.tolist(), draws, strict=True)])


def _draws(rng: np.random.Generator, n: int) -> list[int]:
    draws: list[int] = rng.integers(0, 2**64, n, dtype=np.uint64).tolist()
    return draws


def _isqrt(values: Int64Array) -> Int64Array:
    """Integer square root; exact, as floats round only in the last place below 2**52."""
    roots: Int64Array = np.sqrt(values).astype(np.int64)
    roots -= roots * roots > values
    roots += (roots + 1) * (roots + 1) <= values
    return roots


def _correlation(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> float:
    """Pearson correlation; 0 where one side does not vary."""
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])
