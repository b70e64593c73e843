"""The text tower: packed captions against one caption at a time."""

from dataclasses import replace
from typing import Any

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


CHOICES: list[dict[str, Any]] = [
    {"pool": "map"},
    {"pool": "mean"},
    {"pool": "mean", "causal": True},
    {"pool": "last", "causal": True, "activation": "quick_gelu", "norm_eps": 1e-3},  # CLIP
    {"pool": "last", "biases": True, "qk_norm": False, "pad_id": 7},  # SigLIP
]


@pytest.mark.parametrize("choices", CHOICES)
@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_every_caption_and_gradient_is_that_of_the_caption_alone(
    choices: dict[str, Any], lengths: list[int], seed: int
) -> None:
    tower = tiny(**choices).double()
    text = random_text(lengths, vocab_size=50, seed=seed)
    state = dict(tower.named_parameters())

    packed = tower(text)

    config = tower.config
    style = dense_vit.Style(
        norm_eps=config.norm_eps, causal=config.causal, pool_last=config.pool == "last"
    )
    captions = text.ids.split(lengths)
    if config.pad_id is not None:
        captions = [torch.cat([ids, ids.new_full((9 - len(ids),), 7)]) for ids in captions]
    plain = torch.stack(
        [
            dense_vit.caption_vector(
                state, ids, num_heads=2, activation=config.activation, style=style
            )
            for ids in captions
        ]
    )
    torch.testing.assert_close(packed, plain, rtol=0, atol=1e-10)
    weights = torch.randn_like(plain)
    found, expected = (
        torch.autograd.grad((y * weights).sum(), list(state.values()), allow_unused=True)
        for y in (packed, plain)
    )
    for a, b in zip(found, expected, strict=True):
        assert a is not None
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * max(1, float(b.abs().max())))


def test_captions_that_fill_their_places_are_not_padded_again() -> None:
    """Whoever pads with the tokenizer gets what the tower's own padding gives."""
    tower = tiny(pool="last", pad_id=7)
    text = random_text([3, 9, 1], vocab_size=50, seed=0)
    padded = random_text([9, 9, 9], vocab_size=50, seed=0)
    filled = [
        torch.cat([ids, ids.new_full((9 - len(ids),), 7)]) for ids in text.ids.split([3, 9, 1])
    ]
    assert torch.equal(tower(text), tower(replace(padded, ids=torch.cat(filled))))
    assert not torch.equal(tower(text), tiny(pool="last")(text))


@pytest.mark.parametrize("choices", CHOICES)
def test_no_caption_gives_no_vector_and_zero_gradients(choices: dict[str, Any]) -> None:
    tower = tiny(**choices)
    pooled = tower(random_text([], vocab_size=50, seed=0))
    assert pooled.shape == (0, 32)
    pooled.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in tower.parameters())


def test_a_caption_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at most max_tokens \(9\) tokens; got 10"):
        tiny()(random_text([3, 10], vocab_size=50, seed=0))
