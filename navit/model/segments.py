"""Attention and pooling over segments in plain torch: segments of equal length run together."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

MAX_MATMUL_LENGTH = 1024
"""Longest segment, in tokens, for which half precision on the CPU keeps its attention matrix.

Matmul, softmax, matmul takes a third of the time of torch's fused kernel there, forward and
backward, on 32 images of 36 to 256 tokens and a sixth on 256 segments of 40; in float32 the two
are equal. Longer segments use the fused kernel for its memory.
"""


@dataclass(frozen=True)
class SegmentGroup:
    """Neighbouring segments of equal length: tokens start .. start + count * length."""

    start: int
    count: int
    length: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the group."""
        return self.count * self.length


Groups = tuple[SegmentGroup, ...]


def group_segments(lengths: Iterable[int]) -> Groups:
    """Join neighbouring segments of equal length."""
    groups: list[SegmentGroup] = []
    start = 0
    for length, run in groupby(lengths):
        groups.append(SegmentGroup(start, len(list(run)), length))
        start += groups[-1].num_tokens
    return tuple(groups)


def split_groups(x: Float[Tensor, "T ..."], groups: Groups) -> list[Tensor]:
    """Return each group's tokens as (count, length, ...).

    One split: its backward moves each gradient once, where a slice per group would fill a whole
    tensor with zeros for each group.
    """
    parts = x.split_with_sizes([group.num_tokens for group in groups])
    return [
        part.view(group.count, group.length, *x.shape[1:])
        for group, part in zip(groups, parts, strict=True)
    ]


def attend_segments(
    q: Float[Tensor, "T H Dh"],
    k: Float[Tensor, "T H Dh"],
    v: Float[Tensor, "T H Dh"],
    groups: Groups,
    *,
    causal: bool = False,
) -> Float[Tensor, "T H Dh"]:
    """Return softmax(q k^T / sqrt(Dh)) v within each of at least one segment."""
    parts = zip(*(split_groups(x, groups) for x in (q, k, v)), strict=True)
    return torch.cat([_attend_equal(*part, causal=causal) for part in parts])


def _attend_equal(
    q: Float[Tensor, "count length H Dh"],
    k: Float[Tensor, "count length H Dh"],
    v: Float[Tensor, "count length H Dh"],
    *,
    causal: bool,
) -> Float[Tensor, "tokens H Dh"]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    half, length = q.dtype in (torch.bfloat16, torch.float16), q.shape[2]
    if q.device.type == "cpu" and half and length <= MAX_MATMUL_LENGTH:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if causal:
            scores = scores.masked_fill(later_tokens(length, q.device), -torch.inf)
        out: Tensor = scores.softmax(dim=-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2).flatten(0, 1)


def pool_segments(
    scores: Float[Tensor, "T H"], x: Float[Tensor, "T D"], groups: Groups
) -> Float[Tensor, "N H D"]:
    """Average each of at least one segment's tokens, by head, with the softmax of its scores."""
    heads = []
    for s, tokens in zip(split_groups(scores, groups), split_groups(x, groups), strict=True):
        weights = torch.softmax(s.transpose(1, 2), dim=2, dtype=at_least_float32(x.dtype))
        heads.append(weights.to(x.dtype) @ tokens)
    return torch.cat(heads)


def later_tokens(length: int, device: torch.device) -> Tensor:
    """Return which tokens (columns) come after which (rows): bool (length, length)."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, float32 for all other types."""
    return torch.promote_types(dtype, torch.float32)
