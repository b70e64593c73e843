from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from navit.serialize import to_plain
from navit.train.checkpoint import Checkpoint, load_tensors, save_checkpoint, stored_tensors
from navit.train.config import TrainConfig
from navit.train.optim import OptimConfig, build_optimizers
from navit.train.ranks import World, alone
from navit.train.resume import (
    check_same_run,
    continue_random,
    optimizer_targets,
    random_state,
    seed_rank,
    set_random_state,
    with_defaults,
)

CPU = torch.device("cpu")


def ranks(size: int) -> list[World]:
    return [World(rank, size, rank, CPU, None) for rank in range(size)]


def test_a_run_continues_with_its_own_settings() -> None:
    stored = {"steps": 10, "optim": {"learning_rate": 1.0}, "packer": {"crop": {"type": "NoCrop"}}}

    check_same_run(stored, {**stored, "steps": 20}, Path("step-1"))
    with pytest.raises(
        ValueError, match=r"step-1 has others: optim.learning_rate was 1.0 and is 2"
    ):
        check_same_run(stored, {**stored, "optim": {"learning_rate": 2.0}}, Path("step-1"))


def test_a_setting_that_came_later_does_not_keep_a_run_from_going_on() -> None:
    given = to_plain(TrainConfig(shards=("a.tar",)))
    stored = {name: value for name, value in given.items() if name != "corruption"}

    check_same_run(with_defaults(stored), given, Path("step-1"))
    other = {**given, "corruption": {**given["corruption"], "share": 0.3}}
    with pytest.raises(ValueError, match=r"corruption.share was 0.5 and is 0.3"):
        check_same_run(with_defaults(stored), other, Path("step-1"))
    with pytest.raises(ValueError, match="unknown"):
        with_defaults({**stored, "of_the_past": 1})


def test_random_numbers_go_on_where_they_were() -> None:
    state = random_state(CPU)
    first = torch.rand(5)
    set_random_state(state, CPU)

    assert torch.equal(torch.rand(5), first)


def test_as_many_ranks_as_before_go_on_with_their_own_random_numbers() -> None:
    stored, drawn = [], []
    for world in ranks(3):
        seed_rank(world, seed=1, step=0)
        stored.append(random_state(CPU))
        drawn.append(torch.rand(4))

    for world in ranks(3):
        continue_random(stored, world, seed=1, step=7)
        assert torch.equal(torch.rand(4), drawn[world.rank])


@given(before=st.integers(1, 4), after=st.integers(1, 4))
def test_no_two_ranks_draw_alike_after_a_change_of_their_number(before: int, after: int) -> None:
    stored = []
    for world in ranks(before):
        seed_rank(world, seed=0, step=0)
        stored.append(random_state(CPU))

    drawn = []
    for world in ranks(after):
        continue_random(stored, world, seed=0, step=5)
        drawn.append(torch.rand(4))

    assert len({tuple(numbers.tolist()) for numbers in drawn}) == after


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.head = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.blocks[0](x)) * self.scale
        return out


def train(net: Net, steps: range, optimizers: object = None) -> object:
    optimizers = optimizers or build_optimizers(net, OptimConfig(warmup_steps=0))
    for step in steps:
        optimizers.zero_grad()  # type: ignore[attr-defined]
        generator = torch.Generator().manual_seed(step)
        net(torch.randn(8, 4, generator=generator)).square().mean().backward()
        optimizers.step()  # type: ignore[attr-defined]
    return optimizers


def test_a_stored_optimizer_goes_on_bit_for_bit_in_one_that_has_not_stepped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    undisturbed = Net()
    optimizers = train(undisturbed, range(3))
    tensors = {"optimizer": optimizers.tensors(), "model": undisturbed.state_dict()}  # type: ignore[attr-defined]
    path = save_checkpoint(tmp_path, 3, Checkpoint(tensors, {}))
    train(undisturbed, range(3, 6), optimizers)

    resumed = Net()
    fresh = build_optimizers(resumed, OptimConfig(warmup_steps=0))
    targets = optimizer_targets(fresh, stored_tensors(path)["optimizer"])
    load_tensors(path, {"optimizer": targets, "model": resumed.state_dict()})
    fresh.load_tensors(targets)
    train(resumed, range(3, 6), fresh)

    torch.testing.assert_close(resumed.state_dict(), undisturbed.state_dict(), rtol=0, atol=0)


def test_what_is_stored_for_no_parameter_is_left_to_be_refused(tmp_path: Path) -> None:
    net = Net()
    tensors = {"optimizer": {"gone.weight/momentum_buffer": torch.ones(3, 3)}}
    path = save_checkpoint(tmp_path, 1, Checkpoint(tensors, {}))
    optimizers = build_optimizers(net, OptimConfig())

    targets = optimizer_targets(optimizers, stored_tensors(path)["optimizer"])

    assert targets["gone.weight/momentum_buffer"].shape == (3, 3)
    with pytest.raises(ValueError, match=r"gone\.weight"):
        optimizers.load_tensors(targets)


def test_a_world_of_one_has_the_random_numbers_of_its_checkpoint_alone() -> None:
    seed_rank(replace(alone(CPU), rank=0), seed=3, step=0)
    stored = [random_state(CPU)]
    first = torch.rand(3)

    continue_random(stored, alone(CPU), seed=3, step=9)

    assert torch.equal(torch.rand(3), first)
