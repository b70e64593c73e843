"""The losses on four processes that hold uneven numbers of pairs, against one that holds all.

In float64, over gloo: the value on every rank, and the mean over the ranks of what each adds to a
gradient, as DDP takes it.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.dense_loss import one_matmul, sigmoid_whole, value_and_gradients
from navit.loss import contrastive_loss, sigmoid_loss
from navit.train.ranks import World
from tests.helpers.distributed import run_ranks

COUNTS = (700, 0, 300, 1048)
"""Pairs of each rank."""
WANTED_DIFFERENCE = 1e-10
"""Largest difference that is wanted."""
DIM, CHUNK = 64, 128
_LOSSES: dict[str, tuple[peers.Loss, peers.Loss]] = {
    "tiled": (contrastive_loss, one_matmul),
    "sigmoid tiled": (sigmoid_loss, sigmoid_whole),
}
"""Ours, and the dense formula."""


def measure(counts: tuple[int, ...] = COUNTS) -> list[dict[str, Any]]:
    """Return the largest differences of each loss."""
    ranks = run_ranks(_on_rank, len(counts), counts)
    rows = []
    for name, (_, dense) in _LOSSES.items():
        exact = value_and_gradients(dense, _inputs(name, sum(counts)))
        found = [rank[name] for rank in ranks]
        value = max(float((rank[0] - exact[0]).abs()) for rank in found)
        # Image and text rows belong to one rank each, scale and bias to all.
        parts = [torch.cat([rank[i] for rank in found]) / len(counts) for i in (1, 2)]
        shared = [torch.stack(x).mean() for x in zip(*(rank[3:] for rank in found), strict=True)]
        pairs = zip([*parts, *shared], exact[1:], strict=True)
        gradient = max(float((a - b).abs().max()) for a, b in pairs)
        rows.append(
            {
                "loss": name,
                "pairs_of_ranks": list(counts),
                "value_difference": value,
                "gradient_difference": gradient,
                "wanted_difference": WANTED_DIFFERENCE,
            }
        )
        print(
            f"{name}, ranks of {', '.join(map(str, counts))} pairs - one process, float64: value "
            f"{value:.1e}, averaged gradients {gradient:.1e} (wanted: {WANTED_DIFFERENCE:.0e})",
            flush=True,
        )
    return rows


def _on_rank(world: World, counts: tuple[int, ...]) -> dict[str, list[Tensor]]:
    first = sum(counts[: world.rank])
    own = slice(first, first + counts[world.rank])
    found = {}
    for name, (loss, _) in _LOSSES.items():
        image, text, *scalars = _inputs(name, sum(counts))
        tiled = partial(loss, chunk_size=CHUNK, group=world.group)
        found[name] = value_and_gradients(tiled, [image[own], text[own], *scalars])
    return found


def _inputs(name: str, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, count, DIM, generator=generator, dtype=torch.float64)
    scalars = [20.0, -10.0] if name.startswith("sigmoid") else [20.0]
    return [*F.normalize(vectors, dim=-1), *torch.tensor(scalars, dtype=torch.float64)]
