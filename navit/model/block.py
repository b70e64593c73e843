"""The transformer block of both towers: pre-norm, query-key norm, no biases."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from navit.model.attention import AttentionPlan, block_diagonal_attention
from navit.model.config import TransformerConfig
from navit.model.linear import Gelu, Linear, linear_gelu

CPU_TOKENS = 2048
"""Tokens that go through all blocks together at inference on a CPU.

A tensor of hidden layers below 32 MiB is memory the allocator has at hand; a larger one is mapped
anew each time, which for ViT-S cost a fifth of the pass. 2,048 was best of 512 to 8,837.
"""
INIT_STD = 0.02
"""Standard deviation of a block's matrices at the start, those that write to the residual stream
divided by sqrt(2 depth), as in GPT-2. ViT's own Xavier start has four times this at width 160; with
Muon's steps of fixed size it took half as many steps again to the same loss."""


class Attention(nn.Module):
    """Multi-head self-attention within segments, queries and keys layer-normalised per head.

    The query-key norm is that of ViT-22B (arXiv:2302.05442, section 2.1), which NaViT (section 3)
    adopts: without it attention logits grow and training diverges at scale.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, self.head_dim = config.width, config.head_dim
        self.qkv = Linear(width, 3 * width, bias=config.biases)
        self.proj = Linear(width, width, bias=config.biases)
        norm = nn.LayerNorm if config.qk_norm else nn.Identity
        self.q_norm = norm(self.head_dim, eps=config.norm_eps, bias=config.biases)
        self.k_norm = norm(self.head_dim, eps=config.norm_eps, bias=config.biases)
        nn.init.normal_(self.qkv.weight, std=INIT_STD)
        nn.init.normal_(self.proj.weight, std=INIT_STD * (2 * config.depth) ** -0.5)

    def forward(self, x: Float[Tensor, "T D"], plan: AttentionPlan) -> Float[Tensor, "T D"]:
        """Mix each token with the others of its segment."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        out: Tensor = self.proj(block_diagonal_attention(*self.normed(q, k), v, plan).flatten(1))
        return out

    def normed(
        self, q: Float[Tensor, "*tokens H Dh"], k: Float[Tensor, "*tokens H Dh"]
    ) -> tuple[Float[Tensor, "*tokens H Dh"], Float[Tensor, "*tokens H Dh"]]:
        """Normalise queries and keys per head, in their own type."""
        return head_norm(self.q_norm, q), head_norm(self.k_norm, k)


def head_norm(norm: nn.Module, x: Float[Tensor, "*tokens H Dh"]) -> Float[Tensor, "*tokens H Dh"]:
    """Normalise in the type of ``x``.

    On CUDA autocast would give layer norm float32 and take float32 from it, although attention
    reads half precision: five times the memory traffic for digits that are rounded away. There the
    statistics are float32 all the same, and hooks of ``norm`` are not called.
    """
    if type(norm) is not nn.LayerNorm or x.device.type != "cuda":
        out: Tensor = norm(x)
        return out.to(x.dtype)
    return same_type_norm(norm, x)


def same_type_norm(norm: nn.LayerNorm, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
    """Layer-normalise with weights rounded to the type of ``x``, whatever autocast says."""
    with torch.autocast(x.device.type, enabled=False):
        bias = None if norm.bias is None else norm.bias.to(x.dtype)
        weight = norm.weight.to(x.dtype)
        return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def quick_gelu(x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
    """Return x sigmoid(1.702 x): the approximation of GELU that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.width, config.mlp_dim, bias=config.biases)
        self.fc2 = Linear(config.mlp_dim, config.width, bias=config.biases)
        self.gelu: Gelu | None = None
        if config.activation != "quick_gelu":
            self.gelu = "tanh" if config.activation == "gelu_tanh" else "none"
        nn.init.normal_(self.fc1.weight, std=INIT_STD)
        nn.init.normal_(self.fc2.weight, std=INIT_STD * (2 * config.depth) ** -0.5)

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        """Transform each row by itself."""
        if self.gelu is None:
            hidden = quick_gelu(self.fc1(x))
        else:
            hidden = linear_gelu(x, self.fc1.weight, self.fc1.bias, self.gelu)
        out: Tensor = self.fc2(hidden)
        return out


class Branch(nn.Module):
    """What is done to the output of attention or MLP before it is added: layer scale, depth drop.

    Stochastic depth (arXiv:1603.09382) is drawn per segment: an image, however many tokens it has,
    keeps the branch or skips it, and kept ones are scaled by 1 / (1 - rate).
    """

    def __init__(self, config: TransformerConfig, drop_rate: float) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.scale: nn.Parameter | None = None
        if config.layer_scale is not None:
            self.scale = nn.Parameter(torch.full((config.width,), config.layer_scale))

    def forward(self, x: Float[Tensor, "T D"], plan: AttentionPlan) -> Float[Tensor, "T D"]:
        """Scale the channels, and in training drop the branch of some segments."""
        if self.scale is not None:
            x = x * self.scale
        if not self.training or not self.drop_rate:
            return x
        keep = torch.rand(plan.num_segments, device=x.device) >= self.drop_rate
        factor = keep.to(x.dtype) / (1 - self.drop_rate)
        return x * factor.index_select(0, plan.segment_index)[:, None]


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        config: Shape and choices.
        index: Number of the block, from 0; stochastic depth rises with it.
    """

    def __init__(self, config: TransformerConfig, index: int = 0) -> None:
        super().__init__()
        drop_rate = config.drop_path * index / max(config.depth - 1, 1)
        self.branch1, self.branch2 = Branch(config, drop_rate), Branch(config, drop_rate)
        self.norm1 = make_norm(config)
        self.attn = Attention(config)
        self.norm2 = make_norm(config)
        self.mlp = Mlp(config)

    def forward(self, x: Float[Tensor, "T D"], plan: AttentionPlan) -> Float[Tensor, "T D"]:
        """Run the block on the tokens of all segments."""
        x = x + self.branch1(self.attn(self.norm1(x), plan), plan)
        out: Tensor = x + self.branch2(self.mlp(self.norm2(x)), plan)
        return out


def make_norm(config: TransformerConfig) -> nn.LayerNorm:
    """Return a layer norm over a token's channels."""
    return nn.LayerNorm(config.width, eps=config.norm_eps, bias=config.biases)


def make_blocks(config: TransformerConfig) -> nn.ModuleList:
    """Return the blocks of a tower."""
    return nn.ModuleList(Block(config, index) for index in range(config.depth))


def run_blocks(
    blocks: nn.ModuleList, x: Float[Tensor, "T D"], plan: AttentionPlan, checkpointing: bool
) -> Float[Tensor, "T D"]:
    """Run the blocks one after the other.

    At inference on a CPU some segments go through all blocks before the next ones: same numbers,
    and the hidden layers of 2,048 tokens stay where the last ones were.

    Args:
        blocks: The blocks.
        x: Tokens of all segments.
        plan: The segments.
        checkpointing: Keep only the tokens between blocks and run each again in the backward pass.
    """
    in_parts = x.device.type == "cpu" and not torch.is_grad_enabled() and not blocks.training
    if in_parts and not torch.compiler.is_compiling():
        plans = plan.parts(CPU_TOKENS)
        parts = x.split_with_sizes([part.num_tokens for part in plans])
        return torch.cat(
            [_run(blocks, *part, checkpointing) for part in zip(parts, plans, strict=True)]
        )
    return _run(blocks, x, plan, checkpointing)


def _run(
    blocks: nn.ModuleList, x: Float[Tensor, "T D"], plan: AttentionPlan, checkpointing: bool
) -> Float[Tensor, "T D"]:
    for block in blocks:
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, plan, use_reentrant=False)
        else:
            x = block(x, plan)
    return x
