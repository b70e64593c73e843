"""The text tower: packed captions against one caption at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from navit import TextConfig, TextTower
from tests.helpers.batches import random_text
from tests.reference import dense_vit


def tiny(**changes: object) -> TextTower:
    torch.manual_seed(0)
    return TextTower(TextConfig.named("tiny", vocab_size=50, max_tokens=9, width=32, **changes))


@pytest.mark.parametrize("pool", ["map", "mean"])
@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_every_caption_and_gradient_is_that_of_the_caption_alone(
    pool: str, lengths: list[int], seed: int
) -> None:
    tower = tiny(pool=pool).double()
    text = random_text(lengths, vocab_size=50, seed=seed)
    state = dict(tower.named_parameters())

    packed = tower(text)

    captions = text.ids.split(lengths)
    plain = torch.stack([dense_vit.caption_vector(state, ids, num_heads=2) for ids in captions])
    torch.testing.assert_close(packed, plain, rtol=0, atol=1e-10)
    weights = torch.randn_like(plain)
    found, expected = (
        torch.autograd.grad((y * weights).sum(), list(state.values())) for y in (packed, plain)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * max(1, float(b.abs().max())))


def test_no_caption_gives_no_vector_and_zero_gradients() -> None:
    tower = tiny()
    pooled = tower(random_text([], vocab_size=50, seed=0))
    assert pooled.shape == (0, 32)
    pooled.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in tower.parameters())


def test_a_caption_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at most max_tokens \(9\) tokens; got 10"):
        tiny()(random_text([3, 10], vocab_size=50, seed=0))
