"""What every stage of a cascade says of a set of images: the table that thresholds are solved on.

Integers and floats on the host: no model, no image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NEVER = 2.0
"""A threshold no confidence reaches: every image goes on."""


@dataclass(frozen=True, eq=False)
class StageOutcomes:
    """Every stage's answer for each of N labelled images, also where a cascade would not ask it.

    Axes: K stages, cheapest first; N images.
    """

    confidence: npt.NDArray[np.float64]
    """(K, N) confidence in [0, 1], such as the largest probability; NaN is taken as 0."""
    correct: npt.NDArray[np.bool_]
    """(K, N) whether the stage's answer is right."""
    cost: npt.NDArray[np.float64]
    """(K, N) what running the stage costs, in tokens, operations or any unit; 0 where an image need
    not be run again, since an earlier stage saw the same pixels."""

    def __post_init__(self) -> None:
        confidence = np.nan_to_num(np.asarray(self.confidence, np.float64), nan=0.0)
        correct, cost = np.asarray(self.correct, np.bool_), np.asarray(self.cost, np.float64)
        shape = confidence.shape
        if len(shape) != 2 or 0 in shape or correct.shape != shape or cost.shape != shape:
            raise ValueError(
                "confidence, correct and cost must be (stages, images), at least one of each; got "
                f"{shape}, {correct.shape} and {cost.shape}."
            )
        if confidence.min() < 0 or confidence.max() > 1:
            raise ValueError(
                f"confidence must be in [0, 1]; got {confidence.min()} to {confidence.max()}. Give "
                "probabilities, not logits."
            )
        if not (np.isfinite(cost).all() and cost.min() >= 0):
            raise ValueError(f"cost must be finite and not negative; got {cost.min()}.")
        for name, value in (("confidence", confidence), ("correct", correct), ("cost", cost)):
            object.__setattr__(self, name, value)

    @property
    def num_stages(self) -> int:
        """K."""
        return len(self.confidence)

    @property
    def num_images(self) -> int:
        """N."""
        return int(self.confidence.shape[1])

    @property
    def spent(self) -> npt.NDArray[np.float64]:
        """(K, N) cost of an image that leaves at a stage: that stage's and all before it."""
        return np.cumsum(self.cost, axis=0)

    def select(self, images: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> "StageOutcomes":
        """Return the table of some of the images, by mask or index."""
        return StageOutcomes(
            self.confidence[:, images], self.correct[:, images], self.cost[:, images]
        )

    def route(self, thresholds: Sequence[float]) -> npt.NDArray[np.int64]:
        """Return the stage each image leaves at: the first whose threshold its confidence reaches.

        Args:
            thresholds: K - 1 values; the last stage keeps what it gets.

        Raises:
            ValueError: If there are not K - 1 thresholds.
        """
        check_thresholds(thresholds, self.num_stages)
        leaves = np.ones((self.num_stages, self.num_images), np.bool_)
        leaves[:-1] = self.confidence[:-1] >= np.asarray(thresholds, np.float64)[:, None]
        stages: npt.NDArray[np.int64] = leaves.argmax(0).astype(np.int64)
        return stages

    def correct_at(self, stages: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether each image is right, leaving at the stage given for it."""
        return self.correct[stages, np.arange(self.num_images)]

    def spent_at(self, stages: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Cost of each image, leaving at the stage given for it."""
        return self.spent[stages, np.arange(self.num_images)]

    def exit_fractions(self, stages: npt.NDArray[np.int64]) -> tuple[float, ...]:
        """Return the share of images that leaves at each of the K stages."""
        counts = np.bincount(stages, minlength=self.num_stages)
        return tuple(float(count) / self.num_images for count in counts)


@dataclass(frozen=True, eq=False)
class RandomRouting:
    """Images sent on at random: the least a cascade's confidences must beat.

    Each image leaves at stage k with the probability that a cascade's exit fractions give, whatever
    its confidence. Its right answers and its cost are their expectations, so that no draw adds
    noise.
    """

    correct: npt.NDArray[np.float64]
    """(N,) probability that an image is answered right."""
    spent: npt.NDArray[np.float64]
    """(N,) expected cost of an image."""

    @classmethod
    def of(cls, outcomes: StageOutcomes, exit_fractions: Sequence[float]) -> "RandomRouting":
        """Route at random with these exit fractions.

        Args:
            outcomes: Every stage's answers.
            exit_fractions: K shares that sum to 1.

        Raises:
            ValueError: If they are no K shares that sum to 1.
        """
        shares = check_fractions(exit_fractions)
        if len(shares) != outcomes.num_stages:
            raise ValueError(
                f"exit_fractions must have one entry a stage ({outcomes.num_stages}); got "
                f"{len(shares)}."
            )
        weights = np.asarray(shares)
        return cls(weights @ outcomes.correct.astype(np.float64), weights @ outcomes.spent)


def check_thresholds(thresholds: Sequence[float], num_stages: int) -> tuple[float, ...]:
    """Return K - 1 thresholds as floats.

    Raises:
        ValueError: If there are more or fewer, or one is negative or not finite.
    """
    values = tuple(float(value) for value in thresholds)
    if len(values) != num_stages - 1:
        raise ValueError(
            f"thresholds must be one fewer than the {num_stages} stages, as the last one keeps "
            f"what it gets; got {len(values)}."
        )
    if not all(0 <= value < float("inf") for value in values):
        raise ValueError(
            f"a threshold must be at least 0 and finite (above 1: no image leaves); got {values}."
        )
    return values


def check_fractions(fractions: Sequence[float]) -> tuple[float, ...]:
    """Return exit fractions as floats that sum to 1.

    Raises:
        ValueError: If one is negative, or their sum is not 1.
    """
    values = tuple(float(value) for value in fractions)
    if not values or not min(values) >= 0 or not abs(sum(values) - 1) < 1e-6:
        raise ValueError(
            f"exit fractions must not be negative and must sum to 1; got {values}, which sum to "
            f"{sum(values)}."
        )
    return values
