"""Planning at scale on sizes alone: lengths like a web data set's, and how they fill sequences.

A million images take seconds and no pixel is touched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from packer.config import PackerConfig
from packer.plan.balance import attention_costs
from packer.plan.many import FloatArray, Int64Array, plan_lengths
from packer.plan.place import Strategy, pack_lengths_timed


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
    return plan_lengths(laion_sizes(n, seed), config, rng, beta=beta)


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
    slots_unused: float
    """Share of image slots without an image where every sequence has E of them: the limit, or
    without one the largest count."""
    delay: float
    """Mean number of images pushed between an image's arrival and its sequence's completion."""
    delay_max: int
    delay_length_correlation: float
    """Correlation of an image's delay with its length."""
    lengths_per_second: float
    """Images placed per second by `pack_lengths` on one core."""


@dataclass(frozen=True)
class Placed:
    """A placement of n images in S sequences, as flat arrays."""

    lengths: Int64Array
    """int64 (n,) tokens of each image, in order of arrival."""
    seq_len: int
    """L."""
    max_images: int | None
    """E, or None."""
    order: Int64Array
    """int64 (n,) indices of the images, sequence after sequence."""
    counts: Int64Array
    """int64 (S,) images of each sequence."""
    completed: Int64Array
    """int64 (S,) index of the image whose arrival completed the sequence."""
    seconds: float
    """Time the placement took."""

    @property
    def delays(self) -> Int64Array:
        """int64 (n,) images pushed between each image's arrival and its sequence's completion."""
        delays = np.empty(len(self.lengths), np.int64)
        delays[self.order] = np.repeat(self.completed, self.counts) - self.order
        return delays

    def costs(self, width: int = 384) -> Int64Array:
        """Return each sequence's cost (S,) at model width ``width``; see `attention_cost`."""
        bounds = np.concatenate([[0], np.cumsum(self.counts)])
        return attention_costs(self.lengths[self.order], bounds, width)

    def overflow(self, max_images: int) -> int:
        """Count the images beyond ``max_images`` a sequence, which the paper's rule drops.

        Source: NaViT (arXiv:2307.06304), section 2.3: at most E_max pooled vectors a sequence.
        """
        return int(np.maximum(self.counts - max_images, 0).sum())

    def imbalance(
        self, *, num_ranks: int, sequences_per_batch: int, width: int = 384
    ) -> FloatArray:
        """Measure how uneven a step's cost is between ranks that each read a stream of their own.

        The sequences are cut into ``num_ranks`` equal runs, each one rank's stream; a step takes
        ``sequences_per_batch`` from every run.

        Args:
            num_ranks: Ranks.
            sequences_per_batch: B, sequences a rank takes each step.
            width: D, the model's width.

        Returns:
            float64 (steps,) largest / mean cost of a rank, less 1: how much longer the step takes
            than with even ranks. No steps if there are too few sequences for one.
        """
        steps = len(self.counts) // (num_ranks * sequences_per_batch)
        used = steps * sequences_per_batch * num_ranks
        costs = self.costs(width)[:used].reshape(num_ranks, steps, sequences_per_batch).sum(axis=2)
        return np.asarray(costs.max(axis=0) / costs.mean(axis=0) - 1)

    def report(self) -> PlacementReport:
        """Summarise the placement."""
        n, sequences = len(self.lengths), len(self.counts)
        tokens, most = int(self.lengths.sum()), int(self.counts.max())
        delays = self.delays
        least = max(-(-tokens // self.seq_len), -(-n // (self.max_images or n)))
        return PlacementReport(
            num_images=n,
            num_sequences=sequences,
            padding=1 - tokens / (self.seq_len * sequences),
            bound=1 - tokens / (self.seq_len * least),
            images_per_sequence=n / sequences,
            images_per_sequence_max=most,
            images_autocorrelation=_correlation(self.counts[:-1], self.counts[1:]),
            slots_unused=1 - n / (sequences * (self.max_images or most)),
            delay=float(delays.mean()),
            delay_max=int(delays.max()),
            delay_length_correlation=_correlation(delays, self.lengths),
            lengths_per_second=n / self.seconds,
        )


def place_lengths(
    lengths: Sequence[int] | npt.NDArray[np.integer[Any]],
    seq_len: int,
    *,
    strategy: Strategy = "exact",
    max_images: int | None = None,
    **options: int,
) -> Placed:
    """Place images of known lengths and keep the result as arrays; arguments as `pack_lengths`.

    Raises:
        ValueError: If there are no lengths, or one of them or a setting is wrong.
    """
    array = np.asarray(lengths)
    if not array.size:
        raise ValueError("a placement needs at least one length to be measured; got none.")
    start = perf_counter()
    sequences, completed = pack_lengths_timed(
        array, seq_len, strategy=strategy, max_images=max_images, **options
    )
    seconds = perf_counter() - start
    return Placed(
        lengths=array.astype(np.int64, copy=False),
        seq_len=seq_len,
        max_images=max_images,
        order=np.fromiter(chain.from_iterable(sequences), np.int64, array.size),
        counts=np.fromiter(map(len, sequences), np.int64, len(sequences)),
        completed=np.array(completed, dtype=np.int64),
        seconds=seconds,
    )


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
    placed = place_lengths(lengths, seq_len, strategy=strategy, max_images=max_images, **options)
    return placed.report()


def _correlation(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> float:
    """Pearson correlation; 0 where one side does not vary."""
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])
