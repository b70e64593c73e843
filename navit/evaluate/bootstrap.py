"""How sure a difference is: a paired bootstrap over the images two methods have answered."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Interval:
    """A mean with the range a share of resampled means lies in."""

    mean: float
    """Mean of the values."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""


def paired_bootstrap(
    first: npt.NDArray[np.float64],
    second: npt.NDArray[np.float64],
    *,
    resamples: int = 2000,
    share: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Compare two methods on the same images: the mean of first - second.

    Args:
        first: (N,) value of each image, such as 1 where it is answered right.
        second: (N,) the same of the other method.
        resamples: How often N images are drawn with replacement.
        share: Of the resampled means that lie within the interval, as many on either side.
        seed: Seed of the draws.

    Raises:
        ValueError: If the two differ in length, or are empty.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13, the
    percentile interval.
    """
    if np.shape(first) != np.shape(second) or np.ndim(first) != 1 or not len(first):
        raise ValueError(
            "both methods must have a value for each of the same images; got shapes "
            f"{np.shape(first)} and {np.shape(second)}."
        )
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    rng = np.random.default_rng(seed)
    # Few values differ, so that how often each occurs says all, and no image need be drawn.
    values, counts = np.unique(difference, return_counts=True)
    drawn = rng.multinomial(len(difference), counts / len(difference), size=resamples)
    means = drawn @ values / len(difference)
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2]).tolist()
    return Interval(float(difference.mean()), low, high)
