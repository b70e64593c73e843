from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from packer.config import PackerConfig
from packer.decode import read_size
from packer.errors import SkipSample
from packer.pack import pack
from packer.patchify import cut_patches, image_patches, resize_uint8
from packer.pillow import rgb_pixels
from packer.plan.drop import ConstantDrop, kept_indices
from packer.plan.image import plan_image
from packer.plan.resize import RandomCrop
from packer.transforms import RandomFlip
from tests.reference import pillow_chain


def smooth(height: int, width: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def patches(data: Any, config: PackerConfig, **options: Any) -> Tensor:
    info = read_size(data)
    return image_patches(data, info, plan_image("key", info.size, config), **options)


@given(
    rows=st.integers(1, 5),
    cols=st.integers(1, 5),
    patch_size=st.integers(1, 7),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=50)
def test_a_patch_holds_its_pixels_in_row_column_channel_order(
    rows: int, cols: int, patch_size: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    size = (rows * patch_size, cols * patch_size, 3)
    pixels = torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8))
    expected = [
        pixels[r * patch_size : (r + 1) * patch_size, c * patch_size : (c + 1) * patch_size]
        .reshape(-1)
        .tolist()
        for r in range(rows)
        for c in range(cols)
    ]
    kept = np.flatnonzero(rng.random(rows * cols) < 0.5)

    assert cut_patches(pixels, patch_size).tolist() == expected
    assert cut_patches(pixels, patch_size, kept).tolist() == [expected[i] for i in kept]
    turned = pixels.flip(1).flip(1).permute(1, 0, 2).contiguous().permute(1, 0, 2)
    assert cut_patches(turned, patch_size).tolist() == expected


def test_sides_that_are_no_multiple_of_the_patch_size_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of patch_size"):
        cut_patches(torch.zeros(8, 9, 3, dtype=torch.uint8), 4)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@settings(deadline=None, max_examples=30)
@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    target=st.tuples(st.integers(1, 60), st.integers(1, 60)),
)
def test_resizing_agrees_with_pillow(
    resample: str, size: tuple[int, int], target: tuple[int, int]
) -> None:
    # Away from 0 and 255: both clip overshoots between their two passes, each in its own way.
    image = Image.fromarray(np.asarray(smooth(*size)) // 2 + 64)
    kernel = Image.Resampling[resample.upper()]
    expected = np.asarray(image.resize(target[::-1], kernel), dtype=np.int16)
    resized = resize_uint8(torch.from_numpy(np.array(image)), *target, resample)
    assert resized.is_contiguous()
    assert np.abs(resized.numpy() - expected).max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (1, 30_001), (30_001, 1), (311, 257)])
def test_pixels_copied_out_in_one_piece_are_those_numpy_gets(size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    np.testing.assert_array_equal(rgb_pixels(image), np.asarray(image))
    cropped = image.crop((0, 0, max(size[1] - 1, 1), max(size[0] - 1, 1)))
    np.testing.assert_array_equal(rgb_pixels(cropped), np.asarray(cropped))


def test_a_constant_image_stays_constant_at_any_reduction() -> None:
    for shape in ((9000, 40), (40, 9000), (1, 3000), (3000, 1)):
        pixels = torch.full((*shape, 3), 200, dtype=torch.uint8)
        assert resize_uint8(pixels, 16, 32).unique().tolist() == [200]


@pytest.mark.parametrize("decode", ["reduced", "full"])
def test_an_image_as_large_as_its_grid_is_never_resampled(decode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    result = patches(encode(Image.fromarray(pixels)), PackerConfig(), decode=decode)
    cut = pixels.reshape(2, 16, 3, 16, 3).transpose(0, 2, 1, 3, 4).reshape(6, 768)
    np.testing.assert_array_equal(result.numpy(), cut)
    tensor = torch.from_numpy(pixels)
    assert resize_uint8(tensor, 32, 48) is tensor


@pytest.mark.parametrize("max_tokens", [16, 64, 256])
@pytest.mark.parametrize("decode", ["reduced", "full"])
def test_patches_equal_those_of_the_pillow_chain(max_tokens: int, decode: str) -> None:
    data = encode(smooth(300, 420), "JPEG")
    expected = (pillow_chain.patches(data, 16, max_tokens) * 0.5 + 0.5) * 255
    result = patches(data, PackerConfig(max_tokens=max_tokens), decode=decode)
    difference = np.abs(result.numpy() - expected)
    assert difference.max() <= (2.01 if decode == "full" else 12)
    assert difference.mean() <= (0.3 if decode == "full" else 1)


def test_the_plans_box_and_kept_tokens_are_executed() -> None:
    pixels = np.asarray(smooth(200, 160))
    config = PackerConfig(
        patch_size=8, crop=RandomCrop(0.3, 1.5), token_drop=ConstantDrop(0.4), max_tokens=500
    )
    info = read_size(pixels)
    plan = plan_image("key", info.size, config)
    assert plan.box is not None
    top, left, height, width = plan.box
    box = torch.from_numpy(pixels[top : top + height, left : left + width].copy())
    resized = resize_uint8(box, plan.grid.rows * 8, plan.grid.cols * 8)
    kept = kept_indices(plan.grid.num_tokens, plan.num_kept, plan.kept_draw)

    for image in (pixels, encode(Image.fromarray(pixels)), Image.fromarray(pixels)):
        result = image_patches(image, info, plan)
        assert result.shape == (plan.num_kept, 192)
        assert torch.equal(result, cut_patches(resized, 8)[torch.from_numpy(kept)])


def test_a_strip_becomes_at_least_one_patch_a_side() -> None:
    for size in ((1, 3000), (3000, 1), (1, 1)):
        image = np.full((*size, 3), 77, np.uint8)
        result = patches(image, PackerConfig(max_tokens=256))
        assert 1 <= len(result) <= 256
        assert result.unique().tolist() == [77]


def test_the_transform_is_seeded_by_the_sample_and_sees_the_resized_image() -> None:
    image = np.asarray(smooth(100, 100))
    seen: list[tuple[tuple[int, ...], float]] = []

    def noise(pixels: Tensor, generator: torch.Generator) -> Tensor:
        seen.append((tuple(pixels.shape), torch.rand((), generator=generator).item()))
        return pixels

    info = read_size(image)
    for key in ("a", "b", "a"):
        plan = plan_image(key, info.size, PackerConfig(max_tokens=9))
        image_patches(image, info, plan, transform=noise)
    assert seen[0] == seen[2] != seen[1]
    assert seen[0][0] == (48, 48, 3)


def test_a_transform_may_work_in_place_without_reaching_the_callers_image() -> None:
    image = np.full((32, 32, 3), 9, np.uint8)
    result = patches(image, PackerConfig(), transform=lambda pixels, _: pixels.zero_())
    assert not result.any()
    assert (image == 9).all()


def test_a_mirrored_image_has_mirrored_patches() -> None:
    image = np.asarray(smooth(32, 64))
    flipped = patches(image, PackerConfig(), transform=RandomFlip(1.0))
    assert torch.equal(flipped, patches(image[:, ::-1], PackerConfig()))


@pytest.mark.parametrize(
    "transform",
    [
        lambda pixels, _: pixels.float(),
        lambda pixels, _: pixels[:16],
        lambda pixels, _: pixels.permute(2, 0, 1),
        lambda pixels, _: None,
    ],
)
def test_a_transform_that_changes_shape_or_dtype_is_refused(transform: Any) -> None:
    with pytest.raises(ValueError, match="transform must return a uint8 tensor"):
        patches(np.zeros((32, 32, 3), np.uint8), PackerConfig(), transform=transform)


def test_an_image_that_breaks_after_planning_is_a_skip() -> None:
    data = encode(smooth(64, 64), "JPEG")
    config = PackerConfig(max_tokens=4)
    with pytest.raises(SkipSample, match="decode_error"):
        patches(data[: len(data) // 2], config)
    assert patches(data[: len(data) // 2], config, keep_truncated=True).shape == (4, 768)


def test_filling_the_budget_bilinearly_gives_the_patches_of_hugging_faces_processor() -> None:
    """SigLIP 2's own processor, on Pillow: same grids, pixels within a level of rounding."""
    processor = Siglip2ImageProcessorPil(patch_size=16, max_num_patches=64)
    config = PackerConfig(max_tokens=64, resize="fill_budget", decode="full", resample="bilinear")
    for seed, (height, width) in enumerate([(90, 200), (64, 64), (300, 120), (31, 500)]):
        image = smooth(height, width, seed)
        theirs = processor(image, return_tensors="np")
        rows, cols = theirs["spatial_shapes"][0].tolist()

        [batch] = pack([(image, "a")], config, sequences_per_batch=1)

        assert batch.grid_sizes[0, 0].tolist() == [rows, cols]
        expected = theirs["pixel_values"][0][: rows * cols] * 127.5 + 127.5
        found = batch.patches[0, : rows * cols].numpy()
        assert np.abs(found - expected).max() <= 1.01
