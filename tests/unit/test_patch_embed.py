"""Patch embedding: uint8 pixels to vectors, normalised on the device."""

import pytest
import torch

from navit.model.patch_embed import PatchEmbed


def test_pixels_are_scaled_to_minus_one_to_one() -> None:
    embed = PatchEmbed(2, 5).double()
    patches = torch.randint(0, 256, (7, 12), dtype=torch.uint8)
    expected = (patches.double() / 255 * 2 - 1) @ embed.proj.weight.T
    torch.testing.assert_close(embed(patches), expected, rtol=0, atol=1e-12)


def test_centred_pixels_are_exact_in_bfloat16() -> None:
    """The subtraction happens in the compute type; all 256 values survive it."""
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(values.bfloat16().sub_(127.5).double(), values.double() - 127.5)


def test_autocast_computes_in_its_type() -> None:
    embed = PatchEmbed(2, 5)
    patches = torch.randint(0, 256, (7, 12), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        half = embed(patches)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), embed(patches), rtol=0.02, atol=0.02)


def test_another_patch_size_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"model's \(16\); got 8.*PackerConfig\(patch_size=16\)"):
        PatchEmbed(16, 5).check_patch_size(8)
