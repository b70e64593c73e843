"""On a CUDA device: loss and gradients of a step, plain, under DDP and FSDP2, are the CPU's.

Their group has one rank: DDP and FSDP2 then call NCCL, the losses exchange nothing.
"""

import socket
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from navit.train.ranks import World, alone
from tests.helpers.splits import NUM_SAMPLES, Case, deal, expected, run_case

pytestmark = pytest.mark.gpu

ALL = (tuple(range(NUM_SAMPLES)),)
CASES = [
    Case("softmax", (ALL,)),
    Case("softmax", deal(1, 3), cache=True, checkpointing=True),
    Case("sigmoid", deal(1, 2), cache=True),
    Case("sigmoid", deal(1, 2), taught=True),
    Case("labels", deal(1, 3)),
    Case("masked", deal(1, 2)),
    Case("softmax", (((), ALL[0]),)),
]


@pytest.fixture(scope="module")
def nccl() -> Iterator[World]:
    """A group of one rank: what several do, without a second device."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        at = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=at, rank=0, world_size=1)
    yield World(0, 1, 0, device, dist.group.WORLD)
    dist.destroy_process_group()


def check(world: World, case: Case) -> None:
    exact, found = expected(case), run_case(world, case)
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        assert found[name] == pytest.approx(value, abs=1e-10), name
    half = run_case(world, replace(case, half=True))
    assert half["loss"] == pytest.approx(exact["loss"], rel=0.02)
    ours, value = (
        np.concatenate([x[name].ravel() for name in exact if name not in ("loss", "images")])
        for x in (half, exact)
    )
    assert np.linalg.norm(ours - value) < 0.05 * np.linalg.norm(value)


@pytest.mark.parametrize("case", CASES)
def test_a_step_on_one_device_is_the_cpus(case: Case) -> None:
    check(alone(torch.device("cuda")), case)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_of_a_group_of_ranks_is_the_cpus(nccl: World, case: Case, strategy: str) -> None:
    check(nccl, replace(case, strategy=strategy))
