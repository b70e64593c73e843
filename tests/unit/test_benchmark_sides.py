"""What the benchmarks compare computes the same: a ratio between different results says nothing."""

from pathlib import Path

import pytest
import torch

from benchmarks import bench_attention_share as share
from benchmarks import bench_loss, bench_step, dense_loss
from benchmarks.bench_image_path import generated
from navit.model.attention import AttentionPlan
from packer.batch import PackedBatch


def test_a_dense_mask_gives_what_block_diagonal_attention_gives() -> None:
    seq_len, tokens = 512, 1024
    q, k, v = torch.randn(3, tokens, 2, 8, dtype=torch.float64)
    forms = {form.name: form for form in share.make_forms(seq_len, tokens)}
    images, dense = forms["images of 256 tokens"], forms["dense mask"]
    plan = AttentionPlan(images.lengths, q.device)
    torch.testing.assert_close(
        dense.attend(q, k, v, plan), images.attend(q, k, v, plan), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("seq_len", [256, 1024, 8192])
def test_every_form_has_the_same_tokens_and_its_share_of_the_operations(seq_len: int) -> None:
    width, tokens = 192, 8192
    for form in share.make_forms(seq_len, tokens):
        assert sum(form.lengths) == tokens
        assert max(form.lengths) <= seq_len
    one, images = (
        next(form for form in share.make_forms(seq_len, tokens) if form.name == name)
        for name in ("one segment", "images of 256 tokens")
    )
    assert one.flop_share(width) == pytest.approx(seq_len / (seq_len + 6 * width))
    assert images.flop_share(width) == pytest.approx(256 / (256 + 6 * width))


def test_attention_is_timed_once_within_the_block() -> None:
    block = share.make_block(64)
    x = torch.randn(512, 64)
    for form in share.make_forms(256, 512):
        attention, whole = share.block_seconds(block, x, form)
        assert 0 < attention < whole


def test_all_softmax_losses_and_all_sigmoid_losses_agree() -> None:
    image, text = torch.nn.functional.normalize(torch.randn(2, 600, 8), dim=-1)
    numbers = [image, text, torch.tensor(10.0)]
    for name, loss in bench_loss.losses().items():
        sigmoid = name.startswith("sigmoid")
        inputs = [*numbers, torch.tensor(-5.0)] if sigmoid else numbers
        exact = dense_loss.sigmoid_whole if sigmoid else dense_loss.one_matmul
        torch.testing.assert_close(loss(*inputs), exact(*inputs), rtol=1e-5, atol=1e-5)


@pytest.fixture
def steps(tmp_path: Path) -> bench_step.Steps:
    images = generated(24, (160, 120))
    captions = [f"photograph number {number}" for number in range(len(images))]
    shards = bench_step.write_pairs(images, captions, tmp_path)
    return bench_step.make_steps(shards, captions, quick=True)


def test_the_loader_gives_the_batches_that_were_preloaded(steps: bench_step.Steps) -> None:
    def keys(batches: list[PackedBatch]) -> list[tuple[str, ...]]:
        return [batch.keys for batch in batches]

    made = [batch for batch, _ in zip(steps.loader(), steps.preloaded, strict=False)]
    assert keys(made) == keys(steps.preloaded)
    assert all(
        torch.equal(a.patches, b.patches) for a, b in zip(made, steps.preloaded, strict=True)
    )
