"""Operators over segments: forward of eager mode, backward by hand against autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from navit.model import operators
from navit.model.segments import attend_segments, group_segments, pool_segments

LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=7)


def assert_same(
    found: torch.Tensor, expected: torch.Tensor, inputs: list[torch.Tensor], tolerance: float
) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    weights = torch.randn_like(expected)
    pairs = zip(
        *(torch.autograd.grad(out, inputs, weights) for out in (found, expected)), strict=True
    )
    for ours, autograd in pairs:
        assert ours.dtype == autograd.dtype
        torch.testing.assert_close(ours, autograd, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("causal", [False, True])
@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 999))
def test_attention_and_its_gradients_are_those_of_autograd(
    causal: bool, lengths: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    inputs = list(torch.randn(sum(lengths), 3, 2, 8, dtype=torch.float64).unbind(1))
    inputs = [x.requires_grad_() for x in inputs]
    found = operators.attend(*inputs, torch.tensor(lengths), causal)
    assert_same(
        found, attend_segments(*inputs, group_segments(lengths), causal=causal), inputs, 1e-12
    )


@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 999))
def test_pooling_and_its_gradients_are_those_of_autograd(lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    scores = torch.randn(sum(lengths), 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(sum(lengths), 8, dtype=torch.float64, requires_grad=True)
    found = operators.pool(scores, x, torch.tensor(lengths))
    assert_same(found, pool_segments(scores, x, group_segments(lengths)), [scores, x], 1e-12)


def test_a_backward_pass_in_pieces_is_that_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [torch.randn(30, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lengths = torch.tensor([6] * 5)
    weights = torch.randn(30, 2, 4, dtype=torch.float64)
    whole = torch.autograd.grad(operators.attend(*inputs, lengths, False), inputs, weights)
    monkeypatch.setattr(operators, "MAX_SCORES", 2 * 2 * 36)
    pieces = torch.autograd.grad(operators.attend(*inputs, lengths, False), inputs, weights)
    for a, b in zip(pieces, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [[1], [1] * 50, [40, 3, 3, 7]])
def test_half_precision_stays_within_its_rounding(lengths: list[int]) -> None:
    exact = [torch.randn(sum(lengths), 2, 8, requires_grad=True) for _ in range(3)]
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    exact = [x.detach().float().requires_grad_() for x in half]
    weights = torch.randn(sum(lengths), 2, 8).bfloat16()
    found = operators.attend(*half, torch.tensor(lengths), False)
    expected = operators.attend(*exact, torch.tensor(lengths), False)
    torch.testing.assert_close(found.float(), expected, rtol=0.03, atol=0.03)
    ours = torch.autograd.grad(found, half, weights)
    theirs = torch.autograd.grad(expected, exact, weights.float())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05)
