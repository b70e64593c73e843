from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from torch import Generator, Tensor

from packer.transforms import ColorJitter, Compose, RandomFlip


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def image(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (height, width, 3), generator=seeded(seed), dtype=torch.uint8)


@settings(deadline=None, max_examples=30)
@given(
    transform=st.sampled_from(
        [RandomFlip(), ColorJitter(), Compose([RandomFlip(), ColorJitter(1.0, 1.0, 1.0)])]
    ),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    seed=st.integers(0, 999),
)
def test_shape_and_dtype_stay_and_the_generator_decides(
    transform: Callable[[Tensor, Generator], Tensor], height: int, width: int, seed: int
) -> None:
    pixels = image(height, width, seed)
    before = pixels.clone()
    first, second = (transform(pixels, seeded(seed)) for _ in range(2))
    assert (first.dtype, first.shape) == (torch.uint8, pixels.shape)
    assert torch.equal(first, second)
    assert torch.equal(pixels, before)


def test_flips_come_as_often_as_asked() -> None:
    pixels, generator = image(2, 3), seeded(0)
    for p in (0.0, 0.3, 1.0):
        results = [RandomFlip(p)(pixels, generator) for _ in range(400)]
        mirrored = [torch.equal(result, pixels.flip(1)) for result in results]
        assert all(
            flipped or torch.equal(result, pixels)
            for flipped, result in zip(mirrored, results, strict=True)
        )
        assert sum(mirrored) / 400 == pytest.approx(p, abs=0.08 if 0 < p < 1 else 0)


def test_no_jitter_changes_nothing() -> None:
    pixels = image(16, 16)
    assert torch.equal(ColorJitter(0.0, 0.0, 0.0)(pixels, seeded(0)), pixels)


@pytest.mark.parametrize(
    ("name", "enhance"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
def test_each_factor_does_what_pillows_enhancement_does(name: str, enhance: type) -> None:
    """Pillow rounds the grey it blends with, hence two levels of tolerance."""
    amounts = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, name: 0.5}
    index = list(amounts).index(name)
    pixels = image(16, 16)
    for seed in range(5):
        factor = 1 + 0.5 * (2 * torch.rand(3, generator=seeded(seed))[index].item() - 1)
        expected = np.asarray(enhance(Image.fromarray(pixels.numpy())).enhance(factor))
        changed = ColorJitter(**amounts)(pixels, seeded(seed)).numpy()
        assert np.abs(changed.astype(int) - expected.astype(int)).max() <= 2


def test_transforms_are_values() -> None:
    assert Compose([RandomFlip()]) == Compose((RandomFlip(0.5),))
    assert hash(Compose([ColorJitter()])) == hash(Compose([ColorJitter()]))


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_amounts_outside_zero_to_one_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\]"):
        RandomFlip(value)
    with pytest.raises(ValueError, match=r"contrast must be in \[0, 1\]"):
        ColorJitter(contrast=value)
