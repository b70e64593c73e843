"""Patch size of each image: one for all, drawn, or drawn along a curriculum (FlexiViT).

Sizes are drawn where crop and resolution are known, so that size and resolution share one token
budget: an image of many pixels gets a large patch before it would lose any of them.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isfinite

from packer.plan.draws import uniform
from packer.plan.resize import ResizePolicy
from packer.plan.types import ImageSize

FLEXIVIT_SIZES = (8, 10, 12, 15, 16, 20, 24, 30, 40, 48)
"""Patch sizes FlexiViT is trained at (arXiv:2212.08013): each divides its images of 240 pixels."""


@dataclass(frozen=True)
class OnePatchSize:
    """Give every image patches of `PackerConfig.patch_size`."""


class _Drawn(ABC):
    """What the ways to draw a size share."""

    sizes: tuple[int, ...]
    within_budget: bool

    @abstractmethod
    def shares(self, images_seen: int = 0) -> tuple[float, ...]:
        """Return the probability of each size before the budget is looked at; their sum is 1."""

    def choose(
        self,
        draw: int,
        size: ImageSize,
        side: float | None,
        max_tokens: int,
        *,
        policy: ResizePolicy = "shrink_only",
        images_seen: int = 0,
    ) -> int:
        """Return an image's patch size in pixels; arguments as for `first_fitting`."""
        first = 0
        if self.within_budget:
            first = first_fitting(self.sizes, size, side, max_tokens, policy)
        return choose_patch_size(self.sizes, self.shares(images_seen), draw, first)


@dataclass(frozen=True)
class RandomPatchSize(_Drawn):
    """Draw each image's patch size.

    Source: FlexiViT (arXiv:2212.08013), which draws one size for a whole step. Drawing it for each
    image, and within a token budget, is ours.
    """

    sizes: tuple[int, ...] = FLEXIVIT_SIZES
    """Sides of a patch in pixels, rising."""
    weights: tuple[float, ...] = ()
    """How often each size is drawn, to any scale; none: all equally often."""
    within_budget: bool = True
    """Whether an image is given only sizes at which its resolution fits the token budget, as often
    relative to each other as `weights` says, and the largest where none fits. Otherwise any size
    is drawn, and an image of too many tokens shrinks."""

    def __post_init__(self) -> None:
        _check_sizes("RandomPatchSize", self.sizes)
        if self.weights:
            _check_weights("RandomPatchSize: weights", self.weights, len(self.sizes))

    def shares(self, images_seen: int = 0) -> tuple[float, ...]:
        """Return the probability of each size before the budget is looked at; their sum is 1."""
        return _shares(self.weights or (1.0,) * len(self.sizes))


@dataclass(frozen=True)
class ScheduledPatchSize(_Drawn):
    """Draw each image's patch size from shares that move with the number of images seen.

    The shares go in a straight line from those of ``first`` to those of ``last`` and stay there: a
    curriculum, say from large patches, of which an image needs few, to small ones.
    """

    sizes: tuple[int, ...]
    """Sides of a patch in pixels, rising."""
    first: tuple[float, ...]
    """How often each size is drawn at the start of the run, to any scale."""
    last: tuple[float, ...]
    """How often each size is drawn from `images` on, to any scale."""
    images: int
    """Images seen by the whole run where the schedule ends."""
    within_budget: bool = True
    """As for `RandomPatchSize`."""

    def __post_init__(self) -> None:
        _check_sizes("ScheduledPatchSize", self.sizes)
        for name in ("first", "last"):
            _check_weights(f"ScheduledPatchSize: {name}", getattr(self, name), len(self.sizes))
        if isinstance(self.images, bool) or not isinstance(self.images, int) or self.images < 1:
            raise ValueError(
                f"ScheduledPatchSize: images must be a positive integer; got {self.images!r}. It "
                "is the number of images seen where the schedule ends."
            )

    def shares(self, images_seen: int = 0) -> tuple[float, ...]:
        """Return the probability of each size before the budget is looked at; their sum is 1."""
        t = min(images_seen / self.images, 1.0)
        pairs = zip(_shares(self.first), _shares(self.last), strict=True)
        return tuple((1 - t) * first + t * last for first, last in pairs)


PatchSizes = OnePatchSize | RandomPatchSize | ScheduledPatchSize


def choose_patch_size(
    sizes: Sequence[int], shares: Sequence[float], draw: int, first: int = 0
) -> int:
    """Draw one of ``sizes[first:]``, as often relative to each other as ``shares`` says.

    Args:
        sizes: Sides of a patch in pixels, rising.
        shares: Probability of each size.
        draw: 64-bit draw.
        first: Index of the smallest size allowed. Where none of those allowed has a share, the
            largest size that has one is taken.

    Returns:
        The side of a patch in pixels.
    """
    up_to = list(accumulate(shares))
    last = up_to.index(up_to[-1])  # the largest size that has a share
    below = up_to[first - 1] if first else 0.0
    point = below + uniform(draw) * (up_to[-1] - below)
    return sizes[min(bisect_right(up_to, point), last)]


def first_fitting(
    sizes: Sequence[int],
    size: ImageSize,
    side: float | None,
    max_tokens: int,
    policy: ResizePolicy = "shrink_only",
) -> int:
    """Return the index of the smallest patch at which an image's resolution fits a token budget.

    Args:
        sizes: Sides of a patch in pixels, rising.
        size: Native size in pixels, after the crop.
        side: Side in pixels of the square of the drawn area; None: native resolution.
        max_tokens: Token budget before dropping.
        policy: With "shrink_only" an image is never larger than it is, whatever side is drawn.

    Returns:
        An index into ``sizes``; that of the largest where none fits.
    """
    for index, patch in enumerate(sizes):
        native = max(size.height // patch, 1) * max(size.width // patch, 1) <= max_tokens
        if native and (side is None or policy == "shrink_only"):
            return index
        if side is not None and int(side * side / (patch * patch)) <= max_tokens:
            return index
    return len(sizes) - 1


def _shares(weights: Sequence[float]) -> tuple[float, ...]:
    total = sum(weights)
    return tuple(weight / total for weight in weights)


def _check_sizes(name: str, sizes: Sequence[int]) -> None:
    whole = all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)
    if not sizes or not whole or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
        raise ValueError(
            f"{name}: sizes must be positive integers, each larger than the one before; got "
            f"{sizes}. Sort them, and their weights with them."
        )


def _check_weights(name: str, weights: Sequence[float], count: int) -> None:
    if len(weights) != count:
        raise ValueError(
            f"{name} must have one entry for each of the {count} sizes; got {len(weights)}."
        )
    if not all(isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights) > 0:
        raise ValueError(
            f"{name} must not be negative, and one of them must be positive; got {weights}. 0 "
            "leaves a size out."
        )
