"""Patch sizes mixed in one packed batch against one size, and two ways to embed them.

ViT-S from a 32 x 32 buffer, two threads. The batches have the same images in tokens (grids drawn
as in `towers`) and differ in the size of the patches: one of five for each image, in turn, or one
for all. A batch of one size costs what its size does, so the mixed one, run five times, is compared
with five batches, one of each size. Wanted: at least 0.9 of their speed.

The patches of a mixed batch are multiplied by size, with weights resized to it, or mapped to the
buffer's size (``<x, P w> = <P^T x, w>``) and multiplied at once; the library does the first.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_towers import mixed_images, training_step, what
from benchmarks.harness import paired_ratio
from navit.model import NaViT, NaViTConfig
from navit.model.flexi_embed import FlexiPatchEmbed, PatchGroups
from navit.model.pi_resize import pi_matrix
from navit.model.vision import TokenPlan, plan_tokens
from packer.batch import PackedBatch
from tests.helpers.batches import RandomImage, pack_images, random_image

SIZES = (8, 12, 16, 24, 32)
SEQ_LEN = 1024


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Time towers and embeddings, forward and forward + backward, in each type."""
    shape = {"width": 64, "depth": 1, "num_heads": 1, "mlp_dim": 256} if quick else {}
    torch.manual_seed(0)
    model = NaViT(NaViTConfig.named("s", patch_buffer=32, **shape))
    grids = [image.grid for image in mixed_images(5 if quick else 20, seed=0)]
    mixed = of_sizes(grids, [SIZES[i % len(SIZES)] for i in range(len(grids))])
    single = [of_sizes(grids, [size] * len(grids)) for size in SIZES]
    pairs, threads = 2 if quick else 4, torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        return [
            row
            for dtype in (torch.float32, torch.bfloat16)
            for backward in (False, True)
            for row in (
                _towers(model, mixed, single, dtype, backward=backward, pairs=pairs),
                _embeddings(model, mixed, dtype, backward=backward, pairs=2 * pairs),
            )
        ]
    finally:
        torch.set_num_threads(threads)


def _towers(
    model: NaViT,
    mixed: PackedBatch,
    single: list[PackedBatch],
    dtype: torch.dtype,
    *,
    backward: bool,
    pairs: int,
) -> dict[str, Any]:
    """Time batches of one size each against as many mixed ones."""
    step = partial(training_step, model, dtype=dtype, backward=backward)
    apart = [step(partial(_pooled, model, batch)) for batch in single]
    together = step(partial(_pooled, model, mixed))
    timed = paired_ratio(
        lambda: [run() for run in apart], lambda: [together() for _ in apart], pairs=pairs
    )
    print(f"{what(dtype, backward):28} speed of mixed over single sizes: {timed}", flush=True)
    return {"what": what(dtype, backward), "mixed_speed_over_single": timed}


def _embeddings(
    model: NaViT, mixed: PackedBatch, dtype: torch.dtype, *, backward: bool, pairs: int
) -> dict[str, Any]:
    """Time the two ways to embed a mixed batch."""
    embed = model.patch_embed
    assert isinstance(embed, FlexiPatchEmbed), "the tower is flexible"
    plan = plan_tokens(mixed, model.config, dtype=torch.float32)
    assert plan.patches is not None, "the batch is mixed"

    def grouped() -> Tensor:
        out: Tensor = embed(mixed, plan.token_index, plan.patches)
        return out

    step = partial(training_step, embed, dtype=dtype, backward=backward)
    timed = paired_ratio(
        step(grouped), step(partial(embed_in_buffer, embed, mixed, plan)), pairs=pairs
    )
    print(
        f"{what(dtype, backward):28} embedding by size / in the buffer's size: {timed}", flush=True
    )
    return {"what": f"embedding, {what(dtype, backward)}", "by_size_over_buffer_seconds": timed}


def embed_in_buffer(embed: FlexiPatchEmbed, batch: PackedBatch, plan: TokenPlan) -> Tensor:
    """Map every patch to the buffer's size, then multiply all of them at once."""
    groups = plan.patches
    assert isinstance(groups, PatchGroups), "the batch is mixed"
    patches, side = batch.patches.flatten(0, 1), embed.buffer
    parts = []
    for size, members in zip(groups.sizes, groups.members, strict=True):
        index = plan.token_index.index_select(0, members)
        pixels = patches[:, : 3 * size**2].index_select(0, index).float().sub_(127.5)
        matrix = torch.tensor(pi_matrix(side, size), dtype=torch.float32)
        rows = matrix.T @ pixels.view(len(members), size, size * 3)
        columns = rows.view(len(members), side, size, 3).transpose(2, 3) @ matrix
        parts.append(columns.transpose(2, 3).flatten(1))
    whole = torch.cat(parts).index_select(0, groups.place)
    return torch.nn.functional.linear(whole, embed.proj.weight / 127.5, embed.proj.bias)


def of_sizes(grids: list[tuple[int, int]], sizes: list[int]) -> PackedBatch:
    """Pack images of random pixels with the grids and patch sizes given."""
    generator = torch.Generator().manual_seed(0)
    images: list[RandomImage] = [
        random_image(rows, cols, patch_size=size, generator=generator)
        for (rows, cols), size in zip(grids, sizes, strict=True)
    ]
    return pack_images(images, seq_len=SEQ_LEN)


def _pooled(model: NaViT, batch: PackedBatch) -> Tensor:
    pooled: Tensor = model(batch).pooled
    return pooled
