"""The dynamic transformer: its batches, its loss, its parts, and that it learns to reuse."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from navit.cascade import ExitFractions, StageOutcomes
from navit.dvt import DVT, DVTConfig, StagedCollator, dvt_flops, exits_loss
from navit.dvt.embedded import EmbeddedStage, make_parts
from navit.model import NaViTConfig
from packer.config import PackerConfig
from packer.plan.drop import ConstantDrop
from packer.plan.resize import RandomCrop
from packer.transforms import RandomFlip
from tests.helpers.batches import pack_images, random_images
from tests.helpers.samples import BROKEN, image_samples, unpack
from tests.helpers.stages import random_grids, stage_images

VISION = NaViTConfig.named("tiny", patch_size=4, width=16, mlp_dim=24)


def make_model(**changes: Any) -> DVT:
    torch.manual_seed(0)
    config = DVTConfig(VISION, 3, num_stages=2, context_dim=3, context_hidden=5)
    return DVT(replace(config, **changes)).double()


def two_stages(count: int = 4, seed: int = 0) -> list[Any]:
    grids = random_grids(count, seed=seed, sides=(2, 3))
    return [pack_images(images) for images in stage_images(grids, seed=seed)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_stages": 1}, "num_stages must be an integer of at least 2; got 1"),
        ({"num_classes": 0}, "num_classes must be an integer of at least 1; got 0"),
        ({"context_dim": 0}, "context_dim must be"),
        ({"max_logits": True}, "max_logits must be"),
    ],
)
def test_a_configuration_is_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DVTConfig(VISION, **changes)


def test_batches_of_other_images_are_refused() -> None:
    small, large = two_stages()
    with pytest.raises(ValueError, match="keys of stage 2 differ"):
        make_model()([small, replace(large, keys=large.keys[::-1])])


@pytest.mark.parametrize("count", [0, 3])
def test_batches_without_a_stage_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 2; got {count}"):
        make_model()(two_stages()[:1] * count)


def test_images_with_dropped_tokens_are_refused() -> None:
    batch = pack_images(random_images(5, seed=0, patch_size=4))
    with pytest.raises(ValueError, match=r"every token of an image; image 'image-\d' has"):
        make_model()([batch])


def test_thresholds_are_one_less_than_batches() -> None:
    with pytest.raises(ValueError, match="got 2 for 2"):
        make_model().exits(two_stages(), (0.5, 0.5))


def test_the_first_stages_can_be_run_alone() -> None:
    model, batches = make_model(), two_stages()
    (first,) = model(batches[:1])
    torch.testing.assert_close(first, model(batches)[0])


@pytest.mark.parametrize("relation", [False, True])
def test_a_batch_without_images_gives_no_logits_and_gradients_of_zero(relation: bool) -> None:
    model = make_model(relation_reuse=relation)
    logits = model([pack_images([], patch_size=4)] * 2)
    assert [x.shape for x in logits] == [(0, 3), (0, 3)]
    exits_loss(logits, torch.zeros(0, dtype=torch.int64)).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert model.exits([pack_images([], patch_size=4)] * 2, (0.5,)).stages.shape == (0,)


def test_a_saved_model_gives_the_same_logits(tmp_path: Path) -> None:
    model, batches = make_model(shared=True), two_stages()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(tmp_path)
    again = DVT.from_pretrained(tmp_path)
    assert again.config == model.config
    assert len(again.towers) == 1
    for found, expected in zip(again(batches), model(batches), strict=True):
        assert torch.equal(found, expected)


def test_stages_may_have_patches_of_different_sizes() -> None:
    """One flexible tower: the first stage sees the same grid growing from larger patches."""
    model = make_model(vision=replace(VISION, patch_buffer=6), shared=True)
    coarse = stage_images([[(1, 2), (2, 2)]], seed=0, patch_size=6)[0]
    fine = stage_images([[(2, 3), (3, 3)]], seed=1, patch_size=4)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        together = torch.stack(model([pack_images(coarse), pack_images(fine)]))
        for i in range(2):
            alone = torch.stack(model([pack_images([coarse[i]]), pack_images([fine[i]])]))
            torch.testing.assert_close(together[:, i : i + 1], alone)


def test_the_loss_is_the_sum_of_the_exits_cross_entropies() -> None:
    logits = [torch.randn(5, 3, dtype=torch.float64) for _ in range(3)]
    labels = torch.tensor([0, 2, 1, 1, 0])
    expected = sum(F.cross_entropy(x, labels) for x in logits)
    torch.testing.assert_close(exits_loss(logits, labels), expected)


def test_a_loss_needs_an_exit() -> None:
    with pytest.raises(ValueError, match="at least one exit"):
        exits_loss([], torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_learns_every_exit_and_to_use_the_stage_before(checkpointing: bool) -> None:
    """What starts at 0 does not stay there: gradients reach the reuse modules from the start."""
    model = make_model(vision=replace(VISION, checkpointing=checkpointing))
    images = stage_images([[(2, 2)] * 6, [(2, 3)] * 6], seed=0)
    batches, labels = [pack_images(stage) for stage in images], torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = exits_loss(model(batches), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(2 * np.log(3))  # both exits start at 0
    assert losses[-1] < 0.5 * losses[0]
    reuse = dict(model.reuse.named_parameters())
    moved = [name for name, parameter in reuse.items() if "fc2.weight" in name and parameter.any()]
    assert len(moved) == 3  # of two blocks, and of the relations


def test_autocast_changes_the_logits_by_rounding_alone() -> None:
    model, batches = make_model().float(), two_stages()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        exact = torch.stack(model(batches))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = torch.stack(model(batches)).float()
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 20), seed=st.integers(0, 999), max_pairs=st.integers(1, 400))
def test_a_bucket_has_one_grid_a_stage_and_at_most_the_pairs_it_may(
    count: int, seed: int, max_pairs: int
) -> None:
    stages = [
        EmbeddedStage(torch.zeros(0, 1), np.zeros(count, np.int64), tuple(grids), "segments")
        for grids in random_grids(count, seed=seed, sides=(2, 4))
    ]
    parts = make_parts(stages, bucketed=True, prefix=1, max_pairs=max_pairs)
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))
    for part in parts:
        for stage in stages:
            assert len({stage.grids[image] for image in part.tolist()}) == 1
        longest = 1 + max(int(stage.lengths[part].max()) for stage in stages)
        assert len(part) == 1 or len(part) * longest**2 <= max_pairs


def test_thresholds_solved_on_the_exits_send_on_the_shares_asked_for() -> None:
    """The rules of `navit.cascade` take a dynamic transformer's exits and its operations."""
    model, count = make_model(), 20
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        grids = random_grids(count, seed=5, sides=(2, 3))
        batches = [pack_images(images) for images in stage_images(grids, seed=5)]
        probabilities = torch.stack(model(batches)).softmax(-1)
    outcomes = StageOutcomes(
        confidence=probabilities.amax(-1).numpy(),
        correct=(probabilities.argmax(-1) == 0).numpy(),
        cost=dvt_flops(model.config, grids).astype(np.float64),
    )
    solved = ExitFractions((0.7, 0.3)).solve(outcomes)
    # The same batches in the same order give the same bits, so a tie with a threshold stays one.
    left = model.exits(batches, solved.values).stages
    assert left.bincount().tolist() == [14, 6]
    assert left.tolist() == outcomes.route(solved.values).tolist()


class Seeds:
    """A transform that notes what each call may draw from."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        self.found.append(generator.initial_seed())
        return pixels


def test_stages_hold_the_same_images_augmented_alike_at_growing_budgets() -> None:
    seeds = Seeds()
    packing = PackerConfig(patch_size=8, seq_len=12, crop=RandomCrop())
    collate = StagedCollator(packing, (2, 6, 20), transform=seeds)
    collate.set_epoch(3)
    samples = image_samples(8)
    samples[2]["image"] = BROKEN
    batches = collate(samples)

    assert len(batches) == 3
    assert batches[0].keys == batches[1].keys == batches[2].keys
    assert len(batches[0].keys) == 7
    for batch in batches:
        batch.check()
        assert batch.labels is not None
        assert batch.labels.tolist() == [0, 1, 3, 4, 5, 6, 7]
    tokens = [
        [image.grid[0] * image.grid[1] for _, image in sorted(unpack(batch).items())]
        for batch in batches
    ]
    for budget, counts in zip((2, 6, 20), tokens, strict=True):
        assert max(counts) <= budget
    assert np.all(np.diff(tokens, axis=0) >= 0)
    assert np.any(np.diff(tokens, axis=0) > 0)
    per_stage = np.array(seeds.found).reshape(3, 7)
    assert all(sorted(stage) == sorted(per_stage[0]) for stage in per_stage.tolist())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StagedCollator(PackerConfig(), ()), r"rise; got \[\]"),
        (lambda: StagedCollator(PackerConfig(), (4, 4)), r"rise; got \[4, 4\]"),
        (
            lambda: StagedCollator(PackerConfig(token_drop=ConstantDrop(0.5)), (4, 8)),
            r"must be NoDrop\(\)",
        ),
    ],
)
def test_a_staged_collator_checks_what_it_is_given(
    make: Callable[[], StagedCollator], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_collated_stages_train() -> None:
    """From samples to the gradient of the loss."""
    packing = PackerConfig(patch_size=4, seq_len=16)
    batches = StagedCollator(packing, (3, 9), transform=RandomFlip())(image_samples(5))
    model = make_model(num_classes=5).float()
    labels = batches[0].labels
    assert labels is not None
    exits_loss(model(batches), labels).backward()
    gradient = model.heads[1].weight.grad
    assert gradient is not None
    assert bool(gradient.any())
