"""`navit.train.step` in one process: what accumulation and the gradient cache leave unchanged.

With several processes: test_distributed.py.
"""

from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from navit.model.clip import CLIP
from navit.train.contrastive import ContrastiveTask
from navit.train.ranks import alone
from navit.train.step import StepLoss, gradients
from tests.helpers.distributed import CPU
from tests.helpers.splits import (
    NUM_SAMPLES,
    Case,
    expected,
    make_batch,
    make_task,
    run_case,
)

WORLD = alone(CPU)


@settings(max_examples=10, deadline=None)
@given(
    kind=st.sampled_from(["softmax", "sigmoid", "labels", "targets"]),
    cuts=st.lists(st.integers(0, NUM_SAMPLES), max_size=4).map(sorted),
    cache=st.booleans(),
    checkpointing=st.booleans(),
)
def test_loss_and_gradients_do_not_depend_on_where_the_batches_are_cut(
    kind: str, cuts: list[int], cache: bool, checkpointing: bool
) -> None:
    """Empty batches among them; without the cache each batch of pairs is a problem of its own."""
    bounds = [0, *cuts, NUM_SAMPLES]
    split = (tuple(tuple(range(a, b)) for a, b in pairwise(bounds)),)
    case = Case(kind, split, cache=cache, checkpointing=checkpointing)
    exact = expected(case)

    found = run_case(WORLD, case)

    assert found.keys() == exact.keys()
    for name, value in exact.items():
        assert found[name] == pytest.approx(value, abs=1e-10), name


def joint_gradients(
    task: ContrastiveTask, batches: list[Any], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """All batches in one graph: what the cache must give without holding it."""
    outputs = []
    for batch in batches:
        with torch.autocast("cpu", dtype) if dtype else nullcontext():
            outputs.append(task.model(batch))
    joined = replace(
        outputs[0],
        image=torch.cat([output.image for output in outputs]),
        text=torch.cat([output.text for output in outputs]),
    )
    loss = task.loss(joined, batches, None)
    return list(torch.autograd.grad(loss, list(task.model.parameters())))


def test_the_cache_draws_stochastic_depth_alike_in_both_passes() -> None:
    task = make_task(Case("softmax", (), drop_path=0.6))
    assert isinstance(task, ContrastiveTask)
    batches = [make_batch(range(a, a + 3)) for a in (0, 3, 6)]
    torch.manual_seed(3)
    exact = joint_gradients(task, batches)
    state = torch.get_rng_state()

    torch.manual_seed(3)
    gradients(task, task.model, batches, WORLD, cache=True)

    for parameter, grad in zip(task.model.parameters(), exact, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    other = joint_gradients(task, batches)
    assert not torch.allclose(other[0], exact[0]), "the seed must matter"


def test_the_cache_is_exact_under_bfloat16_autocast() -> None:
    task = make_task(Case("softmax", ()))
    assert isinstance(task, ContrastiveTask)
    task.model.float()
    batches = [make_batch(range(4)), make_batch(range(4, 9))]
    exact = joint_gradients(task, batches, torch.bfloat16)

    gradients(task, task.model, batches, WORLD, autocast_dtype=torch.bfloat16, cache=True)

    for parameter, grad in zip(task.model.parameters(), exact, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-5, atol=1e-6)
        assert parameter.grad.any()


def test_one_batch_gives_the_bits_of_a_plain_backward_pass() -> None:
    task = make_task(Case("softmax", ()))
    batch = make_batch(range(NUM_SAMPLES))
    task.model.float()
    exact = torch.autograd.grad(
        task.loss(task.model(batch), [batch], None), list(task.model.parameters())
    )

    found = gradients(task, task.model, [batch], WORLD, cache=True)

    assert found.images == NUM_SAMPLES
    for parameter, grad in zip(task.model.parameters(), exact, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_a_frozen_tower_gets_no_gradient_and_changes_no_other() -> None:
    """Locked-image tuning."""
    task = make_task(Case("sigmoid", ()))
    batches = [make_batch(range(5)), make_batch(range(5, 9))]
    gradients(task, task.model, batches, WORLD, cache=True)
    exact = {name: p.grad for name, p in task.model.named_parameters()}
    task.model.zero_grad(set_to_none=True)
    task.model.vision.requires_grad_(False)

    gradients(task, task.model, batches, WORLD, cache=True)

    for name, parameter in task.model.named_parameters():
        if name.startswith("vision"):
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, exact[name], rtol=0, atol=1e-12)


def test_a_weight_that_the_loss_does_not_read_gets_zero() -> None:
    """DDP and FSDP2 wait for every weight: the bias of a model that then trains with softmax."""
    task = make_task(Case("softmax", ()))
    assert isinstance(task.model, CLIP)
    task.model.logit_bias = nn.Parameter(torch.tensor(-3.0, dtype=torch.float64))
    gradients(task, task.model, [make_batch(range(5))], WORLD)
    assert task.model.logit_bias.grad == 0


def test_without_images_there_is_no_step() -> None:
    task = make_task(Case("labels", ()))
    found = gradients(task, task.model, [make_batch([]), make_batch([])], WORLD)
    assert found == StepLoss(0.0, 0)
    assert all(parameter.grad is None for parameter in task.model.parameters())


def test_a_broken_weight_makes_the_loss_nan() -> None:
    task = make_task(Case("labels", ()))
    with torch.no_grad():
        task.model.head.bias[1] = torch.nan
    found = gradients(task, task.model, [make_batch(range(3)), make_batch(range(3, 9))], WORLD)
    assert found.loss != found.loss
