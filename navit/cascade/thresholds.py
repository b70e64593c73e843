"""Thresholds of a cascade, solved from a validation set for wanted exits or a wanted mean cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp
from typing import Any, Protocol

import numpy as np

from navit.cascade.outcomes import (
    NEVER,
    StageOutcomes,
    check_fractions,
    check_thresholds,
)
from navit.cascade.search import best_thresholds
from navit.serialize import from_plain, to_plain


@dataclass(frozen=True)
class CascadeThresholds:
    """When an image leaves: solved thresholds, with what they came to where they were solved."""

    values: tuple[float, ...]
    """One a stage but the last: an image of at least this confidence leaves. 0 lets all leave, a
    value above 1 none."""
    rule: str
    """How they were solved."""
    exit_fractions: tuple[float, ...]
    """Share of the solving set's images that left at each stage."""
    mean_cost: float
    """Mean cost of an image of the solving set, in the unit of its costs."""
    accuracy: float
    """Share of the solving set's images answered right."""
    images: int
    """Images of the solving set."""

    def __post_init__(self) -> None:
        check_thresholds(self.values, len(self.exit_fractions))
        check_fractions(self.exit_fractions)

    @classmethod
    def of(cls, outcomes: StageOutcomes, values: Sequence[float], rule: str) -> "CascadeThresholds":
        """Note what thresholds come to on a set of images."""
        stages = outcomes.route(values)
        return cls(
            tuple(float(value) for value in values),
            rule,
            outcomes.exit_fractions(stages),
            float(outcomes.spent_at(stages).mean()),
            float(outcomes.correct_at(stages).mean()),
            outcomes.num_images,
        )

    def to_json(self) -> dict[str, Any]:
        """Turn into JSON values."""
        plain: dict[str, Any] = to_plain(self)
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "CascadeThresholds":
        """Read what `to_json` made; it is checked again.

        Raises:
            ValueError: If it is of another version, or not what thresholds can be.
        """
        return from_plain(cls, plain)


class ThresholdRule(Protocol):
    """A way to solve thresholds."""

    def solve(self, outcomes: StageOutcomes) -> CascadeThresholds:
        """Return the thresholds that follow from a labelled set of images."""


@dataclass(frozen=True)
class ExitFractions:
    """So many images leave at each stage, its most confident ones; labels are not looked at."""

    fractions: tuple[float, ...]
    """Share of all images that leaves at each stage; they sum to 1."""

    def __post_init__(self) -> None:
        check_fractions(self.fractions)

    def solve(self, outcomes: StageOutcomes) -> CascadeThresholds:
        """Return the thresholds that let these shares leave, within half an image.

        Images of equal confidence leave together.

        Raises:
            ValueError: If there is not one fraction a stage.
        """
        return _leave_in_turn(outcomes, self.fractions, f"exits {_shares(self.fractions)}")


@dataclass(frozen=True)
class GeometricExits:
    """Exit fractions proportional to q^k at the k-th stage, k = 1 .. K.

    Source: DVT (arXiv:2105.15075), the authors' code; as for MSDNet (arXiv:1703.09844), budgeted
    batch classification.
    """

    q: float
    """Below 1 most images leave early, above 1 late; 1 lets equal shares leave."""

    def __post_init__(self) -> None:
        if not 0 < self.q < float("inf"):
            raise ValueError(f"q must be positive and finite; got {self.q}.")

    def fractions(self, num_stages: int) -> tuple[float, ...]:
        """Return the share that leaves at each of so many stages."""
        logs = np.log(self.q) * np.arange(1, num_stages + 1)
        powers = np.exp(logs - logs.max())  # of a large q alone, a high power overflows
        return tuple(float(power) for power in powers / powers.sum())

    def solve(self, outcomes: StageOutcomes) -> CascadeThresholds:
        """Return the thresholds that let these shares leave; see `ExitFractions.solve`."""
        shares = self.fractions(outcomes.num_stages)
        return _leave_in_turn(outcomes, shares, f"exits proportional to q^k, q = {self.q:.4g}")

    @classmethod
    def for_cost(cls, outcomes: StageOutcomes, mean_cost: float) -> "GeometricExits":
        """Find the q that spends most without exceeding a mean cost.

        Args:
            outcomes: The solving set.
            mean_cost: Largest mean cost of an image, in the unit of the costs.

        Raises:
            ValueError: If it is below the first stage's.
        """
        check_affordable(outcomes, mean_cost)
        low, high = -30.0, 30.0  # of log q: all but e^-30 leave at the first stage, at the last
        for _ in range(50):
            middle = (low + high) / 2
            found = cls(exp(middle)).solve(outcomes).mean_cost
            low, high = (middle, high) if found <= mean_cost else (low, middle)
        return cls(exp(low))


@dataclass(frozen=True)
class AlphaFraction:
    """The fraction alpha of the images with the smallest largest probability is run again.

    Source: NaViT (arXiv:2307.06304), appendix D, a cascade of two stages. With several alphas, our
    extension, each is the share of all images that the next stage sees.
    """

    alphas: tuple[float, ...]
    """Share of all images that runs at the second stage, the third, ...; falling, in [0, 1]."""

    def __post_init__(self) -> None:
        shares = (1.0, *self.alphas, 0.0)
        if not self.alphas or any(not later <= share for share, later in pairwise(shares)):
            raise ValueError(
                f"alphas must be shares in [0, 1], none larger than the one before; got "
                f"{self.alphas}."
            )

    def solve(self, outcomes: StageOutcomes) -> CascadeThresholds:
        """Return the thresholds below which these shares lie; see `ExitFractions.solve`.

        Raises:
            ValueError: If there is not one alpha a stage after the first.
        """
        shares = (1.0, *self.alphas, 0.0)
        exits = tuple(share - later for share, later in pairwise(shares))
        return _leave_in_turn(outcomes, exits, f"alpha fraction {_shares(self.alphas)}")


@dataclass(frozen=True)
class BudgetSearch:
    """The most accurate thresholds whose mean cost stays within a budget.

    The problem is the paper's, the search is ours: every value of the last threshold is swept for
    each of a grid of values of the others, then each threshold in turn. For two stages this is the
    exact optimum on the solving set; for more it is never worse there than `GeometricExits` within
    the same budget.

    Source: DVT (arXiv:2105.15075), adaptive inference with thresholds from a validation set.
    """

    mean_cost: float
    """Largest mean cost of an image, in the unit of the costs."""

    def solve(self, outcomes: StageOutcomes) -> CascadeThresholds:
        """Search.

        Raises:
            ValueError: If the budget is below the first stage's mean cost.
        """
        check_affordable(outcomes, self.mean_cost)
        starts = [GeometricExits.for_cost(outcomes, self.mean_cost)]
        starts += [GeometricExits(step / 20) for step in range(2, 40, 2)]  # the authors' range
        values = best_thresholds(
            outcomes, self.mean_cost, [start.solve(outcomes).values for start in starts]
        )
        rule = f"most accurate at a mean cost of at most {self.mean_cost:.6g}"
        return CascadeThresholds.of(outcomes, values, rule)


def check_affordable(outcomes: StageOutcomes, mean_cost: float) -> None:
    """Refuse a budget that running every image at the first stage exceeds.

    Raises:
        ValueError: If it is.
    """
    least = float(outcomes.cost[0].mean())
    if not mean_cost >= least:
        raise ValueError(
            f"the mean cost must be at least that of the first stage, which sees every image "
            f"({least:.6g}); got {mean_cost:.6g}. Raise it, or give a cheaper first stage."
        )


def _leave_in_turn(
    outcomes: StageOutcomes, fractions: Sequence[float], rule: str
) -> CascadeThresholds:
    """Let each stage's most confident images leave, as many as its fraction says."""
    if len(fractions) != outcomes.num_stages:
        raise ValueError(
            f"there must be an exit fraction for each of the {outcomes.num_stages} stages; got "
            f"{len(fractions)}."
        )
    gone = np.zeros(outcomes.num_images, np.bool_)
    # Rounded together, so that the roundings of many stages do not add up.
    until = np.rint(np.cumsum(fractions) * outcomes.num_images).astype(np.int64)
    values = []
    for confidence, left in zip(outcomes.confidence[:-1], until, strict=False):
        waiting = np.sort(confidence[~gone])[::-1]
        leaving = int(left) - int(gone.sum())
        if leaving >= len(waiting):
            value = 0.0
        elif leaving <= 0:
            value = NEVER
        else:
            value = float(waiting[leaving - 1])
        values.append(value)
        gone |= confidence >= value
    return CascadeThresholds.of(outcomes, values, rule)


def _shares(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.3g}" for value in values)
