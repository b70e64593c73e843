"""Images/s of training on the paper's mix of resolutions against a fixed square, one network.

NaViT side: sides drawn from U(64, 256) px, aspect ratio kept, half of each image's tokens dropped
(arXiv:2307.06304, sections 2.2 and 3), packed into sequences of 256 tokens. ViT side: images of
256 x 256, all 256 tokens kept, one a sequence. Both are forward + backward of ViT-S on prepared
batches of as many tokens, in float32 and bfloat16, two threads.

Wanted: at least 4.2 times the images/s. Tokens alone would give mean tokens / 256.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.bench_towers import training_step, what
from benchmarks.harness import paired_ratio
from navit.model import NaViT, NaViTConfig
from packer import ConstantDrop, PackerConfig, UniformSide, pack
from packer.batch import PackedBatch

PATCH_SIZE, SIDE = 16, 256


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Measure images/s of both in each type."""
    shape = {"width": 64, "depth": 1, "num_heads": 1, "mlp_dim": 256} if quick else {}
    torch.manual_seed(0)
    model = NaViT(NaViTConfig.named("s", patch_size=PATCH_SIZE, **shape))
    mix, squares = mixed_batch(2 if quick else 32), square_batch(2 if quick else 32)
    print(
        f"{mix.num_images} images of {mix.stats.tokens / mix.num_images:.1f} kept tokens "
        f"(padding {mix.stats.padding:.2%}) against {squares.num_images} of 256"
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows = []
        for dtype in (torch.float32, torch.bfloat16):
            called = {"what": what(dtype, True)}
            rows.append(called | compare(model, mix, squares, dtype, pairs=2 if quick else 6))
            print(f"{called['what']:28} {format_row(rows[-1])}", flush=True)
        return rows
    finally:
        torch.set_num_threads(threads)


def compare(
    model: NaViT,
    mix: PackedBatch,
    squares: PackedBatch,
    dtype: torch.dtype,
    *,
    pairs: int,
    warmup: int = 1,
) -> dict[str, Any]:
    """Time training steps on both batches; return images/s and their ratio."""
    fixed, packed = (
        training_step(model, partial(pooled, model, batch), dtype, backward=True)
        for batch in (squares, mix)
    )
    timed = paired_ratio(fixed, packed, pairs=pairs, warmup=warmup)
    share = mix.num_images / squares.num_images
    return {
        "times_the_images_per_s": timed.ratio * share,
        "tokens_alone": share * squares.stats.tokens / mix.stats.tokens,
        "images_per_s": mix.num_images / timed.seconds_b,
        "fixed_images_per_s": squares.num_images / timed.seconds_a,
        "seconds_fixed_over_mix": timed,
    }


def format_row(row: dict[str, Any]) -> str:
    """Lay out what `compare` returned."""
    return (
        f"{row['times_the_images_per_s']:.2f} times the images/s (tokens alone "
        f"{row['tokens_alone']:.2f}): {row['images_per_s']:,.1f} against "
        f"{row['fixed_images_per_s']:,.1f}; seconds fixed / mix {row['seconds_fixed_over_mix']}"
    )


def pooled(model: NaViT, batch: PackedBatch) -> Tensor:
    """Return a vector an image."""
    vectors: Tensor = model(batch).pooled
    return vectors


def mixed_batch(sequences: int) -> PackedBatch:
    """Pack generated images of 256 px and more as the paper does, 256 tokens a sequence."""
    config = PackerConfig(
        patch_size=PATCH_SIZE,
        seq_len=SIDE,
        resolution=UniformSide(64, SIDE),
        token_drop=ConstantDrop(0.5),
    )
    return next(iter(pack(sources(8 * sequences), config, sequences_per_batch=sequences)))


def square_batch(images: int) -> PackedBatch:
    """One image of 256 x 256 a sequence, all tokens kept."""
    config = PackerConfig(patch_size=PATCH_SIZE, seq_len=(SIDE // PATCH_SIZE) ** 2)
    random = np.random.default_rng(1)
    pixels = random.integers(0, 256, (images, SIDE, SIDE, 3), dtype=np.uint8)
    samples = [{"image": x, "label": 0, "key": str(i)} for i, x in enumerate(pixels)]
    return next(iter(pack(samples, config, sequences_per_batch=images)))


def sources(count: int) -> Iterator[dict[str, Any]]:
    """Generate images whose shorter side has 256 px and more, with LAION's aspect ratios."""
    random = np.random.default_rng(0)
    for key in range(count):
        short = random.uniform(256, 512)
        sides = [int(short), int(short * np.exp(abs(random.normal(0, 0.32))))]
        random.shuffle(sides)
        pixels = random.integers(0, 256, (*sides, 3), dtype=np.uint8)
        yield {"image": pixels, "label": 0, "key": str(key)}
