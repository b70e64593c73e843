"""Packed images against a dense batch of equal images with the same total of tokens.

Both run the same modules: patch embedding, positions, blocks, attention pooling. The dense side is
the plain ViT, (n, len, D) tensors and one scaled_dot_product_attention a block; it is what packing
would reach if it cost nothing. In bfloat16 torch's fused attention is slow on a CPU, so a second
dense side runs matmul, softmax, matmul there, as the packed one does. The images' lengths differ,
so attention itself costs the packed side more: mean(len^2) is 1.3 times mean(len)^2.

Wanted: packed forward + backward at least 0.93 of dense tokens/s, 2 CPU cores, ViT-S width,
6 blocks, 32 images of mixed sizes.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import paired_ratio
from navit.model import NaViT, NaViTConfig
from navit.model.attention import AttentionPlan
from tests.helpers.batches import RandomImage, pack_images, random_image

PATCH_SIZE, MAX_TOKENS = 16, 256


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Measure forward + backward and forward alone, in float32 and under bfloat16 autocast."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        cases = [(torch.float32, "sdpa"), (torch.bfloat16, "sdpa"), (torch.bfloat16, "matmul")]
        return [
            _measure(dtype, attention, backward=backward, quick=quick)
            for dtype, attention in cases
            for backward in (True, False)
        ]
    finally:
        torch.set_num_threads(threads)


def _measure(dtype: torch.dtype, attention: str, *, backward: bool, quick: bool) -> dict[str, Any]:
    images = mixed_images(4 if quick else 32, seed=0)
    batch = pack_images(images, patch_size=PATCH_SIZE, seq_len=1024)
    tokens = sum(len(image.patches) for image in images)
    size = {"width": 64, "depth": 1, "num_heads": 1, "mlp_dim": 256} if quick else {"depth": 6}
    torch.manual_seed(0)
    model = NaViT(NaViTConfig.named("s", patch_size=PATCH_SIZE, **size))
    patches, positions, grids, dense_tokens = equal_images(len(images), tokens)

    def packed() -> Tensor:
        return model(batch).pooled

    def dense() -> Tensor:
        return dense_forward(model, patches, positions, grids, attention)

    timed = paired_ratio(
        training_step(model, packed, dtype, backward=backward),
        training_step(model, dense, dtype, backward=backward),
        pairs=2 if quick else 8,
    )
    return {
        "what": ("forward + backward" if backward else "forward")
        + f", {dtype_name(dtype)}, dense {attention}",
        "tokens": tokens,
        "dense_tokens": dense_tokens,
        "packed_tokens_per_s": tokens / timed.seconds_a,
        "packed_over_dense": (tokens / dense_tokens) / timed.ratio,
        "time_ratio": timed,
    }


def training_step(
    model: nn.Module, forward: Callable[[], Tensor], dtype: torch.dtype, *, backward: bool
) -> Callable[[], None]:
    """Make what is timed: a forward pass and, with ``backward``, its gradients."""

    def step() -> None:
        autocast = nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)
        with torch.set_grad_enabled(backward), autocast:
            loss = forward().float().square().sum()
        if backward:
            model.zero_grad()
            loss.backward()

    return step


def mixed_images(count: int, *, seed: int) -> list[RandomImage]:
    """Draw images of lognormal token counts, at most 256, with aspect ratios up to about 2."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for _ in range(count):
        size, shape = torch.randn(2, generator=generator).tolist()
        tokens = min(MAX_TOKENS, 120 * 2.718 ** (0.6 * size))
        rows = max(1, int((tokens * 2.718 ** (0.3 * shape)) ** 0.5))
        cols = max(1, int(tokens / rows))
        images.append(random_image(rows, cols, patch_size=PATCH_SIZE, generator=generator))
    return images


def equal_images(count: int, tokens: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Make ``count`` equal images with together about ``tokens`` tokens, as dense tensors."""
    length = round(tokens / count)
    generator = torch.Generator().manual_seed(1)
    shape = (count, length, 3 * PATCH_SIZE**2)
    patches = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    index = torch.arange(length).repeat(count)
    cols = max(1, int(length**0.5))
    positions = torch.stack([index // cols, index % cols], dim=1).int()
    grids = torch.tensor([length // cols + 1, cols], dtype=torch.int32).repeat(count * length, 1)
    return patches, positions, grids, count * length


def dense_forward(
    model: NaViT, patches: Tensor, positions: Tensor, grids: Tensor, attention: str
) -> Tensor:
    """Run the model's modules as a plain ViT on equal images (n, len, P)."""
    n, length, _ = patches.shape
    x = model.patch_embed(patches.flatten(0, 1)) + model.pos_embed(positions, grids)
    x = x.view(n, length, -1)
    for block in model.blocks:
        x = x + _dense_attention(block.attn, block.norm1(x), attention)
        x = x + block.mlp(block.norm2(x))
    plan = AttentionPlan((length,) * n, x.device)  # equal lengths: pooling reads plain views
    return model.pool(model.norm(x).flatten(0, 1), plan)


def _dense_attention(layer: Any, x: Tensor, attention: str) -> Tensor:
    q, k, v = layer.qkv(x).unflatten(-1, (3, -1, layer.head_dim)).unbind(2)
    q, k = layer.q_norm(q).to(v.dtype), layer.k_norm(k).to(v.dtype)
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    if attention == "sdpa":
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        out = (q * layer.head_dim**-0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
    return layer.proj(out.transpose(1, 2).flatten(2))


def dtype_name(dtype: torch.dtype) -> str:
    """Name a type as in a table."""
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    for row in run():
        print(row["what"], f"{row['packed_over_dense']:.3f}", row["time_ratio"])
