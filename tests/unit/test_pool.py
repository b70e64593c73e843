"""Masked pooling against the plain formula, one segment at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from navit import NaViTConfig
from navit.model.attention import AttentionPlan
from navit.model.pool import make_pool
from tests.reference import dense_vit

CPU = torch.device("cpu")


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("kind", ["map", "map without mlp", "mean"])
@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_each_segment_is_pooled_by_itself(
    kind: str, biases: bool, lengths: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    choice = {"pool": kind} if kind != "map without mlp" else {"pool": "map", "pool_mlp": False}
    pool = make_pool(NaViTConfig.named("tiny", width=16, biases=biases, **choice)).double()
    for parameter in pool.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = {f"pool.{name}": value for name, value in pool.named_parameters()}
    x = torch.randn(sum(lengths), 16, dtype=torch.float64, requires_grad=True)

    pooled = pool(x, AttentionPlan(tuple(lengths), CPU))

    plain = torch.stack([dense_vit.pool(state, part, 2, "gelu") for part in x.split(lengths)])
    torch.testing.assert_close(pooled, plain, rtol=0, atol=1e-11)
    weights = torch.randn_like(plain)
    inputs = [x, *state.values()]
    found, expected = (
        torch.autograd.grad((y * weights).sum(), inputs, allow_unused=True) for y in (pooled, plain)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=0, atol=1e-10)


def test_the_softmax_of_half_precision_tokens_is_in_float32() -> None:
    """A large shift of the scores leaves attention pooling finite and near float64's."""
    torch.manual_seed(0)
    pool = make_pool(NaViTConfig.named("tiny"))
    x = 30 * torch.randn(50, 64)
    exact = pool.double()(x.bfloat16().double(), AttentionPlan((20, 30), CPU))
    half = pool.bfloat16()(x.bfloat16(), AttentionPlan((20, 30), CPU))
    assert half.dtype == torch.bfloat16
    error = (half.double() - exact).norm() / exact.norm()
    assert error < 0.1
