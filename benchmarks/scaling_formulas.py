"""Operations, bytes and memory of a large run, from its sizes alone."""

from dataclasses import dataclass

import numpy as np
import torch

from navit.loss_tiles import GPU_TILE
from navit.model.clip import CLIP
from navit.model.config import CLIPConfig, NaViTConfig, TextConfig
from navit.train.flops import STEP_OVER_FORWARD, image_flops, text_flops
from packer.config import PackerConfig
from packer.plan.drop import BetaDrop
from packer.plan.many import plan_lengths
from packer.plan.resize import UniformSide
from packer.plan.simulate import laion_sizes

_TEXT_TOKENS = 16  # mean of a caption; at most 24 (NaViT section 3)


@dataclass(frozen=True)
class Workload:
    """What one image-text pair costs the model."""

    tokens: float
    """Kept image tokens of a pair."""
    flops: float
    """Operations of a training step for a pair: forward and backward of both towers."""
    parameters: int
    """Weights of both towers."""


def workload(size: str, embed_dim: int, num_images: int = 20_000) -> Workload:
    """Plan LAION-like images in the paper's mix and count the towers' operations on them.

    Args:
        size: Named size of both towers.
        embed_dim: D: width of the vectors the loss compares.
        num_images: Images planned.
    """
    lengths = plan_lengths(
        laion_sizes(num_images), stream_config(), np.random.default_rng(0)
    ).tolist()
    vision = NaViTConfig.named(size, patch_size=16)
    text = TextConfig.named(size)
    config = CLIPConfig(vision=vision, text=text, embed_dim=embed_dim)
    captions = text_flops(text, [_TEXT_TOKENS] * num_images)
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in CLIP(config).parameters())
    flops = STEP_OVER_FORWARD * (image_flops(vision, lengths) + captions) / num_images
    return Workload(sum(lengths) / num_images, flops, parameters)


def exchange_bytes(ranks: int, rows: int, dim: int) -> tuple[float, float]:
    """Return the bytes a rank receives in a step of the loss: gathered texts, reduced gradients.

    Ring algorithms, float32: gathering brings the texts of all others once; an all-reduce of the
    texts' gradients, and of two statistics a text, brings 2 (R - 1) / R times their size (Patarasu
    and Yuan, 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations").

    Args:
        ranks: R.
        rows: Pairs of each rank.
        dim: D.
    """
    others = (ranks - 1) * rows
    return 4.0 * others * dim, 2 * 4.0 * others * (dim + 2)


def loss_memory(ranks: int, rows: int, dim: int, chunk: int = GPU_TILE) -> float:
    """Return the bytes of the loss on a rank: gathered texts, gradients, statistics, two tiles.

    Gathering holds the texts twice for a moment: as parts and joined.
    """
    columns = ranks * rows
    gathered = (2 if ranks > 1 else 0) * columns * dim
    gradients = (columns + rows) * dim
    tiles = 2 * min(rows, chunk) * min(columns, chunk)
    return 4.0 * (gathered + gradients + tiles + 4 * columns + 2 * rows)


def loss_flops(rows: int, columns: int, dim: int) -> float:
    """Return the operations of the tiled loss: four products, one of them computed twice."""
    return 4 * 2.0 * rows * columns * dim


def stream_config(seq_len: int = 256) -> PackerConfig:
    """Return the paper's mix: side U(64, 256), half of the tokens dropped (NaViT section 3)."""
    return PackerConfig(
        patch_size=16,
        seq_len=seq_len,
        max_tokens=256,
        resolution=UniformSide(64, 256),
        token_drop=BetaDrop(0.5, 0.8),
        missing_caption="keep",
    )
