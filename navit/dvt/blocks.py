"""A tower's blocks with what is reused in them: `navit.model.block`, with context and bias."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from navit.dvt.reuse import BlockContext
from navit.model.attention import AttentionPlan
from navit.model.block import Attention, Block, Mlp, quick_gelu
from navit.model.linear import linear, linear_gelu
from navit.model.segments import at_least_float32

Relations = list[Tensor]
"""Attention logits (n, H, S, S) of each layer, scaled and with what was added to them."""


def dense_attention(
    attention: Attention, x: Float[Tensor, "T D"], count: int, bias: Tensor | None = None
) -> tuple[Float[Tensor, "T D"], Float[Tensor, "n H S S"]]:
    """Attend within ``count`` segments of equal length, all scores as one tensor.

    Block-diagonal kernels take no bias and give no logits.

    Args:
        attention: A block's attention.
        x: Tokens of the segments, one after another.
        count: n: how many.
        bias: (n, H, S, S), added to the logits; None: nothing.

    Returns:
        (the mixed tokens, the logits with the bias).
    """
    q, k, v = attention.qkv(x).unflatten(-1, (3, -1, attention.head_dim)).unbind(1)
    q, k = attention.normed(q, k)
    q, k, v = (part.unflatten(0, (count, -1)).transpose(1, 2) for part in (q, k, v))
    logits = (q * attention.head_dim**-0.5) @ k.transpose(-1, -2)
    if bias is not None:
        logits = logits + bias
    weights = torch.softmax(logits, dim=-1, dtype=at_least_float32(v.dtype)).to(v.dtype)
    mixed = (weights @ v).transpose(1, 2).flatten(2).flatten(0, 1)
    out: Tensor = attention.proj(mixed)
    return out, logits


def mlp_with_context(
    mlp: Mlp,
    x: Float[Tensor, "T D"],
    context: Float[Tensor, "T C"],
    join: nn.Linear,
) -> Float[Tensor, "T D"]:
    """Run a block's MLP on its input and the context side by side.

    Args:
        mlp: The MLP.
        x: Its input.
        context: What is reused.
        join: The weights of the context's channels in the MLP's first layer.
    """
    both = torch.cat([x, context.to(x.dtype)], dim=1)
    weight = torch.cat([mlp.fc1.weight, join.weight], dim=1)
    if mlp.gelu is None:
        hidden = quick_gelu(linear(both, weight, mlp.fc1.bias))
    else:
        hidden = linear_gelu(both, weight, mlp.fc1.bias, mlp.gelu)
    out: Tensor = mlp.fc2(hidden)
    return out


def run_block(
    block: Block,
    x: Float[Tensor, "T D"],
    plan: AttentionPlan,
    *,
    dense: bool,
    bias: Tensor | None = None,
    context: Tensor | None = None,
    join: nn.Linear | None = None,
) -> tuple[Float[Tensor, "T D"], Tensor | None]:
    """Run a block; without bias and context its numbers are `Block.forward`'s but for rounding.

    Returns:
        (the tokens, the attention logits where ``dense``).
    """
    logits = None
    if dense:
        mixed, logits = dense_attention(block.attn, block.norm1(x), len(plan.lengths), bias)
    else:
        mixed = block.attn(block.norm1(x), plan)
    x = x + block.branch1(mixed, plan)
    inner = block.norm2(x)
    if context is None:
        out = block.mlp(inner)
    else:
        assert join is not None, "a context comes with its weights"
        out = mlp_with_context(block.mlp, inner, context, join)
    return x + block.branch2(out, plan), logits


def run_reusing(
    blocks: nn.ModuleList,
    x: Float[Tensor, "T D"],
    plan: AttentionPlan,
    *,
    dense: bool,
    biases: Sequence[Tensor] | None = None,
    contexts: Sequence[tuple[BlockContext, Tensor]] = (),
    keep_logits: bool = False,
    checkpointing: bool = False,
) -> tuple[Float[Tensor, "T D"], Relations]:
    """Run the blocks of a tower one after the other.

    Args:
        blocks: The blocks.
        x: Tokens of all segments.
        plan: The segments; with ``dense`` all of one length.
        dense: Whether attention runs with all its scores.
        biases: What is added to each layer's attention logits.
        contexts: For each block its module, and the context made by it.
        keep_logits: Whether the logits are returned.
        checkpointing: Keep only the tokens between blocks and run each again in the backward pass;
            not with ``dense``, where a bucket is run again as a whole.
    """
    kept: Relations = []
    for index, block in enumerate(blocks):
        assert isinstance(block, Block)
        reused: dict[str, Any] = {"dense": dense}
        if biases is not None:
            reused["bias"] = biases[index]
        if contexts:
            reused["join"], reused["context"] = contexts[index][0].join, contexts[index][1]
        if checkpointing and torch.is_grad_enabled():
            x, logits = checkpoint(run_block, block, x, plan, use_reentrant=False, **reused)
        else:
            x, logits = run_block(block, x, plan, **reused)
        if keep_logits and logits is not None:
            kept.append(logits)
    return x, kept
