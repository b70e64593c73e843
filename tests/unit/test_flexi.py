"""Flexible towers: one buffer of weights for patches of every size."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from navit import CLIP, CLIPConfig, NaViT, NaViTConfig, TextConfig
from navit.model.classifier import Classifier, ClassifierConfig
from navit.model.flexi_embed import FlexiPatchEmbed, group_patches
from navit.model.pi_resize import pi_matrix
from tests.helpers.batches import pack_images, random_images, random_text

SHAPE: dict[str, Any] = {"width": 32, "mlp_dim": 48}


def tower(**changes: Any) -> NaViT:
    torch.manual_seed(0)
    return NaViT(NaViTConfig.named("tiny", **{**SHAPE, **changes})).double().eval()


@pytest.mark.parametrize("patch_bias", [False, True])
def test_a_tower_made_flexible_gives_what_it_gave(patch_bias: bool) -> None:
    """At its own patch size, whatever the buffer."""
    fixed = tower(patch_size=6, patch_bias=patch_bias, pixel_std=(0.2, 0.3, 0.4))
    batch = pack_images(random_images(5, seed=0, patch_size=6))
    flexible = fixed.flexible(16)
    assert flexible.config.patch_buffer == 16
    assert fixed.config.patch_buffer is None, "the model itself is left as it was"
    torch.testing.assert_close(flexible(batch).pooled, fixed(batch).pooled, rtol=0, atol=1e-10)


def test_a_tower_fixed_at_a_size_is_the_flexible_one_there() -> None:
    flexible = tower(patch_buffer=12)
    for size in (5, 12, 16):
        batch = pack_images(random_images(4, seed=size, patch_size=size))
        fixed = flexible.at_patch_size(size)
        assert (fixed.config.patch_size, fixed.config.patch_buffer) == (size, None)
        found, expected = fixed(batch).pooled, flexible(batch).pooled
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_both_towers_and_the_classifier_have_flexible_copies() -> None:
    torch.manual_seed(0)
    vision = NaViTConfig.named("tiny", patch_size=4, **SHAPE)
    text = TextConfig.named("tiny", vocab_size=50, **SHAPE)
    clip = CLIP(CLIPConfig(vision, text, embed_dim=16)).double().flexible(8)
    assert clip.config.vision.patch_buffer == 8
    images = random_images(6, seed=1, patch_size=(3, 4, 8))
    batch = pack_images(images, seq_len=40, captions=random_text([3] * 6, vocab_size=50, seed=0))
    assert clip(batch).image.shape == (6, 16)

    classifier = Classifier(ClassifierConfig(vision, 7)).double().eval()
    classifier.head.weight.data.normal_()
    small = [image for image in images if image.patch_size == 4]
    expected = classifier(pack_images(small))
    found = classifier.flexible(8)(pack_images(small))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert classifier.flexible(8).at_patch_size(4).config.vision == vision


def test_a_flexible_tower_is_saved_and_read_back(tmp_path: Path) -> None:
    flexible = tower(patch_buffer=8)
    flexible.save_pretrained(tmp_path)
    batch = pack_images(random_images(6, seed=2, patch_size=(3, 8)), seq_len=30)
    again = NaViT.from_pretrained(tmp_path)
    assert again.config == flexible.config
    assert torch.equal(again(batch).pooled, flexible(batch).pooled)


def test_grouped_patches_are_those_mapped_to_the_buffer() -> None:
    """<x, P w> = <P^T x, w>: the slow twin maps each patch to the buffer's size."""
    torch.manual_seed(0)
    embed = FlexiPatchEmbed(10, 7, bias=True).double()
    images = random_images(9, seed=3, patch_size=(4, 10, 13))
    batch = pack_images(images, seq_len=60)
    lengths = batch.segment_lengths
    index = torch.arange(sum(lengths))
    # Padding is a segment of size 0: its tokens are not asked for.
    real = [i for i, size in enumerate(batch.segment_patch_sizes) if size]
    places = torch.cat([index.split(lengths)[i] for i in real])
    sizes = tuple(batch.segment_patch_sizes[i] for i in real)
    groups = group_patches(sizes, tuple(lengths[i] for i in real), torch.device("cpu"))

    found = embed(batch, places, groups)

    expected, flat = [], batch.patches.flatten(0, 1)
    for size, rows in zip(sizes, (index.split(lengths)[i] for i in real), strict=True):
        expected.append(mapped(embed, flat[rows, : 3 * size**2], size))
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-10)


def mapped(embed: FlexiPatchEmbed, patches: Tensor, size: int) -> Tensor:
    matrix = torch.tensor(pi_matrix(embed.buffer, size))
    pixels = (patches.double() / 255 * 2 - 1).view(-1, size, size, 3)
    basis = torch.einsum("pr,qc,npqx->nrcx", matrix, matrix, pixels).flatten(1)
    return basis @ embed.proj.weight.T + embed.proj.bias


def test_a_batch_without_images_gives_no_vectors_and_zero_gradients() -> None:
    flexible = tower(patch_buffer=8)
    vectors = flexible(pack_images([], patch_size=9)).pooled
    assert vectors.shape == (0, 32)
    vectors.sum().backward()
    gradient = flexible.patch_embed.proj.weight.grad
    assert gradient is not None
    assert not gradient.any()


def test_a_buffer_must_be_a_side() -> None:
    with pytest.raises(ValueError, match="patch_buffer must be a positive integer; got 0"):
        NaViTConfig.named("tiny", patch_buffer=0)
