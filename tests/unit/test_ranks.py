"""`navit.train.ranks` and `navit.train.parallel` in one process.

On several: test_distributed.py.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from navit.train.parallel import (
    ParallelConfig,
    is_sharded,
    no_gradient_exchange,
    parallelize,
    sharded_like,
    whole,
    whole_model,
)
from navit.train.ranks import alone, join_world
from tests.helpers.distributed import CPU
from tests.helpers.splits import Case, make_task


@pytest.mark.parametrize("size", [None, "1"])
def test_without_torchrun_nothing_is_initialised(
    size: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    with join_world(CPU) as world:
        assert not dist.is_initialized()
        assert (world.rank, world.size, world.is_main, world.group) == (0, 1, True, None)
        assert world.sum([1, 2.5]) == [1.0, 2.5]
        assert [world.any(True), world.any(False)] == [True, False]
        assert world.gather("a") == ["a"]
        assert world.broadcast("b") == "b"
        world.barrier()


def test_more_ranks_than_devices_are_refused_before_they_meet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(ValueError, match="got local rank 2 on a machine with 2"),
        join_world(torch.device("cuda")),
    ):
        pass


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2"])
def test_a_process_alone_trains_the_plain_model(strategy: Any) -> None:
    model = make_task(Case("labels", ())).model
    assert parallelize(model, alone(CPU), ParallelConfig(strategy)) is model
    assert whole_model(model) is model
    assert not any(is_sharded(parameter) for parameter in model.parameters())
    value = torch.ones(2)
    assert whole({"a": value})["a"] is value
    assert sharded_like(value, torch.zeros(2)) is value
    with no_gradient_exchange(model):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "zero"}, "strategy"),
        ({"accumulate": 0}, "accumulate must be at least 1 batch; got 0"),
        ({"timeout_minutes": 0.0}, "timeout_minutes must be positive; got 0.0"),
    ],
)
def test_a_wrong_setting_says_what_must_hold(change: dict[str, Any], message: str) -> None:
    # A literal outside its type is stopped by the shape checker, which is on in tests alone.
    with pytest.raises((ValueError, TypeError), match=message):
        ParallelConfig(**change)
