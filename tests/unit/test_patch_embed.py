"""Patch embedding: uint8 pixels to vectors, normalised on the device."""

import pytest
import torch

from navit.model.patch_embed import PatchEmbed
from tests.helpers.batches import pack_images, random_images


def test_pixels_are_scaled_to_minus_one_to_one() -> None:
    embed = PatchEmbed(2, 5).double()
    patches = torch.randint(0, 256, (7, 12), dtype=torch.uint8)
    expected = (patches.double() / 255 * 2 - 1) @ embed.proj.weight.T
    torch.testing.assert_close(embed(patches), expected, rtol=0, atol=1e-12)


def test_centred_pixels_are_exact_in_bfloat16() -> None:
    """The subtraction happens in the compute type; all 256 values survive it."""
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(values.bfloat16().sub_(127.5).double(), values.double() - 127.5)


def test_other_means_and_deviations_are_those_of_each_channel() -> None:
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    for bias in (False, True):
        embed = PatchEmbed(2, 5, bias=bias, mean=mean, std=std).double()
        patches = torch.randint(0, 256, (7, 12), dtype=torch.uint8)
        scale = [torch.tensor(x, dtype=torch.float64) for x in (mean, std)]
        pixels = (patches.double().view(7, 4, 3) / 255 - scale[0]) / scale[1]
        expected = torch.nn.functional.linear(pixels.flatten(1), embed.proj.weight, embed.proj.bias)
        torch.testing.assert_close(embed(patches), expected, rtol=0, atol=1e-12)


def test_means_cost_no_precision_in_bfloat16() -> None:
    """Normalising in bfloat16 first would round every pixel; folding rounds only the weights."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    embed = PatchEmbed(16, 64, mean=mean, std=std)
    patches = torch.randint(0, 256, (50, 768), dtype=torch.uint8)
    exact = embed.double()(patches)
    pixels = (patches.double().view(50, 256, 3) / 255 - torch.tensor(mean)) / torch.tensor(std)
    plain = pixels.flatten(1).bfloat16() @ embed.proj.weight.bfloat16().T
    folded = embed.bfloat16()(patches)
    assert (folded.double() - exact).std() <= 2 * (plain.double() - exact).std()


def test_autocast_computes_in_its_type() -> None:
    embed = PatchEmbed(2, 5)
    patches = torch.randint(0, 256, (7, 12), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        half = embed(patches)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), embed(patches), rtol=0.02, atol=0.02)


def test_another_patch_size_is_refused_by_name() -> None:
    images = random_images(4, seed=0, patch_size=8)
    with pytest.raises(ValueError, match=r"model's \(16\); got 8.*PackerConfig\(patch_size=16\)"):
        PatchEmbed(16, 5).check_patches(pack_images(images))
    mixed = pack_images([*images, *random_images(1, seed=1, patch_size=4)])
    with pytest.raises(ValueError, match=r"size \(8\); got \[4, 8\]\. Make the model flexible"):
        PatchEmbed(8, 5).check_patches(mixed)
