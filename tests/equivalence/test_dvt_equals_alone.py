"""Stages that reuse each other: images packed together give what each gives alone."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from navit.dvt import DVT, DVTConfig, StagedCollator, classify
from navit.model import NaViTConfig
from navit.model.classifier import Classifier, ClassifierConfig
from packer.batch import PackedBatch
from packer.collate import PackingCollator
from packer.config import PackerConfig
from tests.helpers.batches import RandomImage, pack_images, with_garbage_in_padding
from tests.helpers.samples import BROKEN, image_samples
from tests.helpers.stages import random_grids, stage_images
from tests.reference.dense_vit import Style
from tests.reference.dvt import image_logits

CLASSES = 3
FEATURE = {"feature_reuse": True, "relation_reuse": False}
RELATION = {"feature_reuse": False, "relation_reuse": True}
SHARED = {"max_logits": 40, "shared": True}  # a bucket is run in parts of 1 to 5 images
MAP = {"pool": "map"}
CLS = {"pool": "cls", "num_registers": 1, "biases": True, "checkpointing": True}
MEAN = {"pool": "mean", "norm_after_pool": True, "pre_norm": True, "activation": "quick_gelu"}
MODELS = pytest.mark.parametrize(
    ("changes", "tower"),
    [(FEATURE, CLS), (FEATURE, MEAN), (RELATION, MEAN), ({}, CLS), (SHARED, MAP)],
    ids=["feature-cls", "feature-mean", "relation-mean", "both-cls", "shared-map"],
)


def make_model(changes: dict[str, object], tower: dict[str, object]) -> DVT:
    torch.manual_seed(0)
    vision = NaViTConfig.named("tiny", patch_size=4, width=16, mlp_dim=24, **tower)
    config = DVTConfig(vision, CLASSES, context_dim=3, context_hidden=5)
    model = DVT(replace(config, **changes)).double().eval()
    with torch.no_grad():  # away from the start, where exits and reuse modules give 0
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def pack_stages(images: Sequence[list[RandomImage]], seed: int) -> list[PackedBatch]:
    """Pack every stage in another order, with garbage in the padding."""
    batches = []
    for stage, drawn in enumerate(images):
        generator = torch.Generator().manual_seed(seed + stage)
        order = torch.randperm(len(drawn), generator=generator).tolist()
        seq_len = max(len(image.patches) for image in drawn) + 5
        batches.append(with_garbage_in_padding(pack_images(drawn, seq_len=seq_len, order=order)))
    return batches


def alone(images: Sequence[list[RandomImage]], index: int) -> list[PackedBatch]:
    return [pack_images([stage[index]]) for stage in images]


@MODELS
@settings(max_examples=2, deadline=None)
@given(count=st.integers(2, 5), seed=st.integers(0, 9999))
def test_logits_and_gradients_of_every_exit_are_those_of_the_images_alone(
    changes: dict[str, object], tower: dict[str, object], count: int, seed: int
) -> None:
    """Images of different grids, in another order at every stage; a bucket may run in parts."""
    model = make_model(changes, tower)
    images = stage_images(random_grids(count, seed=seed), seed=seed)
    weights = torch.randn(3, count, CLASSES, dtype=torch.float64)

    packed = torch.stack(model(pack_stages(images, seed)))
    single = [torch.stack(model(alone(images, i))) for i in range(count)]

    assert_equal(packed, torch.cat(single, dim=1))
    found, expected = (
        torch.autograd.grad((x * weights).sum(), list(model.parameters()))
        for x in (packed, torch.cat(single, dim=1))
    )
    for (name, _), a, b in zip(model.named_parameters(), found, expected, strict=True):
        assert_equal(a, b, name)


@MODELS
def test_zeroed_reuse_modules_leave_the_plain_networks(
    changes: dict[str, object], tower: dict[str, object]
) -> None:
    """Every exit is then that of a `Classifier` with the stage's tower and head."""
    model = make_model(changes, tower)
    images = stage_images(random_grids(6, seed=1), seed=1)
    batches = pack_stages(images, seed=1)
    with torch.no_grad():
        reusing = model(batches)
        for reuse in model.reuse:
            reuse.zero_()
        exits = model(batches)
        for k, batch in enumerate(batches):
            plain = Classifier(ClassifierConfig(model.config.vision, CLASSES)).double().eval()
            plain.vision.load_state_dict(model.tower(k).state_dict())
            plain.head.load_state_dict(model.heads[k].state_dict())
            assert_equal(exits[k], plain(batch))
            assert k == 0 or not torch.allclose(reusing[k], exits[k], atol=1e-4)


@pytest.mark.parametrize("changes", [FEATURE, SHARED], ids=["feature", "shared"])
@settings(max_examples=4, deadline=None)
@given(count=st.integers(1, 6), seed=st.integers(0, 9999))
def test_an_image_leaves_with_the_logits_its_exit_gives_all_images(
    changes: dict[str, object], count: int, seed: int
) -> None:
    """Those that go on are not changed by others having left."""
    model = make_model(changes, MAP)
    images = stage_images(random_grids(count, seed=seed), seed=seed)
    batches = pack_stages(images, seed)
    thresholds = (0.5, 0.6)
    with torch.no_grad():
        every = torch.stack(model(batches))
    left = model.exits(batches, thresholds)

    sure = every.softmax(-1).amax(-1) >= torch.tensor([*thresholds, 0.0])[:, None]
    expected = sure.int().argmax(0)
    assert left.stages.tolist() == expected.tolist()
    torch.testing.assert_close(
        left.logits.double(), every[expected, torch.arange(count)], rtol=1e-5, atol=1e-5
    )


@MODELS
@settings(max_examples=2, deadline=None)
@given(count=st.integers(1, 3), seed=st.integers(0, 9999))
def test_logits_of_every_exit_are_those_of_the_plain_model(
    changes: dict[str, object], tower: dict[str, object], count: int, seed: int
) -> None:
    """The reference runs one image at a time, with U A U^T and every score in full."""
    model = make_model(changes, tower)
    vision = model.config.vision
    images = stage_images(random_grids(count, seed=seed), seed=seed)
    with torch.no_grad():
        packed = torch.stack(model(pack_stages(images, seed)))
        for i in range(count):
            plain = image_logits(
                dict(model.named_parameters()),
                [(s[i].patches, s[i].positions, s[i].grid) for s in images],
                num_heads=vision.num_heads,
                activation=vision.activation,
                style=Style(norm_eps=vision.norm_eps, norm_after_pool=vision.norm_after_pool),
                pools_class_token=vision.pool == "cls",
            )
            assert_equal(packed[:, i], torch.stack(plain))


def assert_equal(found: Tensor, expected: Tensor, name: str = "") -> None:
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(
        found, expected, rtol=1e-10, atol=1e-10 * scale, msg=lambda text: f"{name}: {text}"
    )


@MODELS
@settings(max_examples=3, deadline=None)
@given(
    count=st.integers(1, 9),
    seed=st.integers(0, 9999),
    thresholds=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_packing_the_undecided_alone_gives_the_answers_of_packing_all(
    changes: dict[str, object],
    tower: dict[str, object],
    count: int,
    seed: int,
    thresholds: tuple[float, float],
) -> None:
    model = make_model(changes, tower)
    samples = image_samples(count, unit=8, seed=seed)
    collate = StagedCollator(PackerConfig(patch_size=4, seq_len=30), (2, 6, 20))
    wanted = model.exits(collate(samples), thresholds)

    found = classify(model, samples, collate, thresholds)

    assert torch.equal(found.stages, wanted.stages)
    assert_equal(found.logits, wanted.logits)


def test_an_image_that_left_is_not_packed_again_and_a_broken_one_has_no_answer() -> None:
    model = make_model(FEATURE, MAP)
    samples = image_samples(9, unit=8)
    samples[4]["image"] = BROKEN
    collate = StagedCollator(PackerConfig(patch_size=4, seq_len=30), (2, 6, 20))
    packed: list[list[str]] = []

    class Noting(PackingCollator):
        def __call__(self, samples: Sequence[Any]) -> PackedBatch:
            packed.append([sample.key for sample in samples])
            return super().__call__(samples)

    collate.stages = tuple(Noting(stage.config) for stage in collate.stages)
    found = classify(model, samples, collate, (0.5, 0.6))

    assert found.stages[4] == -1
    assert found.logits[4].isnan().all()
    assert set(found.stages.tolist()) == {-1, 0, 1, 2}
    keys = [sample["key"] for sample in samples]
    for stage, asked in enumerate(packed):
        assert set(asked) == {
            key
            for key, left in zip(keys, found.stages.tolist(), strict=True)
            if left >= stage or (stage == 0 and left == -1)
        }

    assert classify(model, [], collate, (0.5, 0.6)).stages.shape == (0,)
    two = StagedCollator(PackerConfig(patch_size=4, seq_len=30), (2, 6))
    first_two = classify(model, samples, two, (0.5,))
    assert torch.equal(first_two.stages, found.stages.clamp(max=1))
    with torch.no_grad():  # an exit that is not finite is sure of nothing
        model.heads[0].bias.fill_(torch.nan)
    lost = classify(model, samples, collate, (0.5, 0.6))
    assert set(lost.stages.tolist()) == {-1, 1, 2}
    assert lost.logits[lost.stages >= 0].isfinite().all()
    many = StagedCollator(PackerConfig(patch_size=4, seq_len=30), (2, 6, 12, 20))
    with pytest.raises(ValueError, match="the model has 3 stages"):
        classify(model, samples, many, (0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="must differ"):
        classify(model, [samples[0], samples[0]], collate, (0.5, 0.6))
    with pytest.raises(ValueError, match="one threshold less"):
        classify(model, samples, collate, (0.5,))
