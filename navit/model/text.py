"""The text tower: packed captions in, one vector per caption out."""

from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor, nn

from navit.model.attention import (
    AttentionPlan,
    compute_dtype,
    order_by_length,
)
from navit.model.backends import resolve_backend
from navit.model.block import make_blocks, make_norm, run_blocks
from navit.model.compile import CompiledTower
from navit.model.config import TextConfig
from navit.model.pool import make_pool
from navit.model.transfer import to_device
from packer.batch import PackedText


class TextTower(CompiledTower):
    """Token and absolute position embeddings, the image tower's blocks, its pooling.

    By default attention is bidirectional within a caption, as in SigLIP: pooling reads all tokens,
    so none has to be the last. CLIP's is causal and read at the end token.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocab_size, config.width)
        self.pos_embed = nn.Embedding(config.max_tokens, config.width)
        self.blocks = make_blocks(config)
        self.norm = make_norm(config)
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
        if self.config.pad_id is not None:
            text = _pad(text, self.config.max_tokens, self.config.pad_id)
        device = text.ids.device
        backend = resolve_backend(
            self.config.attention,
            device=device,
            dtype=compute_dtype(device, self.norm.weight.dtype),
            head_dim=self.config.head_dim,
            compiled=self.is_compiled,
        )
        lengths, order, tokens = order_by_length(text.segment_lengths)
        plan = AttentionPlan(lengths, device, backend, causal=self.config.causal)
        ids = text.ids.index_select(0, to_device(tokens, device))
        places = (to_device(x, device) for x in (_positions(lengths), np.argsort(order)))
        vectors: Tensor = self.graph(plan)(ids, *places, plan)
        return vectors

    def encode(
        self,
        ids: Int64[Tensor, " T"],
        positions: Int64[Tensor, " T"],
        caption_place: Int64[Tensor, " M"],
        plan: AttentionPlan,
    ) -> Float[Tensor, "M D"]:
        """Turn tokens into a vector for each caption: all that runs on the device."""
        x = self.token_embed(ids) + self.pos_embed(positions)
        x = run_blocks(self.blocks, x, plan, self.config.checkpointing)
        pooled: Tensor = self.pool(self.norm(x), plan)
        return pooled.index_select(0, caption_place)


def _pad(text: PackedText, length: int, pad_id: int) -> PackedText:
    """Fill every caption up to ``length`` tokens."""
    count, device = len(text.segment_lengths), text.ids.device
    if text.segment_lengths == (length,) * count:
        return text
    captions = np.repeat(np.arange(count), text.segment_lengths)
    places = captions * length + _positions(text.segment_lengths)
    ids = text.ids.new_full((count * length,), pad_id)
    return replace(
        text,
        ids=ids.index_copy(0, to_device(places, device), text.ids),
        cu_seqlens=to_device(np.arange(count + 1, dtype=np.int32) * length, device),
        segment_lengths=(length,) * count,
    )


def _positions(lengths: tuple[int, ...]) -> np.ndarray:
    """Count each segment's tokens from 0."""
    sizes = np.asarray(lengths, dtype=np.int64)
    return np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
