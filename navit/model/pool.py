"""Masked pooling: the tokens of a segment -> one vector, never across segments.

Source: NaViT (arXiv:2307.06304), section 2.1 "Masked self attention and masked pooling".
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from navit.model import operators
from navit.model.attention import AttentionPlan
from navit.model.block import Mlp, make_norm
from navit.model.config import TransformerConfig
from navit.model.segments import at_least_float32, pool_segments, split_groups


def segment_mean(x: Float[Tensor, "T D"], plan: AttentionPlan) -> Float[Tensor, "N D"]:
    """Average the tokens of each segment, summing in float32 or better; on CUDA in any order."""
    if is_compiling() or x.device.type == "cuda":  # a call for each length costs more than it does
        sums = x.new_zeros(plan.num_segments, x.shape[1], dtype=at_least_float32(x.dtype))
        sums = sums.index_add(0, plan.segment_index, x.to(sums.dtype))
        return (sums / plan.segment_sizes[:, None]).to(x.dtype)
    if not plan.lengths:
        return x
    return torch.cat([part.mean(1) for part in split_groups(x, plan.groups)])


class MeanPool(nn.Module):
    """The mean of a segment's tokens."""

    def forward(self, x: Float[Tensor, "T D"], plan: AttentionPlan) -> Float[Tensor, "N D"]:
        """Pool each segment."""
        return segment_mean(x, plan)


class LastPool(nn.Module):
    """A segment's last token: the end token of a causal caption, or the last padded place."""

    def forward(self, x: Float[Tensor, "T D"], plan: AttentionPlan) -> Float[Tensor, "N D"]:
        """Pool each segment."""
        return x.index_select(0, plan.cu_seqlens[1:] - 1)


class AttentionPool(nn.Module):
    """Multi-head attention pooling (MAP): one learned query, the probe, asks each segment.

    The head is big_vision's and SigLIP's: attention with projections, then a residual MLP on its
    layer-normalised output, which ``pool_mlp=False`` leaves out. As all segments share the probe,
    its query is folded into the key projection, ``(W_k x_t) . q = x_t . (W_k^T q)``, and the value
    projection, being linear, follows the weighted sum: the same numbers without two
    (T, D) x (D, D) products.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, self.num_heads = config.width, config.num_heads
        self.probe = nn.Parameter(torch.randn(width) * width**-0.5)
        self.q = nn.Linear(width, width, bias=config.biases)
        self.k = nn.Linear(width, width, bias=config.biases)
        self.v = nn.Linear(width, width, bias=config.biases)
        self.proj = nn.Linear(width, width, bias=config.biases)
        self.has_mlp = config.pool_mlp
        if self.has_mlp:
            self.norm = make_norm(config)
            self.mlp = Mlp(config)
        for layer in (self.q, self.k, self.v, self.proj):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Float[Tensor, "T D"], plan: AttentionPlan) -> Float[Tensor, "N D"]:
        """Pool each segment."""
        # The products that stay per token are small (D x H): they keep the precision of x.
        with torch.autocast(x.device.type, enabled=False):
            heads = self._attend(x, self._scores(x), plan)
            v = self.v.weight.view(self.num_heads, -1, x.shape[1])
            out = torch.einsum("nhd,hed->nhe", heads, v.to(x.dtype)).flatten(1)
            if self.v.bias is not None:  # the weights of a segment sum to 1
                out = out + self.v.bias
        out = self.proj(out)
        pooled: Tensor = out + self.mlp(self.norm(out)) if self.has_mlp else out
        return pooled

    def _scores(self, x: Tensor) -> Float[Tensor, "T H"]:
        """Attention logits of the probe on every token."""
        q = (
            self.q(self.probe[None]).view(self.num_heads, -1)
            * (x.shape[1] // self.num_heads) ** -0.5
        )
        k = self.k.weight.view(self.num_heads, -1, x.shape[1])
        query = torch.einsum("he,hed->hd", q, k.to(q.dtype)).to(x.dtype)
        if self.k.bias is None:
            return F.linear(x, query)
        # One number for all of a head's logits: the softmax cancels it, the graph stays whole.
        shift = (q * self.k.bias.view(self.num_heads, -1)).sum(1)
        return F.linear(x, query, shift.to(x.dtype))

    def _attend(self, x: Tensor, scores: Tensor, plan: AttentionPlan) -> Float[Tensor, "N H D"]:
        """Average each segment's tokens, by head, with the softmax of its scores.

        Compiled and on CUDA as an operator, with first derivatives only.
        """
        if not is_compiling() and not plan.lengths:
            return scores[:, :, None] * x[:, None, :]
        if is_compiling() or x.device.type == "cuda":
            pooled: Tensor = operators.pool(scores, x, plan.host_lengths)
            return pooled
        return pool_segments(scores, x, plan.groups)


def make_pool(config: TransformerConfig) -> nn.Module:
    """Return the pooling of a segment's own tokens; a class token needs none."""
    if config.pool == "map":
        return AttentionPool(config)
    return LastPool() if config.pool == "last" else MeanPool()
