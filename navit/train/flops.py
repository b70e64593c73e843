"""How much arithmetic a batch is, and how much the device could do: the two sides of MFU.

Counted are the matrix products of the towers and their heads, from segment lengths alone. A step
is three forward passes' worth: the backward pass has two products for each of the forward's. What
is computed a second time to save memory (activation checkpointing, gradient caching) is not
counted, nor are the products of the loss: model FLOPs utilization as in PaLM (arXiv:2204.02311),
appendix B.
"""

from collections.abc import Sequence
from time import perf_counter

import numpy as np
import torch

from navit.model.classifier import ClassifierConfig
from navit.model.config import CLIPConfig, NaViTConfig, TextConfig, TransformerConfig
from packer.batch import PackedBatch

STEP_OVER_FORWARD = 3
"""Arithmetic of a training step in forward passes."""


def batch_flops(config: CLIPConfig | ClassifierConfig, batch: PackedBatch) -> int:
    """Return the floating-point operations of a model's forward pass on one batch.

    Args:
        config: The model's configuration.
        batch: The batch; only its segment lengths are read.

    Returns:
        Two for each multiply-add of a matrix product; 0 for a batch without images.
    """
    pairs = zip(batch.segment_lengths, batch.segment_images, strict=True)
    lengths = [length for length, image in pairs if image >= 0]
    if not lengths:
        return 0
    flops = image_flops(config.vision, lengths)
    width = config.vision.width
    if isinstance(config, ClassifierConfig):
        return flops + 2 * len(lengths) * width * config.num_classes
    if config.image_projection:
        flops += 2 * len(lengths) * width * config.embed_dim
    if batch.captions is not None and batch.captions.segment_lengths:
        captions = batch.captions.segment_lengths
        flops += text_flops(config.text, captions)
        flops += 2 * len(captions) * config.text.width * config.embed_dim
    return flops


def image_flops(config: NaViTConfig, lengths: Sequence[int]) -> int:
    """Return the operations of the image tower on images of so many kept tokens each."""
    patches = sum(lengths)
    flops = 2 * patches * 3 * config.patch_size**2 * config.width
    if config.pos_embed == "grid":
        flops += 2 * patches * config.pos_table_size**2 * config.width
    prefix = config.num_registers + (config.pool == "cls")
    flops += _blocks_flops(config, np.asarray(lengths, np.int64) + prefix)
    return flops + _pool_flops(config, patches, len(lengths))


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


def matmul_rate(device: torch.device, dtype: torch.dtype, *, repeats: int = 3) -> float:
    """Measure the floating-point operations per second of a large matrix product.

    It takes about a tenth of a second, and draws no random numbers.

    Args:
        device: Where the product runs.
        dtype: Type of its factors: that of the model's products.
        repeats: Products timed; the fastest counts.
    """
    size = 8192 if device.type == "cuda" else 1024
    left = torch.full((size, size), 1 / size, device=device, dtype=dtype)
    right = torch.ones_like(left)
    best = float("inf")
    for _ in range(repeats + 1):  # the first warms up
        _wait(device)
        start = perf_counter()
        left @ right
        _wait(device)
        best = min(best, perf_counter() - start)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
