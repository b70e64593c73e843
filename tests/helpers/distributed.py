"""Real gloo processes for tests: what torchrun does, without its start-up time."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from navit.train.ranks import World, alone, join_world

CPU = torch.device("cpu")


def run_ranks(function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """Call ``function(world, *args)`` in ``size`` processes; return their results in rank order.

    Function and arguments must be importable and picklable, results too. The first error of any
    rank is raised.
    """
    # The imports, most of a small test's time, are done once and inherited.
    modules = ["torch.distributed.fsdp", "tests.helpers.splits", function.__module__]
    multiprocessing.get_context("forkserver").set_forkserver_preload(modules)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with TemporaryDirectory() as folder:
        # Files, not a queue: nobody reads a queue before all ranks have ended, and a full one
        # lets none end.
        start: Any = multiprocessing.start_processes  # type: ignore[attr-defined]
        arguments = (size, port, function, args, folder)
        start(_enter, arguments, nprocs=size, start_method="forkserver")
        return [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(size)]


def _enter(
    rank: int, size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...], out: str
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    with join_world(CPU, timeout=timedelta(minutes=2)) as world:
        torch.save(function(world, *args), f"{out}/{rank}")


def smaller_worlds(world: World) -> dict[int, World]:
    """Return the worlds of the first 1, 2, ... ranks, by size, where this rank is in them.

    A collective.
    """
    found = {1: alone(CPU)} if world.is_main else {}
    for size in range(2, world.size + 1):
        group = world.group if size == world.size else dist.new_group(list(range(size)))
        if world.rank < size:
            found[size] = World(world.rank, size, world.rank, CPU, group)
    return found
