"""The text tower: packed captions in, one vector per caption out."""

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from navit.model.attention import (
    AttentionPlan,
    compute_dtype,
    order_by_length,
    to_device,
)
from navit.model.backends import resolve_backend
from navit.model.block import NORM_EPS, make_blocks, run_blocks
from navit.model.config import TextConfig
from navit.model.pool import make_pool
from packer.batch import PackedText


class TextTower(nn.Module):
    """Token and absolute position embeddings, the image tower's blocks, its pooling.

    Attention is bidirectional within a caption, as in SigLIP: pooling reads all tokens, so none
    has to be the last.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocab_size, config.width)
        self.pos_embed = nn.Embedding(config.max_tokens, config.width)
        self.blocks = make_blocks(config)
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS, bias=config.biases)
        self.pool = make_pool(config)
        nn.init.normal_(self.token_embed.weight, std=config.width**-0.5)
        nn.init.normal_(self.pos_embed.weight, std=config.width**-0.5)

    def forward(self, text: PackedText) -> Float[Tensor, "M D"]:
        """Encode packed captions.

        Args:
            text: The captions; ids below ``vocab_size``.

        Returns:
            One vector per caption, in the order of the captions.

        Raises:
            ValueError: If a caption is longer than ``max_tokens``.
        """
        longest = max(text.segment_lengths, default=0)
        if longest > self.config.max_tokens:
            raise ValueError(
                f"A caption must have at most max_tokens ({self.config.max_tokens}) tokens; got "
                f"{longest}. Set PackerConfig(max_text_tokens={self.config.max_tokens}), or raise "
                "TextConfig.max_tokens."
            )
        device = text.ids.device
        backend = resolve_backend(
            self.config.attention,
            device=device,
            dtype=compute_dtype(device, self.norm.weight.dtype),
            head_dim=self.config.head_dim,
        )
        lengths, order, tokens = order_by_length(text.segment_lengths)
        plan = AttentionPlan(lengths, device, backend)
        x = self.token_embed(text.ids.index_select(0, to_device(tokens, device)))
        x = x + self.pos_embed(to_device(_positions(lengths), device))
        x = run_blocks(self.blocks, x, plan, self.config.checkpointing)
        pooled: Tensor = self.pool(self.norm(x), plan)
        return pooled.index_select(0, to_device(np.argsort(order), device))


def _positions(lengths: tuple[int, ...]) -> np.ndarray:
    """Count each segment's tokens from 0."""
    sizes = np.asarray(lengths, dtype=np.int64)
    return np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
