"""Balance: which rank takes which sequences of a global step, so that no rank waits long.

Packed sequences cost the same in every layer but attention, which costs the sum of the squares of
their images' lengths: a sequence of few large images takes longer than one of many small ones.
Percent by which the costliest rank exceeds the mean, for the sequences `pack_lengths` makes of
400,000 LAION-like images (`laion_lengths` with ``beta=(5, 5)``, width 384), dealt out in order and
by `balance_steps`:

    ranks x sequences     8 x 4   8 x 8   64 x 4   64 x 8
    L = 1024, in order     3.0     2.1      5.0      3.5
    L = 1024, balanced     0.058   0.006    0.020    0.002
    L = 4096, in order    12.0     8.2     20.3     13.6
    L = 4096, balanced     0.25    0.023   0.11     0.007
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

_CHUNK = 1 << 22  # swaps looked at together: bounds memory to some 100 MB


def attention_cost(lengths: Sequence[int] | npt.NDArray[np.integer[Any]], width: int = 384) -> int:
    """Return what the images of one sequence cost, in units of ``4 * width`` multiply-adds a layer.

    A layer of width D takes 4 n^2 D operations for the scores and values of an image of n tokens,
    and 24 n D^2 for its projections and an MLP of ratio 4. Divided by 4 D that is n^2 + c n with
    c = 6 D.

    Args:
        lengths: Kept tokens of each image.
        width: D, the model's width; 384 is that of the size "s".

    Returns:
        The sum of n^2 + c n over the images; 0 for an empty sequence.

    Raises:
        ValueError: If ``width`` is not positive.
    """
    flat = np.asarray(lengths, dtype=np.int64)
    return int(attention_costs(flat, np.array([0, len(flat)]), width)[0])


def attention_costs(
    lengths: npt.NDArray[np.integer[Any]], bounds: npt.NDArray[np.integer[Any]], width: int = 384
) -> Int64Array:
    """Return the `attention_cost` of many sequences.

    Args:
        lengths: (n,) kept tokens of each image, sequence after sequence.
        bounds: (S + 1,) where each sequence starts in ``lengths``, and the end of the last.
        width: D, the model's width.

    Returns:
        int64 (S,) costs.

    Raises:
        ValueError: If ``width`` is not positive.
    """
    if width < 1:
        raise ValueError(f"width must be positive; got {width}. Give the model's width.")
    tokens = lengths.astype(np.int64)
    sums = np.concatenate([[0], np.cumsum(tokens * (tokens + 6 * width))])
    costs: Int64Array = np.diff(sums[bounds])
    return costs


def balance(
    costs: Sequence[int] | npt.NDArray[np.integer[Any]], ranks: int, per_rank: int
) -> Int64Array:
    """Deal the sequences of one global step out to ranks, so that the costliest has little.

    Args:
        costs: Cost of each of the ``ranks * per_rank`` sequences, at least 0.
        ranks: Ranks that work in step.
        per_rank: Sequences of each rank.

    Returns:
        int64 (ranks, per_rank): the indices of each rank's sequences, rising; each index once. The
        largest sum of costs of a rank is never above that of dealing them out in order.

    Raises:
        ValueError: If ``costs`` is not ``ranks * per_rank`` long, or a cost is negative.
    """
    dealt: Int64Array = balance_steps(np.asarray(costs, np.int64)[None], ranks, per_rank)[0]
    return dealt


def balance_steps(costs: npt.NDArray[np.integer[Any]], ranks: int, per_rank: int) -> Int64Array:
    """Do what `balance` does for many global steps at once: (G, ranks * per_rank) costs.

    The costliest sequence that is left goes to the rank with the least so far that has room; then,
    while it helps, the costliest rank swaps a sequence with another rank. A million sequences take
    some 3 seconds.

    Returns:
        int64 (G, ranks, per_rank) indices into a step's sequences.

    Raises:
        ValueError: As `balance`.
    """
    if ranks < 1 or per_rank < 1:
        raise ValueError(
            f"ranks and per_rank must be at least 1; got ranks={ranks}, per_rank={per_rank}."
        )
    if costs.ndim != 2 or costs.shape[1] != ranks * per_rank or (costs < 0).any():
        raise ValueError(
            f"a step must have ranks * per_rank ({ranks * per_rank}) costs of at least 0; got an "
            f"array {costs.shape} with minimum {costs.min(initial=0)}. Empty sequences cost 0."
        )
    steps = len(costs)
    dealt = np.empty((steps, ranks, per_rank), np.int64)
    chunk = max(1, _CHUNK // (ranks * per_rank * per_rank))
    for start in range(0, steps, chunk):
        part = costs[start : start + chunk].astype(np.int64)
        dealt[start : start + chunk] = _balance_chunk(part, ranks, per_rank)
    dealt.sort(axis=2)
    return dealt


def imbalance(costs_by_rank: npt.NDArray[np.integer[Any] | np.floating[Any]]) -> float:
    """Return by which share the costliest rank exceeds the mean rank, averaged over steps.

    Args:
        costs_by_rank: (G, ranks) cost of each rank in each global step. A step without any cost
            counts as even.

    Returns:
        The mean of ``max / mean - 1``; 0 is perfectly even, and 0 without a step.
    """
    costs = np.asarray(costs_by_rank, dtype=np.float64)
    means = costs.mean(axis=1)
    busy = means > 0
    if not busy.any():
        return 0.0
    return float(np.sum(costs[busy].max(axis=1) / means[busy] - 1) / len(costs))


def _balance_chunk(costs: Int64Array, ranks: int, per_rank: int) -> Int64Array:
    in_order = np.arange(ranks * per_rank).reshape(1, ranks, per_rank)
    in_order = np.repeat(in_order, len(costs), axis=0)
    dealt = _improve(costs, _greedy(costs, ranks, per_rank))
    # Greedy promises no more than a multiple of the optimum, and the given order may be one.
    worse = _largest(costs, dealt) > _largest(costs, in_order)
    dealt[worse] = _improve(costs[worse], in_order[worse])
    return dealt


def _greedy(costs: Int64Array, ranks: int, per_rank: int) -> Int64Array:
    """Give the costliest sequence left to the rank with the least cost that has room."""
    steps = np.arange(len(costs))
    loads = np.zeros((len(costs), ranks), np.int64)
    counts = np.zeros((len(costs), ranks), np.int64)
    dealt = np.empty((len(costs), ranks, per_rank), np.int64)
    full = np.iinfo(np.int64).max
    for sequence in np.argsort(-costs, axis=1, kind="stable").T:
        rank = np.where(counts < per_rank, loads, full).argmin(axis=1)
        dealt[steps, rank, counts[steps, rank]] = sequence
        loads[steps, rank] += costs[steps, sequence]
        counts[steps, rank] += 1
    return dealt


def _improve(costs: Int64Array, dealt: Int64Array) -> Int64Array:
    """Swap sequences of the costliest rank while the larger of the two ranks' sums falls."""
    steps, ranks, per_rank = dealt.shape
    held = _held(costs, dealt)
    sums = held.sum(axis=2)
    active = np.arange(steps)
    # Every swap lowers the step's sorted sums, so this ends; some 2 swaps a rank are usual.
    for _ in range(64 * ranks):
        if not len(active):
            break
        here = np.arange(len(active))
        top = sums[active].argmax(axis=1)
        highest = sums[active, top]
        # What the top rank loses by swapping its i-th for rank r's j-th sequence: (step, i, r, j).
        less = held[active, top][:, :, None, None] - held[active][:, None]
        larger = np.maximum(
            highest[:, None, None, None] - less, sums[active][:, None, :, None] + less
        )
        best = larger.reshape(len(active), -1).argmin(axis=1)
        helps = larger.reshape(len(active), -1)[here, best] < highest
        active, top, best = active[helps], top[helps], best[helps]
        mine, rank, other = np.unravel_index(best, (per_rank, ranks, per_rank))
        for array in (dealt, held):
            array[active, top, mine], array[active, rank, other] = (
                array[active, rank, other],
                array[active, top, mine],
            )
        sums[active] = held[active].sum(axis=2)
    return dealt


def _held(costs: Int64Array, dealt: Int64Array) -> Int64Array:
    """Return the costs of the sequences each rank holds, (G, ranks, per_rank)."""
    return costs[np.arange(len(costs))[:, None, None], dealt]


def _largest(costs: Int64Array, dealt: Int64Array) -> Int64Array:
    largest: Int64Array = _held(costs, dealt).sum(axis=2).max(axis=1)
    return largest
