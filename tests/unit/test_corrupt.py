"""`navit.model.corrupt`: which patches are corrupted, and the colours asked for."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from navit.model.corrupt import (
    COLOURS,
    Corrupted,
    Corruption,
    colour_classes,
    draw_corruption,
    key_bits,
)
from tests.reference import masked as reference


def draw(
    lengths: list[int], *, seed: int = 0, config: Corruption | None = None, columns: int = 7
) -> Corrupted:
    """Decide the fate of images whose tokens fill rows of their grids."""
    sizes = torch.tensor(lengths, dtype=torch.int64)
    place = torch.cat([torch.arange(n) for n in lengths])
    return draw_corruption(
        config or Corruption(),
        torch.tensor(seed),
        torch.from_numpy(key_bits([f"image-{i}" for i in range(len(lengths))])),
        torch.repeat_interleave(torch.arange(len(lengths)), sizes),
        sizes,
        sizes.cumsum(0) - sizes,
        torch.stack([place // columns, place % columns], dim=1).int(),
    )


def assert_share(found: Tensor, share: float) -> None:
    """Five standard errors: one chance in two million for each share tested."""
    n = found.numel()
    bound = 5 * math.sqrt(share * (1 - share) / n)
    assert abs(found.double().mean().item() - share) <= bound


@pytest.mark.parametrize(
    "config", [Corruption(), Corruption(share=0.15), Corruption(share=1.0, mask=0.2, swap=0.7)]
)
def test_shares_are_those_asked_for_within_binomial_bounds(config: Corruption) -> None:
    found = draw([49] * 4000, config=config)
    place = torch.arange(len(found.asked))
    swapped = found.source != place
    assert_share(found.asked, config.share)
    assert_share(found.masked, config.share * config.mask)
    assert_share(swapped, config.share * config.swap)
    assert_share(found.asked & ~found.masked & ~swapped, _kept(config))
    assert not (found.masked & ~found.asked).any()
    assert not (swapped & (found.masked | ~found.asked)).any()


def _kept(config: Corruption) -> float:
    return config.share * max(1 - config.mask - config.swap, 0.0)


def test_patches_are_drawn_independently_of_each_other_and_of_their_place() -> None:
    """Neighbours, places, images and steps tell nothing of one another."""
    asked = draw([49] * 4000).asked.view(4000, 7, 7)
    for both in (
        asked[:, :, 1:] & asked[:, :, :-1],
        asked[:, 1:] & asked[:, :-1],
        asked[1:] & asked[:-1],
        asked & draw([49] * 4000, seed=1).asked.view(4000, 7, 7),
    ):
        assert_share(both, 0.25)
    for place in asked.flatten(1).T:
        assert_share(place, 0.5)


def test_another_patch_is_any_other_of_the_image_equally_often() -> None:
    found = draw([7] * 4000, config=Corruption(share=1.0, mask=0.0, swap=1.0))
    place = torch.arange(len(found.source))
    assert torch.equal(found.source // 7, place // 7)
    steps = (found.source - place) % 7
    for step in range(1, 7):
        assert_share(steps == step, 1 / 6)


def test_the_only_patch_of_an_image_stays() -> None:
    found = draw([1] * 50, config=Corruption(share=1.0, mask=0.0, swap=1.0))
    assert torch.equal(found.source, torch.arange(50))
    assert found.asked.all()


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    seed=st.integers(0, 2**62 - 1),
    shares=st.sampled_from([(0.5, 0.8, 0.1), (0.9, 0.3, 0.6), (0.2, 0.0, 1.0)]),
)
def test_every_fate_is_that_of_the_plain_formula(
    lengths: list[int], seed: int, shares: tuple[float, float, float]
) -> None:
    found = draw(lengths, seed=seed, config=Corruption(*shares))
    start = 0
    for i, length in enumerate(lengths):
        positions = [[n // 7, n % 7] for n in range(length)]
        for n, fate in enumerate(reference.fates(seed, f"image-{i}", positions, shares)):
            token = start + n
            assert bool(found.asked[token]) == fate.asked
            assert bool(found.masked[token]) == fate.masked
            assert int(found.source[token]) == start + fate.source
        start += length


def test_black_is_class_0_and_white_511() -> None:
    patches = torch.tensor([[0] * 48, [255] * 48], dtype=torch.uint8)
    assert colour_classes(patches, 16).tolist() == [0, 511]


def test_three_bits_of_each_channel_red_first() -> None:
    red, green, blue = (np.eye(3, dtype=np.uint8) * 255).repeat(4, 0).reshape(3, 12)
    patches = torch.from_numpy(np.stack([red, green, blue]))
    patches = patches.view(3, 4, 3)
    assert colour_classes(patches.flatten(1), 4).tolist() == [7 * 64, 7 * 8, 7]


def test_a_mean_just_below_a_step_is_of_the_class_below() -> None:
    below, at = [31] * 3 + [32] * 9, [32] * 12
    patches = torch.tensor([below, at], dtype=torch.uint8)
    assert colour_classes(patches, 4).tolist() == [0, 64 + 8 + 1]


@given(seed=st.integers(0, 999), sides=st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_colours_of_mixed_sizes_are_those_of_each_patch(seed: int, sides: list[int]) -> None:
    """Behind a smaller patch there are zeros, which must not darken it."""
    rng = np.random.default_rng(seed)
    patches = torch.zeros(len(sides), 3 * max(sides) ** 2, dtype=torch.uint8)
    for row, side in zip(patches, sides, strict=True):
        low, high = sorted(rng.integers(0, 257, 2))
        drawn = rng.integers(low, high, 3 * side**2) if low < high else np.full(3 * side**2, 9)
        row[: 3 * side**2] = torch.from_numpy(drawn.astype(np.uint8))
    found = colour_classes(patches, torch.tensor(sides) ** 2).tolist()
    assert found == [
        reference.colour_class(row[: 3 * side**2]) for row, side in zip(patches, sides, strict=True)
    ]
    assert all(0 <= colour < COLOURS for colour in found)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"share": 0.0}, r"share must be in \(0, 1\]; got 0.0"),
        ({"share": 1.5}, "got 1.5"),
        ({"mask": 0.8, "swap": 0.3}, "at most 1 together; got 0.8 and 0.3"),
        ({"swap": -0.1}, "at least 0"),
    ],
)
def test_shares_that_cannot_be_are_refused(changes: dict[str, float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Corruption(**changes)
