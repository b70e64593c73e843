"""Segments of similar lengths padded together: few large calls instead of one for each length.

A batch of photographs has about a hundred distinct lengths. On a GPU a call costs microseconds
whatever its size, so going over the lengths one by one takes longer than the arithmetic. Sorted
segments fall into buckets whose longest is at most twice the shortest: one bucket a doubling, and
never more than twice as many places as tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from navit.model.transfer import to_device

MAX_STRETCH = 2
"""Longest over shortest segment of a bucket, at most."""


@dataclass(frozen=True)
class Bucket:
    """Neighbouring segments, padded to the longest of them: count * longest places."""

    start: int
    """First token."""
    num_tokens: int
    """Tokens of the bucket, which are contiguous."""
    count: int
    """Segments."""
    longest: int
    """Length of the longest segment, in tokens."""
    padding: "Padding | None"
    """Where the padding is; None where all segments are equally long."""

    def pad(self, x: Float[Tensor, "T rest"]) -> Float[Tensor, "count longest rest"]:
        """Take the bucket's tokens out of all T; padding repeats the segment's last token."""
        tokens = x[self.start : self.start + self.num_tokens]
        if self.padding is not None:
            tokens = tokens.index_select(0, self.padding.source)
        return tokens.view(self.count, self.longest, *x.shape[1:])

    def unpad(self, x: Float[Tensor, "count longest rest"]) -> Float[Tensor, "tokens rest"]:
        """Leave out the padding."""
        places = x.flatten(0, 1)
        return places if self.padding is None else places.index_select(0, self.padding.places)


@dataclass(frozen=True)
class Padding:
    """Which places of a bucket are padding."""

    source: Int64[Tensor, " places"]
    """Token of the bucket that each place holds: its own segment's last one in padding, so that
    what is not finite in one segment reaches no other."""
    places: Int64[Tensor, " tokens"]
    """Place of each token."""
    is_padding: Bool[Tensor, "count longest"]
    """Which places are padding."""


def make_buckets(lengths: Sequence[int], device: torch.device) -> list[Bucket]:
    """Cut segments, sorted by length or not, into buckets.

    Args:
        lengths: Positive length of each segment, in tokens, in token order.
        device: Where the tokens are.
    """
    buckets, start = [], 0
    for few in _cut(lengths):
        sizes = np.asarray(few, dtype=np.int64)
        tokens, longest = int(sizes.sum()), int(sizes.max())
        padding = None if sizes.min() == longest else _padding(sizes, device)
        buckets.append(Bucket(start, tokens, len(few), longest, padding))
        start += tokens
    return buckets


def _cut(lengths: Sequence[int]) -> Iterator[Sequence[int]]:
    first = shortest = longest = 0
    for index, length in enumerate(lengths):
        low, high = min(shortest, length), max(longest, length)
        if index > first and high <= MAX_STRETCH * low:
            shortest, longest = low, high
            continue
        if index > first:
            yield lengths[first:index]
        first, shortest, longest = index, length, length
    if lengths:
        yield lengths[first:]


def _padding(sizes: Int64[np.ndarray, " count"], device: torch.device) -> Padding:
    column = np.arange(sizes.max())
    starts = np.cumsum(sizes) - sizes
    source = starts[:, None] + np.minimum(column, sizes[:, None] - 1)
    is_padding = column >= sizes[:, None]
    return Padding(
        source=to_device(source.ravel(), device),
        places=to_device(np.flatnonzero(~is_padding), device),
        is_padding=to_device(is_padding, device),
    )
