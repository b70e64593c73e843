"""Token dropping: how many of an image's tokens are kept, and which (NaViT section 2.2)."""

import random
from dataclasses import dataclass
from math import exp, floor

import numpy as np
import numpy.typing as npt

from packer.plan.draws import truncated_normal


@dataclass(frozen=True)
class NoDrop:
    """Keep every token."""

    def rate(self, num_tokens: int, draw: int, images_seen: int = 0) -> float:
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

    def rate(self, num_tokens: int, draw: int, images_seen: int = 0) -> float:
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

    def rate(self, num_tokens: int, draw: int, images_seen: int = 0) -> float:
        """Return the share of tokens dropped, in [0, maximum)."""
        return _scaled_beta(draw, self.mean, self.maximum)


@dataclass(frozen=True)
class ResolutionDrop:
    """Drop more of a larger image: a narrow distribution around a mean that grows with length.

    The rate is normal(mu, std) truncated to mu +- 2 std. mu rises linearly from ``low`` for an
    image of ``min_tokens`` tokens to ``high`` at ``max_tokens``, and stays level outside.

    Source: NaViT (arXiv:2307.06304), NeurIPS appendix B.6 "Token dropping", resolution-dependent
    rates with std 0.02. Cutting the distribution at 0, where mu is below 2 std, is ours.
    """

    low: float = 0.1
    """Mean drop rate of an image of `min_tokens` tokens."""
    high: float = 0.5
    """Mean drop rate of an image of `max_tokens` tokens; below `low` to drop more of small ones."""
    min_tokens: int = 16
    """Tokens before dropping where the mean is `low`."""
    max_tokens: int = 1024
    """Tokens before dropping where the mean is `high`."""
    std: float = 0.02
    """Standard deviation before truncation."""

    def __post_init__(self) -> None:
        if not self.std > 0 or not all(
            mean >= 0 and mean + 2 * self.std < 1 for mean in (self.low, self.high)
        ):
            raise ValueError(
                "ResolutionDrop: need std > 0 and low, high in [0, 1 - 2 std); got "
                f"low={self.low}, high={self.high}, std={self.std}. They are shares of tokens "
                "dropped."
            )
        if not 1 <= self.min_tokens < self.max_tokens:
            raise ValueError(
                "ResolutionDrop: need 1 <= min_tokens < max_tokens; got "
                f"min_tokens={self.min_tokens}, max_tokens={self.max_tokens}."
            )

    def mean(self, num_tokens: int) -> float:
        """Return the mean drop rate of an image of ``num_tokens`` tokens."""
        place = (num_tokens - self.min_tokens) / (self.max_tokens - self.min_tokens)
        return self.low + (self.high - self.low) * min(max(place, 0.0), 1.0)

    def rate(self, num_tokens: int, draw: int, images_seen: int = 0) -> float:
        """Return the share of tokens dropped, within two standard deviations of the mean."""
        mean = self.mean(num_tokens)
        low = max(mean - 2 * self.std, 0.0)
        return truncated_normal(draw, mean, self.std, low, mean + 2 * self.std)


@dataclass(frozen=True)
class ScheduledDrop:
    """Move the drop rate with the number of images seen, along a sigmoid.

    rho(n) = low + (high - low) sigmoid((n - midpoint) / tau): rising for tau > 0, falling for
    tau < 0, constant where ``low`` equals ``high``. Every image gets rho(n) itself or, with
    ``maximum``, a keyed draw of the distribution of `BetaDrop` with that mean.

    Source: NaViT (arXiv:2307.06304), NeurIPS appendix B.7 "Scheduled token dropping rates", range
    [0.2, 0.8]; falling is the paper's best. The distribution around rho(n) is ours.
    """

    midpoint: float
    """Images seen by the whole run where the rate is half way; mu in the paper."""
    tau: float
    """Images in which the schedule moves from 0.5 to 0.73 of its way; negative: it falls."""
    low: float = 0.2
    """Smallest drop rate of the schedule."""
    high: float = 0.8
    """Largest drop rate of the schedule."""
    maximum: float | None = None
    """Largest drop rate of an image, above `high`; None gives every image the schedule's rate."""

    def __post_init__(self) -> None:
        if self.tau == 0:
            raise ValueError(
                "ScheduledDrop: tau must not be 0; got 0. Negative lets the rate fall, positive "
                "rise."
            )
        if not 0 <= self.low <= self.high < 1:
            raise ValueError(
                f"ScheduledDrop: need 0 <= low <= high < 1; got low={self.low}, high={self.high}. "
                "A negative tau lets the rate fall."
            )
        if self.maximum is not None and not (self.low > 0 and self.high < self.maximum < 1):
            raise ValueError(
                "ScheduledDrop: a distribution needs 0 < low and high < maximum < 1; got "
                f"low={self.low}, high={self.high}, maximum={self.maximum}. None draws none."
            )

    def mean(self, images_seen: int) -> float:
        """Return rho(n), the schedule's drop rate after ``images_seen`` images."""
        x = (images_seen - self.midpoint) / self.tau
        risen = 1 / (1 + exp(-x)) if x > 0 else exp(x) / (1 + exp(x))  # exp never overflows
        return self.low + (self.high - self.low) * risen

    def rate(self, num_tokens: int, draw: int, images_seen: int = 0) -> float:
        """Return the share of tokens dropped after ``images_seen`` images."""
        mean = self.mean(images_seen)
        return mean if self.maximum is None else _scaled_beta(draw, mean, self.maximum)


TokenDrop = NoDrop | ConstantDrop | BetaDrop | ResolutionDrop | ScheduledDrop


def _scaled_beta(draw: int, mean: float, maximum: float) -> float:
    """Draw ``u * maximum``, u ~ Beta with mean u_mu = mean / maximum, variance .3 u_mu (1 - u_mu).

    Source: NaViT (arXiv:2307.06304), NeurIPS appendix B.6 "Beta distribution".
    """
    u_mean = mean / maximum
    return random.Random(draw).betavariate(7 / 3 * u_mean, 7 / 3 * (1 - u_mean)) * maximum


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
