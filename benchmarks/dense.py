"""The dense limit: the packed model's own modules as a plain ViT on equal images.

(n, len, D) tensors and one attention a block: what packing would reach if it cost nothing. Half
precision avoids torch's slow fused kernel on a CPU, and inference goes through all blocks 2,048
tokens at a time, as the packed model's does.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from navit.model import NaViT
from navit.model.attention import AttentionPlan
from navit.model.block import CPU_TOKENS, Attention


def equal_images(
    lengths: list[int], patch_size: int, *, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Make equal images with the lengths' total of tokens and their root-mean-square length.

    Returns:
        Patches uint8 (n, len, P), and position and grid of each of their n len tokens.
    """
    length = round((sum(x * x for x in lengths) / len(lengths)) ** 0.5)
    count = max(1, round(sum(lengths) / length))
    generator = torch.Generator().manual_seed(seed)
    shape = (count, length, 3 * patch_size**2)
    patches = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    index = torch.arange(length).repeat(count)
    cols = max(1, int(length**0.5))
    positions = torch.stack([index // cols, index % cols], dim=1).int()
    grids = torch.tensor([-(-length // cols), cols], dtype=torch.int32).repeat(count * length, 1)
    return patches, positions, grids


def equal_plan(patches: Tensor) -> AttentionPlan:
    """Plan images of equal lengths (n, len, P), which pooling reads as plain views."""
    plan = AttentionPlan((patches.shape[1],) * patches.shape[0], patches.device)
    plan.make_tensors()
    return plan


def dense_forward(
    model: NaViT, patches: Tensor, positions: Tensor, grids: Tensor, plan: AttentionPlan
) -> Tensor:
    """Return one vector an image: (n, D).

    Args:
        model: The packed model.
        patches: As `equal_images` makes them.
        positions: As `equal_images` makes them.
        grids: As `equal_images` makes them.
        plan: What `equal_plan` makes of the patches.
    """
    n, length, _ = patches.shape
    x = model.patch_embed(patches.flatten(0, 1)) + model.pos_embed(positions, grids)
    in_parts = x.device.type == "cpu" and not torch.is_grad_enabled()
    at_once = max(1, CPU_TOKENS // length) if in_parts else n
    parts = [_blocks(model, part) for part in x.view(n, length, -1).split(at_once)]
    assert model.pool is not None
    vectors: Tensor = model.pool(model.norm(torch.cat(parts)).flatten(0, 1), plan)
    return vectors


def _blocks(model: NaViT, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = x + _attention(block.attn, block.norm1(x))  # type: ignore[operator, arg-type]
        x = x + block.mlp(block.norm2(x))  # type: ignore[operator]
    return x


def _attention(layer: Attention, x: Tensor) -> Tensor:
    q, k, v = layer.qkv(x).unflatten(-1, (3, -1, layer.head_dim)).unbind(2)
    q, k, v = (y.transpose(1, 2) for y in (*layer.normed(q, k), v))
    if v.dtype == torch.float32 or v.device.type != "cpu":
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        out = (q * layer.head_dim**-0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
    projected: Tensor = layer.proj(out.transpose(1, 2).flatten(2))
    return projected
