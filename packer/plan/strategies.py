"""The strategies of `packer.plan.place`, over lengths and stamps: image k has stamp k."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from packer.plan.subset_sum import fullest_subset, longest_single

_FIRST_TRIED = 8  # images tried as a sequence's first: 8 instead of 1 halves the padding at L = 256


class Engine(ABC):
    """A strategy over stamps: the k-th image pushed has stamp k."""

    now: int
    """Images pushed so far."""

    @abstractmethod
    def extend(self, lengths: Sequence[int], completed: list[int] | None = None) -> list[list[int]]:
        """Add images and return the stamps of every sequence this completes.

        To ``completed`` is added, for each sequence, the stamp of the image that completed it.
        """

    @abstractmethod
    def flush(self) -> list[list[int]]:
        """Place everything held back and return it."""

    @abstractmethod
    def rows(self) -> list[tuple[int, int, int]]:
        """Return (stamp, length, sequence) of each image held back, in order of arrival."""

    @abstractmethod
    def load(self, rows: list[tuple[int, int, int]]) -> None:
        """Replace all images held back by these rows; the counter of pushes stays."""


class ExactWindow(Engine):
    """A window of waiting images from which sequences are filled to the last token.

    A sequence starts with the oldest images, as many as leave room for some two more, which are
    then chosen: one or two images that fill the room exactly, the oldest such; else any subset
    that does (`fullest_subset`). Where none does, the sequence may start with one of the next
    oldest images instead; the fullest found is built. An image of ``max_age`` is always first.
    All state is the window itself, so a list of (length, age) restores it.
    """

    def __init__(self, seq_len: int, max_images: int, window: int, max_age: int) -> None:
        self.now = 0
        self._seq_len, self._max_images = seq_len, max_images
        self._window, self._max_age = window, max_age
        self._clear()

    def _clear(self) -> None:
        self._lengths: list[int] = []  # waiting images in order of arrival, and their stamps
        self._stamps: list[int] = []
        self._tokens = 0
        self._least = self._seq_len  # no waiting image is shorter
        # Waiting images of each length; twice as long as needed, so that a negative index finds 0.
        self._counts = [0] * (2 * self._seq_len + 1)

    def extend(self, lengths: Sequence[int], completed: list[int] | None = None) -> list[list[int]]:
        """Let images wait; build a sequence whenever one is due."""
        built = []
        start, end = 0, len(lengths)
        while start < end:
            # Nothing can become due before the window is full or its oldest image of age.
            arriving = self._window - len(self._lengths)
            of_age = (self._stamps[0] if self._stamps else self.now) + self._max_age + 1 - self.now
            if of_age < arriving:
                arriving = of_age
            stop = start + arriving if arriving > 1 else start + 1
            self._add(lengths[start:stop])
            start = stop
            while self._is_due():
                built.append(self._build())
                if completed is not None:
                    completed.append(self.now - 1)
        return built

    def flush(self) -> list[list[int]]:
        """Build sequences until the window is empty."""
        built = []
        while self._lengths:
            built.append(self._build())
        return built

    def rows(self) -> list[tuple[int, int, int]]:
        """Return the window; -1 says that no image is in a sequence yet."""
        return [(stamp, n, -1) for stamp, n in zip(self._stamps, self._lengths, strict=True)]

    def load(self, rows: list[tuple[int, int, int]]) -> None:
        """Replace the window."""
        self._clear()
        self._add([length for _, length, _ in rows])
        self.now -= len(rows)
        self._stamps = [stamp for stamp, _, _ in rows]

    def _add(self, lengths: Sequence[int]) -> None:
        start = self.now
        self.now += len(lengths)
        self._lengths += lengths
        self._stamps += range(start, self.now)
        self._tokens += sum(lengths)
        counts, least = self._counts, self._least
        for length in lengths:
            counts[length] += 1
            if length < least:
                least = length
        self._least = least

    def _is_aged(self) -> bool:
        return self.now - 1 - self._stamps[0] >= self._max_age

    def _is_due(self) -> bool:
        waiting, tokens = len(self._lengths), self._tokens
        if waiting >= self._window and (
            tokens >= 2 * self._seq_len or waiting >= 2 * self._max_images
        ):
            return True
        if tokens < self._seq_len and waiting < self._max_images:
            return False
        return self.now - 1 - self._stamps[0] >= self._max_age

    def _build(self) -> list[int]:
        """Remove the images of one sequence from the window and return their stamps."""
        first = 0
        end, chosen, room = self._compose(0)
        if room:
            first, end, chosen, room = self._fullest(end, chosen, room)
        self._tokens -= self._seq_len - room
        lengths, stamps, counts = self._lengths, self._stamps, self._counts
        sequence = stamps[first:end]
        for length in lengths[first:end]:
            counts[length] -= 1
        del lengths[first:end], stamps[first:end]
        if chosen:
            for position in reversed(chosen):
                counts[lengths.pop(position)] -= 1
                sequence.append(stamps.pop(position))
            sequence.sort()  # by stamp is by position
        return sequence

    def _fullest(self, end: int, chosen: list[int], room: int) -> tuple[int, int, list[int], int]:
        """Start with the next oldest images instead, where that leaves less room.

        Args:
            end: What `_compose` found for the oldest image.
            chosen: As above.
            room: As above, not 0.

        Returns:
            First position, and what `_compose` found for it.
        """
        waiting = len(self._lengths)
        # Where E mean images fill less than 3/4 of a sequence, E of them are as good as any others.
        short_of_slots = 4 * self._tokens * self._max_images < 3 * self._seq_len * waiting
        best = 0, end, chosen, room
        for first in range(1, 1 if self._is_aged() else min(_FIRST_TRIED, waiting)):
            if short_of_slots and end - first + 1 + len(chosen) == self._max_images:
                break
            end, chosen, room = self._compose(first)
            if room < best[3]:
                best = first, end, chosen, room
            if not room:
                break
        return best

    def _compose(self, first: int) -> tuple[int, list[int], int]:
        """Choose a sequence that starts with the image at position ``first`` of the window.

        Returns:
            It holds the images from ``first`` up to this position, and those at these positions,
            rising, of a window without the former; the room left, in tokens.
        """
        lengths = self._lengths
        waiting = len(lengths)
        room = self._seq_len - lengths[first]
        end = first + 1
        # Room for 2.5 mean images is where one or two chosen ones most often fill it exactly.
        enough = 5 * self._tokens // (2 * waiting)
        last = first + self._max_images - 2  # which leaves two slots for them
        if last > waiting:
            last = waiting
        while room > enough and end < last and (length := lengths[end]) <= room:
            room -= length
            end += 1
        slots = self._max_images - end + first
        if not room or not slots:
            return end, [], room
        if room < self._least:
            return end, [], room
        rest = lengths[end:] if first == 0 else lengths[:first] + lengths[end:]
        chosen = self._exact_pair(rest, room, slots)
        if chosen:
            return end, chosen, 0
        # Where no two fit together, which is usual with images near L, no sums are needed.
        if room < 2 * self._shortest():
            chosen = longest_single(rest, room)
        else:
            chosen = fullest_subset(rest, room, slots)
        return end, chosen, room - sum([rest[position] for position in chosen])

    def _shortest(self) -> int:
        """Return the length of the shortest waiting image."""
        counts, least = self._counts, self._least
        while not counts[least]:
            least += 1
        self._least = least
        return least

    def _exact_pair(self, rest: list[int], room: int, slots: int) -> list[int]:
        """Return the positions of one or two images that fill the room exactly, else nothing."""
        counts = self._counts  # of the whole window: what is found may not be in the rest
        if counts[room] and room in rest:
            return [rest.index(room)]
        if slots > 1:
            for position, length in enumerate(rest):
                if counts[room - length]:
                    # An earlier partner would have found this image already.
                    try:
                        return [position, rest.index(room - length, position + 1)]
                    except ValueError:
                        continue
        return []


class Greedy(Engine):
    """First fit and best fit over a bounded number of open sequences; next fit is one of them."""

    def __init__(self, seq_len: int, max_images: int, open_sequences: int, *, best: bool) -> None:
        self.now = 0
        self._seq_len, self._max_images = seq_len, max_images
        self._open_sequences, self._best = open_sequences, best
        self._clear()

    def _clear(self) -> None:
        self._rooms: list[int] = []  # tokens free in each open sequence, the oldest first
        self._members: list[list[tuple[int, int]]] = []  # its (stamp, length) pairs

    def extend(self, lengths: Sequence[int], completed: list[int] | None = None) -> list[list[int]]:
        """Place images; a sequence closes when it is full or another must be opened."""
        closed = []
        for length in lengths:
            index = self._choose(length)
            if index is None:
                if len(self._rooms) == self._open_sequences:
                    closed.append(self._close(self._rooms.index(min(self._rooms))))
                    if completed is not None:
                        completed.append(self.now)
                self._rooms.append(self._seq_len)
                self._members.append([])
                index = len(self._rooms) - 1
            self._rooms[index] -= length
            self._members[index].append((self.now, length))
            if not self._rooms[index] or len(self._members[index]) == self._max_images:
                closed.append(self._close(index))
                if completed is not None:
                    completed.append(self.now)
            self.now += 1
        return closed

    def flush(self) -> list[list[int]]:
        """Close all open sequences, the oldest first."""
        return [self._close(0) for _ in list(self._rooms)]

    def rows(self) -> list[tuple[int, int, int]]:
        """Return the images of the open sequences, which count from the oldest one."""
        return sorted(
            (stamp, length, sequence)
            for sequence, members in enumerate(self._members)
            for stamp, length in members
        )

    def load(self, rows: list[tuple[int, int, int]]) -> None:
        """Open sequences that hold these images."""
        self._clear()
        count = 1 + max((sequence for _, _, sequence in rows), default=-1)
        self._rooms = [self._seq_len] * count
        self._members = [[] for _ in range(count)]
        for stamp, length, sequence in rows:
            self._rooms[sequence] -= length
            self._members[sequence].append((stamp, length))

    def _choose(self, length: int) -> int | None:
        """Return the open sequence for an image, or None; full ones were closed at once."""
        chosen = None
        least = self._seq_len + 1
        for index, room in enumerate(self._rooms):
            if length <= room < least:
                chosen, least = index, room
                if not self._best or room == length:
                    break
        return chosen

    def _close(self, index: int) -> list[int]:
        del self._rooms[index]
        return [stamp for stamp, _ in self._members.pop(index)]
