"""`navit.train.optim`: groups, schedule, clipping, exact resume."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from navit.train.optim import OptimConfig, Optimizers, build_optimizers, learning_rate_factor


class Tower(nn.Module):
    """The parameter names and shapes of a tower, without its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embed = nn.Embedding(7, 4)
        self.pos_embed = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(4, bias=False), "qkv": nn.Linear(4, 12)})
            for _ in range(2)
        )
        self.probe = nn.Parameter(torch.randn(4))


class Model(nn.Module):
    """Two towers and a scale, as CLIP has."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.vision, self.text = Tower(), Tower()
        self.image_proj = nn.Linear(4, 3, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))


def names_by_group(optimizers: Optimizers) -> list[tuple[str, float, set[str]]]:
    names = {id(parameter): name for name, parameter in optimizers.parameters.items()}
    return [
        (type(opt).__name__, group["weight_decay"], {names[id(p)] for p in group["params"]})
        for opt in optimizers.optimizers
        for group in opt.param_groups
    ]


def give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def train(model: nn.Module, optimizers: Optimizers, steps: range) -> None:
    for step in steps:
        optimizers.zero_grad()
        give_gradients(model, step)
        optimizers.set_lr(1 / (1 + step))
        optimizers.step()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_groups_cover_every_parameter_once(optimizer: Any) -> None:
    model = Model()
    groups = names_by_group(build_optimizers(model, OptimConfig(optimizer=optimizer)))

    dealt = sorted(name for *_, names in groups for name in names)
    assert dealt == sorted(name for name, _ in model.named_parameters())


def test_muon_trains_the_matrices_of_the_blocks_and_nothing_else() -> None:
    groups = names_by_group(build_optimizers(Model(), OptimConfig(weight_decay=0.3)))

    assert groups[0] == (
        "Muon",
        0.3,
        {f"{t}.blocks.{i}.qkv.weight" for t in ("vision", "text") for i in (0, 1)},
    )
    assert [kind for kind, *_ in groups[1:]] == ["AdamW", "AdamW"]


def test_vectors_scalars_and_position_tables_do_not_decay() -> None:
    groups = names_by_group(build_optimizers(Model(), OptimConfig("adamw", weight_decay=0.3)))
    free = next(names for _, decay, names in groups if decay == 0)

    towers = {
        f"{tower}.{name}"
        for tower in ("vision", "text")
        for name in (
            "pos_embed.weight",
            "probe",
            *(f"blocks.{i}.{n}" for i in (0, 1) for n in ("norm.weight", "qkv.bias")),
        )
    }
    assert free == {"logit_scale", *towers}


def test_head_and_image_tower_have_rates_and_decay_of_their_own() -> None:
    """NaViT, training details: on JFT weight decay 3.0 for the head and 0.03 for the body."""
    model = Model()
    model.head = nn.Linear(4, 3)
    config = OptimConfig(
        learning_rate=8e-4,
        muon_learning_rate=1e-3,
        weight_decay=0.03,
        head_weight_decay=3.0,
        head_learning_rate_factor=5.0,
        tower_learning_rate_factor=0.5,
    )
    optimizers = build_optimizers(model, config)
    names = {id(parameter): name for name, parameter in optimizers.parameters.items()}
    found = {
        names[id(p)]: (round(group["lr"], 9), group["weight_decay"])
        for group in optimizers.param_groups
        for p in group["params"]
    }

    assert found["head.weight"] == (4e-3, 3.0)
    assert found["head.bias"] == (4e-3, 0.0)
    assert found["vision.token_embed.weight"] == (4e-4, 0.03)
    assert found["vision.pos_embed.weight"] == (4e-4, 0.0)
    assert found["vision.blocks.1.qkv.weight"] == (5e-4, 0.03)
    assert found["text.blocks.1.qkv.weight"] == (1e-3, 0.03)
    assert found["image_proj.weight"] == (8e-4, 0.03)
    assert found.keys() == dict(model.named_parameters()).keys()


def test_frozen_parameters_are_left_out_and_never_move() -> None:
    model = Model()
    model.vision.requires_grad_(False)
    before = [p.clone() for p in model.vision.parameters()]
    optimizers = build_optimizers(model, OptimConfig(weight_decay=0.5))

    train(model, optimizers, range(2))

    assert not any(name.startswith("vision") for name in optimizers.parameters)
    for parameter, old in zip(model.vision.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
    with pytest.raises(ValueError, match="must have a trainable parameter"):
        build_optimizers(model.requires_grad_(False), OptimConfig())


def test_a_model_of_hidden_matrices_alone_needs_no_adamw() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(3, 3, bias=False)])})
    kinds = [kind for kind, *_ in names_by_group(build_optimizers(model, OptimConfig()))]
    assert kinds == ["Muon"]


def test_schedule_is_warmup_times_rsqrt_times_cooldown() -> None:
    config = OptimConfig(warmup_steps=4, timescale=8, cooldown_steps=2)
    literal = {
        0: 1 / 4,
        1: 2 / 4,
        3: 1.0,
        4: 1.0,
        12: math.sqrt(8 / 16),
        28: math.sqrt(8 / 32),
        38: math.sqrt(8 / 42),
        39: math.sqrt(8 / 43) / 2,
        40: 0.0,
        50: 0.0,
    }
    for step, factor in literal.items():
        assert learning_rate_factor(step, config, 40) == pytest.approx(factor, abs=1e-15)


def test_schedule_without_warmup_and_cooldown_starts_at_the_peak() -> None:
    config = OptimConfig(warmup_steps=0, timescale=3, cooldown_steps=0)
    assert [learning_rate_factor(step, config, 2) for step in (0, 1, 9)] == pytest.approx(
        [1.0, math.sqrt(3 / 4), 0.5]
    )


@settings(max_examples=50, deadline=None)
@given(
    warmup=st.integers(0, 30),
    cooldown=st.integers(0, 30),
    timescale=st.integers(1, 1000),
    total=st.integers(1, 60),
)
def test_schedule_is_positive_in_the_run_and_rises_then_falls(
    warmup: int, cooldown: int, timescale: int, total: int
) -> None:
    config = OptimConfig(warmup_steps=warmup, cooldown_steps=cooldown, timescale=timescale)
    factors = [learning_rate_factor(step, config, total) for step in range(total)]

    assert all(0 < factor <= 1 for factor in factors)
    turn = max(min(warmup - 1, total - cooldown), 0)
    if warmup + cooldown <= total:
        assert factors[: turn + 1] == sorted(factors[: turn + 1])
        assert factors[turn:] == sorted(factors[turn:], reverse=True)


def test_set_lr_multiplies_each_peak_and_does_not_accumulate() -> None:
    config = OptimConfig(learning_rate=4e-3, muon_learning_rate=8e-3)
    optimizers = build_optimizers(Model(), config)
    optimizers.set_lr(0.5)
    optimizers.set_lr(0.25)
    assert [group["lr"] for group in optimizers.param_groups] == [2e-3, 1e-3, 1e-3]


def test_muon_steps_have_the_size_of_adamw_steps() -> None:
    """The measured default 2e-3 means "match_rms_adamw": an update's RMS is 0.2 learning rates."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(64, 192, bias=False)])})
    before = model["blocks"][0].weight.detach().clone()
    give_gradients(model, 0)
    config = OptimConfig(weight_decay=0.0, muon_learning_rate=1.0)
    build_optimizers(model, config).step()

    change = (model["blocks"][0].weight - before).square().mean().sqrt()
    assert 0.1 < change < 0.3


def test_step_returns_the_norm_and_clips_to_the_limit() -> None:
    model = Model()
    give_gradients(model, 0)
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))

    optimizers = build_optimizers(model, OptimConfig(clip_norm=0.5))
    assert optimizers.step() == pytest.approx(norm, rel=1e-5)

    clipped = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    assert clipped == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    model = Model()
    optimizers = build_optimizers(model, OptimConfig())
    train(model, optimizers, range(2))
    before = {**snapshot(dict(model.named_parameters())), **snapshot(optimizers.tensors())}

    give_gradients(model, 2)
    model.logit_scale.grad = torch.tensor(bad)

    assert not math.isfinite(optimizers.step())
    after = {**dict(model.named_parameters()), **optimizers.tensors()}
    assert_same(before, after)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_training_is_bit_identical(optimizer: Any) -> None:
    config = OptimConfig(optimizer=optimizer)
    model = Model()
    optimizers = build_optimizers(model, config)
    train(model, optimizers, range(3))
    weights, state = snapshot(model.state_dict()), snapshot(optimizers.tensors())
    train(model, optimizers, range(3, 6))

    resumed = Model(seed=1)
    again = build_optimizers(resumed, config)
    resumed.load_state_dict(weights)
    again.load_tensors(state)
    train(resumed, again, range(3, 6))

    assert_same(model.state_dict(), resumed.state_dict())
    assert_same(optimizers.tensors(), again.tensors())


def test_loading_copies_and_replaces_what_was_there() -> None:
    model = Model()
    optimizers = build_optimizers(model, OptimConfig())
    train(model, optimizers, range(1))
    state = snapshot(optimizers.tensors())
    kept = snapshot(state)
    optimizers.load_tensors(state)
    train(model, optimizers, range(1, 2))
    assert_same(state, kept)

    optimizers.load_tensors({})
    assert all(not value.any() for value in optimizers.tensors().values())


def test_the_state_is_complete_from_the_start_and_starts_as_torch_starts_it() -> None:
    """A checkpoint is read into the state that is there."""
    model, lazy = Model(), Model()
    optimizers, again = (build_optimizers(m, OptimConfig()) for m in (model, lazy))
    for optimizer in again.optimizers:
        optimizer.state.clear()
    names = optimizers.tensors().keys()
    train(model, optimizers, range(2))
    train(lazy, again, range(2))

    assert names == optimizers.tensors().keys()
    assert_same(model.state_dict(), lazy.state_dict())
    assert_same(optimizers.tensors(), again.tensors())


def test_state_of_another_model_or_optimizer_is_refused() -> None:
    model = Model()
    optimizers = build_optimizers(model, OptimConfig())
    train(model, optimizers, range(1))
    state = snapshot(optimizers.tensors())

    with pytest.raises(ValueError, match=r"'vision\.blocks\.0\.qkv\.weight' must hold"):
        build_optimizers(model, OptimConfig("adamw")).load_tensors(state)
    with pytest.raises(ValueError, match="'other' must hold"):
        optimizers.load_tensors({**state, "other/exp_avg": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"'logit_scale' must have shape \(\)"):
        optimizers.load_tensors({**state, "logit_scale/exp_avg": torch.zeros(1)})
    assert_same(state, optimizers.tensors())


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "sgd"},
        {"learning_rate": 0.0},
        {"muon_learning_rate": -1.0},
        {"weight_decay": -0.1},
        {"head_weight_decay": math.inf},
        {"head_learning_rate_factor": 0.0},
        {"tower_learning_rate_factor": -1.0},
        {"betas": (0.9, 1.0)},
        {"muon_momentum": 1.0},
        {"warmup_steps": -1},
        {"timescale": 0},
        {"cooldown_steps": -1},
        {"clip_norm": 0.0},
        {"clip_norm": math.nan},
    ],
)
def test_wrong_settings_are_refused_at_construction(change: dict[str, Any]) -> None:
    # A literal outside its type is stopped by the shape checker, which is on in tests alone.
    with pytest.raises((ValueError, TypeError), match=next(iter(change))):
        replace(OptimConfig(), **change)


@pytest.mark.parametrize(("step", "total"), [(-1, 5), (0, 0)])
def test_schedule_refuses_steps_outside_any_run(step: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"got step {step}, total_steps {total}"):
        learning_rate_factor(step, OptimConfig(), total)


def snapshot(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name
