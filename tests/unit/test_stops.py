import os
import signal
import time

import pytest
import torch

from navit.train.ranks import World, alone
from navit.train.stops import RankFailed, StopRequest, from_main, naming_lost_ranks

CPU = torch.device("cpu")
MANY = World(1, 2, 1, CPU, torch.distributed.ProcessGroup(1, 2))
"""A rank of two, with a group that nothing is sent to."""


def test_sigterm_inside_is_a_request_and_outside_what_it_was() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.is_set
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_set

    assert signal.getsignal(signal.SIGTERM) is before


def test_the_time_limit_is_a_request_once_it_has_passed_and_not_before() -> None:
    now = time.monotonic()

    assert not StopRequest(minutes=60).is_set
    assert not StopRequest(minutes=60, start=now - 3590).is_set
    assert StopRequest(minutes=60, start=now - 3600).is_set


def test_alone_the_main_rank_gives_its_result_and_its_own_error() -> None:
    def fail() -> int:
        raise ValueError("no such run")

    assert from_main(alone(CPU), lambda: 7) == 7
    with pytest.raises(ValueError, match="no such run"):
        from_main(alone(CPU), fail)


@pytest.mark.parametrize(
    "said",
    [
        "[/a/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1. This is ...",
        "[/a/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 3000ms for recv",
        "NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited",
    ],
)
def test_the_error_of_a_lost_rank_says_that_one_is_lost(said: str) -> None:
    with (
        pytest.raises(RankFailed, match=r"rank 1 lost one, .* go on with --resume") as caught,
        naming_lost_ranks(MANY),
    ):
        raise RuntimeError(said)

    assert "/a/gloo" not in str(caught.value)
    assert "This is" not in str(caught.value)


def test_other_errors_and_those_of_a_process_alone_go_on_as_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), naming_lost_ranks(MANY):
        raise RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match=r"^connection lost$"), naming_lost_ranks(alone(CPU)):
        raise RuntimeError("connection lost")
    with pytest.raises(RankFailed, match=r"^said already$"), naming_lost_ranks(MANY):
        raise RankFailed("said already")
    quoted = "Caught RuntimeError in DataLoader worker process 0. Connection refused"
    with (
        pytest.raises(RuntimeError, match=r"^Caught RuntimeError") as caught,
        naming_lost_ranks(MANY),
    ):
        raise RuntimeError(quoted)
    assert not isinstance(caught.value, RankFailed)
