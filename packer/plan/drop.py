"""Token dropping: how many of an image's tokens are kept, and which (NaViT section 2.2)."""

import random
from dataclasses import dataclass
from math import floor

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class NoDrop:
    """Keep every token."""

    def rate(self, num_tokens: int, draw: int) -> float:
        """Return the share of tokens dropped, 0."""
        return 0.0


@dataclass(frozen=True)
class ConstantDrop:
    """Drop the same share of every image's tokens (other tokens for every image and epoch)."""

    drop_rate: float = 0.5
    """Share of tokens left out, in [0, 1)."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop_rate < 1:
            raise ValueError(
                f"ConstantDrop: drop_rate must be in [0, 1); got {self.drop_rate}. "
                "It is the share of tokens left out; 1 would leave nothing."
            )

    def rate(self, num_tokens: int, draw: int) -> float:
        """Return the share of tokens dropped."""
        return self.drop_rate


@dataclass(frozen=True)
class BetaDrop:
    """Draw each image's drop rate from a scaled Beta distribution.

    d = u * maximum with u ~ Beta(a, b), mean u_mu = mean / maximum and variance
    0.3 u_mu (1 - u_mu), hence a = 7/3 u_mu and b = 7/3 (1 - u_mu).

    Source: NaViT (arXiv:2307.06304), NeurIPS appendix B.6 "Beta distribution", Figure 15a.
    """

    mean: float = 0.25
    """Mean drop rate."""
    maximum: float = 0.4
    """Largest drop rate (d_max in the paper), above `mean` and below 1."""

    def __post_init__(self) -> None:
        if not 0 < self.mean < self.maximum < 1:
            raise ValueError(
                f"BetaDrop: need 0 < mean < maximum < 1; got mean={self.mean}, "
                f"maximum={self.maximum}. Both are shares of tokens dropped."
            )

    def rate(self, num_tokens: int, draw: int) -> float:
        """Return the share of tokens dropped, in [0, maximum)."""
        u_mean = self.mean / self.maximum
        u = random.Random(draw).betavariate(7 / 3 * u_mean, 7 / 3 * (1 - u_mean))
        return u * self.maximum


TokenDrop = NoDrop | ConstantDrop | BetaDrop


def num_kept_tokens(num_tokens: int, rate: float) -> int:
    """Return how many of ``num_tokens`` stay at a drop rate: ``max(1, n - floor(rate * n))``."""
    return max(1, num_tokens - floor(rate * num_tokens))


def kept_indices(num_tokens: int, num_kept: int, draw: int) -> npt.NDArray[np.int64]:
    """Choose which tokens stay: a uniform random subset, in rising order.

    Args:
        num_tokens: Tokens of the full grid.
        num_kept: Size of the subset, between 1 and ``num_tokens``.
        draw: 64-bit draw; equal draws give equal subsets.

    Returns:
        int64 (num_kept,) indices into the row-major grid.
    """
    if num_kept == num_tokens:
        return np.arange(num_tokens)
    # Raw bits of PCG64 are stable across numpy releases, which Generator methods are not.
    noise = np.random.PCG64(draw).random_raw(num_tokens)
    return np.sort(np.argpartition(noise, num_kept - 1)[:num_kept])
