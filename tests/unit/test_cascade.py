"""A cascade's order, bounds and counts; broken images; its operations by hand."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from navit.cascade import (
    Cascade,
    ExitFractions,
    Stage,
    StageOutcomes,
    budget_stages,
    cascade_flops,
    stage_flops,
)
from navit.model import CLIP
from navit.model.classifier import Classifier, ClassifierConfig
from navit.model.config import CLIPConfig, NaViTConfig, TextConfig
from packer import PackerConfig
from packer.batch import PackedBatch
from packer.errors import TooManyFailures
from tests.helpers.samples import BROKEN, cut_png, noise, png

PACKING = PackerConfig(patch_size=4, seq_len=32, resize="allow_enlarge")


class Brightness(nn.Module):
    """Two classes, dark and bright: as sure as the mean pixel is far from grey."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[int, int]] = []

    def forward(self, batch: PackedBatch) -> Tensor:
        self.batches.append((batch.segment_ids.shape[0], batch.num_images))
        means = torch.zeros(batch.num_images)
        pairs = zip(batch.segment_lengths, batch.segment_images, strict=True)
        flat, start = batch.patches.flatten(0, 1).float(), 0
        for length, image in pairs:
            if image >= 0:
                means[image] = flat[start : start + length].mean() / 128 - 1
            start += length
        return torch.stack([-8 * means, 8 * means], 1)


def grey(value: int, side: int = 16) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def test_threshold_0_asks_the_cheap_stage_alone_and_one_above_1_ends_at_the_last() -> None:
    stages = budget_stages(Brightness(), PACKING, [4, 16])
    samples = [grey(v) for v in (0, 128, 130, 255)]

    cheap, dear = Cascade(stages, [0.0])(samples), Cascade(stages, [1.5])(samples)

    assert cheap.stages.tolist() == [0] * 4
    assert cheap.tokens.tolist() == [[4, 0]] * 4
    assert cheap.stats.stages[1].images == 0
    assert dear.stages.tolist() == [1] * 4
    assert dear.tokens.tolist() == [[4, 16]] * 4
    mixed = Cascade(stages, [0.9])(samples)
    assert mixed.stages.tolist() == [0, 1, 1, 0]
    assert mixed.logits.argmax(1).tolist() == [0, 0, 1, 1]  # a tie, then just above grey


def test_answers_come_in_input_order_while_the_source_is_still_read() -> None:
    """A long set must not wait for its end, nor hold more than it was told to."""
    read = 0

    def source() -> Iterator[np.ndarray]:
        nonlocal read
        for i in range(600):
            read += 1
            # One image in 50 is undecided: alone it would wait very long for others.
            yield grey(128 if i % 50 == 7 else 255, side=8)

    cascade = Cascade(
        budget_stages(Brightness(), PACKING, [4, 16]), [0.9], sequences_per_batch=2, max_held=60
    )
    ahead = []
    for place, answer in enumerate(cascade.run(source())):
        assert answer.place == place
        assert answer.stage == int(place % 50 == 7)
        ahead.append(read - place)

    assert len(ahead) == 600
    # The placement's window at the first stage, and what may be held.
    assert max(ahead) <= 60 + PACKING.placement.window + 2 * 32 // 4


def test_the_undecided_share_dense_sequences() -> None:
    model = Brightness()
    samples = [grey(128 if i % 4 else 255) for i in range(160)]

    found = Cascade(budget_stages(model, PACKING, [4, 16]), [0.9], sequences_per_batch=4)(samples)

    assert [stats.images for stats in found.stats.stages] == [160, 120]
    assert [stats.padding for stats in found.stats.stages] == [0, 0]
    # 8 images of 4 tokens, then 2 of 16, fill a sequence of 32; batches of 4 sequences.
    assert model.batches == [(4, 32)] * 5 + [(4, 8)] * 15


def test_broken_images_are_counted_and_the_others_keep_their_places() -> None:
    samples = [
        {"image": png(16, 16, 0), "key": "a", "label": 3},
        {"image": BROKEN, "key": "b", "label": 1},
        {"image": cut_png(), "key": "c", "label": 1},
        None,
        {"image": png(16, 16, 1), "key": "a", "label": 0},
    ]
    run = Cascade(budget_stages(Brightness(), PACKING, [4, 16]), [1.5]).run(samples)
    answers = list(run)

    assert [answer.key for answer in answers] == ["a", "b", "c", "3", "a"]
    assert [answer.stage for answer in answers] == [1, -1, -1, -1, 1]
    assert [answer.label for answer in answers] == [3, 1, 1, None, 0]
    first, second = run.stats.stages
    assert (first.images, second.images) == (2, 2)
    assert (first.samples_read, dict(first.skipped)) == (
        5,
        {"decode_error": 2, "missing_image": 1},
    )
    found = Cascade(budget_stages(Brightness(), PACKING, [4]))(samples)
    assert found.logits.isnan().all(1).tolist() == [False, True, True, True, False]
    assert found.tokens.sum(1).tolist() == [4, 0, 0, 0, 4]
    nothing = Cascade(budget_stages(Brightness(), PACKING, [4, 16]), [0.5])([BROKEN])
    assert (nothing.logits.shape, nothing.stages.tolist()) == ((1, 0), [-1])
    few = budget_stages(Brightness(), PackerConfig(patch_size=4, max_failures_in_row=2), [4])
    with pytest.raises(TooManyFailures):
        Cascade(few)([BROKEN, BROKEN])


def test_an_image_that_breaks_at_a_later_stage_keeps_its_answer() -> None:
    """Stages may refuse different images, such as by their aspect ratio."""
    strict = PackerConfig(patch_size=4, seq_len=64, max_aspect_ratio=2)
    stages = (
        Stage(Brightness(), PackerConfig(patch_size=4, seq_len=8)),
        Stage(Brightness(), strict),
    )

    found = Cascade(stages, [1.5])([noise(8, 32), noise(16, 16)])

    assert found.stages.tolist() == [0, 1]
    assert found.logits.isfinite().all()
    assert dict(found.stats.stages[1].skipped) == {"aspect_ratio": 1}


def test_the_same_pixels_are_not_run_again_by_the_same_network() -> None:
    packing = PackerConfig(patch_size=4, seq_len=64)
    small, large = noise(8, 8), noise(32, 32)
    model = Brightness()

    shared = Cascade(budget_stages(model, packing, [4, 16, 64]), [1.5, 1.5])([small, large])
    own = Cascade(
        (*budget_stages(model, packing, [4]), *budget_stages(Brightness(), packing, [16])), [1.5]
    )([small, large])

    assert shared.tokens.tolist() == [[4, 0, 0], [4, 16, 64]]
    assert shared.stages.tolist() == [2, 2]
    assert own.tokens.tolist() == [[4, 4], [4, 16]]


def test_a_solved_cascade_does_what_its_table_says() -> None:
    model = Brightness()
    samples = [noise(16, 16, i) // 2 + i for i in range(40)]
    alone = [Cascade([stage])(samples) for stage in budget_stages(model, PACKING, [4, 16])]
    outcomes = StageOutcomes(
        np.stack([found.confidence.numpy() for found in alone]),
        np.stack([found.logits.argmax(1).numpy() == 1 for found in alone]),
        np.stack([found.tokens[:, 0].double().numpy() for found in alone]),
    )
    solved = ExitFractions((0.5, 0.5)).solve(outcomes)

    found = Cascade(budget_stages(model, PACKING, [4, 16]), solved)(samples)

    assert found.stages.tolist() == outcomes.route(solved.values).tolist()
    assert float(found.tokens.sum(1).float().mean()) == pytest.approx(solved.mean_cost)
    assert solved.exit_fractions == (0.5, 0.5)


VISION = {"width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24, "patch_size": 4, "pool": "mean"}


def by_hand(tokens: int, width: int = 16, mlp: int = 24, depth: int = 2, patch: int = 4) -> int:
    """Multiply-adds of one image, each product of the tower written out, times two."""
    embed = tokens * (3 * patch * patch) * width
    projections = tokens * width * (3 * width) + tokens * width * width
    attention = tokens * tokens * width * 2
    hidden = tokens * width * mlp * 2
    return 2 * (embed + depth * (projections + attention + hidden))


def test_the_operations_of_a_cascade_are_a_sum_by_hand() -> None:
    model = Classifier(ClassifierConfig(NaViTConfig.from_dict(VISION), num_classes=7))
    stages = budget_stages(model, PACKING, [4, 16])
    found = Cascade(stages, [1.5])([grey(0), grey(9, side=4)])
    head = 2 * 16 * 7

    assert found.tokens.tolist() == [[4, 16], [4, 16]]
    assert stage_flops(stages[0], [4, 0, 9]).tolist() == [by_hand(4) + head, 0, by_hand(9) + head]
    both = by_hand(4) + by_hand(16) + 2 * head
    assert cascade_flops(stages, found.tokens.numpy()).tolist() == [both] * 2

    flexible = Classifier(
        ClassifierConfig(NaViTConfig.from_dict({**VISION, "patch_buffer": 8}), num_classes=7)
    )
    stage = Stage(flexible, PackerConfig(patch_size=8))
    assert stage_flops(stage, [5]).tolist() == [by_hand(5, patch=8) + head]


def test_the_operations_of_a_clip_include_the_comparison_with_the_classes() -> None:
    config = CLIPConfig(
        NaViTConfig.from_dict(VISION), TextConfig.named("tiny", vocab_size=300), embed_dim=8
    )
    stage = Stage(CLIP(config), PACKING, torch.randn(5, 8))
    assert stage_flops(stage, [6]).tolist() == [by_hand(6) + 2 * (16 * 8 + 8 * 5)]
    with pytest.raises(ValueError, match="Classifier or a CLIP; got Brightness"):
        stage_flops(Stage(Brightness(), PACKING), [4])


def test_what_cannot_be_a_cascade_is_refused() -> None:
    stages = budget_stages(Brightness(), PACKING, [4, 16])
    clip = CLIP(
        CLIPConfig(
            NaViTConfig.from_dict(VISION), TextConfig.named("tiny", vocab_size=300), embed_dim=8
        )
    )
    wrong: list[tuple[Any, str]] = [
        (lambda: Cascade([]), "at least one stage"),
        (lambda: Cascade(stages), "one fewer"),
        (lambda: Cascade(stages, [-0.1]), "at least 0"),
        (lambda: Cascade(stages, [0.5], sequences_per_batch=0), "sequences_per_batch"),
        (lambda: Cascade(stages, [0.5])(noise(8, 8)), "several"),
        (lambda: budget_stages(Brightness(), PACKING, [16, 4]), "rise"),
        (lambda: Stage(clip, PACKING), "class vectors"),
    ]
    for make, told in wrong:
        with pytest.raises(ValueError, match=told):
            make()
