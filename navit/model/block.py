"""The transformer block of both towers: pre-norm, query-key norm, no biases."""

from jaxtyping import Float
from torch import Tensor, nn

from navit.model.attention import AttentionPlan, block_diagonal_attention
from navit.model.config import TransformerConfig

NORM_EPS = 1e-6
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
        self.qkv = nn.Linear(width, 3 * width, bias=config.biases)
        self.proj = nn.Linear(width, width, bias=config.biases)
        norm = nn.LayerNorm if config.qk_norm else nn.Identity
        self.q_norm = norm(self.head_dim, eps=NORM_EPS, bias=config.biases)
        self.k_norm = norm(self.head_dim, eps=NORM_EPS, bias=config.biases)
        nn.init.normal_(self.qkv.weight, std=INIT_STD)
        nn.init.normal_(self.proj.weight, std=INIT_STD * (2 * config.depth) ** -0.5)

    def forward(self, x: Float[Tensor, "T D"], plan: AttentionPlan) -> Float[Tensor, "T D"]:
        """Mix each token with the others of its segment."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        # On CUDA autocast runs layer norm in float32; attention needs one type.
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        out: Tensor = self.proj(block_diagonal_attention(q, k, v, plan).flatten(1))
        return out


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_dim, bias=config.biases)
        self.fc2 = nn.Linear(config.mlp_dim, config.width, bias=config.biases)
        self.act = nn.GELU("tanh" if config.activation == "gelu_tanh" else "none")
        nn.init.normal_(self.fc1.weight, std=INIT_STD)
        nn.init.normal_(self.fc2.weight, std=INIT_STD * (2 * config.depth) ** -0.5)

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        """Transform each row by itself."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=NORM_EPS, bias=config.biases)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=NORM_EPS, bias=config.biases)
        self.mlp = Mlp(config)

    def forward(self, x: Float[Tensor, "T D"], plan: AttentionPlan) -> Float[Tensor, "T D"]:
        """Run the block on the tokens of all segments."""
        x = x + self.attn(self.norm1(x), plan)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out
