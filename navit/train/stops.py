"""How a run ends before its last step: asked to, out of time, or because a rank is gone."""

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType
from typing import TypeVar

import torch.distributed as dist

from navit.train.ranks import World

T = TypeVar("T")

_CONNECTION_SIGNS = ("gloo", "nccl", "connection", "timed out", "timeout", "broken pipe", "socket")
"""What the messages of collectives that lost a rank have in common: they have no type of their
own."""


class RankFailed(RuntimeError):
    """Another rank could not go on, so this one cannot either."""


class StopRequest:
    """Whether this process was asked to stop: by SIGTERM, or by its time limit.

    Use it as a context manager; outside of it SIGTERM means what it meant before.

    Args:
        minutes: Time limit, counted from ``start``; None for none.
        start: A reading of `time.monotonic`; None for now.
    """

    def __init__(self, minutes: float | None = None, start: float | None = None) -> None:
        begin = monotonic() if start is None else start
        self._deadline = None if minutes is None else begin + 60 * minutes
        self._signalled = False

    def __enter__(self) -> "StopRequest":
        self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    @property
    def is_set(self) -> bool:
        """Whether to stop."""
        return self._signalled or (self._deadline is not None and monotonic() >= self._deadline)


def from_main(world: World, make: Callable[[], T]) -> T:
    """Return on every rank what ``make`` returns on rank 0, which alone calls it.

    Raises:
        RankFailed: On the other ranks, if it raised on rank 0, where the error itself goes on.
    """
    result: T | None = None
    error: Exception | None = None
    if world.is_main:
        try:
            result = make()
        except Exception as caught:
            error = caught
    said = None if error is None else f"{type(error).__name__}: {error}"
    said, result = world.broadcast((said, result))
    if error is not None:
        raise error
    if said is not None:
        raise RankFailed(f"rank 0 could not go on, so no rank can: {said}")
    return result  # type: ignore[return-value]  # what make returned


@contextmanager
def naming_lost_ranks(world: World) -> Iterator[None]:
    """Turn the error of a collective whose partner is gone into one that says so.

    gloo raises as soon as a connection breaks, and otherwise when the timeout of `join_world` has
    passed; so a killed rank ends the others, and a frozen one does after the timeout.

    Raises:
        RankFailed: In place of such an error.
    """
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        # Collectives raise the plain type or torch's own; errors of loader workers quote others.
        may_be = type(error) is RuntimeError or isinstance(error, dist.DistError)
        known = any(sign in said.lower() for sign in _CONNECTION_SIGNS)
        if world.group is None or not may_be or not known or said.startswith("Caught "):
            raise
        raise RankFailed(
            f"every rank must take part in each step; rank {world.rank} lost one, which was killed "
            f"or is stuck ({_in_short(said)}). Its own output and the system's log say why. The "
            "checkpoints are whole: go on with --resume."
        ) from error


def _in_short(said: str) -> str:
    """Leave out the source line and the advice that gloo adds."""
    return re.sub(r"^\[[^\]]*\.(cc|cpp|h):\d+\]\s*", "", said).split(". This is")[0].splitlines()[0]
