"""Placement: which images share a sequence of L tokens (NaViT section 2.3; NeurIPS app. B.3).

The paper's greedy opens a new sequence when an image fits nowhere and reaches "below 2 %" padding
by tuning L. `exact` lets a bounded window of images wait and fills each sequence from it to the
last token. Percent padding on 200,000 LAION-like images (`python -m benchmarks.bench_place`):

    strategy     L = 256   L = 1024   L = 4096   L = 256, sides U(64, 256), no drop
    exact          0.002     0.0001      0.003    0.68
    best_fit       1.36      0.19        0.026    1.42
    first_fit      1.96      0.29        0.032    1.64
    next_fit      23.9      19.9        13.3     24.4
    bound          0.0004    0.0001      0.003    0.0000
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from packer.plan.strategies import Engine, ExactWindow, Greedy

T = TypeVar("T")
Strategy = Literal["exact", "best_fit", "first_fit", "next_fit"]


@dataclass(frozen=True)
class Placement:
    """Strategy that places images into sequences, and the bounds on what it may hold back."""

    strategy: Strategy = "exact"
    """"exact" fills sequences from a window of waiting images; the others place on arrival:
    "best_fit" where least room stays, "first_fit" (the paper) where there is room first,
    "next_fit" in the only open sequence."""
    window: int = 128
    """exact: images that wait before a sequence is built; more while they hold under 2 L tokens."""
    max_age: int = 512
    """exact: pushes (images arriving later) after which a waiting image is placed at once."""
    open_sequences: int = 64
    """best_fit, first_fit: sequences open at a time; one more closes the fullest."""

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            names = ", ".join(map(repr, get_args(Strategy)))
            raise ValueError(f"placement strategy must be one of {names}; got {self.strategy!r}.")
        for name in ("window", "max_age", "open_sequences"):
            _check_positive(f"Placement: {name}", getattr(self, name))


class PendingImage(NamedTuple):
    """An image a `Placer` holds back: one row of its state."""

    item: Any
    """The caller's object."""
    length: int
    """Its tokens."""
    age: int
    """Images pushed after it."""
    sequence: int
    """Open sequence it is in, counted from the oldest one; -1 while it waits unplaced (exact)."""


class Placer(Generic[T]):
    """Places a stream of images: push them one by one, receive completed sequences.

    With "exact" an image waits at most ``max_age`` pushes, or ``max_age + window`` where so few
    tokens wait that only newer images can fill its sequence; only if ``window`` images in a row
    hold less than ``seq_len`` tokens (and fewer than ``max_images``) can it wait longer, since
    age alone never closes a sequence that cannot be filled.

    Args:
        seq_len: L, token places per sequence.
        placement: Strategy and bounds.
        max_images: E, the paper's E_max: most images a sequence may hold; None sets no limit.
            The paper drops images beyond it; here they are placed elsewhere.

    Raises:
        ValueError: If ``seq_len`` or ``max_images`` is not a positive integer.
    """

    def __init__(
        self, seq_len: int, *, placement: Placement | None = None, max_images: int | None = None
    ) -> None:
        self._seq_len = seq_len
        self._engine = make_engine(seq_len, placement or Placement(), max_images)
        self._items: dict[int, T] = {}

    def push(self, length: int, item: T) -> list[list[T]]:
        """Add an image and return the sequences this completes, each in its order of images.

        Args:
            length: The image's tokens, between 1 and ``seq_len``.
            item: Stands for the image in the output; never looked at.

        Raises:
            ValueError: If ``length`` is out of range; the placer is unchanged.
        """
        if not 1 <= length <= self._seq_len:
            raise ValueError(
                f"length must be between 1 and seq_len ({self._seq_len}); got {length} for "
                f"{item!r}. Lower max_tokens or raise seq_len."
            )
        self._items[self._engine.now] = item
        return self._emit(self._engine.extend((length,)))

    def flush(self) -> list[list[T]]:
        """Place everything still held back and return it; the placer is empty and usable again."""
        return self._emit(self._engine.flush())

    @property
    def pending(self) -> list[PendingImage]:
        """Images pushed and not yet returned, in order of arrival."""
        last = self._engine.now - 1
        return [
            PendingImage(self._items[stamp], length, last - stamp, sequence)
            for stamp, length, sequence in self._engine.rows()
        ]

    def snapshot(self) -> list[tuple[T, int, int, int]]:
        """Return the whole state: (item, length, age, sequence) of each pending image.

        Replace the items by ids that `json` can store, and pass the rows to `restore`.
        """
        return [(row.item, row.length, row.age, row.sequence) for row in self.pending]

    def restore(self, rows: Iterable[Sequence[Any]]) -> None:
        """Continue from a snapshot of a placer with the same settings, exactly as it would have.

        Args:
            rows: (item, length, age, sequence) of each pending image in order of arrival.

        Raises:
            ValueError: If the rows cannot come from such a placer; this one is unchanged.
        """
        items: dict[int, T] = {}
        loaded: list[tuple[int, int, int]] = []
        now = self._engine.now
        for item, length, age, sequence in rows:
            stamp = now - 1 - age
            in_order = age >= 0 and (not loaded or stamp > loaded[-1][0])
            unplaced = isinstance(self._engine, ExactWindow)
            if not (in_order and 1 <= length <= self._seq_len and (sequence < 0) == unplaced):
                raise ValueError(
                    "restore needs the rows of a snapshot (item, length, age, sequence), oldest "
                    f"first, with the same strategy and seq_len ({self._seq_len}); got "
                    f"{(item, length, age, sequence)!r}. Give the settings of the snapshot."
                )
            items[stamp] = item
            loaded.append((stamp, length, sequence))
        self._items = items
        self._engine.load(loaded)

    def _emit(self, sequences: list[list[int]]) -> list[list[T]]:
        take = self._items.pop
        return [[take(stamp) for stamp in stamps] for stamps in sequences]


def pack_lengths(
    lengths: Sequence[int] | npt.NDArray[np.integer[Any]],
    seq_len: int,
    *,
    strategy: Strategy = "exact",
    max_images: int | None = None,
    **options: int,
) -> list[list[int]]:
    """Place images of known lengths; equal to pushing them into a `Placer` and flushing it.

    Args:
        lengths: Tokens of each image, in order of arrival.
        seq_len: L, token places per sequence.
        strategy: See `Placement`.
        max_images: E, most images in a sequence; None sets no limit.
        options: The other fields of `Placement`.

    Returns:
        For every sequence the indices of its images, in its order; each index exactly once.

    Raises:
        ValueError: If a length is not an integer between 1 and ``seq_len``, or a setting is wrong.
    """
    engine, checked = _checked(lengths, seq_len, strategy, max_images, options)
    return engine.extend(checked) + engine.flush()


def pack_lengths_timed(
    lengths: Sequence[int] | npt.NDArray[np.integer[Any]],
    seq_len: int,
    *,
    strategy: Strategy = "exact",
    max_images: int | None = None,
    **options: int,
) -> tuple[list[list[int]], list[int]]:
    """Place images as `pack_lengths` does, and say when each sequence was complete.

    Returns:
        The sequences, and for each the index of the image whose arrival completed it; the last
        image's for those that were flushed.

    Raises:
        ValueError: As `pack_lengths`.
    """
    engine, checked = _checked(lengths, seq_len, strategy, max_images, options)
    completed: list[int] = []
    sequences = engine.extend(checked, completed) + engine.flush()
    return sequences, completed + [len(checked) - 1] * (len(sequences) - len(completed))


def _checked(
    lengths: Sequence[int] | npt.NDArray[np.integer[Any]],
    seq_len: int,
    strategy: Strategy,
    max_images: int | None,
    options: dict[str, int],
) -> tuple[Engine, list[int]]:
    """Check the arguments of `pack_lengths`; return the engine and the lengths as integers."""
    known = [field.name for field in fields(Placement) if field.name != "strategy"]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"pack_lengths knows the options {', '.join(known)}; got {unknown[0]!r}.")
    engine = make_engine(seq_len, Placement(strategy, **options), max_images)
    array = np.asarray(lengths)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(
            f"lengths must be a flat list of integers; got {array.dtype} {array.shape}. "
            "Pass the number of tokens of each image."
        )
    wrong = np.flatnonzero((array < 1) | (array > seq_len))
    if wrong.size:
        index = int(wrong[0])
        raise ValueError(
            f"lengths must be between 1 and seq_len ({seq_len}); got lengths[{index}] = "
            f"{array[index]}. Lower max_tokens or raise seq_len."
        )
    values: list[int] = array.tolist()
    return engine, values


def make_engine(seq_len: int, placement: Placement, max_images: int | None) -> Engine:
    """Return the strategy's engine, over lengths and stamps; arguments as for `Placer`."""
    _check_positive("seq_len", seq_len)
    if max_images is not None:
        _check_positive("max_images", max_images)
    limit = seq_len if max_images is None else min(max_images, seq_len)
    if placement.strategy == "exact":
        return ExactWindow(seq_len, limit, placement.window, placement.max_age)
    open_sequences = 1 if placement.strategy == "next_fit" else placement.open_sequences
    return Greedy(seq_len, limit, open_sequences, best=placement.strategy == "best_fit")


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer; got {value!r}.")
