"""Placement by the plainest means: enumeration, and the greedy strategies word for word."""

from collections.abc import Sequence
from itertools import combinations
from math import isqrt


def fullest_sum(lengths: Sequence[int], target: int, max_items: int | None = None) -> int:
    """Return the largest subset sum not above the target, by trying every subset."""
    most = len(lengths) if max_items is None else min(max_items, len(lengths))
    return max(
        total
        for size in range(most + 1)
        for subset in combinations(lengths, size)
        if (total := sum(subset)) <= target
    )


def fullest_front(lengths: Sequence[int], seq_len: int, first_tried: int) -> int:
    """Return the tokens of the sequence that `exact` builds from a window, by enumeration.

    A sequence starts with consecutive images while there is room for more than 2.5 mean ones; the
    best subset of all others joins them. The fullest over the first images tried counts.
    """
    most = 0
    for first in range(min(first_tried, len(lengths))):
        end, used = first + 1, lengths[first]
        while (
            end < len(lengths)
            and seq_len - used > 5 * sum(lengths) // (2 * len(lengths))
            and used + lengths[end] <= seq_len
        ):
            used += lengths[end]
            end += 1
        others = [*lengths[:first], *lengths[end:]]
        most = max(most, used + fullest_sum(others, seq_len - used))
    return most


def next_fit(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Fill one sequence after another; the yardstick of placement speed."""
    sequences: list[list[int]] = []
    sequence: list[int] = []
    room = seq_len
    for index, length in enumerate(lengths):
        if length > room:
            sequences.append(sequence)
            sequence = []
            room = seq_len
        sequence.append(index)
        room -= length
    if sequence:
        sequences.append(sequence)
    return sequences


def first_fit(lengths: Sequence[int], seq_len: int, max_images: int) -> list[list[int]]:
    """Put each image into the first sequence with room, none ever closed (NeurIPS app. B.3)."""
    sequences: list[list[int]] = []
    for index, length in enumerate(lengths):
        for sequence in sequences:
            used = sum(lengths[member] for member in sequence)
            if used + length <= seq_len and len(sequence) < max_images:
                sequence.append(index)
                break
        else:
            sequences.append([index])
    return sequences


def best_fit(lengths: Sequence[int], seq_len: int, max_images: int) -> list[list[int]]:
    """Put each image into the fullest sequence with room, none ever closed."""
    sequences: list[list[int]] = []
    for index, length in enumerate(lengths):
        rooms = [seq_len - sum(lengths[member] for member in sequence) for sequence in sequences]
        fitting = [
            (room, position)
            for position, room in enumerate(rooms)
            if room >= length and len(sequences[position]) < max_images
        ]
        if fitting:
            sequences[min(fitting)[1]].append(index)
        else:
            sequences.append([index])
    return sequences


def grid(
    height: int, width: int, patch_size: int, max_tokens: int, enlarge: bool
) -> tuple[int, int]:
    """Return the rows and columns of patches of an image within its token budget."""
    rows, cols = max(1, height // patch_size), max(1, width // patch_size)
    if enlarge or rows * cols > max_tokens:
        rows = max(1, min(max_tokens, isqrt(max_tokens * height // width)))
        cols = max(1, min(max_tokens, isqrt(max_tokens * width // height)))
    return rows, cols
