"""Block-diagonal attention: every token attends to its own segment (image or caption) only.

One sequence with two images of 3 and 2 tokens and a padded place; rows are queries:

    . = not attended        the plan drops the padding and sorts the segments by length,
                            so that equal lengths are contiguous:
    1 1 1 . . .
    1 1 1 . . .             2 2 . . .
    1 1 1 . . .             2 2 . . .
    . . . 2 2 .             . . 1 1 1
    . . . 2 2 .             . . 1 1 1
    . . . . . 0             . . 1 1 1

The order of tokens means nothing inside an encoder (positions are part of the tokens), so the
whole encoder runs in that order on (T, D) tensors and only what leaves it is put back in place.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor
from torch.compiler import is_compiling

from navit.model import operators
from navit.model.config import AttentionBackend
from navit.model.segments import Groups, attend_segments, group_segments
from navit.model.transfer import to_device


@dataclass(frozen=True)
class AttentionPlan:
    """How the T tokens of a batch split into segments; made once, read by every layer.

    Nothing in it is cached beyond the batch, and nothing of it is read back from the device.
    """

    lengths: tuple[int, ...]
    """Length of each of the N segments in tokens, in token order."""
    device: torch.device
    """Where the tokens are."""
    backend: AttentionBackend = "segments"
    """Backend that runs the attention: "segments", "xformers" or "varlen"."""
    causal: bool = False
    """Whether a token sees only itself and those before it in its segment."""

    def __post_init__(self) -> None:
        if min(self.lengths, default=1) < 1:
            raise ValueError(f"Segment lengths must be positive; got {min(self.lengths)}.")
        if self.backend not in ("segments", "xformers", "varlen"):
            raise ValueError(
                "A plan's backend must be 'segments', 'xformers' or 'varlen'; got "
                f"{self.backend!r}. Resolve 'auto' with resolve_backend."
            )

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    @cached_property
    def groups(self) -> Groups:
        """Runs of equal lengths; in a sorted plan one for each distinct length."""
        return group_segments(self.lengths)

    def make_tensors(self) -> None:
        """Make what a compiled graph reads, so that making it is not part of the graph."""
        for name in ("host_lengths", "segment_sizes", "segment_index", "cu_seqlens", "longest"):
            getattr(self, name)

    @cached_property
    def host_lengths(self) -> Int64[Tensor, " N"]:
        """The lengths as a tensor, on the host whatever the device."""
        return torch.tensor(self.lengths, dtype=torch.int64)

    @cached_property
    def segment_sizes(self) -> Int64[Tensor, " N"]:
        """The lengths, on the plan's device."""
        return to_device(np.asarray(self.lengths, dtype=np.int64), self.device)

    @cached_property
    def longest(self) -> int:
        """Length of the longest segment, in tokens."""
        return max(self.lengths, default=0)

    @property
    def num_segments(self) -> int:
        """N."""
        # A compiled graph knows the lengths only as tensors: it serves batches of any lengths.
        return self.host_lengths.shape[0] if is_compiling() else len(self.lengths)

    def parts(self, max_tokens: int) -> list["AttentionPlan"]:
        """Cut the plan into plans of at most ``max_tokens`` tokens, or one longer segment."""
        cuts, tokens = [0], 0
        for index, length in enumerate(self.lengths):
            if tokens and tokens + length > max_tokens:
                cuts.append(index)
                tokens = 0
            tokens += length
        bounds = pairwise([*cuts, len(self.lengths)])
        return [replace(self, lengths=self.lengths[start:stop]) for start, stop in bounds]

    @cached_property
    def segment_index(self) -> Int64[Tensor, " T"]:
        """Segment of each token, on the plan's device."""
        lengths = np.asarray(self.lengths, dtype=np.int64)
        return to_device(np.repeat(np.arange(len(lengths)), lengths), self.device)

    @cached_property
    def xformers_mask(self) -> Any:
        """The segments as xformers' block-diagonal mask; imports xformers."""
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask, BlockDiagonalMask

        kind = BlockDiagonalCausalMask if self.causal else BlockDiagonalMask
        return kind.from_seqlens(list(self.lengths), device=self.device)

    @cached_property
    def cu_seqlens(self) -> Int32[Tensor, " N_plus_1"]:
        """Boundaries of the segments in token order, on the plan's device."""
        bounds = np.cumsum([0, *self.lengths], dtype=np.int32)
        return to_device(bounds, self.device)


def order_by_length(
    lengths: Sequence[int], keep: Sequence[bool] | None = None
) -> tuple[tuple[int, ...], Int64[np.ndarray, " N"], Int64[np.ndarray, " T"]]:
    """Sort segments by length and drop some of them, on the host.

    Args:
        lengths: Length of each segment, in tokens, in the order they have in memory.
        keep: Which segments to keep; None keeps all.

    Returns:
        The sorted lengths of the N kept segments; which segment each of them is; and the place in
        memory of each of their T tokens.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    kept = np.arange(len(sizes)) if keep is None else np.flatnonzero(np.asarray(keep, dtype=bool))
    order = kept[np.argsort(sizes[kept], kind="stable")]
    ordered = sizes[order]
    shift = starts[order] - (np.cumsum(ordered) - ordered)
    tokens = np.repeat(shift, ordered) + np.arange(int(ordered.sum()))
    return tuple(ordered.tolist()), order, tokens


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the type matrix products run in: autocast's where it is on, else ``dtype``."""
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        return torch.get_autocast_dtype(device.type)
    return dtype


def block_diagonal_attention(
    q: Float[Tensor, "T H Dh"],
    k: Float[Tensor, "T H Dh"],
    v: Float[Tensor, "T H Dh"],
    plan: AttentionPlan,
) -> Float[Tensor, "T H Dh"]:
    """Attend within each segment: softmax(q k^T / sqrt(Dh)) v, block-diagonal over the tokens.

    Args:
        q: Queries, in the plan's token order.
        k: Keys.
        v: Values.
        plan: The segments, which together hold exactly the T tokens.

    Source: NaViT (arXiv:2307.06304), section 2.1 "Masked self attention and masked pooling".
    """
    if not is_compiling():  # where there is at least one segment
        assert q.shape[0] == plan.num_tokens, "the plan must cover the tokens"
        if not plan.lengths:
            return q + k + v  # (0, H, Dh), connected to all three so that backward gives zeros
    if plan.backend == "xformers":
        from xformers.ops import memory_efficient_attention

        out: Tensor = memory_efficient_attention(
            q[None], k[None], v[None], attn_bias=plan.xformers_mask
        )
        return out[0]
    if plan.backend == "varlen":
        return _attend_varlen(q, k, v, plan)
    if is_compiling():
        traced: Tensor = operators.attend(q, k, v, plan.host_lengths, plan.causal)
        return traced
    return attend_segments(q, k, v, plan.groups, causal=plan.causal)


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """Attend by torch's variable-length kernel, which walks over the segments itself."""
    from torch.nn.attention.varlen import varlen_attn

    window = (-1, 0) if plan.causal else (-1, -1)
    bounds = plan.cu_seqlens
    # The kernel wants heads contiguous; q, k and v are views of one product.
    out = varlen_attn(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        bounds,
        bounds,
        plan.longest,
        plan.longest,
        window_size=window,
    )
    assert isinstance(out, Tensor)  # a pair only where auxiliary outputs are asked for
    return out
