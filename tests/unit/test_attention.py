"""Block-diagonal attention: plans, backends, and the mask handed to xformers."""

import logging
import warnings
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from navit.model import backends
from navit.model.attention import (
    AttentionPlan,
    block_diagonal_attention,
    order_by_length,
)
from navit.model.backends import resolve_backend

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attend with a full (T, T) additive mask; tensors are (T, H, Dh)."""
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5 + mask
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def block_mask(lengths: list[int], causal: bool = False) -> Tensor:
    """0 inside a segment (up to the query's own place), -inf outside."""
    mask = torch.full((sum(lengths), sum(lengths)), -torch.inf, dtype=torch.float64)
    for start, stop in pairwise([0, *accumulate(lengths)]):
        for query in range(start, stop):
            mask[query, start : query + 1 if causal else stop] = 0
    return mask


def random_qkv(tokens: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Make q, k and v as the block does: views of one (T, 3, H, Dh) tensor."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(tokens, 3, 2, 8, generator=generator, dtype=torch.float64).to(dtype)
    return list(qkv.requires_grad_().unbind(1))


@pytest.mark.parametrize("causal", [False, True])
@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 999))
def test_attention_is_that_of_the_dense_mask_in_value_and_gradient(
    causal: bool, lengths: list[int], seed: int
) -> None:
    q, k, v = random_qkv(sum(lengths), torch.float64, seed)
    plan = AttentionPlan(tuple(lengths), CPU, causal=causal)
    packed = block_diagonal_attention(q, k, v, plan)
    dense = dense_attention(q, k, v, block_mask(lengths, causal))
    torch.testing.assert_close(packed, dense, rtol=0, atol=1e-12)
    weights = torch.randn_like(dense)
    gradients = (torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (packed, dense))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lengths", [[1], [1] * 3000, [1500], [7] * 50, [1030, 5, 5]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_of_every_kind_run_forward_and_backward(
    lengths: list[int], dtype: torch.dtype, causal: bool
) -> None:
    """bfloat16 goes through two paths by length; both stay within its rounding."""
    q, k, v = random_qkv(sum(lengths), dtype)
    plan = AttentionPlan(tuple(lengths), CPU, causal=causal)
    out = block_diagonal_attention(q, k, v, plan)
    exact = block_diagonal_attention(q.double(), k.double(), v.double(), plan)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    for gradient in torch.autograd.grad(out.float().sum(), (q, k, v)):
        assert bool(gradient.isfinite().all())


def test_no_segment_gives_no_token_and_zero_gradients() -> None:
    q, k, v = random_qkv(0, torch.float32)
    out = block_diagonal_attention(q, k, v, AttentionPlan((), CPU))
    assert out.shape == (0, 2, 8)
    assert all(x.shape == (0, 2, 8) for x in torch.autograd.grad(out.sum(), (q, k, v)))


@settings(max_examples=50, deadline=None)
@given(
    segments=st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=12),
)
def test_a_sorted_plan_names_each_kept_token_once(segments: list[tuple[int, bool]]) -> None:
    lengths, keep = [s[0] for s in segments], [s[1] for s in segments]
    ordered, order, tokens = order_by_length(lengths, keep)
    starts = np.cumsum([0, *lengths])
    expected = [range(starts[i], starts[i] + lengths[i]) for i in order]
    assert sorted(ordered) == list(ordered)
    assert sorted(order) == [i for i, kept in enumerate(keep) if kept]
    assert tokens.tolist() == [token for segment in expected for token in segment]
    plan = AttentionPlan(ordered, CPU)
    assert len(plan.groups) == len(set(ordered))
    assert sum(group.num_tokens for group in plan.groups) == plan.num_tokens == len(tokens)
    assert plan.segment_index.tolist() == [i for i, n in enumerate(ordered) for _ in range(n)]


@pytest.mark.parametrize("causal", [False, True])
@settings(max_examples=20, deadline=None)
@given(lengths=LENGTHS)
def test_the_mask_for_xformers_is_block_diagonal(causal: bool, lengths: list[int]) -> None:
    """Xformers has no CPU kernel: its own mask object, written out, goes into dense attention."""
    plan = AttentionPlan(tuple(lengths), CPU, "xformers", causal)
    mask = quietly_made_mask(plan)
    assert torch.equal(mask.double(), block_mask(lengths, causal))
    q, k, v = random_qkv(sum(lengths), torch.float64)
    torch.testing.assert_close(
        dense_attention(q, k, v, mask.double()),
        block_diagonal_attention(q, k, v, AttentionPlan(tuple(lengths), CPU, causal=causal)),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("causal", [False, True])
@settings(max_examples=20, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_varlen_hands_torchs_kernel_the_segments(
    causal: bool, lengths: list[int], seed: int
) -> None:
    """The kernel runs on CUDA alone: in its place stands what its documentation says it does."""

    def documented(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        **options: Any,
    ) -> Tensor:
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert q.is_contiguous()
        assert k.is_contiguous()
        assert v.is_contiguous()
        assert options == {"window_size": (-1, 0) if causal else (-1, -1)}
        found = cu_q.diff().tolist()
        assert torch.equal(cu_q, cu_k)
        assert max_q == max_k == max(found)
        return dense_attention(q, k, v, block_mask(found, causal))

    plan = AttentionPlan(tuple(lengths), CPU, "varlen", causal)
    q, k, v = random_qkv(sum(lengths), torch.float64, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.attention.varlen.varlen_attn", documented)
        found = block_diagonal_attention(q, k, v, plan)
    expected = block_diagonal_attention(q, k, v, replace(plan, backend="segments"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def quietly_made_mask(plan: AttentionPlan) -> Tensor:
    """Build the mask, catching what xformers says when a CPU imports it."""
    pytest.importorskip("xformers")
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return plan.xformers_mask.materialize((plan.num_tokens, plan.num_tokens))
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "backend"),
    [
        ("cpu", torch.float32, 64, "segments"),
        ("cpu", torch.bfloat16, 64, "segments"),
        ("cuda", torch.float64, 64, "segments"),
        ("cuda", torch.bfloat16, 20, "segments"),
        ("cuda", torch.bfloat16, 64, "xformers"),
        ("cuda", torch.float32, 64, "xformers"),
    ],
)
@pytest.mark.parametrize("installed", [("xformers", "varlen"), ("varlen",), ()])
def test_auto_picks_by_device_dtype_and_head_size(
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    backend: str,
    installed: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "navit.model.backends._is_installed", lambda name, *needs: name in installed
    )
    if backend not in installed:  # the next choice is varlen, in half precision alone
        half = dtype == torch.bfloat16 and backend == "xformers" and "varlen" in installed
        backend = "varlen" if half else "segments"
    where = torch.device(device)
    assert resolve_backend("auto", device=where, dtype=dtype, head_dim=head_dim) == backend
    assert resolve_backend("segments", device=where, dtype=dtype, head_dim=head_dim) == "segments"


def test_xformers_where_it_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"CUDA device.*got cpu, torch.float32, 64.*'segments'"):
        resolve_backend("xformers", device=CPU, dtype=torch.float32, head_dim=64)
    monkeypatch.setattr("navit.model.backends.find_spec", lambda name: None)
    cuda = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dim": 64}
    with pytest.raises(ImportError, match="pip install xformers"):
        resolve_backend("xformers", **cuda)
    assert resolve_backend("auto", **cuda) == "segments"


def test_a_trial_of_xformers_without_kernels_says_no() -> None:
    """As beside a torch of another CUDA version: it can be imported, and computes nothing."""
    pytest.importorskip("xformers")
    logging.disable(logging.WARNING)  # it says so itself
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            assert not backends._xformers_computes(CPU, torch.float32, 64)
    finally:
        logging.disable(logging.NOTSET)


def test_xformers_that_computes_nothing_is_as_if_it_were_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: "there")
    monkeypatch.setattr(backends, "_xformers_computes", lambda *needs: False)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    cuda = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dim": 64}
    assert resolve_backend("auto", **cuda) == "varlen"
    with pytest.raises(ImportError, match=r"python -m xformers.info"):
        resolve_backend("xformers", **cuda)
    monkeypatch.setattr(backends, "_xformers_computes", lambda *needs: True)
    assert resolve_backend("auto", **cuda) == "xformers"


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(torch.float32, 64), (torch.bfloat16, 264), (torch.bfloat16, 20)]
)
def test_varlen_where_it_cannot_run_says_why(
    dtype: torch.dtype, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"a CUDA device, float16 or bfloat16.* at most 256; got"):
        resolve_backend("varlen", device=torch.device("cuda"), dtype=dtype, head_dim=head_dim)
    with pytest.raises(ValueError, match="got cpu"):
        resolve_backend("varlen", device=CPU, dtype=torch.bfloat16, head_dim=64)
    # Turing has no kernel for it.
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    cuda = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dim": 64}
    with pytest.raises(ImportError, match=r"torch 2.10 or newer.*capability 8.0"):
        resolve_backend("varlen", **cuda)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    assert resolve_backend("varlen", **cuda) == "varlen"


def test_a_plan_refuses_empty_segments_and_unresolved_backends() -> None:
    with pytest.raises(ValueError, match="positive; got 0"):
        AttentionPlan((3, 0), CPU)
    with pytest.raises(ValueError, match="resolve_backend"):
        AttentionPlan((3,), CPU, "auto")


@given(lengths=LENGTHS, most=st.integers(1, 30))
def test_parts_of_a_plan_hold_its_segments_within_the_limit(lengths: list[int], most: int) -> None:
    parts = AttentionPlan(tuple(lengths), CPU, causal=True).parts(most)
    assert [n for part in parts for n in part.lengths] == lengths
    assert all(part.num_tokens <= most or len(part.lengths) == 1 for part in parts)
    assert all(part.causal for part in parts)
    fits = (a.num_tokens + b.lengths[0] > most for a, b in pairwise(parts))
    assert all(fits), "no part could have taken the next segment"
