"""Subset sums on integer bitsets: which of the waiting images fill the rest of a sequence.

Bit s of a Python integer says "some subset holds s tokens"; adding an image of length n to every
subset is one shift. A set of a thousand sums costs sixteen machine words a step.
"""

from collections.abc import Sequence


def fullest_subset(lengths: Sequence[int], target: int, max_items: int | None = None) -> list[int]:
    """Choose lengths whose sum is as near to the target as possible without exceeding it.

    Where several subsets are equally full, the one whose last member comes earliest is chosen,
    and again so among its other members: with lengths in order of arrival, the oldest images.

    Args:
        lengths: Positive lengths in tokens, the most wanted first.
        target: Largest sum allowed, in tokens.
        max_items: Most lengths that may be chosen; None sets no limit.

    Returns:
        Positions in ``lengths``, rising; empty if nothing fits.
    """
    fitting = [position for position, length in enumerate(lengths) if length <= target]
    values = [lengths[position] for position in fitting]
    chosen = _unlimited(values, target)
    if max_items is not None and len(chosen) > max_items:
        # Only now, since counting the members multiplies the size of the bitset.
        chosen = _at_most(values, target, max_items)
    return [fitting[index] for index in chosen]


def longest_single(lengths: Sequence[int], target: int) -> list[int]:
    """Do what `fullest_subset` does where no two lengths fit together, without sums of subsets.

    Args:
        lengths: Positive lengths in tokens, the most wanted first.
        target: Largest length allowed; below the sum of any two.

    Returns:
        The position of the first of the longest lengths that fit; empty if none does.
    """
    longest = max([length for length in lengths if length <= target], default=0)
    return [lengths.index(longest)] if longest else []


def _unlimited(lengths: Sequence[int], target: int) -> list[int]:
    mask, goal = (2 << target) - 1, 1 << target
    reached, before = 1, []
    for length in lengths:
        before.append(reached)
        reached |= (reached << length) & mask
        if reached & goal:
            break
    rest = reached.bit_length() - 1
    chosen = []
    for position in range(len(before) - 1, -1, -1):
        if not before[position] >> rest & 1:  # the sum cannot be reached without this one
            chosen.append(position)
            rest -= lengths[position]
    return chosen[::-1]


def _at_most(lengths: Sequence[int], target: int, max_items: int) -> list[int]:
    """Solve the same with at most ``max_items`` members, one row of bits for each count.

    Rows are 2 target + 1 bits wide, so that a sum beyond the target ends in the unused half of
    its row, where the mask removes it, and never in the next row.
    """
    width = 2 * target + 1
    row = (2 << target) - 1
    rows = [row << width * count for count in range(max_items + 1)]
    mask = sum(rows)
    goals = sum(1 << width * count + target for count in range(max_items + 1))
    reached, before = 1, []
    for length in lengths:
        before.append(reached)
        reached |= (reached << width + length) & mask
        if reached & goals:
            break
    sums = [(reached >> width * count & row).bit_length() - 1 for count in range(max_items + 1)]
    rest = max(sums)
    count = sums.index(rest)
    chosen = []
    for position in range(len(before) - 1, -1, -1):
        if not before[position] >> width * count + rest & 1:
            chosen.append(position)
            rest -= lengths[position]
            count -= 1
    return chosen[::-1]
