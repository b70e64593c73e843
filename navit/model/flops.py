"""How much arithmetic a forward pass is, from segment lengths alone.

Counted are the matrix products of the towers and their heads, two operations for each multiply-add.
"""

from collections.abc import Sequence

import numpy as np

from navit.model.classifier import ClassifierConfig
from navit.model.config import CLIPConfig, NaViTConfig, TextConfig, TransformerConfig
from navit.model.corrupt import COLOURS
from navit.model.masked import MaskedConfig
from navit.model.stem import stem_flops
from packer.batch import PackedBatch


def batch_flops(config: CLIPConfig | ClassifierConfig | MaskedConfig, batch: PackedBatch) -> int:
    """Return the floating-point operations of a model's forward pass on one batch.

    Args:
        config: The model's configuration.
        batch: The batch; only its segment lengths are read.

    Returns:
        Two for each multiply-add of a matrix product; 0 for a batch without images.
    """
    sizes = batch.segment_patch_sizes or (batch.patch_size,) * len(batch.segment_lengths)
    pairs = zip(batch.segment_lengths, sizes, batch.segment_images, strict=True)
    images = [(length, size) for length, size, image in pairs if image >= 0]
    if not images:
        return 0
    lengths, patch_sizes = zip(*images, strict=True)
    flops = image_flops(config.vision, lengths, patch_sizes)
    width = config.vision.width
    if isinstance(config, ClassifierConfig):
        return flops + len(lengths) * head_flops(config)
    if isinstance(config, MaskedConfig):  # in expectation: which patches is drawn by the model
        asked = config.corruption.share * sum(lengths)
        return flops + int(2 * asked * width * COLOURS)
    if config.image_projection:
        flops += 2 * len(lengths) * width * config.embed_dim
    if batch.captions is not None and batch.captions.segment_lengths:
        captions = batch.captions.segment_lengths
        flops += text_flops(config.text, captions)
        flops += 2 * len(captions) * config.text.width * config.embed_dim
    return flops


def image_flops(
    config: NaViTConfig, lengths: Sequence[int], patch_sizes: Sequence[int] | None = None
) -> int:
    """Return the operations of the image tower on images of so many kept tokens each.

    Resizing weights to the patch sizes of a flexible tower is not counted: a few hundred patches'
    worth a batch.

    Args:
        config: The tower.
        lengths: Kept tokens of each image.
        patch_sizes: Side of each image's patches in pixels; None: the tower's own.
    """
    patches = sum(lengths)
    if config.stem is not None:
        flops = stem_flops(config, patches)
    else:
        sides = patch_sizes or [config.patch_size] * len(lengths)
        pixels = sum(n * side**2 for n, side in zip(lengths, sides, strict=True))
        flops = 2 * 3 * pixels * config.width
    if config.pos_embed == "grid":
        flops += 2 * patches * config.pos_table_size**2 * config.width
    flops += _blocks_flops(config, np.asarray(lengths, np.int64) + config.num_prefix)
    return flops + _pool_flops(config, patches, len(lengths))


def head_flops(config: ClassifierConfig) -> int:
    """Return the operations of a classifier's head on one image."""
    width, hidden = config.vision.width, config.representation_size
    if hidden is None:
        return 2 * width * config.num_classes
    return 2 * hidden * (width + config.num_classes)


def text_flops(config: TextConfig, lengths: Sequence[int]) -> int:
    """Return the operations of the text tower on captions of so many tokens each."""
    if config.pad_id is not None:
        lengths = [config.max_tokens] * len(lengths)
    flops = _blocks_flops(config, np.asarray(lengths, np.int64))
    return flops + _pool_flops(config, sum(lengths), len(lengths))


def _blocks_flops(config: TransformerConfig, lengths: np.ndarray) -> int:
    """Projections and MLP by token, scores and their use by pair of tokens of a segment."""
    per_token = 2 * config.width * (4 * config.width + 2 * config.mlp_dim)
    per_pair = 2 * 2 * config.width
    tokens, pairs = int(lengths.sum()), int((lengths**2).sum())
    return config.depth * (tokens * per_token + pairs * per_pair)


def _pool_flops(config: TransformerConfig, tokens: int, segments: int) -> int:
    """Attention pooling as `navit.model.pool.AttentionPool` does it; other poolings have none."""
    if config.pool != "map":
        return 0
    width = config.width
    probe = 2 * 2 * width**2  # its query, folded into the key projection
    per_token = 2 * 2 * width * config.num_heads
    per_segment = 2 * 2 * width**2 + (2 * 2 * width * config.mlp_dim if config.pool_mlp else 0)
    return probe + tokens * per_token + segments * per_segment
