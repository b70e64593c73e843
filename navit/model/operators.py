"""The two functions that go over segments, as operators: one call each to `torch.compile`.

Lengths differ from batch to batch. Traced, a loop over them would be compiled anew for each batch;
as operators, with the lengths in a tensor on the host, they are part of one graph for all batches.
The backward passes compute the softmax again, and are the plain formulas. Attention's forward pass
is that of eager mode; pooling goes over buckets of lengths, and on a GPU runs so uncompiled too.
"""

from typing import Any

import torch
from torch import Tensor

from navit.model.buckets import Bucket, make_buckets
from navit.model.segments import (
    at_least_float32,
    attend_segments,
    group_segments,
    later_tokens,
    split_groups,
)

MAX_SCORES = 1 << 26
"""Scores a backward pass of attention holds at a time."""


@torch.library.custom_op("navit::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, causal: bool) -> Tensor:
    """`attend_segments` of (T, H, Dh) tensors; ``lengths`` int64 (N,) on the host, N at least 1."""
    return attend_segments(q, k, v, group_segments(lengths.tolist()), causal=causal)


@torch.library.custom_op("navit::attend_backward", mutates_args=())
def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    groups = group_segments(lengths.tolist())
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    tensors = (split_groups(x, groups) for x in (grad.contiguous(), q, k, v, *grads))
    for parts in zip(*tensors, strict=True):
        _, length, heads, _ = parts[0].shape
        step = max(1, MAX_SCORES // (heads * length**2))
        for few in zip(*(part.split(step) for part in parts), strict=True):
            _attend_equal_backward(*(x.transpose(1, 2) for x in few), causal=causal)
    return grads[0], grads[1], grads[2]


def _attend_equal_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    *,
    causal: bool,
) -> None:
    """Fill the gradients of segments of one length; all tensors are (count, H, length, Dh)."""
    scale = q.shape[-1] ** -0.5
    scores = (q * scale) @ k.transpose(-1, -2)
    if causal:
        scores.masked_fill_(later_tokens(q.shape[2], q.device), -torch.inf)
    weights = scores.softmax(dim=-1)
    grad_v.copy_(weights.transpose(-1, -2) @ grad)
    by_weight = grad @ v.transpose(-1, -2)
    # Each row of the softmax: w * (g - sum(w g)).
    mean = (weights * by_weight).sum(-1, keepdim=True, dtype=at_least_float32(q.dtype))
    by_score = by_weight.sub_(mean.to(q.dtype)).mul_(weights)
    grad_q.copy_(by_score @ k * scale)
    grad_k.copy_(by_score.transpose(-1, -2) @ q * scale)


@torch.library.custom_op("navit::pool", mutates_args=())
def pool(scores: Tensor, x: Tensor, lengths: Tensor) -> Tensor:
    """`pool_segments` of scores (T, H) and tokens (T, D), in buckets: (N, H, D)."""
    buckets = make_buckets(lengths.tolist(), x.device)
    return torch.cat([_weights(b, scores).to(x.dtype) @ b.pad(x) for b in buckets]).to(x.dtype)


@torch.library.custom_op("navit::pool_backward", mutates_args=())
def pool_backward(
    grad: Tensor, scores: Tensor, x: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of scores and tokens."""
    buckets = make_buckets(lengths.tolist(), x.device)
    grads_s, grads_x = [], []
    for bucket, g in zip(buckets, grad.split_with_sizes([b.count for b in buckets]), strict=True):
        weights, tokens = _weights(bucket, scores), bucket.pad(x)
        grads_x.append(bucket.unpad(weights.to(x.dtype).transpose(1, 2) @ g))
        by_weight = (g @ tokens.transpose(1, 2)).to(weights.dtype)
        mean = (weights * by_weight).sum(-1, keepdim=True)
        grads_s.append(bucket.unpad((weights * (by_weight - mean)).transpose(1, 2)))
    return torch.cat(grads_s).to(scores.dtype), torch.cat(grads_x).to(x.dtype)


def _weights(bucket: Bucket, scores: Tensor) -> Tensor:
    """Softmax over each segment's tokens, 0 in padding: (count, H, longest)."""
    padded = bucket.pad(scores).transpose(1, 2)
    if bucket.padding is not None:
        padded = padded.masked_fill(bucket.padding.is_padding[:, None], -torch.inf)
    return padded.softmax(dim=2, dtype=at_least_float32(scores.dtype))


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, causal: bool) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@attend_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    empty = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    return empty[0], empty[1], empty[2]


@pool.register_fake
def _(scores: Tensor, x: Tensor, lengths: Tensor) -> Tensor:
    return x.new_empty(lengths.shape[0], scores.shape[1], x.shape[1])


@pool_backward.register_fake
def _(grad: Tensor, scores: Tensor, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    empty = [torch.empty_like(y, memory_format=torch.contiguous_format) for y in (scores, x)]
    return empty[0], empty[1]


def _keep_attend(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _attend_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *attend_backward(grad, *ctx.saved_tensors, ctx.causal), None, None


def _keep_pool(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _pool_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *pool_backward(grad, *ctx.saved_tensors), None


attend.register_autograd(_attend_gradients, setup_context=_keep_attend)
pool.register_autograd(_pool_gradients, setup_context=_keep_pool)
